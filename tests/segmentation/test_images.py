"""Photos become upright RGB, bad input raises one sentence, and overlays and memory are bounded."""

import copy
import io
import os
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageFilter, ImageOps
from transformers import ViTImageProcessorPil, pipeline

from cbsa_hf import CBSAForImageClassification, SlidingWindowSegmenter, ZeroShotSegmenter
from cbsa_hf.interpretability.report import inspect_photo
from cbsa_hf.overlays import MASK_COLOUR, class_colours, dilate, overlay_classes, overlay_mask
from cbsa_hf.segmentation.images import (
    ImageError,
    bands,
    fit_to_patches,
    for_each_image,
    open_image,
    open_mask,
    to_image,
    to_pixel_values,
    to_rgb,
)
from cbsa_hf.segmentation.memory import encoder_memory


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1"])
def test_modes_become_rgb(noise, mode):
    image = noise.convert(mode)
    result = to_rgb(image)
    assert (result.mode, result.size) == ("RGB", noise.size)
    difference = np.abs(np.asarray(result, dtype=int) - np.asarray(image.convert("RGB"), dtype=int))
    assert difference.max() == 0


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "grey16.png")
    result = np.asarray(open_image(tmp_path / "grey16.png"))
    assert (result[..., 0].ravel() == np.arange(256)).all()


def test_transparent_pixels_become_white():
    assert to_rgb(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation(noise, tmp_path):
    noise.save(tmp_path / "turned.png", exif=with_orientation(6))  # rotate by 270 degrees
    upright = open_image(tmp_path / "turned.png")
    assert upright.size == (50, 70)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(noise), 3))


def test_bad_files_raise(tmp_path, noise):
    (tmp_path / "text.png").write_text("no image")
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name, message in [
        ("nothing.png", "There is no file"),
        ("text.png", "is not an image"),
        ("cut.png", "is damaged"),
        (".", "is a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_image(tmp_path / name)


@pytest.mark.parametrize(
    ("size", "expected"), [((300, 451), (168, 256)), ((451, 300), (256, 168)), ((10, 2000), (8, 256))]
)
def test_fit_to_patches(size, expected):
    assert fit_to_patches(size, 256, 8) == expected


def test_pixel_values(shipped, photo):
    pixel_values = to_pixel_values(photo, shipped[1], 256, 8)
    assert pixel_values.shape == (1, 3, 168, 256)
    resized = np.asarray(photo.resize((256, 168), Image.Resampling.BILINEAR)) / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixel_values[0].permute(1, 2, 0), expected, atol=1e-4)


def encoded(image, format, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(png: bytes, chunk: bytes) -> bytes:
    """Insert a chunk after the header of a PNG, which has 8 + 25 bytes."""
    return png[:33] + chunk + png[33:]


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """Insert a segment after the first marker of a JPEG."""
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "PPM", "DDS", "PCX", "SGI", "TGA"]
)
def test_formats(noise, format):
    data = encoded(noise, format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (data, io.BytesIO(data), {"bytes": data, "path": None}):
        image = open_image(source)
        assert np.array_equal(np.asarray(image), expected)
        assert type(image) is Image.Image and image.info == {}
    with pytest.raises(ImageError, match=r"^cut\.x is"):
        open_image(data[: len(data) // 2], name="cut.x")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(noise, format, orientation):
    data = encoded(noise, format, exif=with_orientation(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    image = open_image(data)
    assert np.array_equal(np.asarray(image), expected)
    assert not image.getexif()
    assert np.array_equal(np.asarray(to_image(image)), expected)
    assert np.array_equal(np.asarray(to_rgb(Image.open(io.BytesIO(data)))), expected)


@pytest.mark.parametrize(
    "damage",
    [
        lambda png: with_chunk(png, png_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(5_000_000)))),
        lambda png: with_chunk(png, png_chunk(b"tEXt", b"key\0" + b"x" * 70_000_000)),
        lambda png: with_chunk(png, png_chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(5_000_000)))),
        lambda png: with_chunk(png, png_chunk(b"pHYs", b"")),
        lambda png: with_chunk(png, png_chunk(b"iCCP", b"profile\0\1")),
        lambda png: with_chunk(png, png_chunk(b"eXIf", b"nothing"))[:-1] + b"\x82",
        lambda png: with_chunk(png, png_chunk(b"acTL", b"\0")),
        lambda png: with_chunk(png, b"\0\0\0\1tEXtx\0\0\0\0"),  # a wrong checksum
    ],
)
def test_bad_metadata_of_png_is_ignored(noise, damage):
    assert np.array_equal(np.asarray(open_image(damage(encoded(noise, "PNG")))), np.asarray(noise))


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        *((0xE1, b"Exif\0\0" + content) for content in (b"", b"nonsense", b"MM\0\x2a", b"II\x2a\0\xff\xff\xff\xff")),
        (0xE0, b"JFIF"),
        (0xEE, b"Adobe"),
        (0xE2, b"MPF\0nonsense"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\1x"),
    ],
)
def test_bad_metadata_of_jpeg_is_ignored(noise, marker, content):
    data = encoded(noise, "JPEG")
    damaged = with_segment(data, marker, content)
    assert np.array_equal(np.asarray(open_image(damaged)), np.asarray(open_image(data)))


