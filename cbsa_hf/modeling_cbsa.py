"""The Contract-and-Broadcast Transformer (CBT) for Hugging Face Transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    ModelOutput,
    SemanticSegmenterOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling, is_torchdynamo_exporting, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .attention_cbsa import (
    ATTENTIONS,
    ContractAndBroadcastSelfAttention,
    LearnedRepresentatives,
    PooledRepresentatives,
    SelfAttention,
    TokenStatisticsSelfAttention,
    block_norm,
)
from .configuration_cbsa import CBSAConfig, to_pair
from .mask_decoder_cbsa import DECODERS, ClassTokenMaskDecoder, StemSkip, ZeroConv2d
from .tiles_cbsa import MIN_TOKENS, is_watched, layer_in_tiles


logger = logging.get_logger(__name__)


def warn_of_trace():
    """Says once, while `torch.jit.trace` or the old ONNX exporter records a graph, that the graph has one size."""
    if torch.jit.is_tracing():
        logger.warning_once(
            "`torch.jit.trace` and `torch.onnx.export(dynamo=False)` record a graph for images of this one size. "
            "`torch.export.export` and `torch.onnx.export(dynamo=True)` make a graph for every size."
        )


@dataclass
class CBSAModelOutput(BaseModelOutputWithPooling):
    """
    Output of [`CBSAModel`].

    Args:
        last_hidden_state: (batch, tokens, hidden_size), CLS first, then registers if there are any, then the patches;
            after the final LayerNorm.
        pooler_output: (batch, hidden_size), its CLS token.
        hidden_states: the embeddings and the output of every layer, each (batch, tokens, hidden_size), before the
            final LayerNorm; with `output_hidden_states=True`.
        attentions: per layer the token-to-token map, (batch, heads, tokens, tokens), for `"cbsa"` `A^T A`; with
            `output_attentions=True`.
        representative_attentions: per layer A, (batch, heads, m, tokens): for `"cbsa"` the attention of each
            representative over the tokens, whose rows sum to 1. None where the attention type has no such A. With
            `output_representative_attentions=True`.
        stem_maps: what the convolutional stem computes before the patches, each (batch, width, height, width), from
            fine to coarse, after GELU; with `output_stem_maps=True` and a configuration with `decoder_skip=True`.
    """

    representative_attentions: tuple[torch.FloatTensor, ...] | None = None
    stem_maps: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class CBSAImageClassifierOutput(ImageClassifierOutput):
    """
    Output of [`CBSAForImageClassification`].

    Args:
        loss: scalar; with `labels`.
        logits: (batch, num_labels), before the softmax.
        hidden_states, attentions, representative_attentions: see [`CBSAModelOutput`].
    """

    representative_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class CBSASemanticSegmenterOutput(SemanticSegmenterOutput):
    """
    Output of [`CBSAForSemanticSegmentation`].

    Args:
        loss: scalar, the mean cross-entropy of the pixels that are not ignored; with `labels`.
        logits: (batch, num_labels, height, width), at the size of `pixel_values`.
        hidden_states, attentions, representative_attentions: those of the encoder, see [`CBSAModelOutput`]; with
            another backbone what it returns.
        decoder_attentions: per layer of the decoder a pair `reads, writes`, each (batch, heads, num_labels, grid
            height, grid width): how much each class token reads from each patch, and how much it writes to it. For
            `"cbsa"` they are equal, since `A^T A` is symmetric. With `output_decoder_attentions=True`.
    """

    representative_attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[tuple[torch.FloatTensor, torch.FloatTensor], ...] | None = None


class CBSABatchNorm2d(nn.BatchNorm2d):
    """
    Batch norm that stays in evaluation mode while its `weight` is frozen (`requires_grad` is False), so that a frozen
    layer computes the same function before, during and after training.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> the same shape."""
        if self.weight.requires_grad or not self.training:
            return super().forward(hidden_states)
        return F.batch_norm(
            hidden_states, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class CBSAConvStem(nn.Module):
    """
    Patch embedding by 3 x 3 convolutions of stride 2 with batch norm, and GELU between them. Each halves the image,
    and each but the first doubles the width. Heights and widths are rounded up.
    """

    def __init__(self, config: CBSAConfig):
        super().__init__()
        num_convolutions = config.patch_size.bit_length() - 1
        widths = [config.hidden_size >> i for i in reversed(range(num_convolutions))]
        modules = []
        for width_in, width_out in zip([config.num_channels, *widths[:-1]], widths, strict=True):
            modules += [
                nn.Conv2d(width_in, width_out, kernel_size=3, stride=2, padding=1, bias=config.folded),
                nn.Identity() if config.folded else CBSABatchNorm2d(width_out, eps=1e-5),
                nn.GELU(),
            ]
        self.layers = nn.Sequential(*modules[:-1])
        self.patch_size = config.patch_size
        self.has_whole_maps = config.decoder_skip

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # Channels last: convolutions and batch norm are faster on a CPU, and the tokens are a view of the map.
        return self.layers(pixel_values.contiguous(memory_format=torch.channels_last))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, hidden_size, grid height, grid width)."""
        height, width = (-(-side // self.patch_size) for side in pixel_values.shape[2:])
        is_small = self.training or is_torchdynamo_compiling() or height * width < MIN_TOKENS
        if is_small or torch.is_grad_enabled() or self.has_whole_maps:
            return self.embed(pixel_values)

        # The first map has many times as many values as the last, so only a strip of it is made at a time. The row of
        # patches above a strip is computed too and left out, since the convolutions of the strip reach into that row.
        num_rows, strips = max(height // 16, 1), []
        for top in range(0, height, num_rows):
            above = min(top, 1)
            rows = slice((top - above) * self.patch_size, (top + num_rows) * self.patch_size)
            strips.append(self.embed(pixel_values[:, :, rows])[:, :, above:])
        return torch.cat(strips, dim=2)


class CBSALinearEmbedding(nn.Module):
    """
    Patch embedding of ViT: one linear layer on non-overlapping patches. Pixels at the right and at the bottom that do
    not fill a patch are ignored.
    """

    def __init__(self, config: CBSAConfig):
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, hidden_size, grid height, grid width)."""
        return self.projection(pixel_values)


class CBSAPatchify(nn.Module):
    """
    Patch embedding of CRATE: LayerNorm, linear layer and LayerNorm on non-overlapping patches. The pixels of a patch
    are flattened in the order row, column, channel. Incomplete patches are ignored, as in [`CBSALinearEmbedding`].
    """

    def __init__(self, config: CBSAConfig):
        super().__init__()
        patch_dim = config.num_channels * config.patch_size**2
        self.layernorm_before = block_norm(config, patch_dim)
        self.projection = nn.Linear(patch_dim, config.hidden_size)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.patch_size = config.patch_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, hidden_size, grid height, grid width)."""
        side = self.patch_size
        patches = pixel_values.unfold(2, side, side).unfold(3, side, side)  # (batch, channels, height, width, p, p)
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3)
        patches = self.layernorm_after(self.projection(self.layernorm_before(patches)))
        return patches.permute(0, 3, 1, 2)


PATCH_EMBEDDINGS = {"conv_stem": CBSAConvStem, "patchify": CBSAPatchify, "linear": CBSALinearEmbedding}


class CBSAEmbeddings(nn.Module):
    """
    Turns images into tokens: CLS, registers if there are any, and patches row by row. CLS and patches have learned
    position embeddings.
    """

    def __init__(self, config: CBSAConfig):
        super().__init__()
        self.image_size = to_pair(config.image_size)
        self.patch_size = config.patch_size
        self.num_channels = config.num_channels
        self.position_interpolation = config.position_interpolation
        self.patch_embeddings = PATCH_EMBEDDINGS[config.patch_embedding_type](config)
        self.grid = config.patch_grid(*self.image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.register_tokens = None
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], config.hidden_size))

    def check_size(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None):
        """Raises ValueError if the number of channels or the size of the images does not fit the model."""
        _, num_channels, height, width = pixel_values.shape
        if num_channels != self.num_channels:
            raise ValueError(f"`pixel_values` has {num_channels} channels; this model takes {self.num_channels}.")
        if height < self.patch_size or width < self.patch_size:
            raise ValueError(
                f"An input of {height} x {width} pixels (height x width) is smaller than one patch of "
                f"{self.patch_size} x {self.patch_size}; enlarge it."
            )
        if not interpolate_pos_encoding and (height, width) != self.image_size:
            raise ValueError(
                f"An input of {height} x {width} pixels (height x width) does not fit the model's "
                f"{self.image_size[0]} x {self.image_size[1]}; resize it, or pass `interpolate_pos_encoding=True`."
            )

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Position embeddings of CLS (1, 1, hidden_size) and of a grid of any size (1, patches, hidden_size)."""
        cls_position, patch_positions = self.position_embeddings.split([1, self.grid[0] * self.grid[1]], dim=1)
        # An exported graph is for every size. At the size in training the interpolation changes nothing.
        if not is_torchdynamo_exporting() and grid == self.grid:
            return cls_position, patch_positions
        patch_positions = patch_positions.transpose(1, 2).unflatten(2, self.grid)
        patch_positions = F.interpolate(
            patch_positions, size=grid, mode=self.position_interpolation, align_corners=False
        )
        return cls_position, patch_positions.flatten(2).transpose(1, 2)

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """
        (batch, channels, height, width) -> tokens (batch, tokens, hidden_size), and (height, width) of the patches.

        Raises ValueError if the number of channels or the size of the images does not fit the model.
        """
        warn_of_trace()
        self.check_size(pixel_values, interpolate_pos_encoding)
        patches = self.patch_embeddings(pixel_values.to(self.cls_token.dtype))  # (batch, hidden_size, *grid)
        grid = tuple(patches.shape[2:])
        cls_token = self.cls_token.expand(pixel_values.shape[0], -1, -1)
        patches = patches.flatten(2).transpose(1, 2)
        if torch.is_grad_enabled() or is_torchdynamo_compiling():
            # Writing to a part of a tensor is slow to differentiate, and in a graph.
            cls_position, patch_positions = self.interpolate_pos_encoding(grid)
            hidden_states = torch.cat([cls_token + cls_position, patches + patch_positions], dim=1)
        else:
            hidden_states = torch.cat([cls_token, patches], dim=1)
            del patches  # large images: the positions are made and added without a third copy of the tokens
            cls_position, patch_positions = self.interpolate_pos_encoding(grid)
            hidden_states[:, :1] += cls_position
            hidden_states[:, 1:] += patch_positions
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(pixel_values.shape[0], -1, -1)
            hidden_states = torch.cat([hidden_states[:, :1], registers, hidden_states[:, 1:]], dim=1)
        return hidden_states, grid


def ista_product(dictionary: torch.Tensor, step_size: float, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ISTA as one linear layer and a ReLU: weight `I + step * (D^T - D^T D)`, bias `-step * threshold`.

    (d, d) -> (d, d), (d,)
    """
    identity = torch.eye(len(dictionary), dtype=dictionary.dtype, device=dictionary.device)
    weight = torch.add(identity, dictionary.t() - dictionary.t() @ dictionary, alpha=step_size)
    return weight, dictionary.new_full((len(dictionary),), -step_size * threshold)


