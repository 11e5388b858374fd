"""
What visitors cost the page of the demo: a large photo, many at once, some who come and go, and files made to exhaust
the server. Reads /proc, so it runs on Linux.

    python benchmarks/visitors.py --clients 20 --seconds 60 --sessions 30
"""

import argparse
import base64
import io
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import httpx
import numpy as np
import skimage.data
from gradio_client import Client, handle_file
from PIL import Image


DEMO = Path(__file__).resolve().parent.parent / "demo" / "app.py"
MEGABYTE = 10**6


@contextmanager
def serve(uploads: Path) -> Iterator[tuple[str, int]]:
    """The page in a process of its own: its address, and the number of the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    environment = os.environ | {"GRADIO_TEMP_DIR": str(uploads)}
    with subprocess.Popen(
        [sys.executable, str(DEMO), "--port", str(port)], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        try:
            while process.poll() is None:
                try:
                    urllib.request.urlopen(url).close()
                    break
                except URLError:
                    time.sleep(0.5)
            yield url, process.pid
        finally:
            process.terminate()


def memory(process: int, name: str = "VmRSS") -> float:
    """Megabytes that a process holds; with `VmHWM`, the most since [`forget_peak`]."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024 / MEGABYTE


def forget_peak(process: int):
    """From now on `VmHWM` is the most memory since now."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def cpu_seconds(process: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def disk(folder: Path) -> float:
    """Megabytes of the files in a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file()) / MEGABYTE


def save_photo(folder: Path, width: int, height: int) -> Path:
    """A photo of that size, as a JPEG."""
    path = folder / f"{width}x{height}.jpg"
    Image.fromarray(skimage.data.astronaut()).resize((width, height)).save(path, quality=90)
    return path


def connect(url: str) -> Client:
    """A client that waits for a busy server."""
    return Client(url, verbose=False, httpx_kwargs={"timeout": 600})


def ask(client: Client, photo: Path) -> float:
    """Seconds until a photo's segments are there; they have to be those of this photo."""
    started = time.monotonic()
    answer = client.predict(photo=handle_file(photo), api_name="/segment")
    seconds = time.monotonic() - started
    with Image.open(photo) as image:
        image.thumbnail((1280, 1280))
        if (answer["width"], answer["height"]) != image.size:
            raise RuntimeError(f"{photo.name} got the answer of another photo.")
    mask = Image.open(io.BytesIO(base64.b64decode(answer["mask_png"])))
    if mask.size != (answer["width"], answer["height"]):
        raise RuntimeError(f"The mask of {photo.name} has another size.")
    return seconds


def crowd(url: str, photos: list[Path], seconds: float) -> tuple[list[float], list[Exception]]:
    """One client a photo, each asking again and again: what every answer took, and what went wrong."""
    taken, failures, end = [], [], time.monotonic() + seconds

    def visit(photo: Path):
        try:
            client = connect(url)
            while time.monotonic() < end:
                taken.append(ask(client, photo))
        except Exception as error:
            failures.append(error)

    visitors = [threading.Thread(target=visit, args=(photo,)) for photo in photos]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    return taken, failures


