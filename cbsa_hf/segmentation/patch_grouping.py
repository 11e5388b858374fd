"""The methods of zero-shot segmentation: from a model and an image to groups of its patches, on their grid."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .inference import (
    attention_maps,
    check_outputs,
    eval_encoder,
    observe_operators,
    operator_types,
    patch_grid,
    unwrap,
)
from .spectral import Cut, cut_dense, cut_factored, k_means, landmark_factor, positions, stack_factors, visits


# Chosen on the images of COCO that scores are reported on; both halves of them gain, and near by they change little.
LANDMARKS = 8  # a side, as many as the representatives of the published models
TEMPERATURE = 0.1
LOCALITY = 2.0
SECOND_LOOK = 2 / 3  # of the size of the first
COMMON_SHARE = 0.5  # of what all patches have in common, which is taken away
COLOUR_WEIGHT = 0.25
FOREGROUND_VECTORS = 6
CENTRE_WEIGHT = 0.25
CLS_WEIGHT = 0.25
SMALLEST_SHARE = 1e-12  # of the attention of CLS or a representative, lest a patch has none at all


@dataclass
class Grouping:
    """
    Groups of the patches, on their grid (height, width).

    Args:
        members: (k, height, width), how much each patch belongs to each group.
        saliency: (height, width), how much each patch is foreground, which it is above 0.
        tokens: (height, width, hidden_size), the patches after the final LayerNorm.
    """

    members: torch.Tensor
    saliency: torch.Tensor
    tokens: torch.Tensor


def median_filter(maps: torch.Tensor, size: int) -> torch.Tensor:
    """The median of each size x size neighbourhood of (batch, channels, height, width); borders are repeated."""
    maps = F.pad(maps, (size // 2,) * 4, mode="replicate")
    return maps.unfold(2, size, 1).unfold(3, size, 1).flatten(4).median(-1).values


def smallest_share(values: torch.Tensor, mass: float) -> torch.Tensor:
    """The largest threshold at which the values from it on, none negative, hold that share of the sum."""
    values = values.flatten().sort(descending=True).values
    count = torch.searchsorted(values.cumsum(0), mass * values.sum()) + 1
    return values[min(int(count), len(values)) - 1]


def border_mask(grid: tuple[int, int]) -> torch.Tensor:
    """(N,), 1 for the patches along the border of a grid, 0 for others, row by row."""
    target = torch.ones(grid, dtype=torch.float64)
    target[1:-1, 1:-1] = 0
    return target.flatten()


def standardise(values: torch.Tensor) -> torch.Tensor:
    """The values less their mean, in standard deviations; all 0 if they are equal."""
    values = values - values.mean()
    return values / values.std(correction=0).clamp_min(1e-9)


@dataclass
class Options:
    """
    Args:
        num_segments: k, at least 2.
        layer: whose attention, negative counts from the last; None: the mean of all layers for the method `attention`,
            the last layer for the others.
        head: whose attention; None for all heads.
        mass: share of the attention of CLS that the foreground holds, in (0, 1]; for `attention`.
        attention_weight: share of the attention in the affinity, in [0, 1], features having the rest; for `ncut`.
    """

    num_segments: int = 4
    layer: int | None = None
    head: int | None = None
    mass: float = 0.6
    attention_weight: float = 0.0

    @property
    def attention_layer(self) -> int:
        """The layer whose attention makes an affinity."""
        return -1 if self.layer is None else self.layer

    def check(self, model: PreTrainedModel):
        """A ValueError when a value is outside its range or the model has no such layer or head."""
        config = unwrap(model).config
        num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
        if self.num_segments < 2:
            raise ValueError(f"`num_segments` is {self.num_segments}; give 2 at least.")
        if self.layer is not None and not -num_layers <= self.layer < num_layers:
            raise ValueError(f"`layer` is {self.layer}; the model has {num_layers} layers, counted from 0.")
        if self.head is not None and not 0 <= self.head < num_heads:
            raise ValueError(f"`head` is {self.head}; the model has {num_heads} heads, counted from 0.")
        if not 0 < self.mass <= 1:
            raise ValueError(f"`mass` is {self.mass}; give a share of the attention above 0, 1 at most.")
        if not 0 <= self.attention_weight <= 1:
            raise ValueError(f"`attention_weight` is {self.attention_weight}; give a share from 0 to 1.")


def operator_of(model: PreTrainedModel, options: Options) -> type[nn.Module]:
    """The class of the operator of the layer whose attention makes an affinity."""
    return operator_types(model)[options.attention_layer]


def encode(
    model: PreTrainedModel, pixel_values: torch.Tensor, options: Options, wants_attention: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The patches of one image, CLS left out, on the CPU.

    Returns:
        (height, width, hidden_size) after the final LayerNorm; and, if wanted, the layer's attention in float64, one
        head's or all: the factors (heads, m, N) where its map is `A^T A`, else the maps (heads, N, N), symmetric.
    """
    grid = patch_grid(model, pixel_values)
    with eval_encoder(model) as encoder:
        is_gram = operator_of(model, options).map_is_gram
        name = "representative_attentions" if is_gram else "attentions"
        outputs = encoder(
            pixel_values.to(encoder.device), interpolate_pos_encoding=True, **{f"output_{name}": wants_attention}
        )
    num_prefix_tokens = encoder.num_prefix_tokens
    tokens = outputs.last_hidden_state[0, num_prefix_tokens:].unflatten(0, grid).float().cpu()
    check_outputs(tokens)
    if not wants_attention:
        return tokens, None
    attention = outputs[name][options.attention_layer][0].double().cpu()
    if options.head is not None:
        attention = attention[options.head].unsqueeze(0)
    if is_gram:
        return tokens, attention[:, :, num_prefix_tokens:].clamp_min(SMALLEST_SHARE)
    attention = attention[:, num_prefix_tokens:, num_prefix_tokens:]
    return tokens, (attention + attention.mT) / 2


