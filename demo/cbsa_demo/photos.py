"""Which photo a visitor means, and reading it safely: the examples, and files in the upload folder alone."""

import functools
import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import skimage.data
from gradio.utils import get_upload_folder
from PIL import Image, ImageFile

from cbsa_hf import ImageError
from cbsa_hf.segmentation.image_files import has_more_pictures, open_bytes
from cbsa_hf.segmentation.images import HUNGRY_FORMATS, to_rgb


MAX_BYTES = 30 * 10**6
MAX_PIXELS = 25 * 10**6  # up to 8 bytes are needed for each, 16 in HUNGRY_FORMATS
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")
MAX_RATIO = 50  # of the longer side to the shorter
LONG_SIDE = 1280  # pixels of the longer side that anything is drawn at
UPLOADED = re.compile(r"[0-9a-f]{16,128}/[^/\\\0]{1,255}")  # Gradio's folder of an upload, and the file's own name

READING = threading.Lock()  # one photo at a time, since reading one takes up to 200 MB
LIMITS = f"up to {MAX_BYTES // 10**6} MB and {MAX_PIXELS // 10**6} million pixels"
NOT_UPLOADED = "Upload a photo first, or choose one of the examples; no other files are read."


@dataclass(frozen=True)
class Example:
    """
    Args:
        title: what it is called on the page.
        description: what can be seen on it.
        patch: (row, column) that the page asks at first.
        failure: what goes wrong with it, and why; empty where nothing does.
    """

    title: str
    description: str
    patch: tuple[int, int]
    failure: str = ""


EXAMPLES = {
    "coffee": Example("Coffee", "A red cup of coffee on a red saucer with a spoon, on a wooden table", (5, 13)),
    "chelsea": Example("Cat", "The face of a tabby cat, looking at the camera", (6, 9)),
    "astronaut": Example("Astronaut", "A woman in an orange space suit before a flag and a model rocket", (6, 10)),
    "camera": Example("Cameraman", "A man in a dark coat behind a camera on a tripod, in black and white", (7, 10)),
    "immunohistochemistry": Example("Tissue", "Glands in tissue, brown cells around blue ones, by microscope", (4, 6)),
    "rocket": Example(
        "Rocket (fails)",
        "A white rocket between towers before a violet evening sky",
        (9, 15),
        "The mask takes the sky for the object: it is one even area that seldom touches the border, and the rocket is "
        "only two patches wide.",
    ),
}


@dataclass(frozen=True)
class Photo:
    """
    Args:
        source: what the page calls it: an example's name, or the upload's folder and file.
        image: RGB, its longer side [`LONG_SIDE`] at most.
        title: an example's title, or the file's own name.
        description: for those who do not see it.
        remark: what the visitor should know of it; mostly empty.
    """

    source: str
    image: Image.Image
    title: str
    description: str
    remark: str = ""


class PhotoError(gr.Error):
    """A photo cannot be shown; the message is one sentence for the visitor."""

    def __init__(self, message: str):
        super().__init__(message, print_exception=False)

    def __str__(self) -> str:
        """The sentence itself; Gradio would put it into quotation marks."""
        return self.message


def find_upload(source: str) -> Path:
    """The path of an uploaded file, by the name that [`source_of`] gave it; a PhotoError for anything else."""
    folder = Path(get_upload_folder()).resolve()
    if not UPLOADED.fullmatch(source) or source.endswith("/.."):
        raise PhotoError(NOT_UPLOADED)
    path = folder / source
    # Links and pipes are not opened. One message for all cases tells nobody which files exist.
    if path.resolve() != path or not path.is_file():
        raise PhotoError(NOT_UPLOADED)
    return path


def source_of(path: object) -> str:
    """
    What the page calls an uploaded file, by its path or the address that it is served at; a PhotoError for a path that
    is not one.
    """
    if not isinstance(path, str) or len(path) > 4096:
        raise PhotoError(NOT_UPLOADED)
    folder = str(Path(get_upload_folder()).resolve()) + os.sep
    source = path.rpartition("/file=")[2].removeprefix(folder)
    find_upload(source)
    return source


def admit_files(value: object, depth: int = 0) -> object:
    """
    What a visitor sends, with the files in it, as Gradio may open them. Gradio checks where a file lies only where the
    sender calls it one, fetches addresses, and opens the rest as it comes.

    Raises:
        PhotoError: a file is among them that was not uploaded.
    """
    if depth > 20:
        raise PhotoError("What was sent is nested too deeply.")
    if isinstance(value, dict):
        value = {key: admit_files(item, depth + 1) for key, item in value.items()}
        if "path" in value:
            value |= {"path": str(find_upload(source_of(value["path"]))), "url": None}
        return value
    return [admit_files(item, depth + 1) for item in value] if isinstance(value, list) else value


def read_upload(path: Path) -> bytes:
    """The bytes of a regular file within the limit; the name in messages is the visitor's own."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PhotoError(NOT_UPLOADED)
        if status.st_size > MAX_BYTES:
            raise PhotoError(f"{path.name} has {status.st_size / 1e6:.0f} MB; this page takes photos {LIMITS}.")
        if not status.st_size:
            raise PhotoError(f"{path.name} is empty.")
        return file.read()


def open_header(data: bytes, name: str) -> ImageFile.ImageFile:
    """The photo in a file within the limits, before its pixels are decoded."""
    try:
        image = open_bytes(data)
    except Exception:  # decoders raise errors of many types
        image = None
    if image is None or image.format not in FORMATS:
        raise PhotoError(
            f"{name} is not a photo that this page can read; give a JPEG, PNG, WebP, AVIF, TIFF, GIF or BMP file."
        )
    width, height = image.size
    is_hungry = image.format in HUNGRY_FORMATS or image.mode == "CMYK"
    most = MAX_PIXELS // 2 if is_hungry else MAX_PIXELS
    if width * height > most or max(image.size) > MAX_RATIO * min(image.size):
        raise PhotoError(
            f"{name} has {width} x {height} pixels; this page takes photos {LIMITS}, half as many in WebP, AVIF and "
            f"CMYK, no side more than {MAX_RATIO} times the other."
        )
    return image


def open_upload(source: str) -> Photo:
    """An uploaded photo, upright and small enough to draw."""
    path = find_upload(source)
    name = path.name
    with READING:
        data = read_upload(path)
        image = open_header(data, name)
        image.draft(None, (LONG_SIDE, LONG_SIDE))  # a JPEG is decoded at half its size or less, if that is enough
        try:
            image = to_rgb(image, name, max(1, max(image.size) // LONG_SIDE))
        except ImageError as error:
            raise PhotoError(str(error)) from error
        image.thumbnail((LONG_SIDE, LONG_SIDE))
        remark = f"{name} holds several pictures; this is the first." if has_more_pictures(data) else ""
    return Photo(source, image, name, f"The uploaded photo {name}", remark)


@functools.cache
def open_example(source: str) -> Photo:
    """A photo of scikit-image."""
    example = EXAMPLES[source]
    image = Image.fromarray(getattr(skimage.data, source)()).convert("RGB")
    return Photo(source, image, example.title, example.description, example.failure)


def open_photo(source: object) -> Photo:
    """
    The photo that the page calls so.

    Raises:
        PhotoError: it is neither an example nor an uploaded photo that can be read.
    """
    if not isinstance(source, str) or len(source) > 512:
        raise PhotoError(NOT_UPLOADED)
    return open_example(source) if source in EXAMPLES else open_upload(source)
