"""Sliding windows, against the model on the whole image, and against averages over all windows."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PEAK_MEMORY
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

from cbsa_hf import CBSAConfig, CBSAForSemanticSegmentation, ImageError, SlidingWindowSegmenter
from cbsa_hf.segmentation.sliding_window import LogitRows


@pytest.fixture
def processor():
    return SegformerImageProcessorPil(size={"height": 32, "width": 48}, do_convert_rgb=True)


@pytest.fixture
def picture() -> Image.Image:
    """Noise in coarse and fine blocks, 131 x 97."""
    random = np.random.default_rng(0)
    coarse, fine = (random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((7, 9), (97, 131)))
    coarse = np.asarray(Image.fromarray(coarse).resize((131, 97), Image.Resampling.NEAREST))
    return Image.fromarray(coarse // 2 + fine // 2)


@torch.no_grad()
def average_logits(model, processor, image, size, window, stride, flip) -> torch.Tensor:
    """Logits (K, height, width) of the image, averaged over all windows of the image resized to `size`."""
    resized = image.resize((size[1], size[0]), processor.resample)
    pixel_values = processor(resized, do_resize=False, return_tensors="pt")["pixel_values"]
    sums, counts = torch.zeros(model.config.num_labels, *size), torch.zeros(size)
    height, width = min(window[0], size[0]), min(window[1], size[1])
    for top in {min(i, size[0] - height) for i in range(0, size[0], stride[0])}:
        for left in {min(i, size[1] - width) for i in range(0, size[1], stride[1])}:
            part = slice(top, top + height), slice(left, left + width)
            crop = pixel_values[(..., *part)]
            logits = model(crop).logits[0]
            if flip:
                logits = (logits + model(crop.flip(3)).logits[0].flip(2)) / 2
            sums[(..., *part)] += logits
            counts[part] += 1
    return F.interpolate((sums / counts)[None], size=(image.height, image.width), mode="bilinear")[0]


def assert_labels(labels: np.ndarray, logits: torch.Tensor, tolerance: float):
    """Assert that every label has the largest logit, up to `tolerance`, and that there are several labels."""
    assert labels.shape == logits.shape[1:]
    chosen = logits.gather(0, torch.from_numpy(labels.astype(np.int64))[None])[0]
    assert (logits.amax(0) - chosen).max() <= tolerance
    assert len(np.unique(labels)) >= 3


class RedOrNot(nn.Module):
    """A model with two classes, red or not, whose logits have a coarse grid."""

    config = SimpleNamespace(num_labels=2)
    device = torch.device("cpu")

    def forward(self, pixel_values):
        red = F.avg_pool2d(pixel_values[:, :1], 20) - 0.5
        return SimpleNamespace(logits=torch.cat([-red, red], dim=1))


def test_sharp_edges(processor):
    """With `sharp`, the edge of a class follows the edge of a disc, although the logits have a coarse grid."""
    processor.do_normalize = False
    image = Image.new("RGB", (320, 240), (30, 90, 40))
    ImageDraw.Draw(image).ellipse((100, 50, 240, 190), (220, 60, 50))
    truth = np.asarray(image)[..., 0] > 100

    def overlap(**options) -> float:
        labels = SlidingWindowSegmenter(RedOrNot(), processor, window=(160, 160), **options)(image)
        return ((labels == 1) & truth).sum() / ((labels == 1) | truth).sum()

    assert overlap(sharp=True) > max(0.98, overlap() + 0.01)


@pytest.mark.parametrize("window", [(97, 131), 200, (97, 1000)])
def test_one_window_is_the_whole_image(tiny_segmenter, processor, picture, window):
    labels = SlidingWindowSegmenter(tiny_segmenter, processor, window)(picture)
    pixel_values = processor(picture, do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = tiny_segmenter(pixel_values).logits[0].argmax(0)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, expected)


@pytest.mark.parametrize(
    ("window", "stride"),
    [
        (None, None),
        ((32, 48), (32, 48)),
        ((32, 48), (20, 31)),
        (40, 7),
        ((97, 30), (97, 30)),
        ((16, 131), 16),
        ((31, 25), (31, 1)),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_overlaps_are_averaged(tiny_segmenter, processor, picture, window, stride, batch_size):
    labels = SlidingWindowSegmenter(tiny_segmenter, processor, window, stride, batch_size)(picture)
    pairs = [window or (32, 48), stride or (21, 32)]
    window, stride = ((pair, pair) if isinstance(pair, int) else pair for pair in pairs)
    logits = average_logits(tiny_segmenter, processor, picture, (97, 131), window, stride, flip=False)
    assert_labels(labels, logits, 1e-5)


@pytest.mark.parametrize(
    ("long_side", "scales", "flip"),
    [
        (None, [1], True),
        (64, [1], False),
        (524, [1], False),  # four times the image, so some rows of logits are never read
        (None, [0.5, 1, 1.75], True),
        (96, [0.75, 1.5], False),
    ],
)
def test_scales_and_flip(tiny_segmenter, processor, picture, long_side, scales, flip):
    segmenter = SlidingWindowSegmenter(
        tiny_segmenter, processor, (32, 48), (24, 24), long_side=long_side, scales=scales, flip=flip
    )
    logits = 0
    for scale in scales:
        factor = scale * (long_side or 131) / 131
        size = (round(97 * factor), round(131 * factor))
        logits = logits + average_logits(tiny_segmenter, processor, picture, size, (32, 48), (24, 24), flip)
    assert_labels(segmenter(picture), logits / len(scales), 1e-3)


@pytest.mark.parametrize(("bounds", "long_side"), [((64, 64), 64), ((200, 64), 64), ((74, 1000), 100)])
def test_processor_sets_size_and_window(tiny_segmenter, processor, picture, bounds, long_side):
    """The picture, 131 x 97, fills the bounds in `size`, and windows are as large as `crop_size`."""
    sizes = {"size": dict(zip(("max_height", "max_width"), bounds, strict=True)), "crop_size": dict(processor.size)}
    labels = SlidingWindowSegmenter(tiny_segmenter, SegformerImageProcessorPil(**sizes))(picture)
    assert np.array_equal(labels, SlidingWindowSegmenter(tiny_segmenter, processor, long_side=long_side)(picture))
    assert not np.array_equal(labels, SlidingWindowSegmenter(tiny_segmenter, processor)(picture))


def test_image_is_not_cropped(tiny_segmenter, processor, picture):
    """The segmenter does not crop the centre, even if the processor does."""
    cropping = SegformerImageProcessorPil(size=dict(processor.size), crop_size=16, do_center_crop=True)
    labels = SlidingWindowSegmenter(tiny_segmenter, cropping)(picture)
    assert np.array_equal(labels, SlidingWindowSegmenter(tiny_segmenter, processor)(picture))


@pytest.mark.parametrize("size", [(97, 131), (200, 262), (400, 60), (31, 300), (1, 1)])
def test_rows_equal_those_of_the_whole_image(size):
    logits = torch.randn(5, 97, 131)

    def predict(boxes):
        return [logits[:, top:bottom, left:right] for left, top, right, bottom in boxes]

    rows = LogitRows(predict, (97, 131), (32, 48), (19, 40), 5, logits.device)
    parts = [slice(i, min(i + 10, size[0])) for i in range(0, size[0], 10)]
    resized = torch.cat([rows.resized(part, size) for part in parts], dim=1)
    expected = F.interpolate(logits[None], size=size, mode="bilinear")[0]
    torch.testing.assert_close(resized, expected, rtol=1e-4, atol=1e-4)


def test_model_of_transformers(processor, picture):
    """SegFormer gives logits that are smaller than its input."""
    torch.manual_seed(0)
    config = SegformerConfig(
        depths=[1, 1], hidden_sizes=[8, 8], num_attention_heads=[1, 1], num_encoder_blocks=2, decoder_hidden_size=8
    )
    model = SegformerForSemanticSegmentation(config).eval()
    labels = SlidingWindowSegmenter(model, processor, 200)(picture)
    with torch.no_grad():
        outputs = model(processor(picture, do_resize=False, return_tensors="pt")["pixel_values"])
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(97, 131)])
    assert np.array_equal(labels, expected)


def test_any_source(tiny_segmenter, processor, picture, tmp_path):
    segmenter = SlidingWindowSegmenter(tiny_segmenter, processor)
    grey = picture.convert("L")
    picture.save(tmp_path / "picture.png")
    colour = segmenter(picture)
    several = segmenter([grey, grey.convert("RGB"), np.asarray(picture), tmp_path / "picture.png"])
    assert np.array_equal(several[0], several[1])
    assert np.array_equal(several[2], colour)
    assert np.array_equal(several[3], colour)
    with pytest.raises(ValueError, match=r"There is no file nothing\.png"):
        segmenter("nothing.png")


def test_model_in_training_mode_is_not_changed(tiny_segmenter, processor, picture):
    expected = SlidingWindowSegmenter(tiny_segmenter, processor)(picture)
    state = {name: tensor.clone() for name, tensor in tiny_segmenter.state_dict().items()}
    tiny_segmenter.train()
    assert np.array_equal(SlidingWindowSegmenter(tiny_segmenter, processor)(picture), expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_segmenter.state_dict().items())
    assert tiny_segmenter.training


MEASURE_MEMORY = (
    PEAK_MEMORY
    + """
