"""The GitHub workflow calls the commands of `.ci/run`, and pins its actions."""

import os
import re
import subprocess
import tomllib

import pytest
import yaml
from conftest import ROOT


WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def commands(text: str) -> set[tuple[str, ...]]:
    """The scripts in `.ci` that are called, each with the versions that it gets as argument."""
    return set(re.findall(r"^(\.ci/\w+) ?(\w*)", text, re.MULTILINE))


def fill_in(command: str, versions: str) -> str:
    return command.replace("${{ matrix.versions }}", versions)


def test_workflow_calls_the_commands_of_ci_run():
    """It calls all commands of `.ci/run`, and tests the newest versions, too."""
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    versions = [*matrix["versions"], *(job["versions"] for job in matrix["include"])]
    called = "\n".join(fill_in(step["run"], each) for step in STEPS if "run" in step for each in versions)
    newest = {(".ci/install", "newest"), (".ci/test", "newest")}
    assert commands(called) == commands((ROOT / ".ci" / "run").read_text()) | newest
    for script, _ in commands(called):
        assert os.access(ROOT / script, os.X_OK)
    assert all(set(step) <= {"uses", "with", "run"} for step in STEPS)


def test_workflow_covers_systems_and_pythons():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert project["requires-python"] == f">={matrix['python'][0]}"
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert all(job["os"] in matrix["os"] and job["python"] in matrix["python"] for job in matrix["include"])
    installs = [step["run"].split()[-1] for step in STEPS if "install" in step.get("run", "")]
    assert len(installs) == 2
    assert {extra for extras in installs for extra in extras.split(",")} <= set(project["optional-dependencies"])


def test_actions_are_pinned():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert len(used) == 4
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name) for name in used)


@pytest.mark.skipif(os.name == "nt", reason="bash may be another program there")
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / ".ci").iterdir()))
def test_scripts_are_valid_bash(script):
    process = subprocess.run(["bash", "-n", str(ROOT / ".ci" / script)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