class CBSAISTA(nn.Module):
    """
    One proximal gradient step towards a sparse code in the dictionary D (CRATE, arXiv 2306.01129):
    `relu(x + step * (D^T x - D^T D x) - step * threshold)`. No skip connection.
    """

    has_skip = False
    has_norm = True

    def __init__(self, config: CBSAConfig):
        super().__init__()
        self.step_size = config.ista_step_size
        self.threshold = config.ista_threshold
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))
        # A folded model has the weight and bias of `ista_product`.
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.folded else None

    def prepare(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """This block as a function of many tokens, which may be called for some of them at a time."""
        if self.bias is not None:
            return self
        weight, bias = ista_product(self.weight, self.step_size, self.threshold)
        return lambda hidden_states: F.relu(F.linear(hidden_states, weight, bias))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., hidden_size)."""
        if self.bias is not None:
            return F.relu(F.linear(hidden_states, self.weight, self.bias))
        weight = self.weight
        # A graph takes one way for every number of tokens, so that it is not made again for some of them.
        in_graph = is_torchdynamo_compiling()
        in_one_product = in_graph or hidden_states.numel() > weight.numel()
        device = hidden_states.device.type
        is_mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not for "meta"
        # Mixed precision adds the step to `hidden_states` in their own precision; a compiler fuses the addition.
        if in_one_product and not (in_graph or is_mixed):
            return self.prepare()(hidden_states)
        if in_one_product:
            # One product with D^T - D^T D instead of two. To form this matrix costs as much as d tokens.
            gradient = F.linear(hidden_states, weight.t() - weight.t() @ weight)
        else:
            residual = hidden_states - F.linear(hidden_states, weight)  # x - D x
            gradient = F.linear(residual, weight.t())  # D^T (x - D x)
        return F.relu(torch.add(hidden_states, gradient, alpha=self.step_size) - self.step_size * self.threshold)


class CBSAODL(nn.Module):
    """
    Two proximal gradient steps towards a sparse code in an overcomplete dictionary D, and the code's product with a
    second dictionary (CRATE-alpha, arXiv 2405.20299). With step size s and threshold t, x a column:

        z1 = relu(s D^T x - s t)
        z2 = relu(z1 - s D^T (D z1 - x) - s t)
        output D1 z2

    D and D1 are (hidden_size, intermediate_size). With a skip connection.
    """

    has_skip = True
    has_norm = True

    def __init__(self, config: CBSAConfig):
        super().__init__()
        self.step_size = config.ista_step_size
        self.threshold = config.ista_threshold
        self.dictionary = nn.Parameter(torch.empty(config.hidden_size, config.intermediate_size))
        # In a folded model this is s D^T x - s t, and takes over scale and shift of the norm.
        self.in_proj = nn.Linear(config.hidden_size, config.intermediate_size) if config.folded else None
        self.out_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., hidden_size)."""
        if self.in_proj is not None:
            gradient = self.in_proj(hidden_states)
        else:
            gradient = self.step_size * (F.linear(hidden_states, self.dictionary.t()) - self.threshold)
        code = F.relu(gradient)
        reconstruction = F.linear(code, self.dictionary)
        code = F.relu(code + gradient - self.step_size * F.linear(reconstruction, self.dictionary.t()))
        return self.out_proj(code)


