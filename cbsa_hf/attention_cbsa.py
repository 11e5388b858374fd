"""
Contract-and-Broadcast Self-Attention and the family that it generalises: tokens and their grid in, an update out.

One class an operator, one table by name at the end; to add one, write a class and enter it there.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import is_torchdynamo_compiling

from .configuration_cbsa import CBSAConfig


def to_pair(size: int | Iterable[int]) -> tuple[int, int]:
    """One side, or (height, width), as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def block_norm(config: CBSAConfig, width: int) -> nn.LayerNorm:
    """The norm before a block; its affine part is in the block's first layer where the model is folded."""
    return nn.LayerNorm(width, eps=config.layer_norm_eps, elementwise_affine=not config.folded)


def adaptive_bins(length: int, num_bins: int, like: torch.Tensor) -> torch.Tensor:
    """The product with this matrix (num_bins, length) is `F.adaptive_avg_pool1d`, whatever the length."""
    position = torch.arange(length, device=like.device)
    bin_index = torch.arange(num_bins, device=like.device).unsqueeze(1)
    # Bin i starts at floor(i n / m) and ends before ceil((i + 1) n / m); written without division.
    inside = ((position + 1) * num_bins > bin_index * length) & (position * num_bins < (bin_index + 1) * length)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True).to(like.dtype)


class PooledRepresentatives(nn.Module):
    """
    Initial representatives: the average of the tokens in each bin of the grid of patches (torch's adaptive bins, which
    differ in size and may overlap).

    Args:
        size: height and width of the grid of representatives, m of them in all; one number for a square.
        first_token: index of the token at the grid's top left corner.
    """

    def __init__(self, size: int | Iterable[int], first_token: int):
        super().__init__()
        self.size = to_pair(size)
        self.first_token = first_token

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, heads, tokens, p) -> (batch, heads, m, p)."""
        patches = tokens[:, :, self.first_token : self.first_token + grid[0] * grid[1]]
        patches = patches.transpose(2, 3).flatten(1, 2).unflatten(2, grid)  # (batch, heads * p, height, width)
        if is_torchdynamo_compiling():  # torch's own pool, which is faster, ties a graph to one size
            rows, columns = (adaptive_bins(n, m, patches) for n, m in zip(grid, self.size, strict=True))
            bins = rows @ patches @ columns.T
        else:
            bins = F.adaptive_avg_pool2d(patches, self.size)
        return bins.flatten(2).unflatten(1, (tokens.shape[1], -1)).transpose(2, 3)


class LearnedRepresentatives(nn.Module):
    """Initial representatives that are parameters, the same for every image: what pooling is compared with."""

    def __init__(self, num_heads: int, num_representatives: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, num_representatives, head_dim))

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, heads, tokens, p) -> (batch, heads, m, p)."""
        return self.weight.expand(tokens.shape[0], -1, -1, -1)


