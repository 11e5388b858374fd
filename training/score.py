"""
Score a checkpoint: accuracy of its classifier, or how well its attention alone finds the foreground.

    python training/score.py --dataset_name ../shared/data/imagenette-128
    python training/score.py --task zero-shot-segmentation --dataset_name ../shared/data/coco128-seg --split train
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from data import ValidationImages, find_mask_columns, find_split, load_images
from datasets import Dataset
from evaluation import evaluate_classifier
from scipy.cluster.vq import kmeans2
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, HfArgumentParser, PreTrainedModel

from cbsa_hf import ZeroShotSegmenter, load_checkpoint
from cbsa_hf.images import to_rgb
from cbsa_hf.zero_shot import keep_mass


TASKS = ("image-classification", "zero-shot-segmentation")


@dataclass
class Arguments:
    dataset_name: str = field(metadata={"help": "hub id, local folder or Parquet file"})
    task: str = field(default=TASKS[0], metadata={"help": "what to score", "choices": TASKS})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration, where there are several"})
    checkpoint: str | None = field(default=None, metadata={"help": "folder or hub id; default: the shipped one"})
    split: str = field(default="validation", metadata={"help": "split to score on"})
    batch_size: int = field(default=64, metadata={"help": "images per batch, over all processes together"})
    image_size: int | None = field(
        default=None, metadata={"help": "side, or long side for masks, in pixels; default: as the checkpoint says"}
    )
    min_foreground: float = field(default=0.02, metadata={"help": "images with less foreground are left out"})
    max_corrupt: int = field(default=10, metadata={"help": "unreadable images that are skipped before the run stops"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the numbers to"})


def intersection_over_union(mask: np.ndarray, truth: np.ndarray) -> float:
    """Of two bool masks of one shape, at least one of them not empty."""
    return float((mask & truth).sum() / (mask | truth).sum())


def centred_ellipse(shape: tuple[int, int], share: float = 0.75) -> np.ndarray:
    """An ellipse in the middle whose axes are that share of the sides."""
    rows, columns = (np.linspace(-1, 1, side) for side in shape)
    return (rows[:, None] / share) ** 2 + (columns[None, :] / share) ** 2 <= 1


def two_colours(pixels: np.ndarray) -> np.ndarray:
    """Two-colour k-means; the cluster that holds most of the image's border is background."""
    _, labels = kmeans2(pixels.reshape(-1, 3).astype(np.float64), 2, minit="++", seed=0)
    labels = labels.reshape(pixels.shape[:2]).astype(bool)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return ~labels if border.mean() > 0.5 else labels


def score_zero_shot(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: Dataset,
    min_foreground: float,
    long_side: int | None,
) -> dict[str, float]:
    """
    Mean intersection over union of the foreground, each image counted once; any label but 0 is foreground.

    `attention` and `attention, head i` fix the method before seeing the truth. `attention, best head` lets the truth
    choose the head for each image, as DINO and CRATE report it: an oracle. The rest are trivial.
    """
    segmenter = ZeroShotSegmenter(model, processor, **({} if long_side is None else {"long_side": long_side}))
    image_column, mask_column = find_mask_columns(dataset)
    scores = []
    for row in tqdm(dataset, desc="images"):
        image, truth = to_rgb(row[image_column]), np.asarray(row[mask_column]) > 0
        if truth.mean() < min_foreground:
            continue
        maps = segmenter.saliency(image)
        masks = {"attention": keep_mass(maps.mean(0), segmenter.mass)}
        masks |= {f"attention, head {i}": keep_mass(head, segmenter.mass) for i, head in enumerate(maps)}
        masks["everything"] = np.ones_like(truth)
        masks["centred ellipse"] = centred_ellipse(truth.shape)
        masks["two colours"] = two_colours(np.asarray(image))
        score = {name: intersection_over_union(mask, truth) for name, mask in masks.items()}
        score["attention, best head"] = max(score[f"attention, head {i}"] for i in range(len(maps)))
        scores.append(score)
    if not scores:
        raise ValueError(f"No image has at least {min_foreground:.0%} foreground.")
    return {"images": len(scores)} | {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def main(args: Arguments):
    accelerator = Accelerator()
    model, processor = load_checkpoint(args.checkpoint)
    dataset = find_split(load_images(args.dataset_name, args.dataset_config_name), args.split)
    if args.task == "image-classification":
        if args.image_size is not None:
            processor.size = {"height": args.image_size, "width": args.image_size}
        images = ValidationImages(dataset, args.max_corrupt, processor)
        model, loader = accelerator.prepare(model, DataLoader(images, batch_size=args.batch_size))
        results = evaluate_classifier(
            lambda pixel_values: model(pixel_values, interpolate_pos_encoding=True).logits, loader, accelerator
        )
        images.check()
    else:
        results = score_zero_shot(model, processor, dataset, args.min_foreground, args.image_size)
    if accelerator.is_main_process:
        for name, value in results.items():
            print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
        if args.output is not None:
            Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        sys.exit(f"score.py: {error}")
