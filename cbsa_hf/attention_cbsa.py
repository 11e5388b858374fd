"""
Contract-and-Broadcast Self-Attention (CBSA) and the operators that it generalises: tokens in, an update of them out.

Each operator is a class; the table at the end has them by name. To add an operator, write its class and enter it in
the table and in `AttentionType` of `configuration_cbsa.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import is_torchdynamo_compiling

from .configuration_cbsa import CBSAConfig, to_pair


def block_norm(config: CBSAConfig, width: int) -> nn.LayerNorm:
    """
    The LayerNorm before a block. A folded model has its scale and shift in the first layer of the block, so that this
    norm has no weights there.
    """
    return nn.LayerNorm(width, eps=config.layer_norm_eps, elementwise_affine=not config.folded)


def adaptive_bins(length: int, num_bins: int, like: torch.Tensor) -> torch.Tensor:
    """
    The matrix of `F.adaptive_avg_pool1d`: its product with a signal is the pooled signal.

    Args:
        length: number of entries of the signal.
        num_bins: number of entries after pooling; may be larger than `length`.
        like: gives dtype and device.

    Returns:
        (num_bins, length); rows sum to 1.
    """
    position = torch.arange(length, device=like.device)
    bin_index = torch.arange(num_bins, device=like.device).unsqueeze(1)
    # Bin i starts at floor(i n / m) and ends before ceil((i + 1) n / m); written without division.
    inside = ((position + 1) * num_bins > bin_index * length) & (position * num_bins < (bin_index + 1) * length)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True).to(like.dtype)


class PooledRepresentatives(nn.Module):
    """
    Initial representatives: the average of the tokens in each bin of the grid of patches. The bins are those of
    `F.adaptive_avg_pool2d`: they differ in size and may overlap.

    Args:
        size: (height, width) of the grid of representatives, or one side of a square; height * width is m.
        first_token: index of the token of the patch at the top left.
    """

    def __init__(self, size: int | Iterable[int], first_token: int):
        super().__init__()
        self.size = to_pair(size)
        self.first_token = first_token

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, heads, tokens, p) -> (batch, heads, m, p)."""
        patches = tokens.transpose(1, 2)[:, self.first_token : self.first_token + grid[0] * grid[1]]
        patches = patches.flatten(2).unflatten(1, grid)  # (batch, height, width, heads * p)
        # torch's own pool is faster, but ties a compiled graph to one size; the old ONNX exporter knows few cases.
        if is_torchdynamo_compiling() or torch.jit.is_tracing():
            rows, columns = (adaptive_bins(n, m, patches) for n, m in zip(grid, self.size, strict=True))
            bins = rows @ (columns @ patches).flatten(2)  # in this order no product needs a copy in another layout
        else:
            bins = F.adaptive_avg_pool2d(patches.movedim(3, 1), self.size).movedim(1, 3)  # channels last, the fastest
        return bins.reshape(tokens.shape[0], self.size[0] * self.size[1], tokens.shape[1], -1).transpose(1, 2)


