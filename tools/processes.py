"""What Linux knows of processes: their memory, the time that they take, and which belong together."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path


GLANCE = 0.1  # seconds that pass at most from one look at a process to the next; longer, and this one was kept waiting


def memory(name: str, pid: int | str = "self") -> float:
    """`VmRSS` or its peak, `VmHWM`, in megabytes; 0 of a process that has ended."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def read_stat(path: Path) -> list[str]:
    """The fields of a `stat` file from the state on; none of a process that has ended."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def processor_time(pid: int) -> float:
    """Seconds that the process has computed for; 0 of one that has ended."""
    fields = read_stat(Path(f"/proc/{pid}/stat"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def is_asleep(pid: int) -> bool:
    """Whether no thread of it computes, or waits for a turn on the processor or for a disk."""
    states = [read_stat(path)[:1] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return not any(state in (["R"], ["D"]) for state in states)


def find_session(session: int) -> list[int]:
    """The processes of that session that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = read_stat(path)
        if fields and int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def find_argument(text: str) -> list[int]:
    """The processes with that text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


class Stopwatch:
    """
    The time that processes compute, and that all of them sleep. What they wait for a turn on a busy machine does not
    count: how long that is, says nothing of them.

    Args:
        members: the processes there are at the moment.
    """

    def __init__(self, members: Callable[[], list[int]]):
        self.members, self.slept, self.looked = members, 0.0, time.monotonic()
        self.computed = {pid: processor_time(pid) for pid in members()}

    def seconds(self) -> float:
        """So far: the most that one of them has computed, and the sleep, which is only noticed at these calls."""
        pids, now = self.members(), time.monotonic()
        if all(map(is_asleep, pids)):
            self.slept += min(now - self.looked, GLANCE)
        self.looked = now
        return self.slept + max((processor_time(pid) - self.computed.get(pid, 0) for pid in pids), default=0)
