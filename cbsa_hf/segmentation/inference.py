"""What a model computes for a photo, asked in evaluation mode and without gradients; the model stays as it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel


T = TypeVar("T")


def check_outputs(outputs: torch.Tensor):
    """A ValueError when a model's outputs are not finite: no picture and no number is made of them then."""
    if not outputs.isfinite().all():
        raise ValueError(
            "The model's outputs are not finite numbers: its weights are damaged, or overflow in their dtype."
        )


def unwrap(model: nn.Module) -> nn.Module:
    """
    The model of Transformers inside of what PEFT, `torch.compile`, `torch.nn.DataParallel` and the like make of one;
    any other module itself. Adapters are in its layers and stay there.
    """
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """
    A copy of the model in evaluation mode, without gradients, which shares its weights. The model itself is left as it
    is, so that other threads may train it meanwhile.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():  # such as the weights that `torch.nn.utils.prune` makes
        tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    copy = deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    for module in copy.modules():
        if isinstance(module, PreTrainedModel):
            module.config.return_dict = True  # what is measured is asked for by name
    with torch.no_grad():
        yield copy


@contextmanager
def eval_encoder(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The encoder of a model with any head, [`evaluating`]."""
    with evaluating(unwrap(model)) as copy:
        yield copy.base_model


def is_operator(module: nn.Module) -> bool:
    """Whether a module is an attention operator: by an attribute, since remote code has classes of its own."""
    return hasattr(type(module), "map_is_gram")


def check_encoder(model: nn.Module):
    """Raises ValueError if the model's encoder is a backbone of another library, whose layers are unknown here."""
    backbone = getattr(unwrap(model).config, "backbone_config", None)
    if backbone is not None:
        raise ValueError(f"This segmenter has a backbone of type {backbone.model_type!r}; only CBSA encoders open up.")


def operator_types(model: nn.Module) -> list[type[nn.Module]]:
    """The class of the operator of every layer of the encoder, whatever adapters are wrapped around it."""
    check_encoder(model)
    layers = unwrap(model).base_model.layers
    return [next(type(module) for module in layer.modules() if is_operator(module)) for layer in layers]


def observe_operators(
    encoder: PreTrainedModel, look: Callable[[nn.Module, torch.Tensor, tuple[int, int]], T]
) -> list[T]:
    """
    The list to which each operator, at work in the encoder's next pass, adds what `look` makes of the operator, its
    normalised tokens and their grid. Adapters around an operator have a say in its weights while it is at work only.

    Args:
        encoder: a copy that [`eval_encoder`] made, since it keeps the hooks.
        look: takes `operator.forward`, since calling the operator would observe it again.
    """
    found = []
    for module in encoder.layers.modules():
        if is_operator(module):
            module.register_forward_hook(lambda operator, args, output: found.append(look(operator, *args[:2])))
    return found


def in_single_precision(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, half precision as float32: NumPy knows no bfloat16."""
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))


def patch_grid(model: nn.Module, pixel_values: torch.Tensor) -> tuple[int, int]:
    """(height, width) of the patches of that input. Raises ValueError as [`check_encoder`] does."""
    check_encoder(model)
    return unwrap(model).config.patch_grid(*pixel_values.shape[2:])


def token_index(grid: tuple[int, int], patch: tuple[int, int] | None, num_prefix_tokens: int = 1) -> int:
    """
    Which token (row, column) of the patch grid is, None for CLS; a ValueError outside the grid. The patches stand
    behind CLS and the registers, `num_prefix_tokens` in all.
    """
    if patch is None:
        return 0
    if 0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]:
        return num_prefix_tokens + patch[0] * grid[1] + patch[1]
    raise ValueError(
        f"Patch {tuple(patch)} lies outside the grid of {grid[0]} x {grid[1]} patches; rows and columns count from 0."
    )


def attention_maps(
    model: PreTrainedModel, pixel_values: torch.Tensor, patch: tuple[int, int] | None = None
) -> torch.Tensor:
    """
    How strongly one token is tied to every patch: its row of the token-to-token map in each layer and head.

    Where that map is `A^T A`, the row is computed from the factor alone, `a^T A` with a the token's column: in time
    linear in the number of tokens. For other attention types the whole map is built. [`map_is_exact`] says whether the
    map is what the update is made with; for `cbsa` it is not, see [`exact_maps`].

    Args:
        model: a CBSA model with any head, as it is or in a wrapper, see [`unwrap`].
        pixel_values: (batch, channels, height, width) of any size.
        patch: (row, column) of the patch to ask; None asks CLS.

    Returns:
        (layers, batch, heads, grid height, grid width), not negative.

    Raises:
        ValueError: `patch` lies outside the grid, the model has another library's backbone, or its outputs are not
            finite.
    """
    grid = patch_grid(model, pixel_values)
    with eval_encoder(model) as encoder:
        token = token_index(grid, patch, encoder.num_prefix_tokens)
        is_gram = [operator.map_is_gram for operator in operator_types(encoder)]
        outputs = encoder(
            pixel_values.to(encoder.device),
            interpolate_pos_encoding=True,
            output_representative_attentions=any(is_gram),
            output_attentions=not all(is_gram),
        )
        rows = []
        for index, from_factor in enumerate(is_gram):
            if from_factor:
                factor = outputs.representative_attentions[index]  # (batch, heads, m, tokens)
                rows.append((factor[..., token].unsqueeze(-2) @ factor).squeeze(-2))
            else:
                rows.append(outputs.attentions[index][:, :, token])
        maps = in_single_precision(torch.stack(rows)[..., encoder.num_prefix_tokens :].unflatten(-1, grid))
    check_outputs(maps)
    return maps
