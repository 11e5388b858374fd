"""The attention operators, against plain loops and closed forms in float64."""

import math

import pytest
import torch
from conftest import patches_of_bins
from torch import nn

from cbsa_hf.attention_cbsa import (
    ATTENTIONS,
    ContractAndBroadcastSelfAttention,
    LearnedRepresentatives,
    PooledRepresentatives,
)


def softmax(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [e / sum(exponentials) for e in exponentials]


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def transpose(a: list[list[float]]) -> list[tuple[float, ...]]:
    return list(zip(*a, strict=True))


def matmul(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[dot(row, column) for column in transpose(b)] for row in a]


def softmax_of_rows(scores: list[list[float]], scale: float) -> list[list[float]]:
    return [softmax([scale * score for score in row]) for row in scores]


def one_head(w, grid, size, first, eta, kappa):
    """Steps 1 to 4 for one head with tokens w, lists of floats. Returns the update, and the steps by name."""
    p = len(w[0])
    scale = 1 / math.sqrt(p)
    initial = []
    for patches in patches_of_bins(grid, size):  # 1.
        initial.append([sum(w[first + n][c] for n in patches) / len(patches) for c in range(p)])
    attention = softmax_of_rows(matmul(initial, transpose(w)), scale)  # 2.
    moved = matmul(attention, w)
    q = [[initial[i][c] + eta * moved[i][c] for c in range(p)] for i in range(len(initial))]
    similarity = softmax_of_rows(matmul(q, transpose(q)), scale)  # 3.
    contracted = matmul(similarity, q)
    broadcast = matmul(transpose(attention), contracted)  # 4.
    update = [[kappa * value for value in row] for row in broadcast]
    steps = {
        "tokens": w,
        "initial_representatives": initial,
        "attention": attention,
        "representatives": q,
        "similarity": similarity,
        "contracted": contracted,
    }
    return update, steps


@pytest.mark.parametrize(
    ("grid", "size", "tokens", "first", "head_dim"),
    [
        ((4, 5), (2, 3), 21, 1, 4),  # CLS, uneven overlapping bins
        ((3, 3), (2, 2), 12, 0, 5),  # three tokens after the grid; head_dim is not hidden_size / heads
        ((4, 4), (2, 2), 17, 0, 4),  # the reference's quirk: CLS is pooled, the last patch is not
        ((1, 2), (2, 2), 3, 1, 4),  # fewer patches than representatives
    ],
)
def test_five_steps(grid, size, tokens, first, head_dim):
    torch.manual_seed(0)
    heads, hidden_size = 2, 8
    operator = ContractAndBroadcastSelfAttention(
        hidden_size, heads, head_dim, PooledRepresentatives(size, first)
    ).double()
    nn.init.normal_(operator.step_rep)
    nn.init.normal_(operator.step_x)
    hidden_states = torch.randn(2, tokens, hidden_size, dtype=torch.float64)
    update, token_map, representative_attention = operator(hidden_states, grid, output_attentions=True)
    assert update.shape == hidden_states.shape
    found = vars(operator.steps(hidden_states, grid))

    for b in range(2):
        projected = (hidden_states[b] @ operator.proj.weight.T).tolist()
        outputs = [[] for _ in range(tokens)]
        for h in range(heads):
            w = [row[h * head_dim : (h + 1) * head_dim] for row in projected]
            sizes = operator.step_rep[h].item(), operator.step_x[h].item()
            expected, steps = one_head(w, grid, size, first, *sizes)
            assert list(found) == list(steps)
            for name, step in steps.items():
                torch.testing.assert_close(found[name][b, h], torch.tensor(step, dtype=torch.float64))
            attention = steps["attention"]
            torch.testing.assert_close(representative_attention[b, h], torch.tensor(attention, dtype=torch.float64))
            for n in range(tokens):
                outputs[n] += expected[n]
                for k in range(tokens):
                    shared = sum(row[n] * row[k] for row in attention)
                    assert token_map[b, h, n, k].item() == pytest.approx(shared, abs=1e-12)
        expected = torch.tensor(outputs, dtype=torch.float64) @ operator.out_proj.weight.T + operator.out_proj.bias
        torch.testing.assert_close(update[b], expected)


@pytest.mark.parametrize(("cls", "tolerance"), [(0, 1e-5), (1, 1e-2)])
def test_size_factor_of_a_larger_image(cls, tolerance):
    """If each patch is repeated k x k times, its update stays the same, since N / N0 scales it."""
    torch.manual_seed(0)
    operator = ContractAndBroadcastSelfAttention(12, 2, 6, PooledRepresentatives((2, 4), cls), base_num_patches=128)
    operator = operator.double()
    tokens = torch.randn(1, cls + 128, 12, dtype=torch.float64)
    update = operator(tokens, (8, 16))[0][:, cls:].unflatten(1, (8, 16))
    for k in (2, 3):
        patches = tokens[:, cls:].unflatten(1, (8, 16)).repeat_interleave(k, 1).repeat_interleave(k, 2)
        larger = torch.cat([tokens[:, :cls], patches.flatten(1, 2)], dim=1)
        found = operator(larger, (8 * k, 16 * k))[0][:, cls:].unflatten(1, (8 * k, 16 * k))
        expected = update.repeat_interleave(k, 1).repeat_interleave(k, 2)
        assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_size_factor_counts_class_tokens():
    torch.manual_seed(0)
    operators = [
        ContractAndBroadcastSelfAttention(12, 2, 6, PooledRepresentatives(2, 0), *options).double()
        for options in ((), (16, 3))
    ]
    operators[1].load_state_dict(operators[0].state_dict())
    for grid, factor in {(4, 4): 1, (8, 4): 35 / 19}.items():
        tokens = torch.randn(1, grid[0] * grid[1] + 3, 12, dtype=torch.float64)
        bias = operators[0].out_proj.bias
        plain, scaled = (operator(tokens, grid)[0] - bias for operator in operators)
        torch.testing.assert_close(scaled, factor * plain)


def build(name: str, hidden_size=6, heads=2, head_dim=3, learned=False):
    """An operator in float64 with random weights, and 2 x 2 representatives of the patches after CLS."""
    torch.manual_seed(0)
    representatives = LearnedRepresentatives(heads, 4, head_dim) if learned else PooledRepresentatives((2, 2), 1)
    operator = ATTENTIONS[name](hidden_size, heads, head_dim, representatives)
    for parameter in operator.parameters():
        nn.init.normal_(parameter)
    return operator.double()


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_by_finite_differences(name, learned):
    operator = build(name, learned=learned)
    hidden_states = torch.randn(2, 10, 6, dtype=torch.float64, requires_grad=True)
    parameters = tuple(operator.parameters())

    def function(hidden_states, *parameters):
        named = dict(zip(dict(operator.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(operator, named, (hidden_states, (3, 3)))[0]

    assert torch.autograd.gradcheck(function, (hidden_states, *parameters))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_maps_on_request_do_not_change_the_update(name):
    operator = build(name)
    hidden_states = torch.randn(2, 10, 6, dtype=torch.float64)
    update, nothing, _ = operator(hidden_states, (3, 3))
    again, token_map, attention = operator(
        hidden_states, (3, 3), output_attentions=True, output_representative_attentions=True
    )
    assert nothing is None
    assert token_map.shape == (2, 2, 10, 10)
    torch.testing.assert_close(again, update)
    assert (attention is not None) == operator.has_representative_attentions
    if operator.map_is_gram:
        torch.testing.assert_close(token_map, torch.einsum("bhmn,bhmk->bhnk", attention, attention))
    elif name != "tssa":  # its map is a softmax over heads
        torch.testing.assert_close(token_map.sum(-1), torch.ones(2, 2, 10, dtype=torch.float64))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_permuting_tokens(name):
    """All operators are equivariant to mirroring the grid; those that do not pool, to any permutation."""
    operator = build(name)
    hidden_states = torch.randn(1, 10, 6, dtype=torch.float64)
    mirrored = torch.cat([torch.tensor([0]), 1 + torch.arange(9).reshape(3, 3).flip(1).flatten()])
    shuffled = torch.cat([torch.tensor([0]), 1 + torch.randperm(9)])
    update = operator(hidden_states, (3, 3))[0]
    torch.testing.assert_close(operator(hidden_states[:, mirrored], (3, 3))[0], update[:, mirrored])
    after = operator(hidden_states[:, shuffled], (3, 3))[0]
    assert torch.allclose(after, update[:, shuffled]) != operator.uses_representatives


def test_learned_representatives_are_equivariant_to_permutations():
    operator = build("cbsa", learned=True)
    hidden_states = torch.randn(1, 10, 6, dtype=torch.float64)
    shuffled = torch.randperm(10)
    update = operator(hidden_states, (3, 3))[0]
    torch.testing.assert_close(operator(hidden_states[:, shuffled], (3, 3))[0], update[:, shuffled])


def test_mssa_is_cbsa_in_which_tokens_represent_themselves():
    """Steps 3 and 4 with m = N, A = I, eta = 0, Q0 = W, kappa = 1."""
    operator = build("mssa")
    hidden_states = torch.randn(1, 10, 6, dtype=torch.float64)
    expected = []
    for h in range(2):
        W = hidden_states[0] @ operator.proj.weight[3 * h : 3 * h + 3].T
        Q, A = W + 0 * W, torch.eye(10, dtype=torch.float64)
        C = torch.softmax(Q @ Q.T / 3**0.5, dim=-1) @ Q
        expected.append(1 * A.T @ C)
    expected = torch.cat(expected, dim=-1) @ operator.out_proj.weight.T + operator.out_proj.bias
    torch.testing.assert_close(operator(hidden_states, (3, 3))[0][0], expected)


def test_linear_is_cbsa_without_contraction():
    """Steps 2 and 4 without Q0 and without contraction, with eta = kappa = 1 and A^T = phi(W)."""
    operator = build("linear")
    hidden_states = torch.randn(1, 10, 6, dtype=torch.float64)
    _, token_map, attention = operator(hidden_states, (3, 3), output_attentions=True)
    expected = []
    for h in range(2):
        W = hidden_states[0] @ operator.proj.weight[3 * h : 3 * h + 3].T
        features = torch.where(W > 0, W + 1, W.exp())
        affinity = features @ features.T
        degrees = affinity.sum(1)
        A = (features / degrees[:, None].sqrt()).T
        torch.testing.assert_close(attention[0, h], A)
        torch.testing.assert_close(token_map[0, h], affinity / (degrees[:, None] * degrees[None]).sqrt())
        assert torch.linalg.eigvalsh(token_map[0, h])[-1].item() == pytest.approx(1)
        expected.append(A.T @ (A @ W))
    expected = torch.cat(expected, dim=-1) @ operator.out_proj.weight.T + operator.out_proj.bias
    torch.testing.assert_close(operator(hidden_states, (3, 3))[0][0], expected)


def mita_head(q, k, v, grid, size, num_keys):
    """One head of MiTA with queries, keys and values as lists of floats. Returns the update and the token map."""
    p, n = len(q[0]), len(q)
    landmarks = []
    for patches in patches_of_bins(grid, size):
        landmarks.append([sum(q[1 + i][c] for i in patches) / len(patches) for c in range(p)])
    logits = [[score / math.sqrt(p) for score in row] for row in matmul(landmarks, transpose(k))]
    attention = [softmax(row) for row in logits]
    values = matmul(attention, v)
    selected = [sorted(range(n), key=lambda i, row=row: -row[i])[:num_keys] for row in logits]
    update, token_map = [], []
    for query in q:
        nearest = max(range(len(landmarks)), key=lambda j, query=query: dot(landmarks[j], query))
        chosen = selected[nearest]
        weights = softmax([dot(query, r) / p for r in landmarks] + [dot(query, k[i]) / math.sqrt(p) for i in chosen])
        given = values + [v[i] for i in chosen]
        update.append([sum(a * value[c] for a, value in zip(weights, given, strict=True)) for c in range(p)])
        row = [sum(a * reads[i] for a, reads in zip(weights, attention, strict=False)) for i in range(n)]
        for i, a in zip(chosen, weights[len(landmarks) :], strict=True):
            row[i] += a
        token_map.append(row)
    return update, token_map


@pytest.mark.parametrize(("num_keys", "tile"), [(4, 3), (1, 100), (25, 7)])
def test_mita_by_loops(num_keys, tile):
    torch.manual_seed(0)
    operator = ATTENTIONS["mita"](8, 2, 5, PooledRepresentatives((2, 3), 1)).double()
    assert operator.num_keys == 25
    operator.num_keys, operator.tile = num_keys, tile
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=0.5)
    hidden_states = torch.randn(2, 21, 8, dtype=torch.float64)
    update, _, _ = operator(hidden_states, (4, 5))
    from_map, token_map, _ = operator(hidden_states, (4, 5), output_attentions=True)
    for b in range(2):
        projected = [getattr(operator, f"{name}_proj")(hidden_states[b]) for name in "qkv"]
        expected = []
        for h in range(2):
            q, k, v = (x[:, 5 * h : 5 * h + 5].tolist() for x in projected)
            outputs, rows = mita_head(q, k, v, (4, 5), (2, 3), num_keys)
            expected.append(torch.tensor(outputs, dtype=torch.float64))
            torch.testing.assert_close(token_map[b, h], torch.tensor(rows, dtype=torch.float64))
        expected = torch.cat(expected, dim=1) @ operator.out_proj.weight.T + operator.out_proj.bias
        torch.testing.assert_close(update[b], expected)
        torch.testing.assert_close(from_map[b], expected)


def test_map_only_on_request():
    operator = ContractAndBroadcastSelfAttention(8, 2, 4, PooledRepresentatives(2, 1))
    _, token_map, attention = operator(torch.randn(1, 10, 8), (3, 3))
    assert token_map is None
    assert attention.shape == (1, 2, 4, 10)
