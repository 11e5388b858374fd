"""
The operator on data whose answer is known: points around a union of low-dimensional subspaces, with the true bases as
the heads' projections (section 3 of arXiv 2509.16875 derives it as a step that compresses tokens onto them).
"""

import torch
from torch.nn import functional as F

from ..attention_cbsa import ContractAndBroadcastSelfAttention, PooledRepresentatives


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
    Tokens around subspaces of random orientation, as many around each.

    Args:
        num_subspaces, subspace_dim, ambient_dim: K, p and d.
        num_tokens: N, a multiple of K.
        noise: length of the Gaussian noise on tokens that have length 1 in their subspace (in expectation, squared).
        generator: of everything drawn.
        interleaved: in random order; else subspace after subspace.

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
    """CBSA, one head per basis of (K, p, d): it projects by the basis and back by the same; all steps are 1."""
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
    The tokens (N, d) before and after each of `num_steps` residual steps `z + operator(z)`, (1 + num_steps, N, d).

    Before each step every token is brought to the same length, as the LayerNorm of a layer does: sqrt(d) when not
    given. The longer, the sharper the softmaxes.
    """
    length = tokens.shape[1] ** 0.5 if length is None else length
    states = [length * F.normalize(tokens, dim=1)]
    for _ in range(num_steps):
        update, _, _ = operator(states[-1].unsqueeze(0), grid)
        states.append(length * F.normalize(states[-1] + update[0], dim=1))
    return torch.stack(states)


def distance_to_subspaces(tokens: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """
    Sine of the angle between each token and each subspace: 0 inside, 1 orthogonal to it. Tokens (..., N, d) and bases
    (K, p, d) -> (..., N, K).
    """
    coordinates = torch.einsum("...nd,kpd->...nkp", tokens, bases)
    inside = coordinates.square().sum(-1) / tokens.square().sum(-1, keepdim=True)
    return (1 - inside).clamp_min(0).sqrt()
