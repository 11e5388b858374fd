"""
Scenes with known contents: cut-outs of scikit-image's photos on a texture, with the names, boxes and caption that are
true of them.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageDraw


# Name -> photo of scikit-image, and an ellipse in it: centre (row, column) and half axes in pixels.
CUTOUTS = {
    "face": ("astronaut", (110, 225), (95, 75)),
    "cat": ("chelsea", (145, 225), (115, 130)),
    "cup": ("coffee", (175, 280), (160, 198)),
    "rocket": ("rocket", (190, 322), (190, 60)),
}
NAMES = sorted(CUTOUTS)
TEXTURES = ("brick", "grass", "gravel")


@dataclass
class Scene:
    """
    Args:
        image: RGB, square.
        names: of the objects, one or two.
        boxes: (objects, 4), left, top, right and bottom in pixels.
        caption: which objects there are, and which is left of or above the other.
    """

    image: Image.Image
    names: list[str]
    boxes: np.ndarray
    caption: str


@cache
def cut_out(name: str) -> Image.Image:
    """The object of that name, transparent outside of its ellipse."""
    photo, (row, column), (height, width) = CUTOUTS[name]
    image = Image.fromarray(getattr(skimage.data, photo)()).convert("RGBA")
    box = (column - width, row - height, column + width, row + height)
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    image.putalpha(mask)
    return image.crop(box)


def draw_scene(generator: np.random.Generator, size: int = 96) -> Scene:
    """One object, or two of different names side by side or one above the other."""
    texture = getattr(skimage.data, generator.choice(TEXTURES))()
    row, column = generator.integers(0, np.subtract(texture.shape, size) + 1)
    image = Image.fromarray(texture[row : row + size, column : column + size]).convert("RGB")
    names = [str(name) for name in generator.permutation(NAMES)[: generator.integers(1, 3)]]
    relation = str(generator.choice(["left of", "above"]))
    boxes = []
    for index, name in enumerate(names):
        room = np.array([size, size])  # width and height that the object may lie in
        if len(names) == 2:
            room[0 if relation == "left of" else 1] //= 2
        thing = cut_out(name)
        scale = generator.uniform(0.35, 0.48) * size / max(thing.size)
        thing = thing.resize([round(side * scale) for side in thing.size], Image.Resampling.BILINEAR)
        left, top = generator.integers(0, room - thing.size + 1) + index * (size - room)
        image.paste(thing, (int(left), int(top)), thing)
        boxes.append([left, top, left + thing.width, top + thing.height])
    return Scene(image, names, np.array(boxes), f" {relation} ".join(f"a {name}" for name in names))


def draw_scenes(num_scenes: int, seed: int, size: int = 96) -> list[Scene]:
    """Scenes that depend on the seed alone."""
    generator = np.random.default_rng(seed)
    return [draw_scene(generator, size) for _ in range(num_scenes)]


def to_pixel_values(images: list[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> (batch, 3, height, width), from -1 to 1."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
