"""
Decoders for semantic segmentation: the encoder's patch tokens and their grid in, a mask of logits for each class out.

One class a decoder, one table by name at the end; to add one, write a class and enter it there.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_cbsa import ATTENTIONS, PooledRepresentatives, block_norm
from .configuration_cbsa import CBSAConfig


class MaskDecoder(nn.Module):
    """
    What all decoders share. Below, d is the width of the tokens, K the number of classes.

    Args:
        config: of which the fields `decoder_*`, `num_labels` and `layer_norm_eps` count.
        hidden_size: d.
        base_num_patches: N0 of [`ContractAndBroadcastSelfAttention`]; None leaves its factor out.

    Attributes:
        has_class_tokens: whether class tokens attend to the patches, so that there are maps to return.
    """

    has_class_tokens = False

    def __init__(self, config: CBSAConfig, hidden_size: int, base_num_patches: int | None = None):
        super().__init__()
        self.num_labels = config.num_labels

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], output_attentions: bool = False
    ) -> tuple[torch.Tensor, tuple[tuple[torch.Tensor, torch.Tensor], ...] | None]:
        """
        Args:
            hidden_states: (batch, patches, d), row by row.
            grid: (height, width) of the patches.
            output_attentions: whether the class tokens' maps are wanted.

        Returns:
            The mask logits (batch, K, *grid); and, per layer, what [`MaskDecoderLayer`] says of maps, or None when
            they were not asked for or there are no class tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it makes masks.")


class LinearMaskDecoder(MaskDecoder):
    """One linear layer on every patch token: what decoders are compared with."""

    def __init__(self, config: CBSAConfig, hidden_size: int, base_num_patches: int | None = None):
        super().__init__(config, hidden_size, base_num_patches)
        self.classifier = nn.Linear(hidden_size, config.num_labels)

    def forward(self, hidden_states, grid, output_attentions=False):
        return self.classifier(hidden_states).transpose(1, 2).unflatten(2, grid), None


class MaskDecoderLayer(GradientCheckpointingLayer):
    """
    `x = x + attention(LN(x))` on patch and class tokens, and, where the decoder has one, `x = x + mlp(LN(x))`.

    Args:
        attention_type: name of the operator.
        head_dim: dimension of one of its heads.
        has_mlp: whether a feed-forward block follows it.
        base_num_patches: see [`MaskDecoder`].
    """

    def __init__(
        self,
        config: CBSAConfig,
        hidden_size: int,
        attention_type: str,
        head_dim: int,
        has_mlp: bool,
        base_num_patches: int | None = None,
    ):
        super().__init__()
        self.layernorm_before = block_norm(config, hidden_size)
        self.attention = ATTENTIONS[attention_type](
            hidden_size,
            config.decoder_num_heads,
            head_dim,
            PooledRepresentatives(config.decoder_representatives_size, first_token=0),
            base_num_patches=base_num_patches,
            num_other_tokens=config.num_labels,
            folded=config.folded,
        )
        if has_mlp:
            self.layernorm_after = block_norm(config, hidden_size)
            self.feed_forward = nn.Sequential(
                OrderedDict(
                    fc1=nn.Linear(hidden_size, 4 * hidden_size),
                    gelu=nn.GELU(),
                    fc2=nn.Linear(4 * hidden_size, hidden_size),
                )
            )
        self.has_mlp = has_mlp
        self.map_is_gram = self.attention.map_is_gram

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], output_attentions: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """
        Args:
            hidden_states: (batch, patches + K, d), the class tokens last.
            grid: (height, width) of the patches.
            output_attentions: whether the class tokens' maps are wanted.

        Returns:
            The tokens after this layer; and what each class token reads from the patches and what it writes to them,
            its row and its column of the token-to-token map, each (batch, heads, K, *grid), or None.
        """
        from_factor = output_attentions and self.map_is_gram
        update, token_map, factor = self.attention(
            self.layernorm_before(hidden_states), grid, output_attentions and not from_factor, from_factor
        )
        hidden_states = hidden_states + update
        if self.has_mlp:
            hidden_states = hidden_states + self.feed_forward(self.layernorm_after(hidden_states))
        if not output_attentions:
            return hidden_states, None
        num_patches = grid[0] * grid[1]
        if from_factor:  # A^T A is symmetric, and these rows of it are linear in the number of patches
            reads = writes = factor[..., num_patches:].transpose(2, 3) @ factor[..., :num_patches]
        else:
            reads = token_map[:, :, num_patches:, :num_patches]
            writes = token_map[:, :, :num_patches, num_patches:].transpose(2, 3)
        return hidden_states, (reads.unflatten(3, grid), writes.unflatten(3, grid))


