"""A folded model gives the same outputs as the model that it was made from."""

import pytest
import torch
from conftest import assert_matches, flatten_outputs
from torch import nn

from cbsa_hf import (
    CBSABackbone,
    CBSAConfig,
    CBSAForImageClassification,
    CBSAForSemanticSegmentation,
    CBSAModel,
    exact_maps,
    fold,
    load_checkpoint,
)
from cbsa_hf.attention_cbsa import ATTENTIONS
from cbsa_hf.mask_decoder_cbsa import DECODERS
from cbsa_hf.modeling_cbsa import FEED_FORWARDS


PIXELS = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
TINY = {"image_size": 32, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"representatives_size": 2, "decoder_num_heads": 2, "decoder_representatives_size": 2, "num_labels": 3}


def build(model_class, **changes):
    """A model in float64 with random parameters and statistics, so that a part that folding forgets shows."""
    torch.manual_seed(0)
    model = model_class(CBSAConfig(**TINY, **changes)).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.float32:
            nn.init.uniform_(tensor, *((0.5, 1.5) if tensor.ndim == 1 or "step" in name else (-0.2, 0.2)))
    return model.double()


@torch.no_grad()
def assert_equal_outputs(model, **kwargs):
    folded = fold(model)
    assert type(folded) is type(model)
    expected, actual = model(PIXELS, **kwargs), folded(PIXELS, **kwargs)
    assert expected.keys() == actual.keys()
    for found, wanted in zip(flatten_outputs(actual), flatten_outputs(expected), strict=True):
        assert_matches(found, wanted, 1e-12)


@pytest.mark.parametrize("attention_type", ATTENTIONS)
@pytest.mark.parametrize("feed_forward_type", FEED_FORWARDS)
def test_folding_of_operators(attention_type, feed_forward_type):
    model = build(CBSAModel, attention_type=attention_type, feed_forward_type=feed_forward_type)
    kwargs = (
        {"output_representative_attentions": True} if ATTENTIONS[attention_type].has_representative_attentions else {}
    )
    assert_equal_outputs(
        model, interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True, **kwargs
    )


@pytest.mark.parametrize("patch_embedding_type", ["conv_stem", "patchify", "linear"])
def test_folding_of_embeddings(patch_embedding_type):
    model = build(CBSAForImageClassification, patch_embedding_type=patch_embedding_type, num_register_tokens=2)
    assert_equal_outputs(model, interpolate_pos_encoding=True)


@pytest.mark.parametrize("decoder_type", DECODERS)
@pytest.mark.parametrize("decoder_skip", [False, True])
def test_folding_of_segmenters(decoder_type, decoder_skip):
    kwargs = {"output_decoder_attentions": True} if decoder_type != "linear" else {}
    model = build(CBSAForSemanticSegmentation, decoder_type=decoder_type, decoder_skip=decoder_skip)
    assert_equal_outputs(model, **kwargs)


def test_folding_of_a_backbone():
    assert_equal_outputs(build(CBSABackbone, attention_type=["mssa", "cbsa"], out_features=["stage1", "stage2"]))


def test_folding_keeps_exact_maps():
    model = build(CBSAModel)
    for expected, actual in zip(*(exact_maps(m, PIXELS.double()) for m in (model, fold(model))), strict=True):
        assert_matches(actual.representative_attentions, expected.representative_attentions, 1e-12)
        assert_matches(actual.writes, expected.writes, 1e-12)


def test_norms_are_folded():
    folded = fold(build(CBSAModel))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(layer.layernorm_before.weight is None for layer in folded.layers)


def test_folding_of_the_shipped_model(photo):
    model, processor = load_checkpoint()
    pixel_values = processor(photo, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert_matches(fold(model)(pixel_values).logits, model(pixel_values).logits, 1e-5)


def test_folded_model_is_saved_and_loaded(tmp_path):
    folded = fold(build(CBSAForImageClassification))
    folded.save_pretrained(tmp_path)
    again = CBSAForImageClassification.from_pretrained(tmp_path)
    assert again.config.folded
    assert fold(again) is again
    with torch.no_grad():
        kwargs = {"interpolate_pos_encoding": True}
        torch.testing.assert_close(again(PIXELS, **kwargs).logits, folded(PIXELS, **kwargs).logits)


def test_folding_keeps_the_dtype():
    model = build(CBSAModel).bfloat16()
    assert {parameter.dtype for parameter in fold(model).parameters()} == {torch.bfloat16}


def test_folded_model_cannot_be_trained():
    folded = fold(build(CBSAModel))
    with pytest.raises(ValueError, match="A folded model is for inference; train the model"):
        folded.train()
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_wrapped_model_raises():
    with pytest.raises(ValueError, match="A Sequential cannot be folded; give the model that it wraps"):
        fold(nn.Sequential(build(CBSAModel)))
