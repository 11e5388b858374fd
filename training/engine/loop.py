"""The training loop that all scripts share: a task, and the run that trains it."""

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from cbsa_hf.hub import push_checkpoint
from training.arguments import RunArguments
from training.data.labelled_images import LabelledImages
from training.data.streaming import WrongLength
from training.engine.interruption import FAILED, StopRequest, common_status, read_batches
from training.engine.optimization import build_optimizer, build_scheduler, parameter_groups
from training.engine.results import load_best, write_results
from training.engine.run_state import (
    DataIdentity,
    Progress,
    check_folder,
    checkpoint_path,
    prune_checkpoints,
    record_validation,
    resume,
    save_checkpoint,
)
from training.engine.setup import build_loader
from training.engine.tracking import RunLog


LOG_STEPS = 10


class Task(ABC):
    """
    What a run trains, on which images, and how it is validated.

    Attributes:
        losses: called with the tensors of a batch, it returns a dict of losses, of which `loss` is minimised; its
            `model` is the model to be saved.
        processor: the model's image processor.
        train_data: the training images.
        metric: name of the metric that the best weights are chosen by; larger is better.
    """

    losses: nn.Module
    processor: BaseImageProcessor
    train_data: LabelledImages
    metric: str

    def teach(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the losses are called with besides the batch: by default, nothing."""
        return {}

    @abstractmethod
    def evaluate(self, losses: nn.Module) -> dict[str, float]:
        """
        Metrics on the validation split.

        Args:
            losses: those of the task or their moving average, in evaluation mode.
        """

    def draw(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        """Pictures for the log by name, each (1, height, width, 3), uint8: by default, none."""
        return {}


def seed_step(seed: int, step: int, process: int):
    """Seed the random numbers of one step, so that a resumed run draws the same ones."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0]))


def check_finite(name: str, value: float, step: int):
    """Raises ValueError if the value is infinite or not a number."""
    if not math.isfinite(value):
        raise ValueError(f"The {name} is {value} at step {step}; lower `--learning_rate`. Older checkpoints are kept.")


def split_batch(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """The batch in equal parts, along the first dimension."""
    chunks = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return [{name: chunks[name][i] for name in batch} for i in range(parts)]


def take_step(
    args: RunArguments,
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batch: dict[str, torch.Tensor],
    teach: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """
    One step of the optimiser: forward and backward over the parts of the batch, then the update.

    Args:
        network: a task's losses, prepared by the accelerator, as are optimiser and scheduler.
        batch: tensors by name, (batch, ...).
        teach: see [`Task.teach`].

    Returns:
        The losses, means over the parts.
    """
    totals, parts = {}, args.gradient_accumulation_steps
    for i, part in enumerate(split_batch(batch, parts)):
        taught = teach(part["pixel_values"])
        with accelerator.no_sync(network) if i < parts - 1 else nullcontext():
            losses = network(**part, **taught)
            accelerator.backward(losses["loss"] / parts)
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach() / parts
    accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return totals


class TrainingRun:
    """
    A run, from its first step or from a checkpoint to its results: step, log, validate, save, finish.

    A run that was stopped and resumed ends with the same weights as one that was not. Whatever stops it, except a loss
    that is not finite, costs no step that was done: the run saves a checkpoint before each validation, and when a
    batch cannot be read.

    Args:
        args: the script's options.
        accelerator: from [`build_accelerator`].
        task: what to train.
    """

    def __init__(self, args: RunArguments, accelerator: Accelerator, task: Task):
        self.args, self.accelerator, self.task = args, accelerator, task
        self.started, self.output_dir = time.time(), Path(args.output_dir)
        readers = accelerator.num_processes if args.streaming else None
        self.data = DataIdentity(args.batch_size, len(task.train_data), task.train_data.sample(), readers)
        loader = build_loader(task.train_data, args, train=True)
        self.steps_per_epoch, self.num_steps = len(loader), args.num_epochs * len(loader)
        losses = task.losses
        encoder = getattr(losses.model.config, "backbone_config", None) or losses.model.config
        num_layers = getattr(encoder, "num_hidden_layers", losses.model.config.num_hidden_layers)
        layer_indices = getattr(encoder, "layer_indices", range(num_layers))  # a backbone shares no layers
        groups = parameter_groups(losses, layer_indices, args.learning_rate, args.weight_decay, args.layer_decay)
        optimizer = build_optimizer(args.optimizer, groups, args.learning_rate)
        warmup_steps = args.warmup_epochs * self.steps_per_epoch
        scheduler = build_scheduler(args.schedule, optimizer, self.num_steps, warmup_steps)
        self.average = None
        if args.ema_decay is not None:
            self.average = AveragedModel(
                losses.to(accelerator.device), multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True
            )
        self.losses, self.optimizer, self.scheduler, self.loader = accelerator.prepare(
            losses, optimizer, scheduler, loader
        )
        self.progress, self.seconds_before, self.saved_step = Progress(), 0.0, None
        self.run_log = RunLog(accelerator, self.output_dir)

    def run(self) -> dict:
        """
        Train to the end, or until a signal asks to stop. The output folder then holds a model that `from_pretrained`
        opens, its image processor and card, and `results.json`.

        Returns:
            The content of `results.json`.

        Raises:
            ValueError: if a loss is not finite, a checkpoint or the result cannot be read or written, the folder holds
                checkpoints of another run, or images or labels cannot be used.
        """
        with StopRequest() as self.stop:
            if self.args.resume_from_checkpoint is not None:
                self.resume()
            check_folder(self.output_dir, self.progress, self.args.keep_best)
            self.run_log.start(asdict(self.args), self.progress.step)
            with self.progress_bar() as self.bar:  # it ends its line before an error is printed
                self.train()
            results = self.finish()
            self.run_log.close()
        if self.run_log.error is not None:
            raise self.run_log.error
        return results

    def train(self):
        """All epochs that are left, with their validations."""
        if self.validation_is_due():  # the run that wrote the checkpoint stopped before its validation
            self.validate()
        elif self.args.resume_from_checkpoint is not None:  # or before it removed older checkpoints
            self.prune()
        self.log_epoch()
        while self.progress.step < self.num_steps:
            self.train_epoch()
            if self.validation_is_due():
                self.validate()
            self.log_epoch()
            self.draw_pictures()

    def progress_bar(self) -> tqdm:
        """A bar that counts images, on the main process."""
        return tqdm(
            total=self.num_steps * self.args.batch_size,
            initial=self.progress.step * self.args.batch_size,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            disable=not self.accelerator.is_main_process,
        )

    def resume(self):
        """
        Continue from the checkpoint that `--resume_from_checkpoint` names.

        Raises:
            ValueError: if there is no such checkpoint of this run, or it is beyond the run's end.
        """
        checkpoint, self.progress = resume(
            self.accelerator, self.args.resume_from_checkpoint, self.output_dir, self.average, self.data
        )
        step, self.seconds_before = self.progress.step, self.progress.seconds
        if step > self.num_steps:
            raise ValueError(
                f"{checkpoint} is at step {step}, and this run has {self.num_steps}: give a larger `--num_epochs`."
            )
        if checkpoint.resolve() == checkpoint_path(self.output_dir, step).resolve():
            self.saved_step = step
        self.accelerator.print(f"Resumed from {checkpoint}: {step} of {self.num_steps} steps done.")

    def train_epoch(self):
        """All steps up to the end of the epoch."""
        epoch, done = divmod(self.progress.step, self.steps_per_epoch)
        self.losses.train()
        self.loader.set_epoch(epoch)
        self.task.train_data.set_epoch(epoch)
        batches = read_batches(self.accelerator.skip_first_batches(self.loader, done) if done else self.loader)
        self.bar.set_description(f"epoch {epoch + 1}/{self.args.num_epochs}")
        for _ in range(done, self.steps_per_epoch):
            losses = self.step(self.next_batch(batches))
            step, every = self.progress.step, self.args.checkpointing_steps
            saves = every is not None and step % every == 0
            if step % LOG_STEPS == 0 or saves or step % self.steps_per_epoch == 0:
                self.log(losses)
            if saves:
                self.save()

    def next_batch(self, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """
        The next batch. If any process cannot read it, cannot write the log or is asked to stop, the run is saved and
        ends here.
        """
        batch, error, asked = None, self.run_log.error, time.time()
        try:
            batch = next(batches)
        except WrongLength:  # every process raises it; and no run with the right length could continue from here
            raise
        except ValueError as found:
            error = found
        self.progress.waited += time.time() - asked
        self.stop_if_asked(error)
        return batch

    def stop_if_asked(self, error: ValueError | None = None):
        """Save a checkpoint and end the run, if a signal asks for it or any process has met an error."""
        accelerator = self.accelerator
        status = common_status(accelerator, self.stop.status if error is None else FAILED)
        if not status:
            return
        step = self.progress.step
        if step or status != FAILED:
            self.save()
        self.bar.close()
        self.run_log.close()
        if error is not None:
            way_on = f" `--resume_from_checkpoint last` goes on from step {step}." if step else ""
            raise ValueError(f"{error}{way_on}") from error
        if status != FAILED:
            accelerator.print(f"Stopped at step {step}; `--resume_from_checkpoint last` goes on from there.")
        sys.exit(status)

    def step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Train on one batch, and return its losses."""
        args, accelerator, progress = self.args, self.accelerator, self.progress
        seed_step(args.seed, progress.step, accelerator.process_index)
        losses = take_step(args, accelerator, self.losses, self.optimizer, self.scheduler, batch, self.task.teach)
        if self.average is not None:
            self.average.update_parameters(accelerator.unwrap_model(self.losses, keep_torch_compile=False))
        progress.step += 1
        progress.seconds = self.seconds_before + time.time() - self.started
        self.bar.update(args.batch_size)
        return losses

    def log(self, losses: dict[str, torch.Tensor]):
        """
        Log the losses of the last step, means over all processes.

        Raises:
            ValueError: if the loss is not finite, or more images than `--max_corrupt` were broken.
        """
        progress = self.progress
        values = {name: self.accelerator.gather(loss).mean().item() for name, loss in losses.items()}
        progress.losses = dict(values)
        check_finite("loss", values["loss"], progress.step)  # before a checkpoint is written
        self.task.train_data.check()
        self.bar.set_postfix(loss=f"{values['loss']:.3f}")
        values |= {"lr": self.scheduler.get_last_lr()[-1], "data_wait": progress.waited / progress.seconds}
        self.run_log.write({f"train/{name}": value for name, value in values.items()}, progress.step)

    def log_epoch(self):
        """At the end of an epoch, add its row to the log: the losses of its last step, and its validation if any."""
        progress = self.progress
        epoch, rest = divmod(progress.step, self.steps_per_epoch)
        if epoch == 0 or rest > 0:
            return
        row = {"epoch": epoch, "step": progress.step, "seconds": round(progress.seconds, 3)}
        row |= {f"train/{name}": value for name, value in progress.losses.items()}
        if progress.validated_step == progress.step:
            row |= {f"validation/{name}": value for name, value in progress.metrics.items()}
        self.run_log.write_epoch(row)

    def save(self):
        """
        Write a checkpoint, unless there is one of this step.

        Raises:
            ValueError: if a weight is not finite, or the checkpoint cannot be written; older checkpoints are kept.
        """
        if self.saved_step == self.progress.step:
            return
        for name, weight in self.losses.named_parameters():
            share = weight.to_local() if hasattr(weight, "to_local") else weight  # of sharded weights
            check_finite(f"largest weight of {name}", share.detach().abs().max().item(), self.progress.step)
        save_checkpoint(self.accelerator, self.output_dir, self.progress, self.average, self.data)
        self.saved_step = self.progress.step
        if not self.validation_is_due():  # the validation decides which checkpoint is the best
            self.prune()

    def prune(self):
        """Remove the checkpoints that are neither among the newest nor the best."""
        if self.accelerator.is_main_process:
            prune_checkpoints(self.output_dir, self.progress, self.args.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def validation_is_due(self) -> bool:
        """Whether the run is at an epoch's end that is to be validated and has not been."""
        epoch, rest = divmod(self.progress.step, self.steps_per_epoch)
        at_its_time = (epoch > 0 and epoch % self.args.validation_epochs == 0) or self.progress.step == self.num_steps
        return rest == 0 and at_its_time and self.progress.validated_step != self.progress.step

    @property
    def validated(self) -> nn.Module:
        """The losses, or their moving average, in evaluation mode: what is validated and drawn."""
        return (self.losses if self.average is None else self.average.module).eval()

    def validate(self):
        """
        Save a checkpoint, validate, and add the metrics to the checkpoint.

        Raises:
            ValueError: if a metric is not finite, or the validation images cannot be used.
        """
        accelerator, progress, network = self.accelerator, self.progress, self.validated
        self.save()
        self.stop_if_asked()
        if accelerator.num_processes > 1:
            # In each process, batch norm saw another part of the last batch. Saved are the buffers of the first one.
            broadcast(dict(network.named_buffers()))
        metrics = self.task.evaluate(network)
        for name in metrics.keys() & {self.task.metric, "loss"}:
            check_finite(name, metrics[name], progress.step)
        progress.metrics, progress.validated_step = metrics, progress.step
        if progress.best is None or metrics[self.task.metric] > progress.best:
            progress.best, progress.best_step = metrics[self.task.metric], progress.step
        progress.seconds = self.seconds_before + time.time() - self.started
        self.run_log.write({f"validation/{name}": value for name, value in metrics.items()}, progress.step)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        accelerator.print(f"\nepoch {progress.step // self.steps_per_epoch}: {shown}")
        if accelerator.is_main_process:
            record_validation(self.output_dir, progress)
        self.prune()

    def draw_pictures(self):
        """Log pictures of validation images, every `--picture_epochs`."""
        every, epoch = self.args.picture_epochs, self.progress.step // self.steps_per_epoch
        if every and epoch % every == 0:
            model = self.accelerator.unwrap_model(self.validated, keep_torch_compile=False).model
            self.run_log.draw(self.task.draw(model), self.progress.step)

    def finish(self) -> dict:
        """
        Write the result, and publish it if asked to.

        Returns:
            The content of `results.json`.

        Raises:
            ValueError: if the result cannot be written, or the best checkpoint is damaged.
        """
        args, accelerator, progress = self.args, self.accelerator, self.progress
        state = accelerator.get_state_dict(self.losses)  # every process calls it, since it gathers sharded weights
        results = {**asdict(progress), "processes": accelerator.num_processes, "arguments": asdict(args)}
        if accelerator.is_main_process:
            if args.keep_best and progress.best_step != progress.step:
                averaged = self.average is not None
                state, results["metrics"] = load_best(self.output_dir, progress.best_step, averaged)
            elif self.average is not None:
                state = self.average.state_dict()
            model = accelerator.unwrap_model(self.losses, keep_torch_compile=False).model
            write_results(self.output_dir, model, state, self.task.processor, results, self.task.metric)
            if args.push_to_hub is not None:
                accelerator.print(f"Published as {push_checkpoint(args.push_to_hub, args.output_dir)}")
        accelerator.wait_for_everyone()
        return results
