"""The stress tools: a short run of each, and planted faults that they have to find."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tools read /proc")

PLANTED = """
import signal, sys, time
from pathlib import Path
import fuzz
from fuzzing.cases import Case, Kind

def sentence(text):
    raise ValueError(text)

def program():
    import subprocess
    subprocess.run(["true"])

ENDS = {
    "traceback": lambda folders: Case(lambda: {}["x"]),
    "hang": lambda folders: Case(lambda: time.sleep(60)),
    "crash": lambda folders: Case(lambda: signal.raise_signal(signal.SIGSEGV)),
    "memory": lambda folders: Case(lambda: bytes(10**6) * 400),
    "outside": lambda folders: Case(lambda: (folders.inputs / "new").touch()),
    "program": lambda folders: Case(program),
    "question": lambda folders: Case(lambda: input()),
    "partial": lambda folders: Case(lambda: (folders.output / ".new.partial").touch()),
    "nameless": lambda folders: Case(lambda: sentence("The buffer is not large enough."), names=("photo.png",)),
    "wrong": lambda folders: Case(lambda: 3, "sentence"),
    "refused": lambda folders: Case(lambda: sentence("The file photo.png is damaged."), "result"),
    "noise": lambda folders: Case(lambda: print("UserWarning: beware")),
    "status": lambda folders: Case(lambda: 139, is_command=True),
    "result": lambda folders: Case(lambda: (folders.output / "new").touch()),
    "sentence": lambda folders: Case(lambda: sentence("The file photo.png is damaged."), names=("photo.png",)),
}
for name, make in ENDS.items():
    fuzz.KINDS[name] = Kind(lambda random, folders, make=make: make(folders))
fuzz.build_models = fuzz.import_scripts = dict
status = fuzz.main([*ENDS, "--count=1", "--seconds=1", "--memory=200"])
assert status == 1
"""


def run(*command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


def read_table(printed: str) -> dict[str, dict[str, str]]:
    """The cells of a printed table, by the first cell of the row and the name of the column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    names, _, *rows = lines
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


def test_planted_faults_are_found():
    """Each case is counted only as what it is: a fault, a result, or a sentence."""
    done = run("-c", PLANTED)
    assert done.returncode == 0, done.stderr
    table = read_table(done.stdout)
    verdicts = {"result": "results", "sentence": "sentences", "program": "outside", "question": "outside"}
    verdicts |= {"partial": "outside", "status": "traceback"}
    for kind, row in table.items():
        counted = {name for name, cell in row.items() if cell == "1" and name not in ("cases", "most MB")}
        assert counted == {verdicts.get(kind, kind)}, kind
    assert len(table) == 15


def test_fuzzer_finds_no_fault():
    """A few cases of each kind, always the same."""
    kinds = ["images", "checkpoints", "masks", "datasets", "commands"]
    done = run(str(ROOT / "tools" / "fuzz.py"), *kinds, "--count=12")
    assert done.returncode == 0, done.stdout + done.stderr
    table = read_table(done.stdout)
    assert list(table) == kinds
    for row in table.values():
        assert int(row["results"]) + int(row["sentences"]) == int(row["cases"]) == 12
        assert int(row["results"])
        assert int(row["sentences"])


def test_killed_trainings_show_no_fault():
    done = run(
        str(ROOT / "tools" / "kill_training.py"), "--kills=2", "--variants", "average", "--moments", "write", "results"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kills = re.search(r"(\d+) runs, (\d+) kills; 0 faults", done.stdout)
    assert int(kills[2]) >= 2
