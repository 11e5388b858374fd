"""
Zero-shot segmentation against masks: every method of [`ZeroShotSegmenter`], and what is possible without any model.

Methods and rules are fixed before the masks are seen, but for what is named an oracle.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image
from scipy.cluster.vq import kmeans2
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from cbsa_hf import ZeroShotSegmenter


IGNORED = 255  # no label is known there
NUM_SEGMENTS = 6
MIN_SHARE = 0.01  # of an image, for a class to be counted


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


def trivial_results(image: Image.Image) -> Iterator[tuple[str, np.ndarray | None, np.ndarray | None]]:
    """Name, foreground mask and segments of what needs no model."""
    pixels = np.asarray(image)
    shape = pixels.shape[:2]
    yield "everything", np.ones(shape, dtype=bool), None
    yield "centred ellipse", centred_ellipse(shape), None
    yield "two colours", two_colours(pixels), None
    yield "2 x 3 grid", None, two_by_three(shape)
    yield "k-means on colour, position", None, colours_and_places(pixels)


def model_results(
    model: PreTrainedModel, processor: BaseImageProcessor, image: Image.Image, **options
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Name, foreground mask and segments of every method; for the attention of CLS also each head's mask."""
    for method in ("ncut", "representatives"):
        segmenter = ZeroShotSegmenter(model, processor, method, num_segments=NUM_SEGMENTS, **options)
        found = segmenter(image)
        yield method, found.mask, found.labels
    yield "attention", ZeroShotSegmenter(model, processor, "attention", **options)(image).mask, None
    for head in range(model.config.num_attention_heads):
        segmenter = ZeroShotSegmenter(model, processor, "attention", head=head, **options)
        yield f"attention, head {head}", segmenter(image).mask, None


def evaluate_zero_shot(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    samples: Iterable[tuple[Image.Image, np.ndarray]],
    min_foreground: float,
    **options,
) -> dict[str, int | dict[str, float]]:
    """
    Scores by method, each image counted once: `foreground_iou`, any label but 0 being foreground, and `best_overlap` of
    six segments. `attention, best head (oracle)` lets the masks choose the head for each image, as DINO and CRATE do.

    Args:
        model, processor: to score.
        samples: RGB images, and labels (height, width) of their size; 255 where none is known.
        min_foreground: images with a smaller share are left out.
        **options: of [`ZeroShotSegmenter`].

    Returns:
        `images`, how many were counted, and the scores of each method by its name.

    Raises:
        ValueError: no image has enough foreground.
    """
    scores, num_images = {}, 0
    for image, labels in tqdm(samples, desc="images"):
        known = labels != IGNORED
        truth = labels[known] > 0
        if truth.size == 0 or truth.mean() < min_foreground or not truth.any():
            continue
        num_images += 1
        heads = []
        for name, mask, segments in (*trivial_results(image), *model_results(model, processor, image, **options)):
            if mask is not None:
                score = intersection_over_union(mask[known], truth)
                scores.setdefault(name, {}).setdefault("foreground_iou", []).append(score)
                if "head" in name:
                    heads.append(score)
            if segments is not None:
                score = best_overlap(segments[known], labels[known])
                scores.setdefault(name, {}).setdefault("best_overlap", []).append(score)
        oracle = scores.setdefault("attention, best head (oracle)", {"foreground_iou": []})
        oracle["foreground_iou"].append(max(heads))
    if not scores:
        raise ValueError(f"No image has at least {min_foreground:.0%} foreground.")
    means = {name: {kind: float(np.nanmean(v)) for kind, v in kinds.items()} for name, kinds in scores.items()}
    return {"images": num_images, **means}


def format_table(results: dict[str, int | dict[str, float]]) -> str:
    """What [`evaluate_zero_shot`] returns, a line for each method."""
    lines = [f"{results['images']} images{'':22}foreground IoU  best overlap"]
    for name, scores in results.items():
        if name != "images":
            columns = (f"{scores[kind]:.3f}" if kind in scores else "" for kind in ("foreground_iou", "best_overlap"))
            lines.append("{:32}{:>14}{:>14}".format(name, *columns))
    return "\n".join(lines)
