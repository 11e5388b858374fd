"""Layers that share weights, against a model without sharing whose layers are copies."""

import pytest
import torch
from conftest import enable_activation_checkpointing
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from cbsa_hf import CBSAConfig, CBSAForImageClassification, fold
from cbsa_hf.interpretability.measures import measure
from cbsa_hf.segmentation.inference import encode


INDICES = {"cyclic": [0, 1, 0, 1, 0], "repeated": [0, 0, 0, 1, 1]}
SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "image_size": (32, 48),
    "patch_size": 8,
    "representatives_size": (2, 3),
    "num_labels": 5,
}


def random_model(**values) -> CBSAForImageClassification:
    """A model whose step sizes, norms and batch norm statistics are random, so that a mistake in them shows."""
    torch.manual_seed(0)
    model = CBSAForImageClassification(CBSAConfig(**SIZES | values)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("step_rep", "step_x", "running_var", "layernorm_before.weight")):
                tensor.uniform_(0.5, 2)
    return model


@pytest.fixture(params=INDICES)
def models(request) -> tuple[CBSAForImageClassification, CBSAForImageClassification]:
    """Five layers that share the weights of two, and the same model without sharing."""
    sharing, types = request.param, ["cbsa", "mssa"]
    shared = random_model(
        num_hidden_layers=5, num_unique_layers=2, layer_sharing=sharing, attention_type=types, drop_path_rate=0.2
    )
    indices = INDICES[sharing]
    unshared = random_model(
        num_hidden_layers=5, attention_type=[types[index] for index in indices], drop_path_rate=0.2
    )
    for module, source in zip(unshared.cbsa.layers, indices, strict=True):
        module.load_state_dict(shared.cbsa.layers[source].state_dict())
    for name in ("embeddings", "layernorm"):
        getattr(unshared.cbsa, name).load_state_dict(getattr(shared.cbsa, name).state_dict())
    unshared.classifier.load_state_dict(shared.classifier.state_dict())
    return shared, unshared


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


WANTED = ("output_hidden_states", "output_attentions", "output_representative_attentions")


def test_outputs_and_maps_of_every_layer(models, pixel_values):
    with torch.no_grad():
        found, expected = (model(pixel_values, **dict.fromkeys(WANTED, True)) for model in models)
    assert len(found.hidden_states) == 6
    assert len(found.attentions) == len(found.representative_attentions) == 5
    torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), rtol=0, atol=0)


def test_gradients_are_sums_over_the_layers(models, pixel_values):
    labels = torch.tensor([0, 3])
    for model in models:
        model(pixel_values, labels=labels).loss.backward()
    shared, unshared = models
    for index, layer in enumerate(shared.cbsa.layers):
        copies = [unshared.cbsa.layers[i] for i, use in enumerate(shared.config.layer_indices) if use == index]
        for name, parameter in layer.named_parameters():
            total = sum(dict(module.named_parameters())[name].grad for module in copies)
            torch.testing.assert_close(parameter.grad, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_drop_path_grows_with_the_layer(checkpointing):
    """One layer is used twice. The first use is never dropped, the second with probability 1 / 2 per image."""
    model = random_model(
        num_hidden_layers=2, num_unique_layers=1, drop_path_rate=0.5, patch_embedding_type="patchify"
    ).cbsa
    pixel_values = torch.randn(1, 3, 32, 48).expand(64, -1, -1, -1)
    if checkpointing:
        enable_activation_checkpointing(model)
    _, middle, end = model.train()(pixel_values, output_hidden_states=True).hidden_states
    torch.testing.assert_close(middle, middle[:1].expand_as(middle))
    layer = model.layers[0]

    def ista(tokens):
        return layer.feed_forward(layer.layernorm_after(tokens))

    dropped = ista(middle[:1])
    doubled = ista(middle[:1] + 2 * layer.attention(layer.layernorm_before(middle[:1]), (4, 6))[0])
    is_dropped, is_doubled = (
        [torch.allclose(tokens, expected[0], atol=1e-5) for tokens in end] for expected in (dropped, doubled)
    )
    assert all(a != b for a, b in zip(is_dropped, is_doubled, strict=True))
    assert 16 < sum(is_dropped) < 48  # of 64, four standard deviations to each side


def test_shared_weights_are_saved_once(models, pixel_values, tmp_path):
    shared, _ = models
    assert not shared.all_tied_weights_keys
    shared.save_pretrained(tmp_path)
    layers = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("cbsa.layers.")}
    assert {name.split(".")[2] for name in layers} == {"0", "1"}
    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.layer_indices == shared.config.layer_indices
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixel_values).logits, shared(pixel_values).logits)


