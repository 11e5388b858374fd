"""What a model finds in a photo: all of it computed by `cbsa_hf`, each part once, and kept for a while."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import BaseImageProcessor

from cbsa_hf import CBSAPreTrainedModel, SlidingWindowSegmenter, ZeroShotSegmenter, load_checkpoint
from cbsa_hf.configuration_cbsa import to_pair
from cbsa_hf.interpretability.attention_maps import exact_map, map_formula
from cbsa_hf.interpretability.measures import collect, measure
from cbsa_hf.interpretability.report import predictions
from cbsa_hf.interpretability.representatives import RepresentativeTrace, trace_representatives
from cbsa_hf.segmentation.inference import token_index

from .photos import Photo, PhotoError, open_photo


try:
    from spaces import GPU as on_gpu
except ImportError:  # everywhere but on a ZeroGPU of Hugging Face

    def on_gpu(function):
        """The function as it is: here it already runs where the model is."""
        return function


T = TypeVar("T")

MAX_LOOKS = 4  # that are kept, up to 30 MB each
MAX_PARTS = 4  # of each, segmentations and measures
LONG_SIDE = 256  # pixels of the longer side that the model sees
METHODS = ("ncut", "representatives", "attention")
MAX_SEGMENTS = 8


class Kept:
    """A cache of the results used last. If two threads ask for a result at the same time, it is computed once."""

    def __init__(self, size: int):
        self.size = size
        self.lock = threading.Lock()
        self.results = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The result of that key; it is computed if it is not in the cache."""
        with self.lock:
            result, lock = self.results.setdefault(key, ([], threading.Lock()))
            self.results.move_to_end(key)
            while len(self.results) > self.size:
                self.results.popitem(last=False)
        with lock:
            if not result:
                try:
                    result.append(compute())
                except Exception:
                    with self.lock:
                        self.results.pop(key, None)  # a failed computation is not kept
                    raise
            return result[0]


@dataclass(frozen=True)
class Segmented:
    """
    A segmentation, as small as it can be kept.

    Args:
        labels: (height, width) of the photo, uint8, the index of each pixel's segment.
        mask: (height, width), bool, the foreground.
        segments: of each, the most foreground first: `name` (None where no class is likely), `probability`, `score`,
            `share` of the pixels, `foreground` whether its score is above 0.
    """

    labels: np.ndarray
    mask: np.ndarray
    segments: list[dict]


@on_gpu
def segment_street(
    image: Image.Image, model: CBSAPreTrainedModel, processor: BaseImageProcessor, flip: bool, sharp: bool
) -> np.ndarray:
    """The class of every pixel of a street scene, (height, width)."""
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return SlidingWindowSegmenter(model, processor, flip=flip, sharp=sharp)(image)


