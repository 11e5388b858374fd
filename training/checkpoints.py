"""State of a run on disk: whole checkpoints or none, the newest and the best kept, and a way back into them."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel


CHECKPOINTS = "checkpoint-" + "[0-9]" * 8  # whole ones: those being written end in `.partial`


@dataclass
class Progress:
    """
    How far a run is.

    Args:
        step: optimiser steps done.
        seconds: time spent, over all sessions of the run.
        waited: seconds of these that the main process waited for data.
        metrics: of the last validation.
        best: the best value so far of the metric that the run looks at; None before the first validation.
        best_step: when that was.
    """

    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step:08d}"


def read_progress(checkpoint: Path) -> Progress:
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))


def find_checkpoint(name: str, output_dir: Path) -> Path:
    """The checkpoint folder that `--resume_from_checkpoint` means; a ValueError says when there is none."""
    if name == "last":
        found = sorted(output_dir.glob(CHECKPOINTS))
        if not found:
            raise ValueError(f"There is no checkpoint in {output_dir} to resume from.")
        return found[-1]
    if not (Path(name) / "progress.json").is_file():
        raise ValueError(f"{name} is not a checkpoint of this script.")
    return Path(name)


def check_folder(output_dir: Path, progress: Progress, keep_best: bool):
    """
    Raises:
        ValueError: a run that goes on from there in that folder would take older checkpoints for its newest, or end
            without its best.
    """
    newest = max(output_dir.glob(CHECKPOINTS), default=None)
    if newest is not None and newest > checkpoint_path(output_dir, progress.step):
        raise ValueError(
            f"{output_dir} holds {newest.name}, beyond step {progress.step}, where this run starts: resume with "
            "`--resume_from_checkpoint last`, choose another `--output_dir`, or remove the checkpoints beyond."
        )
    if keep_best and progress.best_step is not None:
        best = checkpoint_path(output_dir, progress.best_step)
        if not best.exists():
            raise ValueError(f"`--keep_best` needs {best.name}, the best so far: copy it to {output_dir}.")


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, progress: Progress, average: AveragedModel | None, keep: int
):
    """
    Write the whole state under a temporary name, rename it, and remove all but the newest `keep` and the best.

    Raises:
        ValueError: it cannot be written; nothing but whole checkpoints is left.
    """
    final = checkpoint_path(output_dir, progress.step)
    partial, replaced = (final.with_name(final.name + suffix) for suffix in (".partial", ".replaced"))
    try:
        if accelerator.is_main_process:
            for leftover in (*output_dir.glob("*.partial"), *output_dir.glob("*.replaced")):
                shutil.rmtree(leftover)
        accelerator.wait_for_everyone()
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()  # every process writes its own part
        if accelerator.is_main_process:
            if average is not None:
                save_file(average.state_dict(), partial / "average.safetensors")
            (partial / "progress.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            kept = set(sorted(output_dir.glob(CHECKPOINTS))[-keep:])
            if progress.best_step is not None:
                kept.add(checkpoint_path(output_dir, progress.best_step))
            for old in set(output_dir.glob(CHECKPOINTS)) - kept:
                old.rename(old.with_name(old.name + ".replaced"))  # so that none is half gone under a whole one's name
            for leftover in output_dir.glob("*.replaced"):
                shutil.rmtree(leftover)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        whole = sorted(output_dir.glob(CHECKPOINTS))
        last = f"{whole[-1]} is the newest whole one" if whole else "there is no older one"
        raise ValueError(f"The checkpoint {final} cannot be written ({error}); {last}.") from error
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, checkpoint: Path, average: AveragedModel | None) -> Progress:
    """
    Bring model, optimiser, scheduler and average back to where they were.

    Raises:
        ValueError: the checkpoint is damaged, or of another model or other settings.
    """
    try:
        accelerator.load_state(checkpoint)
        if average is not None:
            average.load_state_dict(load_file(checkpoint / "average.safetensors"))
        return read_progress(checkpoint)
    except (OSError, RuntimeError, SafetensorError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The checkpoint {checkpoint} is damaged or not of this run: {reason}") from error
