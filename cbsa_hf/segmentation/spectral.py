"""
Spectral clustering in time linear in the number of tokens.

The affinity of N tokens is `W = A^T A`, its factor A (m, N) not negative, as attention through representatives gives
it. Its degrees are `A^T (A 1)`, and its normalised cut comes from an m x m Gram matrix: O(N m^2), never N x N.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


SMALLEST_VALUE = 1e-6  # of an eigenvalue, the largest of which is 1; smaller ones are rounding errors
LONGEST_WALK = 1000.0  # steps


class Cut(NamedTuple):
    """
    The normalised cut of an affinity (Shi, Malik 2000): the solutions y of `W y = value D y`, D the degrees.

    Args:
        degrees: (N,), the row sums of W.
        values: (k,), from the largest, which is 1; those that are not above 0 are left out.
        vectors: (N, k), one y in each column, `y^T D y = 1`; the first is constant if W does not fall into parts.
    """

    degrees: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor

    def leading(self, count: int) -> "Cut":
        """With the first vector and `count` more: the coarsest structure of the affinity."""
        return Cut(self.degrees, self.values[: 1 + count], self.vectors[:, : 1 + count])

    def diffusion_map(self, count: int) -> torch.Tensor:
        """
        (N, count), points as far apart as the places that one step of a random walk leads to, by the leading vectors
        (Coifman, Lafon 2006).
        """
        return self.vectors[:, :count] * self.values[:count]


def cut_factored(factor: torch.Tensor) -> Cut:
    """
    The cut of `A^T A`, in O(N m^2): with `B = A D^(-1/2)`, the eigenvectors of `B^T B` come from those of `B B^T`.

    Args:
        factor: A, (m, N), not negative, every degree above 0.
    """
    degrees = factor.T @ factor.sum(1)
    normalised = factor * degrees.rsqrt()
    values, vectors = torch.linalg.eigh(normalised @ normalised.T)
    kept = values > SMALLEST_VALUE
    values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
    vectors = (normalised.T @ vectors) * values.rsqrt()
    return Cut(degrees, values, vectors * degrees.rsqrt().unsqueeze(1))


def cut_dense(affinity: torch.Tensor) -> Cut:
    """
    The cut of an affinity that has no factor, in O(N^3).

    Args:
        affinity: W, (N, N), symmetric and not negative, every degree above 0.
    """
    degrees = affinity.sum(1)
    scale = degrees.rsqrt()
    values, vectors = torch.linalg.eigh(affinity * scale * scale.unsqueeze(1))
    kept = values > SMALLEST_VALUE
    return Cut(degrees, values[kept].flip(0), vectors[:, kept].flip(1) * scale.unsqueeze(1))


def positions(grid: tuple[int, int]) -> torch.Tensor:
    """(N, 2), where each patch of a grid is, from -1 to 1 downwards and to the right, row by row."""
    rows, columns = (2 * (torch.arange(side, dtype=torch.float64) + 0.5) / side - 1 for side in grid)
    return torch.cartesian_prod(rows, columns)


def landmark_factor(
    features: torch.Tensor,
    grid: tuple[int, int],
    size: int | tuple[int, int],
    temperature: float,
    locality: float = 0.0,
) -> torch.Tensor:
    """
    A factor (m, N) for tokens by their features: m landmarks are pooled from the grid, as the representatives of CBSA
    are, and a softmax over the landmarks spreads each token by its cosines to them, and by how near they are.

    With Z (N, m) these shares, the affinity is `Z diag(1^T Z)^-1 Z^T`: two steps of a random walk, to a landmark and
    back to a token (anchor graphs; Liu, He, Chang 2010). Its degrees are all 1.

    Args:
        features: (N, d) of the patches, row by row.
        grid: their (height, width).
        size: of the grid of landmarks: its side, or (height, width).
        temperature: of the softmax; the lower, the fewer landmarks a token follows.
        locality: what is taken from a logit per squared distance to the landmark, see [`positions`].
    """

    def pool(values: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(values.T.unflatten(1, grid), size).flatten(1).T

    cosines = F.normalize(features, dim=1) @ F.normalize(pool(features), dim=1).T
    places = positions(grid).to(features)
    distances = torch.cdist(places, pool(places))
    shares = torch.softmax(cosines / temperature - locality * distances.square(), dim=1)
    return (shares * shares.sum(0).rsqrt()).T


def stack_factors(factors: torch.Tensor) -> torch.Tensor:
    """
    The factors (..., m, N) of several heads or layers as one (rows, N), whose affinity is the mean of theirs, each
    scaled to a mean degree of 1.
    """
    degrees = (factors.sum(-1, keepdim=True) * factors).sum(-2)  # (..., N)
    factors = factors * degrees.mean(-1)[..., None, None].rsqrt()
    return factors.flatten(0, -2) * degrees[..., 0].numel() ** -0.5


def visits(cut: Cut, target: torch.Tensor) -> torch.Tensor:
    """
    How many more visits to the target a random walk pays that starts from a token, compared with walks on average:
    `sum_t (P^t - P^inf) target`, t from 1, with `P = D^-1 W`.

    Args:
        cut: of W.
        target: (N,), 1 for the tokens whose visits count, 0 for the others.

    Returns:
        (N,); the mean, weighed by the degrees, is 0. Where W falls into parts, walks of [`LONGEST_WALK`] steps.
    """
    more = target - (cut.degrees * target).sum() / cut.degrees.sum()  # P^inf of it is 0
    steps = cut.values / (1 - cut.values).clamp_min(1 / LONGEST_WALK)
    return cut.vectors @ (steps * (cut.vectors.T @ (cut.degrees * more)))


def k_means(points: torch.Tensor, k: int, max_steps: int = 100) -> torch.Tensor:
    """
    Clusters of the points (N, d), as labels (N,) from 0; k of them, or as many as there are different points.

    Nothing is random: the first centre is the point farthest from the mean, each next one farthest from those before.
    """
    centres = points[(points - points.mean(0)).square().sum(1).argmax()].unsqueeze(0)
    while len(centres) < k and (distance := torch.cdist(points, centres).amin(1)).max() > 0:
        centres = torch.cat([centres, points[distance.argmax()].unsqueeze(0)])
    labels = torch.cdist(points, centres).argmin(1)
    for _ in range(max_steps):
        members = F.one_hot(labels, len(centres)).to(points.dtype)
        counts = members.sum(0).unsqueeze(1)
        centres = torch.where(counts > 0, members.T @ points / counts.clamp_min(1), centres)
        before, labels = labels, torch.cdist(points, centres).argmin(1)
        if torch.equal(before, labels):
            break
    return labels
