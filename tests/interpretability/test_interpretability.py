"""Maps, measures and reports, against closed forms, dense matrices, and updates of the model itself."""

import itertools
import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import patches_of_bins

from benchmarks.synthetic import (
    distance_to_subspaces,
    draw_union_of_subspaces,
    iterate_operator,
    operator_of_bases,
)
from cbsa_hf import CBSAConfig, CBSAForImageClassification
from cbsa_hf.attention_cbsa import ATTENTIONS
from cbsa_hf.interpretability.attention_maps import attention_maps, exact_maps, map_is_exact
from cbsa_hf.interpretability.measures import (
    accuracy_under_noise,
    coding_rate,
    effective_rank,
    hoyer_sparsity,
    measure_layers,
    noisy_projections,
)
from cbsa_hf.interpretability.report import inspect_photo, save_report
from cbsa_hf.segmentation.inference import token_index


def attention_steps(model, pixel_values):
    """The operator of every layer, its input, and its update, recorded with hooks."""
    steps, handles = [], []
    for layer in model.base_model.layers:

        def watch(module, args, output):
            steps.append((module, args[0], output[0]))

        handles.append(layer.attention.register_forward_hook(watch))
    with torch.no_grad():
        model(pixel_values, interpolate_pos_encoding=True)
    for handle in handles:
        handle.remove()
    return steps


@pytest.fixture
def make_model(tiny_config):
    """A function that builds the tiny model with other configuration values and random step sizes."""

    def build(**values):
        torch.manual_seed(0)
        config = CBSAConfig(**{**tiny_config.to_diff_dict(), **values, "auto_map": None})
        model = CBSAForImageClassification(config).eval()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith(("step_rep", "step_x", "temp")):
                    tensor.uniform_(0.5, 2)
                elif name.endswith(("bias", "position_embeddings", "cls_token")):
                    tensor.normal_()
        return model

    return build


@pytest.mark.parametrize(
    "values", [{}, {"pooled_tokens": "all_but_last"}, {"representatives_type": "learned"}, {"representatives_size": 3}]
)
def test_exact_map_reproduces_the_update(make_model, values):
    model = make_model(**values)
    pixel_values = torch.randn(2, 3, 40, 56)  # another grid than the trained one: 5 x 7
    for (operator, _, update), found in zip(
        attention_steps(model, pixel_values), exact_maps(model, pixel_values), strict=True
    ):
        tolerance = {"rtol": 0, "atol": 1e-5 * update.abs().max().item()}
        torch.testing.assert_close(operator.merge_heads(found.update()), update, **tolerance)
        constant = found.writes.transpose(2, 3) @ found.initial
        before_output = found.dense() @ found.values + constant
        torch.testing.assert_close(operator.merge_heads(before_output), update, **tolerance)
        assert (constant != 0).any() == (values.get("representatives_type") == "learned")
        for token in (0, 17, 35):
            torch.testing.assert_close(found.row(token), found.dense()[:, :, token])
            torch.testing.assert_close(found.column(token), found.dense()[..., token])


def test_exact_map_equals_its_formula(tiny_model):
    """`kappa A^T S (P + eta A)`, with the pooling matrix P written out bin by bin."""
    pixel_values = torch.randn(1, 3, 40, 56)
    attentions = tiny_model(
        pixel_values, interpolate_pos_encoding=True, output_representative_attentions=True
    ).representative_attentions
    pooling = torch.zeros(6, 36)
    for index, patches in enumerate(patches_of_bins((5, 7), (2, 3))):
        pooling[index, 1 + torch.tensor(patches)] = 1 / len(patches)
    maps = exact_maps(tiny_model, pixel_values)
    for (operator, inputs, _), attention, found in zip(
        attention_steps(tiny_model, pixel_values), attentions, maps, strict=True
    ):
        for head in range(2):
            A, W = attention[0, head], inputs[0] @ operator.proj.weight[12 * head : 12 * head + 12].T
            eta, kappa = operator.step_rep[head].item(), operator.step_x[head].item()
            Q = pooling @ W + eta * A @ W
            S = torch.softmax(Q @ Q.T / 12**0.5, dim=-1)
            size_factor = 5 * 7 / (4 * 6)  # patches, over those at `image_size`
            torch.testing.assert_close(found.dense()[0, head], kappa * size_factor * A.T @ S @ (pooling + eta * A))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_which_maps_are_exact(make_model, name):
    model = make_model(attention_type=name)
    pixel_values = torch.randn(1, 3, 32, 48)
    outputs = model(pixel_values, output_attentions=True)
    exact = True
    for (operator, inputs, update), token_map in zip(
        attention_steps(model, pixel_values), outputs.attentions, strict=True
    ):
        values = operator.v_proj(inputs) if hasattr(operator, "v_proj") else operator.proj(inputs)
        product = operator.merge_heads(token_map @ operator.split_heads(values))
        exact &= torch.allclose(product, update, atol=1e-5 * update.abs().max().item())
    assert map_is_exact(model) == exact
    if name == "cbsa":
        exact_maps(model, pixel_values)
    else:
        with pytest.raises(ValueError, match=f"is for attention type 'cbsa'; this is '{name}'"):
            exact_maps(model, pixel_values)


