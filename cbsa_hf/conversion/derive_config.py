"""The configuration of weights that were renamed to our names, derived from their shapes."""

import math
from functools import partial

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..configuration_cbsa import CBSAConfig
from .key_mappings import ORIGINS


# Heads by width in the published models. They leave no trace in the shapes of q, k and v, and 64 a head, the usual
# rule, is wrong for CRATE small (576) and ViT huge (1280).
PUBLISHED_HEADS = {192: 3, 384: 6, 576: 12, 768: 12, 1024: 16, 1280: 16}


def shape_of(weights: dict[str, torch.Tensor], name: str, ndim: int) -> torch.Size:
    """A ValueError when there is no weight of that name with so many dimensions."""
    if name not in weights:
        raise ValueError(f"The weights lack what becomes `{name}`.")
    if weights[name].ndim != ndim:
        raise ValueError(f"What becomes `{name}` has {weights[name].ndim} dimensions; it takes {ndim}.")
    return weights[name].shape


def count_layers(weights: dict[str, torch.Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def derive_decoder(weights: dict[str, torch.Tensor], decoder_type: str, num_heads: int) -> dict:
    """What the configuration says of a segmenter's decoder; `num_heads` is that of the encoder."""
    attention = "decoder.layers.0.attention"
    values = {
        "decoder_type": decoder_type,
        "num_labels": shape_of(weights, "decoder.class_embeddings", 3)[1],
        "decoder_num_layers": count_layers(weights, "decoder.layers."),
        "decoder_num_heads": num_heads,  # the same in all published models
        "position_interpolation": "bilinear",  # as trained
    }
    if f"{attention}.step_rep" in weights:
        num_heads = len(weights[f"{attention}.step_rep"])
        inner_size = shape_of(weights, f"{attention}.proj.weight", 2)[0]
        values |= {"decoder_num_heads": num_heads, "decoder_head_dim": inner_size // num_heads}
    return values


def derive_config(
    weights: dict[str, torch.Tensor],
    origin: str,
    attention_type: str,
    num_heads: int | None = None,
    source_config: PreTrainedConfig | None = None,
) -> CBSAConfig:
    """
    Configuration of weights that have our names, from their shapes.

    Args:
        num_heads: where the weights do not tell; by default what `source_config` says, else the published models.
        source_config: the configuration at the origin, if it has any.

    Raises:
        ValueError: sizes that cannot be told from the weights.
    """

    shape = partial(shape_of, weights)
    hidden_size = shape("cbsa.embeddings.cls_token", 3)[-1]
    stem = "cbsa.embeddings.patch_embeddings"
    convolutions = [tensor for name, tensor in weights.items() if name.startswith(stem) and tensor.ndim == 4]
    if f"{stem}.layers.0.weight" in weights:
        patch_embedding_type, patch_size = "conv_stem", 2 ** len(convolutions)
        num_channels = shape(f"{stem}.layers.0.weight", 4)[1]
    elif convolutions:
        patch_embedding_type = "linear"
        _, num_channels, patch_size, patch_width = shape(f"{stem}.projection.weight", 4)
        if patch_size != patch_width:
            raise ValueError(f"The patches are {patch_size} x {patch_width} pixels; a CBSA model takes square ones.")
    else:
        patch_embedding_type, num_channels = "patchify", 3
        patch_size = math.isqrt(shape(f"{stem}.projection.weight", 2)[1] // num_channels)

    num_patches = shape("cbsa.embeddings.position_embeddings", 3)[1] - 1
    side = math.isqrt(num_patches)
    if source_config is not None:
        image_size = source_config.image_size
    elif side**2 == num_patches:
        image_size = side * patch_size
    else:
        raise ValueError(f"There are positions for CLS and {num_patches} patches, which make no square.")

    attention = "cbsa.layers.0.attention"
    steps = weights.get(f"{attention}.step_rep", weights.get(f"{attention}.temp"))
    if num_heads is None and source_config is not None:
        num_heads = source_config.num_attention_heads
    elif num_heads is None:
        num_heads = PUBLISHED_HEADS.get(hidden_size) if steps is None else len(steps)
    if num_heads is None:
        raise ValueError(
            f"The weights do not tell the number of heads, and no published model is {hidden_size} wide; "
            "give it with --num-heads."
        )
    projection = "q_proj" if f"{attention}.q_proj.weight" in weights else "proj"
    inner_size = shape(f"{attention}.{projection}.weight", 2)[0]
    if inner_size % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the attention's width of {inner_size}.")

    values = {}
    if "cbsa.layers.0.feed_forward.dictionary" in weights:
        values["feed_forward_type"] = "odl"
        values["intermediate_size"] = shape("cbsa.layers.0.feed_forward.dictionary", 2)[1]
    elif "cbsa.layers.0.feed_forward.weight" not in weights:
        values["feed_forward_type"] = "mlp"
        values["intermediate_size"] = shape("cbsa.layers.0.feed_forward.fc1.weight", 2)[0]
    if attention_type == "cbsa":
        values["base_num_patches"] = num_patches  # as trained, where N / N0 is 1
    if origin == "cbt":
        values["pooled_tokens"] = "all_but_last"  # as trained
    if "classifier.weight" in weights and source_config is not None:
        values |= {"id2label": source_config.id2label, "label2id": source_config.label2id}
    elif "classifier.weight" in weights:
        values["num_labels"] = shape("classifier.weight", 2)[0]
    if ORIGINS[origin].decoder_type is not None:
        values |= derive_decoder(weights, ORIGINS[origin].decoder_type, num_heads)
        values["decoder_base_num_patches"] = values.get("base_num_patches")
    try:
        return CBSAConfig(
            hidden_size=hidden_size,
            num_hidden_layers=count_layers(weights, "cbsa.layers."),
            num_attention_heads=num_heads,
            head_dim=inner_size // num_heads,
            attention_type=attention_type,
            patch_embedding_type=patch_embedding_type,
            image_size=image_size,
            patch_size=patch_size,
            num_channels=num_channels,
            layer_norm_eps=ORIGINS[origin].layer_norm_eps or source_config.layer_norm_eps,
            final_layer_norm_eps=ORIGINS[origin].final_layer_norm_eps,
            **values,
        )
    except StrictDataclassError as error:
        raise ValueError(f"No CBSA model has such sizes: {error.__cause__}") from error
