"""Semantic segmentation as a task for the training loop."""

import numpy as np
import torch
from accelerate import Accelerator
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

from arguments import SegmentationArguments
from cbsa_hf import SlidingWindowSegmenter, default_checkpoint
from cbsa_hf.attention_cbsa import to_pair
from cbsa_hf.checkpoints import load_config, load_processor
from cbsa_hf.overlays import class_strip
from data.loading import find_mask_columns
from data.segmentation import IGNORED, MaskedImages, TrainingMasks, check_masks, class_weights, read_names, read_size
from engine.loop import load_splits, train
from evaluation.scores import evaluate_segmenter
from tasks.heads import load_for_classes


class Segmentation(nn.Module):
    """
    Cross-entropy over the pixels that count.

    Args:
        model: for semantic segmentation.
        class_weights: (num_labels,) weights of the classes; all the same when None.
        dice: whether to add 1 - soft Dice (V-Net, arXiv 1606.04797), the mean over the classes in the batch, whose
            pixels are taken together: like the mean IoU, it gives every class the same say.
    """

    def __init__(self, model: PreTrainedModel, class_weights: torch.Tensor | None, dice: bool = False):
        super().__init__()
        self.model = model
        self.dice = dice
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels (batch, channels, height, width) and class indices (batch, height, width) -> the loss."""
        logits = self.model(pixel_values).logits.float()
        weights = logits.new_ones(logits.shape[1]) if self.class_weights is None else self.class_weights
        counts = labels != IGNORED
        total = (weights[labels * counts] * counts).sum()
        loss = F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORED, reduction="sum")
        loss = loss / total.clamp(min=1)  # 0, not NaN, where no pixel counts
        if self.dice:
            as_one_image = logits.transpose(0, 1).flatten(1, 2).unsqueeze(0)
            loss = loss + dice_loss(as_one_image, labels.flatten(0, 1).unsqueeze(0), "macro", ignore_index=IGNORED)
        return {"loss": loss}


def draw_predictions(segmenter: SlidingWindowSegmenter, images: MaskedImages, count: int = 4) -> Image.Image:
    """What a segmenter makes of images at even distances, and where it is wrong; see [`class_strip`]."""
    picked = np.linspace(0, len(images) - 1, count).round().astype(int).tolist()
    found = [row for index in picked if (row := images.read(index)) is not None]
    predicted = [segmenter(image) for image, _ in found]
    return class_strip(predicted, [labels for _, labels in found], segmenter.model.config.id2label, IGNORED)


def load_segmenter(args: SegmentationArguments, names: dict[int, str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model to fine-tune, and an image processor of its normalisation; a ValueError when that is not possible."""
    source = args.model_name_or_path or default_checkpoint()
    changes = {"decoder_type": args.decoder_type, "drop_path_rate": args.drop_path_rate}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = load_config(source)
    if config.decoder_base_num_patches is None:  # a new decoder is for the size of these crops
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
        do_convert_rgb=True,
    )
    return model, processor


def train_segmenter(args: SegmentationArguments, accelerator: Accelerator):
    """Train a segmenter as the options say; see [`train`] for what it leaves behind and raises."""
    train_split, validation_split = load_splits(args, find_mask_columns)
    names = read_names(args.id2label, args.dataset_name)
    model, processor = load_segmenter(args, names)
    masks = {"max_corrupt": args.max_corrupt, "num_labels": len(names), "reduce_labels": args.reduce_labels}
    train_images = TrainingMasks(
        train_split,
        **masks,
        processor=processor,
        crop_size=read_size(args.crop_size),
        image_size=args.image_size,
        resize_ratios=(args.min_resize_ratio, args.max_resize_ratio),
        photometric_distortion=args.photometric_distortion,
        seed=args.seed,
    )
    validation_images = MaskedImages(validation_split, **masks)
    check_masks(train_images, args.train_split, names, accelerator.is_main_process)
    check_masks(validation_images, args.validation_split, names, accelerator.is_main_process)

    def build_segmenter(model: PreTrainedModel) -> SlidingWindowSegmenter:
        return SlidingWindowSegmenter(model, processor, read_size(args.window or args.crop_size))

    def validate(network: Segmentation) -> dict[str, float]:
        segmenter = build_segmenter(accelerator.unwrap_model(network, keep_torch_compile=False).model)
        metrics = evaluate_segmenter(segmenter, validation_images.read, len(validation_images), accelerator)
        validation_images.check()
        return metrics

    def draw(model: PreTrainedModel) -> dict[str, np.ndarray]:
        strip = draw_predictions(build_segmenter(model), validation_images)
        return {"validation/predictions": np.asarray(strip)[None]}

    build_segmenter(model)  # bad sizes are told before the training, not at its first validation
    weights = class_weights(train_images) if args.class_balanced else None
    task = Segmentation(model, weights, args.dice)
    train(args, accelerator, task, processor, train_images, validate, metric="mean_iou", draw=draw)