@pytest.mark.parametrize("name", ["segmenter", "windows", "pipeline"])
def test_pil_images_with_unreadable_exif(photo, shipped, tiny_segmenter, name):
    model = {
        "segmenter": lambda: ZeroShotSegmenter(*shipped, long_side=64),
        "windows": lambda: SlidingWindowSegmenter(tiny_segmenter, ViTImageProcessorPil(), window=32, long_side=64),
        "pipeline": lambda: pipeline("cbsa-zero-shot-segmentation"),
    }[name]()
    data = encoded(photo, "JPEG")
    pictures = [with_segment(data, 0xE1, b"Exif\0\0nonsense"), encoded(photo, "JPEG", exif=with_orientation(6))]
    broken, upright = (model(Image.open(io.BytesIO(picture))) for picture in pictures)
    found = {"segmenter": lambda x: x.mask, "windows": np.asarray, "pipeline": lambda x: np.asarray(x["mask"])}[name]
    assert found(broken).shape == (photo.height, photo.width)
    assert found(upright).shape == (photo.width, photo.height)


class RaisesAnything(ImageFile.ImageFile):
    format = "BMP"

    def _open(self):
        self._size, self._mode = (4, 4), "RGB"

    def load(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError(), NotImplementedError("one\ntwo"), struct.error("x"), MemoryError(), RecursionError("y")]
)
def test_any_error_of_a_decoder_becomes_one_sentence(monkeypatch, error):
    Image.init()
    monkeypatch.setattr(RaisesAnything, "error", error, raising=False)
    monkeypatch.setitem(Image.OPEN, "BMP", (RaisesAnything, lambda prefix: prefix.startswith(b"BM")))
    for door in (open_image, open_mask):
        with pytest.raises(ImageError, match=r"^photo\.bmp is damaged or cannot be read: [^\n]+\.$"):
            door(b"BM" + bytes(99), name="photo.bmp")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DDS", "PCX", "SGI", "TGA"])
def test_mutated_files_are_read_or_refused(noise, format):
    random = np.random.default_rng(0)
    data = encoded(noise, format)
    for _ in range(30):
        mutated = bytearray(data)
        for place in random.integers(0, min(len(data), 200), 3):
            mutated[place] = random.integers(256)
        for door in (open_image, open_mask):
            try:
                door(bytes(mutated), name="photo")
            except ImageError as error:
                assert str(error).startswith("photo ") and "\n" not in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # a plain `open` waits for a writer
    for path in (tmp_path / "pipe.png", os.devnull):
        with pytest.raises(ImageError, match="is not a regular file"):
            open_image(path)


@pytest.mark.parametrize("source", [None, 7, b"", {"bytes": None, "path": None}, io.StringIO("x"), "a\0b"])
def test_bad_sources_raise(source):
    with pytest.raises(ImageError, match=r"\.$"):
        open_image(source)


def test_postscript_is_refused(noise):
    for format in ("EPS", "PDF"):
        with pytest.raises(ImageError, match=r"x is not an image that can be read. The formats are JPEG, PNG"):
            open_image(encoded(noise, format), name="x")


def test_limits_of_pixels_and_ratio(recwarn):
    wide, large = encoded(Image.new("1", (2000, 1)), "PNG"), encoded(Image.new("1", (10000, 10000)), "PNG")
    for data, message in [(wide, r"2000 x 1 .* 200; raise `max_ratio`"), (large, r"10000 x 10000 .*`--max-pixels`")]:
        with pytest.raises(ImageError, match=message):
            open_image(data)
    assert open_image(wide, max_ratio=2000).size == (2000, 1)
    assert open_mask(large, max_pixels=10**8).size == (10000, 10000)
    assert not recwarn.list
    with pytest.raises(ImageError, match="more than 80 bytes"):
        open_image(io.BytesIO(large), max_pixels=10)


