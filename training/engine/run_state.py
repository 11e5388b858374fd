"""The state of a run on disk: writing checkpoints that are whole, finding damage, and resuming."""

import hashlib
import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from training.engine.interruption import FAILED, common_status
from training.engine.output import remove, sync, write_file


CHECKPOINTS = "checkpoint-" + "[0-9]" * 8  # complete ones; the name of one that is being written ends in `.partial`
SUMS = "SHA256SUMS"  # as `sha256sum --check` reads it
PROGRESS, VALIDATION, DATA = "progress.json", "validation.json", "data.json"

logger = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, or differs from what was written."""


@dataclass
class Progress:
    """
    How far a run has come.

    Args:
        step: optimiser steps done.
        seconds: time spent in training, over all sessions of the run.
        waited: part of it that the main process waited for data.
        losses: of the last step that was logged, by name.
        metrics: of the last validation.
        validated_step: step of the last validation; None before the first.
        best: the best value so far of the task's metric; None before the first validation.
        best_step: step of that validation.
    """

    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    validated_step: int | None = None
    best: float | None = None
    best_step: int | None = None


@dataclass
class DataIdentity:
    """
    What a resumed run must have in common with the one that wrote the checkpoint. Otherwise it would see some images
    twice and others never.

    Args:
        batch_size: images per step.
        num_images: number of training images.
        sample: checksums of some of them. Half of them must agree, so that broken images may be mended in between.
        num_readers: processes that share the shards of a stream; None of images in memory.
    """

    batch_size: int
    num_images: int
    sample: list[int]
    num_readers: int | None = None

    def check(self, before: "DataIdentity", checkpoint: Path):
        """Raises ValueError if the checkpoint was written with another batch size, or with other images or readers."""
        for before_and_now, what in (
            ((before.batch_size, self.batch_size), "`--batch_size {}`, not {}"),
            ((before.num_images, self.num_images), "{} training images, not {}"),
            ((before.num_readers, self.num_readers), "a stream read by {} processes, not {}"),
        ):
            if len({*before_and_now} - {None}) > 1:
                raise ValueError(
                    f"{checkpoint} was trained with {what.format(*before_and_now)}: resume with what it began with, "
                    "or start anew in another `--output_dir`."
                )
        same = sum(now == then for now, then in zip(self.sample, before.sample, strict=False))
        if same < len(before.sample) / 2:
            raise ValueError(
                f"{checkpoint} was trained on other images: resume with those it began with, or start anew in another "
                "`--output_dir`."
            )


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return output_dir / f"checkpoint-{step:08d}"


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path):
    """Write the checksums of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{checksum(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    write_file(folder / SUMS, "".join(lines))


def check_sums(checkpoint: Path):
    """
    Raises DamagedCheckpoint if a file does not have its checksum. (Checkpoints of version 0.1 have no checksums.)
    """
    if not (checkpoint / SUMS).exists():
        return
    try:
        sums = dict(line.split("  ", 1)[::-1] for line in (checkpoint / SUMS).read_text().splitlines())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"its {SUMS} cannot be read") from error
    if PROGRESS not in sums:
        raise DamagedCheckpoint(f"its {SUMS} is not whole")
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file() or checksum(path) != expected:
            raise DamagedCheckpoint(f"its {name} is not what was written")


def read_progress(checkpoint: Path) -> Progress:
    """
    The progress that a checkpoint holds; after its validation, if there was one.

    Raises:
        DamagedCheckpoint: if it cannot be read, or is of another step.
    """
    path = checkpoint / (VALIDATION if (checkpoint / VALIDATION).exists() else PROGRESS)
    try:
        progress = Progress(**json.loads(path.read_text()))
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"its {path.name} cannot be read") from error
    step = int(checkpoint.name[-8:]) if re.fullmatch(CHECKPOINTS, checkpoint.name) else progress.step
    if type(progress.step) is not int or progress.step != step or step < 0:
        raise DamagedCheckpoint(f"its {path.name} is of step {progress.step}")
    return progress


