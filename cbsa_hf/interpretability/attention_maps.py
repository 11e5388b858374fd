"""
What a trained model attends to: maps over the patches, and what the representatives read and write.

Two token-to-token maps are offered. The map `A^T A` of the paper ([`attention_maps`]) leaves out the contraction, so
it is not what the update is computed with. The product of what the representatives write and read is ([`exact_maps`]).
"""

import warnings
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
    Whether in every layer the update before the output layer is the map in `attentions` times the values. It is not
    for `cbsa`, where the map leaves out the contraction, and for `tssa`, which computes its update without a map.
    """
    return all(operator.map_is_exact for operator in layer_operators(model))


def map_formula(model: PreTrainedModel) -> str:
    """The formula of the token-to-token map, for titles. Where layers differ, all formulas are listed once."""
    return " or ".join(dict.fromkeys(operator.map_formula for operator in layer_operators(model)))


@dataclass
class ExactMap:
    """
    What the attention of one layer does to the tokens, as a linear map once its softmaxes are computed.

    The update before the output layer is `writes^T (reads W + initial)`. The token-to-token map is `writes^T reads`,
    which is `kappa A^T S (P + eta A)` with the contraction S, the pooling matrix P, and the step sizes eta and kappa
    (arXiv 2509.16875, section 3).

    Args:
        representative_attentions: (batch, heads, m, N), A: attention of each representative over the tokens; rows sum
            to 1.
        reads: (batch, heads, m, N), `P + eta A`: how much of each token a representative contains.
        writes: (batch, heads, m, N), `kappa S^T A`: how much of a representative each token receives. kappa includes
            the factor N / N0 of the image's size.
        values: (batch, heads, N, p), the projected tokens W.
        initial: (heads, m, p), learned initial representatives; 0 if they are pooled.
    """

    representative_attentions: torch.Tensor
    reads: torch.Tensor
    writes: torch.Tensor
    values: torch.Tensor
    initial: torch.Tensor

    @property
    def factor(self) -> torch.Tensor:
        """The old name of `representative_attentions`, which the next version removes."""
        warnings.warn("`factor` is now `representative_attentions`.", FutureWarning, stacklevel=2)
        return self.representative_attentions

    def row(self, token: int) -> torch.Tensor:
        """(batch, heads, N), how much one token receives of every token; of both signs. Linear in N."""
        return (self.writes[..., token].unsqueeze(-2) @ self.reads).squeeze(-2)

    def column(self, token: int) -> torch.Tensor:
        """(batch, heads, N), how much one token gives to every token; of both signs. Linear in N."""
        return (self.reads[..., token].unsqueeze(-2) @ self.writes).squeeze(-2)

    def dense(self) -> torch.Tensor:
        """(batch, heads, N, N), the whole map. Quadratic in N."""
        return self.writes.transpose(2, 3) @ self.reads

    def update(self) -> torch.Tensor:
        """(batch, heads, N, p), the update of the tokens before the output layer. Linear in N."""
        return self.writes.transpose(2, 3) @ (self.reads @ self.values + self.initial)


def pooling_matrix(
    pool: PooledRepresentatives, grid: tuple[int, int], num_tokens: int, like: torch.Tensor
) -> torch.Tensor:
    """
    P, (m, N): its product with the tokens is the initial representatives.

    Args:
        pool: the pooling of the representatives.
        grid: (height, width) of the grid of patches.
        num_tokens: N.
        like: gives dtype and device.
    """
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
    What the attention of every layer does, without approximation.

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