def test_layers_of_several_attention_types(make_model, shipped, photo):
    """Every output has one entry per layer. A value that a layer lacks is None, or NaN among numbers."""
    types = ["mssa", "cbsa", "agent"]
    model = make_model(attention_type=types, num_register_tokens=2)
    pixel_values = torch.randn(2, 3, 40, 56)
    assert [type(layer.attention) for layer in model.cbsa.layers] == [ATTENTIONS[name] for name in types]
    for return_dict in (True, False):
        outputs = model.cbsa(
            pixel_values,
            interpolate_pos_encoding=True,
            output_attentions=True,
            output_representative_attentions=True,
            return_dict=return_dict,
        )
        token_maps, attentions = outputs[-2:] if not return_dict else (outputs.attentions, outputs[-1])
        assert [token_map.shape for token_map in token_maps] == [(2, 2, 38, 38)] * 3
        assert [None if found is None else found.shape for found in attentions] == [None, *[(2, 2, 6, 38)] * 2]
    rows = torch.stack([token_map[:, :, 3 + 2 * 7 + 4] for token_map in token_maps])
    torch.testing.assert_close(
        attention_maps(model, pixel_values, patch=(2, 4)), rows[..., 3:].unflatten(-1, (5, 7)).detach()
    )
    assert not map_is_exact(model)
    nothing, found, missing = exact_maps(model, pixel_values)
    assert nothing is None
    assert missing is None
    operator, _, update = attention_steps(model, pixel_values)[1]
    torch.testing.assert_close(operator.merge_heads(found.update()), update)
    measures = measure_layers(model, [pixel_values])
    assert measures.coding_rate_before.isnan().any(2).any(0).tolist() == [False, False, True]
    assert measures.representative_attention_rank.isnan().any(2).any(0).tolist() == [True, False, False]
    assert measures.summary()["representative_attention_rank"]["mean"][0] is None
    report = inspect_photo(photo, model, shipped[1], long_side=64)
    assert report.numbers["exact_map"]["layers"] == report.numbers["representatives"]["layers"] == [1]
    json.dumps(report.numbers, allow_nan=False)


@pytest.mark.parametrize(("patch", "token"), [(None, 0), ((2, 3), 1 + 2 * 5 + 3)])
def test_maps_are_rows_of_the_token_map(tiny_model, patch, token):
    pixel_values = torch.randn(2, 3, 32, 40)
    maps = attention_maps(tiny_model, pixel_values, patch)
    dense = tiny_model(pixel_values, interpolate_pos_encoding=True, output_attentions=True).attentions
    assert maps.shape == (3, 2, 2, 4, 5)
    for layer in range(3):
        torch.testing.assert_close(maps[layer].flatten(2), dense[layer][:, :, token, 1:])


def test_patch_outside_the_grid_raises(tiny_model):
    with pytest.raises(ValueError, match=r"outside the grid of 4 x 6"):
        attention_maps(tiny_model, torch.randn(1, 3, 32, 48), (4, 0))


def test_token_index():
    assert [token_index((4, 5), patch) for patch in (None, (0, 0), (3, 4))] == [0, 1, 20]
    for patch in ((4, 0), (0, 5), (-1, 0)):
        with pytest.raises(ValueError, match="outside the grid of 4 x 5 patches"):
            token_index((4, 5), patch)


@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_coding_rate(eps):
    random = np.random.default_rng(0)
    for n, p in ((20, 5), (4, 9)):
        X = random.normal(size=(n, p))
        expected = np.linalg.slogdet(np.eye(p) + p / (n * eps**2) * X.T @ X)[1] / 2
        assert coding_rate(torch.from_numpy(X), eps).item() == pytest.approx(expected, rel=1e-12)
        values = np.linalg.svd(X, compute_uv=False)
        assert expected == pytest.approx(0.5 * np.log1p(p / (n * eps**2) * values**2).sum(), rel=1e-12)


