"""
Synthetic tokens around a union of low-dimensional subspaces, and the CBSA operator that has the true bases of the
subspaces as its projections. Section 3 of arXiv 2509.16875 derives the operator as a step that compresses tokens onto
such subspaces.
"""

import torch
from torch.nn import functional as F

from cbsa_hf.attention_cbsa import ContractAndBroadcastSelfAttention, PooledRepresentatives


def draw_union_of_subspaces(
    num_subspaces: int,
    subspace_dim: int,
    ambient_dim: int,
    num_tokens: int,
    noise: float,
    generator: torch.Generator,
    interleaved: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Draw tokens around subspaces of random orientation, the same number around each.

    Args:
        num_subspaces, subspace_dim, ambient_dim: K, p and d.
        num_tokens: N, a multiple of K.
        noise: root mean square length of the Gaussian noise; tokens have length 1 without it.
        generator: generator of all random numbers.
        interleaved: whether tokens are in random order, or subspace after subspace.

    Returns:
        Tokens (N, d), orthonormal bases (K, p, d) as rows, and each token's subspace (N,); float64.
    """
    options = {"generator": generator, "dtype": torch.float64}
    directions = torch.randn(num_subspaces, ambient_dim, subspace_dim, **options)
    bases = torch.linalg.qr(directions).Q.transpose(1, 2)
    labels = torch.arange(num_subspaces).repeat_interleave(num_tokens // num_subspaces)
    if interleaved:
        labels = labels[torch.randperm(len(labels), generator=generator)]
    coordinates = torch.randn(len(labels), 1, subspace_dim, **options)
    tokens = (coordinates / coordinates.norm(dim=-1, keepdim=True) @ bases[labels]).squeeze(1)
    return tokens + noise * ambient_dim**-0.5 * torch.randn(tokens.shape, **options), bases, labels


def operator_of_bases(bases: torch.Tensor, representatives_size: int) -> ContractAndBroadcastSelfAttention:
    """
    The CBSA operator with one head for each basis. The basis is the head's projection, and its transpose is the head's
    part of the output layer. All step sizes are 1.

    Args:
        bases: (K, p, d), orthonormal rows.
        representatives_size: side of the grid of representatives.
    """
    num_heads, head_dim, ambient_dim = bases.shape
    pool = PooledRepresentatives(representatives_size, first_token=0)
    operator = ContractAndBroadcastSelfAttention(ambient_dim, num_heads, head_dim, pool).to(bases.dtype)
    with torch.no_grad():
        operator.proj.weight.copy_(bases.flatten(0, 1))
        operator.out_proj.weight.copy_(bases.flatten(0, 1).T)
        operator.out_proj.bias.zero_()
    return operator.requires_grad_(False)


def iterate_operator(
    operator: ContractAndBroadcastSelfAttention,
    tokens: torch.Tensor,
    grid: tuple[int, int],
    num_steps: int,
    length: float | None = None,
) -> torch.Tensor:
    """
    Iterate residual steps `z + operator(z)`. Before each step all tokens are scaled to the same length, as the
    LayerNorm of a layer does.

    Args:
        operator: the operator.
        tokens: (N, d).
        grid: (height, width) of the grid of patches, N together.
        num_steps: number of steps.
        length: length of the tokens, sqrt(d) by default. Longer tokens make the softmaxes sharper.

    Returns:
        (1 + num_steps, N, d), the scaled tokens before the first step and after each step.
    """
    length = tokens.shape[1] ** 0.5 if length is None else length
    states = [length * F.normalize(tokens, dim=1)]
    for _ in range(num_steps):
        update, _, _ = operator(states[-1].unsqueeze(0), grid)
        states.append(length * F.normalize(states[-1] + update[0], dim=1))
    return torch.stack(states)


def distance_to_subspaces(tokens: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """
    Sine of the angle between each token and each subspace: 0 for tokens inside it, 1 for tokens orthogonal to it.
    Tokens (..., N, d) and orthonormal bases (K, p, d) -> (..., N, K).
    """
    coordinates = torch.einsum("...nd,kpd->...nkp", tokens, bases)
    inside = coordinates.square().sum(-1) / tokens.square().sum(-1, keepdim=True)
    return (1 - inside).clamp_min(0).sqrt()
