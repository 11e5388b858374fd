"""The models: sizes, outputs on request, saving and loading."""

from typing import get_args

import pytest
import torch
from conftest import enable_activation_checkpointing
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTImageProcessorPil,
)

from cbsa_hf import (
    PRESETS,
    CBSABackbone,
    CBSAConfig,
    CBSAForImageClassification,
    CBSAForSemanticSegmentation,
    CBSAModel,
    preset_path,
)
from cbsa_hf.configuration_cbsa import AttentionType
from cbsa_hf.modeling_cbsa import CBSAISTA, CBSAODL, CBSAConvStem


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("tiny", 1_789_192), ("small", 6_667_048), ("base", 25_691_752), ("large", 83_051_368)],
)
def test_published_number_of_parameters(size, parameters):
    config = CBSAConfig.from_pretrained(preset_path(f"cbt-{size}"), num_labels=1000)
    with torch.device("meta"):
        model = CBSAForImageClassification(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("attention_type", get_args(AttentionType))
def test_meta_device(attention_type):
    """Without data: Accelerate and FLOP counters compute shapes so."""
    config = CBSAConfig(image_size=64, num_hidden_layers=1, attention_type=attention_type, num_labels=3)
    pixel_values = torch.empty(2, 3, 64, 64, device="meta")
    assert CBSAForImageClassification(config).to("meta")(pixel_values).logits.shape == (2, 3)
    assert CBSAForSemanticSegmentation(config).to("meta")(pixel_values).logits.shape == (2, 3, 64, 64)


def test_presets_differ_in_attention_type_and_size():
    families = {"cbt": "cbsa", "crate": "mssa", "tost": "tssa"}
    assert set(PRESETS) == {f"{family}-{size}" for family in families for size in ("tiny", "small", "base", "large")}
    for name in PRESETS:
        config = CBSAConfig.from_pretrained(preset_path(name))
        family, size = name.split("-")
        same_size = CBSAConfig.from_pretrained(preset_path(f"cbt-{size}"), attention_type=families[family])
        assert config.to_dict() == same_size.to_dict()
    assert CBSAConfig.from_pretrained(preset_path("cbt-tiny")).to_dict() == CBSAConfig().to_dict()
    with pytest.raises(ValueError, match="There is no preset 'cbt-huge'; choose one of cbt-base"):
        preset_path("cbt-huge")


@pytest.mark.parametrize(("patch_size", "widths"), [(8, [48, 96, 192]), (16, [24, 48, 96, 192])])
def test_layers_of_the_stem(patch_size, widths):
    stem = CBSAConvStem(CBSAConfig(patch_size=patch_size))
    assert [m.out_channels for m in stem.layers if isinstance(m, torch.nn.Conv2d)] == widths
    assert isinstance(stem.layers[-1], torch.nn.BatchNorm2d)
    assert stem(torch.randn(1, 3, 4 * patch_size, 3 * patch_size)).shape == (1, 192, 4, 3)


def test_ista_closed_form():
    torch.manual_seed(0)
    config = CBSAConfig(hidden_size=8, num_attention_heads=2, patch_size=8, ista_step_size=0.3, ista_threshold=0.2)
    ista = CBSAISTA(config).double()
    D = torch.nn.init.normal_(ista.weight).tolist()
    tokens = torch.randn(8, dtype=torch.float64)
    x = tokens.tolist()
    residual = [x[k] - sum(D[k][j] * x[j] for j in range(8)) for k in range(8)]  # x - D x
    step = [sum(D[k][i] * residual[k] for k in range(8)) for i in range(8)]  # D^T (x - D x)
    expected = [max(0.0, x[i] + 0.3 * step[i] - 0.3 * 0.2) for i in range(8)]
    torch.testing.assert_close(ista(tokens), torch.tensor(expected, dtype=torch.float64))


def test_odl_closed_form():
    """Two steps with an overcomplete dictionary, entry by entry."""
    config = CBSAConfig(hidden_size=8, num_attention_heads=2, patch_size=8, ista_step_size=0.3, ista_threshold=0.2)
    config.intermediate_size = 12
    odl = CBSAODL(config).double()
    D = torch.nn.init.normal_(odl.dictionary).tolist()
    D1 = torch.nn.init.normal_(odl.out_proj.weight).tolist()
    tokens = torch.randn(5, 8, dtype=torch.float64)
    for x, found in zip(tokens.tolist(), odl(tokens).tolist(), strict=True):
        columns = [[D[i][j] for i in range(8)] for j in range(12)]
        z1 = [max(0, 0.3 * sum(d * e for d, e in zip(c, x, strict=True)) - 0.3 * 0.2) for c in columns]
        residual = [sum(D[i][j] * z1[j] for j in range(12)) - x[i] for i in range(8)]
        steps = [sum(d * r for d, r in zip(c, residual, strict=True)) for c in columns]
        z2 = [max(0, z - 0.3 * step - 0.3 * 0.2) for z, step in zip(z1, steps, strict=True)]
        assert any(z2) and not all(z2)
        assert found == pytest.approx([sum(D1[i][j] * z2[j] for j in range(12)) for i in range(8)])


def test_no_feed_forward(tiny_config):
    tiny_config.feed_forward_type = "none"
    model = CBSAForImageClassification(tiny_config).eval()
    assert not any("feed_forward" in name or "layernorm_after" in name for name in model.state_dict())
    outputs = model.cbsa(torch.randn(1, 3, 32, 48), output_hidden_states=True)
    layer, (before, after) = model.cbsa.layers[1], outputs.hidden_states[1:3]
    update = layer.attention(layer.layernorm_before(before), (4, 6))[0]
    torch.testing.assert_close(after, before + update)


def test_epsilon_of_the_final_norm():
    config = CBSAConfig(patch_size=8, layer_norm_eps=1e-6, final_layer_norm_eps=1e-3, num_hidden_layers=1)
    model = CBSAModel(config)
    assert (model.layers[0].layernorm_before.eps, model.layernorm.eps) == (1e-6, 1e-3)
    config.final_layer_norm_eps = None
    assert CBSAModel(config).layernorm.eps == 1e-6


def test_ista_of_many_tokens():
    """With more tokens than channels, ISTA multiplies by `D^T - D^T D`. Outputs and gradients stay the same."""
    torch.manual_seed(0)
    ista = CBSAISTA(CBSAConfig(hidden_size=8, num_attention_heads=2, patch_size=8)).double()
    torch.nn.init.normal_(ista.weight)
    tokens = torch.randn(6, 9, 8, dtype=torch.float64)
    weights = torch.randn_like(tokens)
    found = []
    for compute in (ista, lambda tokens: torch.stack([ista(token) for token in tokens.flatten(0, 1)]).view(6, 9, 8)):
        given = tokens.clone().requires_grad_()
        code = compute(given)
        found.append((code, *torch.autograd.grad((code * weights).sum(), (given, ista.weight))))
    torch.testing.assert_close(*found)


def test_size_factor_of_the_models(tiny_config):
    """N0 is the number of patches at `image_size`, unless the configuration sets it."""
    assert [layer.attention.base_num_patches for layer in CBSAModel(tiny_config).layers] == [24] * 3
    tiny_config.base_num_patches = 40
    segmenter = CBSAForSemanticSegmentation(tiny_config)
    assert [layer.attention.base_num_patches for layer in segmenter.decoder.layers] == [40] * 3
    assert [layer.attention.num_other_tokens for layer in segmenter.decoder.layers] == [5] * 3
    tiny_config.decoder_base_num_patches = 50
    segmenter = CBSAForSemanticSegmentation(tiny_config)
    assert [layer.attention.base_num_patches for layer in segmenter.decoder.layers] == [50] * 3
    assert segmenter.cbsa.layers[0].attention.base_num_patches == 40
    tiny_config.size_factor = False
    segmenter = CBSAForSemanticSegmentation(tiny_config)
    for layer in [*segmenter.cbsa.layers, *segmenter.decoder.layers]:
        assert layer.attention.size_factor((7, 9)) == 1


def test_attention_types_by_layer(tiny_config, tmp_path):
    values = {**tiny_config.to_diff_dict(), "attention_type": ["mssa", "cbsa", "tssa"], "num_register_tokens": 3}
    torch.manual_seed(0)
    model = CBSAForImageClassification(CBSAConfig(**values)).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(again(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=0)
    outputs = again(pixel_values, output_representative_attentions=True, output_hidden_states=True)
    assert outputs.hidden_states[0].shape == (1, 1 + 3 + 24, 24)
    shapes = [None if found is None else found.shape for found in outputs.representative_attentions]
    assert shapes == [None, (1, 2, 6, 28), None]
    features = CBSABackbone(CBSAConfig(**values)).eval()(pixel_values).feature_maps
    assert features[0].shape == (1, 24, 4, 6)
    for types, message in {
        ("mssa", "cbsa"): "lists 2 types for 3 layers",
        ("mssa", "cbsa", "mixer"): "`attention_type` is 'mixer'; choose one of 'cbsa'",
    }.items():
        with pytest.raises(StrictDataclassError, match=message):
            CBSAConfig(**{**values, "attention_type": list(types)})
    with pytest.raises(StrictDataclassError, match="would turn into a register"):
        CBSAConfig(pooled_tokens="all_but_last", num_register_tokens=1)


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (8, 8), (64, 24), (33, 47)])
def test_images_of_any_size(tiny_model, size):
    pixel_values = torch.randn(2, 3, *size)
    outputs = tiny_model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
    patches = -(-size[0] // 8) * -(-size[1] // 8)
    assert outputs.logits.shape == (2, 5)
    assert outputs.hidden_states[0].shape == (2, 1 + patches, 24)


def test_positions_are_interpolated_on_the_grid(tiny_model):
    embeddings = tiny_model.cbsa.embeddings
    own = embeddings.position_embeddings
    torch.testing.assert_close(torch.cat(embeddings.interpolate_pos_encoding((4, 6)), dim=1), own)
    patches = own[0, 1:].T.reshape(1, 24, 4, 6)
    expected = F.interpolate(patches, size=(3, 9), mode="bicubic").reshape(24, 27).T
    positions = torch.cat(embeddings.interpolate_pos_encoding((3, 9)), dim=1)
    torch.testing.assert_close(positions[0, 0], own[0, 0])
    torch.testing.assert_close(positions[0, 1:], expected)


@pytest.mark.parametrize(
    ("shape", "interpolate", "message"),
    [
        ((1, 3, 48, 32), False, r"48 x 32 pixels .* model's 32 x 48.*interpolate_pos_encoding=True"),
        ((1, 3, 7, 48), True, "smaller than one patch of 8 x 8"),
        ((1, 1, 32, 48), True, "has 1 channels; this model takes 3"),
    ],
)
def test_bad_input_raises(tiny_model, shape, interpolate, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(torch.randn(shape), interpolate_pos_encoding=interpolate)


@pytest.mark.parametrize("by", ["keyword", "config"])
@pytest.mark.parametrize("head", [True, False])
def test_outputs_on_request(tiny_model, by, head):
    model = tiny_model if head else tiny_model.cbsa
    pixel_values = torch.randn(2, 3, 32, 48)
    names = ("output_attentions", "output_hidden_states", "output_representative_attentions")
    tokens, m = 25, 6

    plain = model(pixel_values)
    assert plain.attentions is plain.hidden_states is plain.representative_attentions is None
    if by == "keyword":
        outputs = model(pixel_values, **dict.fromkeys(names, True))
    else:
        for name in names:
            setattr(model.config, name, True)
        outputs = model(pixel_values)
        assert model(pixel_values, output_attentions=False).attentions is None
    torch.testing.assert_close(outputs[0], plain[0])
    assert [h.shape for h in outputs.hidden_states] == [(2, tokens, 24)] * 4
    assert [a.shape for a in outputs.attentions] == [(2, 2, tokens, tokens)] * 3
    assert [a.shape for a in outputs.representative_attentions] == [(2, 2, m, tokens)] * 3
    for token_map, attention in zip(outputs.attentions, outputs.representative_attentions, strict=True):
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, m))
        torch.testing.assert_close(token_map, torch.einsum("bhmn,bhmk->bhnk", attention, attention))


