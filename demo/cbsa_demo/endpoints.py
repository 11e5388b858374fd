"""What the page shows as numbers: endpoints for `gradio_client` and tools for MCP, with plain types."""

import base64
from io import BytesIO

import gradio as gr
import numpy as np
from gradio.data_classes import FileData
from PIL import Image

from cbsa_hf.configuration_cbsa import to_pair

from .answers import KINDS, Answers
from .looks import METHODS, Look, Segmented
from .parameters import flag, one_of, whole
from .photos import EXAMPLES, LIMITS, PhotoError, source_of
from .story import no_steps


def png(values: np.ndarray) -> str:
    """(height, width) of uint8 as a PNG file in base64."""
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def at_patches(values: np.ndarray, grid: tuple[int, int]) -> list[list[int]]:
    """The values of an array (height, width) at the centre of every patch."""
    rows, columns = (
        ((np.arange(count) + 0.5) * side / count).astype(int) for count, side in zip(grid, values.shape, strict=True)
    )
    return values[np.ix_(rows, columns)].tolist()


def rounded(values: np.ndarray) -> list:
    """Lists of numbers with five significant digits."""
    return [rounded(row) for row in values] if values.ndim else float(f"{values:.5g}")


class Endpoints:
    """The endpoints; each checks what it is given, and answers with numbers, words, and pictures in base64."""

    def __init__(self, answers: Answers):
        self.answers = answers
        self.explorer = answers.explorer

    def source(self, photo: object) -> str:
        """What the page calls a photo: an example's name, or an uploaded file."""
        path = photo.get("path") if isinstance(photo, dict) else photo
        return path if isinstance(path, str) and path in EXAMPLES else source_of(path)

    def look(self, photo: object, model: object) -> Look:
        """What a model finds in a photo, which is an example's name or a file that was sent."""
        return self.explorer.look(self.source(photo), model or self.explorer.default)

    def head(self, look: Look, values: np.ndarray, head: object) -> np.ndarray:
        """One head of (heads, ...), the mean of all for -1."""
        head = whole(head, "head", -1, look.model.config.num_attention_heads - 1)
        return values.mean(0) if head < 0 else values[head]

    def segments(self, look: Look, found: Segmented) -> dict:
        """What [`Endpoints.segment`] returns."""
        return {
            "width": look.photo.image.width,
            "height": look.photo.image.height,
            "segments": [{"index": index} | segment for index, segment in enumerate(found.segments)],
            "grid": list(look.grid),
            "labels": at_patches(found.labels, look.grid),
            "mask_png": png(found.mask.astype(np.uint8) * 255),
            "labels_png": png(found.labels),
        }

    def choices(self) -> dict:
        """
        Says what can be asked: the example photos, the models with what their layers are, the methods, and the limits.

        Returns:
            `photos`, what can be seen on each; `models`, of each `attention_types`, a list over the layers,
            `num_heads`, and `representatives`, rows and columns; `methods`; `limits` of uploads.
        """
        models = {}
        for name in self.explorer.checkpoints:
            config = self.explorer.model(name)[0].config
            models[name] = {
                "attention_types": list(config.layer_attention_types),
                "num_heads": config.num_attention_heads,
                "representatives": list(to_pair(config.representatives_size)),
            }
        photos = {name: example.description for name, example in EXAMPLES.items()}
        return {"photos": photos, "models": models, "methods": list(METHODS), "limits": LIMITS}

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
            photo: an uploaded file, or the name of an example, as `choices` says them.
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
        return self.segments(look, self.answers.segmented(look, method, num_segments, sharp))

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
            photo: an uploaded file, or the name of an example, as `choices` says them.
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
            photo: an uploaded file, or the name of an example, as `choices` says them.
            model: one of the page's models; the first where it is empty.

        Returns:
            `classes` with their probabilities; `measures`: coding rates, sparsity and ranks by name, as lists over the
            layers and, where a measure is of heads, over these.
        """
        look = self.look(photo, model)
        return {"classes": look.predictions(), "measures": look.measures()}

    def steps(
        self,
        photo: FileData | str = "coffee",
        layer: int = 3,
        head: int = -1,
        row: int = 5,
        column: int = 13,
        representative: int = 27,
        model: str = "",
    ) -> dict:
        """
        Says what the representatives of one layer do: extract, contract, broadcast.

        Args:
            photo: an uploaded file, or the name of an example, as `choices` says them.
            layer: which layer, counted from 0; its attention type has to be cbsa.
            head: which head, counted from 0; -1 for their mean.
            row: of the patch, counted from 0.
            column: of the patch, counted from 0.
            representative: which one, counted from 0, row by row.
            model: one of the page's models; the first where it is empty.

        Returns:
            `grid`, rows and columns of patches; `representatives`, rows and columns of these; lists of rows over the
            representatives: `readers`, how much each reads the patch; over the patches, of the chosen one: `reads`, a
            row of A, and `writes`, where what it holds is written, signed; `update`, the length of what every patch
            is given; `similarity`, S, m x m; and over all m: `moved_by_reading`, `moved_by_contraction`, in lengths
            of the representative before.
        """
        look = self.look(photo, model)
        layer = self.answers.layer_of(look, layer)
        patch = self.answers.patch_of(look, row, column)
        trace = look.trace(layer)
        if trace is None:
            raise PhotoError(no_steps(look, layer))
        parts = {name: self.head(look, value.numpy(), head) for name, value in vars(trace).items()}
        chosen = whole(representative, "representative", 0, len(parts["reads"]) - 1)
        shown = {
            "readers": parts["reads"][:, *patch].reshape(look.representatives_size),
            "reads": parts["reads"][chosen],
            "writes": parts["writes"][chosen],
            **{name: parts[name] for name in ("update", "similarity", "moved_by_reading", "moved_by_contraction")},
        }
        sizes = {"grid": list(look.grid), "representatives": list(look.representatives_size)}
        return sizes | {name: rounded(values) for name, values in shown.items()}

    def compare(
        self,
        model: str,
        other: str,
        photo: FileData | str = "coffee",
        method: str = "ncut",
        num_segments: int = 4,
        sharp: bool = False,
    ) -> dict:
        """
        Segments one photo by two models.

        Args:
            model: one of the page's models.
            other: another.
            photo: an uploaded file, or the name of an example, as `choices` says them.
            method: ncut, representatives or attention.
            num_segments: how many segments to look for, 2 to 8.
            sharp: whether their edges follow those of the photo.

        Returns:
            By model, what `segment` returns.
        """
        return {name: self.segment(photo, method, num_segments, sharp, name) for name in (model, other)}

    def street(self, photo: FileData | str = "coffee", flip: bool = True, sharp: bool = False) -> dict:
        """
        Gives every pixel of a street scene one of eleven classes: sky, building, pole, road, pavement, tree, sign,
        fence, car, pedestrian, bicyclist.

        Args:
            photo: an uploaded file, or the name of an example, as `choices` says them.
            flip: whether the mirrored photo is asked too.
            sharp: whether the edges of classes follow those of the photo.

        Returns:
            `width`, `height`; `classes`, each with index, name and share of the pixels; `labels_png`, a file of the
            photo's size in base64 that holds the index of every pixel's class.
        """
        look = self.look(photo, None)
        labels, names = self.answers.street_of(look, flip, sharp)
        counts = np.bincount(labels.flat, minlength=len(names)) / labels.size
        return {
            "width": labels.shape[1],
            "height": labels.shape[0],
            "classes": [{"index": i, "name": names[i], "share": share} for i, share in enumerate(counts.tolist())],
            "labels_png": png(labels.astype(np.uint8)),
        }

    def download(
        self,
        kind: str = "mask",
        photo: FileData | str = "coffee",
        method: str = "ncut",
        num_segments: int = 4,
        sharp: bool = False,
        row: int = 5,
        column: int = 13,
        model: str = "",
    ) -> dict:
        """
        Gives a file of what was found: the mask, the segments, or all maps.

        Args:
            kind: mask or segments, a PNG; maps, an NPZ with what every layer and head has.
            photo: an uploaded file, or the name of an example, as `choices` says them.
            method: of mask and segments: ncut, representatives or attention.
            num_segments: of mask and segments: how many to look for, 2 to 8.
            sharp: of mask and segments: whether their edges follow those of the photo.
            row: of the patch that the maps ask, counted from 0.
            column: of the patch that the maps ask, counted from 0.
            model: one of the page's models; the first where it is empty.

        Returns:
            `name` of the file; `uri`, a data address with the file in base64, which `urllib.request.urlopen` opens.
        """
        source = self.source(photo)
        one_of(kind, "kind", KINDS)
        model = model or self.explorer.default
        return self.answers.download(kind, source, model, method, num_segments, sharp, row, column)


def add_endpoints(answers: Answers):
    """Enter the endpoints into the page that is being built."""
    all_of = Endpoints(answers)
    endpoints = (
        *(all_of.choices, all_of.segment, all_of.steps, all_of.attention, all_of.inside),
        *(all_of.compare, all_of.street, all_of.download),
    )
    for endpoint in endpoints:
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=2)
