"""
Names of weights in other libraries -> ours: the reference implementations (CBT, CRATE, ToST), Segmenter, timm,
Transformers.

One function an origin renames its parameters, one table by name; to add one, write the function and enter it there.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch


VIT_ATTENTIONS = ("softmax", "agent", "mita")

TIMM_LAYER = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out_proj",
    "ls1": "attention.layer_scale",
    "norm2": "layernorm_after",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
    "ls2": "feed_forward.layer_scale",
}

TRANSFORMERS_LAYER = {
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "layer_scale1": "attention.layer_scale",
    "layer_scale2": "feed_forward.layer_scale",
    # in files
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "intermediate.dense": "feed_forward.fc1",
    "output.dense": "feed_forward.fc2",
    # in memory, since transformers 5
    "attention.q_proj": "attention.q_proj",
    "attention.k_proj": "attention.k_proj",
    "attention.v_proj": "attention.v_proj",
    "attention.o_proj": "attention.out_proj",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
}


def rename_reference(key: str) -> str | None:
    """Parameter name of the reference classifiers (CBT, CRATE, ToST) -> ours, or None."""
    match key.split("."):
        case ["cls_token"]:
            return "cbsa.embeddings.cls_token"
        case ["pos_embedding"]:
            return "cbsa.embeddings.position_embeddings"
        case ["to_patch_embedding", "proj", i, j, kind] if i.isdecimal() and j.isdecimal():
            index = int(i) // 2 * 3 + int(j)  # there (conv, norm) pairs with a GELU between, here a flat chain
            return f"cbsa.embeddings.patch_embeddings.layers.{index}.{kind}"
        case ["to_patch_embedding", ("1" | "2" | "3") as i, kind]:
            name = {"1": "layernorm_before", "2": "projection", "3": "layernorm_after"}[i]
            return f"cbsa.embeddings.patch_embeddings.{name}.{kind}"
        case ["mlp_head", "0", kind]:
            return f"cbsa.layernorm.{kind}"
        case ["mlp_head", "1", kind]:
            return f"classifier.{kind}"
        case ["transformer", "layers", layer, "0", "norm", kind]:
            return f"cbsa.layers.{layer}.layernorm_before.{kind}"
        case ["transformer", "layers", layer, "0", "fn", "to_out", *_, kind]:
            return f"cbsa.layers.{layer}.attention.out_proj.{kind}"
        case ["transformer", "layers", layer, "0", "fn", "proj" | "qkv", kind]:
            return f"cbsa.layers.{layer}.attention.proj.{kind}"
        case ["transformer", "layers", layer, "0", "fn", ("step_rep" | "step_x" | "temp") as name]:
            return f"cbsa.layers.{layer}.attention.{name}"
        case ["transformer", "layers", layer, "1", "norm", kind]:
            return f"cbsa.layers.{layer}.layernorm_after.{kind}"
        case ["transformer", "layers", layer, "1", "fn", "weight"]:
            return f"cbsa.layers.{layer}.feed_forward.weight"
    return None


def rename_crate_alpha(key: str) -> str | None:
    """Parameter name of CRATE-alpha -> ours, or None."""
    match key.split("."):
        case ["conv1", kind]:
            return f"cbsa.embeddings.patch_embeddings.projection.{kind}"
        case ["transformer", "layers", layer, "1", "fn", "D"]:
            return f"cbsa.layers.{layer}.feed_forward.dictionary"
        case ["transformer", "layers", layer, "1", "fn", "D1"]:
            return f"cbsa.layers.{layer}.feed_forward.out_proj.weight"
    return rename_reference(key)


def rename_timm(key: str) -> str | None:
    """Parameter name of timm's vision transformers, and of the first DeiT and DINOv2 -> ours, or None."""
    match key.split("."):
        case ["cls_token"]:
            return "cbsa.embeddings.cls_token"
        case ["pos_embed"]:
            return "cbsa.embeddings.position_embeddings"
        case ["patch_embed", "proj", kind]:
            return f"cbsa.embeddings.patch_embeddings.projection.{kind}"
        case ["norm", kind]:
            return f"cbsa.layernorm.{kind}"
        case ["head", kind]:
            return f"classifier.{kind}"
        case ["blocks", layer, *module, kind] if ".".join(module) in TIMM_LAYER:
            return f"cbsa.layers.{layer}.{TIMM_LAYER['.'.join(module)]}.{kind}"
    return None


