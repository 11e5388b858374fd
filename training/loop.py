"""The training loop that all scripts share: steps, validation, checkpoints, logs, and a clean end."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, broadcast, set_seed
from card import write_card
from checkpoints import (
    Progress,
    check_folder,
    checkpoint_path,
    find_checkpoint,
    load_state,
    read_progress,
    save_checkpoint,
)
from data import DataArguments, LabelledImages, find_split, load_images
from datasets import Dataset
from optimization import OPTIMIZERS, SCHEDULES, build_optimizer, build_scheduler, parameter_groups
from safetensors.torch import load_file
from streaming import StreamedRows
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from cbsa_hf.hub import push_checkpoint


LOG_STEPS = 10
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # by `accelerate launch`, by torchrun
UNSHARDED = ("ema_decay", "keep_best")  # options that do not go with FSDP
IN_MEMORY = ("class_balanced", "cutmix_alpha", "mixup_alpha", "teacher_cache")  # options that do not go with streaming


@dataclass(kw_only=True)
class TrainingArguments(DataArguments):
    """Options of every training script."""

    train_split: str = field(default="train", metadata={"help": "split to train on"})
    validation_split: str = field(default="validation", metadata={"help": "split to validate on"})
    output_dir: str = field(metadata={"help": "where checkpoints, logs and the trained model go"})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "whether training images are read as they come, by every process, each shuffled among 1000; those "
            "of validation are read into memory, still encoded"
        },
    )
    num_train_images: int | None = field(
        default=None, metadata={"help": "images per epoch when streaming; default: as the data set says"}
    )
    num_epochs: int = field(default=30, metadata={"help": "passes over the training split"})
    batch_size: int = field(default=64, metadata={"help": "images per step, over all processes together"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "parts that a batch is computed in, one after the other, to save memory"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "which optimiser", "choices": OPTIMIZERS})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate, for the whole batch"})
    layer_decay: float = field(
        default=1.0, metadata={"help": "factor on the learning rate from each layer to the one before it"}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "decay of weight matrices; nothing else decays"})
    schedule: str = field(default="cosine", metadata={"help": "after the warm-up", "choices": SCHEDULES})
    warmup_epochs: float = field(default=2.0, metadata={"help": "epochs of linear warm-up"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    ema_decay: float | None = field(
        default=None, metadata={"help": "decay per step of an average of the weights, which is then what is validated"}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "share of a batch that skips the last layer's blocks (stochastic depth)"}
    )
    num_workers: int = field(default=1, metadata={"help": "processes that load images, per training process"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order and augmentation"})
    validation_epochs: int = field(
        default=1, metadata={"help": "epochs from one validation, and the checkpoint after it, to the next"}
    )
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "steps from one checkpoint to the next, besides those after validations"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "how many of the newest stay, beside the best"})
    keep_best: bool = field(
        default=False, metadata={"help": "whether the best weights of all validations are the result, not the last"}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint folder, or `last` for the newest in output_dir"}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Accelerate's tracker, or `none`"})
    picture_epochs: int | None = field(
        default=None, metadata={"help": "epochs from one picture of validation images in the log to the next"}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "id to publish the result under, `user/model`"})


class StopRequest:
    """SIGTERM, or the death of the launcher if there is one, as a wish to stop after the step in hand."""

    def __init__(self):
        self.signalled = False
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        signal.signal(signal.SIGTERM, self.on_signal)

    def on_signal(self, *_):
        self.signalled = True

    def is_made(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all of them get the same answer."""
        wanted = self.signalled or self.launcher not in (None, os.getppid())
        if accelerator.num_processes == 1:
            return wanted
        if wanted:
            accelerator.set_trigger()
        return accelerator.check_trigger()


def build_accelerator(args: TrainingArguments) -> Accelerator:
    """
    Accelerate as every script uses it; everything random that follows is seeded.

    Raises:
        ValueError: the batch cannot be divided among processes and parts; or an option is not for sharded weights.
    """
    accelerator = Accelerator(
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        # `batch_size` is the global one: each process takes its slice of the same batch.
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=args.seed, non_blocking=True
        ),
    )
    parts = accelerator.num_processes * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise ValueError(
            f"`--batch_size {args.batch_size}` is not a multiple of {parts}: {accelerator.num_processes} processes "
            f"times `--gradient_accumulation_steps {args.gradient_accumulation_steps}`."
        )
    for name in UNSHARDED:
        if getattr(args, name) and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(f"`--{name}` is not for weights that FSDP shards; leave it out, or do not shard.")
    set_seed(args.seed)
    return accelerator


def load_splits(
    args: TrainingArguments, find_columns: Callable[[Dataset, str | None, str | None], list[str]]
) -> tuple[Dataset | StreamedRows, Dataset]:
    """
    Training and validation split, each of two columns: the image, and the label or mask.

    Raises:
        ValueError: no such data set, split or column; an option that does not go with streaming.
    """
    splits = load_images(args.dataset_name, args.dataset_config_name, args.streaming)
    named = [find_split(splits, name) for name in (args.train_split, args.validation_split)]
    train, validation = (s.select_columns(find_columns(s, args.image_column, args.label_column)) for s in named)
    if args.streaming:
        for name in IN_MEMORY:
            if getattr(args, name, None):
                raise ValueError(f"`--{name}` needs any image at any time, which `--streaming` does not give.")
        train = StreamedRows(train, args.num_train_images, args.seed)
        validation = Dataset.from_list(list(validation.decode(False)), features=validation.features)
    return train, validation


