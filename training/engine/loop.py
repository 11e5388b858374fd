"""The training loop that all scripts share: steps, validation, checkpoints, logs, and a clean end."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, broadcast, set_seed
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from arguments import TrainingArguments
from cbsa_hf.hub import push_checkpoint
from data.labelled_images import LabelledImages
from data.loading import find_split, load_images
from data.streaming import StreamedRows, WrongLength
from engine.card import write_card
from engine.interruption import FAILED, StopRequest, common_status, outlive_interruption, read_batches
from engine.optimization import STATES, build_optimizer, build_scheduler, parameter_groups
from engine.output import check_room, open_output, write_together
from engine.run_state import (
    CHECKPOINTS,
    DamagedCheckpoint,
    DataIdentity,
    Progress,
    check_folder,
    check_sums,
    checkpoint_path,
    prune_checkpoints,
    read_progress,
    record_validation,
    resume,
    save_checkpoint,
)


LOG_STEPS = 10

OVERHEAD = 2**16  # bytes of a checkpoint beside its weights: headers, random states

UNSHARDED = ("ema_decay", "keep_best")  # options that do not go with FSDP

IN_MEMORY = ("class_balanced", "cutmix_alpha", "mixup_alpha", "teacher_cache")  # options that do not go with streaming


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


@contextmanager
def start_run(args: TrainingArguments) -> Iterator[Accelerator]:
    """
    See [`build_accelerator`]; and for as long as the context lasts, the main process has opened the run's folder.

    Raises:
        ValueError: see [`build_accelerator`] and [`open_output`].
    """
    accelerator = build_accelerator(args)
    with open_output(args.output_dir) if accelerator.is_main_process else nullcontext():
        yield accelerator


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


def build_loader(dataset: LabelledImages, args: TrainingArguments, train: bool) -> DataLoader:
    """Batches of the global size; shuffled and without the rest when training. A ValueError if there is no batch."""
    if train and len(dataset) < args.batch_size:
        raise ValueError(f"{len(dataset)} training images are less than one batch of {args.batch_size}.")
    stream = dataset.dataset if isinstance(dataset.dataset, StreamedRows) else None
    workers = {}
    if args.num_workers:
        workers = {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": outlive_interruption}
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


class TrainingRun:
    """
    A run, from its first step or from a checkpoint to its results. See [`train`] for the arguments.

    A run that was stopped and resumed ends with the same weights as one that was not. Whatever stops it, but for a
    loss that is no number, costs no step that was done: it saves before it validates, and when a batch cannot be read.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        task: nn.Module,
        processor: BaseImageProcessor,
        train_data: LabelledImages,
        validate: Callable[[nn.Module], dict[str, float]],
        metric: str,
        teach: Callable[[torch.Tensor], dict] | None,
        draw: Callable[[PreTrainedModel], dict] | None,
    ):
        self.args, self.accelerator, self.processor, self.train_data = args, accelerator, processor, train_data
        self.compute_metrics, self.metric, self.teach, self.draw = validate, metric, teach, draw
        self.started, self.output_dir = time.time(), Path(args.output_dir)
        self.data = DataIdentity(args.batch_size, len(train_data), train_data.sample())
        loader = build_loader(train_data, args, train=True)
        self.steps_per_epoch, self.num_steps = len(loader), args.num_epochs * len(loader)
        encoder = getattr(task.model.config, "backbone_config", None) or task.model.config
        num_layers = getattr(encoder, "num_hidden_layers", task.model.config.num_hidden_layers)
        groups = parameter_groups(task, num_layers, args.learning_rate, args.weight_decay, args.layer_decay)
        optimizer = build_optimizer(args.optimizer, groups, args.learning_rate)
        warmup_steps = args.warmup_epochs * self.steps_per_epoch
        scheduler = build_scheduler(args.schedule, optimizer, self.num_steps, warmup_steps)
        self.average = None
        if args.ema_decay is not None:
            self.average = AveragedModel(
                task.to(accelerator.device), multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True
            )
        self.task, self.optimizer, self.scheduler, self.loader = accelerator.prepare(
            task, optimizer, scheduler, loader
        )
        self.progress, self.saved_step = Progress(), None

    def run(self, stop: StopRequest) -> dict:
        """Train to the end, or until a stop is asked for -> what is written to `results.json`."""
        args, accelerator = self.args, self.accelerator
        if args.resume_from_checkpoint is not None:
            self.resume()
        check_folder(self.output_dir, self.progress, args.keep_best)
        if accelerator.is_main_process:
            self.check_room()
        self.seconds_before = self.progress.seconds
        settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(args).items()}
        accelerator.init_trackers(Path(sys.argv[0]).stem, config=settings)
        bar = tqdm(
            total=self.num_steps * args.batch_size,
            initial=self.progress.step * args.batch_size,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            disable=not accelerator.is_main_process,
        )
        with bar as self.bar:  # its line is ended before an error is told
            if self.validation_is_due():  # the run that wrote the checkpoint was stopped before it
                self.validate(stop)
            elif args.resume_from_checkpoint is not None:  # or before it removed what the checkpoint replaces
                self.prune()
            while self.progress.step < self.num_steps:
                self.train_epoch(stop)
                if self.validation_is_due():
                    self.validate(stop)
                self.draw_pictures()
        results = self.save_results()
        accelerator.end_training()
        return results

    def check_room(self):
        """A ValueError when two checkpoints do not fit on the disk, less one if there is one."""
        model = self.accelerator.unwrap_model(self.task)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        copies = 1 + STATES[self.args.optimizer] + (self.average is not None)
        missing = 2 - min(1, len(list(self.output_dir.glob(CHECKPOINTS))))
        check_room(self.output_dir, missing * (copies * weights + OVERHEAD))

    def resume(self):
        """
        Go on from a checkpoint.

        Raises:
            ValueError: there is no such checkpoint of this run, or it is beyond its end.
        """
        checkpoint, self.progress = resume(
            self.accelerator, self.args.resume_from_checkpoint, self.output_dir, self.average, self.data
        )
        step = self.progress.step
        if step > self.num_steps:
            raise ValueError(
                f"{checkpoint} is at step {step}, and this run has {self.num_steps}: give a larger `--num_epochs`."
            )
        if checkpoint.resolve() == checkpoint_path(self.output_dir, step).resolve():
            self.saved_step = step
        self.accelerator.print(f"Resumed from {checkpoint}: {step} of {self.num_steps} steps done.")

    def train_epoch(self, stop: StopRequest):
        """The steps up to the end of the epoch."""
        args, accelerator = self.args, self.accelerator
        epoch, done = divmod(self.progress.step, self.steps_per_epoch)
        self.task.train()
        self.loader.set_epoch(epoch)
        self.train_data.set_epoch(epoch)
        batches = read_batches(accelerator.skip_first_batches(self.loader, done) if done else self.loader)
        self.bar.set_description(f"epoch {epoch + 1}/{args.num_epochs}")
        for _ in range(done, self.steps_per_epoch):
            batch = self.next_batch(batches, stop)
            seed_step(args.seed, self.progress.step, accelerator.process_index)
            losses = take_step(args, accelerator, self.task, self.optimizer, self.scheduler, batch, self.teach)
            if self.average is not None:
                self.average.update_parameters(accelerator.unwrap_model(self.task, keep_torch_compile=False))
            self.progress.step += 1
            self.progress.seconds = self.seconds_before + time.time() - self.started
            self.bar.update(args.batch_size)
            step, every = self.progress.step, args.checkpointing_steps
            saves = every is not None and step % every == 0
            if step % LOG_STEPS == 0 or saves or self.validation_is_due():
                self.log_losses(losses)
            if saves:
                self.save()

    def next_batch(self, batches: Iterator[dict[str, torch.Tensor]], stop: StopRequest) -> dict[str, torch.Tensor]:
        """The next batch; if it cannot be read or a stop was asked for, in any process, the state is saved first."""
        batch, error, asked = None, None, time.time()
        try:
            batch = next(batches)
        except WrongLength:  # in every process; and no run with the right length could go on from here
            raise
        except ValueError as found:
            error = found
        self.progress.waited += time.time() - asked
        self.stop_if_asked(stop, error)
        return batch

    def stop_if_asked(self, stop: StopRequest, error: ValueError | None = None):
        """Save the state, and leave, where a signal asks for it or any process has met an error."""
        accelerator = self.accelerator
        status = common_status(accelerator, stop.status if error is None else FAILED)
        if not status:
            return
        step = self.progress.step
        if step or status != FAILED:
            self.save()
        self.bar.close()
        accelerator.end_training()
        if error is not None:
            way_on = f" `--resume_from_checkpoint last` goes on from step {step}." if step else ""
            raise ValueError(f"{error}{way_on}") from error
        if status != FAILED:
            accelerator.print(f"Stopped at step {step}; `--resume_from_checkpoint last` goes on from there.")
        sys.exit(status)

    def log_losses(self, losses: dict[str, torch.Tensor]):
        """Log the last step's, the means over all processes; a ValueError if they are no numbers."""
        progress = self.progress
        values = {name: self.accelerator.gather(loss).mean().item() for name, loss in losses.items()}
        check_finite("loss", values["loss"], progress.step)  # before a checkpoint is written
        self.train_data.check()
        self.bar.set_postfix(loss=f"{values['loss']:.3f}")
        values |= {"lr": self.scheduler.get_last_lr()[-1], "data_wait": progress.waited / progress.seconds}
        self.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=progress.step)

    def save(self):
        """
        Write a checkpoint, unless that of this step is there.

        Raises:
            ValueError: a weight is no number, or the checkpoint cannot be written; older checkpoints are kept.
        """
        if self.saved_step == self.progress.step:
            return
        for name, weight in self.task.named_parameters():
            share = weight.to_local() if hasattr(weight, "to_local") else weight  # of what is sharded
            check_finite(f"largest weight of {name}", share.detach().abs().max().item(), self.progress.step)
        save_checkpoint(self.accelerator, self.output_dir, self.progress, self.average, self.data)
        self.saved_step = self.progress.step
        if not self.validation_is_due():  # what it finds decides what can go
            self.prune()

    def prune(self):
        """Remove the checkpoints that are neither among the newest nor the best."""
        if self.accelerator.is_main_process:
            prune_checkpoints(self.output_dir, self.progress, self.args.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def validation_is_due(self) -> bool:
        epoch, rest = divmod(self.progress.step, self.steps_per_epoch)
        at_its_time = (epoch > 0 and epoch % self.args.validation_epochs == 0) or self.progress.step == self.num_steps
        return rest == 0 and at_its_time and self.progress.validated_step != self.progress.step

    @property
    def network(self) -> nn.Module:
        """The task, or its average: what is validated."""
        return self.task if self.average is None else self.average.module

    def validate(self, stop: StopRequest):
        """
        Save, validate, and add to the checkpoint what was found.

        Raises:
            ValueError: a number that is none, or whatever the data are found to lack.
        """
        accelerator, progress, network = self.accelerator, self.progress, self.network.eval()
        self.save()
        self.stop_if_asked(stop)
        if accelerator.num_processes > 1:
            # Batch norm saw another share of the last batch in each process; what is saved is the first one's.
            broadcast(dict(network.named_buffers()))
        metrics = self.compute_metrics(network)
        for name in metrics.keys() & {self.metric, "loss"}:
            check_finite(name, metrics[name], progress.step)
        progress.metrics, progress.validated_step = metrics, progress.step
        if progress.best is None or metrics[self.metric] > progress.best:
            progress.best, progress.best_step = metrics[self.metric], progress.step
        progress.seconds = self.seconds_before + time.time() - self.started
        accelerator.log({f"validation/{k}": v for k, v in metrics.items()}, step=progress.step)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        accelerator.print(f"\nepoch {progress.step // self.steps_per_epoch}: {shown}")
        if accelerator.is_main_process:
            record_validation(self.output_dir, progress)
        self.prune()

    def draw_pictures(self):
        """For the log, every `--picture_epochs`."""
        every, epoch = self.args.picture_epochs, self.progress.step // self.steps_per_epoch
        if self.draw is not None and every and epoch % every == 0:
            model = self.accelerator.unwrap_model(self.network.eval(), keep_torch_compile=False).model
            pictures = self.draw(model)
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(pictures, step=self.progress.step, **layout)

    def save_results(self) -> dict:
        """
        Write the trained model, its image processor and card, and `results.json`: all of them, or nothing. Publish
        them where that is wanted.

        Raises:
            ValueError: they cannot be written, or the best checkpoint is damaged.
        """
        args, accelerator = self.args, self.accelerator
        state = accelerator.get_state_dict(self.task)  # gathers what is sharded, so every process calls it
        results = {**asdict(self.progress), "processes": accelerator.num_processes, "arguments": asdict(args)}
        if accelerator.is_main_process:
            if args.keep_best and self.progress.best_step != self.progress.step:
                state, results["metrics"] = self.load_best()
            elif self.average is not None:
                state = self.average.state_dict()
            # Wrappers, of torch.compile and of the average, have put their names before the task's own.
            names = {name: name.replace("_orig_mod.", "").removeprefix("module.") for name in state}
            state = {new.removeprefix("model."): state[old] for old, new in names.items() if new.startswith("model.")}
            model = accelerator.unwrap_model(self.task, keep_torch_compile=False).model
            try:
                with write_together(self.output_dir, last="results.json") as folder:
                    model.save_pretrained(folder, state_dict=state)
                    self.processor.save_pretrained(folder)
                    write_card(folder, self.output_dir.resolve().name, model, results, self.metric)
                    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"The result cannot be written to {self.output_dir} ({error}); make room, and "
                    "`--resume_from_checkpoint last` writes it."
                ) from error
            if args.push_to_hub is not None:
                accelerator.print(f"Published as {push_checkpoint(args.push_to_hub, args.output_dir)}")
        accelerator.wait_for_everyone()
        return results

    def load_best(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Weights and metrics of the best checkpoint; a ValueError when it is damaged."""
        best = checkpoint_path(self.output_dir, self.progress.best_step)
        try:
            check_sums(best)
            weights = load_file(best / ("model.safetensors" if self.average is None else "average.safetensors"))
            return weights, read_progress(best).metrics
        except (OSError, SafetensorError, DamagedCheckpoint) as error:
            raise ValueError(
                f"The best checkpoint, {best}, is damaged ({error}); for the weights of the last step: "
                "`--resume_from_checkpoint last --keep_best false`."
            ) from error


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
        ValueError: a loss that is no number, a checkpoint or result that cannot be written or read, another run's
            checkpoints in the folder, labels or images that cannot be used, too many broken images.
    """
    with StopRequest() as stop:
        return TrainingRun(args, accelerator, task, processor, train_data, validate, metric, teach, draw).run(stop)
