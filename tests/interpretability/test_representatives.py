"""The trace of the representatives, against the steps in NumPy, head by head."""

import numpy as np
import pytest
import torch
from conftest import patches_of_bins
from scipy.special import softmax

from cbsa_hf import CBSAForImageClassification
from cbsa_hf.interpretability.representatives import trace_representatives
from cbsa_hf.segmentation.inference import encode


def test_trace_equals_the_steps(tiny_model):
    """The image has 5 x 7 patches, the `image_size` of the model 4 x 6. There are 2 x 3 representatives."""
    pixel_values = torch.randn(1, 3, 40, 56)
    inputs = []
    handle = tiny_model.base_model.layers[1].attention.register_forward_hook(
        lambda module, args, output: inputs.append(args[0])
    )
    with torch.no_grad():
        tiny_model(pixel_values, interpolate_pos_encoding=True)
    handle.remove()
    operator = tiny_model.base_model.layers[1].attention
    trace = trace_representatives(encode(tiny_model, pixel_values, steps_of=[1]), 1)
    for head in range(2):
        weight = operator.proj.weight[12 * head : 12 * head + 12].detach().double().numpy()
        W = inputs[0][0].double().numpy() @ weight.T
        Q0 = np.stack([W[1:][patches].mean(0) for patches in patches_of_bins((5, 7), (2, 3))])
        A = softmax(Q0 @ W.T / 12**0.5, axis=1)
        Q = Q0 + operator.step_rep[head].item() * A @ W
        S = softmax(Q @ Q.T / 12**0.5, axis=1)
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


def test_other_attention_types_have_no_trace(tiny_config):
    tiny_config.attention_type = "mssa"
    model = CBSAForImageClassification(tiny_config).eval()
    encoding = encode(model, torch.randn(1, 3, 32, 48), steps_of=range(3))
    assert trace_representatives(encoding, 0) is None
