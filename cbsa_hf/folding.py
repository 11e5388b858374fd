"""Folding for inference: norms, step sizes and the product of ISTA become part of the weights around them."""

from copy import deepcopy
from functools import singledispatch

import torch
from torch import nn

from .attention_cbsa import ContractAndBroadcastSelfAttention, SelfAttention, SoftmaxSelfAttention
from .mask_decoder_cbsa import MaskDecoderLayer
from .modeling_cbsa import CBSAISTA, CBSAODL, CBSAConvStem, CBSALayer, CBSAPatchify, CBSAPreTrainedModel, ista_product


Weights = dict[str, torch.Tensor]  # of one module, by the names that they have in it


def fold_norm(weights: Weights, norm: str, *layers: str):
    """Moves scale and shift of a norm into the linear layers that it feeds."""
    scale, shift = weights.pop(f"{norm}.weight"), weights.pop(f"{norm}.bias")
    for layer in layers:
        matrix = weights[f"{layer}.weight"]
        weights[f"{layer}.bias"] = weights.get(f"{layer}.bias", 0) + matrix @ shift
        weights[f"{layer}.weight"] = matrix * scale


def fold_attention(module: SelfAttention, weights: Weights):
    """The norm goes into the projections, and CBSA's last step into the output layer."""
    names = ("q_proj", "k_proj", "v_proj") if isinstance(module, SoftmaxSelfAttention) else ("proj",)
    fold_norm(weights, "layernorm_before", *(f"attention.{name}" for name in names))
    if isinstance(module, ContractAndBroadcastSelfAttention):
        steps = weights["attention.step_x"].flatten()
        matrix = weights["attention.out_proj.weight"]
        weights["attention.out_proj.weight"] = matrix * steps.repeat_interleave(matrix.shape[1] // len(steps))


@singledispatch
def fold_module(module: nn.Module, weights: Weights):
    """Changes the weights of that module from those of a model as it was trained to those of a folded one."""


@fold_module.register
def _(module: CBSAConvStem, weights: Weights):
    for index, layer in enumerate(module.layers):
        if isinstance(layer, nn.BatchNorm2d):
            scale, shift, mean, variance = (
                weights.pop(f"layers.{index}.{name}") for name in ("weight", "bias", "running_mean", "running_var")
            )
            scale = scale * (variance + layer.eps).rsqrt()
            convolution = f"layers.{index - 1}"
            weights[f"{convolution}.weight"] = weights[f"{convolution}.weight"] * scale.view(-1, 1, 1, 1)
            weights[f"{convolution}.bias"] = shift - mean * scale


@fold_module.register
def _(module: CBSAPatchify, weights: Weights):
    fold_norm(weights, "layernorm_before", "projection")


@fold_module.register
def _(module: CBSALayer, weights: Weights):
    fold_attention(module.attention, weights)
    if isinstance(module.feed_forward, CBSAISTA):
        dictionary, ista = weights["feed_forward.weight"], module.feed_forward
        weights["feed_forward.weight"], weights["feed_forward.bias"] = ista_product(
            dictionary, ista.step_size, ista.threshold
        )
        fold_norm(weights, "layernorm_after", "feed_forward")
    elif isinstance(module.feed_forward, CBSAODL):
        dictionary = weights["feed_forward.dictionary"]
        step, threshold = module.feed_forward.step_size, module.feed_forward.threshold
        weights["feed_forward.in_proj.weight"] = step * dictionary.T
        weights["feed_forward.in_proj.bias"] = dictionary.new_full((dictionary.shape[1],), -step * threshold)
        fold_norm(weights, "layernorm_after", "feed_forward.in_proj")
    elif module.feed_forward.has_norm:
        fold_norm(weights, "layernorm_after", "feed_forward.fc1")


@fold_module.register
def _(module: MaskDecoderLayer, weights: Weights):
    fold_attention(module.attention, weights)
    if module.has_mlp:
        fold_norm(weights, "layernorm_after", "feed_forward.fc1")


@torch.no_grad()
def fold(model: CBSAPreTrainedModel) -> CBSAPreTrainedModel:
    """
    A model that computes the same with fewer operations: batch norm goes into the convolutions, scale and shift of the
    norms before attention and feed-forward go into the layers after them, `step_x` goes into the output layer, and
    ISTA becomes one product. Outputs and maps are the same but for rounding.

    It is of the same class, with `config.folded`, so it is saved, opened and exported like any other. It is for
    inference: `train()` raises a ValueError, and no parameter requires a gradient. The final norm stays, and so does a
    backbone of another library.

    Args:
        model: of any of this library's classes, in any mode; it stays as it is.

    Raises:
        ValueError: if the model is of another class, such as one that PEFT or a compiler has wrapped.

    Example:

    ```python
    model, processor = cbsa_hf.load_checkpoint()
    folded = cbsa_hf.fold(model)
    folded.save_pretrained("folded")
    ```
    """
    if not isinstance(model, CBSAPreTrainedModel):
        raise ValueError(
            f"A {type(model).__name__} cannot be folded; give the model that it wraps, its adapters merged."
        )
    if model.config.folded:
        return model
    weights = {name: tensor.cpu().double() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if fold_module.dispatch(type(module)) is not fold_module.dispatch(object):
            prefix = f"{name}."
            own = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
            fold_module(module, own)
            weights |= {prefix + key: tensor for key, tensor in own.items()}
    config = deepcopy(model.config)
    config.folded = True
    folded = type(model)(config).to(model.device, model.dtype)
    folded.load_state_dict({name: weights[name] for name in folded.state_dict()})
    return folded.requires_grad_(False).eval()


__all__ = ["fold"]
