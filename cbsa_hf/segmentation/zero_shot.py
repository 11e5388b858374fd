"""Segment photos with the tokens and the attention of a classifier that was never trained with masks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel

from .images import (
    PIXELS_AT_A_TIME,
    ImageError,
    ImageSource,
    bands,
    fit_to_patches,
    follow_edges,
    for_each_image,
    height_and_width,
    resize_rows,
    to_image,
    to_pixel_values,
)
from .inference import Encoding, classify, encode, unwrap
from .memory import MAX_MEMORY, check_input, check_memory
from .patch_grouping import METHODS, Grouping, Options


@dataclass
class Segment:
    """
    One segment of an image.

    Args:
        labels: (height, width) of the image, the index of the segment of each pixel.
        index: index of this segment.
        score: how much it is foreground: the mean of the scores of its pixels.
        name: the most probable class of its patches; None if its probability is below `min_probability`.
        probability: of the most probable class; None if the model has no classifier.
    """

    labels: np.ndarray = field(repr=False)
    index: int
    score: float
    name: str | None = None
    probability: float | None = None

    @property
    def mask(self) -> np.ndarray:
        """(height, width) of the image, bool; computed at each access."""
        return self.labels == self.index


@dataclass
class ZeroShotSegmentation:
    """
    The segmentation of one image.

    Args:
        mask: (height, width) of the image, bool; True for the foreground, where the score is above 0.
        labels: (height, width), the index in `segments` of the segment of each pixel.
        segments: a partition of the image, in descending order of the score.
        draw_scores: computes `scores`.
    """

    mask: np.ndarray
    labels: np.ndarray
    segments: list[Segment]
    draw_scores: Callable[[], np.ndarray] = field(repr=False)

    @cached_property
    def scores(self) -> np.ndarray:
        """
        (height, width), how much each pixel is foreground; computed at the first access.

        For the method `attention` it is the attention of CLS divided by its smallest value in the foreground, minus 1.
        For the other methods it combines three scores, in standard deviations: how rarely random walks from the pixel
        visit the border of the image, how near it is to the centre, and how much CLS attends to it.
        """
        return self.draw_scores()


class ZeroShotSegmenter:
    """
    Divides a photo into segments, decides which are foreground, and names them by the classes of the model. Methods:

    - `ncut`: the normalised cut of an affinity between the patches, in time linear in their number.
    - `representatives`: groups the representatives of a layer; a patch joins the group that attends to it most.
    - `attention`: foreground and background from the attention of CLS.

    Args:
        model: a CBSA model with any attention type. Only classifiers name the segments.
        processor: its image processor.
        method: one of the above.
        sharp: move the edges of segments to the edges of the image; needs kornia.
        long_side: the longer side of the image is resized to that many pixels; positions are interpolated.
        min_probability: probability that a class needs to become the name of a segment.
        max_memory: bytes that one image may take, as estimated before it is processed.
        **options: options of the method: `num_segments`, `layer`, `head`, `mass`, `attention_weight`; see `Options`
            in `cbsa_hf.segmentation.patch_grouping`.

    Raises:
        ValueError: there is no such method, or an option is outside its range or has no effect on the method.

    Example:

    ```python
    >>> from cbsa_hf import ZeroShotSegmenter, load_checkpoint
    >>> from PIL import Image

    >>> segmenter = ZeroShotSegmenter(*load_checkpoint())
    >>> segmenter(Image.new("RGB", (120, 90))).mask.shape
    (90, 120)
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        method: str = "ncut",
        sharp: bool = False,
        long_side: int = 256,
        min_probability: float = 0.5,
        max_memory: float = MAX_MEMORY,
        **options,
    ):
        if method not in METHODS:
            raise ValueError(f"`method` is {method!r}; choose one of {', '.join(map(repr, METHODS))}.")
        if long_side < 1:
            raise ValueError(f"`long_side` is {long_side}, and has to be at least 1.")
        self.model = model
        self.processor = processor
        self.method = method
        self.sharp = sharp
        self.long_side = long_side
        self.min_probability = min_probability
        self.max_memory = max_memory
        self.options = Options(**options)
        self.options.check(model)
        for name in options:
            if name in Options.__dataclass_fields__ and name not in METHODS[method].options:
                raise ValueError(f"`{name}` has no effect on the method {method!r}; leave it out.")
        if method == "ncut" and not options.get("attention_weight") and {"layer", "head"} & options.keys():
            raise ValueError("`layer` and `head` have no effect on the method 'ncut' without an `attention_weight`.")

    def name(self, grouping: Grouping) -> list[tuple[str | None, float | None]]:
        """Name and probability of each group, from the classifier applied to the mean of its tokens."""
        members = F.one_hot(grouping.members.argmax(0).flatten(), len(grouping.members)).float().T
        tokens = members @ grouping.tokens.flatten(0, 1) / members.sum(1, keepdim=True).clamp_min(1)
        found = classify(self.model, tokens)
        if found is None:
            return [(None, None)] * len(members)
        names = unwrap(self.model).config.id2label
        probabilities, classes = found.max(-1)
        return [
            (names[int(i)] if p >= self.min_probability else None, float(p))
            for p, i in zip(probabilities, classes, strict=True)
        ]

    def check_memory(self, size: tuple[int, int]):
        """Raises ValueError if an image of that (height, width) would take more than `max_memory`."""
        seen = fit_to_patches(size, self.long_side, unwrap(self.model).config.patch_size)
        check_input(self.model, seen, self.max_memory)
        # The image, mask and labels, and a band of the maps. Sharp maps are filtered as a whole, one at a time.
        num_segments, pixels = self.options.num_segments, size[0] * size[1]
        memory = pixels * (100 if self.sharp else 8) + 8 * (num_segments + 1) * min(pixels, PIXELS_AT_A_TIME)
        what = f"An image of {size[1]} x {size[0]} pixels in {num_segments} segments"
        check_memory(memory, what, "give a smaller image, or fewer `num_segments` (`--segments`)", self.max_memory)

    def enlarge(
        self, maps: torch.Tensor, image: Image.Image | np.ndarray
    ) -> Iterator[tuple[slice, Iterator[torch.Tensor]]]:
        """
        Maps over the patches at the size of the image, band by band; with `sharp` the whole image is one band.

        Args:
            maps: (k, grid height, grid width).
            image: guides the edges if `sharp`.

        Yields:
            The rows of a band, and an iterator over the maps in that band, each (rows, width).
        """
        size = height_and_width(image)
        if not self.sharp:
            for rows in bands(*size):
                yield rows, iter(resize_rows(lambda first, last: maps[:, first:last], maps.shape[1], rows, size))
            return
        radius = max(1, round(max(size) / max(maps.shape[1:])))  # a patch
        enlarged = (F.interpolate(values[None, None], size=size, mode="bilinear")[0] for values in maps)
        yield slice(0, size[0]), (follow_edges(values, image, radius)[0] for values in enlarged)

    def draw(self, values: torch.Tensor, image: Image.Image | np.ndarray) -> np.ndarray:
        """A map (grid height, grid width) over the patches at the size of the image, (height, width)."""
        return np.concatenate([next(found).numpy() for _, found in self.enlarge(values.unsqueeze(0), image)])

    def paint(self, grouping: Grouping, image: Image.Image | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Bring a grouping of patches to the pixels.

        Returns:
            (height, width), the group of each pixel; (height, width), whether it is foreground; and (k,), the mean
            score of each group, NaN if it has no pixels.
        """
        size, num_groups = height_and_width(image), len(grouping.members)
        labels, mask = np.empty(size, dtype=np.min_scalar_type(num_groups)), np.empty(size, dtype=bool)
        sums, counts = np.zeros(num_groups), np.zeros(num_groups, dtype=np.int64)
        saliency = grouping.saliency.float()
        for rows, maps in self.enlarge(torch.cat([grouping.members.float(), saliency.unsqueeze(0)]), image):
            largest, band = next(maps), labels[rows]
            band[:] = 0
            for index, values in zip(range(1, num_groups), maps, strict=False):
                band[(values > largest).numpy()] = index
                largest = torch.maximum(largest, values)
            scores = next(maps).numpy()
            mask[rows] = scores > 0
            counts += np.bincount(band.ravel(), minlength=num_groups)
            sums += np.bincount(band.ravel(), weights=scores.ravel(), minlength=num_groups)
        return labels, mask, np.divide(sums, counts, out=np.full(num_groups, np.nan), where=counts > 0)

    def encode(self, image: Image.Image | np.ndarray, **options) -> Encoding:
        """
        The encoding of an image that [`segment`] needs.

        Args:
            image: as [`to_image`] returns it.
            **options: what else to keep; see `cbsa_hf.segmentation.inference.encode`.

        Raises:
            ValueError: the image would take more memory than `max_memory`, or the model's outputs are not finite.
        """
        config = unwrap(self.model).config
        self.check_memory(height_and_width(image))
        pixel_values = to_pixel_values(image, self.processor, self.long_side, config.patch_size)
        if METHODS[self.method].needs_steps:
            options.setdefault("steps_of", [self.options.attention_layer % config.num_hidden_layers])
        return encode(self.model, pixel_values, output_attentions=True, **options)

    def segment(self, image: Image.Image | np.ndarray, encoding: Encoding | None = None) -> ZeroShotSegmentation:
        """
        Segment one image.

        Args:
            image: as [`to_image`] returns it.
            encoding: what [`encode`] returned for this image; None encodes it.
        """
        encoding = self.encode(image) if encoding is None else encoding
        grouping = METHODS[self.method].group(encoding, self.options)
        labels, mask, scores = self.paint(grouping, image)
        found = np.flatnonzero(~np.isnan(scores))
        order = found[np.argsort(-scores[found], kind="stable")]
        rank = np.zeros(len(scores), dtype=labels.dtype)
        rank[order] = np.arange(len(order))
        for rows in bands(*labels.shape):
            labels[rows] = rank[labels[rows]]
        names = self.name(grouping)
        segments = [Segment(labels, index, float(scores[i]), *names[i]) for index, i in enumerate(order)]
        return ZeroShotSegmentation(mask, labels, segments, partial(self.draw, grouping.saliency.float(), image))

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[ZeroShotSegmentation | ImageError]: ...

    @overload
    def __call__(self, images: ImageSource) -> ZeroShotSegmentation: ...

    def __call__(self, images: Any) -> Any:
        """
        Segment one image or several, of any size and mode.

        Args:
            images: a file, PIL image, array or tensor, or a list of them; see `cbsa_hf.segmentation.images.to_image`.

        Returns:
            The segmentation, or a list of them. In the list an image that cannot be read has its `ImageError` in its
            place, and a warning says so.

        Raises:
            ValueError: a single image cannot be read, or takes too much memory. The message is one sentence for
                people.
        """
        num_channels = unwrap(self.model).config.num_channels
        if isinstance(images, (list, tuple)):
            return for_each_image(self.segment, images, num_channels)
        return self.segment(to_image(images, num_channels=num_channels))
