"""
Score a checkpoint: accuracy of its classifier, mean IoU of its segmenter, or how well it segments images without ever
having seen a mask.

    python training/score.py --dataset_name ../shared/data/imagenette-128
    python training/score.py --task semantic-segmentation --dataset_name ../shared/data/camvid --split test
    python training/score.py --task zero-shot-segmentation --dataset_name ../shared/data/coco128-seg --split train
"""

import json
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

from arguments import DataArguments, parse_arguments
from cbsa_hf import SlidingWindowSegmenter, load_checkpoint
from data.classification import ValidationImages
from data.labelled_images import check_labels
from data.loading import class_names, find_columns, find_mask_columns, find_split, load_images
from data.segmentation import MaskedImages, read_names, read_size
from engine.interruption import exit_with_a_sentence
from engine.output import write_file
from evaluation.scores import evaluate_classifier, evaluate_segmenter
from evaluation.zero_shot import MIN_FOREGROUND, build_segmenters, evaluate_zero_shot, model_results, trivial_results
from tasks.segmentation import draw_predictions


TASKS = ("image-classification", "semantic-segmentation", "zero-shot-segmentation")
# Of the options, those that have an effect on some tasks only.
TASKS_OF_OPTIONS = {
    "batch_size": TASKS[:1],
    "reduce_labels": TASKS[1:2],
    "stride": TASKS[1:2],
    "scales": TASKS[1:2],
    "flip": TASKS[1:2],
    "strip": TASKS[1:2],
    "min_foreground": TASKS[2:],
    "sharp": TASKS[1:],
}


@dataclass(kw_only=True)
class Arguments(DataArguments):
    task: str = field(default=TASKS[0], metadata={"help": "what to score", "choices": TASKS})
    checkpoint: str | None = field(default=None, metadata={"help": "folder or hub id; default: the shipped one"})
    split: str = field(default="validation", metadata={"help": "split to score on"})
    batch_size: int = field(default=64, metadata={"help": "images per batch, over all processes together"})
    image_size: int | None = field(
        default=None, metadata={"help": "side, or long side for masks, in pixels; default: as the checkpoint says"}
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "whether label 0 does not count and the others move down by one (ADE20K)"}
    )
    stride: list[int] | None = field(
        default=None,
        metadata={
            "help": "pixels down and across from one window of semantic segmentation to the next; default: two thirds"
        },
    )
    scales: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "factors on the image's size; semantic segmentation averages over them"},
    )
    flip: bool = field(default=False, metadata={"help": "whether semantic segmentation also looks at mirrored images"})
    min_foreground: float = field(default=MIN_FOREGROUND, metadata={"help": "least foreground that counts"})
    sharp: bool = field(default=False, metadata={"help": "whether masks follow the edges of the image"})
    random_weights: bool = field(
        default=False, metadata={"help": "score the checkpoint's configuration with random weights, seed 0"}
    )
    strip: str | None = field(
        default=None, metadata={"help": "PNG to draw four predictions of semantic segmentation and their mistakes in"}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write the numbers to"})
    force: bool = field(default=False, metadata={"help": "replace what `--strip` and `--output` name if it exists"})


def check_effects(args: Arguments):
    """A ValueError for an option of another task."""
    if args.task not in TASKS:
        raise ValueError(f"`--task` is {args.task!r}; choose one of {', '.join(TASKS)}.")
    defaults = Arguments(dataset_name=args.dataset_name)
    for name, tasks in TASKS_OF_OPTIONS.items():
        if args.task not in tasks and getattr(args, name) != getattr(defaults, name):
            raise ValueError(f"`--{name}` has no effect with `--task {args.task}`, only with {' or '.join(tasks)}.")


def check_writable(path: str, force: bool):
    """A ValueError when no file can be written under that name, or one is there that must not be replaced."""
    if Path(path).is_file() and not force:
        raise ValueError(f"{path} exists; name another file, or give --force to replace it.")
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}.") from error


def check_classes(names: list[str], id2label: dict[int, str]):
    """
    A ValueError for the first class of the data that is another in the model. Case and underscores do not count, and a
    number in place of a name fits any.
    """
    for i, name in enumerate(names):
        own = id2label.get(i)
        if own is None:
            raise ValueError(f"The data has {len(names)} classes, the model {len(id2label)}.")
        same = name.casefold().replace("_", " ") == own.casefold().replace("_", " ")
        if not same and {str(i), f"LABEL_{i}"}.isdisjoint({name, own}):
            raise ValueError(f"Class {i} of the data is {name!r}, of the model {own!r}; score on the model's classes.")


def main(args: Arguments):
    for path in (args.output, args.strip):
        if path is not None:
            check_writable(path, args.force)
    check_effects(args)
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    if args.task == "zero-shot-segmentation" and accelerator.num_processes > 1:
        raise ValueError(f"`--task {args.task}` is for one process, not {accelerator.num_processes}.")
    kind = "semantic-segmentation" if args.task == "semantic-segmentation" else "image-classification"
    model, processor = load_checkpoint(args.checkpoint, kind)
    if args.random_weights:
        torch.manual_seed(0)
        model = type(model)(model.config).eval()
    dataset = find_split(load_images(args.dataset_name, args.dataset_config_name), args.split)
    find = find_columns if args.task == "image-classification" else find_mask_columns
    dataset = dataset.select_columns(find(dataset, args.image_column, args.label_column))
    if args.task == "image-classification":
        if args.image_size is not None:
            processor.size = {"height": args.image_size, "width": args.image_size}
        check_classes(class_names(dataset), model.config.id2label)
        check_labels(dataset, args.split, warns=False)
        images = ValidationImages(dataset, args.max_corrupt, processor)
        model, loader = accelerator.prepare(model, DataLoader(images, batch_size=args.batch_size))
        results = evaluate_classifier(
            lambda pixel_values: model(pixel_values, interpolate_pos_encoding=True).logits, loader, accelerator
        )
    elif args.task == "semantic-segmentation":
        if (Path(args.dataset_name) / "id2label.json").exists():
            names = read_names(None, args.dataset_name)
            check_classes([names[i] for i in range(len(names))], model.config.id2label)
        images = MaskedImages(dataset, args.max_corrupt, model.config.num_labels, args.reduce_labels)
        segmenter = SlidingWindowSegmenter(
            model.to(accelerator.device),
            processor,
            stride=None if args.stride is None else read_size(args.stride),
            long_side=args.image_size,
            scales=args.scales,
            flip=args.flip,
            sharp=args.sharp,
        )
        results = evaluate_segmenter(segmenter, images.read, len(images), accelerator)
        if args.strip is not None and accelerator.is_main_process:
            strip = BytesIO()
            draw_predictions(segmenter, images).save(strip, format="PNG")
            write_file(Path(args.strip), strip.getvalue())
    else:
        options = {"sharp": args.sharp} | ({} if args.image_size is None else {"long_side": args.image_size})
        images = MaskedImages(dataset, args.max_corrupt, num_labels=256, reduce_labels=False)
        segmenters = build_segmenters(model.to(accelerator.device), processor, **options)
        results = evaluate_zero_shot(
            lambda image: (*model_results(segmenters, image), *trivial_results(image)),
            images.readable(),
            args.min_foreground,
        )
    images.check()
    if accelerator.is_main_process:
        for name, value in results.items():
            print(f"{name:40} {value:.4f}" if isinstance(value, float) else f"{name:40} {value}")
        if args.output is not None:
            write_file(Path(args.output), json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    with exit_with_a_sentence():
        main(parse_arguments(Arguments))
