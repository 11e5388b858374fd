"""One pass over labelled images: the number that every script reports."""

import torch
from accelerate import Accelerator
from metrics import Accuracy
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@torch.no_grad()
def evaluate_classifier(
    model: PreTrainedModel, dataloader: torch.utils.data.DataLoader, accelerator: Accelerator
) -> dict[str, float]:
    """
    Accuracy and mean cross-entropy over a prepared dataloader, each image counted once by however many processes.

    The model is left in evaluation mode.
    """
    model.eval()
    metric = Accuracy(keep_in_memory=True)
    losses = []
    progress = tqdm(dataloader, desc="validation", leave=False, disable=not accelerator.is_main_process)
    for batch in progress:
        with accelerator.autocast():
            logits = model(batch["pixel_values"], interpolate_pos_encoding=True).logits
        loss = F.cross_entropy(logits.float(), batch["labels"], reduction="none")
        predictions, labels, loss = accelerator.gather_for_metrics((logits.argmax(-1), batch["labels"], loss))
        metric.add_batch(predictions=predictions.cpu(), references=labels.cpu())
        losses.append(loss.cpu())
    return {**metric.compute(), "loss": torch.cat(losses).mean().item()}