class SelfAttention(nn.Module):
    """
    What all operators share. Below, d is the width of the tokens, h the number of heads, p the dimension of one head,
    N the number of tokens and m that of representatives.

    Every operator is built with the same arguments, and leaves alone those that it has no use for.

    Args:
        hidden_size: d.
        num_heads: h.
        head_dim: p; h * p need not be d.
        representatives: makes the initial representatives, for the operators that have any.
        base_num_patches: N0 of [`ContractAndBroadcastSelfAttention`], in patches; None leaves its factor out.
        num_other_tokens: tokens that every image has beside its patches and that count in both N and N0: the class
            tokens of a mask decoder.
        folded: whether the weights are those of a folded model, see [`fold`].

    Attributes:
        uses_representatives: whether the operator has representatives.
        has_factor: whether `forward` can return a factor A.
        map_is_gram: whether the token-to-token map is `A^T A`.
        map_formula: what that map is, for titles.
    """

    uses_representatives = False
    has_factor = False
    map_is_gram = False
    map_formula: str

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        representatives: nn.Module | None = None,
        base_num_patches: int | None = None,
        num_other_tokens: int = 0,
        folded: bool = False,
    ):
        super().__init__()
        self.folded = folded
        self.num_heads = num_heads
        self.scaling = head_dim**-0.5
        self.base_num_patches = base_num_patches
        self.num_other_tokens = num_other_tokens
        self.representatives = representatives
        self.out_proj = nn.Linear(num_heads * head_dim, hidden_size)
        self.add_weights(hidden_size, num_heads * head_dim)

    def add_weights(self, hidden_size: int, inner_size: int):
        """Creates the operator's own weights; d and h * p are given."""
        raise NotImplementedError(f"{type(self).__name__} does not say which weights it has.")

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(batch, N, h * p) -> (batch, h, N, p)."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge_heads(self, update: torch.Tensor) -> torch.Tensor:
        """(batch, h, N, p) -> (batch, N, d), through the output layer."""
        return self.out_proj(update.transpose(1, 2).flatten(2))

    def attend(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Softmax weights of each query (batch, h, queries, p) over the keys -> (batch, h, queries, keys)."""
        return torch.softmax(queries @ keys.transpose(2, 3) * self.scaling, dim=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid: tuple[int, int],
        output_attentions: bool = False,
        output_factor: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, N, d), already normalised.
            grid: (height, width) of the patches among the tokens.
            output_attentions: whether the token-to-token map is wanted.
            output_factor: whether its factor is wanted.

        Returns:
            The update (batch, N, d), to which the caller adds the residual; the token-to-token map (batch, h, N, N),
            or None when it was not asked for; the factor A (batch, h, m, N), or None when the operator has none or
            can do without.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it attends.")


class SharedProjectionSelfAttention(SelfAttention):
    """
    The white-box operators: one projection serves as query, key and value; W is what it makes. It has a bias only in a
    folded model, which takes over the shift of the norm before it.
    """

    def add_weights(self, hidden_size, inner_size):
        self.proj = nn.Linear(hidden_size, inner_size, bias=self.folded)


@dataclass
class ContractionSteps:
    """
    What [`ContractAndBroadcastSelfAttention`] computes on its way to the update, for every image and head.

    Args:
        tokens: (batch, h, N, p), W: the projected tokens.
        initial_representatives: (batch, h, m, p), Q0: pooled from W, or learned.
        attention: (batch, h, m, N), A: how each representative spreads its attention over the tokens; rows sum to 1.
        representatives: (batch, h, m, p), Q: moved towards the tokens that they attend to.
        similarity: (batch, h, m, m), S: how the representatives attend to one another; rows sum to 1.
        contracted: (batch, h, m, p), C: each representative replaced by the mean of those that it attends to.
    """

    tokens: torch.Tensor
    initial_representatives: torch.Tensor
    attention: torch.Tensor
    representatives: torch.Tensor
    similarity: torch.Tensor
    contracted: torch.Tensor


class ContractAndBroadcastSelfAttention(SharedProjectionSelfAttention):
    """
    Compresses all tokens by contracting a few representatives (CBSA, arXiv 2509.16875, section 3).

    One projection serves as query, key and value. m representatives read the tokens, attend to one another, and hand
    what they learned back through the very weights they read with. Linear in N. The map is `A^T A`.

    Each row of A sums to 1 over the N tokens, so `A^T C` shrinks as 1/N when an image grows. `size_factor` makes up
    for that: it multiplies the contracted representatives by N / N0, 1 at the size that the weights are made for;
    without `base_num_patches` it is 1 always, as in the reference implementation.
    """

    uses_representatives = True
    has_factor = True
    map_is_gram = True
    map_formula = "$A^T A$"

    def add_weights(self, hidden_size, inner_size):
        super().add_weights(hidden_size, inner_size)
        self.step_rep = nn.Parameter(torch.ones(self.num_heads, 1, 1))
        self.step_x = nn.Parameter(torch.ones(self.num_heads, 1, 1))

    def size_factor(self, grid: tuple[int, int]) -> float | torch.Tensor:
        """N / N0 for that grid of patches; 1 where no N0 is known."""
        if self.base_num_patches is None:
            return 1.0
        num_patches = grid[0] * grid[1]
        if is_torchdynamo_compiling():  # Inductor fails at products with a number that depends on the size.
            num_patches = self.step_x.new_ones(grid, dtype=torch.float32).sum()
        return (num_patches + self.num_other_tokens) / (self.base_num_patches + self.num_other_tokens)

    def steps(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> ContractionSteps:
        """
        The steps up to the broadcast, which is `step_x * size_factor * A^T C`.

        Args:
            hidden_states: (batch, N, d), already normalised.
            grid: (height, width) of the patches among the tokens.
        """
        tokens = self.split_heads(self.proj(hidden_states))

        initial_representatives = self.representatives(tokens, grid)
        attention = self.attend(initial_representatives, tokens)
        representatives = initial_representatives + self.step_rep * (attention @ tokens)
        # Written out: for so few representatives the fused kernel is slower, by a quarter of the training step on CPU.
        similarity = self.attend(representatives, representatives)
        contracted = similarity @ representatives

        return ContractionSteps(tokens, initial_representatives, attention, representatives, similarity, contracted)

    def forward(self, hidden_states, grid, output_attentions=False, output_factor=False):
        steps = self.steps(hidden_states, grid)
        step_x = 1.0 if self.folded else self.step_x  # folding moves it into the output layer
        update = steps.attention.transpose(2, 3) @ (step_x * self.size_factor(grid) * steps.contracted)
        token_map = steps.attention.transpose(2, 3) @ steps.attention if output_attentions else None
        return self.merge_heads(update), token_map, steps.attention


class MultiHeadSubspaceSelfAttention(SharedProjectionSelfAttention):
    """
    Softmax attention with one shared projection (MSSA of CRATE, arXiv 2306.01129): CBSA in which the tokens represent
    themselves. Quadratic in N. The map is `softmax(W W^T / sqrt(p))`.
    """

    map_formula = "softmax of scaled $W W^T$"

    def forward(self, hidden_states, grid, output_attentions=False, output_factor=False):
        tokens = self.split_heads(self.proj(hidden_states))
        if not output_attentions:
            update = F.scaled_dot_product_attention(tokens, tokens, tokens, scale=self.scaling)
            return self.merge_heads(update), None, None
        token_map = self.attend(tokens, tokens)
        return self.merge_heads(token_map @ tokens), token_map, None


class TokenStatisticsSelfAttention(SharedProjectionSelfAttention):
    """
    Attention by the second moments of the tokens, without any pair of them (TSSA of ToST, arXiv 2412.17810): the case
    of fixed orthogonal representatives. Linear in N.

    The map, which the update does not use, is the reference's: softmax over heads of `W W^T`.
    """

    map_formula = "softmax over heads of $W W^T$"

    def add_weights(self, hidden_size, inner_size):
        super().add_weights(hidden_size, inner_size)
        self.temp = nn.Parameter(torch.ones(self.num_heads, 1))

    def forward(self, hidden_states, grid, output_attentions=False, output_factor=False):
        tokens = self.split_heads(self.proj(hidden_states))
        normalised = F.normalize(tokens, dim=2)  # each channel over the tokens
        membership = torch.softmax(self.temp * normalised.square().sum(-1), dim=1)  # (batch, h, N), over the heads
        weights = membership / membership.sum(-1, keepdim=True)
        moments = (weights.unsqueeze(2) @ tokens.square()).squeeze(2)  # (batch, h, p)
        update = -membership.unsqueeze(-1) * tokens / (1 + moments.unsqueeze(2))
        token_map = torch.softmax(tokens @ tokens.transpose(2, 3), dim=1) if output_attentions else None
        return self.merge_heads(update), token_map, None


class LinearSelfAttention(SharedProjectionSelfAttention):
    """
    `phi(W) (phi(W)^T W)`: CBSA with orthogonal representatives and without the contraction. Linear in N.

    Here `phi(W) = D^(-1/2) (elu(W) + 1)`: the positive features of linear attention (arXiv 2006.16236), and D the
    degrees that they give each token, so that `A^T A` with `A = phi(W)^T` is the symmetrically normalised affinity of
    the tokens, its largest eigenvalue 1 whatever N.
    """

    has_factor = True
    map_is_gram = True
    map_formula = "$A^T A$"

    def forward(self, hidden_states, grid, output_attentions=False, output_factor=False):
        tokens = self.split_heads(self.proj(hidden_states))
        features = F.elu(tokens) + 1
        degrees = features @ features.sum(2).unsqueeze(-1)  # (batch, h, N, 1)
        factor = (features * degrees.rsqrt()).transpose(2, 3)  # (batch, h, p, N)
        update = factor.transpose(2, 3) @ (factor @ tokens)
        token_map = factor.transpose(2, 3) @ factor if output_attentions else None
        return self.merge_heads(update), token_map, factor


class SoftmaxSelfAttention(SelfAttention):
    """The usual attention with query, key and value, each with bias (ViT). Quadratic in N. The map's rows sum to 1."""

    map_formula = "softmax of scaled $Q K^T$"

    def add_weights(self, hidden_size, inner_size):
        self.q_proj = nn.Linear(hidden_size, inner_size)
        self.k_proj = nn.Linear(hidden_size, inner_size)
        self.v_proj = nn.Linear(hidden_size, inner_size)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (batch, h, N, p)."""
        q, k, v = (self.split_heads(layer(hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def forward(self, hidden_states, grid, output_attentions=False, output_factor=False):
        q, k, v = self.project(hidden_states)
        if not output_attentions:
            return self.merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scaling)), None, None
        token_map = self.attend(q, k)
        return self.merge_heads(token_map @ v), token_map, None


class AgentSelfAttention(SoftmaxSelfAttention):
    """
    A pretrained query-key-value attention made to work through representatives (the paper's adaptation of ViT; agent
    attention, arXiv 2312.08874): they read the values, and every token reads them. No contraction, no steps. Linear in
    N. The map is `B A`, B the tokens' weights over the representatives; its rows sum to 1.
    """

    uses_representatives = True
    has_factor = True
    map_formula = "$B A$"

    def forward(self, hidden_states, grid, output_attentions=False, output_factor=False):
        q, k, v = self.project(hidden_states)
        representatives = self.representatives(q, grid)
        if not (output_attentions or output_factor):
            gathered = F.scaled_dot_product_attention(representatives, k, v, scale=self.scaling)
            update = F.scaled_dot_product_attention(q, representatives, gathered, scale=self.scaling)
            return self.merge_heads(update), None, None
        factor = self.attend(representatives, k)
        spread = self.attend(q, representatives)  # (batch, h, N, m)
        update = spread @ (factor @ v)
        return self.merge_heads(update), spread @ factor if output_attentions else None, factor


ATTENTIONS = {
    "cbsa": ContractAndBroadcastSelfAttention,
    "mssa": MultiHeadSubspaceSelfAttention,
    "tssa": TokenStatisticsSelfAttention,
    "linear": LinearSelfAttention,
    "softmax": SoftmaxSelfAttention,
    "agent": AgentSelfAttention,
}

__all__ = [
    "ATTENTIONS",
    "AgentSelfAttention",
    "ContractAndBroadcastSelfAttention",
    "ContractionSteps",
    "LearnedRepresentatives",
    "LinearSelfAttention",
    "MultiHeadSubspaceSelfAttention",
    "PooledRepresentatives",
    "SelfAttention",
    "SoftmaxSelfAttention",
    "TokenStatisticsSelfAttention",
]
