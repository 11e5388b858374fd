"""Normalized cuts in linear time against SciPy's dense solution, random walks against a loop over their steps."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from torch.utils.flop_counter import FlopCounterMode

from cbsa_hf.segmentation.spectral import Cut, cut_dense, cut_factored, k_means, landmark_factor, stack_factors, visits


@pytest.fixture
def factor() -> torch.Tensor:
    """The attention of 6 representatives to 20 tokens, a softmax over the tokens."""
    return (3 * torch.randn(6, 20, dtype=torch.float64, generator=torch.manual_seed(0))).softmax(-1)


def solve(affinity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All solutions of `W y = value D y`, with the largest value first."""
    values, vectors = eigh(affinity, np.diag(affinity.sum(1)))
    return values[::-1], vectors[:, ::-1]


def assert_same_cut(cut: Cut, affinity: np.ndarray, count: int):
    values, vectors = solve(affinity)
    np.testing.assert_allclose(cut.degrees, affinity.sum(1), rtol=1e-10)
    np.testing.assert_allclose(cut.values[:count], values[:count], atol=1e-10)
    agreement = cut.vectors[:, :count].numpy().T @ np.diag(affinity.sum(1)) @ vectors[:, :count]
    np.testing.assert_allclose(np.abs(agreement), np.eye(count), atol=1e-5)  # up to the sign


def test_factored_cut_equals_the_dense_solution(factor):
    affinity = (factor.T @ factor).numpy()
    cut = cut_factored(factor)
    assert cut.vectors.shape == (20, 6)
    assert_same_cut(cut, affinity, 6)
    np.testing.assert_allclose(cut.vectors[:, 0] / cut.vectors[0, 0], np.ones(20), atol=1e-8)


def test_dense_cut(factor):
    affinity = factor.T @ factor + torch.rand(20, 20, dtype=torch.float64, generator=torch.manual_seed(1))
    affinity = affinity + affinity.T
    cut = cut_dense(affinity)
    positive = int((solve(affinity.numpy())[0] > 1e-6).sum())
    assert cut.vectors.shape == (20, positive)
    assert_same_cut(cut, affinity.numpy(), positive)


def test_stacked_factors_are_the_mean_affinity():
    factors = torch.rand(2, 3, 4, 9, dtype=torch.float64, generator=torch.manual_seed(0))
    expected = np.zeros((9, 9))
    for layer in factors.numpy():
        for a in layer:
            expected += a.T @ a / (a.T @ a).sum(1).mean() / 6
    stacked = stack_factors(factors)
    assert stacked.shape == (24, 9)
    np.testing.assert_allclose(stacked.T @ stacked, expected, rtol=1e-10)


@pytest.mark.parametrize("locality", [0.0, 2.0])
def test_landmark_factor(locality):
    """Against a loop over the tokens, on a grid whose bins do not overlap."""
    features = torch.randn(24, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    tokens = features.numpy().reshape(4, 6, 5)
    landmarks = [tokens[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((0, 1)) for i in range(2) for j in range(2)]
    shares = np.zeros((24, 4))
    middles = [(i, j) for i in (-0.5, 0.5) for j in (-0.5, 0.5)]  # centres of the bins; the grid goes from -1 to 1
    for n, token in enumerate(tokens.reshape(24, 5)):
        cosines = [token @ q / np.linalg.norm(token) / np.linalg.norm(q) for q in landmarks]
        place = (n // 6 + 0.5) / 2 - 1, (n % 6 + 0.5) / 3 - 1
        squares = [(place[0] - i) ** 2 + (place[1] - j) ** 2 for i, j in middles]
        shares[n] = np.exp(np.array(cosines) / 0.3 - locality * np.array(squares))
        shares[n] /= shares[n].sum()
    factor = landmark_factor(features, (4, 6), 2, 0.3, locality)
    np.testing.assert_allclose(factor.T @ factor, shares @ np.diag(1 / shares.sum(0)) @ shares.T, rtol=1e-10)
    np.testing.assert_allclose((factor.T @ factor).sum(1), np.ones(24), rtol=1e-10)


def test_diffusion_map(factor):
    """Distances between tokens are those between the distributions of their random walks after one step."""
    affinity = (factor.T @ factor).numpy()
    degrees = affinity.sum(1)
    transition = affinity / degrees[:, None]
    expected = (((transition[:, None] - transition) ** 2) / degrees).sum(2) ** 0.5
    points = cut_factored(factor).diffusion_map(6)
    np.testing.assert_allclose(torch.cdist(points, points), expected, atol=1e-7)


def test_visits_of_random_walks(factor):
    """Against random walks computed step by step."""
    affinity = (factor.T @ factor).numpy()
    transition = affinity / affinity.sum(1, keepdims=True)
    target = np.zeros(20)
    target[[0, 3, 4]] = 1
    probability, total = target, np.zeros(20)
    for _ in range(2000):
        probability = transition @ probability
        total += probability - affinity.sum(1) @ target / affinity.sum()
    np.testing.assert_allclose(visits(cut_factored(factor), torch.from_numpy(target)), total, atol=1e-8)


def test_visits_of_a_graph_in_two_parts():
    factor = torch.zeros(2, 6, dtype=torch.float64)
    factor[0, :3] = factor[1, 3:] = 1
    found = visits(cut_factored(factor), torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    assert found.isfinite().all()
    assert found[:3].min() > 0 > found[3:].max()


def count_operations(num_tokens: int) -> int:
    """Floating-point operations of a cut and of the visits of a walk, without those for eigenvectors."""
    factor = torch.rand(16, num_tokens, dtype=torch.float64, generator=torch.manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        visits(cut_factored(factor).leading(4), torch.ones(num_tokens, dtype=torch.float64))
    return counter.get_total_flops()


def test_cost_is_linear_in_the_tokens():
    counts = [count_operations(num_tokens) for num_tokens in (100, 200, 400)]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
    assert counts[2] < 4.1 * counts[0]
    with FlopCounterMode(display=False) as counter:
        landmark_factor(torch.rand(100, 8), (10, 10), 4, 0.1)
    small = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        landmark_factor(torch.rand(400, 8), (20, 20), 4, 0.1)
    assert counter.get_total_flops() == 4 * small


def test_k_means_separates_clusters():
    generator = torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    truth = torch.arange(60) % 3
    labels = k_means(centres[truth] + 0.3 * torch.randn(60, 2, generator=generator), 3)
    pairs = {(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}
    assert len(pairs) == 3
    assert set(labels.tolist()) == {0, 1, 2}


def test_fewer_points_than_clusters():
    labels = k_means(torch.tensor([[1.0], [1.0], [2.0], [1.0]]), 3)
    assert labels[2] not in labels[[0, 1, 3]]
    assert set(labels.tolist()) == {0, 1}
    assert set(k_means(torch.zeros(4, 2), 3).tolist()) == {0}
    assert set(k_means(torch.zeros(4, 0), 3).tolist()) == {0}
