"""What a trained model attends to."""

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def attention_maps(
    model: PreTrainedModel, pixel_values: torch.Tensor, patch: tuple[int, int] | None = None
) -> torch.Tensor:
    """
    How strongly one token is tied to every patch: its row of the token-to-token map in each layer and head.

    Where that map is `A^T A`, the row is computed from the factor alone, `a^T A` with a the token's column: in time
    linear in the number of tokens. For other attention types the whole map is built.

    Args:
        model: a CBSA model with any head.
        pixel_values: (batch, channels, height, width) of any size.
        patch: (row, column) of the patch to ask; None asks CLS.

    Returns:
        (layers, batch, heads, grid height, grid width), not negative.

    Raises:
        ValueError: `patch` lies outside the grid.
    """
    encoder = model.base_model
    grid = encoder.embeddings.patch_embeddings.grid(*pixel_values.shape[2:])
    if patch is None:
        token = 0
    elif 0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]:
        token = 1 + patch[0] * grid[1] + patch[1]
    else:
        raise ValueError(f"Patch {patch} lies outside the grid of {grid[0]} x {grid[1]} patches.")
    pixel_values = pixel_values.to(model.device)
    if encoder.layers[0].attention.map_is_gram:
        outputs = encoder(pixel_values, interpolate_pos_encoding=True, output_representative_attentions=True)
        factors = torch.stack(outputs.representative_attentions)  # (layers, batch, heads, m, tokens)
        rows = (factors[..., token].unsqueeze(-2) @ factors).squeeze(-2)
    else:
        outputs = encoder(pixel_values, interpolate_pos_encoding=True, output_attentions=True)
        rows = torch.stack([token_map[:, :, token] for token_map in outputs.attentions])
    return rows[..., 1:].unflatten(-1, grid).cpu()
