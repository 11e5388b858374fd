"""What a run needs before its first step: Accelerate, the output folder, the splits and their loaders."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType, set_seed
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel

from training.arguments import RunArguments
from training.data.labelled_images import LabelledImages
from training.data.loading import find_split, load_images
from training.data.streaming import StreamedRows, sound_rows
from training.engine.interruption import outlive_interruption
from training.engine.memory import keep_freed_memory
from training.engine.optimization import STATES
from training.engine.output import check_free, open_output
from training.engine.run_state import CHECKPOINTS


OVERHEAD = 2**16  # bytes of a checkpoint beside its weights: headers, random states
UNSHARDED = {  # options that FSDP does not work with, and why
    "ema_decay": "since every process would hold the whole average, whose memory sharding is to spare",
    "keep_best": "since a checkpoint then holds shards, of which no process can make the result alone",
}
IN_MEMORY = ("class_balanced", "cutmix_alpha", "mixup_alpha", "teacher_cache")  # options that streaming rules out


def build_accelerator(args: RunArguments) -> Accelerator:
    """
    Start Accelerate in the way that every script uses it, and seed all random numbers.

    Raises:
        ValueError: if the batch cannot be divided among processes and parts, or an option does not work with FSDP.
    """
    keep_freed_memory()
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
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if not sharded and os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise ValueError(
            f"FSDP shards weights on GPUs, and this run is on {accelerator.device.type!r}, where Accelerate leaves "
            "FSDP out in silence: use a configuration without it."
        )
    for name, reason in UNSHARDED.items():
        if sharded and getattr(args, name):
            raise ValueError(f"`--{name}` does not work with FSDP, {reason}: leave it out, or do not shard.")
    set_seed(args.seed)
    return accelerator


@contextmanager
def start_run(args: RunArguments) -> Iterator[Accelerator]:
    """
    Start Accelerate and, in the main process, lock the output folder until the context ends.

    Raises:
        ValueError: see [`build_accelerator`] and [`open_output`].
    """
    accelerator = build_accelerator(args)
    with open_output(args.output_dir) if accelerator.is_main_process else nullcontext():
        yield accelerator


def empty_model(auto_class: type, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: the shapes of its weights, without memory for them."""
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=False)


def check_room(args: RunArguments, accelerator: Accelerator, model: nn.Module):
    """
    Raises ValueError if two checkpoints do not fit on the disk; one that is there already counts.

    Args:
        model: may be one without memory for its weights, see [`empty_model`]. The classes of the data and the heads
            that learn from a teacher may be missing: they add little.
    """
    if not accelerator.is_main_process:
        return
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    copies = 1 + STATES[args.optimizer] + (args.ema_decay is not None)
    folder = Path(args.output_dir)
    missing = 2 - min(1, len(list(folder.glob(CHECKPOINTS))))
    check_free(folder, missing * (copies * weights + OVERHEAD))


def choose_splits(splits: DatasetDict | IterableDatasetDict, args: RunArguments) -> list[Dataset | IterableDataset]:
    """
    The training and the validation split. With `--train_val_split`, each image of the training split belongs to one of
    the two, whatever the seed.

    Raises:
        ValueError: if there is no such split, or the share is none.
    """
    train, share = find_split(splits, args.train_split), args.train_val_split
    if share is not None:
        if args.streaming or not 0 < share < 1:
            raise ValueError(
                f"`--train_val_split {share}` has to be between 0 and 1, and needs a split that is no stream."
            )
        parts = train.train_test_split(share, seed=0)
        return [parts["train"], parts["test"]]
    try:
        return [train, find_split(splits, args.validation_split)]
    except ValueError as error:
        raise ValueError(f"{error} `--train_val_split 0.1` validates on a tenth of the training split.") from error


def load_splits(
    args: RunArguments, select: Callable[[Dataset, RunArguments], Dataset]
) -> tuple[Dataset | StreamedRows, Dataset]:
    """
    The training and the validation split, each with two columns: the image, and the label or mask.

    Args:
        select: leaves the two columns of a split, [`select_labelled`] or [`select_masked`].

    Raises:
        ValueError: if there is no such data set, split or column, it is damaged, or an option does not work with
            streaming.
    """
    splits = load_images(args.dataset_name, args.dataset_config_name, args.streaming, args.dataset_revision)
    train, validation = (select(split, args) for split in choose_splits(splits, args))
    if args.streaming:
        for name in IN_MEMORY:
            if getattr(args, name, None):
                raise ValueError(f"`--{name}` needs any image at any time, which `--streaming` does not give.")
        state = PartialState()
        train = StreamedRows(
            train, args.num_train_images, args.seed, args.batch_size, state.process_index, state.num_processes
        )
        validation = Dataset.from_list(list(sound_rows(validation.decode(False))), features=validation.features)
    return train, validation


def build_loader(dataset: LabelledImages, args: RunArguments, train: bool) -> DataLoader:
    """
    A loader of batches of the global size. For training it shuffles and drops the last, smaller batch.

    Raises:
        ValueError: if the training images are fewer than one batch.
    """
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