def test_maps_are_built_only_on_request(tiny_model):
    built = []
    for layer in tiny_model.cbsa.layers:
        layer.attention.register_forward_hook(lambda module, args, output: built.append(output[1] is not None))
    tiny_model(torch.randn(1, 3, 32, 48), output_representative_attentions=True, output_hidden_states=True)
    assert built == [False] * 3


def test_loss_and_gradients(tiny_model):
    tiny_model.train()
    labels = torch.tensor([1, 4])
    outputs = tiny_model(torch.randn(2, 3, 32, 48), labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tiny_model.parameters())


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_encoder_does_not_change(tiny_model, checkpointing):
    """A frozen encoder gives the same outputs in training and in evaluation mode."""
    features = tiny_model.cbsa(torch.ones(1, 3, 32, 48)).last_hidden_state
    before = statistics(tiny_model)
    tiny_model.train()
    tiny_model.cbsa.requires_grad_(False)  # after `train()`, as PEFT may do
    if checkpointing:
        enable_activation_checkpointing(tiny_model)
    for _ in range(3):
        pixel_values = 2 + 3 * torch.randn(4, 3, 32, 48)
        logits = tiny_model(pixel_values).logits
        logits.sum().backward()
        torch.testing.assert_close(logits, tiny_model.eval()(pixel_values).logits)
        tiny_model.train()
    assert tiny_model.classifier.weight.grad is not None
    assert all(torch.equal(before[name], buffer) for name, buffer in tiny_model.named_buffers())
    torch.testing.assert_close(tiny_model.cbsa(torch.ones(1, 3, 32, 48)).last_hidden_state, features)

    norms = [module for module in tiny_model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    norms[-1].requires_grad_(True)
    inputs = []
    norms[-1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    mean, variance, count = (before[name] for name in before if ".7." in name)  # of the last norm in the stem
    tiny_model(pixel_values)
    torch.testing.assert_close(norms[-1].running_mean, 0.9 * mean + 0.1 * inputs[0].mean((0, 2, 3)))
    torch.testing.assert_close(norms[-1].running_var, 0.9 * variance + 0.1 * inputs[0].var((0, 2, 3)))
    assert norms[-1].num_batches_tracked == count + 1
    assert all(torch.equal(before[n], b) for n, b in tiny_model.named_buffers() if ".7." not in n)


def test_frozen_encoder_does_not_change_in_graphs(tiny_model):
    """The model is compiled and exported in training mode."""
    tiny_model.cbsa.requires_grad_(False)
    pixel_values = 2 + 3 * torch.randn(4, 3, 32, 48)
    expected = tiny_model(pixel_values).logits
    before = statistics(tiny_model)
    tiny_model.train()
    torch.compiler.reset()
    for graph in (
        torch.compile(tiny_model, backend="eager", fullgraph=True),
        torch.export.export(tiny_model, (pixel_values,)).module(),
    ):
        torch.testing.assert_close(graph(pixel_values).logits, expected)
        for name, buffer in graph.named_buffers():
            assert torch.equal(before[name.removeprefix("_orig_mod.")], buffer)


def test_gradient_checkpointing_changes_nothing(tiny_model):
    pixel_values = torch.randn(2, 3, 32, 48)

    def gradients():
        tiny_model.zero_grad()
        tiny_model(pixel_values, labels=torch.tensor([1, 4])).loss.backward()
        return [p.grad.clone() for p in tiny_model.parameters()]

    tiny_model.train()
    plain = gradients()
    enable_activation_checkpointing(tiny_model)
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_saving_and_loading_is_exact(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = CBSAForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.to_json_string() == tiny_model.config.to_json_string()
    state, loaded_state = tiny_model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    pixel_values = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(loaded(pixel_values).logits, tiny_model(pixel_values).logits)


def test_auto_classes(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 48}, do_convert_rgb=True).save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 32, 48)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CBSAConfig)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), ViTImageProcessorPil)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(classifier(pixel_values).logits, tiny_model(pixel_values).logits)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(encoder, CBSAModel)
    expected = tiny_model.cbsa(pixel_values)
    torch.testing.assert_close(encoder(pixel_values).last_hidden_state, expected.last_hidden_state)
    assert torch.equal(expected.pooler_output, expected.last_hidden_state[:, 0])


def test_dtype_of_the_input_follows_the_model(tiny_model):
    pixel_values = torch.randn(1, 3, 32, 48)
    expected = tiny_model(pixel_values).logits
    logits = tiny_model.to(torch.bfloat16)(pixel_values).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
