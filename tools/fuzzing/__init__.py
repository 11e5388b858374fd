"""
What `tools/fuzz.py` is made of: what a case is (`cases`), how it is tried within bounds (`workers`, `guard`), and the
cases of each kind (`images`, `checkpoints`, `data_sets`, `commands`).

Importing this package comes before any import of the libraries: it sets the variables that they read.
"""

import os
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
"""Every file of a run lies here."""

# Nothing is fetched, nothing lies in the user's own folder, and one thread is all that a forked process can count on.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.environ["MPLCONFIGDIR"] = str(SCRATCH / "home")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"
