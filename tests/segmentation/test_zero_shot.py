"""Zero-shot segmentation with every method, attention type and kind of image; it beats chance on planted objects."""

import base64
import io
import json
import sys

import numpy as np
import pytest
import skimage.data
import torch
from conftest import run_without_package
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, ViTImageProcessorPil, pipeline

from cbsa_hf import (
    CBSAForImageClassification,
    CBSAModel,
    ImageError,
    ZeroShotSegmentationPipeline,
    ZeroShotSegmenter,
)
from cbsa_hf.attention_cbsa import ATTENTIONS
from cbsa_hf.interpretability.attention_maps import exact_maps
from cbsa_hf.segmentation.images import follow_edges
from cbsa_hf.segmentation.inference import encode
from cbsa_hf.segmentation.patch_grouping import (
    METHODS,
    Options,
    border_mask,
    cls_attention,
    flip_scale_features,
    foreground,
    layer_attention,
    median_filter,
    patch_descriptors,
    patch_tokens,
    representative_affinity,
    smallest_share,
)


@pytest.fixture(scope="module")
def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 32, "width": 48}, do_convert_rgb=True)


def test_smallest_share():
    saliency = torch.tensor([[0.4, 0.1], [0.2, 0.3]])
    assert [smallest_share(saliency, mass).item() for mass in (0.4, 0.65, 1.0)] == pytest.approx([0.4, 0.3, 0.1])


def test_median_filter():
    maps = torch.zeros(1, 1, 6, 8)
    maps[..., 2, 2] = 100.0  # an isolated value
    maps[..., :, 5:] = 1.0  # a region
    expected = torch.zeros(6, 8)
    expected[:, 5:] = 1.0
    assert torch.equal(median_filter(maps, 5)[0, 0], expected)


def test_border_mask():
    assert border_mask((3, 4)).reshape(3, 4).tolist() == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    assert border_mask((1, 1)).tolist() == [1]


def check_result(result, image: Image.Image):
    """Assert what holds for every result, such as finite scores and a partition into sorted segments."""
    shape = (image.height, image.width)
    assert result.mask.shape == result.scores.shape == result.labels.shape == shape
    assert result.mask.dtype == bool
    assert np.array_equal(result.mask, result.scores > 0)
    assert np.isfinite(result.scores).all()
    assert np.array_equal(np.sum([segment.mask for segment in result.segments], axis=0), np.ones(shape))  # a partition
    scores = [segment.score for segment in result.segments]
    assert scores == sorted(scores, reverse=True)
    for i, segment in enumerate(result.segments):
        assert np.array_equal(result.labels == i, segment.mask)
        assert segment.score == pytest.approx(result.scores[segment.mask].mean(), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_every_method_for_every_attention(tiny_config, processor, photo, attention_type, method):
    torch.manual_seed(0)
    config = type(tiny_config)(**{**tiny_config.to_dict(), "attention_type": attention_type})
    model = CBSAForImageClassification(config)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"attention_weight": 0.5} if method == "ncut" else {}
    result = ZeroShotSegmenter(model, processor, method, long_side=64, num_segments=3, **options)(photo)
    check_result(result, photo)
    assert 1 <= len(result.segments) <= 3  # with random weights, all tokens may be alike
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_affinity_from_attention(tiny_config, attention_type):
    """A factor gives the map, other maps are made symmetric, and both leave out CLS."""
    model = CBSAForImageClassification(
        type(tiny_config)(**{**tiny_config.to_dict(), "attention_type": attention_type})
    )
    pixel_values = torch.randn(1, 3, 32, 40)
    model.eval()
    outputs = model.cbsa(pixel_values, interpolate_pos_encoding=True, output_attentions=True)
    expected = outputs.attentions[1][0, 1:, 1:, 1:].double()
    encoding = encode(model, pixel_values, output_attentions=True)
    attention = layer_attention(encoding, Options(layer=1, head=1))
    torch.testing.assert_close(
        patch_tokens(encoding).flatten(0, 1), outputs.last_hidden_state[0, 1:], rtol=1e-4, atol=1e-5
    )
    if model.cbsa.layers[0].attention.map_is_gram:
        attention = attention.mT @ attention
    else:
        expected = (expected + expected.mT) / 2
    torch.testing.assert_close(attention, expected, rtol=1e-4, atol=1e-6)


