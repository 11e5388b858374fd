"""What one image costs in memory, estimated before it is spent."""

import math

import numpy as np
from torch import nn

from .inference import layer_operators, unwrap


MAX_MEMORY = 4 * 10**9  # bytes beyond those of the model


def encoder_memory(model: nn.Module, size: tuple[int, int]) -> float:
    """
    Bytes that an encoder takes at most for one image of that (height, width), the attention of all layers returned: 32
    times its tokens, as measured, and the maps, which are over the representatives where no layer has others.
    """
    config = unwrap(model).config
    num_patches = math.prod(side // config.patch_size for side in size)
    maps_are_gram = all(operator.map_is_gram for operator in layer_operators(model))
    columns = math.prod(np.broadcast_to(config.representatives_size, 2).tolist()) if maps_are_gram else num_patches
    per_patch = 32 * config.hidden_size + config.num_hidden_layers * config.num_attention_heads * columns
    return 4.0 * num_patches * per_patch


def check_memory(estimate: float, what: str, remedy: str, max_memory: float):
    """A ValueError if that takes more than `max_memory` bytes."""
    if estimate > max_memory:
        raise ValueError(
            f"{what} would take about {estimate / 1e9:.1f} GB of memory, and the limit is {max_memory / 1e9:g} GB; "
            f"{remedy}, or raise `max_memory` (`--max-memory`)."
        )


def check_input(model: nn.Module, size: tuple[int, int], max_memory: float, share: float = 1.0):
    """A ValueError if what is done with an input of that (height, width) takes too much: `share` times the encoder."""
    what = f"Showing the model {size[1]} x {size[0]} pixels"
    check_memory(share * encoder_memory(model, size), what, "lower `long_side` (`--long-side`)", max_memory)
