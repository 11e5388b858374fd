"""What a case is, and what it means how it ends."""

import os
import re
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from . import ROOT


Random = np.random.Generator


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
        """Create the folders of a case."""
        folders = cls(parent / "inputs", parent / "output", parent / "temporary")
        for folder in asdict(folders).values():
            folder.mkdir(parents=True)
        return folders


@dataclass
class Kind:
    """
    Args:
        make: draws a case and writes its files.
        per_process: how many cases a process tries, where they leave nothing behind in it.
    """

    make: Callable[[Random, Folders], Case]
    per_process: int = 1


def is_sentence(text: str, names: tuple[str, ...]) -> bool:
    """Whether a message is one line, not too short, that names one of the files."""
    return len(text.splitlines()) == 1 and len(text) >= 20 and any(name in text for name in names or ("",))


def is_own(file: str) -> bool:
    """Whether it is one of this project, but for the tools."""
    return file.startswith(f"{ROOT}{os.sep}") and not file.startswith(f"{ROOT / 'tools'}{os.sep}")


def place(error: BaseException) -> str:
    """Where it was raised: the innermost line of this project, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own(frame.filename)]
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
