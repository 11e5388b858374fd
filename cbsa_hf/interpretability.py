"""
What a trained model attends to: maps over the patches, and what the representatives read and write.

Of the token-to-token views only one is exact: the map `A^T A` that the paper shows ([`attention_maps`]) leaves out the
contraction; the product of what the representatives write and read is the update itself ([`exact_maps`]).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .attention_cbsa import (
    ContractAndBroadcastSelfAttention,
    PooledRepresentatives,
    TokenStatisticsSelfAttention,
    adaptive_bins,
)


def check_outputs(outputs: torch.Tensor):
    """A ValueError when a model's outputs are not finite: no picture and no number is made of them then."""
    if not outputs.isfinite().all():
        raise ValueError(
            "The model's outputs are not finite numbers: its weights are damaged, or overflow in their dtype."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """
    A model in evaluation mode and without gradients; afterwards every module is in the mode that it was in, so that
    batch norm has counted nothing of what was shown.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def watching(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The encoder of a model with any head, [`evaluating`]."""
    with evaluating(model):
        yield model.base_model


def patch_grid(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple[int, int]:
    """(height, width) of the patches of that input; a ValueError when the encoder is not one of this library."""
    backbone = getattr(model.config, "backbone_config", None)
    if backbone is not None:
        raise ValueError(f"This segmenter has a backbone of type {backbone.model_type!r}; only CBSA encoders open up.")
    return model.config.patch_grid(*pixel_values.shape[2:])


def token_index(grid: tuple[int, int], patch: tuple[int, int] | None, num_prefix_tokens: int = 1) -> int:
    """
    Which token (row, column) of the patch grid is, None for CLS; a ValueError outside the grid. The patches stand
    behind CLS and the registers, `num_prefix_tokens` in all.
    """
    if patch is None:
        return 0
    if 0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]:
        return num_prefix_tokens + patch[0] * grid[1] + patch[1]
    raise ValueError(
        f"Patch {tuple(patch)} lies outside the grid of {grid[0]} x {grid[1]} patches; rows and columns count from 0."
    )


def attention_maps(
    model: PreTrainedModel, pixel_values: torch.Tensor, patch: tuple[int, int] | None = None
) -> torch.Tensor:
    """
    How strongly one token is tied to every patch: its row of the token-to-token map in each layer and head.

    Where that map is `A^T A`, the row is computed from the factor alone, `a^T A` with a the token's column: in time
    linear in the number of tokens. For other attention types the whole map is built. [`map_is_exact`] says whether the
    map is what the update is made with; for `cbsa` it is not, see [`exact_maps`].

    Args:
        model: a CBSA model with any head.
        pixel_values: (batch, channels, height, width) of any size.
        patch: (row, column) of the patch to ask; None asks CLS.

    Returns:
        (layers, batch, heads, grid height, grid width), not negative.

    Raises:
        ValueError: `patch` lies outside the grid, the model has another library's backbone, or its outputs are not
            finite.
    """
    grid = patch_grid(model, pixel_values)
    with watching(model) as encoder:
        token = token_index(grid, patch, encoder.num_prefix_tokens)
        is_gram = [layer.attention.map_is_gram for layer in encoder.layers]
        outputs = encoder(
            pixel_values.to(model.device),
            interpolate_pos_encoding=True,
            output_representative_attentions=any(is_gram),
            output_attentions=not all(is_gram),
        )
        rows = []
        for index, from_factor in enumerate(is_gram):
            if from_factor:
                factor = outputs.representative_attentions[index]  # (batch, heads, m, tokens)
                rows.append((factor[..., token].unsqueeze(-2) @ factor).squeeze(-2))
            else:
                rows.append(outputs.attentions[index][:, :, token])
        maps = torch.stack(rows)[..., encoder.num_prefix_tokens :].unflatten(-1, grid).cpu()
    check_outputs(maps)
    return maps


def map_is_exact(model: PreTrainedModel) -> bool:
    """
    Whether the model's `attentions` times the values are its attention updates before the output layer, in every
    layer: not for `cbsa`, where the map leaves out the contraction, nor for `tssa`, whose update uses no map.
    """
    inexact = (ContractAndBroadcastSelfAttention, TokenStatisticsSelfAttention)
    return not any(isinstance(layer.attention, inexact) for layer in model.base_model.layers)


def map_formula(model: PreTrainedModel) -> str:
    """What the token-to-token map is, for titles; of every attention type once, where layers differ."""
    return " or ".join(dict.fromkeys(layer.attention.map_formula for layer in model.base_model.layers))


@dataclass
class ExactMap:
    """
    One layer's attention as it is, with the softmaxes frozen: the update before the output layer is
    `writes^T (reads W + initial)`, and the token-to-token map `writes^T reads` is the `kappa A^T S (P + eta A)` of the
    derivation, S the contraction among the representatives and P the pooling.

    Args:
        factor: (batch, heads, m, N), A: how each representative spreads its attention; rows sum to 1.
        reads: (batch, heads, m, N), `P + eta A`: how much of each token a representative holds in the end.
        writes: (batch, heads, m, N), `kappa S^T A`: how much of what a representative holds each token is given; the
            factor N / N0 of the image's size is in kappa.
        values: (batch, heads, N, p), the projected tokens W.
        initial: (heads, m, p), what learned representatives hold of themselves; 0 where they are pooled.
    """

    factor: torch.Tensor
    reads: torch.Tensor
    writes: torch.Tensor
    values: torch.Tensor
    initial: torch.Tensor

    def row(self, token: int) -> torch.Tensor:
        """What one token is given of every token, (batch, heads, N), signed; linear in N."""
        return (self.writes[..., token].unsqueeze(-2) @ self.reads).squeeze(-2)

    def column(self, token: int) -> torch.Tensor:
        """What one token gives to every token, (batch, heads, N), signed; linear in N."""
        return (self.reads[..., token].unsqueeze(-2) @ self.writes).squeeze(-2)

    def dense(self) -> torch.Tensor:
        """The whole map, (batch, heads, N, N): quadratic in N."""
        return self.writes.transpose(2, 3) @ self.reads

    def update(self) -> torch.Tensor:
        """The update of the tokens before the output layer, (batch, heads, N, p); linear in N."""
        return self.writes.transpose(2, 3) @ (self.reads @ self.values + self.initial)


def pooling_matrix(
    pool: PooledRepresentatives, grid: tuple[int, int], num_tokens: int, like: torch.Tensor
) -> torch.Tensor:
    """The product with this matrix (m, N) makes the initial representatives of the tokens: P."""
    rows, columns = (adaptive_bins(n, m, like) for n, m in zip(grid, pool.size, strict=True))
    matrix = torch.kron(rows, columns)  # (m, patches)
    return F.pad(matrix, (pool.first_token, num_tokens - pool.first_token - matrix.shape[1]))


def exact_map(
    attention: ContractAndBroadcastSelfAttention, hidden_states: torch.Tensor, grid: tuple[int, int]
) -> ExactMap:
    """What the operator does to (batch, N, d), already normalised, as the product of writing and reading."""
    _, _, factor = attention(hidden_states, grid, output_factor=True)
    values = attention.split_heads(attention.proj(hidden_states))
    initial = attention.representatives(values, grid)
    representatives = initial + attention.step_rep * (factor @ values)
    contraction = attention.attend(representatives, representatives)
    reads = attention.step_rep * factor
    if isinstance(attention.representatives, PooledRepresentatives):
        reads = reads + pooling_matrix(attention.representatives, grid, values.shape[2], values)
        initial = torch.zeros_like(initial[0])
    else:
        initial = initial[0]
    writes = attention.step_x * attention.size_factor(grid) * contraction.transpose(2, 3) @ factor
    return ExactMap(factor, reads, writes, values, initial)


def exact_maps(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[ExactMap | None]:
    """
    What every layer's attention does, without approximation.

    Args:
        model: a CBSA model with any head, the attention type of one layer at least `cbsa`.
        pixel_values: (batch, channels, height, width) of any size.

    Returns:
        One [`ExactMap`] per layer, on the CPU, or None where the layer's attention type is another; CLS is token 0,
        patch (row, column) is [`token_index`].

    Raises:
        ValueError: no layer's attention type is `cbsa`.
    """
    if not any(isinstance(layer.attention, ContractAndBroadcastSelfAttention) for layer in model.base_model.layers):
        hint = "`attention_maps` is exact there" if map_is_exact(model) else "its update uses no token-to-token map"
        raise ValueError(
            f"`exact_maps` is for attention type 'cbsa'; this is {model.config.attention_type!r}: {hint}."
        )
    grid = patch_grid(model, pixel_values)
    with watching(model) as encoder:
        outputs = encoder(pixel_values.to(model.device), interpolate_pos_encoding=True, output_hidden_states=True)
        maps = [
            exact_map(layer.attention, layer.layernorm_before(hidden_states), grid)
            if isinstance(layer.attention, ContractAndBroadcastSelfAttention)
            else None
            for layer, hidden_states in zip(encoder.layers, outputs.hidden_states[:-1], strict=True)
        ]
    return [found and ExactMap(*(getattr(found, field.name).cpu() for field in fields(ExactMap))) for found in maps]
