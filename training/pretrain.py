"""
Train a CBSA image classifier from scratch.

    accelerate launch training/pretrain.py --dataset_name ../shared/data/imagenette-128 --output_dir runs/imagenette

`--dataset_name` takes a hub id, a local folder or a Parquet file. See `--help` for the rest.
"""

import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from data import TrainingImages, find_columns, find_split, load_images, validation_images
from evaluation import evaluate_classifier
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    ViTImageProcessorPil,
    get_cosine_schedule_with_warmup,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cbsa_hf import PRESETS, preset_path
from cbsa_hf.modeling_cbsa import to_pair


CHECKPOINTS = "checkpoint-[0-9][0-9][0-9][0-9]"  # whole ones: those being written end in `.partial`


@dataclass
class Arguments:
    dataset_name: str = field(metadata={"help": "hub id, local folder or Parquet file"})
    output_dir: str = field(metadata={"help": "where checkpoints, logs and the trained model go"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration, where there are several"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    validation_split: str = field(default="validation", metadata={"help": "split to validate on after each epoch"})
    config_name: str = field(
        default="cbt-tiny", metadata={"help": f"one of {', '.join(PRESETS)}; or a configuration by hub id or path"}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "side in pixels that model and processor are for; default: as configured"}
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "side of a patch in pixels; default: as configured"}
    )
    crop_size: int | None = field(
        default=None, metadata={"help": "side of the training crops in pixels; default: image_size"}
    )
    min_crop_scale: float = field(default=0.25, metadata={"help": "smallest share of an image's area in a crop"})
    num_epochs: int = field(default=30, metadata={"help": "passes over the training split"})
    batch_size: int = field(default=64, metadata={"help": "images per step, over all processes together"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(default=0.05, metadata={"help": "decay of weight matrices; nothing else decays"})
    warmup_epochs: float = field(default=2.0, metadata={"help": "epochs of linear warm-up before the cosine"})
    label_smoothing: float = field(default=0.1, metadata={"help": "probability spread evenly over all classes"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    num_workers: int = field(default=1, metadata={"help": "processes that load images, per training process"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order and augmentation"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint folder, or `last` for the newest in output_dir"}
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels decay; norms, biases, step sizes and embeddings do not."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and name.rsplit(".")[-1] == "weight"
        (decayed if is_matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_config(args: Arguments, names: list[str]) -> PreTrainedConfig:
    """The configuration that the arguments describe, for those class names; a ValueError when there is none."""
    sizes = {"image_size": args.image_size, "patch_size": args.patch_size}
    try:
        config = AutoConfig.from_pretrained(
            preset_path(args.config_name) if args.config_name in PRESETS else args.config_name,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            **{name: value for name, value in sizes.items() if value is not None},
        )
        config.validate()  # what was changed after it was read, too
    except OSError as error:
        raise ValueError(
            f"`--config_name {args.config_name}` is neither one of {', '.join(PRESETS)}, nor a configuration that can "
            "be reached by that path or hub id."
        ) from error
    except StrictDataclassError as error:
        raise ValueError(f"This is no configuration of a model: {error.__cause__ or error}") from error
    return config


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


def check_loss(value: float, step: int):
    """A ValueError when it is not a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"The loss is {value} at step {step}; lower `--learning_rate`.")


def save_checkpoint(accelerator: Accelerator, output_dir: Path, progress: dict, keep: int = 2):
    """Write the whole state under a temporary name, rename it, and remove all but the newest `keep`."""
    final = output_dir / f"checkpoint-{progress['epoch']:04d}"
    partial = final.with_name(final.name + ".partial")
    accelerator.save_state(partial)
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(output_dir.glob(CHECKPOINTS))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def main(args: Arguments):
    started = time.time()
    accelerator = Accelerator(
        log_with="tensorboard",
        project_dir=args.output_dir,
        # `batch_size` is the global one: each process takes its slice of the same batch.
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    if args.batch_size % accelerator.num_processes:
        raise ValueError(
            f"`--batch_size {args.batch_size}` is not a multiple of the {accelerator.num_processes} processes."
        )
    set_seed(args.seed)
    output_dir = Path(args.output_dir)

    splits = load_images(args.dataset_name, args.dataset_config_name)
    train_split, validation_split = (find_split(splits, s) for s in (args.train_split, args.validation_split))
    _, label_column = find_columns(train_split)
    names = train_split.features[label_column].names
    config = build_config(args, names)
    model = AutoModelForImageClassification.from_config(config)
    height, width = to_pair(config.image_size)
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
    )

    crop_size = args.crop_size or height
    train_loader = DataLoader(
        TrainingImages(train_split, processor, crop_size, args.min_crop_scale, args.seed),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.num_workers,
    )
    validation_loader = DataLoader(
        validation_images(validation_split, processor), batch_size=args.batch_size, num_workers=args.num_workers
    )
    if len(train_loader) == 0:
        raise ValueError(f"{len(train_split)} training images are less than one batch of {args.batch_size}.")
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate)
    scheduler = get_cosine_schedule_with_warmup(
        optimizer,
        num_warmup_steps=math.ceil(args.warmup_epochs * len(train_loader)),
        num_training_steps=args.num_epochs * len(train_loader),
    )
    model, optimizer, scheduler, train_loader, validation_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, validation_loader
    )

    accelerator.init_trackers("pretrain", config=asdict(args))
    progress = {"epoch": 0, "step": 0, "seconds": 0.0, "accuracy": None, "loss": None}
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
        accelerator.load_state(checkpoint)
        progress = json.loads((checkpoint / "progress.json").read_text())
        accelerator.print(f"Resumed from {checkpoint}: {progress['epoch']} epochs done.")
    seconds_before = progress["seconds"]

    for epoch in range(progress["epoch"], args.num_epochs):
        model.train()
        train_loader.set_epoch(epoch)
        train_loader.dataset.set_epoch(epoch)
        bar = tqdm(train_loader, desc=f"epoch {epoch + 1}/{args.num_epochs}", disable=not accelerator.is_main_process)
        for batch in bar:
            logits = model(batch["pixel_values"], interpolate_pos_encoding=True).logits
            loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=args.label_smoothing)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress["step"] += 1
            if progress["step"] % 10 == 0:
                value = accelerator.gather(loss.detach()).mean().item()
                check_loss(value, progress["step"])
                bar.set_postfix(loss=f"{value:.3f}")
                accelerator.log({"train/loss": value, "train/lr": scheduler.get_last_lr()[0]}, step=progress["step"])
        metrics = evaluate_classifier(model, validation_loader, accelerator)
        check_loss(metrics["loss"], progress["step"])  # before a checkpoint is written over a good one
        accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=progress["step"])
        progress.update(metrics, epoch=epoch + 1, seconds=seconds_before + time.time() - started)
        accelerator.print("epoch {epoch}: validation accuracy {accuracy:.4f}, loss {loss:.4f}".format(**progress))
        save_checkpoint(accelerator, output_dir, progress)

    if accelerator.is_main_process:
        accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
        summary = {**progress, "processes": accelerator.num_processes, "arguments": asdict(args)}
        (output_dir / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        sys.exit(f"pretrain.py: {error}")
