"""Against the tensors recorded from the reference implementation (`../shared/reference`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cbsa_hf import CBSAConfig, CBSAForImageClassification
from cbsa_hf.attention_cbsa import ATTENTIONS, PooledRepresentatives


REFERENCE = Path(__file__).parents[2] / "shared" / "reference"

pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no recorded tensors at {REFERENCE.name}")


def load_recording(name: str):
    with safe_open(REFERENCE / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    return config, load_file(REFERENCE / f"{name}.safetensors")


def rename(key: str) -> str:
    """Parameter name of the reference classifiers (CBT, CRATE, ToST) -> ours."""
    match key.split("."):
        case ["cls_token"]:
            return "cbsa.embeddings.cls_token"
        case ["pos_embedding"]:
            return "cbsa.embeddings.position_embeddings"
        case ["to_patch_embedding", "proj", i, j, rest]:
            index = int(i) // 2 * 3 + int(j)  # there (conv, norm) pairs with a GELU between, here a flat chain
            return f"cbsa.embeddings.patch_embeddings.layers.{index}.{rest}"
        case ["to_patch_embedding", i, rest]:
            name = {"1": "layernorm_before", "2": "projection", "3": "layernorm_after"}[i]
            return f"cbsa.embeddings.patch_embeddings.{name}.{rest}"
        case ["mlp_head", "0", rest]:
            return f"cbsa.layernorm.{rest}"
        case ["mlp_head", "1", rest]:
            return f"classifier.{rest}"
        case ["transformer", "layers", layer, "0", "norm", rest]:
            return f"cbsa.layers.{layer}.layernorm_before.{rest}"
        case ["transformer", "layers", layer, "0", "fn", "to_out", *_, rest]:
            return f"cbsa.layers.{layer}.attention.out_proj.{rest}"
        case ["transformer", "layers", layer, "0", "fn", *rest]:
            return f"cbsa.layers.{layer}.attention." + ".".join(rest).replace("qkv", "proj")
        case ["transformer", "layers", layer, "1", "norm", rest]:
            return f"cbsa.layers.{layer}.layernorm_after.{rest}"
        case ["transformer", "layers", layer, "1", "fn", rest]:
            return f"cbsa.layers.{layer}.feed_forward.{rest}"
    raise KeyError(key)


def assert_matches(actual: torch.Tensor, expected: torch.Tensor):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


CLASSIFIERS = {
    "cbt_patch16": {"pooled_tokens": "all_but_last"},
    "cbt_patch8": {"pooled_tokens": "all_but_last"},
    "cbt_patch16_224": {"pooled_tokens": "all_but_last"},
    "crate_conv_patch16": {"attention_type": "mssa"},
    "crate_patchify_patch16": {"attention_type": "mssa", "patch_embedding_type": "patchify"},
    "tost_conv_patch16": {"attention_type": "tssa"},
}


@pytest.mark.parametrize(("name", "values"), CLASSIFIERS.items())
def test_classifier(name, values):
    sizes, tensors = load_recording(name)
    config = CBSAConfig(
        image_size=sizes["image_size"],
        hidden_size=sizes["dim"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        head_dim=sizes["dim_head"],
        num_labels=sizes["num_classes"],
        patch_size=sizes["patch_size"],
        **values,
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
