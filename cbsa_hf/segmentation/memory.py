"""Estimate how much memory an image takes, before it is processed."""

import math

import numpy as np
from torch import nn

from .inference import layer_operators, unwrap


MAX_MEMORY = 4 * 10**9  # bytes beyond those of the model


def encoder_memory(model: nn.Module, size: tuple[int, int]) -> float:
    """
    An upper bound of the bytes that an encoder takes for one image, with the attention of all layers: 32 times the
    tokens, which was measured, and the attention itself. That has one column for each representative if the map of
    every layer is `A^T A`, else one for each patch.

    Args:
        model: a CBSA model with any head.
        size: (height, width) of the input in pixels.
    """
    config = unwrap(model).config
    num_patches = math.prod(side // config.patch_size for side in size)
    maps_are_gram = all(operator.map_is_gram for operator in layer_operators(model))
    columns = math.prod(np.broadcast_to(config.representatives_size, 2).tolist()) if maps_are_gram else num_patches
    per_patch = 32 * config.hidden_size + config.num_hidden_layers * config.num_attention_heads * columns
    return 4.0 * num_patches * per_patch


def check_memory(estimate: float, what: str, remedy: str, max_memory: float):
    """Raises ValueError if `estimate` is above `max_memory` bytes; `what` and `remedy` are parts of the message."""
    if estimate > max_memory:
        raise ValueError(
            f"{what} would take about {estimate / 1e9:.1f} GB of memory, and the limit is {max_memory / 1e9:g} GB; "
            f"{remedy}, or raise `max_memory` (`--max-memory`)."
        )


def check_input(model: nn.Module, size: tuple[int, int], max_memory: float, share: float = 1.0):
    """Raises ValueError if `share` times [`encoder_memory`] is above `max_memory`."""
    what = f"Showing the model {size[1]} x {size[0]} pixels"
    check_memory(share * encoder_memory(model, size), what, "lower `long_side` (`--long-side`)", max_memory)
