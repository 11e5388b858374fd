"""Images with masks, as tensors for training and as arrays for validation."""

import numpy as np
import torch
from kornia import augmentation
from PIL import Image
from transformers import BaseImageProcessor

from cbsa_hf.segmentation.images import height_and_width, open_mask, resize
from cbsa_hf.segmentation.sliding_window import label_names
from training.data.labelled_images import LabelledImages, read_encoded, warn_of_missing
from training.data.streaming import StreamedRows


IGNORED = 255  # the label of pixels that do not count
CHECKED_MASKS = 100  # of each split, before the first step


def read_size(sides: list[int]) -> tuple[int, int]:
    """
    (height, width) from the one or two numbers of an option; one number is the side of a square.

    Raises:
        ValueError: if there are more than two numbers, or one is below 1.
    """
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"{' '.join(map(str, sides))} is not a size; give a height and a width, or one side.")
    return sides[0], sides[-1]


def read_mask(mask: Image.Image, num_labels: int, reduce_labels: bool, name: str = "A mask") -> np.ndarray:
    """
    Class indices (height, width), int64, with [`IGNORED`] for pixels that do not count.

    Args:
        mask: grey, of whole numbers.
        num_labels: number of labels.
        reduce_labels: ignore label 0, and subtract 1 from all others.
        name: of the mask, for messages.

    Raises:
        ValueError: if a value is not a class index, or the mask is not grey.
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
            f"{num_labels} (the classes named, or one class and 0 for its background) and {IGNORED} for pixels "
            "that do not count."
        )
    return labels


class SegmentationDataset(LabelledImages):
    """
    Images with masks, both at their own size.

    Args:
        dataset, max_corrupt: see [`LabelledImages`].
        num_labels: number of classes; the labels of a single class are 1, and 0 for what does not belong to it.
        reduce_labels: see [`read_mask`].
        num_channels: see [`LabelledImages`].
    """

    def __init__(self, dataset, max_corrupt: int, num_labels: int, reduce_labels: bool, num_channels: int = 3):
        super().__init__(dataset, max_corrupt, num_channels)
        self.num_labels = max(2, num_labels)
        self.reduce_labels = reduce_labels

    def read_row(self, row: dict, name: str) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        """The image, and class indices (height, width). Raises ValueError if their sizes differ."""
        image = self.read_image(row, name)
        mask = read_encoded(open_mask, row[self.label_column], f"The mask of {name}")
        height, width = height_and_width(image)
        if (width, height) != mask.size:
            raise ValueError(f"{name} has {(width, height)} pixels across and down, its mask {mask.size}.")
        return image, read_mask(mask, self.num_labels, self.reduce_labels, f"The mask of {name}")


def check_masks(images: SegmentationDataset, split: str, names: dict[int, str], warns: bool = True):
    """
    Check up to [`CHECKED_MASKS`] masks at even distances in a split, before a run begins. The masks of a stream are
    checked one by one, when they are read.

    Args:
        images: the data set.
        split: its name, for messages.
        names: the classes by number.
        warns: log the names of the classes that have no pixel in these masks.

    Raises:
        ValueError: if a mask has another size than its image, or a value that is not a class index.
    """
    if isinstance(images.dataset, StreamedRows):
        return
    counts, num_ignored, num_masks = np.zeros(images.num_labels, dtype=np.int64), 0, 0
    for index in np.linspace(0, len(images) - 1, min(CHECKED_MASKS, len(images))).astype(int).tolist():
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
    names = label_names(names)
    missing = [names[i] for i in np.flatnonzero(counts == 0)]
    warn_of_missing(missing, f"No pixel of the masks looked at in the split {split!r} ({num_masks})", reason)


class TrainingMasks(SegmentationDataset):
    """
    Images and masks, resized, cropped and flipped together at random, with colours distorted at random. All of it
    depends on seed, epoch and index only. Pixels outside of the image have the label [`IGNORED`].

    Args:
        dataset, max_corrupt, num_labels, reduce_labels: see [`SegmentationDataset`].
        processor: says how pixels are normalised.
        crop_size: (height, width) of the crops in pixels.
        image_size: long side in pixels that images are resized to; by default, their own.
        resize_ratios: smallest and largest random factor on that size.
        photometric_distortion: vary brightness, contrast, saturation and hue.
        seed: seed of the run.

    Raises:
        ValueError: if colours of another number of channels than 3 are to be distorted.
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
        super().__init__(dataset, max_corrupt, num_labels, reduce_labels, len(processor.image_mean))
        if photometric_distortion and self.num_channels != 3:
            raise ValueError(
                f"The colours of {self.num_channels} channels cannot be distorted: give `--no_photometric_distortion`."
            )
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
        """`pixel_values` (3, height, width) and `labels` (height, width) of a crop."""
        seeds = np.random.SeedSequence((self.seed, int(self.epoch), index))
        _, image, labels = self.read_next(index)
        ratio = np.random.default_rng(seeds).uniform(*self.resize_ratios)
        height, width = height_and_width(image)
        ratio *= 1 if self.image_size is None else self.image_size / max(height, width)
        size = max(1, round(width * ratio)), max(1, round(height * ratio))
        pixels = torch.from_numpy(np.array(resize(image, size, Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
        # The labels plus 1: padding then adds zeros, which are the ignored label.
        mask = np.where(labels == IGNORED, 0, labels + 1).astype(np.float32)
        mask = torch.from_numpy(np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)))
        with torch.random.fork_rng(devices=[]):  # kornia draws from torch's own generator
            torch.manual_seed(int(seeds.generate_state(1)[0]))
            pixels, mask = self.augment(pixels[None], mask[None, None])
        labels = mask[0, 0].long() - 1
        return {"pixel_values": self.normalise(pixels)[0], "labels": labels.where(labels >= 0, IGNORED)}


def class_weights(images: SegmentationDataset) -> torch.Tensor:
    """
    Weights of the classes, (num_labels,): `1 / ln(1.02 + share of the pixels)` (ENet, arXiv 1606.02147).

    The largest possible weight is about 70 times the smallest. Median frequency divided by frequency has no such
    bound; on CamVid it lost more on the large classes than it gained on the small ones.
    """
    counts = np.zeros(images.num_labels)
    for _, labels in images.readable():
        counts += np.bincount(labels[labels != IGNORED], minlength=images.num_labels)
    return torch.from_numpy(1 / np.log(1.02 + counts / counts.sum())).float()
