"""Scores of a classifier and of a segmenter on labelled images."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cbsa_hf import SlidingWindowSegmenter
from cbsa_hf.segmentation.sliding_window import label_names
from training.engine.interruption import read_batches
from training.evaluation.metrics import Accuracy, MeanAveragePrecision, MeanIoU, count_pixels


def check_classes(labels: torch.Tensor, num_labels: int):
    """Raises ValueError if a label is neither the number of a class nor -100."""
    lowest, highest = labels.where(labels != -100, 0).aminmax()
    if lowest < 0 or highest >= num_labels:
        label = lowest if lowest < 0 else highest
        raise ValueError(f"An image has the label {label}; the model has the classes 0 to {num_labels - 1}.")


@torch.no_grad()
def evaluate_classifier(
    classify: Callable[[torch.Tensor], torch.Tensor], dataloader: DataLoader, accelerator: Accelerator
) -> dict[str, float]:
    """
    Accuracy and mean cross-entropy over a dataloader; where images have lists of labels, the mean average precision
    and the mean binary cross-entropy. Each image counts once, for any number of processes; images with the label -100
    do not count. Of an image only its prediction is kept: the class, or a score of each class.

    Args:
        classify: returns the logits (batch, num_labels) for pixels (batch, channels, height, width).
        dataloader: prepared by the accelerator; its batches have `pixel_values` and `labels`.
        accelerator: its processes share the work.

    Raises:
        ValueError: if a label is not the number of a class, or no image can be read.
    """
    metric, losses = None, []
    bar = {"desc": "validation", "total": len(dataloader), "leave": False, "disable": not accelerator.is_main_process}
    for batch in tqdm(read_batches(dataloader), **bar):
        with accelerator.autocast():
            logits = classify(batch["pixel_values"]).float()
        if batch["labels"].ndim == 2:
            metric = metric or MeanAveragePrecision(keep_in_memory=True)
            loss = F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none").mean(-1)
            found = logits
        else:
            metric = metric or Accuracy(keep_in_memory=True)
            check_classes(batch["labels"], logits.shape[-1])
            loss = F.cross_entropy(logits, batch["labels"], reduction="none")
            found = logits.argmax(-1)
        predictions, labels, loss = accelerator.gather_for_metrics((found, batch["labels"], loss))
        counted = (labels[:, 0] if labels.ndim == 2 else labels) != -100
        metric.add_batch(predictions=predictions[counted].cpu(), references=labels[counted].cpu())
        losses.append(loss[counted].cpu())
    if not any(len(loss) for loss in losses):
        raise ValueError("None of the images to score on can be read; the log names them.")
    return {**metric.compute(), "loss": torch.cat(losses).mean().item()}


def evaluate_segmenter(
    segmenter: SlidingWindowSegmenter,
    read: Callable[[int], tuple[Image.Image, np.ndarray] | None],
    num_images: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """
    Mean IoU, pixel accuracy, and the IoU of each class that occurs; of a single class and its background. Each image
    counts once, at its own size, for any number of processes.

    Args:
        segmenter: of a model for semantic segmentation.
        read: returns the image of an index and its labels (height, width); None if it is broken and does not count.
        num_images: number of images.
        accelerator: its processes share the work.

    Raises:
        ValueError: if there is no labelled pixel, or no image can be read.
    """
    config = segmenter.model.config
    names = label_names(config.id2label)
    metric, total = MeanIoU(keep_in_memory=True), 0
    indices = accelerator.prepare(DataLoader(range(num_images), batch_size=accelerator.num_processes))
    for index in tqdm(indices, desc="validation", leave=False, disable=not accelerator.is_main_process):
        counts = np.zeros((3, len(names)), dtype=np.int64)
        if (found := read(index.item())) is not None:
            image, labels = found
            with accelerator.autocast():
                predicted = segmenter(image)
            counts = count_pixels(predicted, labels, len(names), config.semantic_loss_ignore_index)
        counts = accelerator.gather_for_metrics(torch.from_numpy(counts).unsqueeze(0).to(accelerator.device))
        intersection, predicted, labelled = counts.cpu().unbind(1)
        metric.add_batch(intersection=intersection, predicted=predicted, labelled=labelled)
        total += int(labelled.sum())
    if not total:
        raise ValueError("No pixel of the images to score on counts, or none can be read; the log names those.")
    scores = metric.compute()
    by_class = {f"iou/{names[i]}": iou for i, iou in enumerate(scores.pop("iou")) if not np.isnan(iou)}
    return {**scores, **by_class}
