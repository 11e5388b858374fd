"""
Scores of zero-shot segmentation against masks: of every method of [`ZeroShotSegmenter`], and of simple segmentations
that need no model.

No method sees the masks, except the one that is named an oracle.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image
from scipy.cluster.vq import kmeans2
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from cbsa_hf import ZeroShotSegmenter
from training.arguments import MIN_FOREGROUND
from training.data.segmentation import IGNORED


NUM_SEGMENTS = 6
MIN_SHARE = 0.01  # smallest share of an image that a class must cover to be scored

MethodResults = Iterator[tuple[str, np.ndarray | None, np.ndarray | None]]


def intersection_over_union(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two bool masks of one shape, of which at least one is not empty."""
    return float((mask & truth).sum() / (mask | truth).sum())


def best_overlap(segments: np.ndarray, labels: np.ndarray) -> float:
    """
    For each class, the largest intersection over union with any segment; the mean of it over the classes that cover at
    least [`MIN_SHARE`] of the image. NaN if there is no such class.

    Args:
        segments: segment of each pixel, of any shape.
        labels: class of each pixel; 0 for none.
    """
    pairs, counts = np.unique(np.stack([labels.ravel(), segments.ravel()]), axis=1, return_counts=True)
    best = {}
    for (label, segment), both in zip(pairs.T, counts, strict=True):
        of_class, of_segment = counts[pairs[0] == label].sum(), counts[pairs[1] == segment].sum()
        if label != 0 and of_class >= MIN_SHARE * labels.size:
            best[label] = max(best.get(label, 0), both / (of_class + of_segment - both))
    return float(np.mean(list(best.values()))) if best else float("nan")


def centred_ellipse(shape: tuple[int, int]) -> np.ndarray:
    """A mask of an ellipse in the middle; its axes are three quarters of the sides."""
    rows, columns = (np.linspace(-1, 1, side) for side in shape)
    return rows[:, None] ** 2 + columns[None, :] ** 2 <= 0.75**2


def two_colours(pixels: np.ndarray) -> np.ndarray:
    """
    A foreground mask from k-means on colour with two clusters; the cluster that has most of the border is background.
    """
    _, labels = kmeans2(pixels.reshape(-1, 3).astype(np.float64), 2, minit="++", seed=0)
    labels = labels.reshape(pixels.shape[:2]).astype(bool)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return ~labels if border.mean() > 0.5 else labels


def coordinates(shape: tuple[int, int]) -> np.ndarray:
    """Row and column of each pixel as shares of the longer side: (height, width, 2)."""
    return np.stack(np.mgrid[: shape[0], : shape[1]], axis=-1) / max(shape)


def colours_and_places(pixels: np.ndarray) -> np.ndarray:
    """Segment of each pixel from k-means on colour, from 0 to 1, and position."""
    points = np.concatenate([pixels / 255, coordinates(pixels.shape[:2])], axis=-1).reshape(-1, 5)
    return kmeans2(points, NUM_SEGMENTS, minit="++", seed=0)[1].reshape(pixels.shape[:2])


def two_by_three(shape: tuple[int, int]) -> np.ndarray:
    """Segment of each pixel in a grid of 2 rows and 3 columns."""
    rows, columns = (np.arange(side) * count // side for side, count in zip(shape, (2, 3), strict=True))
    return 3 * rows[:, None] + columns


def trivial_results(image: Image.Image) -> MethodResults:
    """Name, foreground mask and segments of the methods that need no model; None for what a method does not give."""
    pixels = np.asarray(image)
    shape = pixels.shape[:2]
    yield "everything", np.ones(shape, dtype=bool), None
    yield "centred ellipse", centred_ellipse(shape), None
    yield "two colours", two_colours(pixels), None
    yield "2 x 3 grid", None, two_by_three(shape)
    yield "k-means on colour, position", None, colours_and_places(pixels)


def read_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Labels of a mask (height, width), 0 for background, and where they are known (bool). 255 is unknown, unless the
    mask has no values but 0 and 255: then 255 is the foreground.
    """
    if np.isin(labels, (0, IGNORED)).all():
        return (labels == IGNORED).astype(np.int64), np.ones(labels.shape, dtype=bool)
    return labels, labels != IGNORED


def build_segmenters(model: PreTrainedModel, processor: BaseImageProcessor, **options) -> dict[str, ZeroShotSegmenter]:
    """
    Every method by its name: `ncut` with its default affinity and with that of the attention only; `representatives`;
    the attention of CLS, averaged over the heads and of each head.
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
    """Name, foreground mask and segments of each segmenter for an image."""
    for name, segmenter in segmenters.items():
        found = segmenter(image)
        yield name, found.mask, found.labels


def evaluate_zero_shot(
    segment: Callable[[Image.Image], MethodResults],
    samples: Iterable[tuple[Image.Image, np.ndarray]],
    min_foreground: float = MIN_FOREGROUND,
) -> dict[str, float]:
    """
    Mean scores of several methods over images.

    A method's name stands for the intersection over union of its mask with the foreground, which is all labels but 0.
    The name with "best overlap" stands for [`best_overlap`] of its segments. `attention, best head (oracle)` is the
    score of the head that fits the mask best, chosen for each image, as DINO and CRATE report it.

    Args:
        segment: returns name, mask and segments of each method for an image, as [`model_results`] does.
        samples: RGB images, and labels (height, width) of their size; see [`read_labels`].
        min_foreground: images with a smaller share of foreground do not count.

    Returns:
        The means by name, and `images`, the number of images that counted.

    Raises:
        ValueError: if labels have another size than their image, or no image has enough foreground.
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