def attention_of_heads(model: PreTrainedModel, pixel_values: torch.Tensor, layer: int | None) -> torch.Tensor:
    """
    The attention of CLS to the patches in one layer, or on average over all, (heads, height, width); sums of 1.

    A median over 5 x 5 patches is taken: in classifiers trained without register tokens single patches, often of plain
    background, draw much of the attention (arXiv 2309.16588).
    """
    maps = attention_maps(model, pixel_values).double()  # (layers, 1, heads, height, width)
    maps = maps / maps.sum((3, 4), keepdim=True)  # every layer and head has the same say
    maps = median_filter(maps.mean(0) if layer is None else maps[layer], size=5)[0]
    return maps / maps.sum((1, 2), keepdim=True)


def foreground(rarely: torch.Tensor, model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    How much a patch is foreground, (height, width): how rarely walks from there visit the surroundings (N,), and, each
    a quarter as much, how central it is and how much CLS attends to it, by the logarithm.
    """
    attended = attention_of_heads(model, pixel_values, layer=None).mean(0)
    grid = tuple(attended.shape)
    central = -positions(grid).square().sum(1)
    attended = attended.flatten().clamp_min(SMALLEST_SHARE).log()
    total = standardise(rarely) + CENTRE_WEIGHT * standardise(central) + CLS_WEIGHT * standardise(attended)
    return standardise(total).unflatten(0, grid)


def group_by_attention(model: PreTrainedModel, pixel_values: torch.Tensor, options: Options) -> Grouping:
    """
    Foreground by the attention of CLS, after DINO's visualisation (arXiv 2104.14294): its row of the token-to-token
    map is a map over the patches, and the foreground is where most of its mass lies. Groups are patches that the heads
    attend to alike.
    """
    tokens, _ = encode(model, pixel_values, options, wants_attention=False)
    maps = attention_of_heads(model, pixel_values, options.layer)
    saliency = maps.mean(0) if options.head is None else maps[options.head]
    saliency = saliency / smallest_share(saliency, options.mass) - 1
    labels = k_means(maps.flatten(1).T, options.num_segments)
    return Grouping(F.one_hot(labels).T.unflatten(1, maps.shape[1:]), saliency, tokens)


def flip_scale_features(model: PreTrainedModel, pixel_values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Features of the patches: the tokens (height, width, hidden_size) brought to length 1, plus those that the model has
    for the mirror image at two thirds of the size: they show the same, and err differently.
    """
    patch_size = unwrap(model).config.patch_size
    size = [max(1, round(side * SECOND_LOOK)) * patch_size for side in tokens.shape[:2]]
    smaller = F.interpolate(pixel_values.flip(3), size=size, mode="bilinear", antialias=True)
    mirrored, _ = encode(model, smaller, Options(), wants_attention=False)
    second = F.normalize(mirrored.flip(1), dim=2).permute(2, 0, 1).unsqueeze(0)
    second = F.interpolate(second, size=tokens.shape[:2], mode="bilinear")[0].permute(1, 2, 0)
    return F.normalize(tokens, dim=2) + second


def patch_descriptors(model: PreTrainedModel, pixel_values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    What patches are compared by, (N, d) in float64: the features of [`flip_scale_features`], half of what they have in
    common in this image taken away, brought to length 1; and with less weight the colour.
    """
    features = flip_scale_features(model, pixel_values, tokens).flatten(0, 1).double()
    features = F.normalize(features - COMMON_SHARE * features.mean(0), dim=1)
    colours = F.avg_pool2d(pixel_values, unwrap(model).config.patch_size)[0].flatten(1).T.double()
    return torch.cat([features, COLOUR_WEIGHT * (colours - colours.mean(0))], dim=1)


def cut_mixture(features: torch.Tensor, attention: torch.Tensor | None, weight: float, is_gram: bool) -> Cut:
    """The cut of the affinity with the factor `features` (m, N), mixed with that weight of [`encode`]'s attention."""
    if attention is None:
        return cut_factored(features)
    if is_gram:
        factors = [(1 - weight) ** 0.5 * features, weight**0.5 * stack_factors(attention)]
        return cut_factored(torch.cat(factors))
    attention = (attention / attention.mean((1, 2), keepdim=True)).mean(0) / len(features.T)
    return cut_dense((1 - weight) * features.T @ features + weight * attention)


def group_by_cut(model: PreTrainedModel, pixel_values: torch.Tensor, options: Options) -> Grouping:
    """
    The normalised cut of the patches' affinity, which is that of [`patch_descriptors`]'s features through landmarks,
    those nearby followed more, that of the attention, or a mixture.

    Groups are clusters in the affinity's diffusion map. Foreground is where random walks over the affinity visit the
    image's border more rarely than on average: surroundings are what is there, and what looks like it, wherever it is.
    See [`foreground`] for what else counts.
    """
    tokens, attention = encode(model, pixel_values, options, wants_attention=options.attention_weight > 0)
    grid = tuple(tokens.shape[:2])
    features = landmark_factor(patch_descriptors(model, pixel_values, tokens), grid, LANDMARKS, TEMPERATURE, LOCALITY)
    is_gram = operator_of(model, options).map_is_gram
    cut = cut_mixture(features, attention, options.attention_weight, is_gram)
    # One coordinate less than groups did best for six of them; the first is constant, so two at least.
    labels = k_means(cut.diffusion_map(max(2, options.num_segments - 1)), options.num_segments)
    rarely = -visits(cut.leading(FOREGROUND_VECTORS), border_mask(grid))
    return Grouping(F.one_hot(labels).T.unflatten(1, grid), foreground(rarely, model, pixel_values), tokens)


def contraction(model: PreTrainedModel, pixel_values: torch.Tensor, options: Options) -> torch.Tensor:
    """How the representatives attend to one another in the layer, the mean of the heads or one's: (m, m), float64."""

    def look(operator: nn.Module, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor | None:
        if not hasattr(operator, "steps"):
            return None
        _, _, factor = operator.forward(hidden_states, grid, output_factor=True)
        values = operator.split_heads(operator.proj(hidden_states))
        representatives = operator.representatives(values, grid) + operator.step_rep * (factor @ values)
        return operator.attend(representatives, representatives)[0].double().cpu()

    with eval_encoder(model) as encoder:
        found = observe_operators(encoder, look)
        encoder(pixel_values.to(encoder.device), interpolate_pos_encoding=True)
    weights = found[options.attention_layer]
    return weights.mean(0) if options.head is None else weights[options.head]


def group_by_representatives(model: PreTrainedModel, pixel_values: torch.Tensor, options: Options) -> Grouping:
    """
    The representatives of one layer are merged by the normalised cut of their contraction, how they attend to one
    another; a patch belongs to the group whose representatives attend to it most on average. In attentions without
    representatives the tokens represent themselves, and their map is what merges them.

    Foreground is found as in [`group_by_cut`], the walk going over the representatives.
    """
    tokens, attention = encode(model, pixel_values, options, wants_attention=True)
    grid = tuple(tokens.shape[:2])
    operator = operator_of(model, options)
    if hasattr(operator, "steps"):
        reads = attention.mean(0) / attention.mean(0).sum(1, keepdim=True)
        affinity = contraction(model, pixel_values, options)
        affinity = (affinity + affinity.T) / 2
    else:
        affinity = (attention.mT @ attention if operator.map_is_gram else attention).mean(0)
        reads = torch.eye(len(affinity), dtype=affinity.dtype)
    cut = cut_dense(affinity)
    members = F.one_hot(k_means(cut.vectors[:, : options.num_segments], options.num_segments)).double().T
    members = members @ reads / members.sum(1, keepdim=True)
    rarely = -visits(cut.leading(FOREGROUND_VECTORS), reads @ border_mask(grid)) @ (reads / reads.sum(0))
    return Grouping(members.unflatten(1, grid), foreground(rarely, model, pixel_values), tokens)


# Of `Options`, which have an effect.
METHOD_OPTIONS = {
    "attention": ("num_segments", "layer", "head", "mass"),
    "ncut": ("num_segments", "layer", "head", "attention_weight"),
    "representatives": ("num_segments", "layer", "head"),
}

METHODS = {
    "attention": group_by_attention,
    "ncut": group_by_cut,
    "representatives": group_by_representatives,
}
