"""Contract-and-Broadcast Self-Attention: tokens and their grid in, an update of every token out."""

import torch
from torch import nn
from torch.nn import functional as F


class ContractAndBroadcastSelfAttention(nn.Module):
    """
    Compresses all tokens by contracting a few representatives (arXiv 2509.16875, section 3).

    One projection serves as query, key and value. m representatives, pooled from the grid of patches, read the tokens,
    attend to one another, and hand what they learned back through the very weights they read with. The cost is linear
    in the number of tokens.

    Args:
        hidden_size: width d of the tokens.
        num_heads: number of heads h.
        head_dim: dimension p of one head; h * p need not be d.
        representatives_size: height and width of the grid of representatives, m of them in all.
        first_pooled_token: index of the token at the grid's top left corner. Tokens before it (CLS) and after the grid
            (class embeddings) are read and updated like all others, but not pooled.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        representatives_size: int | tuple[int, int],
        first_pooled_token: int,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scaling = head_dim**-0.5
        self.representatives_size = representatives_size
        self.first_pooled_token = first_pooled_token
        self.proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(num_heads * head_dim, hidden_size)
        self.step_rep = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.step_x = nn.Parameter(torch.ones(num_heads, 1, 1))

    def pool(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Average (batch, h, tokens, p) over the bins of the grid -> (batch, h, m, p)."""
        height, width = grid
        patches = tokens[:, :, self.first_pooled_token : self.first_pooled_token + height * width]
        patches = patches.transpose(2, 3).flatten(1, 2).unflatten(2, grid)  # (batch, h p, height, width)
        bins = F.adaptive_avg_pool2d(patches, self.representatives_size)
        return bins.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)

    def attend(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Softmax weights of each query (batch, h, queries, p) over the keys -> (batch, h, queries, keys)."""
        return torch.softmax(queries @ keys.transpose(2, 3) * self.scaling, dim=-1)

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Args:
            hidden_states: (batch, tokens, d), already normalised.
            grid: (height, width) of the patch tokens.
            output_attentions: whether to build the token-to-token map.

        Returns:
            The update (batch, tokens, d), to which the caller adds the residual; the map `A^T A`
            (batch, h, tokens, tokens), or None when it was not asked for; and the factor A (batch, h, m, tokens).
        """
        tokens = self.proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, h, tokens, p)

        representatives = self.pool(tokens, grid)  # (batch, h, m, p)
        attention = self.attend(representatives, tokens)
        representatives = representatives + self.step_rep * (attention @ tokens)
        contracted = self.attend(representatives, representatives) @ representatives
        update = self.step_x * (attention.transpose(2, 3) @ contracted)

        update = self.out_proj(update.transpose(1, 2).flatten(2))
        return update, attention.transpose(2, 3) @ attention if output_attentions else None, attention


__all__ = ["ContractAndBroadcastSelfAttention"]
