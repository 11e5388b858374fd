"""Against the tensors recorded from the reference implementation (`../shared/reference`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cbsa_hf import CBSAConfig, CBSAForImageClassification


REFERENCE = Path(__file__).parents[2] / "shared" / "reference"

pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no recorded tensors at {REFERENCE.name}")


def load_recording(name: str):
    with safe_open(REFERENCE / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    return config, load_file(REFERENCE / f"{name}.safetensors")


def rename(key: str) -> str | None:
    """Parameter name of the reference CBT classifier -> ours."""
    parts = key.split(".")
    match parts:
        case ["cls_token"]:
            return "cbsa.embeddings.cls_token"
        case ["pos_embedding"]:
            return "cbsa.embeddings.position_embeddings"
        case ["to_patch_embedding", "proj", i, j, *rest]:
            index = int(i) // 2 * 3 + int(j)  # there (conv, norm) pairs with a GELU between, here a flat chain
            return ".".join(["cbsa.embeddings.patch_embeddings.layers", str(index), *rest])
        case ["mlp_head", "0", rest]:
            return f"cbsa.layernorm.{rest}"
        case ["mlp_head", "1", rest]:
            return f"classifier.{rest}"
        case ["transformer", "layers", layer, "0", "norm", rest]:
            return f"cbsa.layers.{layer}.layernorm_before.{rest}"
        case ["transformer", "layers", layer, "0", "fn", *rest]:
            return f"cbsa.layers.{layer}.attention." + ".".join(rest).replace("to_out", "out_proj")
        case ["transformer", "layers", layer, "1", "norm", rest]:
            return f"cbsa.layers.{layer}.layernorm_after.{rest}"
        case ["transformer", "layers", layer, "1", "fn", rest]:
            return f"cbsa.layers.{layer}.feed_forward.{rest}"
    raise KeyError(key)


def assert_matches(actual: torch.Tensor, expected: torch.Tensor):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["cbt_patch16", "cbt_patch8", "cbt_patch16_224"])
def test_cbt_classifier(name):
    sizes, tensors = load_recording(name)
    config = CBSAConfig(
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        hidden_size=sizes["dim"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        head_dim=sizes["dim_head"],
        num_labels=sizes["num_classes"],
        pooled_tokens="all_but_last",
    )
    model = CBSAForImageClassification(config).eval()
    prefix = "state_dict."
    model.load_state_dict({rename(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)})

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
        assert_matches(patches, tensors["output.patch_embeddings"])
