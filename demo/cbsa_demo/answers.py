"""The content of each part of the page: checks what a visitor chose, and draws the view."""

from pathlib import Path

import numpy as np
from PIL import Image

from cbsa_hf.overlays import class_colours

from . import story, views
from .drawing import draw_labels, to_npz, to_uri
from .looks import MAX_SEGMENTS, METHODS, Explorer, Look, Segmented
from .parameters import MEAN, flag, heads_of, one_of, whole


FIRST = {"source": "coffee", "layer": 3, "head": MEAN, "representative": 27}
QUERIES = {"the chosen patch": True, "CLS": False}
MAPS = {"as published": False, "exact": True}
NO_OTHER = "none"
KINDS = ("mask", "segments", "maps")  # of files to keep


class Answers:
    """One method for each part of the page. Each raises PhotoError or ValueError for a value that it refuses."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer

    def layer_of(self, look: Look, layer: object) -> int:
        """The index of the layer that was chosen."""
        return whole(layer, "layer", 0, look.model.config.num_hidden_layers - 1)

    def head_of(self, look: Look, values: np.ndarray, head: object) -> np.ndarray:
        """What the head has of (heads, ...), or the mean of all."""
        head = one_of(head, "head", heads_of(look.model.config))
        return values.mean(0) if head == MEAN else values[int(head)]

    def patch_of(self, look: Look, row: object, column: object) -> tuple[int, int]:
        """Row and column of the patch that was chosen."""
        rows, columns = look.grid
        return whole(row, "row", 0, rows - 1), whole(column, "column", 0, columns - 1)

    def segmented(self, look: Look, method: object, num_segments: object, sharp: object) -> Segmented:
        """The segments by the method that was chosen."""
        return look.segment(
            one_of(method, "method", METHODS),
            whole(num_segments, "number of segments", 2, MAX_SEGMENTS),
            flag(sharp, "edges follow the photo"),
        )

    def photo(self, source, model) -> str:
        """The photo itself, as HTML."""
        return views.photo(self.explorer.look(source, model))

    def segments(self, source, model, method, num_segments, sharp) -> tuple[str, str, str]:
        """The segments over the photo, their legend, and a line for the status, as HTML."""
        look = self.explorer.look(source, model)
        found = self.segmented(look, method, num_segments, sharp)
        done = views.status(f"{look.photo.title}: {views.describe_segments(found)}.")
        return views.segments(found), views.legend(found), done

    def steps(self, source, model, layer, head, row, column, representative) -> str:
        """The steps of the operator in one layer and head, for a patch and a representative, as HTML."""
        look = self.explorer.look(source, model)
        layer, patch = self.layer_of(look, layer), self.patch_of(look, row, column)
        trace = look.trace(layer)
        if trace is None:
            return views.sentence(f"{story.no_steps(look, layer)} Its maps are below.")
        parts = {name: self.head_of(look, value.numpy(), head) for name, value in vars(trace).items()}
        chosen = whole(representative, "representative", 0, len(parts["reads"]) - 1)
        return story.steps(look, parts, patch, chosen)

    def glance(self, source, model, row, column, query, kind, shared) -> str:
        """The maps of all layers and heads, for a patch or for CLS, as HTML."""
        look = self.explorer.look(source, model)
        patch = self.patch_of(look, row, column)
        if not QUERIES[one_of(query, "query", QUERIES)]:
            patch = None
        return story.glance(look, patch, MAPS[one_of(kind, "map", MAPS)], flag(shared, "one scale"))

    def inside(self, source, model) -> str:
        """The measures of every layer, as HTML."""
        return story.inside(self.explorer.look(source, model))

    def compare(self, source, model, other, method, num_segments, sharp, layer, head, row, column) -> str:
        """Two models side by side, for the same photo and patch, as HTML."""
        if other == NO_OTHER:
            return views.sentence("Choose a second model.")
        looks = [self.explorer.look(source, name) for name in (model, other)]
        found = [self.segmented(look, method, num_segments, sharp) for look in looks]
        maps = [
            self.head_of(
                look, look.maps(self.patch_of(look, row, column), exact=False)[self.layer_of(look, layer)], head
            )
            for look in looks
        ]
        what = f"Layer {layer}, head {head}: what patch ({row}, {column}) is tied to"
        return views.compare(looks, [model, other], found, maps, what)

    def street_of(self, look: Look, flip: object, sharp: object) -> tuple[np.ndarray, dict[int, str]]:
        """The class of every pixel, and the names of the classes."""
        segmenter = self.explorer.segmenter()
        labels = look.street(segmenter, flag(flip, "mirrored too"), flag(sharp, "edges follow the photo"))
        return labels, segmenter[0].config.id2label

    def street(self, source, model, flip, sharp) -> str:
        """The classes of a street scene with their legend, as HTML."""
        return views.street(*self.street_of(self.explorer.look(source, model), flip, sharp))

    def download(self, kind: str, source, model, method, num_segments, sharp, row, column) -> dict:
        """A file to save: its `name` and its content as a data `uri`; `kind` is mask, segments or maps."""
        look = self.explorer.look(source, model)
        found = self.segmented(look, method, num_segments, sharp)
        name = Path(look.photo.source).stem
        if kind == "mask":
            return {"name": f"{name}-mask.png", "uri": to_uri(Image.fromarray(found.mask))}
        if kind == "segments":
            return {
                "name": f"{name}-segments.png",
                "uri": draw_labels(found.labels, class_colours(len(found.segments))),
            }
        return {"name": f"{name}-maps.npz", "uri": to_npz(look.arrays(self.patch_of(look, row, column)))}
