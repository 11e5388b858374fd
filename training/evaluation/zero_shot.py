"""
Zero-shot segmentation against masks: every method of [`ZeroShotSegmenter`], and what is possible without any model.

Methods and rules are fixed before the masks are seen, but for what is named an oracle.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image
from scipy.cluster.vq import kmeans2
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from cbsa_hf import ZeroShotSegmenter


IGNORED = 255  # no label is known there
NUM_SEGMENTS = 6
MIN_SHARE = 0.01  # of an image, for a class to be counted
MIN_FOREGROUND = 0.02  # of an image, for it to be counted
MethodResults = Iterator[tuple[str, np.ndarray | None, np.ndarray | None]]


def intersection_over_union(mask: np.ndarray, truth: np.ndarray) -> float:
    """Of two bool masks of one shape, at least one of them not empty."""
    return float((mask & truth).sum() / (mask | truth).sum())


def best_overlap(segments: np.ndarray, labels: np.ndarray) -> float:
    """
    For each class that covers enough of the image the best intersection over union of any segment; the mean over the
    classes, NaN if there are none.

    Args:
        segments: the segment of each pixel, any shape.
        labels: its class, 0 where there is none.
    """
    pairs, counts = np.unique(np.stack([labels.ravel(), segments.ravel()]), axis=1, return_counts=True)
    best = {}
    for (label, segment), both in zip(pairs.T, counts, strict=True):
        of_class, of_segment = counts[pairs[0] == label].sum(), counts[pairs[1] == segment].sum()
        if label != 0 and of_class >= MIN_SHARE * labels.size:
            best[label] = max(best.get(label, 0), both / (of_class + of_segment - both))
    return float(np.mean(list(best.values()))) if best else float("nan")


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


def coordinates(shape: tuple[int, int]) -> np.ndarray:
    """(height, width, 2): row and column of each pixel, in shares of the longer side."""
    return np.stack(np.mgrid[: shape[0], : shape[1]], axis=-1) / max(shape)


def colours_and_places(pixels: np.ndarray, weight: float = 1.0) -> np.ndarray:
    """k-means on colour, from 0 to 1, and position times a weight: the segment of each pixel."""
    points = np.concatenate([pixels / 255, weight * coordinates(pixels.shape[:2])], axis=-1).reshape(-1, 5)
    return kmeans2(points, NUM_SEGMENTS, minit="++", seed=0)[1].reshape(pixels.shape[:2])


def two_by_three(shape: tuple[int, int]) -> np.ndarray:
    """A grid of 2 rows and 3 columns: the segment of each pixel."""
    rows, columns = (np.arange(side) * count // side for side, count in zip(shape, (2, 3), strict=True))
    return 3 * rows[:, None] + columns


def trivial_results(image: Image.Image) -> MethodResults:
    """Name, foreground mask and segments of what needs no model."""
    pixels = np.asarray(image)
    shape = pixels.shape[:2]
    yield "everything", np.ones(shape, dtype=bool), None
    yield "centred ellipse", centred_ellipse(shape), None
    yield "two colours", two_colours(pixels), None
    yield "2 x 3 grid", None, two_by_three(shape)
    yield "k-means on colour, position", None, colours_and_places(pixels)


def read_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Labels (height, width) -> the same, 0 where there is nothing, and where they are known: all but 255, unless 0 and
    255 are the only ones, black and white.
    """
    if np.isin(labels, (0, IGNORED)).all():
        return (labels == IGNORED).astype(np.int64), np.ones(labels.shape, dtype=bool)
    return labels, labels != IGNORED


def build_segmenters(model: PreTrainedModel, processor: BaseImageProcessor, **options) -> dict[str, ZeroShotSegmenter]:
    """
    Every method by its name: the affinity of `ncut` as it is by default, and of the attention alone; the attention of
    CLS on average, and of each head.
    """
    methods = {
        "ncut": {},
        "ncut, attention alone": {"attention_weight": 1.0},
        "representatives": {},
        "attention": {},
        **{f"attention, head {head}": {"head": head} for head in range(model.config.num_attention_heads)},
    }
    return {
        name: ZeroShotSegmenter(model, processor, name.split(",")[0], num_segments=NUM_SEGMENTS, **special, **options)
        for name, special in methods.items()
    }


def model_results(segmenters: dict[str, ZeroShotSegmenter], image: Image.Image) -> MethodResults:
    """As [`trivial_results`]."""
    for name, segmenter in segmenters.items():
        found = segmenter(image)
        yield name, found.mask, found.labels


def evaluate_zero_shot(
    segment: Callable[[Image.Image], MethodResults],
    samples: Iterable[tuple[Image.Image, np.ndarray]],
    min_foreground: float = MIN_FOREGROUND,
) -> dict[str, float]:
    """
    Means over the images, each counted once. Under a method's name the intersection over union of the foreground, any
    label but 0; under the name with "best overlap" what [`best_overlap`] says of its segments, if anything.

    Where single heads are among the methods, `attention, best head (oracle)` lets the masks choose the head for each
    image, as DINO and CRATE do; all else is fixed before they are seen.

    Args:
        segment: image -> what [`model_results`] and [`trivial_results`] yield.
        samples: RGB images, and labels (height, width) of their size; see [`read_labels`].
        min_foreground: images with a smaller share are left out.

    Returns:
        The means by name, and `images`, how many were counted.

    Raises:
        ValueError: labels of another size than their image; no image has enough foreground.
    """
    scores = []
    for image, labels in tqdm(samples, desc="images"):
        if labels.shape != (image.height, image.width):
            raise ValueError(
                f"A mask has {labels.shape[1]} x {labels.shape[0]} pixels, its image {image.width} x {image.height}."
            )
        labels, known = read_labels(labels)
        labels = labels[known]
        if not labels.any() or (labels > 0).mean() < min_foreground:
            continue
        score = {}
        for name, mask, segments in segment(image):
            if mask is not None:
                score[name] = intersection_over_union(mask[known], labels > 0)
            if segments is not None and not np.isnan(overlap := best_overlap(segments[known], labels)):
                score[f"{name}, best overlap"] = overlap
        if heads := [value for name, value in score.items() if name.startswith("attention, head")]:
            score["attention, best head (oracle)"] = max(heads)
        scores.append(score)
    if not scores:
        raise ValueError(f"No image has at least {min_foreground:.0%} foreground.")
    names = dict.fromkeys(name for score in scores for name in score)
    means = {name: float(np.mean([score[name] for score in scores if name in score])) for name in names}
    return {"images": len(scores), **means}
