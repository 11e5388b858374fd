"""What the page shows as numbers: endpoints for `gradio_client` and tools for MCP, with plain types."""

import base64
from io import BytesIO

import gradio as gr
import numpy as np
from gradio.data_classes import FileData
from PIL import Image

from .looks import MAX_SEGMENTS, METHODS, Explorer, Look
from .parameters import flag, one_of, whole
from .photos import EXAMPLES, source_of


def png(values: np.ndarray) -> str:
    """(height, width) of uint8 as a PNG file in base64."""
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def at_patches(values: np.ndarray, grid: tuple[int, int]) -> list[list[int]]:
    """What (height, width) of a photo has in the centre of every patch."""
    rows, columns = (
        ((np.arange(count) + 0.5) * side / count).astype(int) for count, side in zip(grid, values.shape, strict=True)
    )
    return values[np.ix_(rows, columns)].tolist()


def rounded(values: np.ndarray) -> list:
    """Lists of numbers with five significant digits."""
    return [rounded(row) for row in values] if values.ndim else float(f"{values:.5g}")


class Endpoints:
    """The endpoints; each checks what it is given, and answers with numbers, words, and pictures in base64."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer

    def look(self, photo: object, model: object) -> Look:
        """What a model finds in a photo, which is an example's name or a file that was sent."""
        path = photo.get("path") if isinstance(photo, dict) else photo
        source = path if isinstance(path, str) and path in EXAMPLES else source_of(path)
        return self.explorer.look(source, model or self.explorer.default)

    def head(self, look: Look, values: np.ndarray, head: object) -> np.ndarray:
        """One head of (heads, ...), the mean of all for -1."""
        head = whole(head, "head", -1, look.model.config.num_attention_heads - 1)
        return values.mean(0) if head < 0 else values[head]

    def segment(
        self,
        photo: FileData | str = "coffee",
        method: str = "ncut",
        num_segments: int = 4,
        sharp: bool = False,
        model: str = "",
    ) -> dict:
        """
        Segments a photo without any label and says which segments are foreground.

        Args:
            photo: an uploaded file, or the name of an example: coffee, chelsea, astronaut, camera,
                immunohistochemistry, rocket.
            method: ncut, representatives or attention.
            num_segments: how many segments to look for, 2 to 8.
            sharp: whether their edges follow those of the photo.
            model: one of the page's models; the first where it is empty.

        Returns:
            `width`, `height`; `segments`, the most foreground first, each with index, foreground, score, share of the
            pixels, name and probability; `grid`, rows and columns of patches; `labels`, the segment of each patch;
            `mask_png` and `labels_png`, files of the photo's size in base64.
        """
        look = self.look(photo, model)
        method = one_of(method, "method", METHODS)
        num_segments = whole(num_segments, "number of segments", 2, MAX_SEGMENTS)
        found = look.segment(method, num_segments, flag(sharp, "sharp"))
        return {
            "width": look.photo.image.width,
            "height": look.photo.image.height,
            "segments": [{"index": index} | segment for index, segment in enumerate(found.segments)],
            "grid": list(look.grid),
            "labels": at_patches(found.labels, look.grid),
            "mask_png": png(found.mask.astype(np.uint8) * 255),
            "labels_png": png(found.labels),
        }

    def attention(
        self,
        photo: FileData | str = "coffee",
        layer: int = 3,
        head: int = -1,
        row: int = -1,
        column: int = -1,
        exact: bool = False,
        model: str = "",
    ) -> dict:
        """
        Says how strongly one patch of a photo is tied to every other in one layer.

        Args:
            photo: an uploaded file, or the name of an example: coffee, chelsea, astronaut, camera,
                immunohistochemistry, rocket.
            layer: which layer, counted from 0.
            head: which head, counted from 0; -1 for their mean.
            row: of the patch, counted from 0; -1 asks the CLS token.
            column: of the patch, counted from 0; -1 asks the CLS token.
            exact: the map that makes the update, which has both signs, and not A^T A.
            model: one of the page's models; the first where it is empty.

        Returns:
            `grid`, rows and columns of patches; `values`, a list of rows.
        """
        look = self.look(photo, model)
        layer = whole(layer, "layer", 0, look.model.config.num_hidden_layers - 1)
        row = whole(row, "row", -1, look.grid[0] - 1)
        column = whole(column, "column", -1, look.grid[1] - 1)
        maps = look.maps(None if min(row, column) < 0 else (row, column), flag(exact, "exact"))
        return {"grid": list(look.grid), "values": rounded(self.head(look, maps[layer], head))}

    def inside(self, photo: FileData | str = "coffee", model: str = "") -> dict:
        """
        Measures what every layer does with a photo, and names its most probable classes.

        Args:
            photo: an uploaded file, or the name of an example: coffee, chelsea, astronaut, camera,
                immunohistochemistry, rocket.
            model: one of the page's models; the first where it is empty.

        Returns:
            `classes` with their probabilities; `measures`: coding rates, sparsity and ranks by name, as lists over the
            layers and, where a measure is of heads, over these.
        """
        look = self.look(photo, model)
        return {"classes": look.predictions(), "measures": look.measures()}


def add_endpoints(explorer: Explorer):
    """Enter the endpoints into the page that is being built."""
    endpoints = Endpoints(explorer)
    for endpoint in (endpoints.segment, endpoints.attention, endpoints.inside):
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=2)
