"""Try cases in separate processes, with bounds on time and memory."""

import argparse
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
from processes import Stopwatch, memory

from . import SCRATCH
from .cases import RIGHT, Case, Folders, Kind, Outcome, Random, judge
from .guard import Guard, find_changes, hash_files


def try_case(make: Callable[[Random, Folders], Case], seed: int, index: int, guard: Guard) -> Outcome:
    """Make the case with that number, run it in this process, and judge how it ends."""
    folders = Folders.make(SCRATCH / f"case-{index}")
    tempfile.tempdir = str(folders.temporary)
    datasets.config.HF_DATASETS_CACHE = folders.temporary / "datasets"
    os.chdir(folders.inputs)
    with warnings.catch_warnings():  # warnings about the broken files that are made
        warnings.simplefilter("ignore")
        case = make(np.random.default_rng((seed, index)), folders)
    os.chdir(folders.output)  # where a relative output may be
    before = hash_files(folders.inputs, folders.output)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the memory
    had, started = memory("VmRSS"), time.process_time()
    with redirected(folders.temporary):
        guard.watch(folders.output, folders.temporary)
        try:
            ending = case.run()
        except BaseException as error:  # `judge` decides which of them are faults
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
    """Answer yes to all questions on standard input, and write all that is printed, by any library, to a file."""
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


def work(kind: Kind, seed: int, indices: list[int], pipe: int):
    """The work of a forked process: try cases. Writes to the pipe when each case starts, and its outcome."""
    os.setsid()
    guard = Guard()
    with open(pipe, "w") as answers:
        for index in indices:
            print(index, file=answers, flush=True)
            try:
                outcome = try_case(kind.make, seed, index, guard)
            except BaseException:  # a fault of this tool
                outcome = Outcome(index, "tool", "the case cannot be made or judged", traceback.format_exc())
            print(json.dumps(asdict(outcome)), file=answers, flush=True)
    os._exit(0)


class Worker:
    """A forked process that tries cases one after another, each within the bounds."""

    def __init__(self, kind: Kind, seed: int, indices: list[int], bounds: argparse.Namespace):
        self.bounds, self.buffer = bounds, b""
        self.pipe, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            work(kind, seed, indices, writing)
        os.close(writing)

    def read_line(self) -> tuple[str | None, str]:
        """The next line that the process writes; or None, with the kind of fault."""
        had, watch = memory("VmRSS", self.pid), Stopwatch(lambda: [self.pid])
        while b"\n" not in self.buffer:
            if select.select([self.pipe], [], [], 0.05)[0]:
                if not (read := os.read(self.pipe, 1 << 16)):
                    return None, "crash"
                self.buffer += read
                continue
            if watch.seconds() > self.bounds.seconds:
                return None, "hang"
            if memory("VmRSS", self.pid) - had > self.bounds.memory:
                return None, "memory"
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode(), ""

    def end(self) -> str:
        """Kill the process if it still runs. Returns how it ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self.pipe)
        status = os.waitpid(self.pid, 0)[1]
        return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"

    def outcomes(self, indices: list[int]) -> Iterator[Outcome]:
        """Yield the outcomes of these cases in order, up to the case that ends the process."""
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


def run_cases(kind: Kind, seed: int, indices: list[int], bounds: argparse.Namespace) -> Iterator[Outcome]:
    """Yield the outcome of each case. If a case ends its process, another process tries the next cases."""
    while indices:
        group = indices[: kind.per_process]
        for outcome in Worker(kind, seed, group, bounds).outcomes(group):
            yield outcome
            indices = indices[1:]
        shutil.rmtree(SCRATCH / f"case-{outcome.index}", ignore_errors=True)
