"""
Run Transformers' own common model tests on the CBSA models and, for comparison, on its ViT.

    python tools/run_transformers_tests.py [FOLDER] [pytest options, such as -k CBSA]

The tests are not part of this repository: they come from the source distribution of the installed Transformers. It is
downloaded into FOLDER, or into a temporary folder, unless it is there. Needs pytest and parameterized.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


TOOLS = Path(__file__).resolve().parent

# Files that the common tests import, but that the source distribution does not contain.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        '    "return_dict": False, "output_hidden_states": True, "dtype": "float16", "chunk_size_feed_forward": 5,\n'
        '    "architectures": ["BertModel"], "id2label": {0: "label"}, "label2id": {"label": "0"},\n'
        '    "problem_type": "regression",\n'
        "}\n"
    ),
    "models/cbsa/test_modeling_cbsa.py": (TOOLS / "modeling_tests_cbsa.py").read_text(encoding="utf-8"),
}


def fetch(folder: Path) -> Path:
    """Download the source of the installed Transformers into a folder, unless it is there. Returns its root."""
    name = f"transformers-{transformers.__version__}"
    if not (folder / name).is_dir():
        requirement = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--no-binary", "transformers", "--no-deps", requirement]
        subprocess.run([*command, "--dest", str(folder)], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name


def run(folder: Path, options: list[str]) -> int:
    """Run the tests in a folder with Transformers' source. Returns pytest's exit status."""
    source = fetch(folder)
    # So that the tests import the installed library, not the copy beside them.
    shutil.rmtree(source / "src", ignore_errors=True)
    for name, text in STUBS.items():
        path = source / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for package in path.relative_to(source).parents[:-1]:
            (source / package / "__init__.py").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "tests/models/cbsa", *options]
    return subprocess.run(command, cwd=source).returncode


if __name__ == "__main__":
    folder, options = (sys.argv[1], sys.argv[2:]) if sys.argv[1:] and sys.argv[1][0] != "-" else (None, sys.argv[1:])
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        sys.exit(run(Path(folder), options))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(Path(folder), options))