class LearnedRepresentatives(nn.Module):
    """
    Initial representatives that are parameters, the same for every image: the baseline for pooled ones.

    Args:
        num_heads: h.
        num_representatives: m.
        head_dim: p.
    """

    def __init__(self, num_heads: int, num_representatives: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, num_representatives, head_dim))

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, heads, tokens, p) -> (batch, heads, m, p)."""
        return self.weight.expand(tokens.shape[0], -1, -1, -1)


class SelfAttention(nn.Module):
    """
    Base class of the operators. In this file d is the width of the tokens, h the number of heads, p the dimension of a
    head, N the number of tokens, and m the number of representatives.

    All operators are built with the same arguments. An operator ignores those that it does not need.

    Args:
        hidden_size: d.
        num_heads: h.
        head_dim: p; h * p may differ from d.
        representatives: module that makes the initial representatives, [`PooledRepresentatives`] or
            [`LearnedRepresentatives`].
        base_num_patches: N0 of the size factor of [`ContractAndBroadcastSelfAttention`], in patches; None for no size
            factor.
        num_other_tokens: number of tokens beside the patches that N and N0 count too, such as the class tokens of a
            mask decoder.
        folded: whether the weights are those of a folded model, see [`fold`].

    Attributes:
        uses_representatives: whether the operator needs `representatives`.
        has_representative_attentions: whether `forward` can return the representative attentions A.
        map_is_gram: whether the token-to-token map is `A^T A`.
        map_is_exact: whether the update, before the output layer, is the map times the values.
        map_formula: formula of the map, for titles.
    """

    uses_representatives = False
    has_representative_attentions = False
    map_is_gram = False
    map_is_exact = True
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
        self.head_dim = head_dim
        self.scaling = head_dim**-0.5
        self.base_num_patches = base_num_patches
        self.num_other_tokens = num_other_tokens
        self.representatives = representatives if self.uses_representatives else None
        self.out_proj = nn.Linear(num_heads * head_dim, hidden_size)
        self.add_weights(hidden_size, num_heads * head_dim)

    def add_weights(self, hidden_size: int, inner_size: int):
        """Creates the weights of the operator beside those of the output layer; `inner_size` is h * p."""
        raise NotImplementedError(f"{type(self).__name__} does not say which weights it has.")

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(batch, N, h * p) -> (batch, h, N, p)."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge_heads(self, update: torch.Tensor) -> torch.Tensor:
        """(batch, h, N, p) -> (batch, N, d), through the output layer."""
        return self.out_proj(update.transpose(1, 2).flatten(2))

    def attend(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """
        The softmax over the keys of `queries keys^T / sqrt(p)`.

        (batch, h, queries, p), (batch, h, keys, p) -> (batch, h, queries, keys); rows sum to 1.
        """
        return torch.softmax((queries * self.scaling) @ keys.transpose(2, 3), dim=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid: tuple[int, int],
        output_attentions: bool = False,
        output_representative_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Where the map is exact and not `A^T A`, the update is computed from the map whenever the map is asked for, so
        that the model's outputs have a gradient with respect to the map. Where it is `A^T A`, they have one with
        respect to A.

        Args:
            hidden_states: (batch, N, d), already normalised.
            grid: (height, width) of the patches among the tokens.
            output_attentions: whether to return the token-to-token map, which takes memory quadratic in N.
            output_representative_attentions: whether to return A. An operator that has A at hand returns it anyway.

        Returns:
            The update (batch, N, d), without the residual; the token-to-token map (batch, h, N, N), or None; the
            representative attentions A (batch, h, m, N), or None.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it attends.")


class SharedProjectionSelfAttention(SelfAttention):
    """
    Base class of the white-box operators, in which one projection gives queries, keys and values: the tokens W. The
    projection has a bias only in a folded model: the shift of the norm before it.
    """

    def add_weights(self, hidden_size, inner_size):
        """Creates the shared projection, (d, h * p)."""
        self.proj = nn.Linear(hidden_size, inner_size, bias=self.folded)


@dataclass
class ContractionSteps:
    """
    The steps of [`ContractAndBroadcastSelfAttention`] before the broadcast (arXiv 2509.16875, section 3).

    Args:
        tokens: (batch, h, N, p), W: the projected tokens.
        initial_representatives: (batch, h, m, p), Q0: pooled from W, or learned.
        attention: (batch, h, m, N), A: attention of each representative over the tokens; rows sum to 1.
        representatives: (batch, h, m, p), Q: moved towards the tokens that they attend to.
        similarity: (batch, h, m, m), S: attention of the representatives over one another; rows sum to 1.
        contracted: (batch, h, m, p), C: the means of the representatives, weighted by S.
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

    m representatives attend to the tokens, then to one another, and give the result back to the tokens through the
    same attention A, transposed. Linear in N. The map is `A^T A`, which leaves the contraction out.

    The rows of A sum to 1 over the N tokens, so `A^T C` shrinks as 1 / N when an image grows. The size factor N / N0
    undoes this: it is 1 at the size that the weights were trained for. Without `base_num_patches` it is always 1, as
    in the reference implementation.
    """

    uses_representatives = True
    has_representative_attentions = True
    map_is_gram = True
    map_is_exact = False
    map_formula = "$A^T A$"

    def add_weights(self, hidden_size, inner_size):
        """Creates the shared projection and the two step sizes, (h, 1, 1), which start at 1."""
        super().add_weights(hidden_size, inner_size)
        self.step_rep = nn.Parameter(torch.ones(self.num_heads, 1, 1))
        self.step_x = nn.Parameter(torch.ones(self.num_heads, 1, 1))

    def size_factor(self, grid: tuple[int, int]) -> float | torch.Tensor:
        """N / N0 for a grid of (height, width) patches; 1 without `base_num_patches`."""
        if self.base_num_patches is None:
            return 1.0
        num_patches = grid[0] * grid[1]
        if is_torchdynamo_compiling():  # Inductor fails at products with a number that depends on the size
            num_patches = self.step_x.new_ones(grid, dtype=torch.float32).sum()
        return (num_patches + self.num_other_tokens) / (self.base_num_patches + self.num_other_tokens)

    def step_size(self, grid: tuple[int, int]) -> float | torch.Tensor:
        """`step_x` times the size factor; a folded model has `step_x` in its output layer."""
        return self.size_factor(grid) if self.folded else self.step_x * self.size_factor(grid)

    def steps(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> ContractionSteps:
        """
        The steps before the broadcast. The update is `step_x * size_factor * A^T C`, through the output layer.

        Args:
            hidden_states: (batch, N, d), already normalised.
            grid: (height, width) of the patches among the tokens.
        """
        tokens = self.split_heads(self.proj(hidden_states))

        initial_representatives = self.representatives(tokens, grid).contiguous()
        tokens = tokens.contiguous()  # one copy of each; otherwise every product makes its own
        attention = self.attend(initial_representatives, tokens)
        representatives = initial_representatives + self.step_rep * (attention @ tokens)
        # `scaled_dot_product_attention` is slower for so few representatives, by a quarter of a training step on CPU.
        similarity = self.attend(representatives, representatives)
        contracted = similarity @ representatives

        return ContractionSteps(tokens, initial_representatives, attention, representatives, similarity, contracted)

    def forward(self, hidden_states, grid, output_attentions=False, output_representative_attentions=False):
        """
        The update, the map `A^T A` and A; shapes as in [`SelfAttention`]. A is always returned, since it is at hand.
        """
        steps = self.steps(hidden_states, grid)
        update = steps.attention.transpose(2, 3) @ (self.step_size(grid) * steps.contracted)
        token_map = steps.attention.transpose(2, 3) @ steps.attention if output_attentions else None
        return self.merge_heads(update), token_map, steps.attention


class MultiHeadSubspaceSelfAttention(SharedProjectionSelfAttention):
    """
    Softmax attention with one shared projection (MSSA of CRATE, arXiv 2306.01129): CBSA in which the tokens are their
    own representatives. Quadratic in N. The map is `softmax(W W^T / sqrt(p))`.
    """

    map_formula = "softmax of scaled $W W^T$"

    def forward(self, hidden_states, grid, output_attentions=False, output_representative_attentions=False):
        """The update, the map `softmax(W W^T / sqrt(p))` and None; shapes as in [`SelfAttention`]."""
        tokens = self.split_heads(self.proj(hidden_states))
        if not output_attentions:
            update = F.scaled_dot_product_attention(tokens, tokens, tokens, scale=self.scaling)
            return self.merge_heads(update), None, None
        token_map = self.attend(tokens, tokens)
        return self.merge_heads(token_map @ tokens), token_map, None


class TokenStatisticsSelfAttention(SharedProjectionSelfAttention):
    """
    Attention from the second moments of the tokens, without products of pairs of tokens (TSSA of ToST, arXiv
    2412.17810): the case of fixed orthogonal representatives. Linear in N.

    The map is the softmax over the heads of `W W^T`, as in the reference implementation. The update does not use it.
    """

    map_is_exact = False
    map_formula = "softmax over heads of $W W^T$"

    def add_weights(self, hidden_size, inner_size):
        """Creates the shared projection and the temperatures, (h, 1), which start at 1."""
        super().add_weights(hidden_size, inner_size)
        self.temp = nn.Parameter(torch.ones(self.num_heads, 1))

    def forward(self, hidden_states, grid, output_attentions=False, output_representative_attentions=False):
        """The update, the softmax over the heads of `W W^T`, and None; shapes as in [`SelfAttention`]."""
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

    `phi(W) = D^(-1/2) (elu(W) + 1)`: the positive features of linear attention (arXiv 2006.16236), divided by the
    square root of the degrees D of the tokens. With `A = phi(W)^T`, (p, N), the map `A^T A` is the symmetrically
    normalised affinity of the tokens; its largest eigenvalue is 1 for every N.
    """

    has_representative_attentions = True
    map_is_gram = True
    map_formula = "$A^T A$"

    def forward(self, hidden_states, grid, output_attentions=False, output_representative_attentions=False):
        """The update, the map `A^T A` and A with p rows instead of m; other shapes as in [`SelfAttention`]."""
        tokens = self.split_heads(self.proj(hidden_states))
        features = F.elu(tokens) + 1
        degrees = features @ features.sum(2).unsqueeze(-1)  # (batch, h, N, 1)
        attention = (features * degrees.rsqrt()).transpose(2, 3)  # (batch, h, p, N)
        update = attention.transpose(2, 3) @ (attention @ tokens)
        token_map = attention.transpose(2, 3) @ attention if output_attentions else None
        return self.merge_heads(update), token_map, attention


