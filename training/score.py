"""
Score a checkpoint: the accuracy of a classifier, the mean IoU of a segmenter, or zero-shot segmentation with a
classifier that has never seen a mask.

    python training/score.py --dataset_name ../shared/data/imagenette-128
    python training/score.py --task semantic-segmentation --dataset_name ../shared/data/camvid --split test
    python training/score.py --task zero-shot-segmentation --dataset_name ../shared/data/coco128-seg --split train
"""

import json
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel

from cbsa_hf import SlidingWindowSegmenter, load_checkpoint
from training.arguments import ScoringArguments, parse_arguments
from training.data.classification import ValidationImages
from training.data.labelled_images import check_labels
from training.data.loading import class_names, find_split, load_images, read_names, select_labelled, select_masked
from training.data.segmentation import SegmentationDataset, read_size
from training.engine.interruption import exit_with_a_sentence
from training.engine.output import write_file
from training.evaluation.scores import evaluate_classifier, evaluate_segmenter
from training.evaluation.zero_shot import build_segmenters, evaluate_zero_shot, model_results, trivial_results
from training.tasks.segmentation import draw_predictions


def check_writable(path: str, force: bool):
    """
    Raises ValueError if no file can be written under that name, or a file is there already.

    Args:
        path: name of the file.
        force: allow to replace a file.
    """
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
    Raises ValueError if a class of the data is another one in the model. Upper and lower case and underscores make no
    difference, and a number in place of a name fits any class.
    """
    for i, name in enumerate(names):
        own = id2label.get(i)
        if own is None:
            raise ValueError(f"The data has {len(names)} classes, the model {len(id2label)}.")
        same = name.casefold().replace("_", " ") == own.casefold().replace("_", " ")
        if not same and {str(i), f"LABEL_{i}"}.isdisjoint({name, own}):
            raise ValueError(f"Class {i} of the data is {name!r}, of the model {own!r}; score on the model's classes.")


def load_model(args: ScoringArguments) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The checkpoint's model and image processor; with `--random_weights`, the model is initialised with seed 0."""
    segments = args.task == "semantic-segmentation"
    model, processor = load_checkpoint(args.checkpoint, args.task if segments else "image-classification")
    if args.random_weights:
        torch.manual_seed(0)
        model = type(model)(model.config).eval()
    return model, processor


def load_split(args: ScoringArguments) -> Dataset:
    """The split to score on, with two columns: the image, and the label or mask."""
    splits = load_images(args.dataset_name, args.dataset_config_name, revision=args.dataset_revision)
    select = select_labelled if args.task == "image-classification" else select_masked
    return select(find_split(splits, args.split), args)


def score_classifier(
    args: ScoringArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: Dataset,
) -> dict[str, float]:
    """Accuracy and loss."""
    if args.image_size is not None:
        processor.size = {"height": args.image_size, "width": args.image_size}
    check_classes(class_names(dataset), model.config.id2label)
    check_labels(dataset, args.split, warns=False)
    images = ValidationImages(dataset, args.max_corrupt, processor)
    model, loader = accelerator.prepare(model, DataLoader(images, batch_size=args.batch_size))
    results = evaluate_classifier(
        lambda pixel_values: model(pixel_values, interpolate_pos_encoding=True).logits, loader, accelerator
    )
    images.check()
    return results


def score_segmenter(
    args: ScoringArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: Dataset,
) -> dict[str, float]:
    """Mean IoU and the IoU of each class; draws `--strip`."""
    if args.id2label is not None or (Path(args.dataset_name) / "id2label.json").exists():
        names = read_names(args.id2label, args.dataset_name)
        check_classes([names[i] for i in range(len(names))], model.config.id2label)
    config = model.config
    images = SegmentationDataset(dataset, args.max_corrupt, config.num_labels, args.reduce_labels, config.num_channels)
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
    images.check()
    return results


def score_zero_shot(
    args: ScoringArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: Dataset,
) -> dict[str, float]:
    """Every method of zero-shot segmentation, and segmentations that need no model."""
    options = {"sharp": args.sharp} | ({} if args.image_size is None else {"long_side": args.image_size})
    if model.config.num_channels != 3:
        raise ValueError(
            f"`--task {args.task}` compares methods for photos; the model takes {model.config.num_channels} channels."
        )
    images = SegmentationDataset(dataset, args.max_corrupt, num_labels=256, reduce_labels=False)
    segmenters = build_segmenters(model.to(accelerator.device), processor, **options)
    results = evaluate_zero_shot(
        lambda image: (*model_results(segmenters, image), *trivial_results(image)),
        images.readable(),
        args.min_foreground,
    )
    images.check()
    return results


SCORES = {
    "image-classification": score_classifier,
    "semantic-segmentation": score_segmenter,
    "zero-shot-segmentation": score_zero_shot,
}


def main(args: ScoringArguments):
    """Score a checkpoint, and print the scores or write them to a file."""
    for path in (args.output, args.strip):
        if path is not None:
            check_writable(path, args.force)
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    if args.task == "zero-shot-segmentation" and accelerator.num_processes > 1:
        raise ValueError(f"`--task {args.task}` is for one process, not {accelerator.num_processes}.")
    model, processor = load_model(args)
    results = SCORES[args.task](args, accelerator, model, processor, load_split(args))
    if accelerator.is_main_process:
        for name, value in results.items():
            print(f"{name:40} {value:.4f}" if isinstance(value, float) else f"{name:40} {value}")
        if args.output is not None:
            write_file(Path(args.output), json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    with exit_with_a_sentence():
        main(parse_arguments(ScoringArguments))
