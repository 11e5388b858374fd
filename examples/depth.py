"""
Depth: DPT of Transformers on a CBSA backbone learns the disparity of 16 crops of scikit-image's stereo photo.

    python examples/depth.py
    python examples/depth.py --encoder vit
    python examples/depth.py --cost
"""

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import DPTConfig, DPTForDepthEstimation

from examples.encoders import ENCODERS, SIZES, compare_cost, encoder_config, parse_options, train
from examples.scenes import to_pixel_values


NUM_STEPS = 200
MAX_DISPARITY = 60.0  # of the photo, in pixels


def build_model(encoder: str) -> DPTForDepthEstimation:
    """DPT with a small neck; it takes the tokens of all four layers, CLS among them."""
    backbone = encoder_config(encoder, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    config = DPTConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[32] * 4,
        fusion_hidden_size=32,
        reassemble_factors=[4, 2, 1, 0.5],
    )
    return DPTForDepthEstimation(config)


def draw_crops(num_crops: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Crops of the left photo, (crops, 3, height, width), and their disparity from 0 to 1, (crops, height, width). It is
    NaN where it was not measured.
    """
    photo, _, disparity = skimage.data.stereo_motorcycle()
    generator, side = np.random.default_rng(seed), SIZES["image_size"]
    crops = []
    for row, column in generator.integers(0, np.subtract(disparity.shape, 2 * side) + 1, (num_crops, 2)):
        window = np.s_[row : row + 2 * side, column : column + 2 * side]
        image = Image.fromarray(photo[window]).resize((side, side))
        crops.append((image, disparity[window][::2, ::2] / MAX_DISPARITY))
    images, disparities = zip(*crops, strict=True)
    disparities = torch.from_numpy(np.stack(disparities))
    return to_pixel_values(list(images)), disparities.masked_fill(~disparities.isfinite(), torch.nan)


def error(model: DPTForDepthEstimation, pixel_values: torch.Tensor, disparities: torch.Tensor) -> torch.Tensor:
    """Mean absolute error where disparity was measured."""
    found = model(pixel_values).predicted_depth.unsqueeze(1)
    found = F.interpolate(found, size=disparities.shape[1:], mode="bilinear", align_corners=False).squeeze(1)
    return (found - disparities)[disparities.isfinite()].abs().mean()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and score, or compare costs; returns the numbers."""
    args = parse_options(__doc__, NUM_STEPS, argv)
    pixel_values, disparities = draw_crops(args.num_images, args.seed)
    torch.manual_seed(args.seed)
    if args.cost:
        models = {name: build_model(name).train() for name in ENCODERS}
        steps = {n: lambda m=m: error(m, pixel_values, disparities).backward() for n, m in models.items()}
        result = {"training step, CBSA / ViT": compare_cost(steps)}
        with torch.no_grad():
            steps = {n: lambda m=m: m.eval()(pixel_values) for n, m in models.items()}
            result["inference, CBSA / ViT"] = compare_cost(steps)
    else:
        model = build_model(args.encoder)
        train(model, lambda: error(model, pixel_values, disparities), args.num_steps, learning_rate=1e-3)
        measured = disparities[disparities.isfinite()]
        with torch.no_grad():
            result = {
                "mean absolute error": error(model, pixel_values, disparities).item(),
                "the same of the median": (measured - measured.median()).abs().mean().item(),
            }
    for name, value in result.items():
        print(f"{name}: {value:.3f}")
    return result


if __name__ == "__main__":
    main()
