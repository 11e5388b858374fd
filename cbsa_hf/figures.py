"""Pictures of what a model sees: masks and attention maps over photos."""

from collections.abc import Callable

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont


MASK_COLOUR = (255, 64, 96)
ROWS_AT_A_TIME = 256  # of a photo; any number gives the same


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """True where the mask is within so many pixels, down and across; in time proportional to log(radius)."""
    mask = mask.copy()
    for rows in (mask, mask.T):
        reach = 0
        while reach < radius:
            step = min(2 * reach + 1, radius - reach)  # what is reached stays without gaps
            rows[step:] |= rows[:-step]
            rows[:-step] |= rows[step:]
            reach += step
    return mask


def overlay_mask(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The photo with the mask tinted and outlined, the rest darkened; `mask` is (height, width) of the image."""
    blended = np.array(image)
    for first in range(0, image.height, ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        pixels = blended[rows].astype(np.float32)
        tinted = 0.65 * pixels + 0.35 * np.float32(MASK_COLOUR)
        blended[rows] = np.where(mask[rows, :, None], tinted, 0.55 * pixels)
    blended[dilate(mask, max(1, round(max(image.size) / 400))) & ~mask] = 255
    return Image.fromarray(blended)


def class_colours(num_classes: int) -> np.ndarray:
    """A colour for each class, (num_classes, 3) uint8: hues by the golden ratio, neighbours in number far apart."""
    index = np.arange(num_classes)
    hue, saturation, value = (0.6 + index * 0.618034) % 1, (0.9, 0.55, 0.75), (0.95, 1.0, 0.6)
    hsv = np.stack([hue, np.resize(saturation, num_classes), np.resize(value, num_classes)], axis=1)
    return (hsv_to_rgb(hsv) * 255).round().astype(np.uint8)


def class_legend(labels: np.ndarray, names: dict[int, str]) -> list[tuple[int, str]]:
    """The classes in some labels, those with most pixels first: index, and name with the share of the pixels."""
    shares = np.bincount(labels.ravel()) / labels.size
    order = np.argsort(-shares, kind="stable")[: np.count_nonzero(shares)].tolist()
    return [(i, f"{names[i]} {shares[i]:.0%}" if shares[i] >= 0.005 else f"{names[i]} <1%") for i in order]


def add_legend(picture: Image.Image, labels: np.ndarray, names: dict[int, str]) -> Image.Image:
    """The picture above the colours and names of the classes in some labels, an array of any shape."""
    colours = class_colours(len(names))
    size = max(12, round(max(picture.size) / 40))  # of the text and of the fields of colour
    font = ImageFont.load_default(size)
    left, top = size, size // 2
    entries = []
    for index, text in class_legend(labels, names):
        right = left + 3 * size // 2 + round(font.getlength(text))
        if right > picture.width and left > size:
            left, right, top = size, right - left + size, top + 3 * size // 2
        entries.append((left, picture.height + top, index, text))
        left = right + size
    width = max(picture.width, round(max(font.getlength(text) for *_, text in entries)) + 3 * size)
    whole = Image.new("RGB", (width, picture.height + top + 2 * size), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for left, top, index, text in entries:
        draw.rectangle((left, top + size // 8, left + size, top + size + size // 8), tuple(colours[index].tolist()))
        draw.text((left + 3 * size // 2, top), text, "black", font)
    return whole


def overlay_classes(image: Image.Image, labels: np.ndarray, names: dict[int, str]) -> Image.Image:
    """
    The photo tinted and outlined by class, above its legend.

    Args:
        image: the photo, RGB.
        labels: (height, width) of the photo, class indices.
        names: of all classes.
    """
    colours = class_colours(len(names))
    blended = np.array(Image.blend(image, Image.fromarray(colours[labels]), 0.6))
    blended[:, 1:][labels[:, 1:] != labels[:, :-1]] = 255
    blended[1:][labels[1:] != labels[:-1]] = 255
    return add_legend(Image.fromarray(blended), labels, names)


def class_strip(
    predicted: list[np.ndarray], labelled: list[np.ndarray], names: dict[int, str], ignore_index: int
) -> Image.Image:
    """
    A column for each image: the predicted classes above, and below in black where they are wrong, in grey where no
    class is known. Neither photos nor labels are in it, so it may be shown whatever the licence of the data.

    Args:
        predicted: class indices, each (height, width).
        labelled: the true ones, `ignore_index` where none is known.
        names: of all classes.
        ignore_index: see above.
    """
    colours, gap = class_colours(len(names)), 4
    columns = []
    for found, truth in zip(predicted, labelled, strict=True):
        mistakes = np.where(truth == ignore_index, 160, np.where(found == truth, 255, 0))
        column = np.concatenate([colours[found], np.repeat(mistakes[..., None], 3, axis=2).astype(np.uint8)])
        columns.append(np.pad(column, ((0, 0), (0, gap), (0, 0)), constant_values=255))
    height = max(len(column) for column in columns)
    columns = [np.pad(c, ((0, height - len(c)), (0, 0), (0, 0)), constant_values=255) for c in columns]
    classes = np.concatenate([found.ravel() for found in predicted])
    return add_legend(Image.fromarray(np.concatenate(columns, axis=1)), classes, names)


def overlay_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """
    The photo, in grey, under a heat map of any resolution, each value a rectangle: dark for the map's least value,
    bright for the largest hundredth, lest a few outliers darken the rest.
    """
    low, high = heat.min(), np.quantile(heat, 0.99)
    colours = colormaps["inferno"]((heat - low) / max(high - low, np.finfo(np.float32).tiny), bytes=True)[..., :3]
    colours = Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), colours, 0.7)


def overlay_signed(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """As [`overlay_heat`] for values of both signs: red above zero, blue below, white at zero."""
    limit = max(np.quantile(np.abs(heat), 0.99), np.finfo(np.float32).tiny)
    colours = colormaps["RdBu_r"]((heat / limit + 1) / 2, bytes=True)[..., :3]
    colours = Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), colours, 0.7)


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
