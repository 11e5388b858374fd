"""The operator against the five steps written as plain loops."""

import math

import pytest
import torch
from torch import nn

from cbsa_hf import ContractAndBroadcastSelfAttention


def softmax(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [e / sum(exponentials) for e in exponentials]


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def one_head(w, grid, size, first, eta, kappa):
    """Steps 1 to 4 for one head: tokens w as lists of floats -> (update, A)."""
    (height, width), (rows, columns), p = grid, size, len(w[0])
    scale = 1 / math.sqrt(p)
    representatives = []
    for i in range(rows):  # 1. bin i of `rows` over `height` covers floor(i h / rows) .. ceil((i + 1) h / rows) - 1
        for j in range(columns):
            members = [
                w[first + y * width + x]
                for y in range(i * height // rows, math.ceil((i + 1) * height / rows))
                for x in range(j * width // columns, math.ceil((j + 1) * width / columns))
            ]
            representatives.append([sum(m[c] for m in members) / len(members) for c in range(p)])
    attention = [softmax([scale * dot(q, token) for token in w]) for q in representatives]  # 2.
    q = [
        [r[c] + eta * sum(a * token[c] for a, token in zip(weights, w, strict=True)) for c in range(p)]
        for r, weights in zip(representatives, attention, strict=True)
    ]
    contracted = []  # 3.
    for query in q:
        weights = softmax([scale * dot(query, key) for key in q])
        contracted.append([sum(a * value[c] for a, value in zip(weights, q, strict=True)) for c in range(p)])
    update = [  # 4.
        [kappa * sum(attention[i][n] * contracted[i][c] for i in range(len(q))) for c in range(p)]
        for n in range(len(w))
    ]
    return update, attention


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
    operator = ContractAndBroadcastSelfAttention(hidden_size, heads, head_dim, size, first).double()
    nn.init.normal_(operator.step_rep)
    nn.init.normal_(operator.step_x)
    hidden_states = torch.randn(2, tokens, hidden_size, dtype=torch.float64)
    update, token_map, factor = operator(hidden_states, grid, output_attentions=True)
    assert update.shape == hidden_states.shape

    for b in range(2):
        projected = (hidden_states[b] @ operator.proj.weight.T).tolist()
        outputs = [[] for _ in range(tokens)]
        for h in range(heads):
            w = [row[h * head_dim : (h + 1) * head_dim] for row in projected]
            steps = operator.step_rep[h].item(), operator.step_x[h].item()
            expected, attention = one_head(w, grid, size, first, *steps)
            torch.testing.assert_close(factor[b, h], torch.tensor(attention, dtype=torch.float64))
            for n in range(tokens):
                outputs[n] += expected[n]
                for k in range(tokens):
                    shared = sum(row[n] * row[k] for row in attention)
                    assert token_map[b, h, n, k].item() == pytest.approx(shared, abs=1e-12)
        expected = torch.tensor(outputs, dtype=torch.float64) @ operator.out_proj.weight.T + operator.out_proj.bias
        torch.testing.assert_close(update[b], expected)


def test_gradients():
    torch.manual_seed(0)
    operator = ContractAndBroadcastSelfAttention(6, 2, 3, (2, 2), 1).double()
    hidden_states = torch.randn(2, 10, 6, dtype=torch.float64, requires_grad=True)
    parameters = tuple(operator.parameters())

    def function(hidden_states, *parameters):
        named = dict(zip(dict(operator.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(operator, named, (hidden_states, (3, 3)))[0]

    assert torch.autograd.gradcheck(function, (hidden_states, *parameters))


def test_map_only_when_asked():
    operator = ContractAndBroadcastSelfAttention(8, 2, 4, 2, 1)
    _, token_map, factor = operator(torch.randn(1, 10, 8), (3, 3))
    assert token_map is None
    assert factor.shape == (1, 2, 4, 10)