def test_flip_scale_features(tiny_model):
    """Normalised tokens, plus those of the mirror image at two thirds of the size, mirrored back and interpolated."""
    pixel_values = torch.randn(1, 3, 48, 24)
    encoding = encode(tiny_model, pixel_values)
    second = flip_scale_features(encoding) - F.normalize(patch_tokens(encoding), dim=2)
    smaller = F.interpolate(pixel_values, size=(32, 16), mode="bilinear", antialias=True).flip(3)
    mirrored = tiny_model.cbsa(smaller, interpolate_pos_encoding=True).last_hidden_state[0, 1:].detach()
    mirrored = F.normalize(mirrored, dim=1).unflatten(0, (4, 2))
    across = torch.tensor([[0.0, 1], [0.5, 0.5], [1, 0]])  # 2 columns, mirrored, to 3
    down = torch.zeros(6, 4)  # 4 rows to 6
    for row, place in enumerate([0, 0.5, 7 / 6, 11 / 6, 2.5, 3]):
        down[row, int(place)] = 1 - place % 1
        down[row, min(int(place) + 1, 3)] += place % 1
    torch.testing.assert_close(second, torch.einsum("ir,jc,rcd->ijd", down, across, mirrored), rtol=1e-4, atol=1e-5)


def test_patch_descriptors(tiny_model):
    """Features minus half their mean, normalised; and 0.15 times the difference from the mean colour."""
    pixel_values = torch.randn(1, 3, 32, 48)
    encoding = encode(tiny_model, pixel_values)
    described = patch_descriptors(encoding)
    features = flip_scale_features(encoding).double()
    for row in range(4):
        for column in range(6):
            feature = features[row, column] - features.mean((0, 1)) / 2
            patch = pixel_values[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].double()
            colour = patch.mean((1, 2)) - pixel_values[0].double().mean((1, 2))
            expected = torch.cat([feature / feature.norm(), 0.15 * colour])
            torch.testing.assert_close(described[6 * row + column], expected, rtol=1e-4, atol=1e-6)


def test_foreground(tiny_model):
    """Few visits of the border, plus a quarter of the nearness to the centre and of the attention of CLS."""
    pixel_values, border_visits = torch.randn(1, 3, 32, 48), torch.randn(24, dtype=torch.float64)
    rows, columns = np.mgrid[0:4, 0:6]
    central = -(((2 * rows - 3) / 4) ** 2 + ((2 * columns - 5) / 6) ** 2)
    encoding = encode(tiny_model, pixel_values, output_attentions=True)
    attended = cls_attention(encoding, None).mean(0).log().numpy()

    def standard(values: np.ndarray) -> np.ndarray:
        return (values - values.mean()) / values.std()

    visits = border_visits.numpy().reshape(4, 6)
    expected = standard(standard(-visits) + standard(central) / 4 + standard(attended) / 4)
    np.testing.assert_allclose(foreground(border_visits, encoding).numpy(), expected, rtol=1e-6)


def test_affinity_of_representatives(tiny_model):
    """The similarity is the one in the exact map, where the representatives write `kappa S^T A`."""
    pixel_values = torch.randn(1, 3, 32, 48)
    exact = exact_maps(tiny_model, pixel_values)[2]
    encoding = encode(tiny_model, pixel_values, output_attentions=True, steps_of=[2])
    similarity = encoding.steps(2).similarity[0, 0].double()
    step = tiny_model.cbsa.layers[2].attention.step_x[0].double()
    expected = step * similarity.T @ exact.representative_attentions[0, 0].double()
    torch.testing.assert_close(exact.writes[0, 0].double(), expected, rtol=1e-4, atol=1e-6)
    affinity, reads = representative_affinity(encoding, Options(layer=2, head=0))
    torch.testing.assert_close(affinity, (similarity + similarity.T) / 2)
    attention = exact.representative_attentions[0, 0, :, 1:].double()
    torch.testing.assert_close(reads, attention / attention.sum(1, keepdim=True))


def plant(background: np.ndarray, foreground: np.ndarray, box: tuple[int, int, int, int]) -> tuple:
    """A photo of an ellipse with one grey texture on another, and the mask of the ellipse."""
    size = (192, 144)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse(box, 255)
    textures = [Image.fromarray(texture).convert("RGB").resize(size) for texture in (background, foreground)]
    return Image.composite(textures[1], textures[0], mask), np.asarray(mask) > 0


BOXES = [(20, 40, 100, 120), (90, 50, 170, 130)]


def planted() -> list[tuple[Image.Image, np.ndarray]]:
    textures = [skimage.data.brick(), skimage.data.grass(), skimage.data.gravel()]
    pairs = [(a, b) for a in textures for b in textures if a is not b]
    return [plant(*pair, box) for pair in pairs for box in BOXES]


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    return (mask & truth).sum() / (mask | truth).sum()


