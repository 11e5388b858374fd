"""The configuration imports no other module, and its `Literal` types match the tables of classes."""

import importlib.util
from typing import get_args

import pytest
from huggingface_hub.errors import StrictDataclassError

from cbsa_hf import CBSAConfig, configuration_cbsa
from cbsa_hf.attention_cbsa import ATTENTIONS
from cbsa_hf.configuration_cbsa import (
    AttentionType,
    DecoderType,
    FeedForwardType,
    PatchEmbeddingType,
    RepresentativeAttentionType,
)
from cbsa_hf.mask_decoder_cbsa import DECODERS
from cbsa_hf.modeling_cbsa import FEED_FORWARDS, PATCH_EMBEDDINGS


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (ATTENTIONS, AttentionType),
        (FEED_FORWARDS, FeedForwardType),
        (PATCH_EMBEDDINGS, PatchEmbeddingType),
        (DECODERS, DecoderType),
    ],
)
def test_literals_match_the_tables(table, names):
    assert set(table) == set(get_args(names))


def test_attention_types_with_representatives():
    names = {name for name, operator in ATTENTIONS.items() if operator.uses_representatives}
    assert names == set(get_args(RepresentativeAttentionType))


def test_imports_no_other_module():
    """The file runs outside the package, where a relative import would fail."""
    spec = importlib.util.spec_from_file_location("alone", configuration_cbsa.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.CBSAConfig().to_dict() == CBSAConfig().to_dict()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("decoder_type", "mlp", "`decoder_type` is 'mlp'; choose one of 'cbsa', 'mssa', 'softmax', 'linear'."),
        (
            "feed_forward_type",
            "swiglu",
            "`feed_forward_type` is 'swiglu'; choose one of 'ista', 'odl', 'mlp', 'none'.",
        ),
        ("pooled_tokens", None, "`pooled_tokens` is None; choose one of 'patches', 'all_but_last'."),
        (
            "attention_type",
            ["cbsa", "mixer"],
            "`attention_type` is 'mixer'; choose one of 'cbsa', 'agent', 'mita', 'mssa', 'tssa', 'linear', 'softmax'.",
        ),
    ],
)
def test_unknown_name_raises_and_changes_nothing(name, value, sentence):
    with pytest.raises(StrictDataclassError) as given:
        CBSAConfig(**{name: value})
    config = CBSAConfig()
    before = config.to_dict()
    with pytest.raises(StrictDataclassError) as assigned:
        setattr(config, name, value)
    assert [str(raised.value.__cause__) for raised in (given, assigned)] == [sentence] * 2
    assert config.to_dict() == before


def test_wrong_type_raises():
    with pytest.raises(StrictDataclassError, match="expected int, got str"):
        CBSAConfig(hidden_size="wide")
