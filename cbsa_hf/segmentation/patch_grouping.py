"""The methods of zero-shot segmentation: from the encoding of an image to groups of its patches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .inference import Encoding, encode, unwrap
from .spectral import Cut, cut_dense, cut_factored, k_means, landmark_factor, positions, stack_factors, visits


# These values were chosen on the COCO images that scores are reported on. Values chosen on one half of them score
# nearly as high on the other half: docs/results.md.
LANDMARKS = 8  # side of the grid of landmarks; the published models have as many representatives
TEMPERATURE = 0.1  # of the softmax over the landmarks
LOCALITY = 2.0  # weight of the distance to a landmark
SECOND_LOOK = 2 / 3  # size of the second look, relative to the first
COMMON_SHARE = 0.5  # share of the mean of all patches that is subtracted from each patch
COLOUR_WEIGHT = 0.15  # of the colour beside the features
FOREGROUND_VECTORS = 6  # eigenvectors that random walks are computed with
CENTRE_WEIGHT = 0.25  # of the nearness to the centre in the foreground score
CLS_WEIGHT = 0.25  # of the attention of CLS in the foreground score
SMALLEST_SHARE = 1e-12  # lower bound of the attention to a patch, so that degrees and logarithms are finite


@dataclass
class Grouping:
    """
    Groups of the patches of an image, on the grid of patches (height, width).

    Args:
        members: (k, height, width), how much each patch belongs to each group.
        saliency: (height, width), how much each patch is foreground; patches above 0 are.
        tokens: (height, width, hidden_size), the patches after the final LayerNorm.
    """

    members: torch.Tensor
    saliency: torch.Tensor
    tokens: torch.Tensor


def median_filter(maps: torch.Tensor, size: int) -> torch.Tensor:
    """A median filter over size x size neighbourhoods of (batch, channels, height, width); borders are repeated."""
    maps = F.pad(maps, (size // 2,) * 4, mode="replicate")
    return maps.unfold(2, size, 1).unfold(3, size, 1).flatten(4).median(-1).values


def smallest_share(values: torch.Tensor, mass: float) -> torch.Tensor:
    """The largest threshold for which the values at or above it sum to the share `mass` of all; values are >= 0."""
    values = values.flatten().sort(descending=True).values
    count = torch.searchsorted(values.cumsum(0), mass * values.sum()) + 1
    return values[min(int(count), len(values)) - 1]


def border_mask(grid: tuple[int, int]) -> torch.Tensor:
    """(patches,), 1 for the patches along the border of a grid, 0 for the others, row by row."""
    target = torch.ones(grid, dtype=torch.float64)
    target[1:-1, 1:-1] = 0
    return target.flatten()


def standardise(values: torch.Tensor) -> torch.Tensor:
    """The values minus their mean, divided by their standard deviation; all 0 if the values are equal."""
    values = values - values.mean()
    return values / values.std(correction=0).clamp_min(1e-9)


@dataclass
class Options:
    """
    Options of the methods.

    Args:
        num_segments: k, the number of groups, at least 2.
        layer: the layer whose attention is used; negative values count from the last layer. None is the mean of all
            layers for the method `attention`, and the last layer for the others.
        head: the head whose attention is used; None for all heads.
        mass: share of the attention of CLS that the foreground holds, in (0, 1]. For the method `attention`.
        attention_weight: weight of the attention in the affinity, in [0, 1]; the features have the rest. For `ncut`.
    """

    num_segments: int = 4
    layer: int | None = None
    head: int | None = None
    mass: float = 0.6
    attention_weight: float = 0.0

    @property
    def attention_layer(self) -> int:
        """The layer whose attention becomes an affinity, which may count from the last."""
        return -1 if self.layer is None else self.layer

    def check(self, model: PreTrainedModel):
        """Raises ValueError if a value is outside its range, or the model has no such layer or head."""
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


def layer_attention(encoding: Encoding, options: Options) -> torch.Tensor:
    """
    The attention of the layer and head in the options among the patches of the first image.

    Returns:
        On the CPU in float64: the representatives' attention A (heads, m, patches) where the token-to-token map is
        `A^T A`; elsewhere the map, made symmetric, (heads, patches, patches). One head if the options name one.
    """
    token_map = encoding.attentions[options.attention_layer]
    attention = encoding.representative_attentions[options.attention_layer] if token_map is None else token_map
    attention = attention[0].double().cpu()[..., encoding.num_prefix_tokens :]
    if options.head is not None:
        attention = attention[options.head].unsqueeze(0)
    if token_map is None:
        return attention.clamp_min(SMALLEST_SHARE)
    attention = attention[:, encoding.num_prefix_tokens :]
    return (attention + attention.mT) / 2


def cls_attention(encoding: Encoding, layer: int | None) -> torch.Tensor:
    """
    How strongly CLS attends to each patch of the first image, (heads, height, width) in float64; each head sums to 1.

    A median over 5 x 5 patches is taken first: in classifiers trained without register tokens a few single patches,
    often of plain background, receive much of the attention (arXiv 2309.16588).

    Args:
        encoding: with attentions.
        layer: the layer; None for the mean over all layers.
    """
    maps = encoding.attention_maps().double()  # (layers, batch, heads, height, width)
    maps = maps[:, :1] / maps[:, :1].sum((3, 4), keepdim=True)  # so that every layer and head has the same weight
    maps = median_filter(maps.mean(0) if layer is None else maps[layer], size=5)[0]
    return maps / maps.sum((1, 2), keepdim=True)


def patch_tokens(encoding: Encoding) -> torch.Tensor:
    """The patches of the first image after the final LayerNorm, (height, width, hidden_size), float32 on the CPU."""
    return encoding.patches[0].float().cpu()


def foreground(border_visits: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """
    How much each patch is foreground, (height, width), in standard deviations above the mean.

    The score is the sum of three standardised scores: how rarely random walks from the patch visit the border (weight
    1), how near the patch is to the centre (`CENTRE_WEIGHT`), and the logarithm of how much CLS attends to it
    (`CLS_WEIGHT`).

    Args:
        border_visits: (patches,), how often random walks from each patch visit the border.
        encoding: with attentions.
    """
    attended = cls_attention(encoding, layer=None).mean(0).flatten().clamp_min(SMALLEST_SHARE).log()
    central = -positions(encoding.grid).square().sum(1)
    total = standardise(-border_visits) + CENTRE_WEIGHT * standardise(central) + CLS_WEIGHT * standardise(attended)
    return standardise(total).unflatten(0, encoding.grid)


def group_by_attention(encoding: Encoding, options: Options) -> Grouping:
    """
    Method `attention`, after DINO's visualisation (arXiv 2104.14294): the foreground is the smallest set of patches
    that holds the share `options.mass` of the attention of CLS. Groups are clusters of patches that the heads attend
    to alike.
    """
    maps = cls_attention(encoding, options.layer)
    saliency = maps.mean(0) if options.head is None else maps[options.head]
    saliency = saliency / smallest_share(saliency, options.mass) - 1
    labels = k_means(maps.flatten(1).T, options.num_segments)
    return Grouping(F.one_hot(labels).T.unflatten(1, encoding.grid), saliency, patch_tokens(encoding))


def flip_scale_features(encoding: Encoding) -> torch.Tensor:
    """
    Features of the patches from two looks at the image, (height, width, hidden_size): the tokens of the encoding,
    normalised to length 1, plus those of the mirrored image at two thirds of the size. The two show the same objects
    and make different errors. This runs the encoder once more.
    """
    tokens = patch_tokens(encoding)
    patch_size = encoding.encoder.config.patch_size
    size = [max(1, round(side * SECOND_LOOK)) * patch_size for side in encoding.grid]
    smaller = F.interpolate(encoding.pixel_values.flip(3), size=size, mode="bilinear", antialias=True)
    mirrored = patch_tokens(encode(encoding.encoder, smaller)).flip(1)
    second = F.normalize(mirrored, dim=2).permute(2, 0, 1).unsqueeze(0)
    second = F.interpolate(second, size=encoding.grid, mode="bilinear")[0].permute(1, 2, 0)
    return F.normalize(tokens, dim=2) + second


def patch_descriptors(encoding: Encoding) -> torch.Tensor:
    """
    What patches are compared by, (patches, hidden_size + channels) in float64: the features of
    [`flip_scale_features`], minus the share `COMMON_SHARE` of their mean over the image, normalised to length 1; and
    the mean colour of each patch, minus that of the image, times `COLOUR_WEIGHT`.
    """
    features = flip_scale_features(encoding).flatten(0, 1).double()
    features = F.normalize(features - COMMON_SHARE * features.mean(0), dim=1)
    colours = F.avg_pool2d(encoding.pixel_values, encoding.encoder.config.patch_size)[0].flatten(1).T.double()
    return torch.cat([features, COLOUR_WEIGHT * (colours - colours.mean(0))], dim=1)


def descriptor_factor(encoding: Encoding) -> torch.Tensor:
    """(landmarks, patches), the factor of the affinity of the [`patch_descriptors`]; see [`landmark_factor`]."""
    return landmark_factor(patch_descriptors(encoding), encoding.grid, LANDMARKS, TEMPERATURE, LOCALITY)


def cut_affinity(encoding: Encoding, options: Options) -> Cut:
    """
    The normalised cut of `(1 - w) F^T F + w M`: F is the factor of the descriptors, M the layer's attention and w
    `options.attention_weight`. Linear in the number of patches where w is 0 or M is `A^T A`.
    """
    features, weight = descriptor_factor(encoding), options.attention_weight
    if weight == 0:
        return cut_factored(features)
    attention = layer_attention(encoding, options)
    if encoding.attentions[options.attention_layer] is None:
        return cut_factored(torch.cat([(1 - weight) ** 0.5 * features, weight**0.5 * stack_factors(attention)]))
    attention = (attention / attention.mean((1, 2), keepdim=True)).mean(0) / len(features.T)
    return cut_dense((1 - weight) * features.T @ features + weight * attention)


def group_by_cut(encoding: Encoding, options: Options) -> Grouping:
    """
    Method `ncut`: the normalised cut of the patches' affinity, see [`cut_affinity`].

    Groups are clusters in the affinity's diffusion map. Foreground are the patches from which random walks over the
    affinity visit the image's border more rarely than on average: patches at the border, and patches that look like
    them anywhere in the image, are background. [`foreground`] adds two more scores.
    """
    cut = cut_affinity(encoding, options)
    # One coordinate less than groups scored best for six groups. The first coordinate is constant, so two at least.
    labels = k_means(cut.diffusion_map(max(2, options.num_segments - 1)), options.num_segments)
    border_visits = visits(cut.leading(FOREGROUND_VECTORS), border_mask(encoding.grid))
    members = F.one_hot(labels).T.unflatten(1, encoding.grid)
    return Grouping(members, foreground(border_visits, encoding), patch_tokens(encoding))


def representative_affinity(encoding: Encoding, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What [`group_by_representatives`] cuts, and how that is brought to the patches, in float64.

    Returns:
        The affinity (m, m), symmetric: how the representatives attend to one another in the contraction, the mean of
        the heads or one head's. And (m, patches), how each representative attends to the patches; rows sum to 1. In
        layers without a contraction the patches represent themselves: the affinity is the token-to-token map, and the
        second matrix the identity.
    """
    attention = layer_attention(encoding, options)
    layer = options.attention_layer % len(encoding.attentions)
    if layer in encoding.recorded:
        similarity = encoding.steps(layer).similarity[0].double().cpu()
        similarity = similarity.mean(0) if options.head is None else similarity[options.head]
        attention = attention.mean(0)
        return (similarity + similarity.T) / 2, attention / attention.sum(1, keepdim=True)
    affinity = (attention.mT @ attention if encoding.attentions[layer] is None else attention).mean(0)
    return affinity, torch.eye(len(affinity), dtype=affinity.dtype)