def test_planted_objects_are_found(shipped):
    """The foreground, and the best of six segments, are better than a mask of everything or a centred ellipse."""
    segmenter = ZeroShotSegmenter(*shipped, num_segments=6)
    rows, columns = np.mgrid[-1:1:144j, -1:1:192j]
    everything, ellipse = np.ones((144, 192), bool), (rows / 0.75) ** 2 + (columns / 0.75) ** 2 <= 1
    scores = []
    for image, truth in planted():
        result = segmenter(image)
        check_result(result, image)
        best = max(overlap(segment.mask, truth) for segment in result.segments)
        scores.append((overlap(result.mask, truth), best, overlap(everything, truth), overlap(ellipse, truth)))
    found, best, *chance = np.mean(scores, axis=0)
    assert found > max(chance) + 0.15
    assert best > max(chance) + 0.15


def count_operations(model, side: int) -> int:
    """Operations for a square image, with the encoder, but without the eigenvectors of 64 landmarks."""
    processor = ViTImageProcessorPil(size={"height": 128, "width": 128})
    with FlopCounterMode(display=False) as counter:
        ZeroShotSegmenter(model, processor, long_side=side, attention_weight=0.5)(Image.new("RGB", (40, 40)))
    return counter.get_total_flops()


def test_cost_is_linear_in_the_tokens(shipped):
    small, medium, large = (
        count_operations(shipped[0], side) for side in (192, 384, 576)
    )  # 576, 2304 and 5184 patches
    assert (large - medium) / (medium - small) == pytest.approx((5184 - 2304) / (2304 - 576), rel=0.01)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_image_modes(shipped, photo, mode):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    else:
        image = photo.convert(mode)
    check_result(ZeroShotSegmenter(*shipped, long_side=64)(image), photo)


@pytest.mark.parametrize("size", [(1, 1), (300, 2), (3, 90)])
def test_image_sizes(shipped, size):
    image = Image.new("RGB", size, "red")
    for method in METHODS:
        check_result(ZeroShotSegmenter(*shipped, method)(image), image)


def test_sources_and_batches(shipped, photo, tmp_path):
    photo.save(tmp_path / "cat.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    segmenter = ZeroShotSegmenter(*shipped, long_side=64)
    expected = segmenter(photo)
    sources = [np.asarray(photo), str(tmp_path / "cat.png"), tmp_path / "cat.png", tmp_path / "turned.png"]
    *results, turned = segmenter(sources)
    assert all(np.array_equal(result.scores, expected.scores) for result in results)
    assert turned.mask.shape == (451, 300)


def test_segments_are_named(shipped, photo):
    model, processor = shipped
    result = ZeroShotSegmenter(model, processor, min_probability=0)(photo)
    names = {segment.name for segment in result.segments}
    assert names <= set(model.config.id2label.values())
    assert all(0 < segment.probability <= 1 for segment in result.segments)
    unknown = ZeroShotSegmenter(model, processor, min_probability=1.0)(photo)
    assert all(segment.name is None and segment.probability < 1 for segment in unknown.segments)
    encoder = CBSAModel(model.config).eval()
    assert all(segment.probability is None for segment in ZeroShotSegmenter(encoder, processor)(photo).segments)


def test_sharp_edges(shipped):
    """A coarse map of a disc gets sharper when its edges follow the image."""
    image = Image.new("RGB", (320, 240), (30, 90, 40))
    ImageDraw.Draw(image).ellipse((100, 50, 240, 190), (220, 60, 50))
    truth = np.asarray(image)[..., 0] > 100
    patches = torch.from_numpy(truth).float()[None, None]
    coarse = F.interpolate(F.avg_pool2d(patches, 20), size=truth.shape, mode="bilinear")[0] - 0.5
    sharp = follow_edges(coarse, image, radius=20)[0].numpy() > 0
    assert overlap(sharp, truth) > overlap(coarse[0].numpy() > 0, truth) + 0.01
    check_result(ZeroShotSegmenter(*shipped, sharp=True)(image), image)


def test_sharp_edges_need_kornia(shipped, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.filters", None)
    with pytest.raises(ValueError, match="Sharp edges need kornia"):
        ZeroShotSegmenter(*shipped, sharp=True)(photo)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, "`method` is 'magic'; choose one of 'attention', 'ncut', 'representatives'"),
        ({"mass": 0}, "`mass` is 0"),
        ({"layer": 12}, "`layer` is 12"),
        ({"head": 3}, "`head` is 3"),
        ({"num_segments": 1}, "`num_segments` is 1"),
        ({"attention_weight": 1.5}, "`attention_weight` is 1.5"),
        ({"long_side": 0}, "`long_side` is 0, and has to be at least 1"),
        ({"mass": 0.5}, "`mass` has no effect on the method 'ncut'"),
        (
            {"method": "attention", "attention_weight": 0.5},
            "`attention_weight` has no effect on the method",
        ),
        ({"method": "representatives", "mass": 0.5}, "`mass` has no effect on the method 'representatives'"),
        ({"layer": 1}, "`layer` and `head` have no effect on the method 'ncut' without an `attention_weight`"),
    ],
)
def test_bad_arguments_raise(shipped, values, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotSegmenter(*shipped, **values)


@pytest.mark.parametrize(
    "source", [7, np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), int), np.zeros((0, 4), np.uint8)]
)
def test_bad_source_raises(shipped, source):
    with pytest.raises(ValueError, match=r"An image (is an? (int|array)|has values of type int64)"):
        ZeroShotSegmenter(*shipped)(source)


