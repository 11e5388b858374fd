"""Arrays to small pictures: perceptually uniform colours, scales with numbers, nothing of the photo mixed in."""

import base64
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from PIL import Image

from cbsa_hf.overlays import dilate


# Viridis for what is never negative; for both signs Moreland's map, uniform too, with light grey at zero.
COLOURS = {False: "viridis", True: "coolwarm"}
LINE_WIDTH = 320  # pixels of a picture for each one to either side of a line
OTHERS = 0.01  # share of the values that may lie beyond the scale, lest a few darken the rest


def palette(name: str) -> bytes:
    """256 colours, red, green and blue of each."""
    return colormaps[name](np.arange(256), bytes=True)[:, :3].tobytes()


PALETTES = {signed: palette(name) for signed, name in COLOURS.items()}


@dataclass(frozen=True)
class Scale:
    """
    Which colour a value has.

    Args:
        low, high: the values at the ends.
        signed: whether the colours are those for both signs, zero in the middle.
        is_open: whether there are values beyond the ends, which have the colours of the ends.
    """

    low: float
    high: float
    signed: bool = False
    is_open: bool = False

    @classmethod
    def of(cls, values: np.ndarray, signed: bool = False) -> "Scale":
        """From zero to all but the largest hundredth of the values' sizes, to both sides if they have signs."""
        sizes = np.abs(values)
        high = float(np.quantile(sizes, 1 - OTHERS)) or float(sizes.max()) or 1.0
        return cls(-high if signed else 0.0, high, signed, bool(sizes.max() > high))

    def gradient(self) -> str:
        """The colours from low to high, for CSS."""
        colours = np.frombuffer(PALETTES[self.signed], np.uint8).reshape(-1, 3)[::15]
        return f"linear-gradient(to right, {', '.join(f'rgb({r} {g} {b})' for r, g, b in colours)})"


def to_uri(image: Image.Image, format: str = "PNG", **options) -> str:
    """The picture as a `data:` URI."""
    file = BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def draw_photo(image: Image.Image) -> str:
    """The photo as a JPEG whose losses cannot be seen."""
    return to_uri(image, "JPEG", quality=90, subsampling=0)


def draw_map(values: np.ndarray, scale: Scale) -> str:
    """A picture with one pixel for each value of (height, width)."""
    share = (values - scale.low) / (scale.high - scale.low)
    image = Image.fromarray((share.clip(0, 1) * 255).round().astype(np.uint8)).convert("P")
    image.putpalette(PALETTES[scale.signed])
    return to_uri(image, optimize=True)


def outline(mask: np.ndarray) -> np.ndarray:
    """The edge of a mask (height, width), as a mask; larger pictures have thicker lines."""
    edges = np.zeros(mask.shape, dtype=bool)
    edges[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edges[1:] |= mask[1:] != mask[:-1]
    return dilate(edges, max(1, max(mask.shape) // LINE_WIDTH))


def draw_outline(mask: np.ndarray) -> str:
    """A mask's outline in white, with nothing else."""
    image = Image.fromarray(outline(mask).astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    return to_uri(image, transparency=0)


def draw_labels(labels: np.ndarray, colours: np.ndarray) -> str:
    """(height, width) of indices in their colours."""
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image.putpalette(colours.tobytes())
    return to_uri(image)


def to_npz(arrays: dict[str, np.ndarray]) -> str:
    """A `data:` URI of a file that `numpy.load` reads."""
    file = BytesIO()
    np.savez_compressed(file, **arrays)
    return f"data:application/octet-stream;base64,{base64.b64encode(file.getvalue()).decode()}"
