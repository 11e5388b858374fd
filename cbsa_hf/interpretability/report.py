"""A report of what a model does with one photo: pictures, and the numbers behind them, in a folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from ..configuration_cbsa import to_pair
from ..overlays import overlay_signed
from ..segmentation.images import fit_to_patches, to_pixel_values
from ..segmentation.inference import Encoding, classify, encode, token_index, unwrap
from ..segmentation.memory import MAX_MEMORY, check_input
from .attention_maps import ExactMap, exact_map, map_formula, map_is_exact
from .measures import LayerMeasures, collect, effective_count, measure
from .plots import attention_grid, line_panels, representative_sheet


@dataclass
class Report:
    """
    A report, or a part of one.

    Args:
        numbers: content of `report.json`.
        pictures: file name -> picture.
    """

    numbers: dict
    pictures: dict[str, Image.Image]


def rounded(value):
    """Numbers and tensors, also in lists and dictionaries, rounded to six significant digits, for JSON."""
    if isinstance(value, torch.Tensor):
        return rounded(value.tolist())
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def describe_maps(maps: torch.Tensor) -> dict[str, list]:
    """The strongest patch of each map (..., grid height, grid width), and over how many patches it is spread."""
    strength = maps.abs().flatten(-2)
    peak = strength.argmax(-1)
    rows_and_columns = torch.stack([peak // maps.shape[-1], peak % maps.shape[-1]], dim=-1)
    return {"peak": rows_and_columns.tolist(), "patches": effective_count(strength).tolist()}


def predictions(model: PreTrainedModel, encoding: Encoding) -> list[dict]:
    """The five most probable classes of the first image, in order; none without a classifier."""
    found = classify(model, encoding.tokens[:1, 0])
    if found is None:
        return []
    names = unwrap(model).config.id2label
    probabilities, classes = found[0].topk(min(5, found.shape[1]))
    pairs = zip(classes.tolist(), probabilities.tolist(), strict=True)
    return [{"label": names[index], "probability": probability} for index, probability in pairs]


def query_name(patch: tuple[int, int] | None) -> str:
    """The token whose attention is shown, for titles."""
    return "CLS" if patch is None else f"patch ({patch[0]}, {patch[1]})"


def draw_measures(measures: LayerMeasures) -> Image.Image:
    """Plot coding rates, sparsity and ranks over the layers: mean and standard deviation over images and heads."""

    def lines(**names: str) -> dict[str, torch.Tensor]:  # label -> (samples, layers), of the measures that there are
        found = {label.replace("_", " "): getattr(measures, name) for label, name in names.items()}
        return {
            label: (values.transpose(1, 2).flatten(0, 1) if values.ndim == 3 else values).numpy()
            for label, values in found.items()
            if values is not None
        }

    rates = lines(before_attention="normalised_coding_rate_before", after_attention="normalised_coding_rate_after")
    raw_rates = lines(before_attention="coding_rate_before", after_attention="coding_rate_after")
    titles = {
        "coding rate, normalised tokens": ("nats", rates),
        "coding rate, tokens as they are": ("nats", raw_rates),
        "zeros around the feed-forward": ("share of entries", lines(before="zeros_before", after="zeros_after")),
        "rank of the attention": ("effective rank", lines(A="representative_attention_rank", map="map_rank")),
    }
    layers = list(range(measures.zeros_after.shape[1]))
    panels = [
        {"title": title, "x": "layer", "y": unit, "positions": layers, "lines": found}
        for title, (unit, found) in titles.items()
        if found
    ]
    return line_panels(panels)


def inspect_attention(image: Image.Image, encoding: Encoding, patch: tuple[int, int] | None) -> Report:
    """The row of CLS or a patch in the token-to-token map that the model returns as `attentions`."""
    formula, exact = map_formula(encoding.encoder), map_is_exact(encoding.encoder)
    what = f"row of {query_name(patch)} in {formula}"
    maps = encoding.attention_maps(patch)[:, 0]
    numbers = {"what": what.replace("$", ""), "exact": exact, "picture": "attention.png", "values": maps}
    title = f"attention: {what} ({'exact' if exact else 'the update is made otherwise'})"
    return Report(numbers, {"attention.png": attention_grid(image, maps, title, patch=patch)})


def inspect_exact_map(
    image: Image.Image, maps: dict[int, ExactMap], grid: tuple[int, int], patch: tuple[int, int] | None
) -> Report:
    """The row of CLS or a patch in the exact token-to-token map of the layers that have one, by layer."""
    rows = []
    for found in maps.values():
        num_prefix_tokens = found.representative_attentions.shape[-1] - grid[0] * grid[1]
        row = found.row(token_index(grid, patch, num_prefix_tokens))[0]
        rows.append(row[:, num_prefix_tokens:].unflatten(-1, grid))
    rows = torch.stack(rows)
    what = f"what {query_name(patch)} is given of every patch: its row of"
    numbers = {"what": f"{what} kappa A^T S (P + eta A)", "exact": True, "picture": "exact-map.png"}
    numbers |= {"layers": list(maps), "values": rows}
    title = rf"{what} $\kappa A^T S (P + \eta A)$ (exact)"
    picture = attention_grid(image, rows, title, overlay_signed, patch, layers=list(maps))
    return Report(numbers, {"exact-map.png": picture})


def inspect_representatives(
    image: Image.Image, maps: dict[int, ExactMap], grid: tuple[int, int], size: tuple[int, int]
) -> Report:
    """What each representative reads and writes: a picture for each layer; strongest patch and spread as numbers."""
    numbers = {
        "what": "reads: rows of A; writes: rows of kappa S^T A; peak: [row, column] of the strongest patch; patches: "
        "over how many it is spread, the exponential of the entropy",
        "exact": True,
        "size": list(size),
        "layers": list(maps),
        "reads": [],
        "writes": [],
    }
    pictures = {}
    for layer, found in maps.items():
        num_patches = grid[0] * grid[1]
        reads, writes = (
            values[0, ..., -num_patches:].unflatten(-1, grid)
            for values in (found.representative_attentions, found.writes)
        )
        numbers["reads"].append(describe_maps(reads))
        numbers["writes"].append(describe_maps(writes))
        title = f"layer {layer}: what each representative reads, and where it is written after the contraction"
        pictures[f"representatives-{layer:02d}.png"] = representative_sheet(image, reads, writes, size, title)
    return Report({**numbers, "pictures": list(pictures)}, pictures)


def inspect_measures(encoding: Encoding) -> Report:
    """Coding rates, sparsity and ranks of every layer."""
    measures = collect([measure(encoding)])
    means = {name: found and found["mean"] for name, found in measures.summary().items()}
    numbers = {"what": "see LayerMeasures", "eps": measures.eps, "picture": "measures.png", **means}
    return Report(numbers, {"measures.png": draw_measures(measures)})


def inspect_photo(
    image: Image.Image,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    long_side: int = 256,
    patch: tuple[int, int] | None = None,
    max_memory: float = MAX_MEMORY,
) -> Report:
    """
    Report what a model does with a photo, from one pass of the encoder.

    Lists in the report go over layers (those in `layers`, if that is there), then over heads. Parts that the attention
    type does not have are None.

    Args:
        image: the photo, RGB.
        model: a CBSA model with any head, as it is or wrapped; it does not change. Classifiers also predict classes.
        processor: its image processor.
        long_side: the longer side of the photo is resized to that many pixels.
        patch: (row, column) of the patch whose attention is shown; None for CLS.
        max_memory: bytes that the report may take, as estimated before.

    Raises:
        ValueError: `patch` lies outside the grid of patches, the model has another library's backbone, its outputs are
            not finite, or the report would take too much memory.
    """
    config = unwrap(model).config
    size = fit_to_patches((image.height, image.width), long_side, config.patch_size)
    check_input(model, size, max_memory, share=3)  # all hidden states, and the measures of every layer
    pixel_values = to_pixel_values(image, processor, long_side, config.patch_size)
    layers = range(config.num_hidden_layers)
    encoding = encode(model, pixel_values, output_hidden_states=True, output_attentions=True, steps_of=layers)
    parts = {
        "attention": inspect_attention(image, encoding, patch),
        "exact_map": None,
        "representatives": None,
        "measures": inspect_measures(encoding),
    }
    maps = {layer: exact_map(encoding, layer) for layer in encoding.recorded}
    if maps:
        size = to_pair(config.representatives_size)
        parts["exact_map"] = inspect_exact_map(image, maps, encoding.grid, patch)
        parts["representatives"] = inspect_representatives(image, maps, encoding.grid, size)
    numbers = {
        "attention_type": config.attention_type,
        "input": list(pixel_values.shape[2:]),
        "grid": list(encoding.grid),
        "query": query_name(patch),
        "predictions": predictions(model, encoding),
        **{name: part and part.numbers for name, part in parts.items()},
    }
    pictures = {name: picture for part in parts.values() if part for name, picture in part.pictures.items()}
    return Report(rounded(numbers), pictures)


def save_report(report: Report, folder: Path):
    """Write `report.json` and the pictures to a new or empty folder; if that fails, nothing is written."""
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        written = Path(partial) / folder.name
        written.mkdir()
        for name, picture in report.pictures.items():
            # With 256 colours the file has a third of the size and looks the same.
            palette = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            palette.save(written / name, format="PNG", optimize=True)
        (written / "report.json").write_text(json.dumps(report.numbers, allow_nan=False) + "\n", encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()
        written.rename(folder)