class Look:
    """
    What a model finds in a photo, all of it from one pass of the encoder.

    Args:
        photo: the photo.
        model, processor: what it is seen with.
    """

    def __init__(self, photo: Photo, model: CBSAPreTrainedModel, processor: BaseImageProcessor):
        self.photo = photo
        self.model = model
        self.processor = processor
        layers = range(model.config.num_hidden_layers)
        segmenter = ZeroShotSegmenter(model, processor, long_side=LONG_SIDE)
        self.encoding = segmenter.encode(photo.image, output_hidden_states=True, steps_of=layers)
        self.grid = self.encoding.grid
        self.parts = Kept(MAX_PARTS)

    def segment(self, method: str, num_segments: int, sharp: bool) -> Segmented:
        """Segments of the photo without any label."""
        return self.parts.get(
            (method, num_segments, sharp), lambda: self.compute_segments(method, num_segments, sharp)
        )

    def compute_segments(self, method: str, num_segments: int, sharp: bool) -> Segmented:
        """The segments, without asking whether they are kept."""
        segmenter = ZeroShotSegmenter(self.model, self.processor, method, sharp, num_segments=num_segments)
        found = segmenter.segment(self.photo.image, self.encoding)
        segments = [
            {
                "name": segment.name,
                "probability": segment.probability,
                "score": segment.score,
                "share": float(segment.mask.mean()),
                "foreground": segment.score > 0,
            }
            for segment in found.segments
        ]
        return Segmented(found.labels.astype(np.uint8), found.mask, segments)

    def maps(self, patch: tuple[int, int] | None, exact: bool) -> np.ndarray:
        """
        What every layer and head ties the patch to, CLS where it is None: (layers, heads, grid height, grid width).
        Exact maps have both signs, and are NaN in layers whose attention type is not `cbsa`.
        """
        if not exact:
            return self.encoding.attention_maps(patch)[:, 0].numpy()
        num_prefix_tokens = self.encoding.num_prefix_tokens
        token = token_index(self.grid, patch, num_prefix_tokens)
        config = self.model.config
        maps = torch.full((config.num_hidden_layers, config.num_attention_heads, *self.grid), torch.nan)
        for layer in self.encoding.recorded:
            row = exact_map(self.encoding, layer).row(token)[0]
            maps[layer] = row[:, num_prefix_tokens:].unflatten(1, self.grid)
        return maps.numpy()

    @property
    def map_formula(self) -> str:
        """What the token-to-token map is, as HTML."""
        return map_formula(self.model).replace("$", "").replace("^T", "<sup>T</sup>")

    @property
    def attention_types(self) -> str:
        """The attention types of its layers, each once, with commas between."""
        return ", ".join(dict.fromkeys(self.model.config.layer_attention_types))

    @property
    def has_representatives(self) -> bool:
        """Whether a layer has any that contract."""
        return bool(self.encoding.recorded)

    @property
    def representatives_size(self) -> tuple[int, int]:
        """Rows and columns of the representatives, m together."""
        return to_pair(self.model.config.representatives_size)

    @property
    def pools(self) -> bool:
        """Whether representatives have a place on the photo."""
        return self.model.config.representatives_type == "pool"

    def trace(self, layer: int) -> RepresentativeTrace | None:
        """What the representatives of a layer do; None for a layer without."""
        return trace_representatives(self.encoding, layer)

    def arrays(self, patch: tuple[int, int]) -> dict[str, np.ndarray]:
        """All maps of the photo, by what they are."""
        arrays = {"map_of_patch": self.maps(patch, exact=False), "map_of_cls": self.maps(None, exact=False)}
        if self.has_representatives:
            arrays["exact_map_of_patch"] = self.maps(patch, exact=True)
        for layer in self.encoding.recorded:
            arrays |= {f"layer_{layer}_{name}": value.numpy() for name, value in vars(self.trace(layer)).items()}
        return arrays

    def measures(self) -> dict[str, list | None]:
        """The means of `LayerMeasures`, by name, over the layers and, where it says so, heads."""
        return self.parts.get("measures", self.compute_measures)

    def compute_measures(self) -> dict[str, list | None]:
        """The measures, without asking whether they are kept."""
        summary = collect([measure(self.encoding)]).summary()
        return {name: found and found["mean"] for name, found in summary.items()}

    def street(self, segmenter: tuple[CBSAPreTrainedModel, BaseImageProcessor], flip: bool, sharp: bool) -> np.ndarray:
        """The class of every pixel by a model for street scenes, (height, width)."""
        key = ("street", flip, sharp)
        return self.parts.get(key, lambda: segment_street(self.photo.image, *segmenter, flip, sharp))

    def predictions(self) -> list[dict]:
        """The most probable classes; none where the model has no classifier."""
        return predictions(self.model, self.encoding)


class Explorer:
    """
    The models of the page, and what they found in the photos of late.

    Args:
        checkpoints: folders or hub ids by the names that visitors see. Visitors choose among these only, so nobody
            makes the server open a folder or download a model.
    """

    def __init__(self, checkpoints: dict[str, str]):
        self.checkpoints = checkpoints
        self.models = Kept(len(checkpoints) + 1)
        self.photos = Kept(MAX_LOOKS)
        self.looks = Kept(MAX_LOOKS)

    @property
    def default(self) -> str:
        """The name of the model that the page opens with."""
        return next(iter(self.checkpoints))

    def model(self, name: object) -> tuple[CBSAPreTrainedModel, BaseImageProcessor]:
        """A model of the page and its processor; a PhotoError for another."""
        if not isinstance(name, str) or name not in self.checkpoints:
            raise PhotoError(f"There is no such model; choose one of {', '.join(self.checkpoints)}.")
        return self.models.get(name, lambda: load_checkpoint(self.checkpoints[name]))

    def card(self, name: object) -> str:
        """The model card, in Markdown; for one without, or of the hub, where it is."""
        self.model(name)  # checks the name
        checkpoint = Path(self.checkpoints[name])
        if not checkpoint.is_dir():
            return f"[The model card on the Hub](https://huggingface.co/{self.checkpoints[name]})"
        file = checkpoint / "README.md"
        return (
            ModelCard.load(file, ignore_metadata_errors=True).text
            if file.is_file()
            else "This model has no model card."
        )

    def segmenter(self) -> tuple[CBSAPreTrainedModel, BaseImageProcessor]:
        """The model for street scenes that ships with the package, and its processor."""
        return self.models.get(None, lambda: load_checkpoint(task="semantic-segmentation"))

    def photo(self, source: object) -> Photo:
        """The photo, decoded once; a PhotoError where there is none."""
        return self.photos.get(str(source), lambda: open_photo(source))

    def look(self, source: object, name: object) -> Look:
        """What that model finds in that photo; a PhotoError where there is no such photo or model."""
        model, processor = self.model(name)
        return self.looks.get((str(source), name), lambda: Look(self.photo(source), model, processor))
