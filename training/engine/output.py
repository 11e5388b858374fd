"""The folder that a run writes to: tried before anything else, for one run at a time, its files whole or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout


TRIED_BYTES = 4096


@contextmanager
def open_output(path: str | os.PathLike) -> Iterator[Path]:
    """
    A folder that this run alone writes to. It is made and tried; its lock ends with the context or the process.

    Raises:
        ValueError: nothing can be written there, or another run is at work in it.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except FileExistsError as error:
        raise ValueError(f"{folder} is a file; choose a folder as `--output_dir`.") from error
    except Timeout as error:
        raise ValueError(
            f"Another run is at work in {folder}: wait until it has ended, or choose another `--output_dir`."
        ) from error
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another `--output_dir`.") from error
    try:
        yield folder
    finally:
        lock.release()


def check_room(folder: Path, num_bytes: int):
    """A ValueError when the disk has less than that left for the checkpoints in a folder."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"{folder} has {free / 1e6:.1f} MB left, and this run needs {num_bytes / 1e6:.1f} MB for two checkpoints: "
            "make room, or choose another `--output_dir`."
        )


def sync(path: Path):
    """What a file holds, or which files a folder does, outlasts a loss of power. (Windows syncs no folders.)"""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path):
    """A file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_file(path: Path, content: str | bytes):
    """The whole content, or what was there before where that raises an OSError or is interrupted."""
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_together(folder: Path, last: str) -> Iterator[Path]:
    """
    A folder to write files to, which are moved to where they belong when all of them are on the disk; none is when
    anything is raised.

    Args:
        folder: where they belong.
        last: the file that is moved last, whose presence tells that all are there.
    """
    partial = folder / "results.partial"
    try:
        if partial.exists():
            remove(partial)
        partial.mkdir()
        yield partial
        files = sorted(partial.iterdir(), key=lambda path: path.name == last)
        for path in files:
            sync(path)
        for path in files:
            path.replace(folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
