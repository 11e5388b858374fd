"""
One pass of the encoder over a photo, and everything that is read from it: [`encode`] returns an [`Encoding`].

The model that is given may be wrapped, in half precision or in training. It is left as it is: the pass runs in a copy
in evaluation mode that shares its weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


def check_outputs(outputs: torch.Tensor):
    """Raises ValueError if a model's outputs are not finite numbers: no picture is drawn from such outputs."""
    if not outputs.isfinite().all():
        raise ValueError(
            "The model's outputs are not finite numbers: its weights are damaged, or overflow in their dtype."
        )


def unwrap(model: nn.Module) -> nn.Module:
    """
    The Transformers model inside the wrappers of PEFT, `torch.compile`, `torch.nn.DataParallel` and others; a module
    without one inside is returned as it is. Adapters inside the layers stay in place.
    """
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """
    A copy of the model that shares its weights, in evaluation mode and without gradients. The model itself does not
    change, so other threads may train it at the same time.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():  # `torch.nn.utils.prune`, for one, stores weights as plain attributes
        tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    copy = deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    for module in copy.modules():
        if isinstance(module, PreTrainedModel):
            module.config.return_dict = True  # outputs are read by name
    with torch.no_grad():
        yield copy


@contextmanager
def eval_encoder(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The encoder of a model with any head, as a copy that [`evaluating`] makes."""
    with evaluating(unwrap(model)) as copy:
        yield copy.base_model


def check_encoder(model: nn.Module):
    """Raises ValueError if the model's encoder is a backbone of another library, whose layers are unknown here."""
    backbone = getattr(unwrap(model).config, "backbone_config", None)
    if backbone is not None:
        raise ValueError(f"This segmenter has a backbone of type {backbone.model_type!r}; only CBSA encoders open up.")


def layer_operators(model: nn.Module) -> list[nn.Module]:
    """
    The attention operator of every layer of the encoder, without the adapters around it. Operators are recognised by
    an attribute of their class, because the classes of remote code are not those of this package.

    Raises:
        ValueError: the encoder is a backbone of another library.
    """
    check_encoder(model)
    layers = unwrap(model).base_model.applied_layers
    return [next(m for m in layer.modules() if hasattr(type(m), "map_is_gram")) for layer in layers]


def patch_grid(model: nn.Module, pixel_values: torch.Tensor) -> tuple[int, int]:
    """
    (height, width) of the grid of patches of an input (batch, channels, height, width).

    Raises:
        ValueError: the encoder is a backbone of another library, or the input has another shape.
    """
    check_encoder(model)
    if pixel_values.ndim != 4:
        shape = tuple(pixel_values.shape)
        raise ValueError(f"`pixel_values` has the shape {shape}; give (batch, channels, height, width).")
    return unwrap(model).config.patch_grid(*pixel_values.shape[2:])


def token_index(grid: tuple[int, int], patch: tuple[int, int] | None, num_prefix_tokens: int = 1) -> int:
    """
    Index of a patch's token in the sequence of tokens.

    Args:
        grid: (height, width) of the grid of patches.
        patch: (row, column) in the grid, or None for CLS.
        num_prefix_tokens: number of tokens before the patches, CLS and the registers.

    Raises:
        ValueError: `patch` lies outside the grid.
    """
    if patch is None:
        return 0
    if 0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]:
        return num_prefix_tokens + patch[0] * grid[1] + patch[1]
    raise ValueError(
        f"Patch {tuple(patch)} lies outside the grid of {grid[0]} x {grid[1]} patches; rows and columns count from 0."
    )


