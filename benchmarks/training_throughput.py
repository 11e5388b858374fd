"""
Compare the speed of the training scripts with that of the bare model: forward, backward and optimiser step of the same
model, on tensors in memory.

    accelerate launch benchmarks/training_throughput.py --dataset_name ../shared/data/imagenette-128

The two take turns, and the results are medians over the turns. A turn of training begins when its first batch is
loaded, and ends when the batch after its last step is loaded. During a turn of the bare model nothing is loaded.
"""

import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field

import torch

from training import pretrain
from training.arguments import DataArguments, PretrainingArguments, parse_arguments
from training.data.classification import TrainingImages
from training.data.loading import select_labelled
from training.engine.loop import take_step
from training.engine.optimization import build_optimizer, build_scheduler
from training.engine.setup import build_accelerator, build_loader, load_splits
from training.tasks.classification import ClassificationLoss


@dataclass(kw_only=True)
class TurnArguments:
    """What is trained, and for how many steps in a turn."""

    _argument_group_name = "what is timed"

    config_name: str = field(default="cbt-tiny", metadata={"help": "as in `pretrain.py`"})
    image_size: int = field(default=128, metadata={"help": "side of the crops in pixels"})
    patch_size: int = field(default=8, metadata={"help": "side of a patch in pixels"})
    batch_size: int = field(default=64, metadata={"help": "images per step, over all processes together"})
    num_workers: int = field(default=1, metadata={"help": "processes that load images, per training process"})
    steps: int = field(default=10, metadata={"help": "steps per turn"})
    turns: int = field(default=4, metadata={"help": "turns of each, after one for warming up"})


@dataclass(kw_only=True)
class Arguments(TurnArguments, DataArguments):
    """Options of the script."""


def synchronised_time() -> float:
    """Wall time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def build_turns(args: Arguments) -> tuple[Callable[[], tuple[float, float]], Callable[[], float]]:
    """
    Two functions: one turn of training, which returns its seconds and the seconds of waiting for data; and one turn of
    the bare model, which returns its seconds.
    """
    values = {name: value for name, value in asdict(args).items() if name not in ("steps", "turns")}
    settings = PretrainingArguments(**values, output_dir="", report_to="none")
    accelerator = build_accelerator(settings)
    split, _ = load_splits(settings, select_labelled)
    num_images = (args.steps + 1) * args.batch_size
    if len(split) < num_images:
        raise ValueError(f"A turn needs {num_images} images and the training split has {len(split)}: lower `--steps`.")
    model, processor = pretrain.build_model(settings, split)
    images = TrainingImages(
        split.select(range(num_images)),
        args.max_corrupt,
        processor,
        crop_sizes=[args.image_size],
        num_epochs=args.turns + 1,
        min_crop_scale=settings.min_crop_scale,
        mixup_alpha=settings.mixup_alpha,
        seed=settings.seed,
    )
    loader = accelerator.prepare(build_loader(images, settings, train=True))

    def prepare(task: ClassificationLoss):
        optimizer = build_optimizer(settings.optimizer, [{"params": task.parameters()}], settings.learning_rate)
        scheduler = build_scheduler(settings.schedule, optimizer, (args.turns + 1) * args.steps, num_warmup_steps=0)
        return accelerator.prepare(task.train(), optimizer, scheduler)

    task = ClassificationLoss(model, settings.label_smoothing)
    bare, bare_optimizer, _ = prepare(deepcopy(task))
    task, optimizer, scheduler = prepare(task)
    *_, in_memory = loader  # the last batch; the loader has finished, so it loads nothing during the measurement

    def train() -> tuple[float, float]:
        batches, waited = iter(loader), 0.0
        batch = next(batches)
        started = synchronised_time()
        for _ in range(args.steps):
            take_step(settings, accelerator, task, optimizer, scheduler, batch, teach=lambda _: {})
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
        return synchronised_time() - started, waited

    def run_bare() -> float:
        started = synchronised_time()
        for _ in range(args.steps):
            accelerator.backward(bare(**in_memory)["loss"])
            bare_optimizer.step()
            bare_optimizer.zero_grad()
        return synchronised_time() - started

    return train, run_bare


def main(args: Arguments):
    """Print images per second of training and of the bare model, the medians over the turns."""
    train, run_bare = build_turns(args)
    turns = [(*train(), run_bare()) for _ in range(args.turns + 1)][1:]
    training, waited, bare = (statistics.median(values) for values in zip(*turns, strict=True))
    num_images = args.steps * args.batch_size
    print("| | images/s | share of the bare model's | waiting for data |\n|---|---|---|---|")
    print(f"| training | {num_images / training:.1f} | {bare / training:.1%} | {waited / training:.1%} |")
    print(f"| bare model | {num_images / bare:.1f} | | |")


if __name__ == "__main__":
    try:
        main(parse_arguments(Arguments))
    except ValueError as error:
        sys.exit(f"training_throughput.py: {error}")
