"""Images with masks, for training and for validation."""

import json
from pathlib import Path

import numpy as np
import torch
from kornia import augmentation
from PIL import Image
from transformers import BaseImageProcessor

from cbsa_hf.segmentation.images import open_image, open_mask
from data.labelled_images import LabelledImages, warn_of_missing
from data.streaming import StreamedRows


IGNORED = 255

MASKS_LOOKED_AT = 100  # of each split, before the first step


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