def test_fold_and_export(models, pixel_values):
    shared, unshared = models
    folded = fold(shared)
    assert len(folded.cbsa.layers) == 2
    with torch.no_grad():
        expected = unshared(pixel_values).logits
        torch.testing.assert_close(folded(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)
        program = torch.export.export(folded, (pixel_values,))
        torch.testing.assert_close(program.module()(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)
    weights = [name for name in program.state_dict if "attention.proj.weight" in name]
    assert len(weights) == 2


def test_adapters_are_shared_too(models, pixel_values):
    shared, _ = models
    with torch.no_grad():
        before = shared(pixel_values).logits
    model = get_peft_model(shared, LoraConfig(target_modules=["attention.proj"], r=2)).eval()
    adapters = [module for name, module in model.named_modules() if name.endswith("lora_B.default")]
    assert len(adapters) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, before)
        for module in adapters:
            module.weight.normal_(std=0.1)
        changed = model(pixel_values).logits
        assert (changed - before).abs().max() > 1e-2
        torch.testing.assert_close(model.merge_and_unload()(pixel_values).logits, changed, rtol=1e-3, atol=1e-4)


def test_encoding_keeps_shared_layers_apart(models, pixel_values):
    """Steps, attended tokens and measures of layers that share weights are kept apart."""
    types = models[0].config.layer_attention_types
    last = max(i for i, name in enumerate(types) if name == "cbsa")
    found, expected = (
        encode(model, pixel_values, output_hidden_states=True, output_attentions=True, steps_of=[0, last])
        for model in models
    )
    assert sorted(found.recorded) == sorted(expected.recorded) == [0, last]
    for layer in (0, last):
        torch.testing.assert_close(vars(found.steps(layer)), vars(expected.steps(layer)), rtol=0, atol=0)
    assert not torch.equal(found.steps(0).tokens, found.steps(last).tokens)
    assert len(found.attended_states) == 5
    torch.testing.assert_close(found.attended_states, expected.attended_states, rtol=0, atol=0)
    torch.testing.assert_close(measure(found), measure(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_unique_layers": 0}, "`num_unique_layers` is 0, and has to be from 1 to the number of layers, 12"),
        ({"num_unique_layers": 13}, "`num_unique_layers` is 13, and has to be from 1 to the number of layers, 12"),
        ({"num_unique_layers": 2, "attention_type": ["cbsa"] * 12}, "lists 12 types for 2 layers with weights"),
        ({"layer_sharing": "random"}, "`layer_sharing` is 'random'; choose one of 'cyclic', 'repeated'"),
    ],
)
def test_bad_configuration_raises(values, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        CBSAConfig(**values)


@pytest.mark.parametrize(
    ("depth", "unique", "sharing", "indices"),
    [
        (4, None, "cyclic", [0, 1, 2, 3]),
        (6, 2, "cyclic", [0, 1, 0, 1, 0, 1]),
        (6, 2, "repeated", [0, 0, 0, 1, 1, 1]),
        (5, 3, "repeated", [0, 0, 1, 1, 2]),
        (3, 1, "repeated", [0, 0, 0]),
    ],
)
def test_layer_indices(depth, unique, sharing, indices):
    config = CBSAConfig(num_hidden_layers=depth, num_unique_layers=unique, layer_sharing=sharing)
    assert config.layer_indices == indices
