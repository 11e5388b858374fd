"""
The one place where images are read: files, arrays and tensors of any mode become upright RGB images, and images become
the pixel values that a model takes. [`follow_edges`] goes the other way and moves the edges of maps to those of a
photo.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import BinaryIO, Literal, TypeVar, overload

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.nn import functional as F
from transformers import BaseImageProcessor

from .image_files import open_bytes


ImageSource = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | bytes | BinaryIO | dict

T = TypeVar("T")

MAX_PIXELS = 27_000_000  # largest number of pixels of a file: 6000 x 4500
MAX_RATIO = 200  # largest ratio of the longer side of a file's image to the shorter side
ROUNDING = 1e-3  # how far floats may lie below 0 or above 1
HUNGRY_FORMATS = ("WEBP", "AVIF", "JPEG2000")  # half as many pixels: decoders take 14 to 24 bytes for one, others 10
PIXELS_AT_A_TIME = 2**18  # pixels of a band of rows that is processed at once; results do not depend on it
BYTES_PER_PIXEL = 8  # largest number of bytes that a file may have for each pixel: 16-bit RGBA, not compressed

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Pillow warns about damaged EXIF data. Only the orientation is read from EXIF, and a missing one is no problem.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class ImageError(ValueError):
    """An image cannot be read or used. The message is one sentence for people that names the image."""


def failure(name: str, error: Exception) -> ImageError:
    """Turns any error of a decoder into an [`ImageError`]."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name} is damaged or cannot be read: {reason.rstrip('.')}.")


def read_bytes(source: str | os.PathLike | bytes | BinaryIO, name: str, max_bytes: int) -> bytes:
    """
    All bytes of a file.

    Raises:
        ImageError: the file does not exist, is not a regular file, has more than `max_bytes` or cannot be read.
    """
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
    except Exception as error:  # a null character in the path, a closed file, an error of a foreign file object
        raise failure(name, error) from error
    if not isinstance(data, bytes):
        raise ImageError(f"{name} is not open in binary mode.")
    if len(data) > max_bytes:
        raise too_large
    return data


def open_without_waiting(path: str, flags: int) -> int:
    """An opener for `open` that does not block at a pipe without a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_size(size: tuple[int, int], name: str, max_pixels: int, max_ratio: float):
    """Raises ImageError if an image of that (width, height) has no pixels, too many, or sides of too large a ratio."""
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


def name_of(source: "ImageSource", otherwise: str = "An image") -> str:
    """Name of the file that it is or comes from; `otherwise` if there is none, as for an array."""
    if isinstance(source, dict):
        source = source.get("path")
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    return str(getattr(source, "filename", None) or getattr(source, "name", None) or otherwise)


def decode(source: "ImageSource", name: str | None, max_pixels: int, max_ratio: float) -> tuple[Image.Image, str]:
    """
    The image in a file as its decoder returns it, turned upright, and its name for messages. Arguments and errors are
    those of [`open_image`].
    """
    name = name or name_of(source)
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) and not hasattr(source, "read"):
        raise ImageError(f"{name} is a {type(source).__name__}; give a path, bytes or a file that is open.")
    data = read_bytes(source, name, BYTES_PER_PIXEL * max_pixels)
    try:
        image = open_bytes(data)
        check_size(image.size, name, max_pixels // 2 if image.format in HUNGRY_FORMATS else max_pixels, max_ratio)
        image = turn_upright(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that can be read. {error}") from error
    except Exception as error:  # decoders raise many types: RuntimeError, NotImplementedError, struct.error, ...
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
    Read an image file to the end: upright, in RGB and without metadata.

    Args:
        source: a path, bytes, a binary file, or an image that `datasets` has not decoded, `{"bytes": ..., "path":
            ...}`.
        name: name of the image in messages; by default its path.
        max_pixels: largest number of pixels; half as many in [`HUNGRY_FORMATS`].
        max_ratio: largest ratio of the longer side to the shorter.

    Raises:
        ImageError: the file does not exist, is no image, is damaged or beyond a limit, or has values that [`to_image`]
            refuses.
    """
    image, name = decode(source, name, max_pixels, max_ratio)
    return convert_to_rgb(image, name)


