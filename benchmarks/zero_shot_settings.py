"""
Score zero-shot segmentation with settings that were chosen on other images. The constants of the normalised cut and
the size of the input are chosen on one half of the images and scored on the other half, and the other way round.

    python benchmarks/zero_shot_settings.py --dataset_name ../shared/data/coco128-seg

The start is not what ships: most constants begin where they have no effect. Then the constants take turns, twice. Each
gets, of three or four values, the one with the highest sum of the two scores on the half. What ships is among them.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from benchmarks.workbench import table
from cbsa_hf import ZeroShotSegmenter, load_checkpoint
from cbsa_hf.segmentation import patch_grouping
from training.arguments import MIN_FOREGROUND, DataArguments, parse_arguments
from training.data.loading import find_split, load_images, read_names, select_masked
from training.evaluation.zero_shot import NUM_SEGMENTS, best_overlap, intersection_over_union


# The first value is that of the start.
VALUES = {
    "long_side": (192, 256, 320),
    "LANDMARKS": (8, 6, 12),
    "TEMPERATURE": (0.2, 0.05, 0.1, 0.4),
    "LOCALITY": (0.0, 1.0, 2.0, 4.0),
    "SECOND_LOOK": (1.0, 1 / 2, 2 / 3),
    "COMMON_SHARE": (0.0, 0.5, 1.0),
    "COLOUR_WEIGHT": (0.0, 0.15, 0.3),
    "FOREGROUND_VECTORS": (4, 6, 8),
    "CENTRE_WEIGHT": (0.0, 0.25, 0.5),
    "CLS_WEIGHT": (0.0, 0.25, 0.5),
}
TURNS = 2
LONG_SIDE = 256  # the default of `ZeroShotSegmenter`


@dataclass(kw_only=True)
class SplitArguments:
    """What is scored."""

    _argument_group_name = "what is scored"

    split: str = field(default="train", metadata={"help": "split to choose and to score on, or a part of one"})


@dataclass(kw_only=True)
class Arguments(SplitArguments, DataArguments):
    """Options of the script."""


class Scorer:
    """
    Scores of one method on images, each computed once.

    Args:
        samples: RGB images, and labels (height, width) of their size; 0 is background.
    """

    def __init__(self, samples: list[tuple[Image.Image, np.ndarray]]):
        self.samples = samples
        self.model, self.processor = load_checkpoint()
        self.score = cache(self.score)
        self.encode = cache(self.encode)

    def encode(self, index: int, long_side: int):
        """The encoding of an image."""
        return ZeroShotSegmenter(self.model, self.processor, long_side=long_side).encode(self.samples[index][0])

    def score(self, index: int, settings: tuple[tuple[str, float], ...]) -> tuple[float, float]:
        """Intersection over union of the foreground and best overlap of an image."""
        image, labels = self.samples[index]
        values = dict(settings)
        long_side = values.pop("long_side")
        segmenter = ZeroShotSegmenter(self.model, self.processor, num_segments=NUM_SEGMENTS, long_side=long_side)
        with ExitStack() as stack:
            for name, value in values.items():
                stack.enter_context(patch.object(patch_grouping, name, value))
            found = segmenter.segment(image, self.encode(index, long_side))
        return intersection_over_union(found.mask, labels > 0), best_overlap(found.labels, labels)

    def scores(self, indices: Sequence[int], settings: dict[str, float]) -> np.ndarray:
        """The two means over some images."""
        return np.nanmean([self.score(index, tuple(settings.items())) for index in indices], axis=0)


def choose(scorer: Scorer, indices: Sequence[int]) -> dict[str, float]:
    """The settings that score best on some images."""
    settings = {name: values[0] for name, values in VALUES.items()}
    for _ in range(TURNS):
        for name, values in tqdm(VALUES.items(), desc="constants"):
            candidates = [{**settings, name: value} for value in values]
            settings = max(candidates, key=lambda candidate: scorer.scores(indices, candidate).sum())
    return settings


def main(args: Arguments):
    """Print the settings chosen on each half, and the scores."""
    torch.set_num_threads(1)
    dataset = select_masked(find_split(load_images(args.dataset_name), args.split), args)
    samples = [(image.convert("RGB"), np.asarray(labels)) for image, labels in map(dict.values, dataset)]
    samples = [(image, labels) for image, labels in samples if (labels > 0).mean() >= MIN_FOREGROUND]
    scorer = Scorer(samples)
    everything = range(len(samples))
    halves = [everything[::2], everything[1::2]]
    shipped = {name: getattr(patch_grouping, name, LONG_SIDE) for name in VALUES}
    chosen = [choose(scorer, half) for half in halves]
    rows = [[name, *(f"{settings[name]:.3g}" for settings in (*chosen, shipped))] for name in VALUES]
    print(table(["", "chosen on even images", "on odd images", "shipped"], rows), "\n")

    (person,) = (number for number, name in read_names(None, args.dataset_name).items() if name == "person")
    people = [index for index, (_, labels) in enumerate(samples) if (labels == person).any()]
    others = [index for index in everything if index not in people]
    crossed = [scorer.scores(half, settings) for half, settings in zip(halves[::-1], chosen, strict=True)]
    rows = [
        ["chosen on the other half", len(samples), *np.average(crossed, axis=0, weights=[*map(len, halves[::-1])])],
        ["shipped", len(samples), *scorer.scores(everything, shipped)],
        ["shipped, photos with people", len(people), *scorer.scores(people, shipped)],
        ["shipped, photos without people", len(others), *scorer.scores(others, shipped)],
    ]
    rows = [[name, count, *(f"{value:.3f}" for value in values)] for name, count, *values in rows]
    print(table(["settings", "images", "IoU of the foreground", "best overlap of six"], rows))


if __name__ == "__main__":
    main(parse_arguments(Arguments))
