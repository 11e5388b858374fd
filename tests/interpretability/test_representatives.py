"""What representatives do, against the steps written out in NumPy for one head after the other."""

import numpy as np
import pytest
import torch

from cbsa_hf import CBSAForImageClassification
from cbsa_hf.interpretability.representatives import trace_representatives
from cbsa_hf.segmentation.inference import encode


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_trace_is_the_steps_written_out(tiny_model):
    """5 x 7 patches, 2 x 3 representatives; the model is made for 4 x 6 patches."""
    pixel_values = torch.randn(1, 3, 40, 56)
    given = []
    handle = tiny_model.base_model.layers[1].attention.register_forward_hook(
        lambda module, args, output: given.append(args[0])
    )
    with torch.no_grad():
        tiny_model(pixel_values, interpolate_pos_encoding=True)
    handle.remove()
    operator = tiny_model.base_model.layers[1].attention
    trace = trace_representatives(encode(tiny_model, pixel_values, steps_of=[1]), 1)
    for head in range(2):
        weight = operator.proj.weight[12 * head : 12 * head + 12].detach().double().numpy()
        W = given[0][0].double().numpy() @ weight.T
        Q0 = np.stack(
            [
                np.mean(
                    [
                        W[1 + y * 7 + x]
                        for y in range(row * 5 // 2, -(-(row + 1) * 5 // 2))
                        for x in range(column * 7 // 3, -(-(column + 1) * 7 // 3))
                    ],
                    axis=0,
                )
                for row in range(2)
                for column in range(3)
            ]
        )
        A = softmax(Q0 @ W.T / 12**0.5)
        Q = Q0 + operator.step_rep[head].item() * A @ W
        S = softmax(Q @ Q.T / 12**0.5)
        C = S @ Q
        kappa = operator.step_x[head].item() * (5 * 7) / (4 * 6)
        expected = {
            "reads": A[:, 1:].reshape(6, 5, 7),
            "moved_by_reading": [np.linalg.norm(q - q0) / np.linalg.norm(q0) for q, q0 in zip(Q, Q0, strict=True)],
            "moved_by_contraction": [np.linalg.norm(c - q) / np.linalg.norm(q) for c, q in zip(C, Q, strict=True)],
            "similarity": S,
            "writes": kappa * (S.T @ A)[:, 1:].reshape(6, 5, 7),
            "update": np.linalg.norm(kappa * A.T @ C, axis=1)[1:].reshape(5, 7),
        }
        for name, values in expected.items():
            found = getattr(trace, name)[head].numpy()
            assert found == pytest.approx(np.array(values), rel=1e-3, abs=1e-6), name


def test_other_members_have_no_trace(tiny_config):
    tiny_config.attention_type = "mssa"
    model = CBSAForImageClassification(tiny_config).eval()
    encoding = encode(model, torch.randn(1, 3, 32, 48), steps_of=range(3))
    assert trace_representatives(encoding, 0) is None
