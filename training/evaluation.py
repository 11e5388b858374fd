"""One pass over labelled images: the number that every script reports."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from metrics import Accuracy
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


@torch.no_grad()
def evaluate_classifier(
    classify: Callable[[torch.Tensor], torch.Tensor], dataloader: DataLoader, accelerator: Accelerator
) -> dict[str, float]:
    """
    Accuracy and mean cross-entropy over a prepared dataloader, each image counted once by however many processes;
    images whose label is -100 are left out.

    Args:
        classify: pixels -> logits.
        dataloader: batches of `pixel_values` and `labels`.
        accelerator: that prepared the dataloader.
    """
    metric = Accuracy(keep_in_memory=True)
    losses = []
    for batch in tqdm(dataloader, desc="validation", leave=False, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            logits = classify(batch["pixel_values"]).float()
        loss = F.cross_entropy(logits, batch["labels"], reduction="none")
        predictions, labels, loss = accelerator.gather_for_metrics((logits.argmax(-1), batch["labels"], loss))
        counted = labels != -100
        metric.add_batch(predictions=predictions[counted].cpu(), references=labels[counted].cpu())
        losses.append(loss[counted].cpu())
    return {**metric.compute(), "loss": torch.cat(losses).mean().item()}
