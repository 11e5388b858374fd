"""What Linux knows about processes: memory, processor time, and which belong to the same session."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path


GLANCE = 0.1  # seconds of sleep counted at most from one look to the next: in a longer gap the looking process waited


def memory(name: str, pid: int | str = "self") -> float:
    """`VmRSS` or its peak, `VmHWM`, in megabytes; 0 if the process has ended."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def read_stat(path: Path) -> list[str]:
    """The fields of a `stat` file, from the state on; an empty list if the process has ended."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def processor_time(pid: int) -> float:
    """Processor time of a process in seconds; 0 if it has ended."""
    fields = read_stat(Path(f"/proc/{pid}/stat"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def is_asleep(pid: int) -> bool:
    """Whether all threads sleep: none computes, waits for the processor, or waits for a disk."""
    states = [read_stat(path)[:1] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return not any(state in (["R"], ["D"]) for state in states)


def find_session(session: int) -> list[int]:
    """The ids of the processes of a session, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = read_stat(path)
        if fields and int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def find_argument(text: str) -> list[int]:
    """The ids of the processes whose command line contains the text."""
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
    Measures how long processes compute, and how long all of them sleep. Time in which they wait for the processor of a
    busy machine does not count.

    Args:
        members: returns the ids of the processes that exist now.
    """

    def __init__(self, members: Callable[[], list[int]]):
        self.members, self.slept, self.looked = members, 0.0, time.monotonic()
        self.computed = {pid: processor_time(pid) for pid in members()}

    def seconds(self) -> float:
        """The largest processor time of a process so far, plus the common sleep. Only these calls notice sleep."""
        pids, now = self.members(), time.monotonic()
        if all(map(is_asleep, pids)):
            self.slept += min(now - self.looked, GLANCE)
        self.looked = now
        return self.slept + max((processor_time(pid) - self.computed.get(pid, 0) for pid in pids), default=0)
