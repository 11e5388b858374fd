"""What the representatives of a layer do with an image: what they read, how far they move, where they write."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..attention_cbsa import ContractAndBroadcastSelfAttention, SelfAttention
from ..segmentation.inference import eval_encoder, in_single_precision, observe_operators
from .attention_maps import exact_map


@dataclass
class RepresentativeTrace:
    """
    The steps of one layer for one image, as they can be drawn; all on the CPU.

    Args:
        reads: (heads, m, grid height, grid width), A: how each representative spreads its attention over the patches.
        moved_by_reading: (heads, m), how far extraction moves it: `|Q - Q0| / |Q0|`.
        moved_by_contraction: (heads, m), how far the others draw it then: `|C - Q| / |Q|`.
        similarity: (heads, m, m), S: how the representatives attend to one another; rows sum to 1.
        writes: (heads, m, grid height, grid width), `kappa S^T A`: how much of what it holds each patch is given;
            signed.
        update: (heads, grid height, grid width), the length of what each patch is given in the end, before the output
            layer.
    """

    reads: torch.Tensor
    moved_by_reading: torch.Tensor
    moved_by_contraction: torch.Tensor
    similarity: torch.Tensor
    writes: torch.Tensor
    update: torch.Tensor


def relative_distance(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`|after - before| / |before|` of vectors (..., p) -> (...)."""
    return (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(torch.finfo(before.dtype).tiny)


def trace_layer(
    operator: ContractAndBroadcastSelfAttention, hidden_states: torch.Tensor, grid: tuple[int, int]
) -> RepresentativeTrace:
    """The steps of an operator for the first image of (batch, N, d), already normalised."""
    steps = operator.steps(hidden_states, grid)
    exact = exact_map(operator, hidden_states, grid)
    num_patches = grid[0] * grid[1]  # the patches are the last tokens
    trace = RepresentativeTrace(
        reads=steps.attention[..., -num_patches:].unflatten(-1, grid),
        moved_by_reading=relative_distance(steps.initial_representatives, steps.representatives),
        moved_by_contraction=relative_distance(steps.representatives, steps.contracted),
        similarity=steps.similarity,
        writes=exact.writes[..., -num_patches:].unflatten(-1, grid),
        update=exact.update().norm(dim=-1)[..., -num_patches:].unflatten(-1, grid),
    )
    return RepresentativeTrace(**{name: in_single_precision(value[0]) for name, value in vars(trace).items()})


def trace_representatives(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[RepresentativeTrace | None]:
    """
    What the representatives of every layer do with one image; None where a layer's attention type is not `cbsa`.

    Args:
        model: a CBSA model with any head.
        pixel_values: (1, channels, height, width) of any size.
    """

    def look(operator: SelfAttention, hidden_states: torch.Tensor, grid: tuple[int, int]):
        if not isinstance(operator, ContractAndBroadcastSelfAttention):
            return None
        return trace_layer(operator, hidden_states, grid)

    with eval_encoder(model) as encoder:
        traces = observe_operators(encoder, look)
        encoder(pixel_values.to(encoder.device), interpolate_pos_encoding=True)
    return traces
