"""Attention maps and the foreground that is cut from them."""

import numpy as np
import pytest
import torch

from cbsa_hf import ZeroShotSegmenter, attention_maps
from cbsa_hf.zero_shot import keep_mass, median_filter


@pytest.mark.parametrize(("patch", "token"), [(None, 0), ((2, 3), 1 + 2 * 5 + 3)])
def test_maps_are_rows_of_the_dense_map(tiny_model, patch, token):
    pixel_values = torch.randn(2, 3, 32, 40)
    maps = attention_maps(tiny_model, pixel_values, patch)
    dense = tiny_model(pixel_values, interpolate_pos_encoding=True, output_attentions=True).attentions
    assert maps.shape == (3, 2, 2, 4, 5)
    for layer in range(3):
        torch.testing.assert_close(maps[layer].flatten(2), dense[layer][:, :, token, 1:])


def test_patch_outside_the_grid(tiny_model):
    with pytest.raises(ValueError, match=r"outside the grid of 4 x 6"):
        attention_maps(tiny_model, torch.randn(1, 3, 32, 48), (4, 0))


def test_keep_mass():
    saliency = np.array([[0.4, 0.1], [0.2, 0.3]])
    assert keep_mass(saliency, 0.4).tolist() == [[True, False], [False, False]]
    assert keep_mass(saliency, 0.65).tolist() == [[True, False], [False, True]]
    assert keep_mass(saliency, 1.0).all()


def test_median_filter():
    maps = torch.zeros(1, 1, 6, 8)
    maps[..., 2, 2] = 100.0  # alone
    maps[..., :, 5:] = 1.0  # a region
    expected = torch.zeros(6, 8)
    expected[:, 5:] = 1.0
    assert torch.equal(median_filter(maps, 5)[0, 0], expected)


def test_segmenter(shipped, photo):
    model, processor = shipped
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = ZeroShotSegmenter(model, processor)(photo)
    assert result.mask.shape == result.saliency.shape == (300, 451)
    assert result.mask.dtype == bool
    assert result.saliency.sum() == pytest.approx(1, abs=1e-4)
    kept = result.saliency[result.mask]
    assert kept.sum() == pytest.approx(0.6, abs=1e-3)
    assert kept.min() >= result.saliency[~result.mask].max()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    heads = [ZeroShotSegmenter(model, processor, head=head)(photo).saliency for head in range(3)]
    assert not np.allclose(heads[0], heads[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [({"mass": 0}, "`mass` is 0"), ({"layer": 12}, "`layer` is 12"), ({"head": 3}, "`head` is 3")],
)
def test_arguments_are_checked(shipped, values, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotSegmenter(*shipped, **values)
