"""
Mask decoders for semantic segmentation: patch tokens in, logits of a mask for each class out.

Each decoder is a class; the table at the end has them by name. To add a decoder, write its class and enter it in the
table and in `DecoderType` of `configuration_cbsa.py`.
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
    Base class of the decoders. In this file d is the width of the tokens and K the number of classes.

    Args:
        config: its fields `decoder_*`, `num_labels`, `layer_norm_eps` and `folded` are used.
        hidden_size: d.
        base_num_patches: N0 of the size factor of [`ContractAndBroadcastSelfAttention`]; None for no size factor.

    Attributes:
        has_class_tokens: whether there are class tokens, whose attention to the patches can be returned.
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
            hidden_states: (batch, patches, d), the patch tokens row by row.
            grid: (height, width) of the patches.
            output_attentions: whether to return the attention of the class tokens.

        Returns:
            The logits of the masks (batch, K, *grid); and per layer the attention of the class tokens, see
            [`MaskDecoderLayer`], or None.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it makes masks.")


class LinearMaskDecoder(MaskDecoder):
    """A linear layer on each patch token: the baseline for the other decoders."""

    def __init__(self, config: CBSAConfig, hidden_size: int, base_num_patches: int | None = None):
        super().__init__(config, hidden_size, base_num_patches)
        self.classifier = nn.Linear(hidden_size, config.num_labels)

    def forward(self, hidden_states, grid, output_attentions=False):
        """The logits of the masks (batch, K, *grid), and None: there are no class tokens."""
        return self.classifier(hidden_states).transpose(1, 2).unflatten(2, grid), None


class MaskDecoderLayer(GradientCheckpointingLayer):
    """
    A layer on patch and class tokens: `x = x + attention(LN(x))`, then `x = x + mlp(LN(x))` if there is an MLP.

    Args:
        config, hidden_size, base_num_patches: see [`MaskDecoder`].
        attention_type: name of the operator in `ATTENTIONS`.
        head_dim: dimension of one of its heads.
        has_mlp: whether there is an MLP.
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
            output_attentions: whether to return the attention of the class tokens.

        Returns:
            The tokens after this layer, of the same shape; and a pair or None: how much each class token reads from
            the patches, and how much it writes to them. These are its row and its column of the token-to-token map,
            each (batch, heads, K, *grid).
        """
        update, token_map, attention = self.attention(
            self.layernorm_before(hidden_states),
            grid,
            output_attentions=output_attentions and not self.map_is_gram,
            output_representative_attentions=output_attentions and self.map_is_gram,
        )
        hidden_states = hidden_states + update
        if self.has_mlp:
            hidden_states = hidden_states + self.feed_forward(self.layernorm_after(hidden_states))
        if not output_attentions:
            return hidden_states, None
        num_patches = grid[0] * grid[1]
        if self.map_is_gram:  # A^T A is symmetric, and the rows of the classes take time linear in the patches
            reads = writes = attention[..., num_patches:].transpose(2, 3) @ attention[..., :num_patches]
        else:
            reads = token_map[:, :, num_patches:, :num_patches]
            writes = token_map[:, :, :num_patches, num_patches:].transpose(2, 3)
        return hidden_states, (reads.unflatten(3, grid), writes.unflatten(3, grid))


class OneClassNorm(nn.LayerNorm):
    """Replaces the LayerNorm over the classes if there is one class, whose logit would be 0: scale and shift only."""

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        """(..., 1) -> (..., 1)."""
        return masks * self.weight + self.bias


class ClassTokenMaskDecoder(MaskDecoder):
    """
    Base class of the decoders in which class tokens, one learned embedding per class, attend together with the
    patches. The mask of a class is the similarity of the patches to its token after the last layer.

    Attributes:
        attention_type: name of the operator in `ATTENTIONS`.
        head_dim: dimension of a head if the configuration gives none; None for d / number of heads.
        has_mlp: whether the layers have an MLP.
    """

    has_class_tokens = True
    attention_type: str
    head_dim: int | None = 100  # as published
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
        """Cosine similarities: (batch, patches, d), (batch, K, d) -> (batch, patches, K)."""
        return F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2)

    def forward(self, hidden_states, grid, output_attentions=False):
        """The logits of the masks and the attention of the class tokens; shapes as in [`MaskDecoder`]."""
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
    The decoder of CBT (arXiv 2509.16875): layers of CBSA without a feed-forward. The representatives are pooled from
    the patches, and attend to patches and class tokens. Linear in the number of patches.
    """

    attention_type = "cbsa"


class MultiHeadSubspaceMaskDecoder(ClassTokenMaskDecoder):
    """The same with CRATE's attention (the idea of DEPICT, arXiv 2411.03033). Quadratic in the number of patches."""

    attention_type = "mssa"


class SegmenterMaskDecoder(ClassTokenMaskDecoder):
    """
    The mask transformer of Segmenter (arXiv 2105.05633): a linear layer, layers of ViT, and a linear layer each for
    the patches and the class tokens before they are compared. Quadratic in the number of patches.
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
        """Cosine similarities after a linear layer each: (batch, patches, d), (batch, K, d) -> (batch, patches, K)."""
        return super().compare(self.patch_proj(patches), self.class_proj(classes))

    def forward(self, hidden_states, grid, output_attentions=False):
        """The logits of the masks and the attention of the class tokens; shapes as in [`MaskDecoder`]."""
        return super().forward(self.input_proj(hidden_states), grid, output_attentions)


class ZeroConv2d(nn.Conv2d):
    """A convolution whose weights begin at 0, so that its output begins at 0 (arXiv 2302.05543)."""


class StemSkip(nn.Module):
    """
    Adds detail to the masks of a decoder, which have one logit for each patch and class. It is the convolutional stem
    in reverse: it begins with the patch tokens, and each convolution but the last halves the width and is followed by
    doubling height and width. The stem's map of that size is then added, as in a U-Net (arXiv 1505.04597). The logits
    at the end have half the resolution of the image, and are added to those of the decoder.

    The decoder published with CBT has no such part. The added logits begin at 0, so a segmenter that was trained
    without this part keeps its masks at first.

    Args:
        config: its fields `hidden_size`, `patch_size` and `num_labels` are used.
    """

    def __init__(self, config: CBSAConfig):
        super().__init__()
        widths = [config.hidden_size >> i for i in range(config.patch_size.bit_length() - 1)]
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(width_in, width_out, kernel_size=3, padding=1)
                for width_in, width_out in zip(widths, [*widths[1:], widths[-1]], strict=True)
            ]
        )
        self.classifier = ZeroConv2d(widths[-1], config.num_labels, kernel_size=1)

    def forward(
        self, masks: torch.Tensor, hidden_states: torch.Tensor, stem_maps: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """
        Args:
            masks: (batch, K, grid height, grid width), logits from a decoder.
            hidden_states: (batch, patches, d), the patch tokens that the decoder took.
            stem_maps: of the stem, each (batch, width, height, width), from fine to coarse.

        Returns:
            Logits (batch, K, height, width) at the size of the finest map.
        """
        features = hidden_states.transpose(1, 2).unflatten(2, masks.shape[2:])
        *halving, last = self.convolutions
        for convolution, stem_map in zip(halving, reversed(stem_maps), strict=True):
            features = F.gelu(convolution(features))
            features = stem_map + F.interpolate(features, size=stem_map.shape[2:], mode="bilinear")
        features = F.gelu(last(features))
        return F.interpolate(masks, size=features.shape[2:], mode="bilinear") + self.classifier(features)


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
    "StemSkip",
    "ZeroConv2d",
]
