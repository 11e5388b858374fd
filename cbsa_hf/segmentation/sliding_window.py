"""Semantic segmentation of images that are larger than the crops of the training, window by window."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel

from ..configuration_cbsa import to_pair
from .images import (
    ImageError,
    ImageSource,
    bands,
    follow_edges,
    for_each_image,
    height_and_width,
    normalise,
    resize,
    resize_rows,
    to_image,
)
from .inference import check_outputs, evaluating, unwrap
from .memory import MAX_MEMORY, check_memory


PIXELS_AT_A_TIME = 2**18  # pixels of the result that are computed at once; the result does not depend on it
EDGE_RADIUS = 10  # pixels; chosen on the validation images of CamVid


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of an image: one stride apart, and the last one ends where the side ends."""
    return [*range(0, length - window, stride), length - window]


class LogitRows:
    """
    The logits of an image, averaged over the windows that contain a pixel, in bands of rows from top to bottom.
    Windows are computed when their first row is asked for. Rows above the last band are deleted.

    Args:
        predict: takes windows, each (left, top, right, bottom) in pixels, and returns the logits (K, height, width) of
            each.
        size: (height, width) of the image in pixels.
        window: (height, width) of a window in pixels.
        stride: (down, across) in pixels.
        num_labels: K, the number of classes.
        device: the device of the logits.
    """

    def __init__(
        self,
        predict: Callable[[list[tuple[int, int, int, int]]], Iterable[torch.Tensor]],
        size: tuple[int, int],
        window: tuple[int, int],
        stride: tuple[int, int],
        num_labels: int,
        device: torch.device,
    ):
        self.predict = predict
        self.size = size
        self.window = [min(pair) for pair in zip(window, size, strict=True)]
        starts = [window_starts(*sides) for sides in zip(size, self.window, stride, strict=True)]
        # The number of windows at each row, and at each column; the product is that at each pixel.
        self.counts = [
            sum(F.pad(torch.ones(w, device=device), (start, n - w - start)) for start in along)
            for n, w, along in zip(size, self.window, starts, strict=True)
        ]
        self.tops, self.lefts = starts
        self.sums = torch.zeros(num_labels, 0, size[1], device=device)  # of the rows that begin with `first`
        self.first = 0

    def compute_row_of_windows(self, first: int):
        """Computes the next row of windows, and deletes rows of the image above `first`."""
        top, (height, width) = self.tops.pop(0), self.window
        first = min(first, top)
        kept = self.sums[:, first - self.first :].clone()
        self.sums = None  # so that two bands are never in memory together
        self.sums = F.pad(kept, (0, 0, 0, top + height - first - kept.shape[1]))
        del kept
        self.first = first
        boxes = [(left, top, left + width, top + height) for left in self.lefts]
        for left, logits in zip(self.lefts, self.predict(boxes), strict=True):
            self.sums[:, top - first :, left : left + width] += logits

    def take(self, first: int, last: int) -> torch.Tensor:
        """Logits (K, last - first, width) of the rows from `first` to `last - 1`."""
        while self.tops and self.tops[0] < last:
            self.compute_row_of_windows(first)
        rows, columns = self.counts
        return self.sums[:, first - self.first : last - self.first] / (rows[first:last, None] * columns)

    def resized(self, rows: slice, size: tuple[int, int]) -> torch.Tensor:
        """Some rows of `F.interpolate(logits, size, mode="bilinear")`, (K, rows, width)."""
        return resize_rows(self.take, self.size[0], rows, size)


def label_names(id2label: dict[int, str]) -> dict[int, str]:
    """
    Names of the labels that [`SlidingWindowSegmenter`] returns: the classes, or the only class and the background.
    """
    return id2label if len(id2label) > 1 else {0: "background", 1: id2label[0]}


