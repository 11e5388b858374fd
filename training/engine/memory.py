"""Freed memory stays with the process, for the next step."""

import ctypes
import sys


TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # options of `mallopt`, from glibc's malloc.h


def keep_freed_memory():
    """
    Makes glibc keep the memory that torch frees, instead of returning it to the system.

    Every training step allocates and frees the same large buffers. If they go back to the system in between, the
    system clears and maps each page again in every step. Without glibc (macOS, Windows) this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(TOP_PAD, 2**28)