def test_effective_rank():
    random = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(9, 9, generator=random)).Q for _ in range(2))
    for k in (1, 3, 9):  # k equal singular values
        assert effective_rank(2.5 * left[:, :k] @ right[:, :k].T).item() == pytest.approx(k, rel=1e-5)
    matrix = left[:, :2] @ torch.diag(torch.tensor([3.0, 1.0])) @ right[:, :2].T
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert effective_rank(matrix).item() == pytest.approx(np.exp(entropy), rel=1e-5)


def test_hoyer_sparsity():
    tokens = torch.tensor([[1.0, 1, 1, 1], [0, 0, 5, 0], [0, 0, 0, 0]])
    assert hoyer_sparsity(tokens[:1]).item() == pytest.approx(0)
    assert hoyer_sparsity(tokens[1:2]).item() == pytest.approx(1)
    assert torch.isfinite(hoyer_sparsity(tokens))


def test_measures_of_a_layer(tiny_model):
    """Every number of one image and one layer, computed by hand."""
    images = torch.randn(3, 3, 32, 48)
    measures = measure_layers(tiny_model, images.split(2), eps=0.3)
    outputs = tiny_model(images, output_hidden_states=True, output_attentions=True)
    layer = tiny_model.cbsa.layers[1]
    (_, _, update) = attention_steps(tiny_model, images)[1]
    before, after = outputs.hidden_states[1], outputs.hidden_states[1] + update
    norm = layer.layernorm_before

    def rate(tokens):
        W = (tokens[2] @ layer.attention.proj.weight[12:].T).double().detach().numpy()
        return np.linalg.slogdet(np.eye(12) + 12 / (len(W) * 0.3**2) * W.T @ W)[1] / 2

    for name, tokens in {
        "coding_rate_before": before,
        "coding_rate_after": after,
        "normalised_coding_rate_before": norm(before),
        "normalised_coding_rate_after": norm(after),
    }.items():
        assert getattr(measures, name).shape == (3, 3, 2)
        assert getattr(measures, name)[2, 1, 1].item() == pytest.approx(rate(tokens), rel=1e-5)
    code = outputs.hidden_states[2][2]
    assert measures.zeros_after[2, 1].item() == pytest.approx((code == 0).double().mean().item())
    assert 0.2 < measures.zeros_after[2, 1] < 0.9
    assert (measures.zeros_before == 0).all()
    code_input = layer.layernorm_after(after)[2]
    n = code.shape[1] ** 0.5
    for name, tokens in (("sparsity_before", code_input), ("sparsity_after", code)):
        expected = ((n - tokens.abs().sum(1) / tokens.square().sum(1).sqrt()) / (n - 1)).mean()
        assert getattr(measures, name)[2, 1].item() == pytest.approx(expected.item(), rel=1e-5)
    assert measures.map_rank[2, 1, 1].item() == pytest.approx(
        effective_rank(outputs.attentions[1][2, 1]).item(), rel=1e-4
    )
    assert (measures.representative_attention_rank > measures.map_rank).all()
    summary = measures.summary()
    assert summary["map_rank"]["mean"][1][1] == pytest.approx(measures.map_rank[:, 1, 1].numpy().mean())
    assert summary["map_rank"]["std"][1][1] == pytest.approx(measures.map_rank[:, 1, 1].numpy().std())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_measures_of_all_attention_types(make_model, name):
    measures = measure_layers(make_model(attention_type=name), [torch.randn(1, 3, 32, 48)])
    assert (measures.coding_rate_before is None) == (name in ("softmax", "agent", "mita"))
    assert (measures.representative_attention_rank is None) == (name in ("mssa", "tssa", "softmax"))
    assert measures.map_rank.shape == (1, 3, 2)
    assert measures.summary()["map_rank"]["std"] == [[0, 0]] * 3


def test_no_images_to_measure_raises(tiny_model):
    with pytest.raises(ValueError, match="There are no images to measure"):
        measure_layers(tiny_model, [])


