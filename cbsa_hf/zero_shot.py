"""Segmentation without labels, by the tokens and the attention of a classifier that never saw a mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel

from .images import ImageError, ImageSource, follow_edges, for_each_image, to_image, to_pixel_values
from .token_groups import METHOD_OPTIONS, METHODS, Grouping, Options


@dataclass
class Segment:
    """
    Args:
        mask: (height, width) of the image, bool.
        score: how much it is foreground, the mean of its pixels' scores.
        name: the class that its patches show; None where none is known well enough.
        probability: of the likeliest class, named or not; None where the model has no classifier.
    """

    mask: np.ndarray
    score: float
    name: str | None = None
    probability: float | None = None


@dataclass
class ZeroShotSegmentation:
    """
    Args:
        mask: (height, width) of the image, bool; True is foreground, a score above 0.
        scores: (height, width), how much each pixel is foreground. Method `attention`: the attention of CLS, divided
            by the least in the foreground, less 1. Others: how much more rarely than on average a random walk from
            there visits the surroundings, how central it is and how much CLS attends to it, in standard deviations.
        segments: a partition of the image, the most foreground first.
    """

    mask: np.ndarray
    scores: np.ndarray
    segments: list[Segment]

    @property
    def labels(self) -> np.ndarray:
        """(height, width), the index of each pixel's segment."""
        return np.argmax([segment.mask for segment in self.segments], axis=0)


class ZeroShotSegmenter:
    """
    Segments of a photo, which of them are foreground, and what they show. Methods:

    - `ncut`: the normalised cut of the patches' affinity, in time linear in their number.
    - `representatives`: the representatives of a layer are merged; each patch goes with those that attend to it.
    - `attention`: foreground and background by the attention of CLS alone.

    Args:
        model: a CBSA model, any attention type. The segments of classifiers have names.
        processor: its image processor.
        method: see above.
        sharp: move the edges to those of the image; needs kornia.
        long_side: pixels that the image's longer side is resized to; positions are interpolated.
        min_probability: what a class needs for a segment to be named after it.
        **options: of the method; see [`Options`].

    Raises:
        ValueError: no such method, or an option outside its range or without effect on it.

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
        self.options = Options(**options)
        self.options.check(model)
        for name in options:
            if name in Options.__dataclass_fields__ and name not in METHOD_OPTIONS[method]:
                raise ValueError(f"`{name}` has no effect on the method {method!r}; leave it out.")
        if method == "ncut" and not options.get("attention_weight") and {"layer", "head"} & options.keys():
            raise ValueError("`layer` and `head` have no effect on the method 'ncut' without an `attention_weight`.")

    def name(self, grouping: Grouping) -> list[tuple[str | None, float | None]]:
        """Class and probability of each group: the classifier on the mean of its tokens."""
        classifier = getattr(self.model, "classifier", None)
        if not isinstance(classifier, torch.nn.Linear):
            return [(None, None)] * len(grouping.members)
        members = F.one_hot(grouping.members.argmax(0).flatten(), len(grouping.members)).float().T
        tokens = members @ grouping.tokens.flatten(0, 1) / members.sum(1, keepdim=True).clamp_min(1)
        tokens = tokens.to(classifier.weight)
        with torch.inference_mode():
            probabilities, classes = classifier(tokens).softmax(-1).max(-1)
        return [
            (self.model.config.id2label[int(i)] if p >= self.min_probability else None, float(p))
            for p, i in zip(probabilities, classes, strict=True)
        ]

    def segment(self, image: Image.Image) -> ZeroShotSegmentation:
        """Segment one RGB image."""
        pixel_values = to_pixel_values(image, self.processor, self.long_side, self.model.config.patch_size)
        grouping = METHODS[self.method](self.model, pixel_values, self.options)
        size = (image.height, image.width)
        maps = torch.cat([grouping.members, grouping.saliency.unsqueeze(0)]).float()
        maps = F.interpolate(maps.unsqueeze(0), size=size, mode="bilinear")[0]
        if self.sharp:
            patch = max(size) / max(grouping.saliency.shape)
            maps = follow_edges(maps, image, radius=max(1, round(patch)))
        labels, scores = maps[:-1].argmax(0).numpy(), maps[-1].numpy()
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
        Segment one image or several, of any size and mode: PIL images, arrays or paths.

        Of several, one that cannot be read does not discard the others: the list holds its `ImageError` in that place.

        Raises:
            ImageError: a single image cannot be read; the message is one sentence for people.
        """
        if isinstance(images, (list, tuple)):
            return for_each_image(self.segment, images)
        return self.segment(to_image(images))
