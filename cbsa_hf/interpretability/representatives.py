"""What the representatives of a layer do with an image: what they read, how far they move, where they write."""

from dataclasses import dataclass

import torch

from ..segmentation.inference import Encoding, in_single_precision
from .attention_maps import exact_map


@dataclass
class RepresentativeTrace:
    """
    The steps of one layer for one image, as they can be drawn. All tensors are on the CPU.

    Args:
        reads: (heads, m, grid height, grid width), A: how each representative spreads its attention over the patches.
        moved_by_reading: (heads, m), how far extraction moves a representative: `|Q - Q0| / |Q0|`.
        moved_by_contraction: (heads, m), how far the other representatives draw it then: `|C - Q| / |Q|`.
        similarity: (heads, m, m), S: how the representatives attend to one another; rows sum to 1.
        writes: (heads, m, grid height, grid width), `kappa S^T A`: how much of what a representative holds each patch
            is given; signed.
        update: (heads, grid height, grid width), the length of each patch's update before the output layer.
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


def trace_representatives(encoding: Encoding, layer: int) -> RepresentativeTrace | None:
    """
    What the representatives of one layer do with the first image; None if the layer's attention type is not `cbsa`.

    Args:
        encoding: with the steps of that layer.
        layer: counted from 0.
    """
    exact = exact_map(encoding, layer)
    if exact is None:
        return None
    steps, num_prefix_tokens = encoding.steps(layer), encoding.num_prefix_tokens

    def on_grid(values: torch.Tensor) -> torch.Tensor:
        return values[..., num_prefix_tokens:].unflatten(-1, encoding.grid)

    trace = RepresentativeTrace(
        reads=on_grid(steps.attention),
        moved_by_reading=relative_distance(steps.initial_representatives, steps.representatives),
        moved_by_contraction=relative_distance(steps.representatives, steps.contracted),
        similarity=steps.similarity,
        writes=on_grid(exact.writes),
        update=on_grid(exact.update().norm(dim=-1)),
    )
    return RepresentativeTrace(**{name: in_single_precision(value[0]) for name, value in vars(trace).items()})
