"""Derive the configuration of a CBSA model from the shapes of its weights."""

import math

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..configuration_cbsa import CBSAConfig
from .key_mappings import ORIGINS


# Number of heads by width in the published models. The shapes of q, k and v do not tell it, and the usual rule of 64 a
# head is wrong for CRATE small (width 576) and ViT huge (1280).
PUBLISHED_HEADS = {192: 3, 384: 6, 576: 12, 768: 12, 1024: 16, 1280: 16}

Weights = dict[str, torch.Tensor]
EMBEDDINGS, STEM, ATTENTION = "cbsa.embeddings", "cbsa.embeddings.patch_embeddings", "cbsa.layers.0.attention"


def shape_of(weights: Weights, name: str, ndim: int) -> torch.Size:
    """The shape of a weight. Raises ValueError if it is missing or does not have `ndim` dimensions."""
    if name not in weights:
        raise ValueError(f"The weights lack what becomes `{name}`.")
    if weights[name].ndim != ndim:
        raise ValueError(f"What becomes `{name}` has {weights[name].ndim} dimensions; it takes {ndim}.")
    return weights[name].shape


def count_layers(weights: Weights, prefix: str) -> int:
    """The number of layers whose weights have names of the form `prefix` + index + ..."""
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def derive_patches(weights: Weights) -> dict:
    """The fields of the configuration for the patch embedding. Raises ValueError if the patches are not square."""
    convolutions = [tensor for name, tensor in weights.items() if name.startswith(STEM) and tensor.ndim == 4]
    if f"{STEM}.layers.0.weight" in weights:
        kind, patch_size = "conv_stem", 2 ** len(convolutions)
        num_channels = shape_of(weights, f"{STEM}.layers.0.weight", 4)[1]
    elif convolutions:
        kind = "linear"
        _, num_channels, patch_size, patch_width = shape_of(weights, f"{STEM}.projection.weight", 4)
        if patch_size != patch_width:
            raise ValueError(f"The patches are {patch_size} x {patch_width} pixels; a CBSA model takes square ones.")
    else:
        kind, num_channels = "patchify", 3
        patch_size = math.isqrt(shape_of(weights, f"{STEM}.projection.weight", 2)[1] // num_channels)
    return {"patch_embedding_type": kind, "patch_size": patch_size, "num_channels": num_channels}


def derive_image_size(num_patches: int, patch_size: int) -> int:
    """Side of the square image that was trained with, in pixels. Raises ValueError if the patches make no square."""
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise ValueError(f"There are positions for CLS and {num_patches} patches, which make no square.")
    return side * patch_size


def derive_num_heads(weights: Weights, hidden_size: int) -> int:
    """
    Number of heads, from a weight that has one entry for each head, else from the published models of that width.

    Raises:
        ValueError: neither tells the number.
    """
    steps = weights.get(f"{ATTENTION}.step_rep", weights.get(f"{ATTENTION}.temp"))
    if steps is not None:
        return len(steps)
    if hidden_size not in PUBLISHED_HEADS:
        raise ValueError(
            f"The weights do not tell the number of heads, and no published model is {hidden_size} wide; "
            "give it with --num-heads."
        )
    return PUBLISHED_HEADS[hidden_size]


def derive_head_dim(weights: Weights, num_heads: int) -> int:
    """Width of one head. Raises ValueError if the heads do not divide the width of the attention."""
    projection = "q_proj" if f"{ATTENTION}.q_proj.weight" in weights else "proj"
    inner_size = shape_of(weights, f"{ATTENTION}.{projection}.weight", 2)[0]
    if inner_size % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the attention's width of {inner_size}.")
    return inner_size // num_heads


def derive_decoder(weights: Weights, decoder_type: str, num_heads: int) -> dict:
    """The fields of the configuration for the decoder of a segmenter; `num_heads` is that of the encoder."""
    attention = "decoder.layers.0.attention"
    values = {
        "decoder_type": decoder_type,
        "num_labels": shape_of(weights, "decoder.class_embeddings", 3)[1],
        "decoder_num_layers": count_layers(weights, "decoder.layers."),
        "decoder_num_heads": num_heads,  # the same in all published models
        "position_interpolation": "bilinear",  # as in the training of the published segmenters
    }
    if f"{attention}.step_rep" in weights:
        num_heads = len(weights[f"{attention}.step_rep"])
        inner_size = shape_of(weights, f"{attention}.proj.weight", 2)[0]
        values |= {"decoder_num_heads": num_heads, "decoder_head_dim": inner_size // num_heads}
    return values


def derive_feed_forward(weights: Weights) -> dict:
    """The fields of the configuration for the feed-forward block, by the weights of the first layer."""
    feed_forward = "cbsa.layers.0.feed_forward"
    if f"{feed_forward}.dictionary" in weights:
        return {"feed_forward_type": "odl", "intermediate_size": shape_of(weights, f"{feed_forward}.dictionary", 2)[1]}
    if f"{feed_forward}.weight" in weights:
        return {"feed_forward_type": "ista"}
    return {"feed_forward_type": "mlp", "intermediate_size": shape_of(weights, f"{feed_forward}.fc1.weight", 2)[0]}


def derive_labels(weights: Weights, source_config: PreTrainedConfig | None) -> dict:
    """The fields of the configuration for the classes of a classifier; none without a classifier."""
    if "classifier.weight" not in weights:
        return {}
    if source_config is not None:
        return {"id2label": source_config.id2label, "label2id": source_config.label2id}
    return {"num_labels": shape_of(weights, "classifier.weight", 2)[0]}


def derive_config(
    weights: Weights,
    origin: str,
    attention_type: str,
    num_heads: int | None = None,
    source_config: PreTrainedConfig | None = None,
) -> CBSAConfig:
    """
    The configuration of weights that have our names, from their shapes.

    Args:
        weights: name -> tensor.
        origin: a name in `ORIGINS`.
        attention_type: of all layers.
        num_heads: number of heads; by default what `source_config` says, else [`derive_num_heads`].
        source_config: the configuration that the weights came with, if any.

    Raises:
        ValueError: the shapes do not tell a size, or no CBSA model has such sizes.
    """
    hidden_size = shape_of(weights, f"{EMBEDDINGS}.cls_token", 3)[-1]
    num_patches = shape_of(weights, f"{EMBEDDINGS}.position_embeddings", 3)[1] - 1
    values = derive_patches(weights) | derive_labels(weights, source_config)
    if f"{EMBEDDINGS}.register_tokens" in weights:
        values["num_register_tokens"] = shape_of(weights, f"{EMBEDDINGS}.register_tokens", 3)[1]
    if source_config is None:
        values["image_size"] = derive_image_size(num_patches, values["patch_size"])
        num_heads = num_heads or derive_num_heads(weights, hidden_size)
    else:
        values["image_size"] = source_config.image_size
        num_heads = num_heads or source_config.num_attention_heads
    values["head_dim"] = derive_head_dim(weights, num_heads)
    values |= derive_feed_forward(weights)
    if attention_type == "cbsa":
        values["base_num_patches"] = num_patches  # the size of the training, where the size factor is 1
    if origin == "cbt":
        values["pooled_tokens"] = "all_but_last"  # as in the training of the published models
    if ORIGINS[origin].decoder_type is not None:
        values |= derive_decoder(weights, ORIGINS[origin].decoder_type, num_heads)
        values["decoder_base_num_patches"] = values.get("base_num_patches")
    try:
        return CBSAConfig(
            hidden_size=hidden_size,
            num_hidden_layers=count_layers(weights, "cbsa.layers."),
            num_attention_heads=num_heads,
            attention_type=attention_type,
            layer_norm_eps=ORIGINS[origin].layer_norm_eps or source_config.layer_norm_eps,
            final_layer_norm_eps=ORIGINS[origin].final_layer_norm_eps,
            **values,
        )
    except StrictDataclassError as error:
        raise ValueError(f"No CBSA model has such sizes: {error.__cause__}") from error
