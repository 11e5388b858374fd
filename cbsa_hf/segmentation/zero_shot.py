"""Segment photos with the tokens and the attention of a classifier that was never trained with masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel

from .images import (
    ImageError,
    ImageSource,
    fit_to_patches,
    follow_edges,
    for_each_image,
    height_and_width,
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
        mask: (height, width) of the image, bool.
        score: how much it is foreground: the mean of the scores of its pixels.
        name: the most probable class of its patches; None if its probability is below `min_probability`.
        probability: of the most probable class; None if the model has no classifier.
    """

    mask: np.ndarray
    score: float
    name: str | None = None
    probability: float | None = None


@dataclass
class ZeroShotSegmentation:
    """
    The segmentation of one image.

    Args:
        mask: (height, width) of the image, bool; True for the foreground, where the score is above 0.
        scores: (height, width), how much each pixel is foreground. For the method `attention` it is the attention of
            CLS divided by its smallest value in the foreground, minus 1. For the other methods it combines three
            scores, in standard deviations: how rarely random walks from the pixel visit the border of the image, how
            near it is to the centre, and how much CLS attends to it.
        segments: a partition of the image, in descending order of the score.
    """

    mask: np.ndarray
    scores: np.ndarray
    segments: list[Segment]

    @property
    def labels(self) -> np.ndarray:
        """(height, width), the index in `segments` of the segment of each pixel."""
        labels = np.zeros(self.mask.shape, dtype=np.intp)
        for index, segment in enumerate(self.segments):
            labels[segment.mask] = index
        return labels


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
        long_side: int = 192,
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
        # A mask for each segment, and the maps that it is computed from, one at a time.
        num_segments = self.options.num_segments
        memory = size[0] * size[1] * (num_segments + 20 + (80 if self.sharp else 0))
        what = f"An image of {size[1]} x {size[0]} pixels in {num_segments} segments"
        check_memory(memory, what, "give a smaller image, or fewer `num_segments` (`--segments`)", self.max_memory)

    def paint(
        self, maps: torch.Tensor, image: Image.Image | np.ndarray, size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Bring maps over the patches to the size of the image, one at a time.

        Args:
            maps: (k + 1, grid height, grid width).
            image: guides the edges if `sharp`.
            size: (height, width) of the image.

        Returns:
            (height, width), the index of the largest of the first k maps in each pixel; and the last map.
        """

        def enlarge(values: torch.Tensor) -> torch.Tensor:
            full = F.interpolate(values[None, None], size=size, mode="bilinear")[0]
            if self.sharp:
                patch = max(size) / max(values.shape)
                full = follow_edges(full, image, radius=max(1, round(patch)))
            return full[0]

        largest = enlarge(maps[0])
        labels = torch.zeros(size, dtype=torch.int16)
        for index in range(1, len(maps) - 1):
            found = enlarge(maps[index])
            labels[found > largest] = index
            torch.maximum(largest, found, out=largest)
        return labels.numpy(), enlarge(maps[-1]).numpy()

    def encode(self, image: Image.Image | np.ndarray, **options) -> Encoding:
        """
        The encoding that [`segment`] makes its segments of.

        Args:
            image: as [`to_image`] returns it.
            **options: what else to keep, see [`cbsa_hf.segmentation.inference.encode`].

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
            encoding: of this image by [`encode`], if there is one already; made when None.
        """
        encoding = self.encode(image) if encoding is None else encoding
        grouping = METHODS[self.method].group(encoding, self.options)
        maps = torch.cat([grouping.members, grouping.saliency.unsqueeze(0)]).float()
        labels, scores = self.paint(maps, image, height_and_width(image))
        segments = []
        for i, (name, probability) in enumerate(self.name(grouping)):
            mask = labels == i
            if mask.any():
                segments.append(Segment(mask, float(scores[mask].mean()), name, probability))
        segments.sort(key=lambda segment: -segment.score)
        return ZeroShotSegmentation(scores > 0, scores, segments)

    def __call__(
        self, images: ImageSource | Sequence[ImageSource]
    ) -> ZeroShotSegmentation | list[ZeroShotSegmentation | ImageError]:
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
