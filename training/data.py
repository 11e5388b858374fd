"""Labelled images from the Hub or from local files, as tensors for training and for validation."""

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from PIL import Image as PILImage
from transformers import BaseImageProcessor


def load_images(name: str, config_name: str | None = None) -> DatasetDict:
    """
    Load a data set by hub id, local folder (Parquet files or an image folder), or the path of one Parquet file.

    Args:
        name: the id or path.
        config_name: which of its configurations, where it has several.

    Raises:
        ValueError: nothing of that name, or no such configuration.
    """
    try:
        if name.endswith(".parquet"):
            return load_dataset("parquet", data_files=name)
        return load_dataset(name, config_name)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{name} is neither a folder or Parquet file with images, nor the id of a data set that can be reached on "
            "the Hub."
        ) from error


def find_split(splits: DatasetDict, name: str) -> Dataset:
    """The split of that name; a ValueError names the splits there are."""
    if name not in splits:
        raise ValueError(f"The data set has no split {name!r}; it has {', '.join(splits)}.")
    return splits[name]


def find_columns(dataset: Dataset) -> tuple[str, str]:
    """
    Names of the image and of the label column, by their types.

    Raises:
        ValueError: no image column, or no label column.
    """
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"The data set needs an `Image` and a `ClassLabel` column; it has {dict(dataset.features)}. "
            "Cast it with `datasets`, for example `dataset.cast_column('label', ClassLabel(names=[...]))`."
        )
    return images[0], labels[0]


def find_mask_columns(dataset: Dataset) -> tuple[str, str]:
    """
    Names of the image and of the mask column: the mask is the image column named like one.

    Raises:
        ValueError: not exactly one image and one mask column.
    """
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    masks = [name for name in columns if name in ("label", "mask", "annotation", "segmentation_mask")]
    images = [name for name in columns if name not in masks]
    if len(images) != 1 or len(masks) != 1:
        raise ValueError(
            f"The data set needs one image column and one of masks named `label`, `mask`, `annotation` or "
            f"`segmentation_mask`; its image columns are {columns}."
        )
    return images[0], masks[0]


def to_tensor(image: PILImage.Image, processor: BaseImageProcessor) -> torch.Tensor:
    """An RGB image -> (3, height, width), scaled and normalised as the processor says."""
    pixels = np.asarray(image, dtype=np.float32) * processor.rescale_factor
    pixels = (pixels - np.float32(processor.image_mean)) / np.float32(processor.image_std)
    return torch.from_numpy(pixels).permute(2, 0, 1)


class TrainingImages(torch.utils.data.Dataset):
    """
    Random resized crops and horizontal flips: the augmentation of the published recipe.

    What is drawn depends on seed, epoch and index alone, not on workers or processes. PIL crops and resizes in one
    antialiased call; the augmentations of torchvision and kornia want tensors of one size, and these images have any.

    Args:
        dataset: rows with an image and a label.
        processor: says how pixels are scaled and normalised.
        crop_size: side of the square crops in pixels.
        min_crop_scale: smallest share of the image's area in a crop; the largest is 1.
        seed: seed of the run.
    """

    def __init__(
        self, dataset: Dataset, processor: BaseImageProcessor, crop_size: int, min_crop_scale: float, seed: int
    ):
        self.dataset = dataset
        self.image_column, self.label_column = find_columns(dataset)
        self.processor = processor
        self.crop_size = crop_size
        self.min_crop_scale = min_crop_scale
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

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

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng((self.seed, self.epoch, index))
        row = self.dataset[index]
        image = row[self.image_column].convert("RGB")
        box = self.random_box(*image.size, random)
        image = image.resize((self.crop_size, self.crop_size), PILImage.Resampling.BILINEAR, box=box)
        if random.random() < 0.5:
            image = image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        return {"pixel_values": to_tensor(image, self.processor), "labels": torch.tensor(row[self.label_column])}


def validation_images(dataset: Dataset, processor: BaseImageProcessor) -> Dataset:
    """The same rows, each as the processor alone makes it: `pixel_values` and `labels`."""
    image_column, label_column = find_columns(dataset)

    def transform(rows: dict) -> dict:
        inputs = processor(rows[image_column], return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"], "labels": torch.tensor(rows[label_column])}

    return dataset.with_transform(transform)
