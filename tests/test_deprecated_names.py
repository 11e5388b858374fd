"""Deprecated names work for one version, and warn with the new name."""

import importlib
import sys

import pytest
import torch

from cbsa_hf import exact_maps, measure_layers


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("cbsa_hf.images", "cbsa_hf.segmentation.images", "open_image"),
        ("cbsa_hf.convert_checkpoints", "cbsa_hf.conversion.convert", "convert_checkpoint"),
    ],
)
def test_module_paths_are_deprecated(old, new, name):
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"`{old}` is now `{new}`"):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)


def test_factor_is_deprecated(tiny_model):
    found = exact_maps(tiny_model, torch.randn(1, 3, 32, 48))[0]
    with pytest.warns(FutureWarning, match="`factor` is now `representative_attentions`"):
        assert found.factor is found.representative_attentions


def test_factor_rank_is_deprecated(tiny_model):
    measures = measure_layers(tiny_model, [torch.randn(1, 3, 32, 48)])
    with pytest.warns(FutureWarning, match="`factor_rank` is now `representative_attention_rank`"):
        assert measures.factor_rank is measures.representative_attention_rank
