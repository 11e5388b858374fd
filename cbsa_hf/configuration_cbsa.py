"""Configuration of the CBSA models."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


POOLED_TOKENS = ("patches", "all_but_last")


@strict
class CBSAConfig(PreTrainedConfig):
    r"""
    Describes a Contract-and-Broadcast Transformer (CBT): a convolutional stem, then layers of Contract-and-Broadcast
    Self-Attention (CBSA) and ISTA. The defaults are the published tiny model (arXiv 2509.16875).

    Args:
        hidden_size (`int`, defaults to 192): Width of the tokens.
        num_hidden_layers (`int`, defaults to 12): Number of layers.
        num_attention_heads (`int`, defaults to 3): Number of heads.
        head_dim (`int`, *optional*): Dimension p of one head; `hidden_size // num_attention_heads` when not given.
        representatives_size (`int` or `(int, int)`, defaults to 8):
            Height and width of the grid of representatives; 8 means 8 x 8, so m = 64.
        pooled_tokens (`str`, defaults to `"patches"`):
            Which tokens the initial representatives are pooled from: the `"patches"`, or, as the published classifiers
            do, `"all_but_last"` of all tokens, which reads CLS as the first patch and misses the last one.
        ista_step_size (`float`, defaults to 0.1): Step of the ISTA feed-forward.
        ista_threshold (`float`, defaults to 0.1): Weight lambda of its sparsity penalty.
        image_size (`int` or `(int, int)`, defaults to 224): Height and width in pixels that positions are made for.
        patch_size (`int`, defaults to 16): Side of a patch in pixels; a power of two, one stride-2 convolution each.
        num_channels (`int`, defaults to 3): Channels of the image.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every LayerNorm.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.

    Raises:
        ValueError or `huggingface_hub.errors.StrictDataclassError`: a value that no model can be built from.

    Example:

    ```python
    >>> from cbsa_hf import CBSAConfig, CBSAModel

    >>> model = CBSAModel(CBSAConfig(image_size=96, patch_size=8))
    >>> model.config.patch_size
    8
    ```
    """

    model_type = "cbsa"

    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    head_dim: int | None = None
    representatives_size: int | list[int] | tuple[int, int] = 8
    pooled_tokens: str = "patches"
    ista_step_size: float | int = 0.1
    ista_threshold: float | int = 0.1
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    output_representative_attentions: bool = False

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Every count is at least 1 and every pair is a pair."""
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "num_channels"):
            value = getattr(self, name)
            if value is None or value < 1:
                raise ValueError(f"`{name}` is {value}, and has to be at least 1.")
        for name in ("image_size", "representatives_size"):
            value = getattr(self, name)
            sides = [value] if isinstance(value, int) else list(value)
            if len(sides) not in (1, 2) or min(sides) < 1:
                raise ValueError(f"`{name}` is {value}; give one side or (height, width), each at least 1.")

    def validate_patch_size(self):
        """The stem halves the image once per convolution and doubles its width each time."""
        patch_size = self.patch_size
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(
                f"`patch_size` is {patch_size}, and has to be a power of two (published models: 8 and 16), because "
                "the stem is a chain of stride-2 convolutions."
            )
        if self.hidden_size % (patch_size // 2):
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}, and has to be a multiple of {patch_size // 2} for `patch_size` "
                f"{patch_size}, because the stem doubles its width at every convolution but the first."
            )

    def validate_pooled_tokens(self):
        if self.pooled_tokens not in POOLED_TOKENS:
            raise ValueError(
                f"`pooled_tokens` is {self.pooled_tokens!r}; choose one of {', '.join(map(repr, POOLED_TOKENS))} "
                "(`'all_but_last'` is for checkpoints of the reference implementation)."
            )

    def validate_ista(self):
        for name in ("ista_step_size", "ista_threshold"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, and must not be negative.")


__all__ = ["CBSAConfig"]
