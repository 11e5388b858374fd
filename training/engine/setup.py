"""What a run needs before its first step: Accelerate, the output folder, the splits and their loaders."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, set_seed
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel

from training.arguments import RunArguments
from training.data.labelled_images import LabelledImages
from training.data.loading import find_split, load_images
from training.data.streaming import StreamedRows
from training.engine.interruption import outlive_interruption
from training.engine.memory import keep_freed_memory
from training.engine.optimization import STATES
from training.engine.output import check_free, open_output
from training.engine.run_state import CHECKPOINTS


OVERHEAD = 2**16  # bytes of a checkpoint beside its weights: headers, random states
UNSHARDED = ("ema_decay", "keep_best")  # options that FSDP does not work with
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
    for name in UNSHARDED:
        if getattr(args, name) and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(f"`--{name}` does not work with weights that FSDP shards; leave it out, or do not shard.")
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


def load_splits(
    args: RunArguments, find_columns: Callable[[Dataset, str | None, str | None], list[str]]
) -> tuple[Dataset | StreamedRows, Dataset]:
    """
    The training and the validation split, each with two columns: the image, and the label or mask.

    Args:
        find_columns: returns the names of the two columns of a split; see [`training.data.loading`].

    Raises:
        ValueError: if there is no such data set, split or column, or an option does not work with streaming.
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
