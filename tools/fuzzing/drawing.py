"""Random pictures, their files, and damage to files."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from .cases import Random


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
COMMON = (
    "AVIF",
    "BMP",
    "GIF",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "TGA",
    "TIFF",
    "WEBP",
)  # read if Pillow can
OTHERS = ("BLP", "DDS", "DIB", "EPS", "ICNS", "ICO", "IM", "MPO", "MSP", "PCX", "PDF", "QOI", "SGI", "SPIDER", "XBM")


def pick(random: Random, choices):
    """One of the choices, at random."""
    return choices[int(random.integers(len(choices)))]


def random_bytes(random: Random, most: int) -> bytes:
    """Up to `most` bytes, at least one."""
    return random.bytes(int(random.integers(1, most + 1)))


def draw_picture(random: Random, mode: str = "RGB", least: int = 5, most: int = 60) -> Image.Image:
    """A smooth gradient with some noise, in any mode, with sides from `least` to `most` pixels."""
    width, height = (int(side) for side in random.integers(least, most, endpoint=True, size=2))
    coarse = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    picture = coarse.resize((width, height), Image.Resampling.BILINEAR)
    grey = np.asarray(picture.convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * pick(random, (1, 257, 65537)))
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / pick(random, (255, 1, 1e-30)))
    if mode in ("LA", "PA", "RGBA"):
        picture.putalpha(Image.fromarray(random.integers(0, 256, grey.shape, dtype=np.uint8)))
    if mode == "LAB":
        return Image.merge("LAB", picture.split())
    return picture.convert("RGBA").convert("P").convert("PA") if mode == "PA" else picture.convert(mode)


def encode(random: Random, picture: Image.Image, format: str, **options) -> tuple[bytes, str]:
    """The bytes of a picture and their format: PNG in RGB if the chosen format cannot store the mode."""
    if format == "TIFF":
        options["compression"] = pick(random, (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"))
    if format in ("GIF", "TIFF", "WEBP", "PNG") and random.random() < 0.2:
        options |= {"save_all": True, "append_images": [picture.copy(), picture.copy()]}
    file = io.BytesIO()
    try:
        picture.save(file, format, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SystemError, TypeError, AttributeError, struct.error):
        return encode(random, picture.convert("RGB"), "PNG")
    return file.getvalue(), format


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file, with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def orientation_block(orientation: int) -> bytes:
    """An EXIF block with an orientation from 1 to 8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def add_metadata(random: Random, data: bytes, format: str) -> bytes:
    """Add metadata that is huge or makes no sense. The pixels stay as they are."""
    junk = random_bytes(random, 300)
    if format == "PNG":
        texts = [
            png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(int(random.integers(80 << 20))), 1)),
            png_chunk(b"tEXt", b"comment\0" + b"x" * int(random.integers(2 << 20))),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + junk),
            *(png_chunk(kind, junk) for kind in (b"iTXt", b"zTXt", b"eXIf", b"iCCP", b"prVt", b"tEXt", b"pHYs")),
            *(png_chunk(kind, b"") for kind in (b"iTXt", b"zTXt", b"eXIf", b"iCCP", b"gAMA", b"pHYs", b"tIME")),
            png_chunk(b"eXIf", orientation_block(6)[6:][: int(random.integers(24))]),
        ]
        return data[:33] + pick(random, texts) + data[33:]
    if format == "JPEG":
        exif = orientation_block(6)
        bodies = [b"Exif\0\0" + junk, exif[: int(random.integers(1, len(exif)))], b"ICC_PROFILE\0\1\1" + junk]
        bodies += [b"http://ns.adobe.com/xap/1.0/\0" + junk, b"Photoshop 3.0\0" + junk, b"MPF\0" + junk, junk, b""]
        marker = pick(random, (0xE1, 0xE2, 0xED, 0xFE, 0xE1))
        body = pick(random, bodies)
        return data[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + data[2:]
    if format == "WEBP" and data[12:16] == b"VP8X":
        body = data[12:] + b"EXIF" + struct.pack("<I", len(junk)) + junk + b"\0" * (len(junk) % 2)
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    return data


def damage(random: Random, data: bytes) -> bytes:
    """Change, insert or remove bytes at one to three places. Most PNG files get new checksums."""
    for _ in range(int(random.integers(1, 4))):
        size = len(data)
        at = int(random.integers(pick(random, (min(size, 64), size)) or 1)) if size else 0
        kind, junk = int(random.integers(10)), random_bytes(random, 20)
        if kind == 0:
            data = data[:at]
        elif kind <= 3:
            data = data[:at] + junk[: 1 + kind] + data[at + 1 + kind :]
        elif kind == 4:
            data = data[:at] + pick(random, (b"\0", b"\xff", b"\x7f")) * pick(random, (1, 2, 4)) + data[at + 4 :]
        elif kind == 5:
            data = (
                data[:at]
                + struct.pack(pick(random, (">I", "<I")), pick(random, (0, 1, 65536, 2**31 - 1, 2**32 - 1)))
                + data[at + 4 :]
            )
        elif kind == 6:
            data = data[:at] + junk + data[at:]
        elif kind == 7:
            data = data[:at] + data[at + int(random.integers(1, 200)) :]
        elif kind == 8:
            data = data[:at] + data[at // 2 :]
        else:
            data = pick(random, (data[:at] + junk, b"", junk, b"\xef\xbb\xbf" + data, data[: size // 2]))
        if data[:8] == b"\x89PNG\r\n\x1a\n" and random.random() < 0.7:
            data = mend_checksums(data)
    return data


def mend_checksums(data: bytes) -> bytes:
    """Write correct checksums into a changed PNG, so that readers do not stop at the changed chunk."""
    mended, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + length > len(data):
            break
        mended += png_chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return mended + data[at:]
