"""What the README shows of the family is there, and runs."""

import re
from fnmatch import filter as matching

import pytest
import torch
from conftest import ROOT
from torch.nn.modules.module import register_module_forward_hook

from cbsa_hf import PRESETS, CBSAConfig, CBSAForImageClassification, preset_path
from cbsa_hf.attention_cbsa import ATTENTIONS


@pytest.fixture
def family() -> str:
    """The text of that section."""
    return (ROOT / "README.md").read_text(encoding="utf-8").split("\n## The family\n")[1].split("\n## ")[0]


@pytest.fixture
def rows(family) -> list[list[str]]:
    """The table's cells: attention type, operator, cost, preset, checkpoints."""
    _, *lines = (line for line in family.splitlines() if line.startswith("| `"))  # without the heading
    return [re.split(r" *\| *", line)[1:-1] for line in lines]


def test_every_member_has_a_line_that_runs(family, rows):
    ran = []

    def record(module, args, outputs):
        if isinstance(module, CBSAForImageClassification):
            ran.append(f"`{module.config.attention_type}`")
            assert outputs.logits.shape == (1, 2)
            assert outputs.logits.isfinite().all()

    torch.manual_seed(0)
    hook = register_module_forward_hook(record)
    try:
        for code in re.findall(r"```python\n(.*?)```", family, re.DOTALL):
            exec(code, {})
    finally:
        hook.remove()
    members = [row[0] for row in rows]
    assert ran == members
    assert set(members) == {f"`{name}`" for name in ATTENTIONS}


def test_presets_of_the_table(rows):
    listed = {}
    for attention, _, _, pattern, _ in rows:
        listed |= dict.fromkeys(matching(PRESETS, pattern.strip("`")), attention.strip("`"))
    actual = {name: CBSAConfig.from_pretrained(preset_path(name)).attention_type for name in PRESETS}
    assert listed == actual
