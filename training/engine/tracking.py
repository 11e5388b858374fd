"""The log of a run, written by one of Accelerate's trackers, and a line for each epoch in two plain files."""

import csv
import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from training.engine.output import write_file


class RunLog:
    """
    Numbers and pictures of a run, for TensorBoard or another tracker; and `log.jsonl` and `log.csv`, with one row for
    each epoch.

    Args:
        accelerator: has the tracker.
        output_dir: folder of the run.

    Attributes:
        error: why the log cannot be written, if it cannot. The run then goes on to where it can save a checkpoint.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path):
        self.accelerator, self.output_dir, self.rows = accelerator, output_dir, []
        self.folder = output_dir / Path(sys.argv[0]).stem
        self.error: ValueError | None = None

    def attempt(self, write: Callable, *arguments, **options):
        """Write to the log; if the disk takes no more, set `error` and remove the empty files that are left."""
        try:
            write(*arguments, **options)
        except OSError as error:
            for path in self.folder.rglob("*"):
                if path.is_file() and path.stat().st_size == 0:
                    with suppress(OSError):
                        path.unlink()
            self.error = ValueError(
                f"The log in {self.folder} cannot be written ({error.strerror}); make room, or use `--report_to none`."
            )
            self.error.__cause__ = error

    def start(self, settings: dict, step: int = 0):
        """
        Start the tracker, and log the settings of the run. Of the rows of an earlier session, those up to `step` stay.

        Raises:
            ValueError: if they cannot be written, or the rows cannot be read.
        """
        log = self.output_dir / "log.jsonl"
        if step and log.is_file():
            try:
                rows = [json.loads(line) for line in log.read_text().splitlines()]
                self.rows = [row for row in rows if row["step"] <= step]
            except (OSError, TypeError, ValueError, LookupError, RecursionError) as error:
                raise ValueError(f"{log} is not the log of a run: move it away.") from error
        values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
        self.attempt(self.accelerator.init_trackers, self.folder.name, config=values)
        if self.error is not None:
            raise self.error

    def write(self, values: dict[str, float], step: int):
        """Log numbers by name."""
        self.attempt(self.accelerator.log, values, step=step)

    def write_epoch(self, row: dict[str, float]):
        """Add a row of numbers by name, among them `step`, unless the last one is of that step already."""
        if not self.accelerator.is_main_process or (self.rows and self.rows[-1]["step"] == row["step"]):
            return
        self.rows.append(row)
        self.attempt(write_file, self.output_dir / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        table = io.StringIO()
        writer = csv.DictWriter(table, dict.fromkeys(name for row in self.rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        self.attempt(write_file, self.output_dir / "log.csv", table.getvalue())

    def draw(self, pictures: dict[str, np.ndarray], step: int):
        """Log pictures by name, each (1, height, width, 3), uint8."""
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            self.attempt(tracker.log_images, pictures, step=step, **layout)

    def close(self):
        """End the tracker."""
        self.attempt(self.accelerator.end_training)