import sys

import numpy as np
from PIL import Image
from transformers import SegformerImageProcessorPil

from cbsa_hf import CBSAForSemanticSegmentation, SlidingWindowSegmenter

model = CBSAForSemanticSegmentation.from_pretrained(sys.argv[1]).eval()
processor = SegformerImageProcessorPil(size={"height": 512, "width": 512})
pixels = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
image = Image.fromarray(pixels)
segmenter = SlidingWindowSegmenter(model, processor, batch_size=2, scales=[1, 0.2])
segmenter(image.crop((0, 0, 300, 300)))
before = peak_memory()
labels = segmenter(image)
assert labels.shape == (3000, 4000) and labels.max() < 11
print((peak_memory() - before) / 2**10)
"""
)


def test_memory_is_bounded(tiny_config, tmp_path):
    """Logits of 4000 x 3000 pixels in 11 classes have 500 MiB, and those of a band of 512 rows 86 MiB."""
    config = CBSAConfig(**tiny_config.to_dict() | {"id2label": {i: str(i) for i in range(11)}, "label2id": None})
    CBSAForSemanticSegmentation(config).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE_MEMORY, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 600  # about 300 measured, with two copies of the image


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0}, r"`window` is \(0, 0\); give a height and width of at least 1"),
        ({"window": 8, "stride": 9}, r"`stride` is \(9, 9\); give at least 1 and at most the window, \(8, 8\)"),
        ({"stride": (1, 0)}, r"`stride` is \(1, 0\)"),
        ({"batch_size": 0}, "`batch_size` is 0, and has to be at least 1"),
        ({"long_side": 0}, "`long_side` is 0, and has to be at least 1"),
        ({"scales": []}, r"`scales` is \[\]; give one factor or more"),
        ({"scales": [1, -1]}, r"`scales` is \[1, -1\]; give one factor or more, each above 0"),
    ],
)
def test_bad_settings_raise(tiny_segmenter, processor, values, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowSegmenter(tiny_segmenter, processor, **values)


def test_processor_without_a_window_raises(tiny_segmenter):
    processor = SegformerImageProcessorPil(size={"shortest_edge": 40})
    with pytest.raises(ValueError, match=r"The image processor's size is {'shortest_edge': 40}; give a `window`."):
        SlidingWindowSegmenter(tiny_segmenter, processor)


def test_bad_photo_in_a_list_gives_an_error(tiny_segmenter, processor, picture, tmp_path):
    segmenter = SlidingWindowSegmenter(tiny_segmenter, processor)
    with pytest.warns(UserWarning, match="Image 1 of 3 is left out: There is no file"):
        first, bad, last = segmenter([picture, tmp_path / "none.png", picture])
    assert isinstance(bad, ImageError)
    assert np.array_equal(first, last) and np.array_equal(first, segmenter(picture))


def test_logits_that_are_not_finite_raise(tiny_segmenter, processor, picture):
    with torch.no_grad():
        tiny_segmenter.cbsa.layernorm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="outputs are not finite"):
        SlidingWindowSegmenter(tiny_segmenter, processor)(picture)
