"""What a case is, and how its end is judged."""

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
        run: the function that is tried. It returns a result (a command returns its exit status), or raises ValueError
            or SystemExit with a sentence.
        expected: `result` or `sentence`; None if both are right.
        names: a sentence has to contain one of these.
        check: takes a result, and returns what is wrong with it, or None.
        is_command: whether `run` is a command, which returns an exit status and prints its sentence.
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
        index: number of the case.
        verdict: `result`, `sentence`, or the kind of fault.
        detail: the sentence, or what distinguishes a fault from other faults of its kind.
        text: all printed text, with the traceback.
        seconds: processor time.
        megabytes: peak of the memory, without what the process used before.
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
    """The folders of one case: its input, its output, and the temporary files of libraries."""

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
        per_process: number of cases that one process tries; more than 1 only if a case cannot change the next one.
    """

    make: Callable[[Random, Folders], Case]
    per_process: int = 1


def is_sentence(text: str, names: tuple[str, ...]) -> bool:
    """Whether a message is one line of at least 20 characters that contains one of the names."""
    return len(text.splitlines()) == 1 and len(text) >= 20 and any(name in text for name in names or ("",))


def is_own(file: str) -> bool:
    """Whether a file belongs to this project, the tools excepted."""
    return file.startswith(f"{ROOT}{os.sep}") and not file.startswith(f"{ROOT / 'tools'}{os.sep}")


def place(error: BaseException) -> str:
    """Where an error was raised: the innermost function of this project, and the innermost function of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own(frame.filename)]
    found = dict.fromkeys(f"{Path(f.filename).name}:{f.name}" for f in (own or frames)[-1:] + frames[-1:])
    return " > ".join(found)


def generalise(text: str) -> str:
    """A text without what differs from case to case, such as folders and numbers; at most 100 characters."""
    text = re.sub(r"\S*/(?:inputs|output|temporary)\b", "", text)
    return re.sub(r"\d+", "#", re.sub(r"b'[^']*'|\(long\)+|0x\w+", "...", text))[:100]


def judge(case: Case, ending: object, printed: str, changes: list[str]) -> tuple[str, str]:
    """Verdict and detail of a case that ended by itself: `ending` is what `run` returned or raised."""
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
            return "wrong", "a result where a sentence is expected"
        if (wrong := case.check(ending)) is not None:
            return "wrong", wrong
        if "Warning: " in printed:
            return "noise", generalise(re.findall(r"\w*Warning: .*", printed)[0])
        return "result", ""
    if not is_sentence(sentence, case.names):
        raised = f"{place(ending)}: " if isinstance(ending, ValueError) and ending.__traceback__ else ""
        return "nameless", f"{raised}{generalise(sentence)!r}"
    return ("refused", generalise(sentence)) if case.expected == "result" else ("sentence", sentence)
