"""Pictures of what is measured inside a model: representatives over a photo, numbers over the layers."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .figures import overlay_heat, overlay_signed, render


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