class CBSAMLP(nn.Module):
    """The feed-forward of ViT: two linear layers with GELU between them. With a skip connection."""

    has_skip = True
    has_norm = True

    def __init__(self, config: CBSAConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def prepare(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """See [`CBSAISTA.prepare`]."""
        return self

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., hidden_size)."""
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class CBSANoFeedForward(nn.Identity):
    """For models with attention only (arXiv 2506.03790): the identity, without a norm before it."""

    has_skip = False
    has_norm = False

    def __init__(self, config: CBSAConfig):
        super().__init__()


FEED_FORWARDS = {"ista": CBSAISTA, "odl": CBSAODL, "mlp": CBSAMLP, "none": CBSANoFeedForward}


def build_attention(config: CBSAConfig, attention_type: str, base_num_patches: int | None = None) -> SelfAttention:
    """
    The attention operator of a layer of the encoder.

    Args:
        config: says which representatives the operator has, if it needs any.
        attention_type: its name in `ATTENTIONS`.
        base_num_patches: N0 of the size factor; None for no size factor.
    """
    height, width = to_pair(config.landmarks_size if attention_type == "mita" else config.representatives_size)
    if config.representatives_type == "pool":
        # The reference implementation takes all tokens but the last for the grid, which then starts at CLS.
        first_token = {"patches": 1 + config.num_register_tokens, "all_but_last": 0}[config.pooled_tokens]
        representatives = PooledRepresentatives((height, width), first_token)
    else:
        representatives = LearnedRepresentatives(config.num_attention_heads, height * width, config.head_dim)
    return ATTENTIONS[attention_type](
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
        representatives,
        base_num_patches=base_num_patches,
        folded=config.folded,
    )


def drop_path(update: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """
    Stochastic depth (arXiv 1603.09382): in training, the update of a random share `rate` of the images is set to zero,
    and that of the others is divided by `1 - rate`. (batch, ...) -> the same shape.
    """
    if not training or rate == 0:
        return update
    kept = update.new_empty(update.shape[0], *[1] * (update.ndim - 1)).bernoulli_(1 - rate)
    return update * kept / (1 - rate)


class CBSALayer(GradientCheckpointingLayer):
    """
    A layer of the encoder: `h = z + attention(LN(z))`, then `z' = ista(LN(h))`, or `z' = h + feed_forward(LN(h))` with
    ODL or an MLP, or `z' = h` without a feed-forward.
    """

    def __init__(self, config: CBSAConfig, attention_type: str, base_num_patches: int | None = None):
        super().__init__()
        self.layernorm_before = block_norm(config, config.hidden_size)
        self.attention = build_attention(config, attention_type, base_num_patches)
        feed_forward = FEED_FORWARDS[config.feed_forward_type]
        self.layernorm_after = block_norm(config, config.hidden_size) if feed_forward.has_norm else nn.Identity()
        self.feed_forward = feed_forward(config)
        # Stored here, since adapters may wrap the feed-forward in a module without this attribute.
        self.has_skip = self.feed_forward.has_skip

    def takes_tiles(self, hidden_states: torch.Tensor) -> bool:
        """Whether the layer works in tiles: in inference, with many tokens, as long as nothing inside is looked at."""
        return (
            hidden_states.shape[1] >= MIN_TOKENS
            and not (self.training or torch.is_grad_enabled() or is_torchdynamo_compiling())
            and isinstance(self.attention, ContractAndBroadcastSelfAttention)
            and isinstance(self.feed_forward, (*FEED_FORWARDS.values(),))
            and not is_watched(self)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid: tuple[int, int],
        output_attentions: bool = False,
        output_representative_attentions: bool = False,
        drop_path_rate: float = 0.0,
    ) -> torch.Tensor:
        if not (output_attentions or output_representative_attentions) and self.takes_tiles(hidden_states):
            return layer_in_tiles(self, hidden_states, grid)
        update, _, _ = self.attention(
            self.layernorm_before(hidden_states), grid, output_attentions, output_representative_attentions
        )
        hidden_states = hidden_states + drop_path(update, drop_path_rate, self.training)
        update = self.feed_forward(self.layernorm_after(hidden_states))
        return hidden_states + drop_path(update, drop_path_rate, self.training) if self.has_skip else update


class CBSAPreTrainedModel(PreTrainedModel):
    """Base class of the models: initial weights, outputs on request, and what Transformers needs to know."""

    config: CBSAConfig
    base_model_prefix = "cbsa"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CBSAEmbeddings", "CBSALayer", *(part.__name__ for part in (*DECODERS.values(), StemSkip))]
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": CBSALayer,
        "attentions": OutputRecorder(SelfAttention, index=1),
        "representative_attentions": OutputRecorder(SelfAttention, index=2),
        "stem_maps": OutputRecorder(nn.GELU, layer_name="patch_embeddings"),
    }
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            # torch's default, of variance 1 / (3 fan_in). With the usual deviation of 0.02 the updates of a tiny model
            # are so small that it hardly mixes its tokens, and learns slowly.
            init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, CBSAEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.register_tokens is not None:
                init.trunc_normal_(module.register_tokens, std=self.config.initializer_range)
        elif isinstance(module, ContractAndBroadcastSelfAttention):
            init.ones_(module.step_rep)
            init.ones_(module.step_x)
        elif isinstance(module, TokenStatisticsSelfAttention):
            init.ones_(module.temp)
        elif isinstance(module, LearnedRepresentatives):
            init.normal_(module.weight)
        elif isinstance(module, CBSAODL):
            init.kaiming_uniform_(module.dictionary)
        elif isinstance(module, CBSAISTA):
            init.kaiming_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ClassTokenMaskDecoder):
            init.trunc_normal_(module.class_embeddings, std=self.config.initializer_range)
        elif isinstance(module, ZeroConv2d):
            init.zeros_(module.weight)

    def train(self, mode: bool = True) -> "CBSAPreTrainedModel":
        """Sets the training or evaluation mode. Raises ValueError if a folded model is to be trained."""
        if mode and self.config.folded:
            raise ValueError("A folded model is for inference; train the model that it was folded from.")
        return super().train(mode)

    def _replicate_for_data_parallel(self):
        # Replicas share the dictionaries of hooks. Without this each would add hooks of its own for requested outputs.
        # torch calls no public method when it makes replicas.
        maybe_install_capturing_hooks(self)
        return super()._replicate_for_data_parallel()

    def is_wanted(self, name: str, kwargs: dict) -> bool:
        """Whether an output is requested: by the keyword argument if it is given, else by the configuration."""
        value = kwargs.get(name)
        return getattr(self.config, name) if value is None else value


def dtype_of(module: nn.Module) -> torch.dtype:
    """
    The dtype of a module's weights. `PreTrainedModel.dtype` needs parameters, and the replicas of
    `torch.nn.DataParallel` have none: their weights are plain tensors.
    """
    weights = (getattr(part, "weight", None) for part in module.modules())
    return next(w.dtype for w in weights if isinstance(w, torch.Tensor) and w.is_floating_point())


def representative_attentions_per_layer(forward: Callable) -> Callable:
    """
    Decorates the encoder's `forward`: `representative_attentions` has one entry per layer, None for a layer without.
    Transformers leaves such layers out.
    """

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        outputs = forward(self, *args, return_dict=True, **kwargs)
        if outputs.representative_attentions is not None:
            found = iter(outputs.representative_attentions)
            outputs.representative_attentions = tuple(
                next(found) if ATTENTIONS[name].has_representative_attentions else None
                for name in self.config.layer_attention_types
            )
        return outputs if return_dict else outputs.to_tuple()

    return wrapper


class CBSAModel(CBSAPreTrainedModel):
    """
    The encoder: takes images and returns CLS, registers and patches as tokens.

    `layers` has the layers with weights of their own, `applied_layers` one entry for each of the
    `config.num_hidden_layers`, in which shared layers appear several times.
    """

    def __init__(self, config: CBSAConfig):
        super().__init__(config)
        if config.backbone_config is not None:
            raise ValueError(
                f"This configuration is of a segmenter with a backbone of type {config.backbone_config.model_type!r}, "
                "not with a CBSA encoder; use `CBSAForSemanticSegmentation`."
            )
        self.embeddings = CBSAEmbeddings(config)
        self.num_prefix_tokens = 1 + config.num_register_tokens
        self.layers = nn.ModuleList(
            [CBSALayer(config, name, self.base_num_patches) for name in config.stored_attention_types]
        )
        # By layer, not by stored layer: a shared one is dropped more often where it is used deeper.
        self.drop_path_rates = torch.linspace(
            0, config.drop_path_rate, config.num_hidden_layers, device="cpu"
        ).tolist()
        eps = config.layer_norm_eps if config.final_layer_norm_eps is None else config.final_layer_norm_eps
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=eps)
        self.post_init()

    @property
    def applied_layers(self) -> list[CBSALayer]:
        """The layers in the order in which tokens pass them."""
        return [self.layers[index] for index in self.config.layer_indices]

    @property
    def base_num_patches(self) -> int | None:
        """N0 of the size factor of the attention, in patches; None if the configuration turns the factor off."""
        if not self.config.size_factor:
            return None
        height, width = self.config.patch_grid(*to_pair(self.config.image_size))
        return self.config.base_num_patches or height * width

    @merge_with_config_defaults
    @representative_attentions_per_layer
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CBSAModelOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), normalised; cast to the model's dtype.
            interpolate_pos_encoding: accept any size of at least one patch per side, not only `config.image_size`.
            output_hidden_states, output_attentions, output_representative_attentions (`bool`, *optional*):
                also return these, see [`CBSAModelOutput`]; by default as the configuration says.
            output_stem_maps (`bool`, defaults to `False`): also return the maps of the convolutional stem.

        Raises:
            ValueError: if the number of channels or the size does not fit, if no layer has representative attentions
                to return, or if stem maps are asked for and the configuration does not have `decoder_skip`.
        """
        if kwargs.get("output_stem_maps") and not self.config.decoder_skip:
            # Without it, the stem makes its maps in strips if the image is large.
            raise ValueError("`output_stem_maps=True` needs a configuration with `decoder_skip=True`.")
        output_attentions = self.is_wanted("output_attentions", kwargs)
        output_representative_attentions = self.is_wanted("output_representative_attentions", kwargs)
        if output_representative_attentions and not any(
            ATTENTIONS[name].has_representative_attentions for name in self.config.layer_attention_types
        ):
            raise ValueError(
                f"Attention type {self.config.attention_type!r} has no `representative_attentions`; "
                "`output_attentions=True` gives its token-to-token map."
            )

        hidden_states, grid = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer, rate in zip(self.applied_layers, self.drop_path_rates, strict=True):
            hidden_states = layer(hidden_states, grid, output_attentions, output_representative_attentions, rate)
        last_hidden_state = self.layernorm(hidden_states)
        return CBSAModelOutput(last_hidden_state=last_hidden_state, pooler_output=last_hidden_state[:, 0])


class CBSAForImageClassification(CBSAPreTrainedModel):
    """Image classifier: the encoder with a linear layer on the CLS token."""

    def __init__(self, config: CBSAConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.cbsa = CBSAModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CBSAImageClassifierOutput:
        """
        Args:
            pixel_values, interpolate_pos_encoding, output_*: see [`CBSAModel`].
            labels: (batch,) class indices; with them the output has a `loss`, the cross-entropy.
        """
        outputs = self.cbsa(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return CBSAImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            representative_attentions=outputs.representative_attentions,
        )


class CBSAForSemanticSegmentation(CBSAPreTrainedModel):
    """
    Semantic segmenter: an encoder, and a decoder that makes a mask for each class. The encoder is that of CBSA, or the
    backbone that `config.backbone_config` describes, of which the last feature map is taken. Images may have any size:
    they are padded with zeros to whole patches, at the right and at the bottom, and the logits are cropped.

    With one label the segmenter is binary, as in Segformer: labels are 0 and 1, the loss is the binary cross-entropy,
    and a pixel has the label if the sigmoid of its logit is above 0.5. [`SlidingWindowSegmenter`] gives 0 and 1.
    `pipeline("image-segmentation")` and `post_process_semantic_segmentation` take the argmax, which is 0 everywhere.
    """

    # The loss is a mean over the pixels of one batch. So `Trainer` has to average it over accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: CBSAConfig):
        super().__init__(config)
        if config.num_labels < 1:
            raise ValueError(f"`num_labels` is {config.num_labels}; semantic segmentation takes one class or more.")
        base_num_patches = config.decoder_base_num_patches
        if config.backbone_config is None:
            self.cbsa = CBSAModel(config)
            hidden_size = config.hidden_size
            base_num_patches = base_num_patches or self.cbsa.base_num_patches
        else:
            self.backbone = AutoBackbone.from_config(config.backbone_config)
            for module in self.backbone.modules():
                if type(module) is nn.BatchNorm2d:
                    module.__class__ = CBSABatchNorm2d  # the same rule for frozen layers in every backbone
            hidden_size = self.backbone.channels[-1]
        # Backbones without patches, such as ResNet, take every size as it is.
        self.patch_size = to_pair(getattr(config.backbone_config or config, "patch_size", 1))
        self.decoder = DECODERS[config.decoder_type](
            config, hidden_size, base_num_patches if config.size_factor else None
        )
        self.decoder_skip = StemSkip(config) if config.decoder_skip else None
        self.post_init()

    def encode(self, pixel_values: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, tuple[int, int], ModelOutput]:
        """Returns the patch tokens (batch, patches, width), their grid, and the output of the encoder."""
        if self.config.backbone_config is None:
            kwargs["output_stem_maps"] = self.decoder_skip is not None
            outputs = self.cbsa(pixel_values, interpolate_pos_encoding=True, return_dict=True, **kwargs)
            grid = self.config.patch_grid(*pixel_values.shape[2:])
            return outputs.last_hidden_state[:, self.cbsa.num_prefix_tokens :], grid, outputs
        if self.is_wanted("output_representative_attentions", kwargs):
            raise ValueError(
                f"A backbone of type {self.config.backbone_config.model_type!r} has no `representative_attentions`; "
                "they are the CBSA encoder's."
            )
        warn_of_trace()
        outputs = self.backbone.forward_with_filtered_kwargs(
            pixel_values.to(dtype_of(self.backbone)),
            **{name: self.is_wanted(name, kwargs) for name in ("output_hidden_states", "output_attentions")},
            return_dict=True,
        )
        feature_map = outputs.feature_maps[-1]
        return feature_map.flatten(2).transpose(1, 2), tuple(feature_map.shape[2:]), outputs

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> CBSASemanticSegmenterOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), normalised; any size.
            labels: (batch, height, width) class indices; the loss ignores pixels with
                `config.semantic_loss_ignore_index`. With them the output has a `loss`, the cross-entropy.
            output_hidden_states, output_attentions, output_representative_attentions: of the encoder, see
                [`CBSAModel`].
            output_decoder_attentions (`bool`, *optional*): also return what the class tokens read and write; by
                default as the configuration says.

        Raises:
            ValueError: if images and labels differ in size, or if the encoder or the decoder does not have a requested
                attention.
        """
        batch_size, _, height, width = pixel_values.shape
        if labels is not None and labels.shape != (batch_size, height, width):
            raise ValueError(
                f"`labels` has the shape {tuple(labels.shape)}; the pixels take {(batch_size, height, width)}."
            )
        output_attentions = self.is_wanted("output_decoder_attentions", kwargs)
        if output_attentions and not DECODERS[self.config.decoder_type].has_class_tokens:
            raise ValueError(
                f"Decoder type {self.config.decoder_type!r} has no class tokens, so there are no `decoder_attentions`."
            )

        # Floor division of positive numbers, since compilers treat remainders and negative numbers in different ways.
        rows, columns = (
            (side + p - 1) // p * p - side for side, p in zip((height, width), self.patch_size, strict=True)
        )
        padded = F.pad(pixel_values, (0, columns, 0, rows))
        hidden_states, grid, outputs = self.encode(padded, kwargs)
        masks, attentions = self.decoder(hidden_states, grid, output_attentions)
        if self.decoder_skip is not None:
            masks = self.decoder_skip(masks, hidden_states, outputs.stem_maps)
        logits = F.interpolate(masks, size=padded.shape[2:], mode="bilinear", align_corners=False)
        logits = F.pad(logits, (0, -columns, 0, -rows))  # a slice would tie an exported graph to sizes that need one

        loss = None
        if labels is not None:
            ignore_index = self.config.semantic_loss_ignore_index
            counts = labels != ignore_index
            if self.config.num_labels == 1:
                losses = F.binary_cross_entropy_with_logits(
                    logits[:, 0].float(), (labels * counts).float(), reduction="none"
                )
                loss = (losses * counts).sum()
            else:
                loss = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
            loss = loss / counts.sum().clamp(min=1)  # 0, not NaN, if all pixels are ignored
        return CBSASemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            representative_attentions=outputs.get("representative_attentions"),
            decoder_attentions=attentions,
        )


class CBSABackbone(BackboneMixin, CBSAPreTrainedModel):
    """
    The encoder as a backbone for detectors and segmenters: the feature maps of the stages in `config.out_features`,
    "stem" for the embeddings and "stage1", "stage2", ... for the layers, each (batch, hidden_size, grid height, grid
    width). As in Dinov2, the final LayerNorm is applied to every one of them, and any image size is taken; with
    `reshape_hidden_states=False` they are the tokens, CLS and registers included, (batch, tokens, hidden_size).
    """

    def __init__(self, config: CBSAConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.cbsa = CBSAModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args:
            pixel_values, output_hidden_states, output_attentions: see [`CBSAModel`].

        Raises:
            ValueError: if `output_representative_attentions` is set, which the output of a backbone has no field for.
        """
        if self.is_wanted("output_representative_attentions", kwargs):
            raise ValueError("A backbone does not return `representative_attentions`; `CBSAModel` does.")
        outputs = self.cbsa(pixel_values, interpolate_pos_encoding=True, return_dict=True, **kwargs)
        grid = self.config.patch_grid(*pixel_values.shape[2:])
        feature_maps = tuple(
            self.cbsa.layernorm(hidden_states)
            for stage, hidden_states in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        )
        if self.config.reshape_hidden_states:
            feature_maps = tuple(
                tokens[:, self.cbsa.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid) for tokens in feature_maps
            )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "CBSABackbone",
    "CBSAForImageClassification",
    "CBSAForSemanticSegmentation",
    "CBSAImageClassifierOutput",
    "CBSAModel",
    "CBSAModelOutput",
    "CBSAPreTrainedModel",
    "CBSASemanticSegmenterOutput",
]
