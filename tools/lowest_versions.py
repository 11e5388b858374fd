"""
Print the lowest allowed version of every requirement in pyproject.toml, extras included, as constraints for pip.

    python tools/lowest_versions.py >lowest.txt && pip install -c lowest.txt -e ".[test]"

Needs Python 3.11 and packaging. Fails for a requirement without a lower bound.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement


PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest_versions(project: dict) -> list[str]:
    """`name==version` for each requirement of the `[project]` table but the project itself, in alphabetical order."""
    extras = project["optional-dependencies"].values()
    requirements = map(Requirement, sum(extras, start=project["dependencies"]))
    lowest = set()
    for requirement in requirements:
        if requirement.name == project["name"]:
            continue
        versions = [bound.version for bound in requirement.specifier if bound.operator in (">=", "~=", "==")]
        if len(versions) != 1:
            raise SystemExit(f"pyproject.toml asks for `{requirement}`: give it one lower bound, such as `>=1.0`.")
        lowest.add(f"{requirement.name}=={versions[0]}")
    return sorted(lowest)


if __name__ == "__main__":
    print(*lowest_versions(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]), sep="\n")
