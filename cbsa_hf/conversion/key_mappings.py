"""
Rename the weights of other libraries to our names: the reference implementations (CBT, CRATE, ToST), Segmenter, timm
and Transformers.

Each origin has a function that renames one parameter; the table `ORIGINS` has the origins by name. To add an origin,
write its function and enter it in the table.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F


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
    # names in files
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "intermediate.dense": "feed_forward.fc1",
    "output.dense": "feed_forward.fc2",
    # names in memory, since transformers 5
    "attention.q_proj": "attention.q_proj",
    "attention.k_proj": "attention.k_proj",
    "attention.v_proj": "attention.v_proj",
    "attention.o_proj": "attention.out_proj",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
}


def rename_reference(key: str) -> str | None:
    """Our name for a parameter of the reference classifiers (CBT, CRATE, ToST); None if it has no place."""
    match key.split("."):
        case ["cls_token"]:
            return "cbsa.embeddings.cls_token"
        case ["pos_embedding"]:
            return "cbsa.embeddings.position_embeddings"
        case ["to_patch_embedding", "proj", i, j, kind] if i.isdecimal() and j.isdecimal():
            index = int(i) // 2 * 3 + int(j)  # there pairs (conv, norm) with a GELU between, here a flat list
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
    """
    Our name for a parameter of timm's vision transformers and of the original DeiT and DINOv2; None without a place.
    """
    match key.split("."):
        case ["cls_token"]:
            return "cbsa.embeddings.cls_token"
        case ["register_tokens" | "reg_token"]:
            return "cbsa.embeddings.register_tokens"
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
    """
    Our name for a parameter of ViT, DeiT and DINOv2 in Transformers, in files or in memory; None without a place.
    """
    key = re.sub(r"^(vit|deit|dinov2|dinov2_with_registers)\.", "", key)
    match key.removeprefix("encoder.").split("."):
        case ["embeddings", "cls_token" | "register_tokens" | "position_embeddings"]:
            return f"cbsa.{key}"
        case ["embeddings", "patch_embeddings", "projection", _]:
            return f"cbsa.{key}"
        case ["layernorm", kind]:
            return f"cbsa.layernorm.{kind}"
        case ["classifier", kind]:
            return f"classifier.{kind}"
        case ["layer" | "layers", layer, *module, kind] if ".".join(module) in TRANSFORMERS_LAYER:
            return f"cbsa.layers.{layer}.{TRANSFORMERS_LAYER['.'.join(module)]}.{kind}"
    return None


def rename_segmenter(key: str) -> str | None:
    """
    Our name for a parameter of Segmenter and of CBT's segmenter, which have timm's ViT as encoder; None without a
    place.
    """
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
    A library or implementation that checkpoints come from.

    Args:
        title: its name in texts.
        paper: arXiv number of its paper.
        mark: the end of a key by which state dicts of this origin are recognised.
        rename: returns our name for a parameter, or None if it has no place in a CBSA model.
        attention_types: the attention types that its attention can become; the first one is exact.
        layer_norm_eps: epsilon of its LayerNorms; None if its `config.json` says so.
        final_layer_norm_eps: epsilon of its last LayerNorm; None if it is the same.
        decoder_type: decoder type of a segmenter; None for other models.
    """

    title: str
    paper: str
    mark: str
    rename: Callable[[str], str | None]
    attention_types: tuple[str, ...]
    layer_norm_eps: float | None = None
    final_layer_norm_eps: float | None = None
    decoder_type: str | None = None


# Origins are tried in this order: state dicts of Segmenter also have the mark of timm, those of ToST and CRATE-alpha
# the mark of CRATE, and those of DINOv2 the mark of ViT.
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

# Weights without effect on the outputs: a pooler that no classifier reads, the token of masked patches in pretraining,
# and the old classifier of a segmenter's encoder.
UNUSED = re.compile(r"(^|\.)(mask_token|pooler\.dense\.(weight|bias))$|^encoder\.head\.(weight|bias)$")

REFUSED = {
    r"(^|\.)(distillation_token|dist_token)$": (
        "is a token besides CLS, which a CBSA model has no place for; convert a model without distillation"
    ),
    r"\.mlp\.(weights_in|w12|gate_proj)\.": (
        "is a SwiGLU feed-forward, which a CBSA model does not have; convert a model with an MLP"
    ),
}


def detect_origin(weights: dict[str, torch.Tensor]) -> str:
    """The name in `ORIGINS` that the keys match. Raises ValueError if there is none."""
    for name, origin in ORIGINS.items():
        if any(key.endswith(origin.mark) for key in weights):
            return name
    raise ValueError(
        f"The weights are of no known origin (one is called `{min(weights, default='')}`); "
        f"known are {', '.join(ORIGINS)}."
    )


def convert_state_dict(weights: dict[str, torch.Tensor], origin: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Rename the weights of an origin to our names.

    Args:
        weights: name at the origin -> tensor.
        origin: a name in `ORIGINS`.

    Returns:
        Our name -> tensor, in float32; and the keys that were dropped because they have no effect.

    Raises:
        ValueError: a weight has no place in a CBSA model.
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
    if origin == "timm":
        add_cls_position(converted)
    return fold_layer_scale(transpose_products(split_qkv(converted))), dropped


def add_cls_position(weights: dict[str, torch.Tensor]):
    """Gives CLS the position 0 in timm's models with registers, which have positions for the patches alone."""
    positions = weights.get("cbsa.embeddings.position_embeddings")
    if "cbsa.embeddings.register_tokens" not in weights or positions is None or positions.ndim != 3:
        return
    if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        weights["cbsa.embeddings.position_embeddings"] = F.pad(positions, (0, 0, 1, 0))


def split_qkv(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits the layers that compute queries, keys and values together into three layers."""
    split = {}
    for name, tensor in weights.items():
        if ".qkv." in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{letter}_proj.")] = third.clone()
        else:
            split[name] = tensor
    return split


def transpose_products(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turns matrices M of products `tokens M` into the weights of linear layers, which are transposed."""
    return {
        re.sub(r"\.transposed$", ".weight", name): tensor.T.contiguous() if name.endswith(".transposed") else tensor
        for name, tensor in weights.items()
    }


def fold_layer_scale(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiplies the factor for each channel of DINOv2's updates into the layer that computes the update."""
    folded = {name: tensor for name, tensor in weights.items() if ".layer_scale." not in name}
    for name in weights.keys() - folded.keys():
        module = name.split(".layer_scale.")[0]
        layer = f"{module}.out_proj" if module.endswith("attention") else f"{module}.fc2"
        for key, factor in ((f"{layer}.weight", weights[name].unsqueeze(1)), (f"{layer}.bias", weights[name])):
            if key not in folded:
                raise ValueError(f"The weights lack what becomes `{key}`.")
            folded[key] = folded[key] * factor
    return folded
