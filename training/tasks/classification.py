"""Image classification as a task for the training loop, with or without a teacher."""

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from cbsa_hf.interpretability.attention_maps import attention_maps
from cbsa_hf.interpretability.plots import attention_grid
from training.arguments import ClassificationArguments
from training.data.classification import TrainingImages, ValidationImages
from training.data.labelled_images import check_labels
from training.data.loading import MULTI_LABEL
from training.engine.loop import Task
from training.engine.setup import build_loader
from training.evaluation.scores import evaluate_classifier
from training.tasks.distillation import DistillationDataset, prepare_targets
from training.tasks.teachers import Teacher, prepare_teacher


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, config: PreTrainedConfig, smoothing: float):
    """
    Mean cross-entropy of a classifier; where an image may have several labels, the binary one of each class.

    Args:
        logits: (batch, num_labels).
        labels: (batch,) class indices, or (batch, num_labels) probabilities.
        config: of the model.
        smoothing: probability spread evenly over all classes.
    """
    if config.problem_type != MULTI_LABEL:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(logits, (1 - smoothing) * labels + smoothing / labels.shape[1])


class ClassificationLoss(nn.Module):
    """
    Cross-entropy. With a teacher, also the divergence from its class probabilities, and one minus the cosine between
    its feature maps and linear functions of the patch tokens.

    If the teacher has other classes than the model, a linear layer of its own predicts them. The linear layers are
    trained with the model, but not saved with it.

    Args:
        model: a CBSA classifier.
        label_smoothing: probability spread evenly over all classes.
        teacher: gives the sizes of the logits and maps that `forward` will get.
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
        The losses by name; `loss` is their weighted sum. Without labels, only `logits`.

        Args:
            pixel_values: (batch, channels, height, width), normalised.
            labels: (batch,) class indices, or (batch, num_labels) probabilities.
            teacher_logits: (batch, num_labels of the teacher).
            teacher_map_0, ...: feature maps of the teacher, each (batch, channels, rows, columns).
        """
        outputs = self.model.base_model(pixel_values, interpolate_pos_encoding=True)
        logits = self.model.classifier(outputs.pooler_output).float()
        if labels is None:
            return {"logits": logits}
        losses = {"cross_entropy": cross_entropy(logits, labels, self.model.config, self.label_smoothing)}
        loss = losses["cross_entropy"]
        if teacher_logits is not None:
            own = logits if self.class_head is None else self.class_head(outputs.pooler_output)
            own, target = (values.float().log_softmax(-1) for values in (own, teacher_logits))
            losses["divergence"] = F.kl_div(own, target, reduction="batchmean", log_target=True)
            grid = self.model.config.patch_grid(*pixel_values.shape[2:])
            patches = outputs.last_hidden_state[:, self.model.base_model.num_prefix_tokens :]
            losses["distance"] = self.maps_distance(patches.transpose(1, 2).unflatten(2, grid), teacher_maps)
            loss = loss + self.logits_weight * losses["divergence"] + self.maps_weight * losses["distance"]
        return {**losses, "loss": loss}

    def maps_distance(self, patches: torch.Tensor, teacher_maps: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        One minus the mean cosine between the teacher's features and the linear functions of the patch tokens.

        Args:
            patches: (batch, width, rows, columns); pooled to the size of each map.
            teacher_maps: see [`forward`].
        """
        cosines = []
        for head, target in zip(self.map_heads, teacher_maps.values(), strict=True):
            features = head(F.adaptive_avg_pool2d(patches, target.shape[2:]).permute(0, 2, 3, 1))
            target = target.permute(0, 2, 3, 1).float()
            cosines.append(F.cosine_similarity(features.float(), target, dim=-1).mean())
        return 1 - torch.stack(cosines).mean()


class ClassificationTask(Task):
    """
    Train a CBSA classifier, with the teacher that the options name if they do. Where an image may have several labels,
    the metric is the mean average precision.

    Args:
        args: the script's options.
        accelerator: from `build_accelerator`.
        model: the classifier.
        processor: its image processor.
        splits: training and validation, from `load_splits`.

    Raises:
        ValueError: if a label is the number of no class, or the teacher or its cache cannot be used.
    """

    metric = "accuracy"

    def __init__(
        self,
        args: ClassificationArguments,
        accelerator: Accelerator,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        splits: tuple[Dataset, Dataset],
    ):
        for dataset, name in zip(splits, (args.train_split, args.validation_split), strict=True):
            check_labels(dataset, name, warns=accelerator.is_main_process)
        self.args, self.accelerator, self.processor = args, accelerator, processor
        self.teacher = None
        if model.config.problem_type == MULTI_LABEL:
            self.metric = "mean_average_precision"
            if args.teacher is not None:
                raise ValueError("`--teacher` knows one class an image, and this data set has lists of labels.")
        if args.teacher is not None:
            if model.config.num_channels != 3:
                raise ValueError(f"`--teacher` sees photos; the model takes {model.config.num_channels} channels.")
            teacher = Teacher(args.teacher, processor.image_mean, processor.image_std, model.config.patch_size)
            self.teacher = prepare_teacher(teacher, accelerator)
        self.train_data = self.build_train_data(splits[0])
        self.losses = self.build_losses(model)
        self.validation_images = ValidationImages(splits[1], args.max_corrupt, processor)
        self.validation_loader = accelerator.prepare(build_loader(self.validation_images, args, train=False))

    def build_losses(self, model: PreTrainedModel) -> nn.Module:
        """The losses of the model."""
        args = self.args
        return ClassificationLoss(model, args.label_smoothing, self.teacher, args.logits_weight, args.maps_weight)

    def build_train_data(self, split: Dataset) -> TrainingImages:
        """The training images; with the teacher's targets if they are cached."""
        args, size = self.args, self.processor.size["height"]
        augmentation = {
            "dataset": split,
            "max_corrupt": args.max_corrupt,
            "processor": self.processor,
            "crop_sizes": args.crop_sizes or [size],
            "num_epochs": args.num_epochs,
            "min_crop_scale": args.min_crop_scale,
            "random_crop_sizes": args.random_crop_sizes,
            "mixup_alpha": args.mixup_alpha,
            "cutmix_alpha": args.cutmix_alpha,
            "seed": args.seed,
        }
        images = TrainingImages(**augmentation)
        if args.teacher_cache is None:
            return images
        folder = prepare_targets(self.teacher, images, size, args.teacher_cache, self.accelerator)
        return DistillationDataset(self.teacher, folder, **augmentation)

    def evaluate(self, losses: nn.Module) -> dict[str, float]:
        """The metric and the loss on the validation split."""
        metrics = evaluate_classifier(
            lambda pixel_values: losses(pixel_values)["logits"], self.validation_loader, self.accelerator
        )
        self.validation_images.check()
        return metrics

    def teach(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits and feature maps of the teacher, unless the batch has them already."""
        if self.teacher is None or self.args.teacher_cache is not None:
            return {}
        with self.accelerator.autocast():
            logits, maps = self.teacher(pixel_values)
        return {"teacher_logits": logits, **{f"teacher_map_{i}": features for i, features in enumerate(maps)}}

    def draw(self, model: PreTrainedModel, count: int = 4) -> dict[str, np.ndarray]:
        """For the first images, the attention of CLS in every layer and head."""
        pictures = {}
        for index in range(min(count, len(self.validation_images))):
            if (found := self.validation_images.read(index)) is not None:
                pixel_values = self.validation_images[index]["pixel_values"].unsqueeze(0)
                picture = found[0]
                if isinstance(picture, np.ndarray):  # of another number of channels: their mean, in grey
                    picture = Image.fromarray(picture.mean(2).astype(np.uint8)).convert("RGB")
                grid = attention_grid(picture, attention_maps(model, pixel_values)[:, 0], "what CLS is tied to")
                pictures[f"validation/attention_{index}"] = np.asarray(grid)[None]
        return pictures
