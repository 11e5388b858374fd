"""What a trained model attends to."""

import torch
from transformers import PreTrainedModel


def patch_grid(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple[int, int]:
    """(height, width) in patches of the tokens that these pixels become."""
    height, width = (-(-side // model.config.patch_size) for side in pixel_values.shape[-2:])
    return height, width


@torch.inference_mode()
def attention_maps(
    model: PreTrainedModel, pixel_values: torch.Tensor, patch: tuple[int, int] | None = None
) -> torch.Tensor:
    """
    How strongly one token is tied to every patch: its row of `A^T A` in each layer and head.

    Computed from the factor A alone, `a^T A` with a the token's column, so in time linear in the number of tokens.

    Args:
        model: a CBSA model with any head.
        pixel_values: (batch, channels, height, width) of any size.
        patch: (row, column) of the patch to ask; None asks CLS.

    Returns:
        (layers, batch, heads, grid height, grid width), not negative.

    Raises:
        ValueError: `patch` lies outside the grid.
    """
    grid = patch_grid(model, pixel_values)
    if patch is None:
        token = 0
    elif 0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]:
        token = 1 + patch[0] * grid[1] + patch[1]
    else:
        raise ValueError(f"Patch {patch} lies outside the grid of {grid[0]} x {grid[1]} patches.")
    outputs = model(
        pixel_values.to(model.device), interpolate_pos_encoding=True, output_representative_attentions=True
    )
    factors = torch.stack(outputs.representative_attentions)  # (layers, batch, heads, m, tokens)
    rows = factors[..., token].unsqueeze(-2) @ factors
    return rows[..., 0, 1:].unflatten(-1, grid).cpu()