def test_pipeline_reads_data_urls(shipped, photo):
    segment = pipeline("cbsa-zero-shot-segmentation", model=shipped[0], image_processor=shipped[1], long_side=64)
    buffer = io.BytesIO()
    photo.save(buffer, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    assert np.array_equal(np.asarray(segment(url)["mask"]), np.asarray(segment(photo)["mask"]))
    for broken, message in [("data:image/png;base64,?", "it is not base64"), (url[:-400], "is damaged")]:
        with pytest.raises(ImageError, match=message):
            segment(broken)


def test_pipeline(shipped, photo):
    segment = pipeline("cbsa-zero-shot-segmentation", model=shipped[0], image_processor=shipped[1], long_side=64)
    first, second = segment([photo, np.asarray(photo)], num_segments=3)
    expected = ZeroShotSegmenter(*shipped, long_side=64, num_segments=3)(photo)
    for result in (first, second):
        assert np.array_equal(np.asarray(result["mask"]) > 0, expected.mask)
        assert len(result["segments"]) == len(expected.segments)
        for found, one in zip(result["segments"], expected.segments, strict=True):
            assert np.array_equal(np.asarray(found["mask"]) > 0, one.mask)
            assert (found["label"], found["probability"], found["score"]) == (one.name, one.probability, one.score)


SEGMENT = """
from transformers import pipeline

folder = sys.argv[1]
segment = pipeline(model=folder, trust_remote_code=True)
assert segment.task == "cbsa-zero-shot-segmentation"
segment(f"{folder}/cat.png", long_side=64)["mask"].save(f"{folder}/mask.png")
segment.save_pretrained(f"{folder}/again")
"""


def test_pipeline_is_saved_with_a_classifier(shipped, tmp_path):
    """A model is saved with the same files as the pipeline. The package runs its own pipeline, not that code."""
    segment = pipeline("cbsa-zero-shot-segmentation", model=shipped[0], image_processor=shipped[1], long_side=64)
    segment.save_pretrained(tmp_path / "pipeline")
    shipped[0].save_pretrained(tmp_path / "model")
    shipped[1].save_pretrained(tmp_path / "model")
    files = [{path.name: path.read_bytes() for path in (tmp_path / each).iterdir()} for each in ("pipeline", "model")]
    assert files[0] == files[1]
    for model in (str(tmp_path / "model"), shipped[0]):
        again = pipeline("cbsa-zero-shot-segmentation", model=model, image_processor=shipped[1], long_side=64)
        assert type(again) is ZeroShotSegmentationPipeline
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["custom_pipelines"]["mine"] = {"impl": "mine.Mine", "pt": ["AutoModel"], "type": "image"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    pipelines = json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"]
    assert pipelines == config["custom_pipelines"]


def test_pipeline_without_the_package(photo, shipped, tmp_path):
    pipeline("cbsa-zero-shot-segmentation").save_pretrained(tmp_path)
    assert "checkpoints" not in (tmp_path / "config.json").read_text()  # no local path
    photo.save(tmp_path / "cat.png")
    run_without_package(SEGMENT, tmp_path, str(tmp_path))
    expected = ZeroShotSegmenter(*shipped, long_side=64)(photo).mask
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")) > 0, expected)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert {"pipeline_cbsa.py", "zero_shot.py", "spectral.py", "modeling_cbsa.py"} <= code
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == code


def test_bad_photo_in_a_list_gives_an_error(shipped, photo, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    segmenter = ZeroShotSegmenter(*shipped, long_side=64)
    with pytest.warns(UserWarning, match="Image 1 of 3 is left out: .*cut.png"):
        first, bad, last = segmenter([photo, tmp_path / "cut.png", photo])
    assert isinstance(bad, ImageError) and isinstance(bad, ValueError)
    assert np.array_equal(first.mask, last.mask) and np.array_equal(first.mask, segmenter(photo).mask)
    with pytest.raises(ImageError):
        segmenter(tmp_path / "cut.png")
