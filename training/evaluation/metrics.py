"""Metrics as subclasses of `evaluate.Metric`, which need no download."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Share of the images whose predicted class is their label."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions and references: class indices.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MeanAveragePrecision(evaluate.Metric):
    """
    Mean over the classes that occur of the average precision: the mean, over the images with the class, of the
    precision among all images that score at least as high. Images have lists of labels.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: for each image, a score of each class; references: 1 or 0 for each.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        scores, labels = np.asarray(predictions).T, np.asarray(references).T > 0
        precisions = [average_precision(*pair) for pair in zip(scores, labels, strict=True) if pair[1].any()]
        if not precisions:
            raise ValueError("None of the images to score on has a label.")
        return {"mean_average_precision": float(np.mean(precisions))}


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """
    Average precision of one class.

    Args:
        scores: (images,); those of equal score count together.
        labels: (images,), bool; at least one is true.
    """
    ranked = np.sort(scores)[::-1]
    hits = np.sort(scores[labels])[::-1]
    as_high = np.searchsorted(-ranked, -hits, side="right")  # images that score at least as high as each hit
    return float(np.mean(np.searchsorted(-hits, -hits, side="right") / as_high))


class MeanIoU(evaluate.Metric):
    """
    Intersection over union of each class, its mean over the classes that occur, and the share of correct pixels.

    The inputs are counts of pixels, so that images of any size cost the same to gather from many processes.
    """

    def _info(self) -> evaluate.MetricInfo:
        counts = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=(
                "For each image and each class, numbers of pixels that are not ignored: `intersection`, predicted and "
                "labelled as the class; `predicted`; `labelled`."
            ),
            features=datasets.Features({"intersection": counts, "predicted": counts, "labelled": counts}),
        )

    def _compute(self, intersection, predicted, labelled) -> dict[str, float | list[float]]:
        intersection, predicted, labelled = (np.sum(counts, axis=0) for counts in (intersection, predicted, labelled))
        union = predicted + labelled - intersection
        iou = np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)
        return {
            "mean_iou": float(np.nanmean(iou)),
            "pixel_accuracy": float(intersection.sum() / labelled.sum()),
            "iou": iou.tolist(),
        }


def count_pixels(predicted: np.ndarray, labelled: np.ndarray, num_labels: int, ignore_index: int) -> np.ndarray:
    """
    The inputs of [`MeanIoU`] for one image: (3, num_labels), int64.

    Args:
        predicted: (height, width), class indices.
        labelled: (height, width), class indices, or `ignore_index`.
        num_labels: number of classes.
        ignore_index: label of the pixels that are not counted.
    """
    counted = labelled != ignore_index
    predicted, labelled = predicted[counted], labelled[counted]
    hits = labelled[predicted == labelled]
    return np.stack([np.bincount(values, minlength=num_labels) for values in (hits, predicted, labelled)])
