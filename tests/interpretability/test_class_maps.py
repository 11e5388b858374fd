"""Maps of a class, against finite differences of its logit with respect to every entry of the attention."""

import pytest
import torch
from torch import nn

from cbsa_hf import CBSAConfig, CBSAForImageClassification, CBSAModel
from cbsa_hf.interpretability.class_maps import class_attention_maps


TINY = {"image_size": 12, "patch_size": 4, "patch_embedding_type": "linear", "hidden_size": 8, "num_labels": 3}
TINY |= {"num_hidden_layers": 1, "num_attention_heads": 2, "representatives_size": 2, "landmarks_size": 2}

# The update of one head, given A: attention of representatives for cbsa and linear, else the token-to-token map.
UPDATES = {
    "cbsa": lambda A, w, q, v, start, eta, kappa: kappa * A.T @ contract(start + eta * A @ w),
    "agent": lambda A, w, q, v, start, eta, kappa: A @ v,
    "linear": lambda A, w, q, v, start, eta, kappa: A.T @ (A @ w),
    "mssa": lambda A, w, q, v, start, eta, kappa: A @ w,
    "softmax": lambda A, w, q, v, start, eta, kappa: A @ v,
    "mita": lambda A, w, q, v, start, eta, kappa: A @ v,
}


def contract(representatives):
    return torch.softmax(representatives @ representatives.T / 2, dim=1) @ representatives


def build(attention_type: str, **changes) -> CBSAForImageClassification:
    torch.manual_seed(0)
    model = (
        CBSAForImageClassification(CBSAConfig(attention_type=attention_type, **{**TINY, **changes})).double().eval()
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def pool(tokens):
    """2 x 2 bins over the 3 x 3 patches after CLS: rows and columns 0 to 1, and 1 to 2."""
    patches = tokens[1:].reshape(3, 3, -1)
    return torch.stack([patches[y : y + 2, x : x + 2].mean((0, 1)) for y in (0, 1) for x in (0, 1)])


def logit(model, hidden_states, attentions, label):
    """The logit of a class, by the formulas, from embeddings (10, 8) and the attention of both heads."""
    layer, operator = model.cbsa.layers[0], model.cbsa.layers[0].attention
    x = layer.layernorm_before(hidden_states)
    updates = []
    for h, A in enumerate(attentions):
        heads = slice(4 * h, 4 * h + 4)
        if hasattr(operator, "proj"):
            q = w = v = x @ operator.proj.weight[heads].T
        else:
            q, _, v = (getattr(operator, f"{n}_proj")(x)[:, heads] for n in "qkv")
            w = None
        eta, kappa = (getattr(operator, name, torch.ones(2, 1, 1))[h].item() for name in ("step_rep", "step_x"))
        updates.append(UPDATES[model.config.attention_type](A, w, q, v, pool(q), eta, kappa))
    hidden_states = hidden_states + torch.cat(updates, dim=1) @ operator.out_proj.weight.T + operator.out_proj.bias
    code = layer.feed_forward(layer.layernorm_after(hidden_states))
    return model.classifier(model.cbsa.layernorm(code)[0])[label].item()


@torch.no_grad()
@pytest.mark.parametrize("attention_type", UPDATES)
def test_maps_equal_finite_differences(attention_type):
    model = build(attention_type)
    pixel_values = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    labels = torch.tensor([2, 0])
    maps = class_attention_maps(model, pixel_values, labels)
    assert maps.shape == (1, 2, 2, 3, 3)

    name = "representative_attentions" if attention_type in ("cbsa", "linear") else "attentions"
    outputs = model(pixel_values, output_hidden_states=True, **{f"output_{name}": True})
    for image, label in enumerate(labels.tolist()):
        embeddings, attentions = outputs.hidden_states[0][image], outputs[name][0][image]
        assert logit(model, embeddings, attentions, label) == pytest.approx(outputs.logits[image, label].item())
        expected = torch.zeros(2, 10, dtype=torch.float64)
        for h, row, token in torch.cartesian_prod(*(torch.arange(n) for n in attentions.shape)).tolist():
            moved = [attentions.clone(), attentions.clone()]
            for sign, changed in zip((1, -1), moved, strict=True):
                changed[h, row, token] += sign * 1e-6
            up, down = (logit(model, embeddings, changed, label) for changed in moved)
            share = attentions[h, row, token].item() * (up - down) / 2e-6
            expected[h, token] += max(share, 0)
        torch.testing.assert_close(maps[0, image], expected[:, 1:].reshape(2, 3, 3), rtol=1e-4, atol=1e-8)


def test_predicted_class_is_the_default():
    model = build("cbsa", num_hidden_layers=2, num_register_tokens=2).requires_grad_(False)
    pixel_values = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    labels = model(pixel_values, interpolate_pos_encoding=True).logits.argmax(-1)
    maps = class_attention_maps(model, pixel_values)
    assert maps.shape == (2, 2, 2, 3, 4)
    torch.testing.assert_close(maps, class_attention_maps(model, pixel_values, labels))
    assert (maps - class_attention_maps(model, pixel_values, (labels + 1) % 3)).abs().max() > 1e-3
    assert not pixel_values.requires_grad


def test_class_maps_leave_no_gradients():
    model = build(["mssa", "cbsa"], num_hidden_layers=2).train()
    maps = class_attention_maps(model, torch.randn(1, 3, 12, 12, dtype=torch.float64))
    assert maps.shape == (2, 1, 2, 3, 3)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("attention_type", ["cbsa", "agent", "linear", "mita"])
def test_representative_attentions_retain_their_gradient(attention_type):
    outputs = build(attention_type)(
        torch.randn(1, 3, 12, 12, dtype=torch.float64), output_representative_attentions=True
    )
    outputs.representative_attentions[0].retain_grad()
    outputs.logits[0, 1].backward()
    assert outputs.representative_attentions[0].grad.abs().max() > 0


@pytest.mark.parametrize("attention_type", ["cbsa", "tssa"])
def test_map_without_effect_has_no_gradient(attention_type):
    outputs = build(attention_type)(torch.randn(1, 3, 12, 12, dtype=torch.float64), output_attentions=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(outputs.logits.sum(), outputs.attentions[0])


@pytest.mark.parametrize(
    ("model", "labels", "message"),
    [
        (build("tssa"), None, "Attention type 'tssa' makes its update without a map"),
        (CBSAModel(CBSAConfig(**TINY)), None, "A CBSAModel has no logits of an image; give a classifier"),
        (build("cbsa"), [0, 1], r"`labels` is \[0, 1\]; give the index of a class, from 0 to 2, for each of the 1"),
        (build("cbsa"), [3], r"`labels` is \[3\]; give the index of a class"),
        (build("cbsa"), [0.5], r"`labels` is \[0.5\]; give the index of a class"),
    ],
)
def test_bad_arguments_raise(model, labels, message):
    pixel_values = torch.randn(1, 3, 12, 12, dtype=next(model.parameters()).dtype)
    with pytest.raises(ValueError, match=message):
        class_attention_maps(model, pixel_values, None if labels is None else torch.tensor(labels))