def in_single_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, with half precision converted to float32, since NumPy has no bfloat16."""
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))


@dataclass
class RecordedSteps:
    """
    What one `cbsa` operator computed in the pass, together with its weights at that moment: adapters may change them
    while the operator runs, and only then.

    Args:
        steps: the `ContractionSteps` that the operator's `steps` returned.
        step_rep: (heads, 1, 1), eta: the step size of the representatives.
        kappa: (heads, 1, 1), the step size of the broadcast, times the factor N / N0 of the image's size.
    """

    steps: object
    step_rep: torch.Tensor
    kappa: torch.Tensor


@dataclass
class Encoding:
    """
    What one pass of an encoder computed for one or more photos of the same size. Tensors have the device and the dtype
    of the model. N is the number of all tokens: CLS, the registers, and the patches row by row.

    Args:
        encoder: the encoder in evaluation mode, a copy that shares the model's weights.
        pixel_values: (batch, channels, height, width), the input.
        grid: (height, width) of the grid of patches.
        tokens: (batch, N, hidden_size), the tokens after the final LayerNorm.
        hidden_states: the tokens before the first layer and after each layer, each (batch, N, hidden_size); None
            unless asked for.
        attended_states: of each layer the tokens between the attention step and the feed-forward block, each (batch,
            N, hidden_size); None unless asked for.
        attentions: of each layer the token-to-token map (batch, heads, N, N), or None where
            `representative_attentions` imply it; None unless asked for.
        representative_attentions: of each layer A (batch, heads, m, N), or None where the operator has
            none; None unless asked for.
        recorded: layer -> [`RecordedSteps`], of the layers asked for whose attention type is `cbsa`.
    """

    encoder: PreTrainedModel
    pixel_values: torch.Tensor
    grid: tuple[int, int]
    tokens: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attended_states: list[torch.Tensor] | None
    attentions: list[torch.Tensor | None] | None
    representative_attentions: list[torch.Tensor | None] | None
    recorded: dict[int, RecordedSteps]

    @property
    def num_prefix_tokens(self) -> int:
        """Number of the tokens before the patches (CLS and the registers)."""
        return self.encoder.num_prefix_tokens

    @property
    def patches(self) -> torch.Tensor:
        """(batch, grid height, grid width, hidden_size), the patches after the final LayerNorm."""
        return self.tokens[:, self.num_prefix_tokens :].unflatten(1, self.grid)

    def steps(self, layer: int):
        """The `ContractionSteps` of a layer of type `cbsa`. Raises KeyError if they were not asked for."""
        return self.recorded[layer].steps

    def attention_maps(self, patch: tuple[int, int] | None = None) -> torch.Tensor:
        """
        The row of one token in the token-to-token map of every layer and head.

        Where the map is `A^T A` the row is `a^T A`, a the token's column of A: it takes time linear in N.

        Args:
            patch: (row, column) of the patch whose row is returned; None for CLS.

        Returns:
            (layers, batch, heads, grid height, grid width), not negative, on the CPU.

        Raises:
            ValueError: `patch` lies outside the grid, or the attention is not finite.
        """
        token = token_index(self.grid, patch, self.num_prefix_tokens)
        rows = []
        for token_map, attention in zip(self.attentions, self.representative_attentions, strict=True):
            if token_map is None:
                rows.append((attention[..., token].unsqueeze(-2) @ attention).squeeze(-2))
            else:
                rows.append(token_map[:, :, token])
        maps = in_single_precision(torch.stack(rows)[..., self.num_prefix_tokens :].unflatten(-1, self.grid))
        check_outputs(maps)
        return maps


@contextmanager
def recording_steps(encoder: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, RecordedSteps]]:
    """
    A dictionary that the encoder's next pass fills with the [`RecordedSteps`] of these layers. The operators' `steps`
    are replaced meanwhile, in the encoder given, which has to be a copy of [`eval_encoder`].
    """
    recorded, layers = {}, set(layers)
    uses = {}  # operator -> the layers that use it, in their order: several if they share weights
    for layer, applied in enumerate(encoder.applied_layers):
        for module in applied.modules():
            if hasattr(type(module), "steps"):
                uses.setdefault(module, []).append(layer)

    def replace(operator: nn.Module, users: Iterator[int]):
        compute = operator.steps

        def steps(hidden_states: torch.Tensor, grid: tuple[int, int]):
            found = compute(hidden_states, grid)
            layer = next(users)
            if layer in layers:
                kappa = operator.step_x * operator.size_factor(grid)
                recorded[layer] = RecordedSteps(found, operator.step_rep.detach(), kappa)
            return found

        operator.steps = steps

    replaced = [operator for operator, users in uses.items() if layers.intersection(users)]
    for operator in replaced:
        replace(operator, iter(uses[operator]))
    try:
        yield recorded
    finally:
        for operator in replaced:
            del operator.steps


@contextmanager
def recording_attended_states(encoder: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """A list to which the encoder's next pass adds each layer's tokens behind the attention step."""
    found = []
    handles = [
        layer.layernorm_after.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        for layer in encoder.layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def encode(
    model: nn.Module,
    pixel_values: torch.Tensor,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    steps_of: Iterable[int] = (),
) -> Encoding:
    """
    Run the encoder once. Only what is asked for is kept.

    Args:
        model: a CBSA model with any head, as it is or wrapped, see [`unwrap`].
        pixel_values: (batch, channels, height, width), normalised, of any size of at least one patch a side.
        output_hidden_states: keep `hidden_states` and `attended_states`.
        output_attentions: keep `representative_attentions`, and `attentions` of the layers whose map is not `A^T A`.
        steps_of: the layers, counted from 0, whose steps are kept if their attention type is `cbsa`.

    Raises:
        ValueError: the encoder is a backbone of another library, or its outputs are not finite.
    """
    grid = patch_grid(model, pixel_values)
    operators = layer_operators(model)
    needs_maps = not all(operator.map_is_gram for operator in operators)
    has_representatives = any(operator.has_representative_attentions for operator in operators)
    with ExitStack() as stack:
        encoder = stack.enter_context(eval_encoder(model))
        recorded = stack.enter_context(recording_steps(encoder, steps_of))
        attended = stack.enter_context(recording_attended_states(encoder)) if output_hidden_states else None
        outputs = encoder(
            pixel_values.to(encoder.device),
            interpolate_pos_encoding=True,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions and needs_maps,
            output_representative_attentions=output_attentions and has_representatives,
        )
    check_outputs(outputs.last_hidden_state)
    absent = [None] * len(operators)
    maps = outputs.attentions or absent
    maps = [None if operator.map_is_gram else found for operator, found in zip(operators, maps, strict=True)]
    return Encoding(
        encoder=encoder,
        pixel_values=pixel_values,
        grid=grid,
        tokens=outputs.last_hidden_state,
        hidden_states=outputs.hidden_states,
        attended_states=attended,
        attentions=maps if output_attentions else None,
        representative_attentions=list(outputs.representative_attentions or absent) if output_attentions else None,
        recorded=recorded,
    )


def classify(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor | None:
    """
    Class probabilities of tokens by a model's classifier.

    Args:
        model: a CBSA model with any head, as it is or wrapped.
        tokens: (n, hidden_size), after the final LayerNorm: CLS, or patches and their means.

    Returns:
        (n, num_labels) in float32; None if the model has no classifier, or one of a single label: Transformers treats
        that as a regression, which has no probabilities.
    """
    model = unwrap(model)
    if not hasattr(model, "classifier") or model.config.num_labels < 2:
        return None
    with evaluating(model.classifier) as classifier:
        return classifier(tokens.to(model.device, model.dtype)).float().softmax(-1)