def test_decoders_that_take_more_memory_get_fewer_pixels(noise):
    Image.init()
    limits = {"WEBP": 7000, "AVIF": 7000, "JPEG2000": 7000, "PNG": 3500, "JPEG": 3500}
    for format in limits.keys() & Image.SAVE.keys():  # old Pillows write no AVIF
        data = encoded(noise, format)  # 3,500 pixels
        assert open_image(data, max_pixels=limits[format]).size == noise.size
        with pytest.raises(ImageError, match="70 x 50 = 3,500 pixels, and the limit is 3,49"):
            open_image(data, max_pixels=limits[format] - 2)


def test_scans_are_counted(noise):
    data = encoded(noise, "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="more than 100 scans"):
        open_image(data[:start] + 200 * data[start:-2] + data[-2:])
    assert (
        open_image(data + 200 * data[start:-2]).size == noise.size
    )  # data after the end, such as the video in a photo of a phone


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB"])
def test_masks_keep_their_values(mode):
    labels = np.arange(12).reshape(3, 4).astype(np.uint16 if mode == "I;16" else np.uint8)
    mask, options = Image.fromarray(labels), {}
    if mode == "P":
        mask.putpalette([255, 0, 0] * 256)
        options["transparency"] = 3
    elif mode != "I;16":
        mask = mask.convert(mode)
    found = open_mask(encoded(mask, "PNG", **options))
    assert np.array_equal(np.asarray(found), np.asarray(mask))
    assert found.info == {}
    if mode == "P":
        assert found.mode == "P" and found.getpalette()[:3] == [255, 0, 0]


LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "values",
    [
        LEVELS,
        LEVELS.astype(np.uint16) * 257,
        *(LEVELS / dtype(255) for dtype in (np.float32, np.float64)),
        torch.from_numpy(LEVELS),
        torch.from_numpy(LEVELS) / 255,
        torch.from_numpy(LEVELS).double() / 255,
    ],
)
def test_values_of_arrays_are_scaled(values):
    expected = np.repeat(LEVELS[..., None], 3, axis=2)
    shapes = [values, values[..., None]]
    if values is LEVELS:
        shapes.append(expected)
    for shaped in shapes:
        assert np.array_equal(np.asarray(to_image(shaped)), expected)


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("F", LEVELS / np.float32(255)),
        ("I", LEVELS.astype(np.int32) * 257),
        ("I;16", LEVELS.astype(np.uint16) * 257),
    ],
)
def test_values_of_files_are_scaled(mode, values):
    image = Image.fromarray(values)
    assert image.mode == mode
    for found in (open_image(encoded(image, "TIFF")), to_image(image)):
        assert np.array_equal(np.asarray(found), np.repeat(LEVELS[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (LEVELS.astype(np.float32), "floats from 0 to 255"),
        (LEVELS / np.float32(255) - 0.5, "floats from -0.5 to 0.5"),
        (LEVELS / np.float32(255 * 255), "no value above 0.00392"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan"),
        (np.full((4, 4), np.inf, np.float32), "floats from inf"),
        (LEVELS.astype(np.uint16), "no value above 255, where 65535 is white"),
        (LEVELS.astype(np.uint16) * 16, "no value above 4080"),
        (LEVELS.astype(np.int32) * 1000, "type int32"),
        (LEVELS.astype(np.int32) - 7, "type int32"),
    ],
)
def test_values_outside_their_range_raise(values, message):
    with pytest.raises(ImageError, match=message):
        to_image(values)
    with pytest.raises(ImageError, match=rf"^grey\.tif .*{message}"):
        open_image(encoded(Image.fromarray(values), "TIFF"), name="grey.tif")


def test_black_and_bool_are_images():
    for values in (np.zeros((2, 3), bool), np.zeros((2, 3), np.uint16), np.zeros((2, 3))):
        assert not np.asarray(to_image(values)).any()
    assert np.asarray(to_image(np.ones((2, 3), bool))).min() == 255


def test_layouts_of_channels(noise):
    pixels = np.asarray(noise)
    transparent = np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 255, np.uint8)], axis=2)
    for array in (pixels, pixels.transpose(2, 0, 1), transparent, torch.from_numpy(pixels.copy()).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(to_image(array)), pixels)
    ambiguous = np.zeros((3, 5, 3), np.uint8)
    assert to_image(ambiguous).size == (5, 3)  # channels last
    for shape in [(2, 5, 5), (5, 5, 2), (1, 3, 5, 5), (5,), (0, 5)]:
        with pytest.raises(ImageError, match="of shape"):
            to_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("num_channels", [1, 2, 4, 13])
