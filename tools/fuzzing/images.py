"""Cases of photos of every mode and format, sound, damaged or hostile, and the ways to read them."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cbsa_hf import cli
from cbsa_hf.segmentation.images import open_image, to_image

from . import SCRATCH
from .cases import Case, Folders, Random
from .drawing import (
    COMMON,
    MODES,
    OTHERS,
    add_metadata,
    damage,
    draw_picture,
    encode,
    orientation_block,
    pick,
    png_chunk,
)
from .models import READERS


NAMES = ("photo.png", "a photo.jpg", "фото ☃.webp", "100%s{0}.tif", "no_suffix", "wrong.gif", f"{'long' * 50}.bmp")
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def write_bomb(random: Random, path: Path):
    """Write a small PNG file with very many pixels or very unequal sides."""
    sizes = ((2_000_000, 1), (1, 60_000), (9_000, 9_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (100_000, 3))
    width, height = pick(random, sizes)
    row = b"\0" + bytes(-(-width // 8)) if width < 10**7 else b""
    compressor = zlib.compressobj(9)
    body = b"".join(compressor.compress(row) for _ in range(min(height, 60_000))) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))


def make_special(random: Random, path: Path):
    """Put something that is no regular file at the path, or nothing."""
    kind = int(random.integers(7))
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.symlink_to("missing")
    elif kind == 5:
        short = path.with_name("s")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(short.name)
        short.rename(path)


def expected_pixels(picture: Image.Image) -> np.ndarray | None:
    """The RGB pixels (height, width, 3) of a sound picture; None if several answers are right."""
    values = np.asarray(picture)
    if picture.mode == "I;16":
        # Where no value is above 255, a sentence says so.
        return np.stack([values // 257] * 3, axis=-1) if values.max() > 255 else None
    if picture.mode == "F" and values.min() >= 0 and 1e-3 < values.max() <= 1:
        return np.stack([np.rint(values * 255)] * 3, axis=-1)
    if picture.mode in ("I", "F", "LAB", "HSV", "PA"):
        return None
    if picture.has_transparency_data:
        values = np.asarray(picture.convert("RGBA"), dtype=np.float64)
        opacity = values[..., 3:] / 255
        return values[..., :3] * opacity + 255 * (1 - opacity)
    return np.asarray(picture.convert("RGB"))


def decode(data: bytes, orientations: Iterable[int] | None) -> tuple[list[np.ndarray], bool]:
    """
    Read a file with Pillow.

    Args:
        data: the bytes of the file.
        orientations: EXIF orientations from 1 to 8; None for the file's own.

    Returns:
        The [`expected_pixels`] in each of the orientations, or an empty list if Pillow cannot read the file; and
        whether the file has mode `I` or `F` and more than one value.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels, values = expected_pixels(picture), np.asarray(picture)
            orientations = orientations or [picture.getexif().get(0x0112, 1)]
            contrast = picture.mode in ("I", "F") and np.ptp(values) > 0
    except Exception:  # decoders raise exceptions of many types
        return [], False
    return [] if pixels is None else [TURNS[turn](pixels) for turn in orientations], contrast


def check_image(found: object, expected: list[np.ndarray] = (), contrast: bool = False) -> str | None:
    """What is wrong with an image that the library read: it has to be one of the expected ones, if there are any."""
    if not isinstance(found, Image.Image) or found.mode != "RGB":
        return f"not an RGB image: {found!r:.60}"
    if dict(found.getexif()):
        return "carries EXIF"
    pixels = np.asarray(found).astype(np.float64)
    if contrast and np.ptp(pixels) == 0:
        return f"all pixels are {pixels.flat[0]:.0f}"
    close = [wanted.shape == pixels.shape and np.abs(pixels - wanted).max() <= 2 for wanted in expected]
    return "other pixels than those in the file" if close and not any(close) else None


