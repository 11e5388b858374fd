"""README and documentation are right: Python blocks run; options, files, names and dates are those of the code."""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from fnmatch import filter as matching
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from torch.nn.modules.module import register_module_forward_hook

import cbsa_hf
from cbsa_hf import PRESETS, CBSAConfig, CBSAForImageClassification, cli, preset_path
from cbsa_hf.attention_cbsa import ATTENTIONS


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Other programs, whose options are not checked.
PROGRAMS = {".", "git", "hf", "mkdir", "pip", "pre-commit", "pytest", "python3.11", "ruff", "sphinx-build"}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in that language."""
    found = re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert all(name for name, _ in found), f"{page.name} has a code block without a language; write bash or python."
    return [code for name, code in found if name == language]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), namespace)


def commands(page: Path) -> list[str]:
    """The commands in shell blocks, and in inline code that starts one of this project's programs."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    lines += [code for code in inline if re.match(r"(python|accelerate|cbsa|pip|\w+=\w+ accelerate) ", code)]
    found = []
    for line in lines:
        found += [part.strip() for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [command for command in found if command]


@cache
def options_of(script: str, *arguments: str) -> set[str]:
    """The options that `--help` of a script or of a `cbsa` command lists."""
    path = ROOT / script
    text = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argparse.ArgumentParser.print_help", lambda self, file=None: text.append(self.format_help()))
        patch.setattr(sys, "argv", [script, *arguments, "--help"])
        patch.syspath_prepend(str(path.parent))
        with pytest.raises(SystemExit) as ending:
            if script == "cbsa":
                cli.main([*arguments, "--help"])
            else:
                runpy.run_path(str(path), run_name="__main__")
    assert not ending.value.code, ending.value.code
    listed = " ".join(re.findall(r"^  (-.*)", text[0], re.MULTILINE))
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", listed))


@cache
def launch_options() -> set[str]:
    """The options of `accelerate launch`."""
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", launch_command_parser().format_help()))


def check_options(given: list[str], known: Callable[[], set[str]], command: str):
    for option in [word.split("=")[0] for word in given if re.match(r"--?[a-z]", word)]:
        assert option in known(), f"{command}: there is no {option}"


def check_command(command: str):
    words = shlex.split(command)
    while re.match(r"\w+=", words[0]):  # environment variables
        words.pop(0)
    if "..." in words:
        words = words[: words.index("...")]
    program, *words = words
    if program == "cbsa":
        return check_options(words, lambda: options_of("cbsa", words[0]), command)
    if program in ("python", "accelerate"):
        script = next((word for word in words if word.endswith(".py")), None)
        before = words if script is None else words[: words.index(script)]
        if program == "accelerate":
            check_options(before[1:], launch_options, command)
        if script is None:
            return None
        assert (ROOT / script).is_file(), f"{command}: there is no {script}"
        after = words[words.index(script) + 1 :]
        for word, value in pairwise(after):
            if word == "--config":
                assert (ROOT / value).is_file(), f"{command}: there is no {value}"
        task = [] if "--task" not in after else after[after.index("--task") :][:2]
        if script == "training/finetune.py" and not task:  # the recipe names the task
            recipe = yaml.safe_load((ROOT / after[after.index("--config") + 1]).read_text())
            task = ["--task", recipe["task"]]
        return check_options(after, lambda: options_of(script, *task), command)
    assert program in PROGRAMS, f"{command}: {program} is not a known program"
    return None


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.stem)
def test_options_of_commands_exist(page, training, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest"])  # accelerate shows options that depend on these
    for command in commands(page):
        check_command(command)


def test_wrong_option_is_found(training):
    with pytest.raises(AssertionError, match="there is no --no_such"):
        check_command("accelerate launch training/pretrain.py --no_such 3")
    with pytest.raises(AssertionError, match="there is no --dynamo"):
        check_command("accelerate launch --dynamo inductor training/pretrain.py")
    with pytest.raises(AssertionError, match="there is no --methods"):
        check_command("cbsa segment PHOTO --methods ncut")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_linked_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert 'pip install -c constraints.txt -e ".[demo]" && python demo/app.py' in text
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in text


def test_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. (?:auto\w+|py:data):: (\w+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(cbsa_hf.__all__)


def test_version_and_date_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released = re.findall(r"^## (\d\S*) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == (cbsa_hf.__version__, str(citation["date-released"]))
    assert citation["version"] == cbsa_hf.__version__


def test_hooks_download_nothing():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}
    assert all(hook["language"] == "system" for repository in hooks["repos"] for hook in repository["hooks"])


def test_notebook_is_stored_without_outputs():
    """The site executes notebooks when it is built. Stored outputs could be of another version."""
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.fixture
def family() -> str:
    """The text of the section "The family"."""
    page = ROOT / "docs" / "how-cbsa-works.md"
    return page.read_text(encoding="utf-8").split("\n## The family\n")[1].split("\n## ")[0]


@pytest.fixture
def rows(family) -> list[list[str]]:
    """The cells of the table: attention type, operator, cost, preset, checkpoints."""
    _, *lines = (line for line in family.splitlines() if line.startswith("| `"))  # without the heading
    return [re.split(r" *\| *", line)[1:-1] for line in lines]


def test_example_runs_every_attention_type(family, rows):
    ran = []

    def record(module, args, outputs):
        if isinstance(module, CBSAForImageClassification):
            ran.append(f"`{module.config.attention_type}`")
            assert outputs.logits.shape == (1, 2)
            assert outputs.logits.isfinite().all()

    torch.manual_seed(0)
    hook = register_module_forward_hook(record)
    try:
        exec(re.search(r"```python\n(.*?)```", family, re.DOTALL)[1], {})
    finally:
        hook.remove()
    members = [row[0] for row in rows]
    assert ran == members
    assert set(members) == {f"`{name}`" for name in ATTENTIONS}


def test_table_lists_every_preset(rows):
    listed = {}
    for attention, _, _, pattern, _ in rows:
        listed |= dict.fromkeys(matching(PRESETS, pattern.strip("`")), attention.strip("`"))
    actual = {name: CBSAConfig.from_pretrained(preset_path(name)).attention_type for name in PRESETS}
    assert listed == actual