@pytest.mark.parametrize(("name", "count"), [("cbsa", 3), ("tssa", 3), ("softmax", 9)])
def test_noise_on_projections(make_model, name, count):
    model = make_model(attention_type=name)
    weights = dict(model.named_parameters())
    noisy = noisy_projections(model, 0.5, torch.Generator().manual_seed(1))
    assert len(noisy) == count
    for key, weight in noisy.items():
        ratio = (weight - weights[key]).square().mean().sqrt() / weights[key].square().mean().sqrt()
        assert 0.4 < ratio < 0.6


def test_accuracy_under_noise(tiny_model):
    """Equal to the accuracy of a copy with the noisy weights."""
    images = torch.randn(40, 3, 32, 48)
    with torch.no_grad():
        tiny_model.classifier.bias -= tiny_model(images).logits.mean(0)  # so that the images get several classes
    labels = tiny_model(images).logits.argmax(-1)
    batches = [*zip(images.split(25), labels.split(25), strict=True)]
    copy = deepcopy(tiny_model)
    expected = []
    for scale in (0, 0.3, 30):
        copy.load_state_dict(noisy_projections(tiny_model, scale, torch.Generator().manual_seed(3)), strict=False)
        expected.append((copy(images).logits.argmax(-1) == labels).double().mean().item())
    assert accuracy_under_noise(tiny_model, batches, [0, 0.3, 30], seed=3) == pytest.approx(expected)
    assert expected[0] == 1
    assert expected[2] < 0.9


def test_measuring_does_not_change_the_model(tiny_model, photo, shipped):
    """State, modes, hooks and gradients stay as they were, also in training mode."""
    model = tiny_model.train()
    model.cbsa.layers[0].eval()
    images = torch.randn(2, 3, 32, 48)
    model(images, output_hidden_states=True)  # Transformers installs its hooks at the first request, and keeps them
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]

    attention_maps(model, images, (1, 2))
    exact_maps(model, images)
    measure_layers(model, [images])
    accuracy_under_noise(model, [(images, torch.tensor([0, 1]))], [0.5])
    inspect_photo(photo, model, shipped[1], long_side=48)

    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


MAPS = {
    "tssa": "softmax over heads of W W^T",
    "linear": "A^T A",
    "softmax": "softmax of scaled Q K^T",
    "agent": "B A",
    "mita": "B A + C",
}


@pytest.mark.parametrize("name", MAPS)
def test_report_of_other_attention_types(make_model, photo, shipped, tmp_path, name):
    """A part that an attention type lacks is null and has no picture."""
    report = inspect_photo(photo, make_model(attention_type=name), shipped[1], long_side=48, patch=(0, 1))
    save_report(report, tmp_path / "report")
    numbers = json.loads((tmp_path / "report" / "report.json").read_text())
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "attention.png",
        "measures.png",
        "report.json",
    ]
    assert numbers["exact_map"] is None
    assert numbers["representatives"] is None
    assert numbers["attention"]["exact"] == (name != "tssa")
    assert numbers["attention"]["what"] == f"row of patch (0, 1) in {MAPS[name]}"
    assert (numbers["measures"]["coding_rate_after"] is None) == (name in ("softmax", "agent", "mita"))


def test_synthetic_tokens_are_compressed():
    tokens, bases, labels = draw_union_of_subspaces(3, 3, 48, 96, 0.5, torch.Generator().manual_seed(0))
    assert labels.bincount().tolist() == [32, 32, 32]
    assert (labels[1:] != labels[:-1]).sum() > 30  # neighbours differ
    torch.testing.assert_close(bases @ bases.transpose(1, 2), torch.eye(3).double().expand(3, 3, 3))
    states = iterate_operator(operator_of_bases(bases, 6), tokens, (8, 12), 6)
    torch.testing.assert_close(states.norm(dim=2), torch.full((7, 96), 48**0.5).double())
    own = []  # per step, the mean distance of the tokens to their own subspace
    for state in states.numpy():
        pairs = zip(state, bases[labels].numpy(), strict=True)
        own.append(np.mean([np.linalg.norm(z - U.T @ (U @ z)) / np.linalg.norm(z) for z, U in pairs]))
    distances = distance_to_subspaces(states, bases)
    measured = distances.gather(2, labels.expand(7, -1).unsqueeze(2)).mean((1, 2))
    assert measured.tolist() == pytest.approx(own)
    assert all(later < earlier for earlier, later in itertools.pairwise(own))
    assert own[0] > 0.4
    assert own[-1] < 0.15
    assert (distances[-1].argmin(1) == labels).double().mean() > 0.95
