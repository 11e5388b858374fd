"""
A page that segments a photo and shows what each layer attends to.

    python demo/app.py --port 7860 --checkpoint FOLDER_OR_HUB_ID
"""

import argparse
import sys
from pathlib import Path

import gradio as gr
import numpy as np
import skimage.data
from PIL import Image

from cbsa_hf import ZeroShotSegmenter, attention_maps, load_checkpoint
from cbsa_hf.overlays import overlay_heat, overlay_mask
from cbsa_hf.segmentation.images import open_image, to_pixel_values


EXAMPLES = ("chelsea", "astronaut", "rocket", "coffee")
MEAN = "mean"

INTRODUCTION = """
# Contract-and-Broadcast Self-Attention
**Drop a photo.** The mask is cut by the patch features and the attention of a small classifier that never saw a mask;
the map shows how strongly each patch is tied to the CLS token, in the layer and head you choose.
"""


class Explorer:
    """A model, and everything that the page shows of it."""

    def __init__(self, checkpoint: str | None):
        self.model, self.processor = load_checkpoint(checkpoint)
        self.segmenter = ZeroShotSegmenter(self.model, self.processor)
        self.num_layers = self.model.config.num_hidden_layers
        self.heads = [MEAN, *(f"head {head}" for head in range(self.model.config.num_attention_heads))]

    def analyse(self, image: Image.Image) -> tuple[Image.Image, np.ndarray]:
        """The overlay of the foreground, and the attention maps (layers, heads, grid height, grid width)."""
        overlay = overlay_mask(image, self.segmenter(image).mask)
        pixel_values = to_pixel_values(image, self.processor, self.segmenter.long_side, self.model.config.patch_size)
        return overlay, attention_maps(self.model, pixel_values)[:, 0].float().numpy()

    def draw(self, image: Image.Image, maps: np.ndarray, layer: int, head: str) -> Image.Image:
        """One layer's and head's map over the photo."""
        heat = maps[layer].mean(0) if head == MEAN else maps[layer, self.heads.index(head) - 1]
        return overlay_heat(image, heat)


def build_page(explorer: Explorer) -> gr.Blocks:
    """The page, its first result already computed."""

    def show_photo(path: str | None, layer: int, head: str):
        if path is None:
            return None, None, None
        try:
            image = open_image(path)
        except ValueError as error:
            # The path is that of Gradio's copy; people know the file by its name.
            raise gr.Error(str(error).replace(path, Path(path).name)) from error
        overlay, maps = explorer.analyse(image)
        return overlay, explorer.draw(image, maps, layer, head), (image, maps)

    def show_map(analysed: tuple[Image.Image, np.ndarray] | None, layer: int, head: str):
        return None if analysed is None else explorer.draw(*analysed, layer, head)

    examples = [Image.fromarray(getattr(skimage.data, name)()) for name in EXAMPLES]
    last_layer = explorer.num_layers - 1
    first_overlay, first_maps = explorer.analyse(examples[0])
    first_map = explorer.draw(examples[0], first_maps, last_layer, MEAN)

    with gr.Blocks(title="CBSA", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        analysed = gr.State((examples[0], first_maps))
        with gr.Row():
            photo = gr.Image(
                examples[0],
                label="Photo",
                sources=["upload", "clipboard"],
                # The file as it is, so that `open_image` alone decides about modes, orientation and damage.
                type="filepath",
                image_mode=None,
                height=360,
                elem_id="photo",
            )
            overlay = gr.Image(first_overlay, label="Foreground", format="png", height=360, elem_id="overlay")
            heat = gr.Image(first_map, label="Attention of CLS", format="png", height=360, elem_id="map")
        with gr.Row():
            with gr.Column(scale=2):
                gr.Examples([[image] for image in examples], inputs=[photo], label="Examples (scikit-image)")
            with gr.Column():
                layer = gr.Slider(0, last_layer, last_layer, step=1, label="Layer", elem_id="layer")
                head = gr.Radio(explorer.heads, value=MEAN, label="Head", elem_id="head")

        photo.change(show_photo, [photo, layer, head], [overlay, heat, analysed], show_progress="minimal")
        for control in (layer, head):
            control.change(show_map, [analysed, layer, head], heat, show_progress="hidden")
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--port", type=int, help="port to serve on; default: the first free one from 7860")
    parser.add_argument("--checkpoint", help="a folder or hub id; default: the checkpoint in the package")
    args = parser.parse_args(argv)
    try:
        page = build_page(Explorer(args.checkpoint))
        page.launch(server_port=args.port, show_error=True)
    except (ValueError, OSError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
