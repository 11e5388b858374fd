"""Semantic segmentation as a task for the training loop."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from data import LabelledImages, find_mask_columns, warn_of_missing
from evaluation import evaluate_segmenter
from heads import load_for_classes
from kornia import augmentation
from kornia.losses import dice_loss
from loop import TrainingArguments, load_splits, train
from PIL import Image
from streaming import StreamedRows
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
    SegformerImageProcessorPil,
)

from cbsa_hf import SlidingWindowSegmenter, default_checkpoint
from cbsa_hf.attention_cbsa import to_pair
from cbsa_hf.checkpoints import load_config, load_processor
from cbsa_hf.mask_decoder_cbsa import DECODERS
from cbsa_hf.overlays import class_strip
from cbsa_hf.segmentation.images import open_image, open_mask


IGNORED = 255
MASKS_LOOKED_AT = 100  # of each split, before the first step


@dataclass(kw_only=True)
class SegmentationArguments(TrainingArguments):
    """Options of `finetune.py --task semantic-segmentation`."""

    task: str = field(metadata={"help": "what the model is to do"})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "encoder or segmenter, folder or hub id; default: the shipped classifier"}
    )
    id2label: str | None = field(
        default=None, metadata={"help": "JSON file with the names of the classes; default: id2label.json in the data"}
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "whether label 0 does not count and the others move down by one (ADE20K)"}
    )
    decoder_type: str | None = field(
        default=None, metadata={"help": f"{', '.join(DECODERS)}; default: as the model says"}
    )
    crop_size: list[int] = field(
        default_factory=lambda: [512], metadata={"help": "height and width of the training crops in pixels, or a side"}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "long side that images have in training and validation, in pixels; default: as they come"},
    )
    min_resize_ratio: float = field(default=0.5, metadata={"help": "least factor beyond that in training"})
    max_resize_ratio: float = field(default=2.0, metadata={"help": "largest factor beyond that in training"})
    photometric_distortion: bool = field(default=True, metadata={"help": "whether colours are distorted at random"})
    class_balanced: bool = field(default=False, metadata={"help": "whether rare classes weigh more"})
    dice: bool = field(
        default=False, metadata={"help": "whether the overlap of masks, class by class, joins the loss of the pixels"}
    )
    window: list[int] | None = field(
        default=None, metadata={"help": "height and width of the windows of validation; default: crop_size"}
    )


def read_names(path: str | None, dataset_name: str) -> dict[int, str]:
    """
    The classes of a data set by number.

    Args:
        path: of a JSON file that maps numbers to names.
        dataset_name: where to look for `id2label.json` when no path is given.

    Raises:
        ValueError: no such file, not such a mapping, or numbers that do not begin at 0 or leave gaps.
    """
    file = Path(path) if path is not None else Path(dataset_name) / "id2label.json"
    try:
        names = {int(number): str(name) for number, name in json.loads(file.read_text()).items()}
    except OSError as error:
        raise ValueError(
            f"The names of the classes are not in {file}; give a JSON file like {{'0': 'sky', ...}} as `--id2label`."
        ) from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON file that maps numbers to names of classes.") from error
    if sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names):
        raise ValueError(f"{file} does not give each number from 0 on a name of its own.")
    return names


def read_size(sides: list[int]) -> tuple[int, int]:
    """
    (height, width) of an option that takes either both or the side of a square.

    Raises:
        ValueError: neither one nor two numbers, or one below 1.
    """
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"{' '.join(map(str, sides))} is not a size; give a height and a width, or one side.")
    return sides[0], sides[-1]


def read_mask(mask: Image.Image, num_labels: int, reduce_labels: bool, name: str = "A mask") -> np.ndarray:
    """
    Class indices (height, width), [`IGNORED`] where a pixel does not count.

    Raises:
        ValueError: an index that no class has, or values that are no indices.
    """
    labels = np.asarray(mask)
    if labels.ndim != 2 or labels.dtype.kind == "f":
        raise ValueError(
            f"{name} has values of shape {labels.shape} and type {labels.dtype}; masks are grey, of whole numbers."
        )
    labels = labels.astype(np.int64)
    if reduce_labels:
        labels = np.where(labels == 0, IGNORED, labels - 1)
        labels[labels == IGNORED - 1] = IGNORED
    counted = labels[labels != IGNORED]
    smallest, largest = counted.min(initial=0), counted.max(initial=0)
    if smallest < 0 or largest >= num_labels:
        raise ValueError(
            f"{name} has the label {smallest if smallest < 0 else largest}; masks are grey, with labels below "
            f"{num_labels} (the classes named) and {IGNORED} for pixels that do not count."
        )
    return labels


class MaskedImages(LabelledImages):
    """
    Images with masks, as they are.

    Args:
        dataset, max_corrupt: see [`LabelledImages`].
        num_labels, reduce_labels: see [`read_mask`].
    """

    def __init__(self, dataset, max_corrupt: int, num_labels: int, reduce_labels: bool):
        super().__init__(dataset, max_corrupt)
        self.num_labels = num_labels
        self.reduce_labels = reduce_labels

    def read_row(self, row: dict, name: str) -> tuple[Image.Image, np.ndarray]:
        """Image in RGB and class indices (height, width); a ValueError if they differ in size."""
        image = open_image(row[self.image_column], name=name)
        mask = open_mask(row[self.label_column], name=f"The mask of {name}")
        if image.size != mask.size:
            raise ValueError(f"{name} has {image.size} pixels across and down, its mask {mask.size}.")
        return image, read_mask(mask, self.num_labels, self.reduce_labels, f"The mask of {name}")


def check_masks(images: MaskedImages, split: str, names: dict[int, str], warns: bool = True):
    """
    Look at some masks of a split, at even distances, before a run begins; a stream's are looked at when they come.
    Classes without a pixel are named in the log, if it `warns`.

    Raises:
        ValueError: a mask of another size than its image, or with values that no class has.
    """
    if isinstance(images.dataset, StreamedRows):
        return
    counts, num_ignored, num_masks = np.zeros(images.num_labels, dtype=np.int64), 0, 0
    for index in np.linspace(0, len(images) - 1, min(MASKS_LOOKED_AT, len(images))).astype(int).tolist():
        if (found := images.read(index)) is not None:
            _, labels = found
            counts += np.bincount(labels[labels != IGNORED], minlength=images.num_labels)
            num_ignored += int((labels == IGNORED).sum())
            num_masks += 1
    if not warns or not num_masks:
        return
    reason = ""
    if num_ignored:
        share = num_ignored / (num_ignored + counts.sum())
        reason = (
            f" {share:.0%} of the pixels have the label {IGNORED}, which does not count: if it is meant as a class, "
            "write that class's number instead."
        )
    missing = [names[i] for i in np.flatnonzero(counts == 0)]
    warn_of_missing(missing, f"No pixel of the {num_masks} masks looked at in the split {split!r}", reason)


class TrainingMasks(MaskedImages):
    """
    Random resizing, crops, flips and distorted colours, of image and mask together; what is drawn depends on seed,
    epoch and index alone. Outside the image, pixels do not count.

    Args:
        dataset, max_corrupt, num_labels, reduce_labels: see [`MaskedImages`].
        processor: says how pixels are normalised.
        crop_size: (height, width) of the crops in pixels.
        image_size: long side that images are resized to first; their own when None.
        resize_ratios: least and largest factor beyond that.
        photometric_distortion: whether brightness, contrast, saturation and hue vary.
        seed: seed of the run.
    """

    def __init__(
        self,
        dataset,
        max_corrupt: int,
        num_labels: int,
        reduce_labels: bool,
        processor: BaseImageProcessor,
        crop_size: tuple[int, int],
        image_size: int | None,
        resize_ratios: tuple[float, float],
        photometric_distortion: bool,
        seed: int,
    ):
        super().__init__(dataset, max_corrupt, num_labels, reduce_labels)
        self.image_size = image_size
        self.resize_ratios = resize_ratios
        self.seed = seed
        colours = [augmentation.ColorJitter(0.4, 0.5, 0.5, 0.1)] if photometric_distortion else []
        self.augment = augmentation.AugmentationSequential(
            augmentation.RandomCrop(crop_size, pad_if_needed=True),
            augmentation.RandomHorizontalFlip(),
            *colours,
            data_keys=["image", "mask"],
        )
        self.normalise = augmentation.Normalize(
            torch.tensor(processor.image_mean), torch.tensor(processor.image_std), keepdim=True
        )

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        seeds = np.random.SeedSequence((self.seed, int(self.epoch), index))
        _, image, labels = self.read_next(index)
        ratio = np.random.default_rng(seeds).uniform(*self.resize_ratios)
        ratio *= 1 if self.image_size is None else self.image_size / max(image.size)
        size = [max(1, round(side * ratio)) for side in image.size]
        pixels = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
        # One more than the label, so that what padding adds, 0, is what does not count.
        mask = np.where(labels == IGNORED, 0, labels + 1).astype(np.float32)
        mask = torch.from_numpy(np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)))
        with torch.random.fork_rng(devices=[]):  # kornia draws from torch's own generator
            torch.manual_seed(int(seeds.generate_state(1)[0]))
            pixels, mask = self.augment(pixels[None], mask[None, None])
        labels = mask[0, 0].long() - 1
        return {"pixel_values": self.normalise(pixels)[0], "labels": labels.where(labels >= 0, IGNORED)}


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


def class_weights(images: MaskedImages) -> torch.Tensor:
    """
    For each class `1 / ln(1.02 + its share of the pixels)` (ENet, arXiv 1606.02147): rare classes weigh more, at most
    about 70 times as much. Median frequency over frequency, which has no bound, cost the large classes of CamVid more
    than it won for the small ones.
    """
    counts = np.zeros(images.num_labels)
    for _, labels in images.readable():
        counts += np.bincount(labels[labels != IGNORED], minlength=images.num_labels)
    return torch.from_numpy(1 / np.log(1.02 + counts / counts.sum())).float()


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
