"""Functions encode a photo once, and an encoding holds what the model returns."""

from collections import Counter

import pytest
import torch
from torch import nn

from cbsa_hf import CBSAForImageClassification, ZeroShotSegmenter, attention_maps, exact_maps, measure_layers
from cbsa_hf.interpretability.report import inspect_photo
from cbsa_hf.segmentation.inference import encode


@pytest.fixture
def passes(shipped, monkeypatch):
    """Counts calls of the encoder, its first operator, and `steps`. The copy that `encode` runs keeps the hooks."""
    model, _ = shipped
    encoder, counts = model.cbsa, Counter()
    operator = type(encoder.layers[0].attention)
    compute = operator.steps

    def steps(self, *args):
        counts["steps"] += 1
        return compute(self, *args)

    monkeypatch.setattr(operator, "steps", steps)
    handles = [
        encoder.register_forward_hook(lambda *args: counts.update(["encoder"])),
        encoder.layers[0].attention.register_forward_hook(lambda *args: counts.update(["first operator"])),
    ]
    yield counts
    for handle in handles:
        handle.remove()


PASSES = {"ncut": 2, "representatives": 1, "attention": 1}  # `ncut` also encodes the mirrored, smaller image


@pytest.mark.parametrize(("method", "expected"), PASSES.items())
def test_passes_of_a_segmenter(shipped, photo, passes, method, expected):
    ZeroShotSegmenter(*shipped, method, long_side=64)(photo)
    assert passes == {"encoder": expected, "first operator": expected, "steps": expected * 12}


def test_report_maps_and_measures_take_one_pass(shipped, photo, passes):
    model, processor = shipped
    one = {"encoder": 1, "first operator": 1, "steps": 12}
    pixel_values = torch.randn(1, 3, 32, 48)
    for function in (
        lambda: inspect_photo(photo, model, processor, long_side=64),
        lambda: attention_maps(model, pixel_values),
        lambda: exact_maps(model, pixel_values),
        lambda: measure_layers(model, [pixel_values]),
    ):
        passes.clear()
        function()
        assert passes == one


def test_one_encoding_gives_segments_and_maps(shipped, photo, passes):
    """Segments and maps from one encoding equal those from an encoding each."""
    model, processor = shipped
    segmenter = ZeroShotSegmenter(model, processor, "representatives", long_side=64)
    expected = segmenter(photo)
    passes.clear()
    encoding = segmenter.encode(photo, output_hidden_states=True)
    found = segmenter.segment(photo, encoding)
    maps = encoding.attention_maps((1, 2))
    assert passes["encoder"] == 1
    assert (found.scores == expected.scores).all()
    assert torch.equal(maps, attention_maps(model, encoding.pixel_values, (1, 2)))


def test_encoding_equals_the_outputs_of_the_model(tiny_config):
    """The layers differ. Neither hooks nor replaced methods stay in the copy."""
    tiny_config.attention_type = ["mssa", "cbsa", "agent"]
    tiny_config.num_register_tokens = 2
    model = CBSAForImageClassification(tiny_config).eval()
    pixel_values = torch.randn(2, 3, 40, 56)
    encoding = encode(model, pixel_values, output_hidden_states=True, output_attentions=True, steps_of=range(3))
    outputs = model.cbsa(
        pixel_values,
        interpolate_pos_encoding=True,
        output_hidden_states=True,
        output_attentions=True,
        output_representative_attentions=True,
    )
    assert encoding.grid == (5, 7)
    assert torch.equal(encoding.tokens, outputs.last_hidden_state)
    assert torch.equal(encoding.patches[:, 2, 3], outputs.last_hidden_state[:, 3 + 2 * 7 + 3])
    for found, expected in zip(encoding.hidden_states, outputs.hidden_states, strict=True):
        assert torch.equal(found, expected)
    for index, layer in enumerate(model.cbsa.layers):
        before, attended = outputs.hidden_states[index], encoding.attended_states[index]
        update, _, _ = layer.attention(layer.layernorm_before(before), (5, 7), output_attentions=True)
        torch.testing.assert_close(attended, before + update)
    maps = [outputs.attentions[0], None, outputs.attentions[2]]
    for found, expected in (
        *zip(encoding.attentions, maps, strict=True),
        *zip(encoding.representative_attentions, outputs.representative_attentions, strict=True),
    ):
        assert (found is None and expected is None) or torch.equal(found, expected)
    assert list(encoding.recorded) == [1]
    assert torch.equal(encoding.steps(1).attention, encoding.representative_attentions[1])
    assert not any("steps" in vars(module) for module in encoding.encoder.modules())
    assert not any(
        module._forward_pre_hooks for module in encoding.encoder.modules() if isinstance(module, nn.LayerNorm)
    )
    assert not encoding.tokens.requires_grad and not encoding.recorded[1].kappa.requires_grad


def test_encoding_keeps_only_what_is_requested(tiny_model):
    encoding = encode(tiny_model, torch.randn(1, 3, 32, 48))
    assert encoding.hidden_states is encoding.attended_states is None
    assert encoding.attentions is encoding.representative_attentions is None
    assert encoding.recorded == {}


@pytest.mark.parametrize("function", [encode, attention_maps, exact_maps, measure_layers])
def test_pixels_of_wrong_shape_raise(tiny_model, function):
    """One image without a batch, and one batch in place of a list of batches."""
    pixel_values = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\); give \(batch, channels, height, width\)"):
        function(tiny_model, pixel_values if function is measure_layers else pixel_values[0])