def rename_transformers(key: str) -> str | None:
    """Parameter name of ViT, DeiT and DINOv2 in Transformers, of files and of version 5 in memory -> ours, or None."""
    key = re.sub(r"^(vit|deit|dinov2)\.", "", key)
    match key.removeprefix("encoder.").split("."):
        case ["embeddings", "cls_token" | "position_embeddings"] | ["embeddings", "patch_embeddings", "projection", _]:
            return f"cbsa.{key}"
        case ["layernorm", kind]:
            return f"cbsa.layernorm.{kind}"
        case ["classifier", kind]:
            return f"classifier.{kind}"
        case ["layer" | "layers", layer, *module, kind] if ".".join(module) in TRANSFORMERS_LAYER:
            return f"cbsa.layers.{layer}.{TRANSFORMERS_LAYER['.'.join(module)]}.{kind}"
    return None


def rename_segmenter(key: str) -> str | None:
    """Parameter name of Segmenter and of CBT's segmenter, whose encoders are timm's ViT -> ours, or None."""
    match key.split("."):
        case ["encoder", *_]:
            return rename_timm(key.removeprefix("encoder."))
        case ["decoder", "cls_emb"]:
            return "decoder.class_embeddings"
        case ["decoder", ("proj_dec" | "decoder_norm" | "mask_norm") as name, kind]:
            name = {"proj_dec": "input_proj", "decoder_norm": "layernorm"}.get(name, name)
            return f"decoder.{name}.{kind}"
        case ["decoder", ("proj_patch" | "proj_classes") as name]:
            return "decoder.patch_proj.transposed" if name == "proj_patch" else "decoder.class_proj.transposed"
        case ["decoder", "blocks", layer, *module, kind] if ".".join(module) in TIMM_LAYER:
            return f"decoder.layers.{layer}.{TIMM_LAYER['.'.join(module)]}.{kind}"
        case ["decoder", "net", "layers", layer, "norm", kind]:
            return f"decoder.layers.{layer}.layernorm_before.{kind}"
        case ["decoder", "net", "layers", layer, "fn", "to_out", kind]:
            return f"decoder.layers.{layer}.attention.out_proj.{kind}"
        case ["decoder", "net", "layers", layer, "fn", *name]:
            return f"decoder.layers.{layer}.attention.{'.'.join(name)}"
    return None


@dataclass(frozen=True)
class Origin:
    """
    Where checkpoints come from.

    Args:
        title: what to call it.
        paper: where it was published.
        mark: how a key ends that state dicts of this origin have.
        rename: a parameter's name there -> ours, None for one without a place.
        attention_types: what its attention can become, the exact one first.
        layer_norm_eps: epsilon of its LayerNorms; None where its `config.json` says.
        final_layer_norm_eps: epsilon of the last LayerNorm, where it is another.
        decoder_type: what decodes, where it is a segmenter.
    """

    title: str
    paper: str
    mark: str
    rename: Callable[[str], str | None]
    attention_types: tuple[str, ...]
    layer_norm_eps: float | None = None
    final_layer_norm_eps: float | None = None
    decoder_type: str | None = None


# In the order in which they are tried: Segmenter has the mark of timm too, ToST and CRATE-alpha that of CRATE, and
# DINOv2 that of ViT.
ORIGINS = {
    "cbt-segmenter": Origin(
        "CBT segmenter",
        "2509.16875",
        "decoder.net.layers.0.fn.step_rep",
        rename_segmenter,
        VIT_ATTENTIONS,
        layer_norm_eps=1e-5,
        decoder_type="cbsa",
    ),
    "segmenter": Origin(
        "Segmenter",
        "2105.05633",
        "decoder.blocks.0.attn.qkv.weight",
        rename_segmenter,
        VIT_ATTENTIONS,
        layer_norm_eps=1e-5,
        decoder_type="softmax",
    ),
    "cbt": Origin(
        "CBT", "2509.16875", "transformer.layers.0.0.fn.step_rep", rename_reference, ("cbsa",), layer_norm_eps=1e-5
    ),
    "tost": Origin(
        "ToST", "2412.17810", "transformer.layers.0.0.fn.temp", rename_reference, ("tssa",), layer_norm_eps=1e-5
    ),
    "crate-alpha": Origin(
        "CRATE-alpha",
        "2405.20299",
        "transformer.layers.0.1.fn.D1",
        rename_crate_alpha,
        ("mssa",),
        layer_norm_eps=1e-6,
        final_layer_norm_eps=1e-5,
    ),
    "crate": Origin(
        "CRATE", "2306.01129", "transformer.layers.0.0.fn.qkv.weight", rename_reference, ("mssa",), layer_norm_eps=1e-5
    ),
    "timm": Origin(
        "ViT of timm", "2010.11929", "blocks.0.attn.qkv.weight", rename_timm, VIT_ATTENTIONS, layer_norm_eps=1e-6
    ),
    "dinov2": Origin("DINOv2", "2304.07193", "0.layer_scale1.lambda1", rename_transformers, VIT_ATTENTIONS),
    "vit": Origin(
        "ViT", "2010.11929", "embeddings.patch_embeddings.projection.weight", rename_transformers, VIT_ATTENTIONS
    ),
}