def outlive_termination(worker: int):
    """
    A worker goes on when all processes of a run are asked to stop, as clusters do: the step in hand needs its batch.
    Its parent can still end it, as at the end of a run. (Nothing is changed where the sender cannot be told: macOS.)
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def build_loader(dataset: LabelledImages, args: TrainingArguments, train: bool) -> DataLoader:
    """Batches of the global size; shuffled and without the rest when training. A ValueError if there is no batch."""
    if train and len(dataset) < args.batch_size:
        raise ValueError(f"{len(dataset)} training images are less than one batch of {args.batch_size}.")
    stream = dataset.dataset if isinstance(dataset.dataset, StreamedRows) else None
    workers = {}
    if args.num_workers:
        workers = {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": outlive_termination}
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=stream,
        shuffle=train and stream is None,
        drop_last=train,
        num_workers=args.num_workers,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )


def seed_step(seed: int, step: int, process: int):
    """Every step draws from a stream of its own, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0]))


def check_finite(name: str, value: float, step: int):
    """A ValueError when it is not a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"The {name} is {value} at step {step}; lower `--learning_rate`. Older checkpoints are kept.")


def split_batch(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """The batch in equal parts, along the first dimension."""
    chunks = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return [{name: chunks[name][i] for name in batch} for i in range(parts)]


def next_batch(batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The next one; a ValueError in a worker, which comes with a traceback in its message, is its sentence again."""
    try:
        return next(batches)
    except ValueError as error:
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