def open_mask(
    source: "str | os.PathLike | bytes | BinaryIO | dict", *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """
    Read a file of labels to the end. It is turned upright as its photo is; values and mode stay as they are stored.
    Arguments and errors are those of [`open_image`].
    """
    image, _ = decode(source, name, max_pixels, MAX_RATIO)
    image = image.copy()
    image.info = {}
    return image


def orientation_of(image: Image.Image) -> Image.Transpose | None:
    """How an image has to be turned, by EXIF or XMP; None if it is upright, or if that cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # decoders raise errors of many types
        return None
    return ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None


def turn_upright(image: Image.Image) -> Image.Image:
    """Turns an image by its orientation in EXIF or XMP, if there is one that can be read."""
    image.load()
    method = orientation_of(image)
    return image if method is None else image.transpose(method)


def bands(height: int, width: int, pixels: int = PIXELS_AT_A_TIME, *, multiple: int = 1) -> Iterator[slice]:
    """
    Divides the rows of an image into bands of about `pixels` pixels, so that memory holds one band at a time. All but
    the last have a multiple of `multiple` rows.
    """
    step = max(1, pixels // (width * multiple)) * multiple
    for first in range(0, height, step):
        yield slice(first, min(first + step, height))


def crop_rows(image: Image.Image, rows: slice) -> Image.Image:
    """The rows of an image that the slice names, as an image."""
    return image.crop((0, rows.start, image.width, rows.stop))


def to_rgb(image: Image.Image, name: str = "An image", factor: int = 1) -> Image.Image:
    """
    A PIL image of any mode as an upright RGB image without metadata. Transparent parts are laid over white, and values
    are scaled as [`to_image`] says. An image that already is all this is returned itself.

    Args:
        image: the image.
        name: name of the image in messages.
        factor: the result is smaller by it, each pixel the mean of `factor` x `factor` pixels. So memory holds a large
            image once, not twice.

    Raises:
        ImageError: the image cannot be decoded, or its values are out of range.
    """
    if type(image) is Image.Image and image.mode == "RGB" and not image.info and factor == 1:
        return image
    try:
        image.load()
    except Exception as error:
        raise failure(name, error) from error
    method = orientation_of(image)
    image = convert_to_rgb(image, name, factor)
    return image if method is None else image.transpose(method)


def convert_to_rgb(image: Image.Image, name: str, factor: int = 1) -> Image.Image:
    """[`to_rgb`] for an image that is upright already. The result is a new image, made band by band."""
    try:
        has_levels = image.mode.startswith(("I", "F"))
        if has_levels:
            parts = (np.asarray(crop_rows(image, rows)) for rows in bands(image.height, image.width))
            dtype, low, high = value_range(parts)
            if dtype == np.int32 and low >= 0 and high <= 65535:  # 16 bits that Pillow stores in 32
                dtype = np.dtype(np.uint16)
            check_values(dtype, low, high, name)
        result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
        for rows in bands(image.height, image.width, multiple=factor):
            band = crop_rows(image, rows)
            band = Image.fromarray(scale_values(np.asarray(band))) if has_levels else lay_over_white(band)
            result.paste(band.convert("RGB").reduce(factor), (0, rows.start // factor))
        return result
    except ImageError:
        raise
    except Exception as error:
        raise failure(name, error) from error


def lay_over_white(image: Image.Image) -> Image.Image:
    """The image with transparent parts over white; the image itself if it has no transparency."""
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def value_range(parts: Iterable[np.ndarray]) -> tuple[np.dtype, float, float]:
    """Type, smallest and largest value of an image that is given in parts."""
    ranges = [(part.dtype, part.min(), part.max()) for part in parts]
    dtype = ranges[0][0].newbyteorder("=")
    low, high = np.min([r[1] for r in ranges]), np.max([r[2] for r in ranges])
    return dtype, low, high


def check_values(dtype: np.dtype, low: float, high: float, name: str):
    """
    Check that values can be scaled to 8 bits as [`to_image`] says.

    Args:
        dtype: type of the values.
        low, high: their smallest and largest value.
        name: name of the image in messages.

    Raises:
        ImageError: the type or the range is another one.
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


@overload
def to_image(source: ImageSource, *, name: str | None = None, num_channels: Literal[3] = 3) -> Image.Image: ...


@overload
def to_image(source: ImageSource, *, name: str | None = None, num_channels: int) -> Image.Image | np.ndarray: ...


def to_image(source: ImageSource, *, name: str | None = None, num_channels: int = 3) -> Image.Image | np.ndarray:
    """
    Convert any source of one image to the form that models take.

    - Files (see [`open_image`]) and PIL images of any mode become upright and RGB.
    - Arrays and tensors have the shape (height, width), (height, width, 1, 3 or 4) or (3, height, width). Where a
      shape fits two of these, channels are last.
    - Values are uint8 from 0 to 255, uint16 from 0 to 65535, bool, or floats from 0 to 1. Pillow's modes `I;16` and
      `I` have 16 bits, `F` has floats from 0 to 1. Other types, floats beyond that range and NaN are refused, and so
      are 16-bit images without a value above 4095 and floats without a value above 1/255: these have another range,
      and would become almost black.
    - Transparent parts are laid over white.

    Args:
        source: the image.
        name: name of the image in messages.
        num_channels: number of channels that the model takes. If it is not 3, the result is a uint8 array (height,
            width, channels), and transparency is not laid over white. `source` needs that many channels or bands, such
            as RGBA for 4; for 1 channel any file or PIL image is accepted and converted to grey.

    Raises:
        ImageError: `source` is none of these, or cannot be read.
    """
    name = name or name_of(source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return array_to_image(source, name, num_channels)
    if num_channels in (1, 3):
        image = to_rgb(source, name) if isinstance(source, Image.Image) else open_image(source, name=name)
        return image if num_channels == 3 else np.asarray(image.convert("L"))[..., None]
    if isinstance(source, Image.Image):
        try:
            image = turn_upright(source)
        except Exception as error:
            raise failure(name, error) from error
    else:
        image, _ = decode(source, name, MAX_PIXELS, MAX_RATIO)
    if len(image.getbands()) != num_channels:
        raise ImageError(
            f"{name} has the channels {', '.join(image.getbands())}, and the model takes {num_channels}; give an "
            f"array (height, width, {num_channels})."
        )
    return np.array(image)


def array_to_image(source: np.ndarray | torch.Tensor, name: str, num_channels: int) -> Image.Image | np.ndarray:
    """[`to_image`] for an array or a tensor."""
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
    Apply `use` to each source, converted by [`to_image`].

    Returns:
        The results in order. A source that cannot be read or used has its [`ImageError`] there instead, and a warning
        says so. A source without a file is named by its index, from 0.
    """
    results = []
    for index, source in enumerate(sources):
        try:
            name = name_of(source, f"Image {index}")
            results.append(use(to_image(source, name=name, num_channels=num_channels)))
        except ImageError as error:
            warnings.warn(f"Image {index} of {len(sources)} is left out: {error}", stacklevel=3)
            results.append(error)
    return results


def channels_last(values: np.ndarray, num_channels: int, name: str) -> np.ndarray:
    """
    An array of any shape that [`to_image`] takes as (height, width, channels). Raises ImageError for other shapes.
    """
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
    The size at which a model sees an image: the aspect ratio is kept, the longer side becomes `long_side` pixels, and
    both sides are rounded to whole patches, at least one.

    Args:
        size: (height, width) of the image in pixels.
        long_side: of the result, in pixels, before it is rounded.
        patch_size: side of a patch in pixels.

    Returns:
        (height, width) in pixels.
    """
    scale = long_side / max(size)
    height, width = (max(patch_size, round(side * scale / patch_size) * patch_size) for side in size)
    return height, width


def height_and_width(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) in pixels of an image that [`to_image`] returned."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


def resize(
    image: Image.Image | np.ndarray,
    size: tuple[int, int],
    resample: int,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image | np.ndarray:
    """`Image.resize` to (width, height), also for arrays (height, width, channels), one channel at a time."""
    if isinstance(image, Image.Image):
        return image.resize(size, resample, box)
    channels = [Image.fromarray(channel).resize(size, resample, box) for channel in image.transpose(2, 0, 1)]
    return np.stack(channels, axis=2)


def normalise(images: list[Image.Image | np.ndarray], processor: BaseImageProcessor) -> torch.Tensor:
    """
    Images of the same size as pixel values (batch, channels, height, width): scaled and normalised by the processor,
    not resized.
    """
    # Four channels of an array are not red, green, blue and opacity.
    arrays = {"input_data_format": "channels_last", "do_convert_rgb": False}
    options = {} if isinstance(images[0], Image.Image) else arrays
    return processor(images, do_resize=False, do_center_crop=False, return_tensors="pt", **options)["pixel_values"]


def to_pixel_values(
    image: Image.Image | np.ndarray, processor: BaseImageProcessor, long_side: int, patch_size: int
) -> torch.Tensor:
    """
    An image as pixel values (1, channels, height, width): prepared by the processor, but resized by
    [`fit_to_patches`].

    Args:
        image: as [`to_image`] returns it.
        processor: image processor of the model.
        long_side, patch_size: see [`fit_to_patches`].
    """
    height, width = fit_to_patches(height_and_width(image), long_side, patch_size)
    # The processor would copy a photo twice before it resizes it, and does not resize every number of channels.
    return normalise([resize(image, (width, height), processor.resample)], processor)


def resize_rows(
    take: Callable[[int, int], torch.Tensor], height: int, rows: slice, size: tuple[int, int]
) -> torch.Tensor:
    """
    Some rows of `F.interpolate(maps, size, mode="bilinear")`, computed without the other rows.

    Args:
        take: takes the first row and the one after the last, and returns those rows of the maps, (k, rows, width).
        height: number of rows of the maps.
        rows: the rows of the result.
        size: (height, width) of the whole result.

    Returns:
        (k, rows, width).
    """
    position = ((torch.arange(rows.start, rows.stop) + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    above = position.long()
    below = (above + 1).clamp(max=height - 1)
    first = int(above[0])
    maps = take(first, int(below[-1]) + 1)
    weight = (position - above).unsqueeze(1).to(maps.device)
    maps = torch.lerp(maps[:, above - first], maps[:, below - first], weight)
    # Only the width changes here.
    return F.interpolate(maps.unsqueeze(0), size=(rows.stop - rows.start, size[1]), mode="bilinear")[0]


def follow_edges(maps: torch.Tensor, image: Image.Image | np.ndarray, radius: int) -> torch.Tensor:
    """
    Move the edges of maps to the edges of the image under them, by a fast guided filter (He, Sun, arXiv 1505.00996)
    that is computed on every (radius / 4)th pixel.

    Args:
        maps: (k, height, width).
        image: of the same size.
        radius: radius of the filter's windows in pixels.

    Returns:
        (k, height, width) in float32.

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