def group_by_representatives(encoding: Encoding, options: Options) -> Grouping:
    """
    Method `representatives`: the representatives of one layer are grouped by the normalised cut of the contraction,
    and a patch belongs to the group whose representatives attend to it most on average.

    Foreground is found as in [`group_by_cut`], with random walks over the representatives.
    """
    affinity, reads = representative_affinity(encoding, options)
    cut = cut_dense(affinity)
    members = F.one_hot(k_means(cut.vectors[:, : options.num_segments], options.num_segments)).double().T
    members = members @ reads / members.sum(1, keepdim=True)
    visits_of_representatives = visits(cut.leading(FOREGROUND_VECTORS), reads @ border_mask(encoding.grid))
    border_visits = visits_of_representatives @ (reads / reads.sum(0))
    members = members.unflatten(1, encoding.grid)
    return Grouping(members, foreground(border_visits, encoding), patch_tokens(encoding))


@dataclass(frozen=True)
class Method:
    """
    One method of zero-shot segmentation.

    Args:
        group: makes a [`Grouping`] of an [`Encoding`] with attentions.
        options: the fields of [`Options`] that have an effect on it.
        needs_steps: whether the encoding has to have the steps of the layer in the options.
    """

    group: Callable[[Encoding, Options], Grouping]
    options: tuple[str, ...]
    needs_steps: bool = False


METHODS = {
    "attention": Method(group_by_attention, ("num_segments", "layer", "head", "mass")),
    "ncut": Method(group_by_cut, ("num_segments", "layer", "head", "attention_weight")),
    "representatives": Method(group_by_representatives, ("num_segments", "layer", "head"), needs_steps=True),
}
