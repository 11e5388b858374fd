"""Reading labelled images from a data set, and skipping broken ones."""

import logging
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import torch
from datasets import Array3D, Dataset, Image, List
from PIL import Image as PILImage
from transformers import BaseImageProcessor

from cbsa_hf.segmentation.images import ImageError, to_image
from training.data.loading import class_names, class_type
from training.data.streaming import StreamedRows


SAMPLE_SIZE = 16

logger = logging.getLogger(__name__)


def to_tensor(image: PILImage.Image | np.ndarray, processor: BaseImageProcessor) -> torch.Tensor:
    """The pixels of an image, (channels, height, width), float32, scaled and normalised as the processor says."""
    pixels = np.asarray(image, dtype=np.float32) * processor.rescale_factor
    pixels = (pixels - np.float32(processor.image_mean)) / np.float32(processor.image_std)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def checksum_image(encoded: dict | list | np.ndarray | None) -> int:
    """CRC-32 of an encoded image, or of its file name if the data set holds no bytes; or of an array."""
    if isinstance(encoded, (list, np.ndarray)):
        return zlib.crc32(np.ascontiguousarray(encoded))
    encoded = encoded or {}
    return zlib.crc32(encoded.get("bytes") or Path(encoded.get("path") or "").name.encode())


def read_encoded(read: Callable, encoded: dict | None, name: str) -> PILImage.Image:
    """
    Read an image or mask that a data set holds as bytes, or names by a path or by an address like `hf://...` or
    `zip://...::...`, as streams do.

    Args:
        read: `to_image` or `open_mask`.
        encoded: the data set's value, not decoded.
        name: of the image, for messages.

    Raises:
        ImageError: if it cannot be read.
    """
    path = (encoded or {}).get("path") or ""
    if "://" not in path or encoded.get("bytes") is not None:
        return read(encoded, name=name)
    try:
        with fsspec.open(path, "rb") as file:
            return read(file, name=name)
    except ImageError:
        raise
    except Exception as error:  # each file system has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be read: {reason.rstrip('.')}.") from error


def label_list(label: int | list[int] | None) -> list[int | None]:
    """The labels of an image: its one label, or those of a list."""
    return label if isinstance(label, list) else [label]


def check_label(label: int | list[int] | None, num_labels: int, name: str):
    """
    Raises ValueError if a label, or one in a list, is not the number of a class; `name` is the image's, for the
    message.
    """
    wrong = [each for each in label_list(label) if type(each) is not int or not 0 <= each < num_labels]
    if wrong:
        given = "no label" if wrong[0] is None else f"the label {wrong[0]!r}"
        raise ValueError(f"{name} has {given}; the data set names the classes 0 to {num_labels - 1}.")


def check_labels(dataset: Dataset | StreamedRows, split: str, warns: bool = True):
    """
    Check all labels of a split. Those of a stream are checked one by one, when they are read.

    Args:
        dataset: of two columns, image and label.
        split: its name, for messages.
        warns: log the names of the classes that have no image.

    Raises:
        ValueError: if a label is not the number of a class.
    """
    if isinstance(dataset, StreamedRows):
        return
    column, names = list(dataset.features)[1], class_names(dataset)
    labels = [label_list(label) for label in dataset.select_columns(column)[:][column]]
    wrong = [i for i, each in enumerate(labels) if any(x is None or not 0 <= x < len(names) for x in each)]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        check_label(labels[wrong[0]], len(names), f"Image {wrong[0]} of the split {split!r}{more}")
    if warns:
        present = set().union(*labels)
        warn_of_missing([name for i, name in enumerate(names) if i not in present], f"No image of the split {split!r}")


def warn_of_missing(names: list[str], subject: str, reason: str = ""):
    """Log a warning that names up to ten classes."""
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        logger.warning("%s is of the class %s%s.%s", subject, ", ".join(map(repr, names[:10])), more, reason)


