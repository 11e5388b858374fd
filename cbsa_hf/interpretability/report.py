"""What can be seen of a model at work on one photo: pictures, and the numbers behind them, in a folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from ..attention_cbsa import to_pair
from ..overlays import overlay_signed
from ..segmentation.images import fit_to_patches, to_pixel_values
from ..segmentation.inference import attention_maps, evaluating, patch_grid, token_index, unwrap
from ..segmentation.memory import MAX_MEMORY, check_input
from .attention_maps import ExactMap, exact_maps, map_formula, map_is_exact
from .measures import LayerMeasures, effective_count, measure_layers
from .plots import attention_grid, line_panels, representative_sheet


@dataclass
class Report:
    """
    Args:
        numbers: what goes into `report.json`.
        pictures: by file name.
    """

    numbers: dict
    pictures: dict[str, Image.Image]


def rounded(value):
    """Numbers, tensors, and lists and dictionaries of them, with six significant digits, for JSON."""
    if isinstance(value, torch.Tensor):
        return rounded(value.tolist())
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def describe_maps(maps: torch.Tensor) -> dict[str, list]:
    """Of maps (..., grid height, grid width): where each is strongest, and over how many patches it is spread."""
    strength = maps.abs().flatten(-2)
    peak = strength.argmax(-1)
    rows_and_columns = torch.stack([peak // maps.shape[-1], peak % maps.shape[-1]], dim=-1)
    return {"peak": rows_and_columns.tolist(), "patches": effective_count(strength).tolist()}


def predictions(model: PreTrainedModel, pixel_values: torch.Tensor, count: int = 5) -> list[dict]:
    """The most probable classes of one image, most probable first; none without a classifier."""
    config = unwrap(model).config
    # With one label a classifier of Transformers is a regressor, which has no probabilities.
    if not hasattr(unwrap(model), "classifier") or config.num_labels < 2:
        return []
    with evaluating(unwrap(model)) as model:
        logits = model(pixel_values.to(model.device), interpolate_pos_encoding=True).logits[0]
    probabilities, classes = logits.float().softmax(-1).topk(min(count, len(logits)))
    names = [config.id2label[index] for index in classes.tolist()]
    return [{"label": n, "probability": p} for n, p in zip(names, probabilities.tolist(), strict=True)]


def query_name(patch: tuple[int, int] | None) -> str:
    return "CLS" if patch is None else f"patch ({patch[0]}, {patch[1]})"


def draw_measures(measures: LayerMeasures) -> Image.Image:
    """Coding rates, sparsity and ranks over the layers: mean and spread over images and heads."""

    def lines(**names: str) -> dict[str, torch.Tensor]:
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
        "rank of the attention": ("effective rank", lines(factor_A="factor_rank", map="map_rank")),
    }
    layers = list(range(measures.zeros_after.shape[1]))
    panels = [
        {"title": title, "x": "layer", "y": unit, "positions": layers, "lines": found}
        for title, (unit, found) in titles.items()
        if found
    ]
    return line_panels(panels)


def inspect_attention(
    image: Image.Image, model: PreTrainedModel, pixel_values: torch.Tensor, patch: tuple[int, int] | None
) -> Report:
    """The query's row of the token-to-token map that the model returns as its `attentions`."""
    what = f"row of {query_name(patch)} in {map_formula(model)}"
    exact = "exact" if map_is_exact(model) else "the update is made otherwise"
    maps = attention_maps(model, pixel_values, patch)[:, 0]
    numbers = {"what": what.replace("$", ""), "exact": map_is_exact(model), "picture": "attention.png", "values": maps}
    picture = attention_grid(image, maps, f"attention: {what} ({exact})", patch=patch)
    return Report(numbers, {"attention.png": picture})


def inspect_exact_map(
    image: Image.Image, maps: dict[int, ExactMap], grid: tuple[int, int], patch: tuple[int, int] | None
) -> Report:
    """The query's row of the exact token-to-token map, of the layers that have one."""
    rows = []
    for found in maps.values():
        num_prefix_tokens = found.factor.shape[-1] - grid[0] * grid[1]
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
    """What every representative reads and writes: a picture per layer; where, and over how many patches."""
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
        reads, writes = (values[0, ..., -num_patches:].unflatten(-1, grid) for values in (found.factor, found.writes))
        numbers["reads"].append(describe_maps(reads))
        numbers["writes"].append(describe_maps(writes))
        title = f"layer {layer}: what each representative reads, and where it is written after the contraction"
        pictures[f"representatives-{layer:02d}.png"] = representative_sheet(image, reads, writes, size, title)
    return Report({**numbers, "pictures": list(pictures)}, pictures)


def inspect_measures(model: PreTrainedModel, pixel_values: torch.Tensor) -> Report:
    """Coding rates, sparsity and ranks of every layer."""
    measures = measure_layers(model, [pixel_values])
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
    Look at a model at work on an RGB image; it is not changed. Lists go over layers (those that `layers` names, where
    it does), then heads, then what is looked at. What the attention type does not have is None.

    Args:
        image: the photo.
        model: a CBSA model with any head; classifiers say what they see.
        processor: its image processor.
        long_side: pixels that the longer side is resized to.
        patch: (row, column) of the patch whose attention is shown; CLS when None.
        max_memory: bytes that it may take, by an estimate that is made before.

    Raises:
        ValueError: `patch` lies outside the grid of patches, the model has another library's backbone, or it would
            take too much memory.
    """
    config = unwrap(model).config
    size = fit_to_patches((image.height, image.width), long_side, config.patch_size)
    check_input(model, size, max_memory, share=3)  # all hidden states, and the measures of every layer
    pixel_values = to_pixel_values(image, processor, long_side, config.patch_size)
    grid = patch_grid(model, pixel_values)
    parts = {
        "attention": inspect_attention(image, model, pixel_values, patch),
        "exact_map": None,
        "representatives": None,
        "measures": inspect_measures(model, pixel_values),
    }
    if "cbsa" in config.layer_attention_types:
        maps = {layer: found for layer, found in enumerate(exact_maps(model, pixel_values)) if found is not None}
        size = to_pair(config.representatives_size)
        parts["exact_map"] = inspect_exact_map(image, maps, grid, patch)
        parts["representatives"] = inspect_representatives(image, maps, grid, size)
    numbers = {
        "attention_type": config.attention_type,
        "input": list(pixel_values.shape[2:]),
        "grid": list(grid),
        "query": query_name(patch),
        "predictions": predictions(model, pixel_values),
        **{name: part and part.numbers for name, part in parts.items()},
    }
    pictures = {name: picture for part in parts.values() if part for name, picture in part.pictures.items()}
    return Report(rounded(numbers), pictures)


def save_report(report: Report, folder: Path):
    """Write `report.json` and the pictures to a new or empty folder: all of it, or nothing."""
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        written = Path(partial) / folder.name
        written.mkdir()
        for name, picture in report.pictures.items():
            # 256 colours: a third of the size, and the eye sees no difference.
            palette = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            palette.save(written / name, format="PNG", optimize=True)
        (written / "report.json").write_text(json.dumps(report.numbers, allow_nan=False) + "\n", encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()
        written.rename(folder)
