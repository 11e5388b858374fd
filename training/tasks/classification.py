"""Image classification as a task for the training loop, with or without a teacher."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel

from arguments import ClassificationArguments
from cbsa_hf.interpretability import attention_maps
from cbsa_hf.interpretability.plots import attention_grid
from data.classification import TrainingImages, ValidationImages
from data.distillation import TaughtImages, check_answers, write_answers
from data.labelled_images import check_labels
from engine.loop import build_loader, train
from evaluation.scores import evaluate_classifier
from tasks.teachers import Teacher, build_teaching, prepare_teacher


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
            grid = self.model.config.patch_grid(*pixel_values.shape[2:])
            patches = outputs.last_hidden_state[:, self.model.base_model.num_prefix_tokens :]
            patches = patches.transpose(1, 2).unflatten(2, grid)
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


def train_classifier(
    args: ClassificationArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    splits: tuple[Dataset, Dataset],
    task: nn.Module | None = None,
    teach: Callable[[torch.Tensor], dict] | None = None,
) -> dict:
    """
    Train a CBSA classifier as the options say; see [`train`] for what it leaves behind, returns and raises.

    Args:
        args: the script's options.
        accelerator: from `build_accelerator`.
        model: the classifier.
        processor: its image processor.
        splits: from `load_splits`.
        task: what to minimise, of the model; [`Classification`] with the options' teacher when None.
        teach: see [`train`]; of the options' teacher when None.
    """
    train_split, validation_split = splits
    for dataset, name in zip(splits, (args.train_split, args.validation_split), strict=True):
        check_labels(dataset, name, warns=accelerator.is_main_process)
    size = processor.size["height"]
    augmentation = {
        "dataset": train_split,
        "max_corrupt": args.max_corrupt,
        "processor": processor,
        "crop_sizes": args.crop_sizes or [size],
        "num_epochs": args.num_epochs,
        "min_crop_scale": args.min_crop_scale,
        "random_crop_sizes": args.random_crop_sizes,
        "mixup_alpha": args.mixup_alpha,
        "cutmix_alpha": args.cutmix_alpha,
        "seed": args.seed,
    }
    train_images, teacher = TrainingImages(**augmentation), None
    if args.teacher is not None:
        teacher = Teacher(args.teacher, processor.image_mean, processor.image_std, model.config.patch_size)
        teacher = prepare_teacher(teacher, accelerator)
        if args.teacher_cache is None:
            teach = build_teaching(teacher, accelerator)
        else:
            answers = Path(args.teacher_cache)
            with accelerator.main_process_first():
                if not answers.exists():
                    write_answers(teacher, train_images, processor, size, answers)
            check_answers(teacher, train_images, size, answers)
            train_images = TaughtImages(teacher, answers, **augmentation)
    if task is None:
        task = Classification(model, args.label_smoothing, teacher, args.logits_weight, args.maps_weight)
    validate, validation_images = build_validation(args, accelerator, validation_split, processor)
    return train(
        args,
        accelerator,
        task,
        processor,
        train_images,
        validate=validate,
        metric="accuracy",
        teach=teach,
        draw=lambda model: draw_attention(model, validation_images),
    )


def build_validation(
    args: ClassificationArguments, accelerator: Accelerator, split: Dataset, processor: BaseImageProcessor
) -> tuple[Callable[[nn.Module], dict[str, float]], ValidationImages]:
    """What validates a task, such as [`Classification`], on a split; and the images that it does so with."""
    images = ValidationImages(split, args.max_corrupt, processor)
    loader = accelerator.prepare(build_loader(images, args, train=False))

    def validate(network: nn.Module) -> dict[str, float]:
        metrics = evaluate_classifier(lambda pixel_values: network(pixel_values)["logits"], loader, accelerator)
        images.check()
        return metrics

    return validate, images
