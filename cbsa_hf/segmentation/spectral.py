"""
Spectral clustering in time linear in the number of tokens.

The affinity of N tokens is `W = A^T A` with a non-negative factor A, (m, N), such as the attention of representatives.
Its degrees are `A^T (A 1)`, and its normalised cut follows from an m x m matrix, so the cost is O(N m^2).
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


MAX_STEPS = 100  # largest number of iterations of k-means
SMALLEST_VALUE = 1e-6  # eigenvalues below this are rounding errors; the largest one is 1
LONGEST_WALK = 1000.0  # steps; where the affinity has several components, random walks are cut off there


class Cut(NamedTuple):
    """
    The normalised cut of an affinity W (Shi, Malik 2000): the solutions y of `W y = value D y`, D the degrees.

    Args:
        degrees: (N,), the row sums of W.
        values: (k,), the positive eigenvalues, in descending order; the first is 1.
        vectors: (N, k), one y in each column, with `y^T D y = 1`; the first is constant if W has one component.
    """

    degrees: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor

    def leading(self, count: int) -> "Cut":
        """
        The cut with only the first vector and the `count` vectors after it, the coarsest structure of the affinity.
        """
        return Cut(self.degrees, self.values[: 1 + count], self.vectors[:, : 1 + count])

    def diffusion_map(self, count: int) -> torch.Tensor:
        """
        Coordinates (N, count) in which the distance of two tokens is how much the random walks from them differ after
        one step (diffusion map; Coifman, Lafon 2006).
        """
        return self.vectors[:, :count] * self.values[:count]


def cut_factored(factor: torch.Tensor) -> Cut:
    """
    The cut of `A^T A` in O(N m^2): with `B = A D^(-1/2)`, the eigenvectors of `B^T B` follow from those of `B B^T`.

    Args:
        factor: A, (m, N), not negative, with degrees above 0.
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
    The cut of an affinity without a known factor, in O(N^3).

    Args:
        affinity: W, (N, N), symmetric and not negative, with degrees above 0.
    """
    degrees = affinity.sum(1)
    scale = degrees.rsqrt()
    values, vectors = torch.linalg.eigh(affinity * scale * scale.unsqueeze(1))
    kept = values > SMALLEST_VALUE
    return Cut(degrees, values[kept].flip(0), vectors[:, kept].flip(1) * scale.unsqueeze(1))


def positions(grid: tuple[int, int]) -> torch.Tensor:
    """
    (N, 2), the position of each patch of a grid, row by row: from -1 to 1 downwards, and from -1 to 1 rightwards.
    """
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
    The factor (m, N) of an affinity between patches, from their features (anchor graphs; Liu, He, Chang 2010).

    m landmarks are pooled from the grid as CBSA pools its representatives. Z, (N, m), is the softmax over the
    landmarks of `cosine / temperature - locality * squared distance`. The affinity is `Z diag(1^T Z)^-1 Z^T`: a random
    walk of two steps, to a landmark and back to a patch. All degrees are 1.

    Args:
        features: (N, d), of the patches row by row.
        grid: (height, width) of the grid of patches.
        size: side of the grid of landmarks, or (height, width).
        temperature: lower values assign a patch to fewer landmarks.
        locality: weight of the squared distance between patch and landmark in the coordinates of [`positions`].
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
    One factor (rows, N) for the factors (..., m, N) of several heads or layers. Its affinity is the mean of theirs,
    each scaled to a mean degree of 1.
    """
    degrees = (factors.sum(-1, keepdim=True) * factors).sum(-2)  # (..., N)
    factors = factors * degrees.mean(-1)[..., None, None].rsqrt()
    return factors.flatten(0, -2) * degrees[..., 0].numel() ** -0.5


def visits(cut: Cut, target: torch.Tensor) -> torch.Tensor:
    """
    How often random walks from each token visit the target, minus the average over all walks: `sum_t (P^t - P^inf)
    target` over t >= 1, with `P = D^-1 W`.

    Args:
        cut: the cut of W.
        target: (N,), 1 for the tokens in the target, 0 for the others.

    Returns:
        (N,), with a mean of 0 when weighted by the degrees. If W has several components, the walks end after about
        `LONGEST_WALK` steps.
    """
    more = target - (cut.degrees * target).sum() / cut.degrees.sum()  # so that P^inf maps it to 0
    steps = cut.values / (1 - cut.values).clamp_min(1 / LONGEST_WALK)
    return cut.vectors @ (steps * (cut.vectors.T @ (cut.degrees * more)))


def k_means(points: torch.Tensor, k: int) -> torch.Tensor:
    """
    K-means clustering without randomness: the first centre is the point farthest from the mean, each next centre the
    point farthest from the centres before.

    Args:
        points: (N, d).
        k: number of clusters; fewer if there are fewer different points.

    Returns:
        (N,), the cluster of each point, from 0.
    """
    centres = points[(points - points.mean(0)).square().sum(1).argmax()].unsqueeze(0)
    while len(centres) < k and (distance := torch.cdist(points, centres).amin(1)).max() > 0:
        centres = torch.cat([centres, points[distance.argmax()].unsqueeze(0)])
    labels = torch.cdist(points, centres).argmin(1)
    for _ in range(MAX_STEPS):
        members = F.one_hot(labels, len(centres)).to(points.dtype)
        counts = members.sum(0).unsqueeze(1)
        centres = torch.where(counts > 0, members.T @ points / counts.clamp_min(1), centres)
        before, labels = labels, torch.cdist(points, centres).argmin(1)
        if torch.equal(before, labels):
            break
    return labels
