"""
Draw the pictures that the README and the page "How CBSA works" show, with the shipped classifier and a photo of
scikit-image.

    python docs/pictures.py
"""

from pathlib import Path

import numpy as np
import skimage.data
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from cbsa_hf import ZeroShotSegmenter, load_checkpoint
from cbsa_hf.interpretability.attention_maps import exact_map
from cbsa_hf.interpretability.plots import render
from cbsa_hf.overlays import overlay_heat, overlay_signed
from cbsa_hf.segmentation.inference import encode


FOLDER = Path(__file__).parent
SIDE = 256  # pixels that the model sees
GRID = (32, 32)  # patches of 8 pixels
SIZE = (8, 8)  # representatives
LAYER, HEAD = 8, 0
REPRESENTATIVES = [(1, 3), (4, 3), (1, 6), (6, 6)]  # row and column of those that are shown


def overlay_segments(photo: Image.Image, labels: np.ndarray) -> Image.Image:
    """The photo tinted by segment, with white lines between them."""
    colours = (colormaps["tab10"](labels)[..., :3] * 255).astype(np.uint8)
    tinted = np.array(Image.blend(photo, Image.fromarray(colours), 0.5))
    tinted[:, 1:][labels[:, 1:] != labels[:, :-1]] = 255
    tinted[1:][labels[1:] != labels[:-1]] = 255
    return Image.fromarray(tinted)


def frame_tile(axis: Axes, photo: Image.Image, row: int, column: int):
    """A white frame around the part of the photo that a representative starts from."""
    height, width = photo.height / SIZE[0], photo.width / SIZE[1]
    axis.add_patch(
        Rectangle((column * width, row * height), width, height, fill=False, edgecolor="white", linewidth=1.5)
    )


def show(axis: Axes, picture: Image.Image | np.ndarray, title: str, **style):
    """Draw a picture without axes, with a title."""
    axis.imshow(picture, **style)
    axis.set_title(title, fontsize=10)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def draw_overview(photo: Image.Image, labels: np.ndarray, map_of_cls: np.ndarray, reads: np.ndarray) -> Image.Image:
    """A photo, its segments, one map, and what four representatives read."""
    figure = Figure(figsize=(10, 2.75), dpi=120)
    left, middle, right, last = figure.add_gridspec(1, 4, wspace=0.04, left=0.005, right=0.995, top=0.9, bottom=0.01)
    show(figure.add_subplot(left), photo, "photo")
    show(figure.add_subplot(middle), overlay_segments(photo, labels), "segments")
    show(figure.add_subplot(right), overlay_heat(photo, map_of_cls), "attention of CLS, last layer")
    axes = last.subgridspec(2, 2, wspace=0.03, hspace=0.03).subplots()
    for axis, (row, column) in zip(axes.flat, REPRESENTATIVES, strict=True):
        show(axis, overlay_heat(photo, reads[row * SIZE[1] + column]), "")
        frame_tile(axis, photo, row, column)
    figure.text(0.875, 0.932, "four of 64 representatives", fontsize=10, ha="center")
    return render(figure)


def draw_steps(photo: Image.Image, found, contraction: np.ndarray) -> Image.Image:
    """The five steps for one representative: where it starts, what it reads, whom it attends to, what it writes."""
    row, column = REPRESENTATIVES[1]
    index = row * SIZE[1] + column
    reads, writes = (
        values[0, HEAD, index, -GRID[0] * GRID[1] :].unflatten(0, GRID).numpy()
        for values in (found.representative_attentions, found.writes)
    )
    figure = Figure(figsize=(10, 2.75), dpi=120)
    axes = figure.subplots(
        1, 4, gridspec_kw={"wspace": 0.04, "left": 0.005, "right": 0.995, "top": 0.9, "bottom": 0.01}
    )
    show(axes[0], photo, "1. start: the mean of a tile")
    frame_tile(axes[0], photo, row, column)
    show(axes[1], overlay_heat(photo, reads), "2. extract: a row of $A$")
    attended = contraction[index].reshape(SIZE)
    show(axes[2], attended, "3. contract: a row of $S$", cmap="inferno")
    axes[2].add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.5))
    show(axes[3], overlay_signed(photo, writes), r"4. broadcast: a row of $\kappa S^\top A$")
    return render(figure)


@torch.inference_mode()
def main():
    """Draw the pictures of the documentation, and write them beside this file."""
    model, processor = load_checkpoint()
    photo = Image.fromarray(skimage.data.astronaut())
    pixel_values = processor(photo, size={"height": SIDE, "width": SIDE}, return_tensors="pt")["pixel_values"]
    encoding = encode(model, pixel_values, output_attentions=True, steps_of=[LAYER])
    found = exact_map(encoding, LAYER)
    contraction = encoding.steps(LAYER).similarity[0, HEAD].numpy()
    map_of_cls = encoding.attention_maps()[-1, 0].mean(0).numpy()
    reads = found.representative_attentions[0, HEAD, :, -GRID[0] * GRID[1] :].unflatten(-1, GRID).numpy()
    labels = ZeroShotSegmenter(model, processor)(photo).labels
    for name, picture in {
        "overview": draw_overview(photo, labels, map_of_cls, reads),
        "steps": draw_steps(photo, found, contraction),
    }.items():
        palette = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
        palette.save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
