"""
Gives the library damaged, odd and hostile input, and counts what becomes of it.

    python tools/fuzz.py images checkpoints datasets commands --count 200 --seed 1
    python tools/fuzz.py images --seed 1 --only 417

Right ends are a result, where the input is sound, and one sentence that says what is wrong. All else is a fault: a
traceback, a hang, a crash, memory beyond a bound, a file written or changed outside the output, a program run, a
question asked, a result of input that cannot have one, a refusal of sound input, a sentence that does not name the
file. The status is 1 if there was a fault. The case of a number is the same at every run with that seed; `--only` runs
one again and prints all that it printed.

Needs Linux and the packages of the extras `test` and `train`.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import runpy
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path


# Before any import of the libraries: nothing is fetched, and one thread is all that a forked process can count on.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(tempfile.mkdtemp(prefix="fuzz-"), "home")
os.environ["MPLCONFIGDIR"] = os.environ["HF_HOME"]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import transformers
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SegformerImageProcessorPil, ViTImageProcessorPil, pipeline

from cbsa_hf import (
    CBSAConfig,
    CBSAForImageClassification,
    CBSAForSemanticSegmentation,
    SlidingWindowSegmenter,
    ZeroShotSegmenter,
    cli,
    images,
    load_checkpoint,
)


SCRATCH = Path(os.environ["HF_HOME"]).parent.resolve()
ROOT = Path(__file__).resolve().parents[1]
Random = np.random.Generator


# ---------------------------------------------------------------- what a case is, and what becomes of it


@dataclass
class Case:
    """
    Args:
        run: what is tried. It returns a result, or, of a command, its exit status; it raises ValueError or SystemExit
            with a sentence.
        expected: `result` or `sentence`; None where either is right.
        names: of which a sentence has to contain one.
        check: result -> what is wrong with it, or None.
        is_command: whether an int is an exit status, and the sentence stands on standard error.
        replaced: files that may be overwritten.
    """

    run: Callable[[], object]
    expected: str | None = None
    names: tuple[str, ...] = ()
    check: Callable[[object], str | None] = lambda result: None
    is_command: bool = False
    replaced: tuple[Path, ...] = ()


@dataclass
class Outcome:
    """
    Args:
        index: of the case.
        verdict: `result`, `sentence`, or the kind of fault.
        detail: the sentence; of a fault what distinguishes it from others.
        text: all that was printed, with the traceback.
        seconds: of processor time.
        megabytes: of memory, beyond what the process had before.
    """

    index: int
    verdict: str
    detail: str
    text: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0


RIGHT = ("result", "sentence")
FAULTS = ("traceback", "hang", "crash", "memory", "outside", "nameless", "wrong", "refused", "noise", "tool")


@dataclass
class Folders:
    """Of one case: what it reads, where it may write, and the temporary files of libraries."""

    inputs: Path
    output: Path
    temporary: Path

    @classmethod
    def make(cls, parent: Path) -> "Folders":
        folders = cls(parent / "inputs", parent / "output", parent / "temporary")
        for folder in asdict(folders).values():
            folder.mkdir(parents=True)
        return folders


class Guard:
    """Notes, by Python's audit events, what the process does outside the folders where it may write."""

    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    CHANGES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "shutil.rmtree": 1}
    PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn")

    def __init__(self):
        self.allowed: tuple[str, ...] | None = None  # not watching
        self.seen: list[str] = []
        sys.addaudithook(self.on_event)

    def watch(self, *folders: Path):
        self.allowed, self.seen = tuple(f"{folder}{os.sep}" for folder in (*folders, SCRATCH / "home")), []

    def stop(self):
        self.allowed = None

    def on_event(self, event: str, args: tuple):
        if self.allowed is None:
            return
        if event == "open":
            path, mode, flags = args
            if flags & self.WRITING or (isinstance(mode, str) and set(mode) & set("wax+")):
                self.note_write("opens for writing", path)
        elif event in self.CHANGES and args[-1] in (-1, None):  # else relative to a folder that is open
            for path in args[: self.CHANGES[event]]:
                self.note_write(event, path)
        elif event in self.PROGRAMS:
            self.seen.append(f"runs a program: {args[0]!s:.80}")
        elif event == "builtins.input":
            self.seen.append("asks on standard input")
        elif event == "socket.connect" and isinstance(args[1], tuple):
            self.seen.append(f"connects to {args[1]!s:.80}")

    def note_write(self, event: str, path: object):
        if isinstance(path, (str, bytes, os.PathLike)):
            absolute = os.path.abspath(os.fsdecode(path))
            if not f"{absolute}{os.sep}".startswith(self.allowed) and not absolute.startswith("/dev/"):
                self.seen.append(f"{event} {absolute}")


def hash_files(*folders: Path) -> dict[Path, str]:
    """Of every regular file in the folders."""
    files = [path for folder in folders for path in folder.rglob("*") if not path.is_symlink() and path.is_file()]
    return {path: hashlib.sha1(path.read_bytes()).hexdigest() for path in files}


def find_changes(case: Case, before: dict[Path, str], folders: Folders) -> list[str]:
    """What happened to the files of a case that should not have."""
    after = hash_files(folders.inputs, folders.output)
    changes = [f"removes or changes {path.name}" for path in before if after.get(path) != before[path]]
    replaced = {f"removes or changes {path.name}" for path in case.replaced}
    new = [path for path in after if path not in before]
    stray = [path for path in new if not path.is_relative_to(folders.output) or ".partial" in str(path)]
    return [change for change in changes if change not in replaced] + [f"leaves {path.name} behind" for path in stray]


