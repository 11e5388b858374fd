"""Images with class labels, as tensors for training and for validation."""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import BaseImageProcessor

from cbsa_hf.segmentation.images import height_and_width, normalise, resize
from training.data.labelled_images import LabelledImages, label_list, to_tensor


@dataclass
class Crop:
    """
    A crop of an image.

    Args:
        index: of the image in the data set.
        image: the whole image, in RGB, or (height, width, channels).
        label: its class, or the list of its classes.
        box: left, upper, right and lower side of the crop, as shares of the image's width and height.
        flipped: whether the crop is mirrored.
    """

    index: int
    image: PILImage.Image | np.ndarray
    label: int | list[int]
    box: tuple[float, float, float, float]
    flipped: bool


def encode_label(label: int | list[int], num_labels: int) -> torch.Tensor:
    """A class as its index; a list of classes as (num_labels,), float32, 1 for those in the list and 0 for others."""
    if not isinstance(label, list):
        return torch.tensor(label)
    return torch.zeros(num_labels).index_fill(0, torch.tensor(label, dtype=torch.long), 1.0)


class TrainingImages(LabelledImages):
    """
    Random resized crops and horizontal flips, as in the published recipe, and mixtures of two images.

    Crops, flips and mixtures depend on seed, epoch and index only, not on workers or processes. The crops of a batch
    have one size, which depends on the index of its first image. PIL crops and resizes in one antialiased call.

    Args:
        dataset, max_corrupt: see [`LabelledImages`].
        processor: says how pixels are scaled and normalised.
        crop_sizes: sides of the square crops in pixels. The run is divided into as many equal parts, one for each.
        random_crop_sizes: instead, draw the side for every batch from `crop_sizes`.
        num_epochs: length of the run.
        min_crop_scale: smallest area of a crop, as a share of the image's area; the largest is 1.
        mixup_alpha: parameter of the Beta distribution of the weights of two blended images (Mixup, arXiv 1710.09412);
            0 for no blending.
        cutmix_alpha: parameter of the Beta distribution of the area of a rectangle pasted from another image (CutMix,
            arXiv 1905.04899); 0 for no pasting. If both are given, each image is mixed in one of the two ways. The
            labels of mixtures are probabilities, (num_labels,).
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
        super().__init__(dataset, max_corrupt, len(processor.image_mean))
        self.processor = processor
        self.crop_sizes = crop_sizes
        self.random_crop_sizes = random_crop_sizes
        self.num_epochs = num_epochs
        self.min_crop_scale = min_crop_scale
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.seed = seed

    def random_box(self, width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """A box (left, upper, right, lower) in pixels of random area, aspect ratio (3/4 to 4/3) and place."""
        for _ in range(10):
            area = width * height * random.uniform(self.min_crop_scale, 1)
            aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, upper = random.integers(width - w, endpoint=True), random.integers(height - h, endpoint=True)
                return left, upper, left + w, upper + h
        return 0, 0, width, height

    def random_crop(self, index: int, random: np.random.Generator) -> Crop:
        """A crop of the image of that index, or of the next one that can be read."""
        index, image, label = self.read_next(index)
        height, width = height_and_width(image)
        left, upper, right, lower = self.random_box(width, height, random)
        box = left / width, upper / height, right / width, lower / height
        return Crop(index, image, label, box, flipped=random.random() < 0.5)

    def tensors(self, crop: Crop, size: int) -> dict[str, torch.Tensor]:
        """The tensors that mixtures mix: here `pixel_values`, (channels, size, size)."""
        height, width = height_and_width(crop.image)
        box = crop.box[0] * width, crop.box[1] * height, crop.box[2] * width, crop.box[3] * height
        image = resize(crop.image, (size, size), PILImage.Resampling.BILINEAR, box)
        pixel_values = to_tensor(image, self.processor)
        return {"pixel_values": pixel_values.flip(2) if crop.flipped else pixel_values}

    def crop_size(self, first_index: int) -> int:
        """The side of the crops in the batch whose first image has that index."""
        epoch = int(self.epoch)
        if self.random_crop_sizes:
            return int(np.random.default_rng((self.seed, epoch, first_index, 1)).choice(self.crop_sizes))
        return self.crop_sizes[epoch * len(self.crop_sizes) // self.num_epochs]

    def mixing_weights(self, size: int, random: np.random.Generator) -> torch.Tensor | None:
        """For each pixel, the weight of the first of two mixed images: (1, size, size). None if nothing is mixed."""
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
        top, left = random.uniform(0, size, 2) - side / 2  # the border of the image may clip the rectangle
        rows, columns = (slice(max(0, round(start)), max(0, round(start + side))) for start in (top, left))
        weights[:, rows, columns] = 0
        return weights

    def item(self, index: int, size: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (channels, size, size) and `labels`, an index or (num_labels,); maybe of two mixed images."""
        random = np.random.default_rng((self.seed, int(self.epoch), index))
        crop = self.random_crop(index, random)
        tensors = self.tensors(crop, size)
        weights = self.mixing_weights(size, random)
        if weights is None:
            return {**tensors, "labels": encode_label(crop.label, self.num_labels)}
        other = self.random_crop(int(random.integers(len(self))), random)
        others = self.tensors(other, size)
        share = weights.mean()
        mixed = {}
        for name, tensor in tensors.items():
            kept = F.adaptive_avg_pool2d(weights, tensor.shape[1:]) if tensor.ndim == 3 else share
            mixed[name] = torch.lerp(others[name], tensor, kept)
        shares = [encode_label(label_list(each.label), self.num_labels) for each in (crop, other)]
        return {**mixed, "labels": torch.lerp(shares[1], shares[0], share)}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.item(index, self.crop_size(index))

    def __getitems__(self, batch: list) -> list[dict[str, torch.Tensor]]:
        indices = self.indices(batch)
        size = self.crop_size(indices[0])
        return [self.item(index, size) for index in indices]


class ValidationImages(LabelledImages):
    """
    Images as the processor alone prepares them, without augmentation. A broken image is black, with the label -100, or
    with as many of them as there are classes.

    Args:
        dataset, max_corrupt: see [`LabelledImages`].
        processor: the model's image processor.
    """

    def __init__(self, dataset: Dataset, max_corrupt: int, processor: BaseImageProcessor):
        super().__init__(dataset, max_corrupt, len(processor.image_mean))
        self.processor = processor

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        found = self.read(index)
        image, label = (np.zeros((1, 1, self.num_channels), np.uint8), -100) if found is None else found
        labels = encode_label(label, self.num_labels)
        if found is None and self.multi_label:
            labels = torch.full((self.num_labels,), -100.0)
        if isinstance(image, np.ndarray):  # the processor would resize 1, 3 or 4 channels alone
            size = self.processor.size["width"], self.processor.size["height"]
            pixels = normalise([resize(image, size, self.processor.resample)], self.processor)[0]
        else:
            pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": labels}
