"""Inference in tiles gives the same outputs as without, in little memory."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cbsa_hf import CBSAConfig, CBSAForSemanticSegmentation, CBSAModel, fold, modeling_cbsa, tiles_cbsa


@pytest.fixture
def tiles(monkeypatch):
    """Use tiles of 16 tokens for images of 30 tokens and more. The list has an entry for each layer in tiles."""
    monkeypatch.setattr(modeling_cbsa, "MIN_TOKENS", 30)
    monkeypatch.setattr(tiles_cbsa, "TILE_VALUES", 2 * 16 * 24)
    used = []
    compute = tiles_cbsa.layer_in_tiles

    def record(*args):
        used.append(args)
        return compute(*args)

    monkeypatch.setattr(modeling_cbsa, "layer_in_tiles", record)
    return used


def build(model_class=CBSAModel, **changes):
    """A model in float64 with random parameters and statistics."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = model_class(CBSAConfig(**sizes | {"representatives_size": 2} | changes)).eval().double()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype == torch.float64:
            nn.init.uniform_(tensor, 0.2, 1.0) if tensor.ndim == 1 else nn.init.normal_(tensor, std=0.3)
    return model


CASES = {
    "default": {},
    "mlp": {"feed_forward_type": "mlp"},
    "wide heads": {"head_dim": 16},
    "registers": {"num_register_tokens": 3},
    "all tokens but the last": {"pooled_tokens": "all_but_last"},
    "learned": {"representatives_type": "learned"},
    "patchify": {"patch_embedding_type": "patchify"},
    "one layer of two": {"attention_type": ["mssa", "cbsa"]},
}


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_tiles_do_not_change_outputs(tiles, case, folds):
    """The expected outputs are computed with gradients, which switch tiles off."""
    model = build(**CASES[case])
    model = fold(model) if folds else model
    pixel_values = torch.randn(2, 3, 38, 29, dtype=torch.float64)
    with torch.enable_grad():
        expected = model(pixel_values, interpolate_pos_encoding=True).last_hidden_state.detach()
    assert not tiles
    found = model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    assert len(tiles) == model.config.layer_attention_types.count("cbsa")
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_large_scores(tiles):
    """Scores that differ by thousands between tiles give finite weights."""
    model = build().float()
    for layer in model.layers:
        layer.attention.proj.weight *= 100
    pixel_values = torch.randn(1, 3, 40, 40)
    with torch.enable_grad():
        expected = model(pixel_values, interpolate_pos_encoding=True).last_hidden_state.detach()
    found = model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    assert len(tiles) == 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_maps_hooks_and_hidden_states_see_all_tokens(tiles):
    """Layers run without tiles when maps are requested or a part of them has a hook. Hidden states are complete."""
    model, pixel_values = build(), torch.randn(1, 3, 40, 40, dtype=torch.float64)
    outputs = model(pixel_values, interpolate_pos_encoding=True, output_representative_attentions=True)
    assert [attention.shape for attention in outputs.representative_attentions] == [(1, 2, 4, 101)] * 2
    assert not tiles
    seen = []
    handle = model.layers[0].layernorm_after.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(pixel_values, interpolate_pos_encoding=True)
    assert seen == [(1, 101, 24)] and len(tiles) == 1
    handle.remove()
    hidden_states = model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 3 and len(tiles) == 3


@torch.no_grad()
def test_segmenter_in_tiles(tiles):
    model, pixel_values = build(CBSAForSemanticSegmentation, num_labels=3), torch.randn(1, 3, 41, 38).double()
    with torch.enable_grad():
        expected = model(pixel_values).logits.detach()
    torch.testing.assert_close(model(pixel_values).logits, expected)
    assert tiles


@torch.no_grad()
def test_peak_memory():
    """At most 12 bytes per token and channel, apart from weights and image."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 8, "image_size": 64}
    config = CBSAConfig(**sizes, representatives_size=4)
    model, pixel_values = fold(CBSAModel(config).eval()), torch.randn(1, 3, 2048, 2048)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model(pixel_values, interpolate_pos_encoding=True)
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak <= 12 * 256 * 256 * 32
