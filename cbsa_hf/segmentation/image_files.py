"""
Open the bytes of image files with Pillow. Metadata beside colours and orientation is removed first, since damaged or
very large metadata can keep Pillow from reading pixels that are intact.
"""

import re
import struct
from io import BytesIO

from PIL import Image, ImageFile, UnidentifiedImageError


# Raster formats with one picture in a file. Left out are formats of Pillow that start another program (EPS starts
# Ghostscript), that it recognises without reading them, and that hold sets of icons. HEIF and JXL need a plugin.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "JXL", "TIFF", "GIF", "BMP", "JPEG2000"),
    *("PPM", "QOI", "PSD", "DDS", "PCX", "SGI", "TGA"),
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_XMP = b"XML:com.adobe.xmp\0\0\0"  # start of the text chunk with XMP, not compressed
JPEG_MARKER = re.compile(rb"\xff([\x02-\xfe])")
JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
MOST_SCANS = 100  # largest number of scans of a progressive JPEG; ten are usual, and each one visits all pixels


def strip_png(data: bytes) -> tuple[bytes, dict]:
    """A PNG with only the chunks that the pixels need; and its EXIF and XMP."""
    kept, info, position = [PNG_SIGNATURE], {}, len(PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        content, end = position + 8, position + 12 + length
        if kind == b"eXIf":
            info["exif"] = b"Exif\0\0" + data[content : content + length]
        elif kind == b"iTXt" and data.startswith(PNG_XMP, content):
            info["xmp"] = data[content : content + length]
        # The names of chunks that a decoder must understand start with a capital letter.
        elif kind[:1].isupper() or kind == b"tRNS":
            kept.append(data[position:end])
        position = end
        if kind == b"IEND":
            break
    return b"".join(kept), info


def strip_jpeg(data: bytes) -> tuple[bytes, dict]:
    """A JPEG without comments and application segments, except those that define the colours; and its EXIF and XMP."""
    kept, info, position = [data[:2]], {}, 2
    while (found := JPEG_MARKER.search(data, position)) and not 0xD0 <= found[1][0] <= 0xDA:  # until the scans begin
        marker, start = found[1][0], found.start()
        position = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        content = data[start + 4 : position]
        if content.startswith(b"Exif\0\0"):
            info["exif"] = info.get("exif", b"Exif\0\0") + content[6:]
        elif content.startswith(JPEG_XMP):
            info["xmp"] = content
        is_metadata = marker == 0xFE or 0xE0 <= marker <= 0xEF
        tells_colours = (marker == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14) or (
            marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12
        )
        if not is_metadata or tells_colours:
            kept.append(data[start:position])
    end = data.find(b"\xff\xd9", position)
    if data.count(b"\xff\xda", position, end if end >= 0 else len(data)) > MOST_SCANS:
        raise ValueError(f"it has more than {MOST_SCANS} scans")
    return b"".join([*kept, data[position:]]), info


def strip_tiff(data: bytes) -> tuple[bytes, dict]:
    """A TIFF cut down to its first page: Pillow would follow a list of millions of pages before it reads the first."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = struct.unpack_from(order + "H", data, 2)[0] == 43
    pointer, count, entry = ("Q", "Q", 20) if is_big else ("I", "H", 12)
    first = struct.unpack_from(order + pointer, data, 8 if is_big else 4)[0]
    entries = struct.unpack_from(order + count, data, first)[0]
    following = first + struct.calcsize("=" + count) + entries * entry
    width = struct.calcsize("=" + pointer)
    if following + width > len(data):
        return data, {}
    return data[:following] + bytes(width) + data[following + width :], {}


def strip_avif(data: bytes) -> tuple[bytes, dict]:
    """An AVIF without EXIF: AVIF has its own orientation and ignores that of EXIF."""
    return re.sub(rb"(infe[\x02\x03]\0\0.{4,6})Exif", rb"\1skip", data, flags=re.DOTALL), {}


STRIPPERS = {"PNG": strip_png, "JPEG": strip_jpeg, "TIFF": strip_tiff, "AVIF": strip_avif}


def open_bytes(data: bytes) -> ImageFile.ImageFile:
    """
    The image in the bytes of a file. Its header is read, its pixels are not.

    `Image.open` is not used, because its limit on the number of pixels is shared by the whole process. The caller
    checks `size` before it calls `load`.

    Raises:
        UnidentifiedImageError: the file has none of the `FORMATS`.
        Exception: any error that a decoder raises for a damaged file.
    """
    Image.init()
    failure = None
    for name in (name for name in FORMATS if name in Image.OPEN):
        factory, accept = Image.OPEN[name]
        if accept is not None:
            accepted = data and accept(data[:16])
            if not accepted or isinstance(accepted, str):  # a string means that Pillow was built without this format
                continue
        try:
            stripped, info = STRIPPERS[name](data) if name in STRIPPERS else (data, {})
            image = factory(BytesIO(stripped), "")
        except Exception as error:
            if accept is not None:
                failure = failure or error
        else:
            image.info.update(info)
            return image
    raise failure or UnidentifiedImageError(f"The formats are {', '.join(FORMATS)}.")


def has_more_pictures(data: bytes) -> bool:
    """Whether a file that [`open_bytes`] opens holds more than the one picture: an animation, or pages."""
    image = open_bytes(data)
    if image.format == "PNG":
        return b"acTL" in data[: data.find(b"IDAT")]
    if image.format == "TIFF":
        return strip_tiff(data)[0] != data
    return getattr(image, "is_animated", False)
