"""
Inference with many tokens: one layer in tiles of tokens that fit the cache, in memory for two copies of the tokens.

A softmax over all tokens is not known before the last tile, so a first pass over the tiles gathers the representatives
with a running maximum and sum, and a second one computes the weights again and broadcasts.
"""

import torch
from torch import nn


MIN_TOKENS = 2**14  # of an image; with fewer, all at once is as fast
TILE_VALUES = 2**18  # of a tile of tokens: 1 MiB in float32


def is_watched(layer: nn.Module) -> bool:
    """Whether something inside a layer has a hook, or an operator's `steps` were replaced to record them."""
    for module in layer.modules():
        # torch has no public list of a module's hooks.
        hooks = [] if module is layer else [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # The hooks with which Transformers captures outputs do nothing when none are asked for.
        if any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks) or "steps" in vars(module):
            return True
    return False


def layer_in_tiles(layer: nn.Module, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    What `CBSALayer.forward` computes, without a gradient, for a layer whose attention type is `cbsa`.

    Args:
        layer: a `CBSALayer`, not in training.
        hidden_states: (batch, N, d).
        grid: (height, width) of the patches among the tokens.

    Returns:
        (batch, N, d)
    """
    attention, feed_forward = layer.attention, layer.feed_forward.prepare()
    batch_size, num_tokens, hidden_size = hidden_states.shape
    length = max(TILE_VALUES // (batch_size * hidden_size), 1)
    tiles = [slice(start, start + length) for start in range(0, num_tokens, length)]

    output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    inner_size = attention.num_heads * attention.head_dim
    # The output's memory holds the projected tokens until the second pass replaces them.
    projected = output if inner_size == hidden_size else hidden_states.new_empty(batch_size, num_tokens, inner_size)
    for tile in tiles:
        projected[:, tile] = attention.proj(layer.layernorm_before(hidden_states[:, tile]))

    initial_representatives = attention.representatives(attention.split_heads(projected), grid)
    queries = initial_representatives * attention.scaling
    peak, total, gathered = float("-inf"), 0.0, 0.0
    for tile in tiles:
        tokens = attention.split_heads(projected[:, tile]).contiguous()
        scores = queries @ tokens.transpose(2, 3)  # (batch, h, m, tokens of the tile)
        new_peak = scores.amax(-1, keepdim=True).clamp(min=peak)
        weights = scores.sub_(new_peak).exp_()
        shrinkage = (peak - new_peak).exp()
        total = shrinkage * total + weights.sum(-1, keepdim=True)
        gathered = shrinkage * gathered + weights @ tokens
        peak = new_peak

    representatives = initial_representatives + attention.step_rep * (gathered / total)
    contracted = attention.attend(representatives, representatives) @ representatives
    values = attention.step_size(grid) * contracted / total
    for tile in tiles:
        tokens = attention.split_heads(projected[:, tile])
        weights = (queries @ tokens.transpose(2, 3)).sub_(peak).exp_()
        states = hidden_states[:, tile] + attention.merge_heads(weights.transpose(2, 3) @ values)
        update = feed_forward(layer.layernorm_after(states))
        output[:, tile] = states + update if layer.has_skip else update
    return output
