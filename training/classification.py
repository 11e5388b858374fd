"""Image classification as a task for the training loop, with or without a teacher."""

import numpy as np
import torch
from data import ValidationImages
from distillation import Teacher
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cbsa_hf.figures import attention_grid
from cbsa_hf.interpretability import attention_maps


class Classification(nn.Module):
    """
    Cross-entropy; with a teacher also the divergence from its class probabilities, and one minus the cosine between
    its feature maps and what linear layers make of the patch tokens.

    The teacher's classes are learned by a head of their own unless they are the model's. Heads are not part of the
    model that is saved.

    Args:
        model: a CBSA classifier.
        label_smoothing: probability spread evenly over all classes.
        teacher: whose logits and maps the task will be called with.
        logits_weight: weight of the divergence.
        maps_weight: weight of the cosines.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        label_smoothing: float,
        teacher: Teacher | None = None,
        logits_weight: float = 0.0,
        maps_weight: float = 0.0,
    ):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.logits_weight, self.maps_weight = logits_weight, maps_weight
        self.class_head, self.map_heads = None, nn.ModuleList()
        if teacher is not None:
            width = model.config.hidden_size
            if teacher.network.label2id != model.config.label2id:
                self.class_head = nn.Linear(width, teacher.network.num_labels)
            self.map_heads.extend(nn.Linear(width, channels) for channels in teacher.network.widths)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        teacher_logits: torch.Tensor | None = None,
        **teacher_maps: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        `logits` when no labels are given; else the losses, `loss` their weighted sum.

        Args:
            pixel_values: (batch, channels, height, width), normalised.
            labels: (batch,) class indices, or (batch, num_labels) probabilities.
            teacher_logits: (batch, the teacher's num_labels).
            teacher_map_0, ...: the teacher's feature maps, each (batch, channels, rows, columns).
        """
        outputs = self.model.base_model(pixel_values, interpolate_pos_encoding=True)
        logits = self.model.classifier(outputs.pooler_output).float()
        if labels is None:
            return {"logits": logits}
        losses = {"cross_entropy": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}
        loss = losses["cross_entropy"]
        if teacher_logits is not None:
            own = logits if self.class_head is None else self.class_head(outputs.pooler_output)
            own, target = (values.float().log_softmax(-1) for values in (own, teacher_logits))
            losses["divergence"] = F.kl_div(own, target, reduction="batchmean", log_target=True)
            grid = self.model.base_model.embeddings.patch_embeddings.grid(*pixel_values.shape[2:])
            patches = outputs.last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, grid)
            cosines = []
            for head, target in zip(self.map_heads, teacher_maps.values(), strict=True):
                features = head(F.adaptive_avg_pool2d(patches, target.shape[2:]).permute(0, 2, 3, 1))
                target = target.permute(0, 2, 3, 1).float()
                cosines.append(F.cosine_similarity(features.float(), target, dim=-1).mean())
            losses["distance"] = 1 - torch.stack(cosines).mean()
            loss = loss + self.logits_weight * losses["divergence"] + self.maps_weight * losses["distance"]
        return {**losses, "loss": loss}


def draw_attention(model: PreTrainedModel, dataset: ValidationImages, count: int = 4) -> dict[str, np.ndarray]:
    """What CLS attends to in every layer and head, for the first images: pictures (1, height, width, 3) by name."""
    pictures = {}
    for index in range(min(count, len(dataset))):
        if (found := dataset.read(index)) is not None:
            maps = attention_maps(model, dataset[index]["pixel_values"].unsqueeze(0))[:, 0]
            grid = attention_grid(found[0], maps, "what CLS is tied to")
            pictures[f"validation/attention_{index}"] = np.asarray(grid)[None]
    return pictures
