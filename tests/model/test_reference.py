"""Outputs equal the tensors recorded from the reference implementation (`../shared/reference`)."""

import json

import pytest
import torch
from conftest import REFERENCE, assert_matches
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from cbsa_hf import CBSAConfig
from cbsa_hf.attention_cbsa import ATTENTIONS, PooledRepresentatives
from cbsa_hf.conversion.convert import convert_checkpoint, convert_state_dict
from cbsa_hf.mask_decoder_cbsa import DECODERS


pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no recorded tensors at {REFERENCE.name}")


def load_recording(name: str):
    with safe_open(REFERENCE / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    return config, load_file(REFERENCE / f"{name}.safetensors")


CLASSIFIERS = {
    "cbt_patch16": "cbt",
    "cbt_patch8": "cbt",
    "cbt_patch16_224": "cbt",
    "crate_conv_patch16": "crate",
    "crate_patchify_patch16": "crate",
    "tost_conv_patch16": "tost",
}


@pytest.mark.parametrize(("name", "origin"), CLASSIFIERS.items())
def test_classifier(name, origin):
    sizes, tensors = load_recording(name)
    conversion = convert_checkpoint(str(REFERENCE / f"{name}.safetensors"), num_heads=sizes["heads"])
    assert conversion.origin == origin
    model, config = conversion.model, conversion.model.config
    assert (config.image_size, config.patch_size) == (sizes["image_size"], sizes["patch_size"])
    assert (config.num_hidden_layers, config.head_dim) == (sizes["depth"], sizes["dim_head"])

    updates = []
    for layer in model.cbsa.layers:
        layer.attention.register_forward_hook(lambda module, args, output: updates.append(output[0]))
    pixel_values = tensors["input.pixel_values"]
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
        patches = model.cbsa.embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)

    assert_matches(outputs.logits, tensors["output.logits"])
    assert len(outputs.hidden_states) == sizes["depth"] + 1
    for i, hidden_state in enumerate(outputs.hidden_states):
        assert_matches(hidden_state, tensors[f"output.hidden_states.{i}"])
    for i, update in enumerate(updates):
        assert_matches(update, tensors[f"output.attention_update.{i}"])
    if "output.attentions.0" in tensors:
        for i, attention in enumerate(outputs.attentions):
            assert_matches(attention, tensors[f"output.attentions.{i}"])
    if "output.patch_embeddings" in tensors:
        assert_matches(patches, tensors["output.patch_embeddings"])


def test_adapted_vit_attention():
    sizes, tensors = load_recording("vit_adapted_attention")
    weights = {}
    for kind in ("weight", "bias"):
        thirds = tensors[f"state_dict.qkv.{kind}"].chunk(3)
        weights |= {f"{name}_proj.{kind}": third for name, third in zip("qkv", thirds, strict=True)}
        weights[f"out_proj.{kind}"] = tensors[f"state_dict.proj.{kind}"]
    for name in ("softmax", "agent"):
        # The reference pools all tokens but the last here too: its grid starts at CLS.
        representatives = PooledRepresentatives(8, first_token=0) if name == "agent" else None
        operator = ATTENTIONS[name](sizes["dim"], sizes["heads"], sizes["dim"] // sizes["heads"], representatives)
        operator.load_state_dict(weights)
        for wanted in (False, True):
            with torch.no_grad():
                update = operator(tensors["input.hidden_states"], tuple(sizes["grid"]), wanted, wanted)[0]
            assert_matches(update, tensors[f"output.{name}"])


def test_segmenter():
    sizes, tensors = load_recording("segmenter_cbt")
    conversion = convert_checkpoint(str(REFERENCE / "segmenter_cbt.safetensors"), num_heads=sizes["heads"])
    assert conversion.origin == "cbt-segmenter"
    model, config = conversion.model, conversion.model.config
    assert (config.decoder_type, config.decoder_num_layers) == ("cbsa", sizes["decoder_layers"])
    assert (config.decoder_num_heads, config.decoder_head_dim) == (sizes["decoder_heads"], sizes["decoder_dim_head"])
    assert [config.decoder_representatives_size] * 2 == sizes["representative_grid"]
    assert config.num_labels == sizes["num_classes"]

    hidden_states, masks = [], []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, args, output: hidden_states.append(output[0]))
    model.decoder.register_forward_hook(lambda module, args, output: masks.append(output[0]))
    pixel_values = tensors["input.pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values).logits
        encoded = model.cbsa(pixel_values).last_hidden_state

    assert_matches(encoded, tensors["output.encoder_last_hidden_state"])
    assert len(hidden_states) == sizes["decoder_layers"]
    for i, hidden_state in enumerate(hidden_states):
        assert_matches(hidden_state, tensors[f"output.decoder_hidden_states.{i}"])
    expected = tensors["output.mask_logits_at_patch_grid"]
    assert_matches(masks[0], expected)
    assert_matches(logits, F.interpolate(expected, size=pixel_values.shape[2:], mode="bilinear"))


def test_mask_transformer():
    sizes, tensors = load_recording("segmenter_mask_transformer_decoder")
    weights = {key.replace("state_dict", "decoder"): v for key, v in tensors.items() if key.startswith("state_dict.")}
    weights, _ = convert_state_dict(weights, "segmenter")
    config = CBSAConfig(
        num_labels=sizes["num_classes"],
        decoder_type="softmax",
        decoder_num_layers=sizes["decoder_layers"],
        decoder_num_heads=sizes["decoder_heads"],
    )
    decoder = DECODERS["softmax"](config, sizes["dim"])
    decoder.load_state_dict({key.removeprefix("decoder."): tensor for key, tensor in weights.items()})
    with torch.no_grad():
        masks, _ = decoder(tensors["input.patch_tokens"], tuple(sizes["grid"]))
    assert_matches(masks, tensors["output.mask_logits_at_patch_grid"])