def come_and_go(url: str, photos: list[Path]):
    """A session for each photo, one after the other: opened, asked, closed."""
    for photo in photos:
        client = connect(url)
        ask(client, photo)
        client.close()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, bits: int = 1, colour: int = 0) -> bytes:
    """A PNG of black pixels, however many: a small file of a large picture."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    row = bytes((width * bits * {0: 1, 2: 3, 6: 4}[colour] + 7) // 8 + 1)
    packer = zlib.compressobj(9)
    rows = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def file_of(side: int, mode: str, format: str, **options) -> bytes:
    """A file of a square picture whose pixels are all the same."""
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, format, **options)
    return file.getvalue()


def bombs() -> dict[str, bytes]:
    """Small files that are large pictures, by name: some are to be refused, others are the largest admitted."""
    return {
        "refused.png": png_of(30_000, 30_000),
        "refused-long.png": png_of(60_000, 60, 8, 2),
        "largest.png": png_of(5_000, 5_000, 8, 2),
        "largest-16-bit.png": png_of(5_000, 5_000, 16, 0),
        "largest-16-bit-rgba.png": png_of(5_000, 5_000, 16, 6),
        # Its decoder has to keep all coefficients.
        "largest-progressive.jpg": file_of(5_000, "RGB", "JPEG", progressive=True, subsampling="4:4:4"),
        "largest.webp": file_of(3_535, "RGBA", "WEBP", lossless=True),
        "largest.avif": file_of(3_535, "RGBA", "AVIF", speed=10, subsampling="4:4:4"),
    }


def bombard(url: str, files: dict[str, bytes], visitor: Path) -> list[float]:
    """Send all the files at once, and ask for the segments of a photo meanwhile: what each answer took."""
    client, answers = connect(url), {}

    def send(name: str, data: bytes):
        path = httpx.post(f"{url}gradio_api/upload", files={"files": (name, data)}, timeout=600).json()[0]
        photo = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [photo, "ncut", 4, False, ""]}
        event = httpx.post(f"{url}gradio_api/call/segment", json=body, timeout=600).json()["event_id"]
        answers[name] = httpx.get(f"{url}gradio_api/call/segment/{event}", timeout=600).text

    senders = [threading.Thread(target=send, args=item) for item in files.items()]
    for sender in senders:
        sender.start()
    taken = [ask(client, visitor)]
    while any(sender.is_alive() for sender in senders):
        taken.append(ask(client, visitor))
    for name in files:
        if ("event: error" in answers.get(name, "")) != name.startswith("refused"):
            raise RuntimeError(f"The answer to {name} is {answers.get(name, 'none')[:200]}")
    return taken


class Visits:
    """
    What is measured, one method a kind of visitor; each says it in a sentence.

    Args:
        url: address of the page.
        process: number of its process.
        uploads: the folder of what was sent to it.
        photos: that visitors ask about.
    """

    def __init__(self, url: str, process: int, uploads: Path, photos: list[Path]):
        self.url, self.process, self.uploads, self.photos = url, process, uploads, photos
        come_and_go(url, photos[:8])  # what the page keeps of photos is full from now on
        self.before = memory(process)

    def more(self, name: str = "VmRSS") -> str:
        """How much more memory the process holds than before."""
        return f"{memory(self.process, name) - self.before:+.0f} MB"

    def large_photo(self, photo: Path) -> str:
        """A photo of 12 megapixels, from the upload to its segments."""
        client = connect(self.url)
        computed = cpu_seconds(self.process)
        seconds = ask(client, photo)
        computed = cpu_seconds(self.process) - computed
        return f"12 megapixels, upload to segments: {computed:.2f} s of one core, {seconds:.1f} s in all"

    def bombs(self) -> str:
        """Files made to exhaust the server, all at once, and a visitor meanwhile."""
        files, computed = bombs(), cpu_seconds(self.process)
        forget_peak(self.process)
        taken = bombard(self.url, files, self.photos[0])
        computed = cpu_seconds(self.process) - computed
        others = f"others answered in at most {max(taken):.1f} s; {computed:.1f} s of one core for all of it"
        return f"bombs: {self.more('VmHWM')} at most, {self.more()} afterwards; {others}"

    def sessions(self, number: int) -> str:
        """Visitors who come and go."""
        come_and_go(self.url, self.photos[:number])
        return f"{number} sessions closed: {self.more()}, {disk(self.uploads):.1f} MB on disk"

    def crowd(self, number: int, seconds: float) -> str:
        """Visitors at the same time."""
        taken, failures = crowd(self.url, self.photos[:number], seconds)
        half, most = np.quantile(taken, [0.5, 0.95])
        found = f"{len(taken)} answers, {len(failures)} errors, p50 {half:.1f} s, p95 {most:.1f} s"
        why = f" (the first: {failures[0]!r})" if failures else ""
        return f"{number} clients for {seconds:.0f} s: {found}{why}; {self.more()}"


def main():
    """Measure, and print a line for each kind of visitor."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--clients", type=int, default=20, help="clients at once")
    parser.add_argument("--seconds", type=float, default=60, help="how long they ask")
    parser.add_argument("--sessions", type=int, default=30, help="sessions that are opened and closed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, uploads = Path(name), Path(name, "uploads")
        uploads.mkdir()
        photos = [save_photo(folder, 480 + 2 * number, 320) for number in range(max(args.clients, args.sessions, 8))]
        large = save_photo(folder, 4000, 3000)
        with serve(uploads) as (url, process):
            visits = Visits(url, process, uploads, photos)
            for measure in (
                lambda: visits.large_photo(large),
                visits.bombs,
                lambda: visits.sessions(args.sessions),
                lambda: visits.crowd(args.clients, args.seconds),
            ):
                print(f"{measure()} (load {os.getloadavg()[0]:.1f})", flush=True)


if __name__ == "__main__":
    main()