class SoftmaxSelfAttention(SelfAttention):
    """
    Attention of the Vision Transformer (arXiv 2010.11929): queries, keys and values with a projection and a bias each.
    Quadratic in N. The map is `softmax(Q K^T / sqrt(p))`; its rows sum to 1.
    """

    map_formula = "softmax of scaled $Q K^T$"

    def add_weights(self, hidden_size, inner_size):
        """Creates the projections of queries, keys and values, each (d, h * p) with a bias."""
        self.q_proj = nn.Linear(hidden_size, inner_size)
        self.k_proj = nn.Linear(hidden_size, inner_size)
        self.v_proj = nn.Linear(hidden_size, inner_size)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (batch, h, N, p)."""
        q, k, v = (self.split_heads(layer(hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def forward(self, hidden_states, grid, output_attentions=False, output_representative_attentions=False):
        """The update, the map `softmax(Q K^T / sqrt(p))` and None; shapes as in [`SelfAttention`]."""
        q, k, v = self.project(hidden_states)
        if not output_attentions:
            return self.merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scaling)), None, None
        token_map = self.attend(q, k)
        return self.merge_heads(token_map @ v), token_map, None


class AgentSelfAttention(SoftmaxSelfAttention):
    """
    Attention with the weights of a pretrained ViT, through representatives that are pooled from the queries (agent
    attention, arXiv 2312.08874; the adaptation of ViT in arXiv 2509.16875). The representatives attend to the tokens
    (A), and every token attends to the representatives (B). Linear in N. The map is `B A`; its rows sum to 1.
    """

    uses_representatives = True
    has_representative_attentions = True
    map_formula = "$B A$"

    def forward(self, hidden_states, grid, output_attentions=False, output_representative_attentions=False):
        """
        The update, the map `B A` and A; shapes as in [`SelfAttention`]. A is None unless it or the map was asked for.
        """
        q, k, v = self.project(hidden_states)
        representatives = self.representatives(q, grid)
        if not (output_attentions or output_representative_attentions):
            gathered = F.scaled_dot_product_attention(representatives, k, v, scale=self.scaling)
            update = F.scaled_dot_product_attention(q, representatives, gathered, scale=self.scaling)
            return self.merge_heads(update), None, None
        attention = self.attend(representatives, k)  # A: (batch, h, m, N)
        broadcast = self.attend(q, representatives)  # B: (batch, h, N, m)
        token_map = broadcast @ attention if output_attentions else None
        update = token_map @ v if output_attentions else broadcast @ (attention @ v)
        return self.merge_heads(update), token_map, attention


def pick(blocks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """
    Entry (b, h, n) of the result is `blocks[b, h, index[b, h, n]]`.

    (batch, h, M, ...), (batch, h, n) -> (batch, h, n, ...).
    """
    batch_size, num_heads, num_blocks = blocks.shape[:3]
    first = num_blocks * torch.arange(batch_size * num_heads, device=index.device).view(batch_size, num_heads, 1)
    return blocks.flatten(0, 2).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


class MixtureOfTopKSelfAttention(SoftmaxSelfAttention):
    """
    Mixture-of-top-k attention (MiTA, arXiv 2602.01219) with the weights of a pretrained ViT. Linear in N.

    M landmarks are pooled from the queries. Each landmark attends to all tokens (A), which gives its value `A V`, and
    selects the 25 tokens with the largest logits. A query attends, in one softmax, to all landmarks and to the tokens
    that the landmark most similar to it has selected. As in the reference implementation the logits of the landmarks
    are divided by p, and those of the tokens by sqrt(p).

    In training, memory grows with 2 * 25 * p numbers for each query and head: the copies of keys and values.

    The map is `B A + C`, B the weights of the landmarks and C those of the selected tokens; its rows sum to 1.
    """

    uses_representatives = True
    has_representative_attentions = True
    map_formula = "$B A + C$"
    num_keys = 25
    tile = 512  # queries whose keys and values are copied at a time

    def attend_jointly(
        self, queries: torch.Tensor, similarity: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Weights of the landmarks and of the selected tokens, which together sum to 1.

        (batch, h, n, p), (batch, h, n, M), (batch, h, n, k, p) -> (batch, h, n, M), (batch, h, n, k).
        """
        to_keys = (keys @ queries.unsqueeze(-1)).squeeze(-1)
        weights = torch.softmax(torch.cat([self.scaling**2 * similarity, self.scaling * to_keys], dim=-1), dim=-1)
        num_landmarks = similarity.shape[-1]
        return weights[..., :num_landmarks], weights[..., num_landmarks:]

    def forward(self, hidden_states, grid, output_attentions=False, output_representative_attentions=False):
        """The update, the map `B A + C` and A; shapes as in [`SelfAttention`], with m = M."""
        q, k, v = self.project(hidden_states)
        landmarks = self.representatives(q, grid)
        logits = landmarks @ k.transpose(2, 3) * self.scaling
        attention = torch.softmax(logits, dim=-1)  # A: (batch, h, M, N)
        selected = logits.topk(min(self.num_keys, logits.shape[-1]), dim=-1).indices  # (batch, h, M, k)
        keys, values = (pick(x, selected.flatten(2)).unflatten(2, selected.shape[2:]) for x in (k, v))
        similarity = q @ landmarks.transpose(2, 3)  # (batch, h, N, M)
        nearest = similarity.argmax(-1)

        if output_attentions:
            to_landmarks, to_keys = self.attend_jointly(q, similarity, pick(keys, nearest))
            token_map = (to_landmarks @ attention).scatter_add(-1, pick(selected, nearest), to_keys)
            return self.merge_heads(token_map @ v), token_map, attention

        tiles = [(q, similarity, nearest)]
        if not is_torchdynamo_compiling():  # a graph would be tied to one number of tiles
            tiles = zip(*(x.split(self.tile, dim=2) for x in tiles[0]), strict=True)
        gathered = attention @ v
        updates = []
        for queries, similar, index in tiles:
            to_landmarks, to_keys = self.attend_jointly(queries, similar, pick(keys, index))
            updates.append(to_landmarks @ gathered + (to_keys.unsqueeze(-2) @ pick(values, index)).squeeze(-2))
        return self.merge_heads(torch.cat(updates, dim=2)), None, attention


ATTENTIONS = {
    "cbsa": ContractAndBroadcastSelfAttention,
    "mssa": MultiHeadSubspaceSelfAttention,
    "tssa": TokenStatisticsSelfAttention,
    "linear": LinearSelfAttention,
    "softmax": SoftmaxSelfAttention,
    "agent": AgentSelfAttention,
    "mita": MixtureOfTopKSelfAttention,
}

__all__ = [
    "ATTENTIONS",
    "AgentSelfAttention",
    "ContractAndBroadcastSelfAttention",
    "ContractionSteps",
    "LearnedRepresentatives",
    "LinearSelfAttention",
    "MixtureOfTopKSelfAttention",
    "MultiHeadSubspaceSelfAttention",
    "PooledRepresentatives",
    "SelfAttention",
    "SoftmaxSelfAttention",
    "TokenStatisticsSelfAttention",
]