def check_data(checkpoint: Path, data: DataIdentity):
    """Raises ValueError if a run on other data wrote the checkpoint. (Those of version 0.1 do not say.)"""
    if (checkpoint / DATA).exists():
        try:
            before = DataIdentity(**json.loads((checkpoint / DATA).read_text()))
        except (OSError, RecursionError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(f"its {DATA} cannot be read") from error
        data.check(before, checkpoint)


def check_folder(output_dir: Path, progress: Progress, keep_best: bool):
    """
    Raises ValueError if the run cannot continue in that folder: it holds checkpoints of later steps, or lacks the best
    one.
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


def whole_checkpoint(output_dir: Path) -> str:
    """What a message says about the newest checkpoint."""
    newest = max(output_dir.glob(CHECKPOINTS), default=None)
    return f"{newest} is the newest whole one" if newest is not None else "there is no older one"


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: Progress,
    average: AveragedModel | None,
    data: DataIdentity,
):
    """
    Write a checkpoint under a temporary name, and rename it when all of it is on the disk.

    Args:
        accelerator: holds the state of model, optimiser and scheduler.
        output_dir: folder of the run.
        progress: of the run.
        average: moving average of the weights, if there is one.
        data: what the run is trained on.

    Raises:
        ValueError: if it cannot be written. Only complete checkpoints are left then.
    """
    final = checkpoint_path(output_dir, progress.step)
    partial, replaced = (final.with_name(final.name + suffix) for suffix in (".partial", ".replaced"))
    try:
        if accelerator.is_main_process:
            for leftover in (*output_dir.glob("*.partial"), *output_dir.glob("*.replaced")):
                remove(leftover)
        accelerator.wait_for_everyone()
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()  # every process writes its own part
        if accelerator.is_main_process:
            if average is not None:
                save_file(average.state_dict(), partial / "average.safetensors")
            (partial / PROGRESS).write_text(json.dumps(asdict(progress), indent=2) + "\n")
            (partial / DATA).write_text(json.dumps(asdict(data)) + "\n")
            for path in (*partial.rglob("*"), partial):
                sync(path)
            write_sums(partial)
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            sync(output_dir)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"The checkpoint {final} cannot be written ({error}); {whole_checkpoint(output_dir)}."
        ) from error
    accelerator.wait_for_everyone()


def record_validation(output_dir: Path, progress: Progress):
    """
    Add the metrics of a validation to the checkpoint of its step. A run resumed from there does not validate again.

    Raises:
        ValueError: if they cannot be written.
    """
    checkpoint = checkpoint_path(output_dir, progress.step)
    try:
        write_file(checkpoint / VALIDATION, json.dumps(asdict(progress), indent=2) + "\n")
        if (checkpoint / SUMS).exists():
            line = f"{checksum(checkpoint / VALIDATION)}  {VALIDATION}\n"
            write_file(checkpoint / SUMS, (checkpoint / SUMS).read_text() + line)
    except OSError as error:
        raise ValueError(f"{checkpoint / VALIDATION} cannot be written: {error.strerror}.") from error


def prune_checkpoints(output_dir: Path, progress: Progress, keep: int):
    """Remove all checkpoints except the newest `keep` and the best."""
    kept = set(sorted(output_dir.glob(CHECKPOINTS))[-keep:])
    if progress.best_step is not None:
        kept.add(checkpoint_path(output_dir, progress.best_step))
    for old in set(output_dir.glob(CHECKPOINTS)) - kept:
        old.rename(old.with_name(old.name + ".replaced"))  # no half-removed folder may have the name of a checkpoint
    for leftover in output_dir.glob("*.replaced"):
        remove(leftover)


def load_state(
    accelerator: Accelerator, checkpoint: Path, average: AveragedModel | None, data: DataIdentity
) -> Progress:
    """
    Load the state of model, optimiser, scheduler and average from a checkpoint. No code in pickles is run.

    Raises:
        DamagedCheckpoint: in every process, if one of them finds damage.
        ValueError: if the checkpoint is of another model, other settings or other data.
    """
    error = progress = None
    try:
        if accelerator.is_main_process:
            check_sums(checkpoint)
        progress = read_progress(checkpoint)
        check_data(checkpoint, data)
    except ValueError as found:
        error = found
    agree(accelerator, error)
    try:
        accelerator.load_state(checkpoint)
        if average is not None:
            average.load_state_dict(load_file(checkpoint / "average.safetensors"))
    except Exception as found:  # a damaged file without a checksum may raise anything
        reason = " ".join(" ".join(str(found).splitlines()[:2]).split())  # PyTorch's second line says what differs
        error = DamagedCheckpoint(reason or type(found).__name__)
        if (checkpoint / SUMS).exists() and isinstance(found, (KeyError, OSError, RuntimeError, ValueError)):
            error = ValueError(f"{checkpoint} is of another model or other settings: {reason}")
        error.__cause__ = found
    agree(accelerator, error)
    return progress


def agree(accelerator: Accelerator, error: ValueError | None):
    """Raise in all processes if one of them has met an error: its own error there, a similar one elsewhere."""
    status = 0 if error is None else FAILED + (not isinstance(error, DamagedCheckpoint))
    common = common_status(accelerator, status)
    if common:
        kind = DamagedCheckpoint if common == FAILED else ValueError
        raise error if status == common else kind("the checkpoint cannot be read by another process")


def resume(
    accelerator: Accelerator, name: str, output_dir: Path, average: AveragedModel | None, data: DataIdentity
) -> tuple[Path, Progress]:
    """
    Load the checkpoint that `--resume_from_checkpoint` names. `last` is the newest one in the output folder that is
    not damaged; damaged ones that are newer are logged and renamed.

    Args:
        accelerator: of the run.
        name: a folder, or `last`.
        output_dir: folder of the run.
        average: moving average of the weights, if there is one.
        data: what the run is trained on.

    Returns:
        The checkpoint's folder, and the progress that it holds.

    Raises:
        ValueError: if there is no such checkpoint, or it does not fit this run, see [`load_state`].
    """
    if name != "last":
        checkpoint = Path(name)
        if not (checkpoint / PROGRESS).is_file():
            raise ValueError(f"{checkpoint} is not a checkpoint of this script.")
        try:
            return checkpoint, load_state(accelerator, checkpoint, average, data)
        except DamagedCheckpoint as error:
            raise ValueError(f"The checkpoint {checkpoint} is damaged or not of this run: {error}.") from error
    damaged = {}
    for checkpoint in sorted(output_dir.glob(CHECKPOINTS), reverse=True):
        try:
            progress = load_state(accelerator, checkpoint, average, data)
        except DamagedCheckpoint as error:
            damaged[checkpoint] = error
            continue
        if accelerator.is_main_process:
            set_aside(damaged)
        accelerator.wait_for_everyone()
        return checkpoint, progress
    if not damaged:
        raise ValueError(f"There is no checkpoint in {output_dir} to resume from.")
    reasons = "; ".join(f"{checkpoint.name}: {error}" for checkpoint, error in damaged.items())
    raise ValueError(f"No checkpoint in {output_dir} is whole ({reasons}): start anew in another `--output_dir`.")


def set_aside(damaged: dict[Path, DamagedCheckpoint]):
    """Rename damaged checkpoints, and log it."""
    for checkpoint, error in damaged.items():
        aside = checkpoint.with_name(checkpoint.name + ".damaged")
        if aside.exists():
            remove(aside)
        checkpoint.rename(aside)
        logger.warning("%s is damaged and now called %s: %s.", checkpoint, aside.name, error)
