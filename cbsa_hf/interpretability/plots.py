"""Plots of what is inside a model: attention and representatives over a photo, measures over the layers."""

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
    """A Matplotlib figure as an RGB image."""
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
    A table of attention maps over the photo, with a column for each layer, a row for each head and a row for the mean.

    Args:
        image: the photo.
        maps: (layers, heads, grid height, grid width).
        title: title of the picture.
        overlay: draws a map: [`overlay_heat`], or [`overlay_signed`] for maps of both signs.
        patch: (row, column) of a patch to frame on the photo; None for none.
        layers: numbers of the layers; by default from 0.
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
        corner = (patch[1] * width - 0.5, patch[0] * height - 0.5)  # pixel centres have whole numbers as coordinates
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
    A small overlay for each representative, in the order of the grid of representatives.

    Args:
        image: the photo.
        maps: (m, grid height, grid width).
        size: (rows, columns) of the grid of representatives; rows * columns is m.
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
    What the representatives of a layer read and write, with a column for each head; reading is above writing.

    Args:
        image: the photo.
        reads: (heads, m, grid height, grid width), not negative.
        writes: of the same shape, with both signs.
        size: (rows, columns) of the grid of representatives.
        title: title of the picture.
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
    """Plot the mean of values (samples, positions) as a line, in a band of one standard deviation on both sides."""
    mean, std = values.mean(0), values.std(0)
    (line,) = axis.plot(positions, mean, marker="o", markersize=3, label=label, **style)
    axis.fill_between(positions, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)


def line_panels(panels: list[dict], width: float = 4.0, height: float = 3.0) -> Image.Image:
    """
    Line charts side by side.

    Args:
        panels: each a dictionary with a `title`, labels `x` and `y` of the axes, `positions`, `lines` (name -> values
            of shape (samples, positions)) and, optionally, `scale`, "linear" or "log", of both axes.
        width, height: of a panel, in inches; an inch has 100 pixels.
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
