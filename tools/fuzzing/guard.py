"""Find what a case does that it should not do: writes outside its output folder, programs, connections."""

import hashlib
import os
import sys
from pathlib import Path

from . import SCRATCH
from .cases import Case, Folders


class Guard:
    """Records what the process does and should not do, from Python's audit events."""

    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    CHANGES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "shutil.rmtree": 1}
    PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn")

    def __init__(self):
        self.allowed: tuple[str, ...] | None = None  # None: record nothing
        self.seen: list[str] = []
        sys.addaudithook(self.on_event)

    def watch(self, *folders: Path):
        """Record writes outside these folders, started programs, questions and connections from now on."""
        self.allowed, self.seen = tuple(f"{folder}{os.sep}" for folder in (*folders, SCRATCH / "home")), []

    def stop(self):
        """Stop recording."""
        self.allowed = None

    def on_event(self, event: str, args: tuple):
        """The audit hook: called by Python with every event."""
        if self.allowed is None:
            return
        if event == "open":
            path, mode, flags = args
            if flags & self.WRITING or (isinstance(mode, str) and set(mode) & set("wax+")):
                self.note_write("opens for writing", path)
        elif event in self.CHANGES and args[-1] in (-1, None):  # else the path is relative to an open folder
            for path in args[: self.CHANGES[event]]:
                self.note_write(event, path)
        elif event in self.PROGRAMS:
            self.seen.append(f"runs a program: {args[0]!s:.80}")
        elif event == "builtins.input":
            self.seen.append("asks on standard input")
        elif event == "socket.connect" and isinstance(args[1], tuple):
            self.seen.append(f"connects to {args[1]!s:.80}")

    def note_write(self, event: str, path: object):
        """Record a path if it is outside the allowed folders."""
        if isinstance(path, (str, bytes, os.PathLike)):
            absolute = os.path.abspath(os.fsdecode(path))
            if not f"{absolute}{os.sep}".startswith(self.allowed) and not absolute.startswith("/dev/"):
                self.seen.append(f"{event} {absolute}")


def hash_files(*folders: Path) -> dict[Path, str]:
    """The SHA-1 of every regular file in the folders."""
    files = [path for folder in folders for path in folder.rglob("*") if not path.is_symlink() and path.is_file()]
    return {path: hashlib.sha1(path.read_bytes()).hexdigest() for path in files}


def find_changes(case: Case, before: dict[Path, str], folders: Folders) -> list[str]:
    """Faults in the files of a case: input removed or changed, and files left behind."""
    after = hash_files(folders.inputs, folders.output)
    changes = [f"removes or changes {path.name}" for path in before if after.get(path) != before[path]]
    replaced = {f"removes or changes {path.name}" for path in case.replaced}
    new = [path for path in after if path not in before]
    stray = [path for path in new if not path.is_relative_to(folders.output) or ".partial" in str(path)]
    return [change for change in changes if change not in replaced] + [f"leaves {path.name} behind" for path in stray]
