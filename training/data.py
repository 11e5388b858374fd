"""Labelled images from the Hub or from local files, as tensors for training and for validation."""

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PILImage
from streaming import StreamedRows
from torch.nn import functional as F
from transformers import BaseImageProcessor

from cbsa_hf.segmentation.images import ImageError, open_image


MASK_NAMES = ("label", "mask", "annotation", "segmentation_mask")

SAMPLE_SIZE = 16

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DataArguments:
    """Options of every script that reads labelled images."""

    dataset_name: str = field(metadata={"help": "hub id, local folder or Parquet file"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration, where there are several"})
    image_column: str | None = field(default=None, metadata={"help": "column of the images; default: by its type"})
    label_column: str | None = field(
        default=None, metadata={"help": "column of the classes or masks; default: by its type, masks by their name"}
    )
    max_corrupt: int = field(default=10, metadata={"help": "unreadable images that are skipped before the run stops"})


def load_images(
    name: str, config_name: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """
    Load a data set by hub id, local folder (Parquet files or an image folder), or the path of one Parquet file.

    Args:
        name: the id or path.
        config_name: which of its configurations, where it has several.
        streaming: read it as it comes, not before.

    Raises:
        ValueError: nothing of that name, or no such configuration; a script, which `datasets` does not run; or columns
            that are not known before they are read.
    """
    try:
        if name.endswith(".parquet"):
            splits = load_dataset("parquet", data_files=name, streaming=streaming)
        else:
            splits = load_dataset(name, config_name, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{name} is neither a folder or Parquet file with images, nor the id of a data set that can be reached on "
            "the Hub."
        ) from error
    except RuntimeError as error:  # of a data set that is a script
        raise ValueError(f"{name} cannot be loaded: {error}.") from error
    if any(split.features is None for split in splits.values()):
        raise ValueError(f"What columns {name} has is not known before it is read: leave out `--streaming`.")
    return splits


def find_split(splits: DatasetDict, name: str) -> Dataset:
    """The split of that name; a ValueError names the splits there are."""
    if name not in splits:
        raise ValueError(f"The data set has no split {name!r}; it has {', '.join(splits)}.")
    return splits[name]


def columns_of_type(dataset: Dataset, kind: type, name: str | None) -> list[str]:
    """All columns of a type, or the one of that name if it is; a ValueError when there is none of that name."""
    if name is not None and name not in dataset.features:
        raise ValueError(f"The data set has no column {name!r}; it has {', '.join(dataset.features)}.")
    return [
        column for column, feature in dataset.features.items() if isinstance(feature, kind) and name in (None, column)
    ]


def find_columns(dataset: Dataset, image_column: str | None = None, label_column: str | None = None) -> list[str]:
    """
    Names of the image and of the label column: those given, or the first of their types.

    Raises:
        ValueError: no image column, or no label column.
    """
    images = columns_of_type(dataset, Image, image_column)
    labels = columns_of_type(dataset, ClassLabel, label_column)
    if not images or not labels:
        raise ValueError(
            f"The data set needs an `Image` and a `ClassLabel` column; it has {dict(dataset.features)}. "
            "Cast it with `datasets`, for example `dataset.cast_column('label', ClassLabel(names=[...]))`."
        )
    return [images[0], labels[0]]


def class_names(dataset: Dataset) -> list[str]:
    """Names of the classes of a data set of two columns, as its label column has them."""
    _, labels = dataset.features.values()
    return labels.names


def find_mask_columns(dataset: Dataset, image_column: str | None = None, label_column: str | None = None) -> list[str]:
    """
    Names of the image and of the mask column: those given, or else the mask is the image column named like one.

    Raises:
        ValueError: not exactly one image and one mask column.
    """
    images, masks = (columns_of_type(dataset, Image, name) for name in (image_column, label_column))
    if label_column is None:
        masks = [name for name in masks if name in MASK_NAMES and name != image_column]
    images = [name for name in images if name not in masks]
    if len(images) != 1 or len(masks) != 1:
        raise ValueError(
            f"The data set needs one image column and one of masks, named {', '.join(MASK_NAMES)} or given as "
            f"`--label_column`; found were the images {images} and the masks {masks}."
        )
    return images + masks


def to_tensor(image: PILImage.Image, processor: BaseImageProcessor) -> torch.Tensor:
    """An RGB image -> (3, height, width), scaled and normalised as the processor says."""
    pixels = np.asarray(image, dtype=np.float32) * processor.rescale_factor
    pixels = (pixels - np.float32(processor.image_mean)) / np.float32(processor.image_std)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def checksum_image(encoded: dict | None) -> int:
    """Of an image that is still encoded, or of its file's name where the data set has no more."""
    encoded = encoded or {}
    return zlib.crc32(encoded.get("bytes") or Path(encoded.get("path") or "").name.encode())


def check_label(label: int | None, num_labels: int, name: str):
    """A ValueError when it is the number of no class."""
    if type(label) is not int or not 0 <= label < num_labels:
        given = "no label" if label is None else f"the label {label!r}"
        raise ValueError(f"{name} has {given}; the data set names the classes 0 to {num_labels - 1}.")


def check_labels(dataset: Dataset | StreamedRows, split: str, warns: bool = True):
    """
    Look at all labels of a split of two columns; those of a stream are looked at one by one, when they come.

    Args:
        warns: whether to name the classes without an image in the log.

    Raises:
        ValueError: a label that no class has.
    """
    if isinstance(dataset, StreamedRows):
        return
    column, names = list(dataset.features)[1], class_names(dataset)
    labels = dataset.select_columns(column)[:][column]
    wrong = [i for i, label in enumerate(labels) if label is None or not 0 <= label < len(names)]
    if wrong:
        more = f" (and {len(wrong) - 1} others)" if len(wrong) > 1 else ""
        check_label(labels[wrong[0]], len(names), f"Image {wrong[0]} of the split {split!r}{more}")
    if warns:
        present = set(labels)
        warn_of_missing([name for i, name in enumerate(names) if i not in present], f"No image of the split {split!r}")


def warn_of_missing(names: list[str], subject: str, reason: str = ""):
    """A warning that names classes, ten at most."""
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        logger.warning("%s is of the class %s%s.%s", subject, ", ".join(map(repr, names[:10])), more, reason)


class LabelledImages(torch.utils.data.Dataset):
    """
    Rows of a data set whose images may be broken: those are skipped, named in the log, and counted.

    Args:
        dataset: of two columns, an image, and a label or mask.
        max_corrupt: how many broken images are too many to go on; of a stream, in one epoch.
    """

    def __init__(self, dataset: Dataset | StreamedRows, max_corrupt: int):
        self.image_column, self.label_column = dataset.features
        self.num_labels = getattr(dataset.features[self.label_column], "num_classes", None)
        self.fingerprint = getattr(dataset, "_fingerprint", None)
        if not isinstance(dataset, StreamedRows):  # whose rows are encoded
            for column, feature in dataset.features.items():
                if isinstance(feature, Image):
                    dataset = dataset.cast_column(column, Image(decode=False))
        self.dataset = dataset
        self.max_corrupt = max_corrupt
        self.corrupt = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # written by the workers
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # read by workers that outlive an epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: list) -> list[dict[str, torch.Tensor]]:
        """The items of a batch, as its sampler has chosen them."""
        return [self[index] for index in self.indices(batch)]

    def indices(self, batch: list) -> list[int]:
        """The indices of the rows of a batch, which a stream holds from now on."""
        return self.dataset.hold(batch) if isinstance(self.dataset, StreamedRows) else batch

    def set_epoch(self, epoch: int):
        self.epoch.fill_(epoch)
        if isinstance(self.dataset, StreamedRows):
            self.corrupt.zero_()  # every epoch has an order of its own

    def sample(self) -> list[int]:
        """Checksums of some encoded images at even distances, of a stream of its first: to know the data set again."""
        if isinstance(self.dataset, StreamedRows):
            rows = self.dataset.first(SAMPLE_SIZE)
        else:
            indices = np.linspace(0, len(self) - 1, min(SAMPLE_SIZE, len(self))).astype(int)
            rows = self.dataset.select(indices)
        return [checksum_image(row[self.image_column]) for row in rows]

    def name(self, index: int, row: dict) -> str:
        """What messages call an image: its file where the data set has that, and its row."""
        path = (row[self.image_column] or {}).get("path")
        place = f"{index} of this epoch" if isinstance(self.dataset, StreamedRows) else str(index)
        return f"Image {place}" + (f" ({path})" if path else "")

    def read(self, index: int) -> tuple[PILImage.Image, int | np.ndarray] | None:
        """
        Image in RGB, and label or mask; None when one of them cannot be read.

        Raises:
            ValueError: a label that no class has.
        """
        row = self.dataset[index]
        name = self.name(index, row)
        try:
            return self.read_row(row, name)
        except ImageError as error:
            if not self.corrupt[index]:
                logger.warning("Skipped image %d, which cannot be read: %s", index, error)
            self.corrupt[index] = True
            return None

    def read_row(self, row: dict, name: str) -> tuple[PILImage.Image, int | np.ndarray]:
        image = open_image(row[self.image_column], name=name)
        check_label(row[self.label_column], self.num_labels, name)
        return image, row[self.label_column]

    def readable(self) -> Iterator[tuple[PILImage.Image, int | PILImage.Image]]:
        """What [`read`] says of each row in turn, the broken ones left out."""
        return (found for index in range(len(self)) if (found := self.read(index)) is not None)

    def read_next(self, index: int) -> tuple[int, PILImage.Image, int | PILImage.Image]:
        """That row, or the next that can be read, of a stream in the same batch: its index, and what [`read`] says."""
        streams = isinstance(self.dataset, StreamedRows)
        first, count = (self.dataset.indices[0], len(self.dataset.batch)) if streams else (0, len(self))
        for _ in range(count):
            if (found := self.read(index)) is not None:
                return index, *found
            self.check()
            index = first + (index + 1 - first) % count
        raise ValueError(f"None of {count} images in turn can be read (the log names them).")

    def check(self):
        """A ValueError when too many images were broken."""
        count = int(self.corrupt.sum())
        if count > self.max_corrupt:
            raise ValueError(
                f"{count} images cannot be read (the log names them), more than `--max_corrupt {self.max_corrupt}`."
            )


@dataclass
class Crop:
    """
    Args:
        index: of the image in the data set.
        image: the whole image, in RGB.
        label: its class.
        box: left, upper, right and lower side of the crop, from 0 to 1 across the image.
        flipped: whether it is seen in a mirror.
    """

    index: int
    image: PILImage.Image
    label: int
    box: tuple[float, float, float, float]
    flipped: bool


class TrainingImages(LabelledImages):
    """
    Random resized crops and horizontal flips: the augmentation of the published recipe; and mixtures of two images.

    What is drawn depends on seed, epoch and index alone, not on workers or processes; the size of a batch on the index
    of its first image. PIL crops and resizes in one antialiased call.

    Args:
        dataset, max_corrupt: see [`LabelledImages`].
        processor: says how pixels are scaled and normalised.
        crop_sizes: sides of the square crops in pixels, one for each of as many equal parts of the run.
        random_crop_sizes: draw the side of every batch from `crop_sizes` instead.
        num_epochs: length of the run.
        min_crop_scale: smallest share of the image's area in a crop; the largest is 1.
        mixup_alpha: parameter of the Beta distribution of the weights of blended images (Mixup, arXiv 1710.09412); 0
            for none.
        cutmix_alpha: the same for the area of a rectangle that is pasted from another image (CutMix, arXiv
            1905.04899); with both, each image is mixed in one of the two ways. With mixtures the labels are
            probabilities (num_labels,).
        seed: seed of the run.
    """

    def __init__(
        self,
        dataset: Dataset,
        max_corrupt: int,
        processor: BaseImageProcessor,
        crop_sizes: list[int],
        num_epochs: int,
        min_crop_scale: float,
        seed: int,
        random_crop_sizes: bool = False,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ):
        super().__init__(dataset, max_corrupt)
        self.processor = processor
        self.crop_sizes = crop_sizes
        self.random_crop_sizes = random_crop_sizes
        self.num_epochs = num_epochs
        self.min_crop_scale = min_crop_scale
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.seed = seed

    def random_box(self, width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """A box (left, upper, right, lower) of random area, of aspect 3/4 to 4/3, at a random place."""
        for _ in range(10):
            area = width * height * random.uniform(self.min_crop_scale, 1)
            aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, upper = random.integers(width - w, endpoint=True), random.integers(height - h, endpoint=True)
                return left, upper, left + w, upper + h
        return 0, 0, width, height

    def random_crop(self, index: int, random: np.random.Generator) -> Crop:
        """A crop of that image, or of the next that can be read."""
        index, image, label = self.read_next(index)
        left, upper, right, lower = self.random_box(*image.size, random)
        box = left / image.width, upper / image.height, right / image.width, lower / image.height
        return Crop(index, image, label, box, flipped=random.random() < 0.5)

    def tensors(self, crop: Crop, size: int) -> dict[str, torch.Tensor]:
        """What is mixed in a mixture: `pixel_values` (3, size, size)."""
        width, height = crop.image.size
        box = crop.box[0] * width, crop.box[1] * height, crop.box[2] * width, crop.box[3] * height
        image = crop.image.resize((size, size), PILImage.Resampling.BILINEAR, box=box)
        if crop.flipped:
            image = image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        return {"pixel_values": to_tensor(image, self.processor)}

    def crop_size(self, first_index: int) -> int:
        """The side of the crops of the batch that starts with that image."""
        epoch = int(self.epoch)
        if self.random_crop_sizes:
            return int(np.random.default_rng((self.seed, epoch, first_index, 1)).choice(self.crop_sizes))
        return self.crop_sizes[epoch * len(self.crop_sizes) // self.num_epochs]

    def mixing_weights(self, size: int, random: np.random.Generator) -> torch.Tensor | None:
        """(1, size, size), the share that each pixel keeps of its image in a mixture; None for no mixture."""
        alphas = [self.mixup_alpha, self.cutmix_alpha]
        if not any(alphas):
            return None
        cut = random.random() < 0.5 if all(alphas) else bool(self.cutmix_alpha)
        alpha = alphas[cut]
        kept = random.beta(alpha, alpha)
        if not cut:
            return torch.full((1, size, size), kept)
        weights = torch.ones(1, size, size)
        side = size * np.sqrt(1 - kept)
        top, left = random.uniform(0, size, 2) - side / 2  # of a rectangle that the image's border may clip
        rows, columns = (slice(max(0, round(start)), max(0, round(start + side))) for start in (top, left))
        weights[:, rows, columns] = 0
        return weights

    def item(self, index: int, size: int) -> dict[str, torch.Tensor]:
        """The item of that image with a crop of that side."""
        random = np.random.default_rng((self.seed, int(self.epoch), index))
        crop = self.random_crop(index, random)
        tensors = self.tensors(crop, size)
        weights = self.mixing_weights(size, random)
        if weights is None:
            return {**tensors, "labels": torch.tensor(crop.label)}
        other = self.random_crop(int(random.integers(len(self))), random)
        others = self.tensors(other, size)
        share = weights.mean()
        mixed = {}
        for name, tensor in tensors.items():
            kept = F.adaptive_avg_pool2d(weights, tensor.shape[1:]) if tensor.ndim == 3 else share
            mixed[name] = torch.lerp(others[name], tensor, kept)
        labels = torch.zeros(self.num_labels)
        labels[crop.label] += share
        labels[other.label] += 1 - share
        return {**mixed, "labels": labels}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.item(index, self.crop_size(index))

    def __getitems__(self, batch: list) -> list[dict[str, torch.Tensor]]:
        indices = self.indices(batch)
        size = self.crop_size(indices[0])
        return [self.item(index, size) for index in indices]


class ValidationImages(LabelledImages):
    """The same rows, each as the processor alone makes it; a broken image is black and its label -100."""

    def __init__(self, dataset: Dataset, max_corrupt: int, processor: BaseImageProcessor):
        super().__init__(dataset, max_corrupt)
        self.processor = processor

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        found = self.read(index)
        image, label = (PILImage.new("RGB", (1, 1)), -100) if found is None else found
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": torch.tensor(label)}