class OneClassNorm(nn.LayerNorm):
    """What is left of LayerNorm over the classes for a single one, which it would bring to 0: scale and shift."""

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        return masks * self.weight + self.bias


class ClassTokenMaskDecoder(MaskDecoder):
    """
    Class tokens, one learned embedding a class, attend together with the patches; the mask of a class is how similar
    the patches are to its token in the end.
    """

    has_class_tokens = True
    attention_type: str
    head_dim: int | None = 100  # as published; None divides the width by the number of heads
    has_mlp = False

    def __init__(self, config: CBSAConfig, hidden_size: int, base_num_patches: int | None = None):
        super().__init__(config, hidden_size, base_num_patches)
        head_dim = config.decoder_head_dim or self.head_dim or hidden_size // config.decoder_num_heads
        self.class_embeddings = nn.Parameter(torch.zeros(1, config.num_labels, hidden_size))
        self.layers = nn.ModuleList(
            [
                MaskDecoderLayer(config, hidden_size, self.attention_type, head_dim, self.has_mlp, base_num_patches)
                for _ in range(config.decoder_num_layers)
            ]
        )
        self.layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        norm = nn.LayerNorm if config.num_labels > 1 else OneClassNorm
        self.mask_norm = norm(config.num_labels, eps=config.layer_norm_eps)

    def compare(self, patches: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Patches (batch, patches, d) and class tokens (batch, K, d) -> their cosines (batch, patches, K)."""
        return F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2)

    def forward(self, hidden_states, grid, output_attentions=False):
        class_tokens = self.class_embeddings.expand(hidden_states.shape[0], -1, -1)
        hidden_states = torch.cat([hidden_states, class_tokens], dim=1)
        attentions = ()
        for layer in self.layers:
            hidden_states, maps = layer(hidden_states, grid, output_attentions)
            attentions += (maps,)
        patches, classes = self.layernorm(hidden_states).split([grid[0] * grid[1], self.num_labels], dim=1)
        masks = self.mask_norm(self.compare(patches, classes))
        return masks.transpose(1, 2).unflatten(2, grid), attentions if output_attentions else None


class ContractAndBroadcastMaskDecoder(ClassTokenMaskDecoder):
    """
    The decoder of CBT (arXiv 2509.16875): CBSA, whose representatives are pooled from the patches alone; the class
    tokens are read and written like any other. No feed-forward. Linear in the number of patches.
    """

    attention_type = "cbsa"


class MultiHeadSubspaceMaskDecoder(ClassTokenMaskDecoder):
    """The same with CRATE's attention (the idea of DEPICT, arXiv 2411.03033). Quadratic in the number of patches."""

    attention_type = "mssa"


class SegmenterMaskDecoder(ClassTokenMaskDecoder):
    """
    The mask transformer of Segmenter (arXiv 2105.05633): a projection, blocks of ViT, and a projection each for the
    patches and the classes before they are compared. Quadratic in the number of patches.
    """

    attention_type = "softmax"
    head_dim = None
    has_mlp = True

    def __init__(self, config: CBSAConfig, hidden_size: int, base_num_patches: int | None = None):
        super().__init__(config, hidden_size, base_num_patches)
        self.input_proj = nn.Linear(hidden_size, hidden_size)
        self.patch_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.class_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def compare(self, patches, classes):
        return super().compare(self.patch_proj(patches), self.class_proj(classes))

    def forward(self, hidden_states, grid, output_attentions=False):
        return super().forward(self.input_proj(hidden_states), grid, output_attentions)


DECODERS = {
    "cbsa": ContractAndBroadcastMaskDecoder,
    "mssa": MultiHeadSubspaceMaskDecoder,
    "softmax": SegmenterMaskDecoder,
    "linear": LinearMaskDecoder,
}

__all__ = [
    "DECODERS",
    "ClassTokenMaskDecoder",
    "ContractAndBroadcastMaskDecoder",
    "LinearMaskDecoder",
    "MaskDecoder",
    "MultiHeadSubspaceMaskDecoder",
    "SegmenterMaskDecoder",
]