def test_other_numbers_of_channels(num_channels):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, num_channels), dtype=np.uint8)
    for array in (values, values.transpose(2, 0, 1), torch.from_numpy(values)):
        assert np.array_equal(to_image(array, num_channels=num_channels), values)
    if num_channels != 4:
        with pytest.raises(ImageError):
            to_image(np.zeros((20, 30, 4), np.uint8), num_channels=num_channels)
    mean = [0.25] * num_channels
    size = {"height": 32, "width": 32}
    processor = ViTImageProcessorPil(size=size, image_mean=mean, image_std=mean, do_convert_rgb=True)
    pixel_values = to_pixel_values(values, processor, 30, 10)
    expected = torch.from_numpy(values).permute(2, 0, 1)[None] / 255 * 4 - 1
    torch.testing.assert_close(pixel_values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mode", "num_channels"), [("LA", 2), ("RGBA", 4), ("CMYK", 4)])
def test_bands_of_pictures_are_channels(noise, mode, num_channels):
    """The bands are turned upright, but not converted or laid over white."""
    picture = noise.convert(mode)
    picture.putpixel((3, 2), (9,) * num_channels)
    values = np.asarray(picture)
    assert np.array_equal(to_image(picture, num_channels=num_channels), values)
    if mode != "LA":
        data = encoded(picture, "TIFF", exif=with_orientation(6))
        assert np.array_equal(to_image(data, num_channels=num_channels), np.rot90(values, 3))
    with pytest.raises(ImageError, match=r"^An image has the channels R, G, B, and the model takes \d; give an array"):
        to_image(noise, num_channels=num_channels)


def test_one_channel_is_grey(noise):
    grey = noise.convert("L")
    expected = np.asarray(grey)[..., None]
    for source in (grey, encoded(grey, "PNG"), grey.convert("RGB"), np.asarray(grey)):
        assert np.array_equal(to_image(source, num_channels=1), expected)
    luma = np.asarray(noise).astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(to_image(noise, num_channels=1)[..., 0] - luma).max() < 1


def test_bands_do_not_change_the_result(noise, monkeypatch):
    pictures = [noise.convert(mode) for mode in ("RGBA", "LA", "P", "CMYK", "1")]
    pictures[0].putalpha(noise.convert("L"))
    pictures += [Image.fromarray(LEVELS / np.float32(255)), Image.fromarray(LEVELS.astype(np.uint16) * 257)]
    expected = [np.asarray(to_rgb(picture)) for picture in pictures]
    monkeypatch.setattr(bands, "__defaults__", (100,))
    for picture, whole in zip(pictures, expected, strict=True):
        assert np.array_equal(np.asarray(to_rgb(picture)), whole)
    rows = [slice(0, 5), slice(5, 10), slice(10, 11)]
    assert list(bands(11, 20)) == rows


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "F"])
def test_an_image_is_shrunk_while_it_is_converted(noise, mode, monkeypatch):
    image = noise.convert("L") if mode in ("I;16", "F") else noise.copy()
    if mode == "RGBA":
        image.putalpha(noise.convert("L").rotate(180))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    if mode == "F":
        image = Image.fromarray(np.asarray(image) / np.float32(255))
    blocks = np.asarray(to_rgb(image))[:48, :69].reshape(16, 3, 23, 3, 3)
    expected = np.rot90(blocks.mean((1, 3)), 3)
    image.getexif()[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    monkeypatch.setattr(bands, "__defaults__", (300,))  # several bands
    found = to_rgb(image, factor=3)
    assert found.size == (17, 24)  # what is left of rows and columns makes one more
    assert np.abs(np.asarray(found)[:23, 1:] - expected).max() < 1


def test_big_endian_values():
    values = LEVELS.astype(np.uint16) * 257
    for source in (values.astype(">u2"), (LEVELS / 255).astype(">f4")):
        assert np.array_equal(np.asarray(to_image(source))[..., 0], LEVELS)


def test_overlay_of_classes(noise, monkeypatch):
    """All pixels follow one formula, whatever the size of the bands. The legend is below them."""
    labels = np.asarray(noise.convert("L")) // 64
    names = dict(enumerate("abcd"))
    expected = np.array(Image.blend(noise, Image.fromarray(class_colours(4)[labels]), 0.6))
    expected[:, 1:][labels[:, 1:] != labels[:, :-1]] = 255
    expected[1:][labels[1:] != labels[:-1]] = 255
    for pixels in (10**6, 700, 1):
        monkeypatch.setattr(bands, "__defaults__", (pixels,))
        assert np.array_equal(np.asarray(overlay_classes(noise, labels, names))[:50, :70], expected)


def test_pipeline_reads_urls(photo):
    pictures = {"/cat.jpg": with_segment(encoded(photo, "JPEG"), 0xE1, b"Exif\0\0nonsense"), "/text.jpg": b"no image"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in pictures else 404)
            self.end_headers()
            self.wfile.write(pictures.get(self.path, b""))

        def log_message(self, *_):
            pass

    segment = pipeline("cbsa-zero-shot-segmentation", long_side=64)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            assert segment(f"{address}/cat.jpg")["mask"].size == photo.size
            with pytest.raises(ImageError, match=rf"{address}/text.jpg is not an image"):
                segment(f"{address}/text.jpg")
            with pytest.raises(ImageError, match=rf"{address}/none.jpg cannot be fetched: .*404"):
                segment(f"{address}/none.jpg")
        finally:
            server.shutdown()


def test_overlay_of_a_mask(noise, monkeypatch):
    mask = np.asarray(noise.convert("L")) > 200
    assert np.array_equal(dilate(mask, 0), mask)
    for radius in range(1, 9):
        filtered = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * radius + 1))
        assert np.array_equal(dilate(mask, radius), np.asarray(filtered) > 0)
    monkeypatch.setattr(bands, "__defaults__", (500,))
    overlay = np.asarray(overlay_mask(noise, mask))
    edge, pixels = dilate(mask, 1) & ~mask, np.asarray(noise, dtype=np.float32)
    assert (overlay[edge] == 255).all()
    assert np.array_equal(overlay[mask], (0.65 * pixels + 0.35 * np.float32(MASK_COLOUR)).astype(np.uint8)[mask])
    assert np.array_equal(overlay[~mask & ~edge], (0.55 * pixels).astype(np.uint8)[~mask & ~edge])


