"""
The parts of `tools/fuzz.py`: what a case is (`cases`), how it is tried within bounds (`workers`, `guard`), and the
cases of each kind (`images`, `checkpoints`, `data_sets`, `commands`).

Import this package before torch, Transformers and datasets: it sets environment variables that they read.
"""

import os
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
"""The folder of all files of a run."""

# No downloads, no files in the home folder of the user, and one thread: a forked process cannot use the threads of its
# parent.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.environ["MPLCONFIGDIR"] = str(SCRATCH / "home")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"