class SlidingWindowSegmenter:
    """
    Gives every pixel of an image of any size a class, by a model for semantic segmentation that sees one window of the
    image at a time. Where windows overlap, their logits are averaged. If one window covers the image, the result is
    that of the model on the whole image.

    Memory holds the windows of one batch, and logits for a band as wide as the image and as high as a window.

    Args:
        model: a model for semantic segmentation, of this library or another one of Transformers with `logits` by
            class.
        processor: its image processor. It normalises the windows and does not resize them.
        window: (height, width) of a window in pixels, or its side. By default the size that the processor resizes to;
            if its `size` only has bounds (`max_height`, `max_width`), its `crop_size`.
        stride: (down, across) from one window to the next in pixels, or one number for both. By default two thirds of
            the window. Overlap improves the result, since pixels near the edge of a window have less context.
        batch_size: number of windows that the model sees together.
        long_side: the longer side of the image is first resized to that many pixels. By default the image is resized
            to the bounds of the processor, or keeps its size if there are none.
        scales: the image is also resized by each of these factors, and the logits are averaged.
        flip: each window is also seen mirrored, and the logits are averaged.
        sharp: move edges to those of the image, and smooth the logits between them; needs kornia.
        max_memory: bytes that one image may take, as estimated before it is processed.

    Raises:
        ValueError: a size is not positive, the stride leaves gaps, or neither `window` nor the processor gives a size.

    Example:

    ```python
    >>> from cbsa_hf import CBSAForSemanticSegmentation, SlidingWindowSegmenter
    >>> from PIL import Image
    >>> from transformers import AutoImageProcessor

    >>> model = CBSAForSemanticSegmentation.from_pretrained(folder)
    >>> processor = AutoImageProcessor.from_pretrained(folder)
    >>> segmenter = SlidingWindowSegmenter(model, processor)
    >>> segmenter(Image.new("RGB", (4000, 3000))).shape
    (3000, 4000)
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        batch_size: int = 1,
        long_side: int | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        sharp: bool = False,
        max_memory: float = MAX_MEMORY,
    ):
        if window is None:
            size = processor.size if processor.size.get("height") else getattr(processor, "crop_size", None)
            if not size:
                raise ValueError(f"The image processor's size is {dict(processor.size)}; give a `window`.")
            window = size["height"], size["width"]
        self.window = to_pair(window)
        self.stride = to_pair([max(1, 2 * side // 3) for side in self.window] if stride is None else stride)
        if min(self.window) < 1:
            raise ValueError(f"`window` is {self.window}; give a height and width of at least 1.")
        if not all(1 <= step <= side for step, side in zip(self.stride, self.window, strict=True)):
            raise ValueError(f"`stride` is {self.stride}; give at least 1 and at most the window, {self.window}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}, and has to be at least 1.")
        if long_side is not None and long_side < 1:
            raise ValueError(f"`long_side` is {long_side}, and has to be at least 1.")
        if not scales or min(scales) <= 0:
            raise ValueError(f"`scales` is {scales}; give one factor or more, each above 0.")
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.long_side = long_side
        self.scales = scales
        self.flip = flip
        self.sharp = sharp
        self.max_memory = max_memory

    def logit_rows(self, model: torch.nn.Module, image: Image.Image | np.ndarray, scale: float) -> LogitRows:
        """The logits of the model for an image that is resized by `scale`."""
        config, device = unwrap(model).config, unwrap(model).device
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        full_height, full_width = height_and_width(image)
        height, width = (max(1, round(side * scale)) for side in (full_height, full_width))
        num_labels = config.num_labels
        # The current band and the one that it is copied to; and the rows asked for, before and after they are resized.
        asked_for = 4 * max(PIXELS_AT_A_TIME, full_width) * max(1, scale) ** 2
        what = f"Logits of {num_labels} classes for an image {width} pixels wide"
        memory = 4 * num_labels * (2 * min(self.window[0], height) * width + asked_for)
        check_memory(memory, what, "lower `long_side` (`--long-side`)", self.max_memory)

        def crop(left, top, right, bottom):
            # Pillow resizes only this box of the image: the same pixels as those of the whole image, resized.
            box = [
                min(edge * full / resized, full)
                for edge, full, resized in zip(
                    (left, top, right, bottom), 2 * (full_width, full_height), 2 * (width, height), strict=True
                )
            ]
            return resize(image, (right - left, bottom - top), self.processor.resample, box)

        def predict(boxes):
            for i in range(0, len(boxes), self.batch_size):
                windows = [crop(*box) for box in boxes[i : i + self.batch_size]]
                pixel_values = normalise(windows, self.processor).to(device, dtype)
                logits = model(pixel_values).logits.float()
                if self.flip:
                    logits = (logits + model(pixel_values.flip(3)).logits.float().flip(3)) / 2
                check_outputs(logits)
                logits = F.interpolate(logits, size=pixel_values.shape[2:], mode="bilinear")
                if self.sharp:
                    yield from (follow_edges(*pair, EDGE_RADIUS) for pair in zip(logits, windows, strict=True))
                else:
                    yield from logits

        return LogitRows(predict, (height, width), self.window, self.stride, num_labels, device)

    def base_scale(self, height: int, width: int) -> float:
        """The factor by which an image of that (height, width) is resized before `scales` apply."""
        bounds = self.processor.size
        if self.long_side is not None:
            return self.long_side / max(height, width)
        if bounds.get("max_height") and bounds.get("max_width"):
            return min(bounds["max_height"] / height, bounds["max_width"] / width)
        return 1

    def segment(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Class indices (height, width) of one image, as [`to_image`] returns it."""
        with evaluating(self.model) as model:
            return self.segment_with(model, image)

    @torch.inference_mode()
    def segment_with(self, model: torch.nn.Module, image: Image.Image | np.ndarray) -> np.ndarray:
        """Class indices (height, width) of one image, by a model that is in evaluation mode."""
        num_labels = unwrap(model).config.num_labels
        size = height_and_width(image)
        base = self.base_scale(*size)
        sources = [self.logit_rows(model, image, base * scale) for scale in self.scales]
        labels = np.empty(size, dtype=np.min_scalar_type(num_labels - 1))
        for rows in bands(*size, PIXELS_AT_A_TIME):
            logits = torch.stack([source.resized(rows, size) for source in sources]).sum(0)
            # With one label a pixel is 1 if the sigmoid of its logit is above a half, else 0.
            labels[rows] = (logits.argmax(0) if num_labels > 1 else logits[0] > 0).cpu()
        return labels

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[np.ndarray | ImageError]: ...

    @overload
    def __call__(self, images: ImageSource) -> np.ndarray: ...

    def __call__(self, images: Any) -> Any:
        """
        Segment one image or several, of any size and mode.

        Args:
            images: a file, PIL image, array or tensor, or a list of them; see `cbsa_hf.segmentation.images.to_image`.

        Returns:
            Class indices (height, width), or a list of them. In the list an image that cannot be read has its
            `ImageError` in its place, and a warning says so.

        Raises:
            ValueError: a single image cannot be read, or takes too much memory. The message is one sentence for
                people.
        """
        num_channels = getattr(unwrap(self.model).config, "num_channels", 3)
        if isinstance(images, (list, tuple)):
            return for_each_image(self.segment, images, num_channels)
        return self.segment(to_image(images, num_channels=num_channels))
