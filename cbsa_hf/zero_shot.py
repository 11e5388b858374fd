"""Segmentation without labels: the foreground of a photo from the attention of a classifier alone."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel

from .images import to_pixel_values, to_rgb
from .interpretability import attention_maps


@dataclass
class ZeroShotSegmentation:
    """
    Args:
        mask: (height, width) of the image, bool; True is foreground.
        saliency: (height, width), the attention mass per pixel that the mask was cut from; sums to 1.
    """

    mask: np.ndarray
    saliency: np.ndarray


def keep_mass(saliency: np.ndarray, mass: float) -> np.ndarray:
    """The fewest pixels that together hold that share of the sum, as a mask of the same shape."""
    values = np.sort(saliency, axis=None)[::-1]
    count = np.searchsorted(np.cumsum(values), mass * values.sum()) + 1
    return saliency >= values[min(count, values.size) - 1]


def median_filter(maps: torch.Tensor, size: int) -> torch.Tensor:
    """The median of each size x size neighbourhood of (batch, channels, height, width); borders are repeated."""
    maps = F.pad(maps, (size // 2,) * 4, mode="replicate")
    return maps.unfold(2, size, 1).unfold(3, size, 1).flatten(4).median(-1).values


class ZeroShotSegmenter:
    """
    Foreground by the attention of CLS, after DINO's visualisation (arXiv 2104.14294): the row of `A^T A` that belongs
    to CLS is a map over the patches; the foreground is where most of its mass lies.

    A median over 5 x 5 patches comes between: in classifiers trained without register tokens single patches, often of
    plain background, draw much of the attention (arXiv 2309.16588).

    Args:
        model: a CBSA classifier.
        processor: its image processor.
        long_side: pixels that the image's longer side is resized to; positions are interpolated.
        mass: share of the attention that the foreground holds, in (0, 1].
        layer: which layer's attention, negative counts from the last; None averages the layers.
        head: which head's attention; None averages the heads.

    Raises:
        ValueError: `mass` is outside (0, 1], or there is no such layer or head.

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
        long_side: int = 256,
        mass: float = 0.6,
        layer: int | None = None,
        head: int | None = None,
    ):
        num_layers, num_heads = model.config.num_hidden_layers, model.config.num_attention_heads
        if not 0 < mass <= 1:
            raise ValueError(f"`mass` is {mass}; give a share of the attention above 0, 1 at most.")
        if layer is not None and not -num_layers <= layer < num_layers:
            raise ValueError(f"`layer` is {layer}; the model has {num_layers} layers, counted from 0.")
        if head is not None and not 0 <= head < num_heads:
            raise ValueError(f"`head` is {head}; the model has {num_heads} heads, counted from 0.")
        self.model = model
        self.processor = processor
        self.long_side = long_side
        self.mass = mass
        self.layer = layer
        self.head = head

    def saliency(self, image: Image.Image) -> np.ndarray:
        """The attention of CLS, (heads, height, width) at the size of an RGB image; each head's map sums to 1."""
        pixel_values = to_pixel_values(image, self.processor, self.long_side, self.model.config.patch_size)
        maps = attention_maps(self.model, pixel_values).float()  # (layers, 1, heads, grid height, grid width)
        maps = maps / maps.sum((3, 4), keepdim=True)  # every layer and head has the same say
        maps = median_filter(maps.mean(0) if self.layer is None else maps[self.layer], size=5)
        maps = F.interpolate(maps, size=(image.height, image.width), mode="bilinear")[0]
        return (maps / maps.sum((1, 2), keepdim=True)).numpy()

    def __call__(self, image: Image.Image) -> ZeroShotSegmentation:
        """Segment one image of any size and mode."""
        maps = self.saliency(to_rgb(image))
        saliency = maps.mean(0) if self.head is None else maps[self.head]
        return ZeroShotSegmentation(mask=keep_mass(saliency, self.mass), saliency=saliency)
