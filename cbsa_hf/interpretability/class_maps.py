"""Which patches speak for a class: the attention of every layer, weighted by the gradient of the class's logit."""

import torch
from transformers import PreTrainedModel

from ..segmentation.inference import (
    check_outputs,
    evaluating,
    in_single_precision,
    layer_operators,
    patch_grid,
    unwrap,
)


def class_attention_maps(
    model: PreTrainedModel, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """
    How much the attention to each patch raises the logit of a class, in each layer and head: the positive part of the
    attention times its gradient (arXiv 2103.15679), summed over all that attend to the patch.

    The attention is A, (m, tokens), where the token-to-token map is `A^T A` (`cbsa`, `linear`), and else that map. For
    `cbsa` the gradient with respect to A has both uses of A: the representatives read the tokens, and write to them.

    Args:
        model: a CBSA classifier, wrapped or not. It stays as it is, and its parameters get no gradients.
        pixel_values: (batch, channels, height, width) of any size.
        labels: (batch,) class indices; by default the class with the largest logit.

    Returns:
        (layers, batch, heads, grid height, grid width), in units of the logit, not negative.

    Raises:
        ValueError: the model has no classifier; a layer's update uses no attention (`tssa`); `labels` do not fit the
            images or the classes; or the outputs are not finite.
    """
    grid = patch_grid(model, pixel_values)
    operators = layer_operators(model)
    for name, operator in zip(unwrap(model).config.layer_attention_types, operators, strict=True):
        if not (operator.map_is_gram or operator.map_is_exact):
            raise ValueError(
                f"Attention type {name!r} makes its update without a map, so the logits have no gradient with respect "
                "to one."
            )
    with evaluating(unwrap(model)) as copy, torch.enable_grad():
        if not hasattr(copy, "classifier"):
            raise ValueError(f"A {type(copy).__name__} has no logits of an image; give a classifier.")
        is_gram = [operator.map_is_gram for operator in operators]
        outputs = copy(
            pixel_values.detach().to(copy.device).requires_grad_(),  # a graph also where all parameters are frozen
            interpolate_pos_encoding=True,
            output_representative_attentions=any(is_gram),
            output_attentions=not all(is_gram),
        )
        labels = outputs.logits.argmax(-1) if labels is None else labels.to(outputs.logits.device)
        num_images, num_labels = outputs.logits.shape
        if labels.shape != (num_images,) or labels.is_floating_point() or not all(0 <= k < num_labels for k in labels):
            raise ValueError(
                f"`labels` is {labels.tolist()}; give the index of a class, from 0 to {num_labels - 1}, for each of "
                f"the {num_images} images."
            )
        attentions = [
            (outputs.representative_attentions if gram else outputs.attentions)[index]
            for index, gram in enumerate(is_gram)
        ]
        gradients = torch.autograd.grad(outputs.logits.gather(1, labels.unsqueeze(1)).sum(), attentions)
    maps = [(a.detach() * g).clamp_min(0).sum(2) for a, g in zip(attentions, gradients, strict=True)]
    num_prefix_tokens = maps[0].shape[-1] - grid[0] * grid[1]
    maps = in_single_precision(torch.stack(maps)[..., num_prefix_tokens:].unflatten(-1, grid))
    check_outputs(maps)
    return maps
