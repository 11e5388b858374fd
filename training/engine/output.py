"""The folder that a run writes to. Only one run at a time may use it, and its files are whole or absent."""

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
    Make a folder, try to write to it, and lock it, until the context or the process ends.

    Raises:
        ValueError: if nothing can be written there, or another run has locked it.
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


def check_free(folder: Path, num_bytes: int, what: str = "two checkpoints", option: str = "--output_dir"):
    """
    Raises ValueError if the disk of a folder has fewer bytes left than are needed.

    Args:
        folder: where to write.
        num_bytes: to be written.
        what: needs them, for the message.
        option: that names the folder, for the message.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"{folder} has {free / 1e6:.1f} MB left, and this run needs {num_bytes / 1e6:.1f} MB for {what}: "
            f"make room, or choose another `{option}`."
        )


def sync(path: Path):
    """Write a file, or a folder's list of files, to the disk. (Windows has no sync of folders.)"""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path):
    """Remove a file, or a folder and everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_file(path: Path, content: str | bytes):
    """
    Write a file completely, or leave what was there before.

    Raises:
        OSError: if it cannot be written.
    """
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
    Give a temporary folder to write files to. At the end, when all of them are on the disk, they are moved to the
    folder where they belong; if anything is raised, none is.

    Args:
        folder: where the files belong.
        last: name of the file that is moved last. Where it exists, all the others do.
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
