"""
Measure whether the layers do what their objective says: coding rates, sparsity and ranks; and how accuracy falls when
weights are perturbed.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from ..attention_cbsa import SharedProjectionSelfAttention
from ..segmentation.inference import Encoding, encode, evaluating, layer_operators, unwrap


EPS = 0.5  # error of the coding rates, in the units of the projected tokens


def coding_rate(tokens: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """
    The coding rate `R(X) = 1/2 logdet(I + p / (n eps^2) X^T X)`, in nats: how much it takes to code the rows of X up
    to an error of eps (arXiv 2509.16875).

    Args:
        tokens: X, (..., n, p).
        eps: error, in the units of the tokens.

    Returns:
        (...), in float64.
    """
    n, p = tokens.shape[-2:]
    tokens = tokens.double()
    gram = tokens.transpose(-1, -2) @ tokens * (p / (n * eps**2))
    return torch.linalg.slogdet(gram + torch.eye(p, dtype=gram.dtype, device=gram.device)).logabsdet / 2


def effective_count(weights: torch.Tensor) -> torch.Tensor:
    """
    Over how many entries weights are spread: the exponential of the entropy of the normalised weights, which is k for
    k equal weights. Non-negative weights (..., n) -> (...), in float64.
    """
    weights = weights.double()
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.special.entr(weights / total).sum(-1).exp()


def effective_rank(matrix: torch.Tensor) -> torch.Tensor:
    """
    The [`effective_count`] of the singular values (Roy, Vetterli 2007). (..., rows, columns) -> (...), in float64.
    """
    return effective_count(torch.linalg.svdvals(matrix.double()))


def hoyer_sparsity(tokens: torch.Tensor) -> torch.Tensor:
    """
    The mean over tokens x of `(sqrt(n) - |x|_1 / |x|_2) / (sqrt(n) - 1)` (Hoyer 2004). It is 0 if all n entries have
    the same size, and 1 if a single entry is not zero. (..., tokens, n) -> (...).
    """
    root = tokens.shape[-1] ** 0.5
    ratio = tokens.norm(p=1, dim=-1) / tokens.norm(dim=-1).clamp_min(torch.finfo(tokens.dtype).tiny)
    return ((root - ratio) / (root - 1)).mean(-1)


@dataclass
class LayerMeasures:
    """
    Measures of every image and layer, some of every head.

    A measure is None if no layer has it, and NaN in the layers without it. Coding rates are those of the tokens
    projected to a head; operators with separate projections to queries, keys and values have none.

    Args:
        eps: error of the coding rates.
        coding_rate_before: (images, layers, heads), coding rate before the attention step, in nats.
        coding_rate_after: (images, layers, heads), coding rate after the attention step and its residual.
        normalised_coding_rate_before, normalised_coding_rate_after: (images, layers, heads), the same after the
            layer's LayerNorm, which removes the lengths of the tokens. The operator itself gets normalised tokens.
        zeros_before, zeros_after: (images, layers), share of the entries that are exactly 0 before and after the
            feed-forward block (ISTA).
        sparsity_before, sparsity_after: (images, layers), [`hoyer_sparsity`] before and after the feed-forward block.
        representative_attention_rank: (images, layers, heads), effective rank of the representative attentions A.
        map_rank: (images, layers, heads), effective rank of the token-to-token map, which is `A^T A` for `cbsa`.
    """

    eps: float
    coding_rate_before: torch.Tensor | None
    coding_rate_after: torch.Tensor | None
    normalised_coding_rate_before: torch.Tensor | None
    normalised_coding_rate_after: torch.Tensor | None
    zeros_before: torch.Tensor
    zeros_after: torch.Tensor
    sparsity_before: torch.Tensor
    sparsity_after: torch.Tensor
    representative_attention_rank: torch.Tensor | None
    map_rank: torch.Tensor

    @property
    def factor_rank(self) -> torch.Tensor | None:
        """The old name of `representative_attention_rank`, which the next version removes."""
        warnings.warn("`factor_rank` is now `representative_attention_rank`.", FutureWarning, stacklevel=2)
        return self.representative_attention_rank

    def summary(self) -> dict[str, dict[str, list] | None]:
        """
        Mean and standard deviation over the images, as lists over layers and heads; None where a layer does not have
        the measure. The standard deviation of a single image is 0.
        """
        found = {name: getattr(self, name) for name in MEASURES}
        return {
            name: None
            if value is None
            else {
                statistic: [None if values.isnan().any() else values.tolist() for values in layers]
                for statistic, layers in (("mean", value.mean(0)), ("std", value.std(0, correction=0)))
            }
            for name, value in found.items()
        }


MEASURES = [field.name for field in fields(LayerMeasures) if field.name != "eps"]


def basis_coding_rate(attention: SharedProjectionSelfAttention, tokens: torch.Tensor, eps: float) -> torch.Tensor:
    """Coding rate of tokens (batch, N, d) projected to each head -> (batch, heads)."""
    return coding_rate(attention.split_heads(attention.proj(tokens)), eps)


@torch.no_grad()
def measure(encoding: Encoding, eps: float = EPS) -> dict[str, torch.Tensor]:
    """
    The tensors of [`LayerMeasures`] for the images of one encoding, which has to have hidden states and attentions.
    Measures that no layer has are left out.
    """
    num_heads = encoding.encoder.config.num_attention_heads
    per_head = torch.full((len(encoding.tokens), num_heads), torch.nan, dtype=torch.float64)
    operators = layer_operators(encoding.encoder)
    found = {name: [per_head] * len(operators) for name in MEASURES}
    for index, (layer, operator) in enumerate(zip(encoding.encoder.applied_layers, operators, strict=True)):
        before, code = encoding.hidden_states[index : index + 2]
        after = encoding.attended_states[index]
        if isinstance(operator, SharedProjectionSelfAttention):
            for name, tokens in {
                "coding_rate_before": before,
                "coding_rate_after": after,
                "normalised_coding_rate_before": layer.layernorm_before(before),
                "normalised_coding_rate_after": layer.layernorm_before(after),
            }.items():
                found[name][index] = basis_coding_rate(operator, tokens, eps)
        for name, tokens in {"before": layer.layernorm_after(after), "after": code}.items():
            found[f"zeros_{name}"][index] = (tokens == 0).double().mean((1, 2))
            found[f"sparsity_{name}"][index] = hoyer_sparsity(tokens.double())
        if operator.has_representative_attentions:
            singular_values = torch.linalg.svdvals(encoding.representative_attentions[index].double())
            found["representative_attention_rank"][index] = effective_count(singular_values)
        if operator.map_is_gram:  # its singular values are the squares of those of A
            found["map_rank"][index] = effective_count(singular_values.square())
        else:
            found["map_rank"][index] = effective_rank(encoding.attentions[index])
    return {
        name: torch.stack([value.to(per_head) for value in values], dim=1)
        for name, values in found.items()
        if any(value is not per_head for value in values)
    }


def collect(measured: Iterable[dict[str, torch.Tensor]], eps: float = EPS) -> LayerMeasures:
    """The [`LayerMeasures`] of several batches that [`measure`] returned. Raises ValueError if there are none."""
    measured = list(measured)
    if not measured:
        raise ValueError("There are no images to measure; give one batch of `pixel_values` at least.")
    found = {name: torch.cat([batch[name] for batch in measured]) for name in measured[0]}
    return LayerMeasures(eps=eps, **(dict.fromkeys(MEASURES) | found))


def measure_layers(model: PreTrainedModel, batches: Iterable[torch.Tensor], eps: float = EPS) -> LayerMeasures:
    """
    Measure coding rates before and after every attention step, sparsity before and after every feed-forward block, and
    ranks of the attention.

    Args:
        model: a CBSA model with any head, as it is or wrapped.
        batches: batches of `pixel_values`, (batch, channels, height, width) of any size.
        eps: error of the coding rates, in the units of the projected tokens.

    Raises:
        ValueError: there are no batches, the model has another library's backbone, or its outputs are not finite.
    """
    encodings = (encode(model, batch, output_hidden_states=True, output_attentions=True) for batch in batches)
    return collect((measure(encoding, eps) for encoding in encodings), eps)


def noisy_projections(
    model: PreTrainedModel, scale: float, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """
    Copies of the weights that project tokens to queries, keys and values, by name, with Gaussian noise added.

    Args:
        model: a CBSA model.
        scale: standard deviation of the noise, divided by the root mean square of the matrix that it is added to.
        generator: of the noise.
    """
    noisy = {}
    for name, weight in model.named_parameters():
        name_in_model = name.replace(".base_layer.", ".")  # PEFT adds this part if an adapter is around the layer
        if name_in_model.endswith(("attention.proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            noisy[name] = weight.detach() + scale * weight.detach().square().mean().sqrt() * noise
    return noisy


def accuracy_under_noise(
    model: PreTrainedModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    scales: Iterable[float],
    seed: int = 0,
) -> list[float]:
    """
    Accuracy of a classifier when noise is added to its projections. The weights of the model do not change.

    Args:
        model: a CBSA classifier, as it is or wrapped.
        batches: pairs of `pixel_values` (batch, channels, height, width) and labels (batch,); iterated once for each
            scale.
        scales: standard deviations of the noise, relative to the root mean square of each matrix. The same noise is
            used for all scales.
        seed: seed of the noise.

    Returns:
        The accuracy for each scale.
    """
    accuracies = []
    with evaluating(unwrap(model)) as copy:
        for scale in scales:
            weights = noisy_projections(copy, scale, torch.Generator().manual_seed(seed))
            hits = [
                functional_call(
                    copy, weights, (pixel_values.to(copy.device),), {"interpolate_pos_encoding": True}
                ).logits.argmax(-1)
                == labels.to(copy.device)
                for pixel_values, labels in batches
            ]
            accuracies.append(torch.cat(hits).double().mean().item())
    return accuracies
