"""Semantic segmentation as a task for the training loop."""

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from kornia.losses import dice_loss
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
    SegformerImageProcessorPil,
)

from cbsa_hf import SlidingWindowSegmenter
from cbsa_hf.checkpoints import load_config, load_processor
from cbsa_hf.configuration_cbsa import to_pair
from cbsa_hf.overlays import class_strip
from cbsa_hf.segmentation.sliding_window import label_names
from training.arguments import SegmentationArguments
from training.data.segmentation import (
    IGNORED,
    SegmentationDataset,
    TrainingMasks,
    check_masks,
    class_weights,
    read_size,
)
from training.data.streaming import StreamedRows
from training.engine.loop import Task
from training.evaluation.scores import evaluate_segmenter
from training.tasks.heads import load_for_classes


class SegmentationLoss(nn.Module):
    """
    Mean cross-entropy over the pixels that are not ignored; of a single class the binary cross-entropy.

    Args:
        model: for semantic segmentation.
        class_weights: (num_labels,) weights of the classes, or of background and class; by default, all are 1.
        dice: add one minus soft Dice (V-Net, arXiv 1606.04797), computed for each class over all pixels of the batch
            together, and averaged over the classes in the batch. Like the mean IoU, it weighs all classes the same.
    """

    def __init__(self, model: PreTrainedModel, class_weights: torch.Tensor | None, dice: bool = False):
        super().__init__()
        self.model = model
        self.dice = dice
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The loss by the name `loss`.

        Args:
            pixel_values: (batch, channels, height, width), normalised.
            labels: (batch, height, width) class indices, or [`IGNORED`].
        """
        logits = self.model(pixel_values).logits.float()
        if logits.shape[1] == 1:  # the sigmoid of a logit is the softmax of 0 and the logit
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        weights = logits.new_ones(logits.shape[1]) if self.class_weights is None else self.class_weights
        counts = labels != IGNORED
        total = (weights[labels * counts] * counts).sum()
        loss = F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORED, reduction="sum")
        loss = loss / total.clamp(min=1)  # 0, not NaN, if all pixels are ignored
        if self.dice:
            as_one_image = logits.transpose(0, 1).flatten(1, 2).unsqueeze(0)
            loss = loss + dice_loss(as_one_image, labels.flatten(0, 1).unsqueeze(0), "macro", ignore_index=IGNORED)
        return {"loss": loss}


def draw_predictions(segmenter: SlidingWindowSegmenter, images: SegmentationDataset) -> Image.Image:
    """The segmentations of four images at even distances in the data set, and their mistakes; see [`class_strip`]."""
    picked = np.linspace(0, len(images) - 1, 4).round().astype(int).tolist()
    found = [row for index in picked if (row := images.read(index)) is not None]
    predicted = [segmenter(image) for image, _ in found]
    names = label_names(segmenter.model.config.id2label)
    return class_strip(predicted, [labels for _, labels in found], names, IGNORED)


def load_segmenter(
    args: SegmentationArguments, source: str, names: dict[int, str]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    The model to fine-tune, and an image processor with its mean and standard deviation.

    Args:
        args: the script's options.
        source: encoder or segmenter, by folder or hub id.
        names: the classes by number.

    Raises:
        ValueError: if there is no such model, or it does not fit the options.
    """
    names_of_changes = ("decoder_type", "decoder_skip", "drop_path_rate")
    changes = {name: value for name in names_of_changes if (value := getattr(args, name)) is not None}
    config = load_config(source)
    if config.decoder_base_num_patches is None:  # a new decoder is made for the size of these crops
        patch_size = to_pair(getattr(config.backbone_config or config, "patch_size", 1))
        grid = [-(-side // patch) for side, patch in zip(read_size(args.crop_size), patch_size, strict=True)]
        changes["decoder_base_num_patches"] = grid[0] * grid[1]
    model = load_for_classes(AutoModelForSemanticSegmentation, source, names, **changes)
    processor = load_processor(source, model.config)
    crop_size = dict(zip(("height", "width"), read_size(args.crop_size), strict=True))
    size = crop_size if args.image_size is None else dict.fromkeys(("max_height", "max_width"), args.image_size)
    processor = SegformerImageProcessorPil(
        size=size,
        crop_size=crop_size,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        do_reduce_labels=args.reduce_labels,
        do_convert_rgb=len(processor.image_mean) == 3,
    )
    return model, processor


class SegmentationTask(Task):
    """
    Train a segmenter on crops, and validate it on whole images with a sliding window.

    Args:
        args: the script's options.
        accelerator: from `build_accelerator`.
        model: for semantic segmentation.
        processor: its image processor.
        splits: training and validation, from `load_splits`.
        names: the classes by number.

    Raises:
        ValueError: if a mask does not fit its image or the classes, or a size does not fit the model.
    """

    metric = "mean_iou"

    def __init__(
        self,
        args: SegmentationArguments,
        accelerator: Accelerator,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        splits: tuple[Dataset | StreamedRows, Dataset],
        names: dict[int, str],
    ):
        self.args, self.accelerator, self.processor = args, accelerator, processor
        masks = {"max_corrupt": args.max_corrupt, "num_labels": len(names), "reduce_labels": args.reduce_labels}
        self.train_data = TrainingMasks(
            splits[0],
            **masks,
            processor=processor,
            crop_size=read_size(args.crop_size),
            image_size=args.image_size,
            resize_ratios=(args.min_resize_ratio, args.max_resize_ratio),
            photometric_distortion=args.photometric_distortion,
            seed=args.seed,
        )
        self.validation_images = SegmentationDataset(splits[1], **masks, num_channels=len(processor.image_mean))
        check_masks(self.train_data, args.train_split, names, accelerator.is_main_process)
        check_masks(self.validation_images, args.validation_split, names, accelerator.is_main_process)
        self.build_segmenter(model)  # a wrong size is refused here, not at the first validation
        weights = class_weights(self.train_data) if args.class_balanced else None
        self.losses = SegmentationLoss(model, weights, args.dice)

    def build_segmenter(self, model: PreTrainedModel) -> SlidingWindowSegmenter:
        """The model with a sliding window of the size that the options ask for."""
        return SlidingWindowSegmenter(model, self.processor, read_size(self.args.window or self.args.crop_size))

    def evaluate(self, losses: nn.Module) -> dict[str, float]:
        """Mean IoU, pixel accuracy and IoU of each class on the validation split."""
        model = self.accelerator.unwrap_model(losses, keep_torch_compile=False).model
        images = self.validation_images
        metrics = evaluate_segmenter(self.build_segmenter(model), images.read, len(images), self.accelerator)
        images.check()
        return metrics

    def draw(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        """Predictions for validation images, and their mistakes."""
        strip = draw_predictions(self.build_segmenter(model), self.validation_images)
        return {"validation/predictions": np.asarray(strip)[None]}