class LabelledImages(torch.utils.data.Dataset):
    """
    A data set of images with labels or masks. Broken images are skipped, named in the log, and counted.

    Args:
        dataset: of two columns: an image, and a label or mask.
        max_corrupt: how many images may be broken; of a stream, in one epoch.
        num_channels: of the model. With another number than 3, images are arrays, see [`to_image`].

    Raises:
        ValueError: if the arrays of the data set have another number of channels.
    """

    def __init__(self, dataset: Dataset | StreamedRows, max_corrupt: int, num_channels: int = 3):
        self.image_column, self.label_column = dataset.features
        self.num_channels = num_channels
        self.array_type = dataset.features[self.image_column]
        if not isinstance(self.array_type, Array3D):
            self.array_type = None
        elif num_channels not in (self.array_type.shape[0], self.array_type.shape[2]):
            raise ValueError(
                f"The column {self.image_column!r} has arrays of shape {tuple(self.array_type.shape)}, and the model "
                f"takes {num_channels} channels."
            )
        classes = class_type(dataset.features[self.label_column])
        self.num_labels = None if classes is None else classes.num_classes
        self.multi_label = isinstance(dataset.features[self.label_column], List)
        # The hash of the rows that `datasets` caches by; it has no public name. A stream has none.
        self.fingerprint = getattr(dataset, "_fingerprint", None)
        if not isinstance(dataset, StreamedRows):  # which leaves images encoded already
            for column, feature in dataset.features.items():
                if isinstance(feature, Image):
                    dataset = dataset.cast_column(column, Image(decode=False))
            if self.array_type is not None:  # by default, rows have lists
                dataset = dataset.with_format("numpy", columns=[self.image_column], output_all_columns=True)
        self.dataset = dataset
        self.max_corrupt = max_corrupt
        self.corrupt = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # written by the workers
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # read by workers that outlive an epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: list) -> list[dict[str, torch.Tensor]]:
        """The items of a batch, for what its sampler yielded: indices, or pairs from [`StreamedRows`]."""
        return [self[index] for index in self.indices(batch)]

    def indices(self, batch: list) -> list[int]:
        """The indices of a batch. A stream keeps the rows for them."""
        return self.dataset.hold(batch) if isinstance(self.dataset, StreamedRows) else batch

    def set_epoch(self, epoch: int):
        """Set the epoch that augmentation depends on, in all workers."""
        self.epoch.fill_(epoch)
        if isinstance(self.dataset, StreamedRows):
            self.corrupt.zero_()  # indices mean other rows in every epoch

    def sample(self) -> list[int]:
        """
        Checksums of some images, by which the data set is recognised: at even distances, or a stream's first ones.
        """
        if isinstance(self.dataset, StreamedRows):
            rows = self.dataset.first(SAMPLE_SIZE)
        else:
            indices = np.linspace(0, len(self) - 1, min(SAMPLE_SIZE, len(self))).astype(int)
            rows = self.dataset.select(indices)
        return [checksum_image(row[self.image_column]) for row in rows]

    def name(self, index: int, row: dict) -> str:
        """An image's name in messages: its row, and its file if the data set names one."""
        path = None if self.array_type is not None else (row[self.image_column] or {}).get("path")
        place = f"{index} of this epoch" if isinstance(self.dataset, StreamedRows) else str(index)
        return f"Image {place}" + (f" ({path})" if path else "")

    def read(self, index: int) -> tuple[PILImage.Image | np.ndarray, int | np.ndarray] | None:
        """
        The image, as [`to_image`] returns it, and its label or mask; None if one of them cannot be read.

        Raises:
            ValueError: if the label is not the number of a class, or the mask does not fit.
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

    def read_image(self, row: dict, name: str) -> PILImage.Image | np.ndarray:
        """The image of a row; raises ImageError if it cannot be read."""
        value, read = row[self.image_column], partial(to_image, num_channels=self.num_channels)
        if self.array_type is None:
            return read_encoded(read, value, name)
        return read(None if value is None else np.asarray(value, dtype=self.array_type.dtype), name=name)

    def read_row(self, row: dict, name: str) -> tuple[PILImage.Image | np.ndarray, int | np.ndarray]:
        """See [`read`]; raises ImageError if the image or the mask cannot be read."""
        image = self.read_image(row, name)
        check_label(row[self.label_column], self.num_labels, name)
        return image, row[self.label_column]

    def readable(self) -> Iterator[tuple[PILImage.Image, int | PILImage.Image]]:
        """What [`read`] returns for each row in turn, without the broken ones."""
        return (found for index in range(len(self)) if (found := self.read(index)) is not None)

    def read_next(self, index: int) -> tuple[int, PILImage.Image, int | PILImage.Image]:
        """
        The row of that index, or the next one that can be read; of a stream, the next one in the same batch.

        Returns:
            Its index, and what [`read`] returns for it.

        Raises:
            ValueError: if no row can be read, or more than `max_corrupt` are broken.
        """
        streams = isinstance(self.dataset, StreamedRows)
        first, count = (self.dataset.indices[0], len(self.dataset.batch)) if streams else (0, len(self))
        for _ in range(count):
            if (found := self.read(index)) is not None:
                return index, *found
            self.check()
            index = first + (index + 1 - first) % count
        raise ValueError(f"None of {count} images in turn can be read (the log names them).")

    def check(self):
        """Raises ValueError if more than `max_corrupt` images were broken."""
        count = int(self.corrupt.sum())
        if count > self.max_corrupt:
            raise ValueError(
                f"{count} of the images cannot be read (the log names them), more than "
                f"`--max_corrupt {self.max_corrupt}`."
            )
