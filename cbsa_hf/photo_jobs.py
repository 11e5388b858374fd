"""Choose the photos that a command reads and the pictures that it writes. Photos are never overwritten, and pictures
are written whole or not at all."""

import glob
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Job:
    """
    A photo, and the pictures to make of it.

    Args:
        photo: a path, or `-` for standard input.
        outputs: paths of the pictures, each a .png.
    """

    photo: str
    outputs: tuple[Path, ...]


def find_photos(sources: list[str]) -> list[str]:
    """
    The photos that a command line names, without repetitions.

    Args:
        sources: files, `-`, folders, and patterns such as `holiday/*.jpg`. The images in folders and those that match
            a pattern are sorted.

    Raises:
        ValueError: a folder has no images, or no file matches a pattern.
    """
    photos = []
    for source in sources:
        if os.path.isdir(source):
            known = Image.registered_extensions()
            found = [path for path in sorted(Path(source).iterdir()) if path.is_file()]
            found = [str(path) for path in found if path.suffix.lower() in known and not path.name.startswith(".")]
            if not found:
                raise ValueError(f"The folder {source} has no images in it.")
        elif glob.has_magic(source) and not os.path.exists(source):
            found = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
            if not found:
                raise ValueError(f"There is no file that {source} fits.")
        else:
            found = [source]
        photos += found
    return list(dict.fromkeys(photos))


def check_png(path: Path):
    """Raises ValueError if a PNG cannot be written to a path. A file that exists is no error here."""
    if path.is_dir():
        raise ValueError(f"The output {path} is a folder; name a .png in it.")
    if path.suffix.lower() != ".png":
        raise ValueError(f"The output {path} has to end in .png.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"The folder {path.parent} is not writable; write {path.name} to another.")


def same_file(path: str | Path, other: str | Path) -> bool:
    """Whether two paths name the same file, also through symbolic and hard links, or would if they existed."""
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return os.path.realpath(path) == os.path.realpath(other)


def check_job(job: Job, photos: Iterable[str], force: bool):
    """
    Raises ValueError if a job would overwrite a photo, another of its own pictures or, without `force`, any file. This
    is checked before any work is done.
    """
    for index, path in enumerate(job.outputs):
        check_png(path)
        for photo in photos:
            if photo != STANDARD_INPUT and same_file(photo, path):
                raise ValueError(f"The output {path} is the photo {photo} itself; name another file.")
        for other in job.outputs[:index]:
            if same_file(other, path):
                raise ValueError(f"{other} and {path} are one file; the mask needs another than the overlay.")
        if not force and os.path.lexists(path):
            raise ValueError(f"{path} exists; name another file, or give --force to replace it.")


def plan_folder(photos: list[str], folder: Path) -> list[Job]:
    """
    A job for each photo: an overlay and a mask in the folder, named after the photo.

    Raises:
        ValueError: the folder cannot be made, or two pictures would have the same name.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {folder} is a file; name a folder for several photos.")
    if not folder.parent.is_dir():
        raise ValueError(f"There is no folder {folder.parent} to make {folder.name} in.")
    names, jobs = {}, []
    for photo in photos:
        stem = "stdin" if photo == STANDARD_INPUT else Path(photo).stem
        outputs = folder / f"{stem}.png", folder / f"{stem}_mask.png"
        for path in outputs:
            other = names.setdefault(path.name.casefold(), photo)
            if other != photo:
                raise ValueError(f"{path} would be made of {other} and of {photo}; segment them into two folders.")
        jobs.append(Job(photo, outputs))
    return jobs


def save_pngs(images: Iterable[Image.Image], paths: Iterable[Path]):
    """
    Write pictures under temporary names, and rename them when all are complete. If that is interrupted, no partial
    file is left.
    """
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in paths}
    try:
        for image, temporary in zip(images, partial.values(), strict=True):
            # The defaults take six times as long for the same size.
            image.save(temporary, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
        for path, temporary in partial.items():
            temporary.replace(path)
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)