def test_too_much_memory_raises_at_once(shipped, tiny_segmenter):
    image = Image.new("RGB", (400, 300))
    with pytest.raises(ValueError, match=r"model 30000 x 22496 pixels would take about \d+\.\d GB .* 4 GB; lower"):
        ZeroShotSegmenter(*shipped, long_side=30000)(image)
    with pytest.raises(ValueError, match="model 30000 x 22496 pixels"):
        inspect_photo(image, *shipped, long_side=30000)
    with pytest.raises(ValueError, match=r"400 x 300 pixels in 30 segments .*`--segments`"):
        ZeroShotSegmenter(*shipped, num_segments=30, long_side=32, max_memory=5e6)(image)
    windows = SlidingWindowSegmenter(tiny_segmenter, ViTImageProcessorPil(), window=32, long_side=10**9)
    with pytest.raises(ValueError, match="1000000000 pixels wide would take"):
        windows(image)


def test_estimate_of_memory_counts_every_pair_of_patches(shipped):
    model, _ = shipped
    assert encoder_memory(model, (256, 256)) == 4 * encoder_memory(model, (128, 128))
    config = copy.deepcopy(model.config)
    config.attention_type = "softmax"
    with torch.device("meta"):
        model = CBSAForImageClassification(config)
    assert encoder_memory(model, (1024, 1024)) > 12 * 3 * 4 * (128 * 128) ** 2


def test_errors_name_images_of_a_list(tmp_path):
    """An error names the file of an image, or its place in the list if it has no file."""
    dark = np.full((4, 4), 1e-9, dtype=np.float32)
    path = tmp_path / "dark.tif"
    Image.fromarray(dark).save(path)
    opened = Image.open(path)
    sources = [dark, torch.from_numpy(dark), Image.fromarray(dark), path.read_bytes(), {"bytes": None, "path": None}]
    named = [path, str(path), opened, path.open("rb"), {"bytes": path.read_bytes(), "path": str(path)}]
    with named[3], pytest.warns(UserWarning) as warned:
        errors = for_each_image(lambda image: image, [*sources, *named])
    assert all(isinstance(error, ImageError) for error in errors)
    for index, error in enumerate(errors):
        name = f"Image {index}" if index < len(sources) else str(path)
        assert str(error).startswith(f"{name} ")
        assert str(warned[index].message) == f"Image {index} of 10 is left out: {error}"
