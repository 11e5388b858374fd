"""Draw masks, classes and attention maps over photos."""

from colorsys import hsv_to_rgb
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .segmentation.images import PIXELS_AT_A_TIME, bands, crop_rows


MASK_COLOUR = (255, 64, 96)


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Extends a mask (height, width) by `radius` pixels in each direction, in time proportional to log(radius)."""
    mask = mask.copy()
    for rows in (mask, mask.T):
        reach = 0
        while reach < radius:
            step = min(2 * reach + 1, radius - reach)  # so that no pixels are left out between
            rows[step:] |= rows[:-step]
            rows[:-step] |= rows[step:]
            reach += step
    return mask


def draw_mask(image: Image.Image, mask: np.ndarray):
    """Draw a mask (height, width) on the photo itself: inside it is tinted and outlined, outside it is darkened."""
    radius = max(1, round(max(image.size) / 400))
    levels = np.arange(256, dtype=np.float32)
    tinted = np.concatenate([0.65 * levels + 0.35 * np.float32(channel) for channel in MASK_COLOUR])
    tinted, darkened = tinted.astype(int).tolist(), (0.55 * levels).astype(int).tolist() * 3
    for rows in bands(image.height, image.width):
        band, above = crop_rows(image, rows), min(radius, rows.start)
        inside = mask[rows]
        edge = dilate(mask[rows.start - above : rows.stop + radius], radius)[above : above + len(inside)] & ~inside
        drawn = Image.composite(band.point(tinted), band.point(darkened), Image.fromarray(inside))
        drawn.paste("white", mask=Image.fromarray(edge))
        image.paste(drawn, (0, rows.start))


def overlay_mask(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """A copy of the photo with [`draw_mask`] applied."""
    image = image.copy()
    draw_mask(image, mask)
    return image


def class_colours(num_classes: int) -> np.ndarray:
    """A colour for each class, (num_classes, 3) uint8. Classes with neighbouring numbers get very different hues."""
    saturations, values = (0.9, 0.55, 0.75), (0.95, 1.0, 0.6)
    rgb = [
        hsv_to_rgb((0.6 + index * 0.618034) % 1, saturations[index % 3], values[index % 3])
        for index in range(num_classes)
    ]
    return (np.array(rgb).reshape(-1, 3) * 255).round().astype(np.uint8)


def class_legend(labels: np.ndarray, names: dict[int, str]) -> list[tuple[int, str]]:
    """The classes in labels of any shape, the most frequent first: index, and name with the share of the pixels."""
    flat, counts = labels.reshape(-1), np.zeros(len(names), dtype=np.int64)
    for first in range(0, flat.size, PIXELS_AT_A_TIME):  # which are 64 bits each when they are counted
        counts += np.bincount(flat[first : first + PIXELS_AT_A_TIME], minlength=len(names))
    shares = counts / flat.size
    order = np.argsort(-shares, kind="stable")[: np.count_nonzero(shares)].tolist()
    return [(i, f"{names[i]} {shares[i]:.0%}" if shares[i] >= 0.005 else f"{names[i]} <1%") for i in order]


def draw_legend(picture_size: tuple[int, int], labels: np.ndarray, names: dict[int, str]) -> Image.Image:
    """
    A white picture with a legend below it: colours and names of the classes in some labels.

    Args:
        picture_size: (width, height) of the white part, in pixels, for the caller to fill.
        labels: class indices, an array of any shape.
        names: names of all classes.
    """
    colours, (picture_width, picture_height) = class_colours(len(names)), picture_size
    size = max(12, round(max(picture_size) / 40))  # of the text and of the coloured squares, in pixels
    font = ImageFont.load_default(size)
    left, top = size, size // 2
    entries = []
    for index, text in class_legend(labels, names):
        right = left + 3 * size // 2 + round(font.getlength(text))
        if right > picture_width and left > size:
            left, right, top = size, right - left + size, top + 3 * size // 2
        entries.append((left, picture_height + top, index, text))
        left = right + size
    width = max(picture_width, round(max(font.getlength(text) for *_, text in entries)) + 3 * size)
    whole = Image.new("RGB", (width, picture_height + top + 2 * size), "white")
    draw = ImageDraw.Draw(whole)
    for left, top, index, text in entries:
        draw.rectangle((left, top + size // 8, left + size, top + size + size // 8), tuple(colours[index].tolist()))
        draw.text((left + 3 * size // 2, top), text, "black", font)
    return whole


def overlay_classes(image: Image.Image, labels: np.ndarray, names: dict[int, str]) -> Image.Image:
    """
    The photo tinted and outlined by class, with a legend below it.

    Args:
        image: the photo, RGB.
        labels: (height, width) of the photo, class indices.
        names: names of all classes.
    """
    colours, whole = class_colours(len(names)), draw_legend(image.size, labels, names)
    for rows in bands(image.height, image.width):
        band, above = labels[rows], labels[max(0, rows.start - 1) : rows.stop - 1]
        edge = np.zeros(band.shape, dtype=bool)
        edge[:, 1:] = band[:, 1:] != band[:, :-1]
        first = len(band) - len(above)  # the uppermost row of all has none above it
        edge[first:] |= band[first:] != above
        drawn = Image.blend(crop_rows(image, rows), Image.fromarray(colours[band]), 0.6)
        drawn.paste("white", mask=Image.fromarray(edge))
        whole.paste(drawn, (0, rows.start))
    return whole


def class_strip(
    predicted: list[np.ndarray], labelled: list[np.ndarray], names: dict[int, str], ignore_index: int
) -> Image.Image:
    """
    A picture with a column for each image: above the predicted classes, below black where they are wrong and grey
    where the true class is unknown. It shows neither photos nor labels, so the licence of the data does not restrict
    it.

    Args:
        predicted: class indices, each (height, width).
        labelled: the true classes, `ignore_index` where they are unknown.
        names: names of all classes.
        ignore_index: the label of pixels without a known class.
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
    strip = Image.fromarray(np.concatenate(columns, axis=1))
    whole = draw_legend(strip.size, classes, names)
    whole.paste(strip)
    return whole


@cache
def colour_map(scale: str):
    """A colour map of Matplotlib. It is kept, since Matplotlib computes the colours of every new object again."""
    from matplotlib import colormaps  # imported here, since it takes long and `cbsa segment` does not need it

    return colormaps[scale]


def colour_values(values: np.ndarray, scale: str) -> Image.Image:
    """Values from 0 to 1 in the colours of a colour map of Matplotlib, as a picture."""
    return Image.fromarray(colour_map(scale)(values, bytes=True)[..., :3])


def overlay_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """
    The photo in grey under a heat map of any resolution, in which each value is a rectangle. Colours range from dark
    for the smallest value to bright for the 99th percentile and above, so that a few outliers do not darken the rest.
    """
    low, high = heat.min(), np.quantile(heat, 0.99)
    colours = colour_values((heat - low) / max(high - low, np.finfo(np.float32).tiny), "inferno")
    colours = colours.resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), colours, 0.7)


def overlay_signed(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """[`overlay_heat`] for values of both signs: red above zero, blue below, white at zero."""
    limit = max(np.quantile(np.abs(heat), 0.99), np.finfo(np.float32).tiny)
    colours = colour_values((heat / limit + 1) / 2, "RdBu_r").resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), colours, 0.7)
