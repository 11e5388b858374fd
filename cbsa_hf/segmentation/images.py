"""
Photographs in: any file, mode and orientation to upright RGB, and on to the pixels that a model takes. Maps out: their
edges moved to a photograph's.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.nn import functional as F
from transformers import BaseImageProcessor

from .image_files import open_bytes


ImageSource = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | bytes | BinaryIO | dict

T = TypeVar("T")

MAX_PIXELS = 27_000_000  # of a file: 6000 x 4500
MAX_RATIO = 200  # of a file's longer side to the shorter
ROUNDING = 1e-3  # that floats may lie beyond 0 and 1
PIXELS_AT_A_TIME = 2**18  # in a band of rows; any number gives the same
BYTES_PER_PIXEL = 8  # that a file may have at most: 16-bit RGBA, not compressed

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Pillow says on standard error what it cannot read of EXIF; what it can read of the orientation counts, and no more.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class ImageError(ValueError):
    """An image cannot be read or used; the message is one sentence for people, with the image's name."""


def failure(name: str, error: Exception) -> ImageError:
    """What a decoder raised, whatever that is, as a sentence."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name} is damaged or cannot be read: {reason.rstrip('.')}.")


def read_bytes(source: str | os.PathLike | bytes | BinaryIO, name: str, max_bytes: int) -> bytes:
    """All of a file, if it is a regular one and not too large."""
    too_large = ImageError(
        f"{name} has more than {max_bytes:,} bytes, {BYTES_PER_PIXEL} for each pixel that an image may have; raise "
        "`max_pixels` (`--max-pixels`) if it is meant to be read."
    )
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = BytesIO(source)
    try:
        if isinstance(source, (str, os.PathLike)):
            with open(source, "rb", opener=open_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise ImageError(f"{name} is not a regular file; give an image file.")
                if status.st_size > max_bytes:
                    raise too_large
                data = file.read(max_bytes + 1)
        else:
            if source.seekable():
                source.seek(0)
            data = source.read(max_bytes + 1)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"There is no file {name}.") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder; give an image file.") from error
    except Exception as error:  # a null character in the path, a closed file, or what a file of others raises
        raise failure(name, error) from error
    if not isinstance(data, bytes):
        raise ImageError(f"{name} is not open in binary mode.")
    if len(data) > max_bytes:
        raise too_large
    return data


def open_without_waiting(path: str, flags: int) -> int:
    """For `open`: a pipe without a writer does not block."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_size(size: tuple[int, int], name: str, max_pixels: int, max_ratio: float):
    """An ImageError for more pixels, or more elongated ones, than allowed."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is damaged or cannot be read: it has {width} x {height} pixels.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height:,} pixels, and the limit is {max_pixels:,}; raise "
            "`max_pixels` (`--max-pixels`) if it is meant to be read."
        )
    if max(size) > max_ratio * min(size):
        raise ImageError(
            f"{name} has {width} x {height} pixels, and the limit for the ratio of the sides is {max_ratio:g}; raise "
            "`max_ratio` (`--max-ratio`) if it is meant to be read."
        )


def decode(source: "ImageSource", name: str | None, max_pixels: int, max_ratio: float) -> tuple[Image.Image, str]:
    """A file's image as its decoder gives it, but upright, within the limits; and its name."""
    if isinstance(source, dict):
        source, path = source.get("bytes"), source.get("path")
        name = name or path
        source = path if source is None else source
    is_path = isinstance(source, (str, os.PathLike))
    name = name or str(source if is_path else getattr(source, "name", "An image"))
    if not is_path and not isinstance(source, (bytes, bytearray, memoryview)) and not hasattr(source, "read"):
        raise ImageError(f"{name} is a {type(source).__name__}; give a path, bytes or a file that is open.")
    data = read_bytes(source, name, BYTES_PER_PIXEL * max_pixels)
    try:
        image = open_bytes(data)
        check_size(image.size, name, max_pixels, max_ratio)
        image = turn_upright(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that can be read. {error}") from error
    except Exception as error:  # decoders raise what they like: RuntimeError, NotImplementedError, struct.error, ...
        raise failure(name, error) from error
    return image, name


def open_image(
    source: "str | os.PathLike | bytes | BinaryIO | dict",
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_ratio: float = MAX_RATIO,
) -> Image.Image:
    """
    Read a whole image file, upright and in RGB, without metadata.

    Args:
        source: a path, bytes, a binary file, or what `datasets` gives undecoded: `{"bytes": ..., "path": ...}`.
        name: of the image in messages; its path when not given.
        max_pixels: that it may have.
        max_ratio: of the longer side to the shorter.

    Raises:
        ImageError: no such file, not an image, damaged, beyond a limit, or of values that [`to_image`] does not take.
    """
    image, name = decode(source, name, max_pixels, max_ratio)
    return convert_to_rgb(image, name)


def open_mask(
    source: "str | os.PathLike | bytes | BinaryIO | dict",
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_ratio: float = MAX_RATIO,
) -> Image.Image:
    """
    Read a whole file of labels: turned upright as its photo is, its values and mode as they are stored. Arguments and
    errors are those of [`open_image`].
    """
    image, _ = decode(source, name, max_pixels, max_ratio)
    image = image.copy()
    image.info = {}
    return image


def turn_upright(image: Image.Image) -> Image.Image:
    """By its orientation in EXIF or XMP; one that cannot be read is none."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # any, as of any decoder
        orientation = None
    method = ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def bands(height: int, width: int, pixels: int = PIXELS_AT_A_TIME) -> Iterator[slice]:
    """The rows of an image in parts of about so many pixels: what is computed of one is let go before the next."""
    step = max(1, pixels // width)
    for first in range(0, height, step):
        yield slice(first, min(first + step, height))


def crop_rows(image: Image.Image, rows: slice) -> Image.Image:
    """That band of an image."""
    return image.crop((0, rows.start, image.width, rows.stop))


def to_rgb(image: Image.Image, name: str = "An image") -> Image.Image:
    """
    Upright by its orientation, in RGB, without metadata: transparency laid over white, values as [`to_image`] says.
    An image that is all that already is returned itself.

    Raises:
        ImageError: it cannot be decoded, or its values are out of range.
    """
    if type(image) is Image.Image and image.mode == "RGB" and not image.info:
        return image  # as it is already
    try:
        image = turn_upright(image)
    except Exception as error:
        raise failure(name, error) from error
    return convert_to_rgb(image, name)


def convert_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """What [`to_rgb`] makes of an image that is upright: a new one, a band at a time."""
    try:
        has_levels = image.mode.startswith(("I", "F"))
        if has_levels:
            parts = (np.asarray(crop_rows(image, rows)) for rows in bands(image.height, image.width))
            dtype, low, high = value_range(parts)
            if dtype == np.int32 and low >= 0 and high <= 65535:  # 16 bits, which Pillow reads into 32
                dtype = np.dtype(np.uint16)
            check_values(dtype, low, high, name)
        result = Image.new("RGB", image.size)
        for rows in bands(image.height, image.width):
            band = crop_rows(image, rows)
            band = Image.fromarray(scale_values(np.asarray(band))) if has_levels else lay_over_white(band)
            result.paste(band.convert("RGB"), (0, rows.start))
        return result
    except ImageError:
        raise
    except Exception as error:
        raise failure(name, error) from error


def lay_over_white(image: Image.Image) -> Image.Image:
    """The image itself where nothing is transparent."""
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def value_range(parts: Iterable[np.ndarray]) -> tuple[np.dtype, float, float]:
    """Type, least and largest value of parts of an image."""
    ranges = [(part.dtype, part.min(), part.max()) for part in parts]
    dtype = ranges[0][0].newbyteorder("=")
    low, high = np.min([r[1] for r in ranges]), np.max([r[2] for r in ranges])
    return dtype, low, high


def check_values(dtype: np.dtype, low: float, high: float, name: str):
    """
    Whether values of that type and range can be made 8 bits by the rule of [`to_image`].

    Raises:
        ImageError: they cannot.
    """
    if dtype in (np.uint8, bool):
        return
    is_float = dtype.kind == "f"
    if not is_float and dtype != np.uint16:
        raise ImageError(
            f"{name} has values of type {dtype}; give uint8 (0 to 255), uint16 (0 to 65535), bool, or floats from 0 "
            "to 1."
        )
    if is_float and not (low >= -ROUNDING and high <= 1 + ROUNDING):  # false for NaN
        raise ImageError(f"{name} has floats from {low:g} to {high:g}; scale them to the range from 0 to 1.")
    if 0 < high <= (1 / 255 if is_float else 4095):
        white = "1" if is_float else "65535"
        raise ImageError(
            f"{name} has no value above {high:g}, where {white} is white, and would be all but black; scale its "
            f"values to the range from 0 to {white}."
        )


def scale_values(values: np.ndarray) -> np.ndarray:
    """Values that [`check_values`] let through, as uint8."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    if values.dtype.kind == "f":
        return (values.astype(np.float32, copy=False).clip(0, 1) * 255).round().astype(np.uint8)
    return (values // 257).astype(np.uint8)


def to_image(source: "ImageSource", *, name: str | None = None, num_channels: int = 3) -> Image.Image | np.ndarray:
    """
    Anything that holds one image, as models take it.

    - Files, see [`open_image`], and PIL images of any mode: upright, in RGB.
    - Arrays and tensors (height, width), (height, width, 1, 3 or 4) or (3, height, width); where a shape fits two of
      these, channels are last.
    - Values: uint8, 0 to 255; uint16, 0 to 65535; bool; floats from 0 to 1. Pillow's modes `I;16` and `I` are 16 bits,
      `F` is floats from 0 to 1. Refused are other types, floats beyond that range, NaN, 16 bits without a value above
      4095 and floats without one above 1/255, which are those of another range and would be all but black.
    - Transparency is laid over white.

    Args:
        name: of the image in messages.
        num_channels: that the model takes. With another number than 3 the result is an array (height, width, channels)
            of type uint8, and nothing is laid over anything. It is made of arrays and tensors of that many channels,
            and of files and PIL images of that many bands, such as RGBA for 4. For 1 channel any file or PIL image
            will do; its grey is taken.

    Raises:
        ImageError: none of these.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return array_to_image(source, name or "An image", num_channels)
    if num_channels in (1, 3):
        image = (
            to_rgb(source, name or "An image") if isinstance(source, Image.Image) else open_image(source, name=name)
        )
        return image if num_channels == 3 else np.asarray(image.convert("L"))[..., None]
    if isinstance(source, Image.Image):
        image, name = turn_upright(source), name or "An image"
    else:
        image, name = decode(source, name, MAX_PIXELS, MAX_RATIO)
    if len(image.getbands()) != num_channels:
        raise ImageError(
            f"{name} has the channels {', '.join(image.getbands())}, and the model takes {num_channels}; give an "
            f"array (height, width, {num_channels})."
        )
    return np.array(image)


def array_to_image(source: np.ndarray | torch.Tensor, name: str, num_channels: int) -> Image.Image | np.ndarray:
    """[`to_image`] of an array or a tensor."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    values = channels_last(source, num_channels, name)
    check_values(*value_range([values]), name)
    values = scale_values(values)
    if num_channels != 3:
        return values
    return convert_to_rgb(Image.fromarray(values[..., 0] if values.shape[2] == 1 else values), name)


def for_each_image(
    use: Callable[[Image.Image | np.ndarray], T], sources: Sequence[ImageSource], num_channels: int = 3
) -> "list[T | ImageError]":
    """
    What `use` makes of each image of [`to_image`]. One that cannot be read or used does not discard the others: its
    place holds the [`ImageError`], and a warning says so.
    """
    results = []
    for index, source in enumerate(sources):
        try:
            results.append(use(to_image(source, num_channels=num_channels)))
        except ImageError as error:
            warnings.warn(f"Image {index} of {len(sources)} is left out: {error}", stacklevel=3)
            results.append(error)
    return results


def channels_last(values: np.ndarray, num_channels: int, name: str) -> np.ndarray:
    """(height, width, channels) of any of the shapes of [`to_image`]."""
    allowed = (1, 3, 4) if num_channels == 3 else (num_channels,)
    if values.size > 0:
        if values.ndim == 2 and 1 in allowed:
            return values[..., None]
        if values.ndim == 3 and values.shape[2] in allowed:
            return values
        if values.ndim == 3 and values.shape[0] == num_channels:
            return np.ascontiguousarray(values.transpose(1, 2, 0))
    raise ImageError(
        f"{name} is an array of shape {values.shape}; give (height, width, {' or '.join(map(str, allowed))}) or "
        f"({num_channels}, height, width){', or (height, width)' if 1 in allowed else ''}."
    )


def fit_to_patches(size: tuple[int, int], long_side: int, patch_size: int) -> tuple[int, int]:
    """
    (height, width) for an image of that (height, width): its aspect ratio kept, the long side `long_side` pixels, both
    sides rounded to whole patches, one at least.
    """
    scale = long_side / max(size)
    height, width = (max(patch_size, round(side * scale / patch_size) * patch_size) for side in size)
    return height, width


def height_and_width(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Of what [`to_image`] returns."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


def resize(
    image: Image.Image | np.ndarray,
    size: tuple[int, int],
    resample: int,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image | np.ndarray:
    """`Image.resize` to that (width, height), of arrays (height, width, channels) a channel at a time."""
    if isinstance(image, Image.Image):
        return image.resize(size, resample, box)
    channels = [Image.fromarray(channel).resize(size, resample, box) for channel in image.transpose(2, 0, 1)]
    return np.stack(channels, axis=2)


def normalise(images: list[Image.Image | np.ndarray], processor: BaseImageProcessor) -> torch.Tensor:
    """Images of one size -> (batch, channels, height, width), scaled and normalised by the processor, not resized."""
    layout = {} if isinstance(images[0], Image.Image) else {"input_data_format": "channels_last"}
    return processor(images, do_resize=False, do_center_crop=False, return_tensors="pt", **layout)["pixel_values"]


def to_pixel_values(
    image: Image.Image | np.ndarray, processor: BaseImageProcessor, long_side: int, patch_size: int
) -> torch.Tensor:
    """
    An image of [`to_image`] -> (1, channels, height, width) as the processor makes it, but at the size of
    [`fit_to_patches`].
    """
    height, width = fit_to_patches(height_and_width(image), long_side, patch_size)
    # By the processor itself a photo would be copied twice before it is resized, or not be resized for its channels.
    return normalise([resize(image, (width, height), processor.resample)], processor)


def resize_rows(
    take: Callable[[int, int], torch.Tensor], height: int, rows: slice, size: tuple[int, int]
) -> torch.Tensor:
    """
    Those rows of `F.interpolate(maps, size, mode="bilinear")`, (k, rows, width), without the other ones.

    Args:
        take: first row and the one after the last -> those rows of the maps, (k, rows, width of the maps).
        height: of the maps.
        rows: of the result.
        size: (height, width) of the whole result.
    """
    position = ((torch.arange(rows.start, rows.stop) + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    above = position.long()
    below = (above + 1).clamp(max=height - 1)
    first = int(above[0])
    maps = take(first, int(below[-1]) + 1)
    weight = (position - above).unsqueeze(1).to(maps.device)
    maps = torch.lerp(maps[:, above - first], maps[:, below - first], weight)
    # Along the width alone.
    return F.interpolate(maps.unsqueeze(0), size=(rows.stop - rows.start, size[1]), mode="bilinear")[0]


def follow_edges(maps: torch.Tensor, image: Image.Image | np.ndarray, radius: int) -> torch.Tensor:
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
