"""Adapting a pretrained ViT to another attention, as a task for the training loop."""

from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from cbsa_hf.conversion.convert import convert_checkpoint
from cbsa_hf.modeling_cbsa import CBSAForImageClassification
from training.arguments import AdaptationArguments
from training.tasks.classification import ClassificationLoss, ClassificationTask, cross_entropy
from training.tasks.heads import load_for_classes


class AdaptationLoss(nn.Module):
    """
    Cross-entropy, and the distance of the tokens after each layer from those of the original model: the mean square of
    the difference, divided by the mean square of the original's tokens.

    Args:
        model: the classifier with its attention replaced.
        label_smoothing: probability spread evenly over all classes.
        hidden_states_weight: weight of the distance.
    """

    def __init__(self, model: PreTrainedModel, label_smoothing: float, hidden_states_weight: float):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.hidden_states_weight = hidden_states_weight

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        original: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        The losses by name; `loss` is their weighted sum. Without labels, only `logits`.

        Args:
            pixel_values: (batch, channels, height, width), normalised.
            labels: (batch,) class indices, or (batch, num_labels) probabilities.
            original: (batch, layers, tokens, width), the original's tokens after each layer, for the same pixels.
        """
        outputs = self.model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=original is not None)
        logits = outputs.logits.float()
        if labels is None:
            return {"logits": logits}
        loss = cross_entropy(logits, labels, self.model.config, self.label_smoothing)
        losses = {"cross_entropy": loss}
        if original is not None:
            own, original = torch.stack(outputs.hidden_states[1:], dim=1).float(), original.float()
            scale = original.square().mean((0, 2, 3), keepdim=True)
            losses["distance"] = ((own - original).square() / scale).mean()
            loss = loss + self.hidden_states_weight * losses["distance"]
        return {**losses, "loss": loss}


def load_original(source: str) -> tuple[CBSAForImageClassification, BaseImageProcessor]:
    """
    A pretrained ViT as a CBSA classifier with softmax attention, and its image processor.

    Raises:
        ValueError: if there is no such model, or it is not a ViT that can be converted.
    """
    conversion = convert_checkpoint(source, attention_type="softmax")
    original = conversion.model
    if not isinstance(original, CBSAForImageClassification):
        original = CBSAForImageClassification(original.config)
        original.base_model.load_state_dict(conversion.model.state_dict())
    return original, conversion.processor


def replace_attention(
    original: CBSAForImageClassification, attention_type: str, names: list[str], **changes
) -> CBSAForImageClassification:
    """
    A copy of a ViT with another attention. If the classes differ, its classifier is a new one.

    `agent` and `mita` keep all weights. `cbsa` has one projection in place of three; it starts as that of the keys,
    without their bias.

    Args:
        original: with softmax attention.
        attention_type: `agent`, `mita` or `cbsa`.
        names: of the classes.
        **changes: to its configuration.
    """
    changes = {"attention_type": attention_type, **changes}
    with TemporaryDirectory() as folder:
        original.save_pretrained(folder)
        model = load_for_classes(AutoModelForImageClassification, folder, dict(enumerate(names)), **changes)
    if attention_type == "cbsa":
        with torch.no_grad():
            for layer, source in zip(model.base_model.layers, original.base_model.layers, strict=True):
                layer.attention.proj.weight.copy_(source.attention.k_proj.weight)
    return model


class AdaptationTask(ClassificationTask):
    """
    Train a ViT with its attention replaced. With `--hidden_states_weight`, it also learns the original's tokens.

    Args:
        args: the script's options.
        accelerator: from `build_accelerator`.
        original: the model with softmax attention.
        model: a copy with its attention replaced, see [`replace_attention`].
        processor: their image processor.
        splits: training and validation, from `load_splits`.
    """

    def __init__(
        self,
        args: AdaptationArguments,
        accelerator: Accelerator,
        original: CBSAForImageClassification,
        model: CBSAForImageClassification,
        processor: BaseImageProcessor,
        splits: tuple[Dataset, Dataset],
    ):
        super().__init__(args, accelerator, model, processor, splits)
        self.original = original.requires_grad_(False).eval().to(accelerator.device)

    def build_losses(self, model: PreTrainedModel) -> nn.Module:
        """Cross-entropy, and the distance from the original."""
        return AdaptationLoss(model, self.args.label_smoothing, self.args.hidden_states_weight)

    def score_before(self, names: list[str]) -> dict[str, dict[str, float]]:
        """
        Metrics before the training: `original`, if its classes have those names, and `replaced`, the model with its
        attention just replaced.
        """
        models = {"replaced": self.losses.model}
        if list(self.original.config.id2label.values()) == names:
            models = {"original": self.original, **models}
        device = self.accelerator.device
        return {
            name: self.evaluate(ClassificationLoss(model.to(device).eval(), label_smoothing=0.0))
            for name, model in models.items()
        }

    @torch.no_grad()
    def teach(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`original`: the original's tokens after each layer, if the losses use them."""
        if not self.args.hidden_states_weight > 0:
            return {}
        with self.accelerator.autocast():
            outputs = self.original(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
        return {"original": torch.stack(outputs.hidden_states[1:], dim=1)}
