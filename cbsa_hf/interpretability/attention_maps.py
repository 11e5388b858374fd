"""
What a trained model attends to: maps over the patches, and what the representatives read and write.

Of the token-to-token views only one is exact: the map `A^T A` that the paper shows ([`attention_maps`]) leaves out the
contraction; the product of what the representatives write and read is the update itself ([`exact_maps`]).
"""

from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..attention_cbsa import (
    ContractAndBroadcastSelfAttention,
    PooledRepresentatives,
    SelfAttention,
    TokenStatisticsSelfAttention,
    adaptive_bins,
)
from ..segmentation.inference import (
    eval_encoder,
    in_single_precision,
    observe_operators,
    operator_types,
    patch_grid,
    unwrap,
)


def map_is_exact(model: PreTrainedModel) -> bool:
    """
    Whether the model's `attentions` times the values are its attention updates before the output layer, in every
    layer: not for `cbsa`, where the map leaves out the contraction, nor for `tssa`, whose update uses no map.
    """
    inexact = (ContractAndBroadcastSelfAttention, TokenStatisticsSelfAttention)
    return not any(issubclass(operator, inexact) for operator in operator_types(model))


def map_formula(model: PreTrainedModel) -> str:
    """What the token-to-token map is, for titles; of every attention type once, where layers differ."""
    return " or ".join(dict.fromkeys(operator.map_formula for operator in operator_types(model)))


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
    _, _, factor = attention.forward(hidden_states, grid, output_factor=True)
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
        model: a CBSA model with any head, wrapped or not, the attention type of one layer at least `cbsa`.
        pixel_values: (batch, channels, height, width) of any size.

    Returns:
        One [`ExactMap`] per layer, on the CPU, or None where the layer's attention type is another; CLS is token 0,
        patch (row, column) is [`token_index`].

    Raises:
        ValueError: no layer's attention type is `cbsa`.
    """
    if not any(issubclass(operator, ContractAndBroadcastSelfAttention) for operator in operator_types(model)):
        hint = "`attention_maps` is exact there" if map_is_exact(model) else "its update uses no token-to-token map"
        raise ValueError(
            f"`exact_maps` is for attention type 'cbsa'; this is {unwrap(model).config.attention_type!r}: {hint}."
        )
    patch_grid(model, pixel_values)  # which refuses other libraries' backbones

    def look(operator: SelfAttention, hidden_states: torch.Tensor, grid: tuple[int, int]) -> ExactMap | None:
        if not isinstance(operator, ContractAndBroadcastSelfAttention):
            return None
        found = exact_map(operator, hidden_states, grid)
        return ExactMap(*(in_single_precision(getattr(found, field.name)) for field in fields(ExactMap)))

    with eval_encoder(model) as encoder:
        maps = observe_operators(encoder, look)
        encoder(pixel_values.to(encoder.device), interpolate_pos_encoding=True)
    return maps
