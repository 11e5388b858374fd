"""
Adapt a pretrained ViT: replace its attention in every layer, keep whatever else fits, and fine-tune.

    accelerate launch training/adapt.py --model_name_or_path google/vit-base-patch16-224 --dataset_name your/dataset \
        --output_dir runs/adapted --hidden_states_weight 1

`--model_name_or_path` takes ViT, DeiT and DINOv2, of Transformers or timm, by hub id or folder. Before training, the
accuracy of the original and of the model with its attention just replaced are printed; `results.json` has them too.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, PreTrainedModel

from arguments import ClassificationArguments, parse_arguments
from cbsa_hf.conversion.convert import convert_checkpoint
from cbsa_hf.modeling_cbsa import CBSAForImageClassification
from data.loading import class_names, find_columns
from engine.interruption import exit_with_a_sentence
from engine.loop import load_splits, start_run
from engine.output import write_file
from tasks.classification import Classification, build_validation, train_classifier
from tasks.heads import load_for_classes


ATTENTION_TYPES = ("agent", "mita", "cbsa")


@dataclass(kw_only=True)
class Arguments(ClassificationArguments):
    model_name_or_path: str = field(metadata={"help": "ViT, DeiT or DINOv2, by hub id or folder"})
    attention_type: str = field(
        default="agent", metadata={"help": "what replaces its attention", "choices": ATTENTION_TYPES}
    )
    hidden_states_weight: float = field(
        default=0.0, metadata={"help": "weight of the distance to what the original makes of each layer; 0 for none"}
    )


class Adaptation(nn.Module):
    """
    Cross-entropy, and how far the tokens after each layer are from those of the original model: the mean square of
    their difference over the mean square of the original's.

    Args:
        model: with its attention replaced.
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
        `logits` when no labels are given; else the losses, `loss` their weighted sum.

        Args:
            pixel_values: (batch, channels, height, width), normalised.
            labels: (batch,) class indices, or (batch, num_labels) probabilities.
            original: (batch, layers, tokens, width), what the original makes of the same pixels.
        """
        outputs = self.model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=original is not None)
        logits = outputs.logits.float()
        if labels is None:
            return {"logits": logits}
        loss = cross_entropy = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        losses = {"cross_entropy": cross_entropy}
        if original is not None:
            own, original = torch.stack(outputs.hidden_states[1:], dim=1).float(), original.float()
            scale = original.square().mean((0, 2, 3), keepdim=True)
            losses["distance"] = ((own - original).square() / scale).mean()
            loss = loss + self.hidden_states_weight * losses["distance"]
        return {**losses, "loss": loss}


def replace_attention(
    original: CBSAForImageClassification, attention_type: str, names: list[str], **changes
) -> CBSAForImageClassification:
    """
    A copy of a ViT with another attention, and a new classifier where the classes are others. `agent` and `mita` take
    over every weight. `cbsa` has one projection for the three, which starts as that of the keys, without its bias.
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


def build_original(original: CBSAForImageClassification, accelerator: Accelerator):
    """Pixels -> `original`, the tokens after each layer of the original model."""
    network = original.requires_grad_(False).eval().to(accelerator.device)

    @torch.no_grad()
    def teach(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        with accelerator.autocast():
            outputs = network(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
        return {"original": torch.stack(outputs.hidden_states[1:], dim=1)}

    return teach


def main(args: Arguments):
    if args.teacher is not None:
        raise ValueError("`--teacher` is not for adapt.py, whose teacher is the original: `--hidden_states_weight`.")
    with start_run(args) as accelerator:
        adapt(args, accelerator)


def adapt(args: Arguments, accelerator: Accelerator):
    """Replace the attention, fine-tune, and add to `results.json` what the model was worth before."""
    splits = load_splits(args, find_columns)
    names = class_names(splits[0])
    conversion = convert_checkpoint(args.model_name_or_path, attention_type="softmax")
    original, processor = conversion.model, conversion.processor
    if not isinstance(original, CBSAForImageClassification):
        original = CBSAForImageClassification(original.config)
        original.base_model.load_state_dict(conversion.model.state_dict())
    changes = {} if args.drop_path_rate is None else {"drop_path_rate": args.drop_path_rate}
    model = replace_attention(original, args.attention_type, names, **changes)

    validate, _ = build_validation(args, accelerator, splits[1], processor)
    before = {}
    if list(original.config.id2label.values()) == names:
        before["original"] = validate(Classification(original.to(accelerator.device).eval(), 0.0))
    before["replaced"] = validate(Classification(model.to(accelerator.device).eval(), 0.0))
    for name, metrics in before.items():
        accelerator.print(f"{name}: accuracy {metrics['accuracy']:.4f}")

    distils = args.hidden_states_weight > 0
    results = train_classifier(
        args,
        accelerator,
        model,
        processor,
        splits,
        task=Adaptation(model, args.label_smoothing, args.hidden_states_weight),
        teach=build_original(original, accelerator) if distils else None,
    )
    if accelerator.is_main_process:
        write_file(Path(args.output_dir) / "results.json", json.dumps({**before, **results}, indent=2) + "\n")


if __name__ == "__main__":
    with exit_with_a_sentence():
        main(parse_arguments(Arguments))
