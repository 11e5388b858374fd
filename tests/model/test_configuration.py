"""The configuration imports no other module, matches the tables of classes, and refuses bad values."""

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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 12}, "`patch_size` is 12, and has to be a power of two"),
        ({"hidden_size": 100}, "`hidden_size` is 100, and has to be a multiple of 8"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0, and has to be at least 1"),
        ({"pooled_tokens": "all"}, "`pooled_tokens` is 'all'; choose one of 'patches', 'all_but_last'"),
        ({"image_size": (32, 0)}, "`image_size` is .*each at least 1"),
        ({"image_size": [32]}, r"`image_size` is \[32\]; give one side or \(height, width\)"),
        ({"representatives_size": (2, 2, 2)}, "'representatives_size'.* expected a tuple of length 2"),
        ({"ista_threshold": -0.1}, "`ista_threshold` is -0.1, and must not be negative"),
    ],
)
def test_bad_configuration_raises(values, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        CBSAConfig(**values)
