"""Pictures of what is measured inside a model: representatives over a photo, numbers over the layers."""

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..overlays import overlay_heat, overlay_signed


def render(figure: Figure) -> Image.Image:
    """The figure as an RGB image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def attention_grid(
    image: Image.Image,
    maps: torch.Tensor,
    title: str,
    overlay: Callable[[Image.Image, np.ndarray], Image.Image] = overlay_heat,
    patch: tuple[int, int] | None = None,
    layers: list[int] | None = None,
) -> Image.Image:
    """
    A labelled table of attention maps over the photo: a column per layer, a row per head, and one for their mean.

    Args:
        image: the photo.
        maps: (layers, heads, grid height, grid width).
        title: what the maps show.
        overlay: draws one map, [`overlay_heat`] or, for maps of both signs, [`overlay_signed`].
        patch: (row, column) to frame on the photo: whose maps they are, where they are not those of CLS.
        layers: number of each layer, where not all are shown.
    """
    maps = torch.cat([maps, maps.mean(1, keepdim=True)], dim=1)
    num_layers, num_rows = maps.shape[:2]
    cell_width, cell_height = 1.3, 1.3 * image.height / image.width
    thumbnail = image.copy()
    thumbnail.thumbnail((320, 320))
    figure = Figure(figsize=(0.8 + cell_width * (num_layers + 1), 0.8 + cell_height * num_rows), dpi=100)
    axes = figure.subplots(num_rows, num_layers + 1, squeeze=False)
    for row, name in enumerate([*(f"head {head}" for head in range(num_rows - 1)), "mean"]):
        axes[row, 1].set_ylabel(name, fontsize=11)
        for layer in range(num_layers):
            axes[row, layer + 1].imshow(overlay(thumbnail, maps[layer, row].numpy()))
    for layer in range(num_layers):
        axes[0, layer + 1].set_title(f"layer {layers[layer] if layers else layer}", fontsize=11)
    axes[0, 0].imshow(thumbnail)
    axes[0, 0].set_title("photo", fontsize=11)
    if patch is not None:
        height, width = thumbnail.height / maps.shape[2], thumbnail.width / maps.shape[3]
        corner = (patch[1] * width - 0.5, patch[0] * height - 0.5)  # of the patch, where pixels are counted by centres
        axes[0, 0].add_patch(Rectangle(corner, width, height, fill=False, edgecolor="red", linewidth=1.5))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis in axes[1:, 0]:
        axis.axis("off")
    figure.suptitle(title, fontsize=12)
    figure.tight_layout(pad=0.4)
    return render(figure)


def representative_mosaic(image: Image.Image, maps: torch.Tensor, size: tuple[int, int], signed: bool) -> Image.Image:
    """
    One small overlay per representative, laid out as the representatives are over the photo.

    Args:
        image: the photo.
        maps: (m, grid height, grid width).
        size: rows and columns of representatives, m together.
        signed: whether the maps have both signs.
    """
    thumbnail = image.copy()
    thumbnail.thumbnail((52, 52))
    width, height = thumbnail.size
    mosaic = Image.new("RGB", (size[1] * (width + 2), size[0] * (height + 2)), "white")
    overlay = overlay_signed if signed else overlay_heat
    for index, heat in enumerate(maps.numpy()):
        row, column = divmod(index, size[1])
        mosaic.paste(overlay(thumbnail, heat), (column * (width + 2) + 1, row * (height + 2) + 1))
    return mosaic


def representative_sheet(
    image: Image.Image, reads: torch.Tensor, writes: torch.Tensor, size: tuple[int, int], title: str
) -> Image.Image:
    """
    What every representative of a layer reads and writes: a column per head, reading above writing.

    Args:
        image: the photo.
        reads: (heads, m, grid height, grid width), not negative.
        writes: the same, of both signs.
        size: rows and columns of representatives.
        title: what is shown.
    """
    num_heads = len(reads)
    side = 4.4
    figure = Figure(figsize=(side * num_heads + 0.3, 2 * side * image.height / image.width + 1.1), dpi=100)
    axes = figure.subplots(2, num_heads, squeeze=False)
    for head in range(num_heads):
        axes[0, head].imshow(representative_mosaic(image, reads[head], size, signed=False))
        axes[1, head].imshow(representative_mosaic(image, writes[head], size, signed=True))
        axes[0, head].set_title(f"head {head}", fontsize=11)
    axes[0, 0].set_ylabel("reads: rows of $A$", fontsize=11)
    axes[1, 0].set_ylabel(r"writes: rows of $\kappa S^T A$", fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout(pad=0.6)
    return render(figure)


def plot_spread(axis: Axes, positions: np.ndarray, values: np.ndarray, label: str, **style):
    """A line through the means of (samples, positions), and a band of one standard deviation to either side."""
    mean, std = values.mean(0), values.std(0)
    (line,) = axis.plot(positions, mean, marker="o", markersize=3, label=label, **style)
    axis.fill_between(positions, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)


def line_panels(panels: list[dict], width: float = 4.0, height: float = 3.0) -> Image.Image:
    """
    Line charts side by side.

    Args:
        panels: each with a `title`, labels `x` and `y`, `positions`, and `lines`: name -> (samples, positions); a
            `scale`, "linear" or "log" for both axes, where it is not linear.
        width, height: of one panel, in inches of 100 pixels.
    """
    figure = Figure(figsize=(width * len(panels), height), dpi=100)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, values in panel["lines"].items():
            plot_spread(axis, np.asarray(panel["positions"]), np.asarray(values), label)
        scale = panel.get("scale", "linear")
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"], xscale=scale, yscale=scale)
        if scale == "linear" and all(isinstance(position, int) for position in panel["positions"]):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout(pad=0.6)
    return render(figure)