def memory(name: str, pid: int | str = "self") -> float:
    """`VmRSS` or its peak, `VmHWM`, in megabytes; 0 of a process that has ended."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def processor_time(pid: int) -> float:
    """Seconds that the process has computed for. (What it waits for a turn on a busy machine is nobody's fault.)"""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_sentence(text: str, names: tuple[str, ...]) -> bool:
    return len(text.splitlines()) == 1 and len(text) >= 20 and any(name in text for name in names or ("",))


def place(error: BaseException) -> str:
    """Where it was raised: the innermost line of this project, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(str(ROOT)) and frame.filename != __file__]
    found = dict.fromkeys(f"{Path(f.filename).name}:{f.name}" for f in (own or frames)[-1:] + frames[-1:])
    return " > ".join(found)


def generalise(text: str) -> str:
    """What was printed, without what differs from case to case."""
    text = re.sub(r"\S*/(?:inputs|output|temporary)\b", "", text)
    return re.sub(r"\d+", "#", re.sub(r"b'[^']*'|\(long\)+|0x\w+", "...", text))[:100]


def judge(case: Case, ending: object, printed: str, changes: list[str]) -> tuple[str, str]:
    """Verdict and detail of a case that ended by itself."""
    if isinstance(ending, BaseException) and not isinstance(ending, (ValueError, SystemExit)):
        return "traceback", f"{type(ending).__name__} in {place(ending)}"
    if "Traceback (most recent call last)" in printed:
        return "traceback", f"printed: {generalise(printed.strip().splitlines()[-1])}"
    if changes:
        return "outside", generalise(changes[0])
    if isinstance(ending, SystemExit):
        ending = ending.code if not isinstance(ending.code, str) else ValueError(ending.code)
    if isinstance(ending, ValueError):
        sentence = str(ending)
    elif case.is_command and ending not in (0, None):
        sentence = (printed.strip().splitlines() or [""])[-1]
        if ending not in (1, 2, 130):
            return "traceback", f"status {ending}: {sentence}"
    else:
        if case.expected == "sentence":
            return "wrong", "a result where a sentence is due"
        if (wrong := case.check(ending)) is not None:
            return "wrong", wrong
        if "Warning: " in printed:
            return "noise", generalise(re.findall(r"\w*Warning: .*", printed)[0])
        return "result", ""
    if not is_sentence(sentence, case.names):
        raised = f"{place(ending)}: " if isinstance(ending, ValueError) and ending.__traceback__ else ""
        return "nameless", f"{raised}{generalise(sentence)!r}"
    return ("refused", generalise(sentence)) if case.expected == "result" else ("sentence", sentence)


def try_case(make: Callable[[Random, Folders], Case], seed: int, index: int, guard: Guard) -> Outcome:
    """Make the case of that number, run it in this process, and judge it."""
    folders = Folders.make(SCRATCH / f"case-{index}")
    tempfile.tempdir = str(folders.temporary)
    datasets.config.HF_DATASETS_CACHE = folders.temporary / "datasets"
    os.chdir(folders.inputs)
    with warnings.catch_warnings():  # those of making what is broken
        warnings.simplefilter("ignore")
        case = make(np.random.default_rng((seed, index)), folders)
    before = hash_files(folders.inputs, folders.output)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    had, started = memory("VmRSS"), time.process_time()
    with redirected(folders.temporary):
        guard.watch(folders.output, folders.temporary)
        try:
            ending = case.run()
        except BaseException as error:  # which of them are faults is what is asked
            ending = error
        guard.stop()
    seconds, megabytes = time.process_time() - started, memory("VmHWM") - had
    text = (folders.temporary / "printed").read_text(errors="replace")
    verdict, detail = judge(case, ending, text, guard.seen + find_changes(case, before, folders))
    if isinstance(ending, BaseException):
        text += "".join(traceback.format_exception(ending))
    os.chdir(SCRATCH)
    shutil.rmtree(folders.inputs.parent, ignore_errors=True)
    return Outcome(index, verdict, detail, text[-20_000:], seconds, megabytes)


@contextmanager
def redirected(folder: Path) -> Iterator[None]:
    """Standard input says yes to everything; what is printed, by whatever library, goes to a file."""
    (folder / "answers").write_text("y\n" * 100)
    kept = [os.dup(number) for number in range(3)]
    with open(folder / "answers") as answers, open(folder / "printed", "w") as printed:
        for number, file in enumerate((answers, printed, printed)):
            os.dup2(file.fileno(), number)
        yield
        for number, file in enumerate(kept):
            (sys.stdin, sys.stdout, sys.stderr)[number].flush()
            os.dup2(file, number)
            os.close(file)


def work(kind: "Kind", seed: int, indices: list[int], pipe: int):
    """In a process of its own: try cases, and tell of each when it starts and what became of it."""
    os.setsid()
    guard = Guard()
    with open(pipe, "w") as answers:
        for index in indices:
            print(index, file=answers, flush=True)
            try:
                outcome = try_case(kind.make, seed, index, guard)
            except BaseException:  # of this tool itself
                outcome = Outcome(index, "tool", "the case cannot be made or judged", traceback.format_exc())
            print(json.dumps(asdict(outcome)), file=answers, flush=True)
    os._exit(0)


class Worker:
    """A forked process that tries cases one after the other, each within bounds."""

    def __init__(self, kind: "Kind", seed: int, indices: list[int], bounds: argparse.Namespace):
        self.bounds, self.buffer = bounds, b""
        self.pipe, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            work(kind, seed, indices, writing)
        os.close(writing)

    def read_line(self) -> tuple[str | None, str]:
        """The next line that it writes; or None, and what is wrong with it."""
        had, first = memory("VmRSS", self.pid), processor_time(self.pid)
        used, moved = first, time.time()
        while b"\n" not in self.buffer:
            if select.select([self.pipe], [], [], 0.05)[0]:
                if not (read := os.read(self.pipe, 1 << 16)):
                    return None, "crash"
                self.buffer += read
                continue
            if processor_time(self.pid) > used:
                used, moved = processor_time(self.pid), time.time()
            if max(used - first, time.time() - moved) > self.bounds.seconds:
                return None, "hang"
            if memory("VmRSS", self.pid) - had > self.bounds.memory:
                return None, "memory"
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode(), ""

    def end(self) -> str:
        """How it ended, by itself or now."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self.pipe)
        status = os.waitpid(self.pid, 0)[1]
        return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"

    def outcomes(self, indices: list[int]) -> Iterator[Outcome]:
        """Of these cases in turn, up to the one that the worker does not survive."""
        for index in indices:
            line, trouble = self.read_line()
            if line is not None:
                line, trouble = self.read_line()
            if line is None:
                printed = SCRATCH / f"case-{index}/temporary/printed"
                text = printed.read_text(errors="replace") if printed.exists() else ""
                bounds = {"hang": f"beyond {self.bounds.seconds} s", "memory": f"beyond {self.bounds.memory} MB"}
                ended = self.end()
                yield Outcome(index, trouble, bounds.get(trouble, ended), text)
                return
            outcome = Outcome(**json.loads(line))
            if outcome.verdict in RIGHT and outcome.megabytes > self.bounds.memory:
                outcome.verdict, outcome.detail = "memory", f"beyond {self.bounds.memory} MB"
            yield outcome
        self.end()


def run_cases(kind: "Kind", seed: int, indices: list[int], bounds: argparse.Namespace) -> Iterator[Outcome]:
    """The outcome of each case; those that end a process do not end the others."""
    while indices:
        group = indices[: kind.per_process]
        for outcome in Worker(kind, seed, group, bounds).outcomes(group):
            yield outcome
            indices = indices[1:]
        shutil.rmtree(SCRATCH / f"case-{outcome.index}", ignore_errors=True)


# ---------------------------------------------------------------- images


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
COMMON = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")  # read wherever Pillow can
OTHERS = ("BLP", "DDS", "DIB", "EPS", "ICNS", "ICO", "IM", "MPO", "MSP", "PCX", "PDF", "QOI", "SGI", "SPIDER", "XBM")
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


def pick(random: Random, choices):
    return choices[int(random.integers(len(choices)))]


def random_bytes(random: Random, most: int) -> bytes:
    return random.bytes(int(random.integers(1, most + 1)))


def draw_picture(random: Random, mode: str = "RGB", least: int = 5, most: int = 60) -> Image.Image:
    """A smooth gradient with some noise, whatever the mode."""
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
    """The file, and its format: PNG, of an RGB picture, where the one wanted cannot hold the mode."""
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
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def orientation_block(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def add_metadata(random: Random, data: bytes, format: str) -> bytes:
    """Blocks beside the pixels that cannot be understood, or are huge: the pixels are as before."""
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
    """One to three mutations."""
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
    """Of a PNG, so that it is read beyond the chunk that was changed."""
    mended, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + length > len(data):
            break
        mended += png_chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return mended + data[at:]


def write_bomb(random: Random, path: Path):
    """A small PNG of very many pixels, or of very unequal sides."""
    sizes = ((2_000_000, 1), (1, 60_000), (9_000, 9_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (100_000, 3))
    width, height = pick(random, sizes)
    row = b"\0" + bytes(-(-width // 8)) if width < 10**7 else b""
    compressor = zlib.compressobj(9)
    body = b"".join(compressor.compress(row) for _ in range(min(height, 60_000))) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))


def make_special(random: Random, path: Path):
    """What is no regular file, at that path; or nothing."""
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
    """(height, width, 3) that a sound picture has in RGB; None where that is a matter of choice."""
    values = np.asarray(picture)
    if picture.mode == "I;16":
        return np.stack([values // 257] * 3, axis=-1)
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
    What Pillow reads in a file, as [`expected_pixels`], in each of the orientations, or else in the file's own;
    nothing where it cannot read what it wrote. And whether there is contrast in a file whose values have no range.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels, values = expected_pixels(picture), np.asarray(picture)
            orientations = orientations or [picture.getexif().get(0x0112, 1)]
            contrast = picture.mode in ("I", "F") and np.ptp(values) > 0
    except Exception:  # any decoder, any exception
        return [], False
    return [] if pixels is None else [TURNS[turn](pixels) for turn in orientations], contrast


def check_image(found: object, expected: list[np.ndarray] = (), contrast: bool = False) -> str | None:
    """What is wrong with what left the door for images; it should have one of the expected contents, if any."""
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
    """An array or a tensor of some shape, type and range."""
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
        lambda: images.to_image(source), "result" if known else None, check=lambda found: check_image(found, expected)
    )


def read_photo(random: Random, path: Path, output: Path) -> tuple[Callable[[], object], str]:
    """One of the ways to a photo's pixels: plain, by a command, or another."""
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
        return lambda: TOOLS["zero-shot"](path), "other"
    if kind < 0.25:
        return lambda: TOOLS["sliding"](path), "other"
    if kind < 0.3:
        return lambda: TOOLS["pipeline"](str(path)), "other"
    if kind < 0.35 and hasattr(images, "open_mask"):
        return lambda: images.open_mask(path), "other"
    return lambda: images.open_image(path), "plain"


def make_image(random: Random, folders: Folders) -> Case:
    """A picture in some mode and format, sound or not, and a way to read it."""
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
    turned = path.read_bytes() != data  # metadata that was added may say how
    expected, contrast = decode(data, TURNS if turned else None)
    check = (lambda image: check_image(image, expected, contrast)) if is_plain else (lambda result: None)
    return Case(read, "result" if format in COMMON and expected else None, names, check, is_command)


# ---------------------------------------------------------------- checkpoints


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
CODE = "from pathlib import Path\nPath({marker!r}).write_text('code was run')\n"
ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 10**20, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, "", "x"),
    *("cbsa", "float16", "bfloat16", "float64", "int8", "cuda", "\0", "é" * 500, [], [0], [-1], [1, 2], [[]], ["x"]),
    *({}, {"": ""}, {"0": "a"}, {"0": "a", "5": "b"}, {"height": 0, "width": 0}, {"x": {"y": []}}, [10**9] * 2),
)
ODD_KEYS = {
    "config.json": (
        *("model_type", "architectures", "dtype", "torch_dtype", "auto_map", "quantization_config", "id2label"),
        *("label2id", "num_labels", "attn_implementation", "_attn_implementation", "hidden_act", "layer_norm_eps"),
        *("transformers_version", "return_dict", "output_attentions", "problem_type", "backbone_config", "backbone"),
        *("use_pretrained_backbone", "num_channels", "image_size", "patch_size", "_name_or_path", "out_features"),
    ),
    "preprocessor_config.json": (
        *("image_processor_type", "size", "crop_size", "do_resize", "resample", "image_mean", "image_std", "auto_map"),
        *("rescale_factor", "do_rescale", "do_normalize", "do_convert_rgb", "feature_extractor_type", "size_divisor"),
        *("processor_class", "do_center_crop", "do_reduce_labels", "data_format", "input_data_format", "device"),
    ),
}


def build_models() -> dict[str, Callable]:
    """Small checkpoints in the scratch folder, and what reads photos with them; the training scripts are imported."""
    sys.path.insert(0, str(ROOT / "training"))
    for script in SCRIPTS:
        runpy.run_path(str(ROOT / "training" / script))
    torch.manual_seed(0)
    folder, names = SCRATCH / "models", {0: "sky", 1: "tree", 2: "road"}
    config = CBSAConfig(**SIZES, id2label=names, label2id={name: i for i, name in names.items()})
    classifier = CBSAForImageClassification(config)
    classifier.save_pretrained(folder / "classifier")
    classifier.base_model.save_pretrained(folder / "encoder")
    config.decoder_representatives_size = 2
    CBSAForSemanticSegmentation(config).save_pretrained(folder / "segmenter")
    for name in ("classifier", "encoder"):
        ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(folder / name)
    processor = SegformerImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True)
    processor.save_pretrained(folder / "segmenter")
    draw_picture(np.random.default_rng(0)).save(folder / "photo.png")
    zero_shot = ZeroShotSegmenter(*load_checkpoint(str(folder / "classifier")), long_side=64)
    sliding = SlidingWindowSegmenter(*load_checkpoint(str(folder / "segmenter"), "semantic-segmentation"))
    piped = pipeline("cbsa-zero-shot-segmentation", model=str(folder / "classifier"), device="cpu")
    return {"zero-shot": zero_shot, "sliding": sliding, "pipeline": piped}


def odd_value(random: Random, value: object) -> object:
    """Another one, near the one there is or not."""
    if isinstance(value, dict) and value and random.random() < 0.6:
        return change_json(random, value)
    if isinstance(value, list) and value and random.random() < 0.4:
        return pick(random, (value * 2, value[:-1], [odd_value(random, value[0]), *value[1:]]))
    if isinstance(value, (int, float)) and random.random() < 0.3:
        return pick(random, (-value, value + 1, value * 1000, str(value), [value], float(value)))
    return pick(random, ODD_VALUES)


def change_json(random: Random, content: dict, names: tuple[str, ...] = ()) -> dict:
    """With another value, without one, or with one more."""
    content, keys = dict(content), list(content)
    name, kind = pick(random, keys), random.random()
    if kind < 0.15:
        del content[name]
    elif kind < 0.6 or not names:
        content[name] = odd_value(random, content[name])
    else:
        name = pick(random, names)
        content[name] = odd_value(random, content.get(name))
    return content


def change_text(random: Random, path: Path):
    """Of a JSON file, its values or its bytes."""
    content, kind = json.loads(path.read_text()), random.random()
    if kind < 0.75:
        for _ in range(int(random.integers(1, 4))):
            content = change_json(random, content, ODD_KEYS.get(path.name, ())) or {"": ""}
        path.write_text(json.dumps(content))
        return
    data, depth = path.read_bytes(), int(random.integers(10, 200_000))
    whole = (b"", b"[]", b"null", b"3", b'"x"', b"{", b"[" * depth, b'{"a":' * depth, b"\xff\xfe{}", b"\xef\xbb\xbf{}")
    path.write_bytes(pick(random, (*whole, b'{"a": ' + b"9" * depth + b"}", *(damage(random, data),) * 6)))


def change_tensors(random: Random, path: Path) -> str | None:
    """Of a safetensors file; `sentence` where no checkpoint can have such weights."""
    tensors = load_file(path)
    name, kind = pick(random, sorted(tensors)), int(random.integers(8))
    if kind <= 1:
        tensors[name].view(-1)[0] = pick(random, (math.nan, math.inf, -math.inf))
    elif kind == 2:
        tensors = {key: tensor * math.nan for key, tensor in tensors.items()}
    elif kind == 3:
        tensors[name] = pick(random, (tensors[name][None], tensors[name].flatten()[:1], torch.zeros(0)))
    elif kind == 4:
        del tensors[name]
    elif kind == 5:
        tensors["unknown.weight"] = torch.zeros(3)
    elif kind == 6:
        tensors[name] = tensors[name].to(pick(random, (torch.int32, torch.bool, torch.float64, torch.float16)))
    else:
        tensors = {}
    save_file(tensors, path, {"format": "pt"})
    return "sentence" if kind in (0, 1, 2, 4, 7) else None


def change_weights(random: Random, path: Path) -> str | None:
    """Of a safetensors file, tensors, header or bytes; `sentence` where no checkpoint can have such weights."""
    data, kind = path.read_bytes(), random.random()
    if kind < 0.4:
        return change_tensors(random, path)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if kind < 0.6:
        name = pick(random, sorted(set(header) - {"__metadata__"}))
        header[name] = change_json(random, header[name], ("dtype", "shape", "data_offsets"))
        text = json.dumps(pick(random, (header, header, change_json(random, header), [], None))).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    elif kind < 0.7:
        length = pick(random, (0, 1, length - 1, length + 1, len(data), 10**8, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + data[8:])
    else:
        pickled = io.BytesIO()
        torch.save({"x": torch.zeros(2)}, pickled)
        page = b"<html>not found</html>"
        others = (
            b"",
            page,
            b"version https://git-lfs.github.com/spec/v1\n",
            pickled.getvalue(),
            data[:-1],
            data + b"x",
        )
        path.write_bytes(pick(random, (*others, *(damage(random, data),) * 6)))
    return None


class Hostile:
    """A pickle of it opens a file for writing when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def add_code(random: Random, folder: Path, marker: Path) -> str | None:
    """Files that run code if they are believed; `sentence` where nothing else could be read."""
    kind = int(random.integers(5))
    if kind <= 2:
        path = folder / pick(random, ("config.json", "preprocessor_config.json"))
        content = json.loads(path.read_text())
        classes = ("AutoConfig", "AutoImageProcessor", "AutoModelForImageClassification", "AutoModel", "AutoProcessor")
        content["auto_map"] = dict.fromkeys(classes, "custom.Custom")
        if random.random() < 0.5:
            content |= {"model_type": "custom"} if path.name == "config.json" else {"image_processor_type": "Custom"}
        path.write_text(json.dumps(content))
        (folder / "custom.py").write_text(CODE.format(marker=str(marker)))
        return None
    (folder / "model.safetensors").unlink()
    weights = {"x": Hostile(marker)} if kind == 3 else {"x": torch.zeros(2)}
    torch.save(weights, folder / "pytorch_model.bin")
    return "sentence"


def change_files(random: Random, folder: Path):
    """One of them is missing, no file, or in parts that are elsewhere."""
    path, kind = folder / pick(random, sorted(os.listdir(folder))), int(random.integers(6))
    content = path.read_bytes()
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        index = {"metadata": {}, "weight_map": {"x": pick(random, ("../x", "missing", "/dev/zero", "", 3))}}
        path.write_bytes(content)
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def use_checkpoint(random: Random, folder: Path, output: Path) -> tuple[Callable[[], object], bool]:
    """One of the ways to use a checkpoint, and whether it is a command."""
    photo, name = str(SCRATCH / "models" / "photo.png"), str(folder)
    options = ["--checkpoint", name, "-o", str(output / "out.png")]
    task = "semantic-segmentation" if folder.name == "segmenter" else None
    ways = [
        (lambda: ZeroShotSegmenter(*load_checkpoint(name))(photo).mask, False),
        (lambda: load_checkpoint(name, task), False),
        (lambda: cli.main(["segment", photo, *options]), True),
        (lambda: cli.main(["segment", photo, "--task=semantic", *options]), True),
        (lambda: cli.main(["attention", photo, *options]), True),
        (lambda: cli.main(["inspect", photo, "--checkpoint", name, "-o", str(output / "folder")]), True),
        (lambda: cli.main(["convert", name, "-o", str(output / "folder")]), True),
    ]
    if folder.name == "segmenter":
        ways.append((lambda: SlidingWindowSegmenter(*load_checkpoint(name, task))(photo), False))
    return pick(random, ways)


def make_checkpoint(random: Random, folders: Folders) -> Case:
    """A checkpoint, sound or not, and a way to use it."""
    name = pick(random, ("classifier", "classifier", "segmenter", "segmenter", "encoder"))
    folder = folders.inputs / name
    shutil.copytree(SCRATCH / "models" / name, folder)
    kind, expected = random.random(), None
    if kind < 0.45:
        change_text(random, folder / pick(random, ("config.json", "config.json", "preprocessor_config.json")))
    elif kind < 0.8:
        expected = change_weights(random, folder / "model.safetensors")
    elif kind < 0.9:
        expected = add_code(random, folder, folders.inputs / "marker")
    elif kind < 0.97:
        change_files(random, folder)
    use, is_command = use_checkpoint(random, folder, folders.output)
    return Case(use, expected, (name, "The weights"), is_command=is_command)


# ---------------------------------------------------------------- data sets


CLASSES = ["sky", "tree", "road"]
SCRIPTS = ("pretrain.py", "finetune.py", "score.py")
TRAINING = ["--num_epochs=1", "--num_workers=0", "--warmup_epochs=0", "--report_to=none"]


def encode_png(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def draw_mask(random: Random, size: tuple[int, int]) -> Image.Image:
    """Its three classes in stripes, some pixels without."""
    labels = np.arange(size[1]) * 3 // size[1]
    labels = np.broadcast_to(labels[:, None], (size[1], size[0])).astype(np.uint8)
    return Image.fromarray(np.where(random.random(labels.shape) < 0.02, 255, labels).astype(np.uint8))


def make_rows(random: Random, masks: bool, count: int) -> list[dict]:
    rows = []
    for index in range(count):
        picture = draw_picture(random, least=16, most=40)
        label = encode_png(draw_mask(random, picture.size)) if masks else index % len(CLASSES)
        rows.append({"image": encode_png(picture), "label": label})
    return rows


def break_image(random: Random) -> dict | None:
    """What stands in a row where no image can be read."""
    data, _ = encode(random, draw_picture(random), pick(random, COMMON))
    broken = (b"", b"x", data[: len(data) // 3], data[:20], random_bytes(random, 99), b"%!PS-Adobe-3.0 EPSF-3.0\n")
    links = ({"bytes": None, "path": "missing.png"}, {"bytes": None, "path": None}, {"bytes": b"", "path": None})
    return pick(random, (None, *links, *({"bytes": data, "path": None} for data in broken)))


def odd_image(random: Random) -> dict:
    """Of any mode, format and damage."""
    data, format = encode(random, draw_picture(random, pick(random, MODES)), pick(random, COMMON + OTHERS))
    data = pick(random, (data, add_metadata(random, data, format), damage(random, data)))
    return {"bytes": data, "path": pick(random, (None, "photo.png", "x/y"))}


def odd_mask(random: Random, row: dict) -> dict | None:
    """A mask that does not fit its image, or the classes."""
    with Image.open(io.BytesIO(row["label"]["bytes"])) as mask:
        labels = np.array(mask)
    values = [labels * 0, labels * 0 + 255, (labels > 0) * np.uint8(255), labels + 3, labels * 100, labels[:-1]]
    values += [labels.astype(np.uint16), labels.astype(np.uint16) * 300, labels == 1, np.stack([labels] * 3, -1)]
    values += [labels.astype(np.int32) - 1, labels.astype(np.float32), np.stack([labels] * 2, -1), labels.T]
    try:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pick(random, values))).save(file, pick(random, ("PNG", "TIFF")))
        return {"bytes": file.getvalue(), "path": None}
    except OSError:  # no PNG of floats
        return break_image(random)


def damage_rows(random: Random, rows: list[dict], masks: bool) -> str | None:
    """Some of them, in place; `sentence` where no run can succeed."""
    kind = random.random()
    share = pick(random, (1, 1, 2, len(rows)))
    chosen = [rows[int(index)] for index in random.choice(len(rows), min(share, len(rows)), replace=False)]
    for row in chosen:
        if kind < 0.25:
            row["image"] = break_image(random)
        elif kind < 0.45:
            row["image"] = odd_image(random)
        elif not masks:
            row["label"] = pick(random, (-1, 3, None, -100, 255, -(2**31), 2**40, len(CLASSES)))
        elif kind < 0.55:
            row["label"] = break_image(random)
        else:
            row["label"] = odd_mask(random, row)
    return "sentence" if (kind < 0.25 and len(chosen) == len(rows)) or (kind >= 0.45 and not masks) else None


def write_rows(random: Random, path: Path, rows: list[dict], masks: bool, odd_columns: bool):
    """A Parquet file of the features that `datasets` writes; or of others."""
    label = ImageFeature() if masks else ClassLabel(names=CLASSES)
    features, names = Features({"image": ImageFeature(), "label": label}), ["image", "label"]
    if odd_columns:
        others = (
            Value("int64"),
            Value("string"),
            Value("float32"),
            ClassLabel(names=["a"]),
            ClassLabel(names=CLASSES),
        )
        if random.random() < 0.5 and not masks:
            features["label"] = pick(random, (*others, datasets.List(Value("int64"))))
        else:
            features["image"] = pick(random, (Value("binary"), Value("string"), ImageFeature(mode="L")))
        names = pick(random, (names, ["x", "label"], ["image", "y"], ["label", "image"]))
    columns = {}
    for name, (key, feature) in zip(names, features.items(), strict=True):
        values = [row[key] for row in rows]
        values = [value["bytes"] if value else None for value in values] if feature == Value("binary") else values
        if feature == Value("string"):
            values = [str(value)[:9] for value in values]
        if isinstance(feature, datasets.List):
            values = [[value] for value in values]
        columns[name] = (feature, values)
    schema = Features({name: feature for name, (feature, _) in columns.items()}).arrow_schema
    if random.random() < 0.1:
        schema = schema.remove_metadata()
    table = pyarrow.table(
        [pyarrow.array(v, type=f.type) for (_, v), f in zip(columns.values(), schema, strict=True)], schema
    )
    pyarrow.parquet.write_table(table, path)


def write_dataset(random: Random, folder: Path, masks: bool) -> str | None:
    """Two splits, one of them damaged in some way; `sentence` where no run can succeed."""
    damaged, expected = pick(random, ("train", "validation")), None
    kind = random.random()
    for split, count in (("train", 6), ("validation", 3)):
        rows = make_rows(random, masks, count)
        path = folder / f"{split}-00000-of-00001.parquet"
        if split == damaged and kind < 0.7:
            expected = damage_rows(random, rows, masks)
        elif split == damaged and kind < 0.75:
            rows, expected = rows[: int(random.integers(2))], "sentence" if split == "train" else None
        elif split == damaged and kind < 0.78:
            expected = "sentence"
            continue
        write_rows(random, path, rows, masks, odd_columns=split == damaged and 0.78 <= kind < 0.88)
        if split == damaged and 0.88 <= kind < 0.93:
            path.write_bytes(damage(random, path.read_bytes()))
    names = folder / "id2label.json"
    if masks:
        names.write_text(json.dumps(dict(enumerate(CLASSES))))
        if 0.93 <= kind < 0.98:
            change_text(random, names)
    return "result" if kind >= 0.98 else expected


def run_script(name: str, *arguments: str) -> Callable[[], object]:
    """A training script as it is started, but in this process."""

    def run():
        sys.argv = [name, *arguments]
        runpy.run_path(str(ROOT / "training" / name), run_name="__main__")

    return run


def make_dataset(random: Random, folders: Folders) -> Case:
    """A data set, sound or not, and a script that trains or scores on it."""
    masks = random.random() < 0.5
    expected = write_dataset(random, folders.inputs, masks)
    models, output = SCRATCH / "models", str(folders.output / "run")
    common = [f"--dataset_name={folders.inputs}", f"--max_corrupt={pick(random, (0, 1, 3, 10, 1000))}"]
    training = [*common, f"--output_dir={output}", *TRAINING, f"--batch_size={pick(random, (1, 2, 3))}"]
    if random.random() < 0.2:
        training += ["--streaming=true", *pick(random, ([], ["--num_train_images=6"]))]
    if random.random() < 0.25:  # what it is of the validation split alone
        kind = "semantic-segmentation" if masks else "image-classification"
        checkpoint = models / ("segmenter" if masks else "classifier")
        if masks and random.random() < 0.4:
            kind, checkpoint, common = "zero-shot-segmentation", models / "classifier", [*common, "--image_size=32"]
        arguments = [
            *common,
            f"--task={kind}",
            f"--checkpoint={checkpoint}",
            f"--output={output}.json",
            "--batch_size=2",
        ]
        return Case(run_script("score.py", *arguments))
    if masks:
        options = [[], ["--class_balanced=true"], ["--dice=true"], ["--reduce_labels=true"], ["--image_size=24"]]
        arguments = ["--task=semantic-segmentation", f"--model_name_or_path={models / 'classifier'}", "--crop_size=32"]
        arguments += pick(random, options)
        expected = None if "--reduce_labels=true" in arguments else expected
        return Case(run_script("finetune.py", *training, *arguments), expected)
    if random.random() < 0.3:
        training += ["--mixup_alpha=0.2"]
        expected = "sentence" if "--streaming=true" in training else expected
    if random.random() < 0.3:
        arguments = ["--task=image-classification", f"--model_name_or_path={models / 'classifier'}"]
        return Case(run_script("finetune.py", *training, *arguments), expected)
    arguments = [f"--config_name={models / 'classifier'}", "--patch_embedding_type=patchify"]
    return Case(run_script("pretrain.py", *training, *arguments), expected)


# ---------------------------------------------------------------- command lines


ODD_WORDS = (
    "0",
    "-1",
    "1",
    "2",
    "7",
    "30000",
    "1000000000",
    "9" * 30,
    "0.5",
    "nan",
    "inf",
    "x",
    "",
    "None",
    "é\n",
    "-",
)
WRITERS = ("output_dir", "output", "strip", "teacher_cache")  # options that say where to write


def make_paths(random: Random, folders: Folders) -> dict[str, Path]:
    """Files to give to a command, by what they are; those of `outputs` are where it may write."""
    names = ("photo.png", "other.png", "text.txt", "empty", "folder", "missing", "classifier", "segmenter", "encoder")
    files = {name: folders.inputs / name for name in names}
    for name in ("classifier", "segmenter", "encoder"):
        shutil.copytree(SCRATCH / "models" / name, files[name])
    files["folder"].mkdir()
    files["text.txt"].write_text("no picture\n")
    files["empty"].touch()
    outputs = (
        "existing.png",
        "new.png",
        "NEW.PNG",
        "new.jpg",
        "new",
        "no/new.png",
        "full",
        "new_mask.png",
        "new/x.png",
    )
    files |= {name: folders.output / name for name in outputs}
    for path in (files["photo.png"], files["other.png"], files["folder"] / "inner.png", files["existing.png"]):
        draw_picture(random).save(path)
    files["full"].mkdir()
    (files["full"] / "file").touch()
    return files


def sound_line(random: Random, files: dict[str, Path]) -> list[str]:
    """A command line of `cbsa` that has a result, or, without a network, a sentence."""
    command = pick(random, ("segment", "segment", "segment", "attention", "inspect", "convert", "push"))
    if command == "push":
        return [command, "you/model", "--checkpoint", str(files["classifier"]), *pick(random, ([], ["--private"]))]
    output = files["new" if command in ("inspect", "convert") else "new.png"]
    if command == "convert":
        options = (["--origin", "vit"], ["--attention", "agent"], ["--num-heads", "2"], ["--license", "mit"], [])
        return [command, str(files["classifier"]), "-o", str(output), *pick(random, options)]
    checkpoint = pick(random, ("classifier", "encoder", "segmenter"))
    options = [["--long-side", "64"], []]
    if command == "inspect":
        options += [["--patch", "1", "2"]]
    if command == "segment":
        options += [["--segments", "3"], ["--method", "attention"], ["--sharp"], ["--mask", str(files["NEW.PNG"])]]
        if random.random() < 0.4:
            checkpoint, options = "segmenter", [["--task=semantic"], ["--task=semantic", "--long-side", "64"]]
    line = [command, str(files["photo.png"]), "-o", str(output), "--checkpoint", str(files[checkpoint])]
    return line + pick(random, options) + (pick(random, options) if random.random() < 0.3 else [])


def change_line(random: Random, line: list[str], files: dict[str, Path]) -> list[str]:
    """With another word, without one, or with some more."""
    kind, at = random.random(), int(random.integers(len(line)))
    if kind < 0.6:
        values = [str(path) for path in files.values()]
        at = pick(random, range(1, len(line))) if random.random() < 0.9 else at
        return [*line[:at], pick(random, (*values, *values, *ODD_WORDS)), *line[at + 1 :]]
    if kind < 0.7:
        return line[:at] + line[at + 1 :]
    flags = ["--sharp", "--force", "--force", "--private", "--unknown"]
    numbers = ["--long-side", "--segments", "--num-heads", "--patch"]
    others = {"--task": "semantic", "--method": "mass", "--mask": str(files["existing.png"]), "--origin": "cbt"}
    others |= {"--attention": "agent", "--verify": str(files["text.txt"]), "--checkpoint": str(files["missing"])}
    return line + pick(
        random,
        [
            *([flag] for flag in flags),
            *([number, pick(random, ODD_WORDS)] for number in numbers),
            *([name, pick(random, (value, *ODD_WORDS))] for name, value in others.items()),
            [str(files[pick(random, ("other.png", "missing", "folder"))])],
            ["-o", str(files["existing.png"])],
        ],
    )


def make_command(random: Random, folders: Folders) -> Case:
    """A command line of `cbsa`, or of a training script."""
    if random.random() < 0.25:
        return make_script_command(random, folders)
    files = make_paths(random, folders)
    line = sound_line(random, files)
    for _ in range(int(random.integers(3))):
        line = change_line(random, line, files)
    replaced = (files["existing.png"],) if "--force" in line else ()
    return Case(lambda: cli.main(line), is_command=True, replaced=replaced)


def make_script_command(random: Random, folders: Folders) -> Case:
    """A line for a training script, with some odd values."""
    import finetune
    import pretrain
    import score

    masks = random.random() < 0.3
    for split, count in (("train", 6), ("validation", 3)):
        rows = make_rows(random, masks, count)
        write_rows(random, folders.inputs / f"{split}-00000-of-00001.parquet", rows, masks, odd_columns=False)
    (folders.inputs / "id2label.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    models = SCRATCH / "models"
    common, run = [f"--dataset_name={folders.inputs}", "--batch_size=2"], f"--output_dir={folders.output / 'run'}"
    task = "semantic-segmentation" if masks else "image-classification"
    lines = {
        "pretrain.py": (pretrain.Arguments, [*common, run, *TRAINING, f"--config_name={models / 'classifier'}"]),
        "finetune.py": (
            finetune.TASKS[task][0],
            [*common, run, *TRAINING, f"--model_name_or_path={models / 'classifier'}", f"--task={task}"],
        ),
        "score.py": (
            score.Arguments,
            [*common, f"--checkpoint={models / ('segmenter' if masks else 'classifier')}", f"--task={task}"],
        ),
    }
    script = pick(random, list(lines))
    arguments, line = lines[script]
    names = [known.name for known in dataclasses.fields(arguments) if known.name not in WRITERS]
    values = (*ODD_WORDS, "true", "\0", "[1]", str(folders.inputs / "missing"))
    line += [f"--{pick(random, names)}={pick(random, values)}" for _ in range(int(random.integers(3)))]
    return Case(run_script(script, *line), is_command=True)


# ---------------------------------------------------------------- all of them


@dataclass
class Kind:
    """
    Args:
        make: draws a case and writes its files.
        per_process: how many cases a process tries, where they leave nothing behind in it.
    """

    make: Callable[[Random, Folders], Case]
    per_process: int = 1


KINDS = {
    "images": Kind(make_image, per_process=50),
    "checkpoints": Kind(make_checkpoint),
    "datasets": Kind(make_dataset),
    "commands": Kind(make_command),
}
TOOLS: dict[str, Callable] = {}


def print_table(found: dict[str, list[Outcome]]):
    """Counts of each verdict, and the largest of what is bounded."""
    columns = ("kind", "cases", *(f"{verdict}s" for verdict in RIGHT), *FAULTS, "most s", "most MB")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for kind, outcomes in found.items():
        counts = Counter(outcome.verdict for outcome in outcomes)
        numbers = [len(outcomes), *(counts[verdict] for verdict in RIGHT + FAULTS)]
        numbers += [f"{max(o.seconds for o in outcomes):.1f}", f"{max(o.megabytes for o in outcomes):.0f}"]
        print(f"| {kind} | " + " | ".join(map(str, numbers)) + " |")


def print_faults(kind: str, seed: int, outcomes: list[Outcome]):
    """Each sort once, with its cases and the end of what the first of them printed."""
    sorts: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.verdict not in RIGHT:
            sorts.setdefault((outcome.verdict, outcome.detail), []).append(outcome)
    for (verdict, detail), cases in sorted(sorts.items(), key=lambda item: -len(item[1])):
        indices = ", ".join(str(case.index) for case in cases[:5])
        print(f"\n{len(cases)} x {verdict}: {detail}\n    {kind} --seed {seed} --only {indices}")
        for line in cases[0].text.strip().splitlines()[-6:]:
            print(f"        {line[:200]}")


def main(argv: list[str] | None = None) -> int:
    """Try cases of the kinds wanted; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=list(KINDS), help="what to try")
    parser.add_argument("--count", type=int, default=100, help="cases of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    parser.add_argument("--only", type=int, help="try the case of that number alone, and print what it prints")
    parser.add_argument(
        "--seconds", type=float, default=20, help="that a case may compute, or stand still (%(default)s)"
    )
    parser.add_argument("--memory", type=float, default=2048, help="megabytes that a case may take (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    found = {}
    try:
        TOOLS.update(build_models())
        for name in args.kinds:
            indices = list(range(args.count)) if args.only is None else [args.only]
            found[name] = []
            for outcome in run_cases(KINDS[name], args.seed, indices, args):
                found[name].append(outcome)
                if len(found[name]) % 500 == 0:
                    print(f"{name}: {Counter(case.verdict for case in found[name])}", flush=True)
            print_faults(name, args.seed, found[name])
            if args.only is not None:
                print(found[name][0].text, found[name][0].verdict, found[name][0].detail)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    print()
    print_table(found)
    return int(any(outcome.verdict not in RIGHT for outcomes in found.values() for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
