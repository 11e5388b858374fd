"""Optimisers, groups of parameters, schedules and stochastic depth, against values computed by hand."""

import numpy as np
import pytest
import torch

from cbsa_hf import CBSAConfig, CBSAForImageClassification
from cbsa_hf.modeling_cbsa import drop_path
from training.arguments import OPTIMIZERS
from training.engine.optimization import build_optimizer, build_scheduler, parameter_groups


class TestOptimization:
    def test_groups_of_parameters(self, tiny_model):
        groups = parameter_groups(tiny_model, range(3), learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
        found = {
            id(p): (group["lr"], group["weight_decay"], group["use_muon"]) for group in groups for p in group["params"]
        }
        expected = {
            "cbsa.embeddings.position_embeddings": (1 / 16, 0, False),
            "cbsa.embeddings.patch_embeddings.layers.0.weight": (1 / 16, 0.1, True),
            "cbsa.layers.0.attention.proj.weight": (1 / 8, 0.1, True),
            "cbsa.layers.2.attention.step_x": (1 / 2, 0, False),
            "cbsa.layers.2.layernorm_before.weight": (1 / 2, 0, False),
            "cbsa.layers.2.feed_forward.weight": (1 / 2, 0.1, True),
            "cbsa.layernorm.weight": (1, 0, False),
            "classifier.weight": (1, 0.1, False),
            "classifier.bias": (1, 0, False),
        }
        parameters = dict(tiny_model.named_parameters())
        assert {name: found[id(parameters[name])] for name in expected} == expected
        assert len(found) == len(parameters)

    def test_layer_decay_counts_shared_weights_where_they_are_used_last(self):
        config = CBSAConfig(
            hidden_size=24, num_hidden_layers=6, num_unique_layers=2, num_attention_heads=2, image_size=32
        )
        model = CBSAForImageClassification(config)
        groups = parameter_groups(model, config.layer_indices, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
        found = {id(p): group["lr"] for group in groups for p in group["params"]}
        rates = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
        assert rates["cbsa.embeddings.cls_token"] == 1 / 128
        assert rates["cbsa.layers.0.attention.proj.weight"] == 1 / 4  # layer 5 of 6
        assert rates["cbsa.layers.1.attention.proj.weight"] == 1 / 2
        assert rates["classifier.weight"] == 1
        assert len(found) == len(rates)

    def test_lion_steps_have_one_size(self):
        weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
        optimizer = build_optimizer("lion", [{"params": [weight], "weight_decay": 0.0}], 0.1)
        weight.grad = torch.tensor([[3.0, -0.01]])
        optimizer.step()
        assert weight.tolist() == [[pytest.approx(0.9), pytest.approx(-1.9)]]

    def test_muon_moves_every_direction_of_a_matrix_alike(self):
        torch.manual_seed(0)
        weight, bias = torch.nn.Parameter(torch.zeros(6, 4)), torch.nn.Parameter(torch.zeros(4))
        weight.grad, bias.grad = torch.randn(6, 4) @ torch.diag(torch.tensor([9.0, 3.0, 1.0, 0.3])), torch.randn(4)
        gradient = weight.grad.clone()
        groups = [{"params": [weight], "use_muon": True}, {"params": [bias], "use_muon": False}]
        build_optimizer("muon", [{"lr": 0.1, "weight_decay": 0.0, **group} for group in groups], 0.1).step()
        u, expected, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
        expected /= expected.norm()
        for _ in range(5):  # Newton-Schulz steps, in float32 on a CPU
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        moved = -(u.T @ weight.detach().double() @ vh.T) / (0.1 * 0.2 * 6**0.5)
        assert torch.allclose(moved, torch.diag(expected), atol=1e-5)
        assert bias.detach().abs() == pytest.approx(torch.full((4,), 0.1), rel=1e-4)  # AdamW's first step

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize(
        ("name", "middle"), [("cosine", 0.5 * (1 + np.cos(np.pi * 0.5))), ("polynomial", 0.5**0.9)]
    )
    def test_schedule(self, name, middle, optimizer):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": 2.0, "use_muon": True}]
        optimizer = build_optimizer(optimizer, groups, 2.0)
        scheduler = build_scheduler(name, optimizer, num_steps=12, num_warmup_steps=1.5)
        rates = []
        for _ in range(12):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert rates[:3] == pytest.approx([0, 1, 2])
        assert rates[7] == pytest.approx(2 * middle)
        assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-6)


def test_drop_path():
    """Evaluation drops nothing. Training drops updates and scales up the others, so the mean stays."""
    config = CBSAConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, drop_path_rate=0.5)
    model = CBSAForImageClassification(config)
    assert model.base_model.drop_path_rates == [0, 0.25, 0.5]
    updates = torch.ones(4000, 2, 3)
    assert torch.equal(drop_path(updates, 0.5, training=False), updates)
    dropped = drop_path(updates, 0.5, training=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert dropped.mean() == pytest.approx(1, abs=0.1)
