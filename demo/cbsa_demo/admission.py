"""
What strangers may cost the server: no request is too long, the uploads together take a bounded space, and memory that
was used for them is given back.
"""

import ctypes
import shutil
import sys
from pathlib import Path

from gradio.utils import get_upload_folder
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .photos import LIMITS, MAX_BYTES


MAX_BODY = MAX_BYTES + 10**6  # bytes of a request; a megabyte for what surrounds the photo
MAX_UPLOADS = 10**9  # bytes of all photos that are kept


M_MMAP_THRESHOLD = -3  # from malloc.h of the GNU C library
LARGE = 2**17  # bytes; where the library starts


def give_large_memory_back():
    """
    From now on, freed memory of pictures and tensors goes back to the system at once. Without this, the GNU C library
    raises its threshold with every large block that is freed, and keeps later blocks for each thread.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, LARGE)


def make_room(needed: int):
    """Delete the oldest uploads until those that stay and what is to come take no more than [`MAX_UPLOADS`]."""
    uploads = []
    for file in Path(get_upload_folder()).glob("*/*"):
        try:
            status = file.lstat()
        except FileNotFoundError:  # another request, or Gradio, deleted it
            continue
        uploads.append((status.st_mtime, status.st_size, file))
    total = needed + sum(size for _, size, _ in uploads)
    for _, size, file in sorted(uploads):
        if total <= MAX_UPLOADS:
            break
        shutil.rmtree(file.parent, ignore_errors=True)
        total -= size


class Admission:
    """
    Refuses requests that are too long or do not say how long they are, before anything of them is kept.

    Args:
        app: what answers the others.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        """Answer a request as ASGI asks it: refuse it, or hand it on."""
        if scope["type"] == "http" and scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"")
            refusal = None
            if not length.isdigit():
                refusal = PlainTextResponse("Say how long the request is (Content-Length).", 411)
            elif int(length) > MAX_BODY:
                refusal = PlainTextResponse(f"This page takes photos {LIMITS}.", 413)
            elif scope["path"].endswith("/upload"):
                make_room(int(length))
            if refusal:
                return await refusal(scope, receive, send)
        return await self.app(scope, receive, send)
