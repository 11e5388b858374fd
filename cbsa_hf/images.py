"""
Photographs in: any file, mode and orientation to upright RGB, and on to the pixels that a model takes. Maps out: their
edges moved to a photograph's.
"""

import os

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BaseImageProcessor


ImageSource = Image.Image | np.ndarray | str | os.PathLike


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF orientation, in RGB: 16-bit greys scaled to 8 bits, transparency laid over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; `convert` would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(path: str | os.PathLike) -> Image.Image:
    """
    Read a whole image file, upright and in RGB.

    Raises:
        ValueError: no such file, not an image, or damaged; the message is one sentence for people.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder; give an image file.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise ValueError(f"{path} is damaged or cannot be read: {error}") from error


def to_image(source: ImageSource) -> Image.Image:
    """
    A PIL image, a path, or an array (height, width) or (height, width, 3 or 4), uint8 or uint16, as an RGB image.

    Raises:
        ValueError: none of these; or see [`open_image`].
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, (str, os.PathLike)):
        return open_image(source)
    if not isinstance(source, np.ndarray):
        raise ValueError(f"An image is a {type(source).__name__}; give a PIL image, a NumPy array or a path.")
    is_grey, is_colour = source.ndim == 2, source.ndim == 3 and source.shape[2] in (3, 4)
    if not (is_grey or is_colour) or source.dtype not in (np.uint8, np.uint16) or source.size == 0:
        raise ValueError(
            f"An image is an array of shape {source.shape} and type {source.dtype}; give (height, width) or (height, "
            "width, 3 or 4), of type uint8 or uint16."
        )
    if source.dtype == np.uint16:
        source = (source // 257).astype(np.uint8)
    return to_rgb(Image.fromarray(source))


def fit_to_patches(size: tuple[int, int], long_side: int, patch_size: int) -> tuple[int, int]:
    """
    (height, width) for an image of that (height, width): its aspect ratio kept, the long side `long_side` pixels, both
    sides rounded to whole patches, one at least.
    """
    scale = long_side / max(size)
    height, width = (max(patch_size, round(side * scale / patch_size) * patch_size) for side in size)
    return height, width


def to_pixel_values(
    image: Image.Image, processor: BaseImageProcessor, long_side: int, patch_size: int
) -> torch.Tensor:
    """An RGB image -> (1, 3, height, width) as the processor makes it, but at the size of [`fit_to_patches`]."""
    height, width = fit_to_patches((image.height, image.width), long_side, patch_size)
    return processor(image, size={"height": height, "width": width}, return_tensors="pt")["pixel_values"]


def follow_edges(maps: torch.Tensor, image: Image.Image, radius: int) -> torch.Tensor:
    """
    Maps (k, height, width) over an image, their edges moved to the image's by a fast guided filter (He, Sun, arXiv
    1505.00996), fitted to every fourth part of the radius.

    Args:
        radius: of the filter's windows in pixels.

    Raises:
        ValueError: kornia is not installed.
    """
    try:
        from kornia.filters import guided_blur
    except ImportError as error:
        raise ValueError("Sharp edges need kornia: `pip install kornia`.") from error
    guide = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1).to(maps.device)
    settings = {"eps": 1e-4, "border_type": "replicate", "subsample": max(1, radius // 4)}
    return guided_blur(guide[None], maps[None].float(), 2 * radius + 1, **settings)[0]