# Without effect on the outputs: a pooler that no classifier reads, what stands for masked patches in pretraining, and
# the classifier that a segmenter's encoder once had.
UNUSED = re.compile(r"(^|\.)(mask_token|pooler\.dense\.(weight|bias))$|^encoder\.head\.(weight|bias)$")

REFUSED = {
    r"(^|\.)(distillation_token|dist_token|register_tokens|reg_token)$": (
        "is a token besides CLS, which a CBSA model has no place for; convert a model without distillation or "
        "register tokens"
    ),
    r"\.mlp\.(weights_in|w12|gate_proj)\.": (
        "is a SwiGLU feed-forward, which a CBSA model does not have; convert a model with an MLP"
    ),
}


def detect_origin(weights: dict[str, torch.Tensor]) -> str:
    """The name in `ORIGINS` that the keys speak for; a ValueError when there is none."""
    for name, origin in ORIGINS.items():
        if any(key.endswith(origin.mark) for key in weights):
            return name
    raise ValueError(
        f"The weights are of no known origin (one is called `{min(weights, default='')}`); "
        f"known are {', '.join(ORIGINS)}."
    )


def convert_state_dict(weights: dict[str, torch.Tensor], origin: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Weights of that origin, by their names there -> by our names, float32; and the keys dropped on purpose.

    Raises:
        ValueError: a weight that has no place in a CBSA model.
    """
    for pattern, reason in REFUSED.items():
        for key in weights:
            if re.search(pattern, key):
                raise ValueError(f"`{key}` {reason}.")
    dropped = sorted(key for key in weights if UNUSED.search(key))
    converted = {}
    for key, tensor in weights.items():
        if key in dropped:
            continue
        name = ORIGINS[origin].rename(key)
        if name is None or name in converted:
            raise ValueError(f"`{key}` has no place in a CBSA model; is this a model of origin {origin}?")
        converted[name] = tensor.float() if tensor.is_floating_point() else tensor
    if origin == "crate-alpha":  # whose output layers have no bias
        for name in [name for name in converted if name.endswith("attention.out_proj.weight")]:
            converted.setdefault(name.replace(".weight", ".bias"), converted[name].new_zeros(len(converted[name])))
    return fold_layer_scale(transpose_products(split_qkv(converted))), dropped


def split_qkv(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries, keys and values, thirds of one layer at the origin, each as a layer."""
    split = {}
    for name, tensor in weights.items():
        if ".qkv." in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{letter}_proj.")] = third.clone()
        else:
            split[name] = tensor
    return split


def transpose_products(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices that tokens are multiplied with from the left at the origin, as linear layers."""
    return {
        re.sub(r"\.transposed$", ".weight", name): tensor.T.contiguous() if name.endswith(".transposed") else tensor
        for name, tensor in weights.items()
    }


def fold_layer_scale(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factor per channel that DINOv2 multiplies each update with, into the layer that makes the update."""
    folded = {name: tensor for name, tensor in weights.items() if ".layer_scale." not in name}
    for name in weights.keys() - folded.keys():
        module = name.split(".layer_scale.")[0]
        layer = f"{module}.out_proj" if module.endswith("attention") else f"{module}.fc2"
        for key, factor in ((f"{layer}.weight", weights[name].unsqueeze(1)), (f"{layer}.bias", weights[name])):
            if key not in folded:
                raise ValueError(f"The weights lack what becomes `{key}`.")
            folded[key] = folded[key] * factor
    return folded


__all__ = ["ORIGINS", "Origin", "convert_state_dict", "detect_origin"]
