"""
What a trained model attends to: maps over the patches, and what the representatives read and write.

Two token-to-token maps are offered. The map `A^T A` of the paper ([`attention_maps`]) leaves out the contraction, so
it is not what the update is computed with. The product of what the representatives write and read is ([`exact_maps`]).
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..attention_cbsa import PooledRepresentatives, adaptive_bins
from ..segmentation.inference import Encoding, encode, in_single_precision, layer_operators, unwrap


def attention_maps(
    model: PreTrainedModel, pixel_values: torch.Tensor, patch: tuple[int, int] | None = None
) -> torch.Tensor:
    """
    How strongly one token is tied to every patch: its row of the token-to-token map in each layer and head.

    Where that map is `A^T A`, the row is computed from A alone, as `a^T A` with a the token's column, in time linear
    in the number of tokens. For other attention types the whole map is computed. [`map_is_exact`] says whether the
    update is computed with this map; for `cbsa` it is not, see [`exact_maps`].

    Args:
        model: a CBSA model with any head, as it is or wrapped by PEFT, `torch.compile` or `DataParallel`.
        pixel_values: (batch, channels, height, width) of any size.
        patch: (row, column) of the patch whose row is returned; None for CLS.

    Returns:
        (layers, batch, heads, grid height, grid width), not negative.

    Raises:
        ValueError: `patch` lies outside the grid, the model has another library's backbone, or its outputs are not
            finite.
    """
    return encode(model, pixel_values, output_attentions=True).attention_maps(patch)


def map_is_exact(model: PreTrainedModel) -> bool:
    """
    Whether the model's `attentions` times the values are its attention updates before the output layer, in every
    layer: not for `cbsa`, where the map leaves out the contraction, nor for `tssa`, whose update uses no map.
    """
    return all(operator.map_is_exact for operator in layer_operators(model))


def map_formula(model: PreTrainedModel) -> str:
    """What the token-to-token map is, for titles; of every attention type once, where layers differ."""
    return " or ".join(dict.fromkeys(operator.map_formula for operator in layer_operators(model)))


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


def exact_map(encoding: Encoding, layer: int) -> ExactMap | None:
    """
    The exact map of one layer, on the CPU; None if the layer's attention type is not `cbsa`.

    Args:
        encoding: with the steps of that layer.
        layer: counted from 0.
    """
    if layer not in encoding.recorded:
        return None
    recorded, steps = encoding.recorded[layer], encoding.steps(layer)
    pool = layer_operators(encoding.encoder)[layer].representatives
    reads, initial = recorded.step_rep * steps.attention, steps.initial_representatives[0]
    if isinstance(pool, PooledRepresentatives):
        reads = reads + pooling_matrix(pool, encoding.grid, steps.tokens.shape[2], steps.tokens)
        initial = torch.zeros_like(initial)
    writes = recorded.kappa * steps.similarity.transpose(2, 3) @ steps.attention
    return ExactMap(*map(in_single_precision, (steps.attention, reads, writes, steps.tokens, initial)))


def exact_maps(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[ExactMap | None]:
    """
    What every layer's attention does, without approximation.

    Args:
        model: a CBSA model with any head, wrapped or not, with attention type `cbsa` in one layer at least.
        pixel_values: (batch, channels, height, width) of any size.

    Returns:
        One [`ExactMap`] per layer, on the CPU, or None where the layer's attention type is another. CLS is token 0;
        [`token_index`] gives the token of a patch.

    Raises:
        ValueError: no layer's attention type is `cbsa`, or the model has another library's backbone.
    """
    operators = layer_operators(model)
    if not any(hasattr(operator, "steps") for operator in operators):
        hint = "`attention_maps` is exact there" if map_is_exact(model) else "its update uses no token-to-token map"
        raise ValueError(
            f"`exact_maps` is for attention type 'cbsa'; this is {unwrap(model).config.attention_type!r}: {hint}."
        )
    layers = range(len(operators))
    encoding = encode(model, pixel_values, steps_of=layers)
    return [exact_map(encoding, layer) for layer in layers]
