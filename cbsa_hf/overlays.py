"""Pictures of what a model sees: masks and attention maps over photos."""

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
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