def take_step(
    args: TrainingArguments,
    accelerator: Accelerator,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batch: dict[str, torch.Tensor],
    teach: Callable[[torch.Tensor], dict] | None = None,
) -> dict[str, torch.Tensor]:
    """Forward and backward over the batch, in parts, and the optimiser's step -> the losses, means over the parts."""
    totals, parts = {}, args.gradient_accumulation_steps
    for i, part in enumerate(split_batch(batch, parts)):
        taught = {} if teach is None else teach(part["pixel_values"])
        with accelerator.no_sync(task) if i < parts - 1 else nullcontext():
            losses = task(**part, **taught)
            accelerator.backward(losses["loss"] / parts)
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach() / parts
    accelerator.clip_grad_norm_(task.parameters(), args.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return totals


def train(
    args: TrainingArguments,
    accelerator: Accelerator,
    task: nn.Module,
    processor: BaseImageProcessor,
    train_data: LabelledImages,
    validate: Callable[[nn.Module], dict[str, float]],
    metric: str,
    teach: Callable[[torch.Tensor], dict] | None = None,
    draw: Callable[[PreTrainedModel], dict] | None = None,
) -> dict:
    """
    Train, and leave in `args.output_dir` a model that `from_pretrained` opens, its image processor and card, and
    `results.json`.

    A run that was stopped and resumed ends with the same weights as one that was not.

    Args:
        args: the script's options.
        accelerator: from [`build_accelerator`].
        task: called with the tensors of a batch it returns a dict of losses, of which `loss` is minimised;
            `task.model` is the model to be saved.
        processor: the model's image processor.
        train_data: the training images.
        validate: the task or its average, in evaluation mode -> metrics.
        metric: which of them is looked at, the larger the better.
        teach: pixels -> what the task is called with besides the batch.
        draw: model -> pictures by name, each (1, height, width, 3), for the log.

    Returns:
        What is written to `results.json`.

    Raises:
        ValueError: a loss that is no number, a checkpoint that cannot be written or read, another run's checkpoints in
            the folder, too many broken images.
    """
    started, output_dir = time.time(), Path(args.output_dir)
    stop = StopRequest()
    loader = build_loader(train_data, args, train=True)
    steps_per_epoch, num_steps = len(loader), args.num_epochs * len(loader)
    encoder = getattr(task.model.config, "backbone_config", None) or task.model.config
    num_layers = getattr(encoder, "num_hidden_layers", task.model.config.num_hidden_layers)
    groups = parameter_groups(task, num_layers, args.learning_rate, args.weight_decay, args.layer_decay)
    optimizer = build_optimizer(args.optimizer, groups, args.learning_rate)
    scheduler = build_scheduler(args.schedule, optimizer, num_steps, args.warmup_epochs * steps_per_epoch)
    average = None
    if args.ema_decay is not None:
        average = AveragedModel(
            task.to(accelerator.device), multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True
        )
    task, optimizer, scheduler, loader = accelerator.prepare(task, optimizer, scheduler, loader)

    progress = Progress()
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
        progress = load_state(accelerator, checkpoint, average)
        accelerator.print(f"Resumed from {checkpoint}: {progress.step} of {num_steps} steps done.")
    check_folder(output_dir, progress, args.keep_best)
    seconds_before = progress.seconds
    settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(args).items()}
    accelerator.init_trackers(Path(sys.argv[0]).stem, config=settings)

    bar = tqdm(
        total=num_steps * args.batch_size,
        initial=progress.step * args.batch_size,
        unit="img",
        unit_scale=True,
        smoothing=0.05,
        disable=not accelerator.is_main_process,
    )
    while progress.step < num_steps:
        epoch, done = divmod(progress.step, steps_per_epoch)
        task.train()
        loader.set_epoch(epoch)
        train_data.set_epoch(epoch)
        batches = iter(accelerator.skip_first_batches(loader, done) if done else loader)
        bar.set_description(f"epoch {epoch + 1}/{args.num_epochs}")
        for _ in range(done, steps_per_epoch):
            asked = time.time()
            batch = next_batch(batches)
            progress.waited += time.time() - asked
            seed_step(args.seed, progress.step, accelerator.process_index)
            losses = take_step(args, accelerator, task, optimizer, scheduler, batch, teach)
            if average is not None:
                average.update_parameters(accelerator.unwrap_model(task, keep_torch_compile=False))
            progress.step += 1
            progress.seconds = seconds_before + time.time() - started
            bar.update(args.batch_size)
            stops = stop.is_made(accelerator)
            ends = progress.step % steps_per_epoch == 0
            validates = ends and ((epoch + 1) % args.validation_epochs == 0 or progress.step == num_steps)
            saves = stops or (args.checkpointing_steps is not None and progress.step % args.checkpointing_steps == 0)
            if progress.step % LOG_STEPS == 0 or saves or validates:
                values = {name: accelerator.gather(loss).mean().item() for name, loss in losses.items()}
                check_finite("loss", values["loss"], progress.step)  # before a checkpoint is written
                train_data.check()
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                values |= {"lr": scheduler.get_last_lr()[-1], "data_wait": progress.waited / progress.seconds}
                accelerator.log({f"train/{name}": value for name, value in values.items()}, step=progress.step)
            if saves and not validates:
                save_checkpoint(accelerator, output_dir, progress, average, args.keep_checkpoints)
            if stops:
                break
        network = (task if average is None else average.module).eval()
        if validates:
            if accelerator.num_processes > 1:
                # Batch norm saw another share of the last batch in each process; what is saved is the first one's.
                broadcast(dict(network.named_buffers()))
            progress.metrics = validate(network)
            for name in progress.metrics.keys() & {metric, "loss"}:
                check_finite(name, progress.metrics[name], progress.step)
            if progress.best is None or progress.metrics[metric] > progress.best:
                progress.best, progress.best_step = progress.metrics[metric], progress.step
            progress.seconds = seconds_before + time.time() - started
            accelerator.log({f"validation/{k}": v for k, v in progress.metrics.items()}, step=progress.step)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in progress.metrics.items())
            accelerator.print(f"\nepoch {epoch + 1}: {shown}")
            save_checkpoint(accelerator, output_dir, progress, average, args.keep_checkpoints)
        if ends and draw is not None and args.picture_epochs and (epoch + 1) % args.picture_epochs == 0:
            pictures = draw(accelerator.unwrap_model(network, keep_torch_compile=False).model)
            for tracker in accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(pictures, step=progress.step, **layout)
        if stops:
            bar.close()
            accelerator.end_training()
            accelerator.print(f"Stopped at step {progress.step}; `--resume_from_checkpoint last` goes on from there.")
            sys.exit(128 + signal.SIGTERM)
    bar.close()
    results = save_results(args, accelerator, task, processor, average, progress, metric)
    accelerator.end_training()
    return results


def save_results(
    args: TrainingArguments,
    accelerator: Accelerator,
    task: nn.Module,
    processor: BaseImageProcessor,
    average: AveragedModel | None,
    progress: Progress,
    metric: str,
) -> dict:
    """Write the trained model, its image processor and card, and `results.json`; publish them where that is wanted."""
    output_dir = Path(args.output_dir)
    state = accelerator.get_state_dict(task)  # gathers what is sharded, so every process calls it
    results = {**asdict(progress), "processes": accelerator.num_processes, "arguments": asdict(args)}
    if accelerator.is_main_process:
        best = checkpoint_path(output_dir, progress.best_step)
        if args.keep_best and progress.best_step != progress.step:
            state = load_file(best / ("model.safetensors" if average is None else "average.safetensors"))
            results["metrics"] = read_progress(best).metrics
        elif average is not None:
            state = average.state_dict()
        # Wrappers, of torch.compile and of the average, have put their names before the task's own.
        names = {name: name.replace("_orig_mod.", "").removeprefix("module.") for name in state}
        state = {new.removeprefix("model."): state[old] for old, new in names.items() if new.startswith("model.")}
        model = accelerator.unwrap_model(task, keep_torch_compile=False).model
        model.save_pretrained(output_dir, state_dict=state)
        processor.save_pretrained(output_dir)
        (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        write_card(output_dir, model, results, metric)
        if args.push_to_hub is not None:
            accelerator.print(f"Published as {push_checkpoint(args.push_to_hub, args.output_dir)}")
    accelerator.wait_for_everyone()
    return results
