"""Semantic segmentation of images larger than the training crop, a window at a time."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel

from ..attention_cbsa import to_pair
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


PIXELS_AT_A_TIME = 2**18  # of the result; any number gives the same
EDGE_RADIUS = 10  # pixels; chosen on the validation images of CamVid


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side of an image that is at least as long: a stride apart, the last at the end."""
    return [*range(0, length - window, stride), length - window]


class LogitRows:
    """
    The logits of an image, averaged over the windows that see a pixel, from top to bottom: windows are computed when
    their first row is asked for, and rows above the one asked for last are forgotten.

    Args:
        predict: windows, each (left, top, right, bottom) in pixels -> their logits, (K, height, width) each.
        size: (height, width) of the image.
        window: (height, width) of a window.
        stride: (down, across).
        num_labels: K.
        device: where the logits are.
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
        # How many windows see a row, and how many a column; their product is how many see a pixel.
        self.counts = [
            sum(F.pad(torch.ones(w, device=device), (start, n - w - start)) for start in along)
            for n, w, along in zip(size, self.window, starts, strict=True)
        ]
        self.tops, self.lefts = starts
        self.sums = torch.zeros(num_labels, 0, size[1], device=device)  # of the rows from `first` on
        self.first = 0

    def compute_row_of_windows(self, first: int):
        """The uppermost that is missing; rows above `first` are forgotten."""
        top, (height, width) = self.tops.pop(0), self.window
        first = min(first, top)
        kept = self.sums[:, first - self.first :].clone()
        self.sums = None  # lest two bands are in memory
        self.sums = F.pad(kept, (0, 0, 0, top + height - first - kept.shape[1]))
        del kept
        self.first = first
        boxes = [(left, top, left + width, top + height) for left in self.lefts]
        for left, logits in zip(self.lefts, self.predict(boxes), strict=True):
            self.sums[:, top - first :, left : left + width] += logits

    def take(self, first: int, last: int) -> torch.Tensor:
        """Logits (K, last - first, width) of the rows from `first` until before `last`."""
        while self.tops and self.tops[0] < last:
            self.compute_row_of_windows(first)
        rows, columns = self.counts
        return self.sums[:, first - self.first : last - self.first] / (rows[first:last, None] * columns)

    def resized(self, rows: slice, size: tuple[int, int]) -> torch.Tensor:
        """Those rows of `F.interpolate(logits, size, mode="bilinear")`."""
        return resize_rows(self.take, self.size[0], rows, size)


def label_names(model: torch.nn.Module) -> dict[int, str]:
    """What the labels of [`SlidingWindowSegmenter`] mean: the classes, or one class and what does not belong to it."""
    names = unwrap(model).config.id2label
    return names if len(names) > 1 else {0: "background", 1: names[0]}


class SlidingWindowSegmenter:
    """
    The class of every pixel of an image of any size, by a model for semantic segmentation that sees one window of it
    at a time. Where windows overlap, their logits are averaged. Where one covers the image, the result is that of the
    model on the whole image.

    In memory are the windows of one batch and logits for a band as wide as the image and as high as a window.

    Args:
        model: for semantic segmentation, of this library or any other in Transformers with `logits` by class.
        processor: its image processor, which normalises the windows; they are not resized.
        window: (height, width) of a window, or its side; when not given what the processor resizes to, or, where its
            `size` has no height and width but bounds (`max_height`, `max_width`), its `crop_size`.
        stride: (down, across) from one window to the next, or both; two thirds of the window when not given. Overlaps
            help: what is near an edge of a window lacks context, and patches begin elsewhere in the next one.
        batch_size: windows that the model sees at once.
        long_side: pixels that the image's longer side is resized to first; when not given the image fills the
            processor's bounds, or, where it has none, keeps its size.
        scales: factors by which it is resized beyond that; logits are averaged over them.
        flip: whether each window is also seen mirrored, and the logits averaged.
        sharp: move edges to those of the image, and smooth between them; needs kornia. See [`follow_edges`].
        max_memory: bytes that one image may take, by an estimate that is made before.

    Raises:
        ValueError: a size that is not positive, a stride that leaves gaps, or no window where the processor has none.

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
        """The logits that the model has for an image resized by that factor."""
        config, device = unwrap(model).config, unwrap(model).device
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        full_height, full_width = height_and_width(image)
        height, width = (max(1, round(side * scale)) for side in (full_height, full_width))
        num_labels = config.num_labels
        # The band that is there and the one that it is moved to; and the rows that are asked for, before and after.
        asked_for = 4 * max(PIXELS_AT_A_TIME, full_width) * max(1, scale) ** 2
        what = f"Logits of {num_labels} classes for an image {width} pixels wide"
        memory = 4 * num_labels * (2 * min(self.window[0], height) * width + asked_for)
        check_memory(memory, what, "lower `long_side` (`--long-side`)", self.max_memory)

        def crop(left, top, right, bottom):
            # What Pillow makes of a box is that part of the whole image, resized.
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
        """The factor that an image is resized by before `scales`."""
        bounds = self.processor.size
        if self.long_side is not None:
            return self.long_side / max(height, width)
        if bounds.get("max_height") and bounds.get("max_width"):
            return min(bounds["max_height"] / height, bounds["max_width"] / width)
        return 1

    def segment(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Segment one image of [`to_image`]."""
        with evaluating(self.model) as model:
            return self.segment_with(model, image)

    @torch.inference_mode()
    def segment_with(self, model: torch.nn.Module, image: Image.Image | np.ndarray) -> np.ndarray:
        """Segment one image of [`to_image`] by a model in evaluation mode."""
        num_labels = unwrap(model).config.num_labels
        size = height_and_width(image)
        base = self.base_scale(*size)
        sources = [self.logit_rows(model, image, base * scale) for scale in self.scales]
        labels = np.empty(size, dtype=np.min_scalar_type(num_labels - 1))
        for rows in bands(*size, PIXELS_AT_A_TIME):
            logits = torch.stack([source.resized(rows, size) for source in sources]).sum(0)
            # One label is what a pixel is or is not, by a sigmoid above a half.
            labels[rows] = (logits.argmax(0) if num_labels > 1 else logits[0] > 0).cpu()
        return labels

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray | list[np.ndarray | ImageError]:
        """
        Class indices, (height, width) of one image or of each of several, of any size and mode: whatever
        [`to_image`] takes. Of several, one that cannot be read does not discard the others: the list holds its
        `ImageError` in that place.

        Raises:
            ValueError: a single image cannot be read, or takes too much memory; the message is one sentence for
                people.
        """
        num_channels = getattr(unwrap(self.model).config, "num_channels", 3)
        if isinstance(images, (list, tuple)):
            return for_each_image(self.segment, images, num_channels)
        return self.segment(to_image(images, num_channels=num_channels))
