"""The log of a run, written by one of Accelerate's trackers."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from accelerate import Accelerator


class RunLog:
    """
    Numbers and pictures of a run, for TensorBoard or another tracker.

    Args:
        accelerator: has the tracker.
        output_dir: folder of the run.

    Attributes:
        error: why the log cannot be written, if it cannot. The run then goes on to where it can save a checkpoint.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path):
        self.accelerator = accelerator
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

    def start(self, settings: dict):
        """
        Start the tracker, and log the settings of the run.

        Raises:
            ValueError: if they cannot be written.
        """
        values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
        self.attempt(self.accelerator.init_trackers, self.folder.name, config=values)
        if self.error is not None:
            raise self.error

    def write(self, values: dict[str, float], step: int):
        """Log numbers by name."""
        self.attempt(self.accelerator.log, values, step=step)

    def draw(self, pictures: dict[str, np.ndarray], step: int):
        """Log pictures by name, each (1, height, width, 3), uint8."""
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            self.attempt(tracker.log_images, pictures, step=step, **layout)

    def close(self):
        """End the tracker."""
        self.attempt(self.accelerator.end_training)