def make_array(random: Random) -> Case:
    """A case of an array or a tensor of some shape, type and range."""
    height, width = (int(side) for side in random.integers(6, 40, size=2))
    shapes = [(height, width), (height, width, 1), (height, width, 3), (height, width, 4), (3, height, width)]
    others = [
        (height, width, 2),
        (1, height, width),
        (4, height, width),
        (height,),
        (0, width, 3),
        (2, height, width, 3),
    ]
    known = random.random() < 0.6
    shape = pick(random, shapes if known else shapes + others)
    unit = random.random(shape)
    types = {"uint8": unit * 255, "uint16": unit * 65535, "float32": unit, "float64": unit}
    odd = {
        "float32": unit * 255,
        "int64": unit * 255,
        "bool": unit * 2,
        "complex64": unit,
        "float16": unit,
        "object": unit,
    }
    odd |= {"float64": np.where(unit < 0.1, np.nan, unit), "int8": unit * 200 - 100}
    name = pick(random, list(types if known else odd))
    array = (types if known else odd)[name].astype(name)
    expected = []
    if known:
        full = np.floor(array / {"uint8": 1, "uint16": 257}.get(name, 1 / 255) + (name[0] == "f") / 2)
        full = full.transpose(1, 2, 0) if shape[0] == 3 else full.reshape(height, width, -1)
        colours = np.broadcast_to(full[..., :3], (height, width, 3))
        opacity = full[..., 3:] / 255 if shape[-1] == 4 else 1
        expected = [colours * opacity + 255 * (1 - opacity)]
    if random.random() < 0.2:
        array = np.asfortranarray(array)
    source = array
    if name != "object" and name != "uint16" and random.random() < 0.3:
        source = torch.from_numpy(np.ascontiguousarray(array))
    return Case(
        lambda: to_image(source), "result" if known else None, check=lambda found: check_image(found, expected)
    )


def read_photo(random: Random, path: Path, output: Path) -> tuple[Callable[[], object], str]:
    """One of the ways to read a photo, and its kind: `plain`, `command` or `other`."""
    commands = [
        ("segment",),
        ("segment", "--task=semantic"),
        ("segment", "--segments=3"),
        ("attention",),
        ("inspect",),
    ]
    kind = random.random()
    if kind < 0.1:
        command, *options = pick(random, commands)
        target = output / ("folder" if command == "inspect" else "out.png")
        checkpoint = SCRATCH / "models" / ("segmenter" if "--task=semantic" in options else "classifier")
        argv = [command, str(path), "-o", str(target), "--checkpoint", str(checkpoint), *options]
        return lambda: cli.main(argv), "command"
    if kind < 0.2:
        return lambda: READERS["zero-shot"](path), "other"
    if kind < 0.25:
        return lambda: READERS["sliding"](path), "other"
    if kind < 0.3:
        return lambda: READERS["pipeline"](str(path)), "other"
    return lambda: open_image(path), "plain"


def make_image(random: Random, folders: Folders) -> Case:
    """A case of a picture in some mode and format, sound or not, and a way to read it."""
    kind = random.random()
    if kind < 0.08:
        return make_array(random)
    path = folders.inputs / pick(random, NAMES)
    read, way = read_photo(random, path, folders.output)
    names, is_command, is_plain = (path.name,), way == "command", way == "plain"
    if kind < 0.12:
        make_special(random, path)
        return Case(read, "sentence", names, is_command=is_command)
    if kind < 0.125:
        write_bomb(random, path)
        return Case(read, None, names, is_command=is_command)
    picture = draw_picture(random, pick(random, MODES), most=pick(random, (8, 60)))
    orientation = int(random.integers(1, 9))
    options = {"exif": orientation_block(orientation)} if random.random() < 0.4 else {}
    data, format = encode(random, picture, pick(random, COMMON + COMMON + OTHERS), **options)
    if kind > 0.4:
        path.write_bytes(damage(random, data))
        return Case(read, None, names, is_command=is_command)
    path.write_bytes(add_metadata(random, data, format) if random.random() < 0.6 else data)
    if format in ("EPS", "PDF"):
        return Case(read, "sentence", names, is_command=is_command)
    turned = path.read_bytes() != data  # the added metadata may hold an orientation
    expected, contrast = decode(data, TURNS if turned else None)
    check = (lambda image: check_image(image, expected, contrast)) if is_plain else (lambda result: None)
    return Case(read, "result" if format in COMMON and expected else None, names, check, is_command)
