"""Any photo becomes upright RGB; anything else becomes one sentence."""

import numpy as np
import pytest
from PIL import Image

from cbsa_hf.images import fit_to_patches, open_image, to_pixel_values, to_rgb


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1"])
def test_modes(noise, mode):
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


def test_transparency_is_white():
    assert to_rgb(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation(noise, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    noise.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert upright.size == (50, 70)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(noise), 3))


def test_bad_files(tmp_path, noise):
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
