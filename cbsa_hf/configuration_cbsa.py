"""Configuration of the CBSA models. It builds on no other module of this library, and all others build on it."""

import inspect
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.dynamic_module_utils import custom_object_save


# The names that a configuration may use. Each table of classes, such as `ATTENTIONS`, has the names of one type.
RepresentativeAttentionType = Literal["cbsa", "agent", "mita"]
AttentionType = Literal[RepresentativeAttentionType, "mssa", "tssa", "linear", "softmax"]
FeedForwardType = Literal["ista", "odl", "mlp", "none"]
PatchEmbeddingType = Literal["conv_stem", "patchify", "linear"]
RepresentativesType = Literal["pool", "learned"]
PooledTokens = Literal["patches", "all_but_last"]
PositionInterpolation = Literal["bicubic", "bilinear"]
DecoderType = Literal["cbsa", "mssa", "softmax", "linear"]
LayerSharing = Literal["cyclic", "repeated"]

DTYPES = ("float32", "float16", "bfloat16", "float64")
MAX_LAYERS = 10_000
MAX_LABELS = 1_000_000
MAX_REPRESENTATIVES = 1_024
MAX_NUMBER = 1_000_000  # step sizes, epsilons and the like
AUTO_MAP = {
    "AutoConfig": "configuration_cbsa.CBSAConfig",
    "AutoModel": "modeling_cbsa.CBSAModel",
    "AutoModelForImageClassification": "modeling_cbsa.CBSAForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_cbsa.CBSAForSemanticSegmentation",
    "AutoBackbone": "modeling_cbsa.CBSABackbone",
}
PIPELINES = {  # of classifiers, in the form of `config.json`
    "cbsa-zero-shot-segmentation": {
        "impl": "pipeline_cbsa.ZeroShotSegmentationPipeline",
        "pt": ["AutoModelForImageClassification"],
        "type": "image",
    }
}


def to_pair(size: int | Iterable[int]) -> tuple[int, int]:
    """Returns (height, width) for a pair, or for the one side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def check_counts(values: dict):
    """
    Raises ValueError if a configuration, or one nested in it, has more than 10,000 layers or a million labels. A
    configuration lists the names of its layers and labels, so larger numbers would take very long before any other
    check.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            check_counts(value)
        most = MAX_LABELS if name == "num_labels" else MAX_LAYERS
        if name == "num_labels" or any(part in str(name) for part in ("layers", "depth", "blocks")):
            counts = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(count, (int, float)) and not count <= most for count in counts):
                raise ValueError(f"`{name}` is {value}, and has to be at most {most}.")


def allowed_names(annotation: Any) -> tuple[str, ...]:
    """The names of the `Literal` in the type of a field, alone or in a union or a list; none where it has none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((names for names in map(allowed_names, get_args(annotation)) if names), ())


def names_in_errors(cls: type) -> type:
    """
    Decorates a `@strict` class: where that refuses a name for a field of `Literal` type, the error says which name was
    given and which ones there are, in one sentence.
    """
    choices = {field.name: names for field in fields(cls) if (names := allowed_names(field.type))}
    set_strictly = cls.__setattr__

    def __setattr__(self, name, value):
        try:
            set_strictly(self, name, value)
        except StrictDataclassFieldValidationError:
            if name not in choices:
                raise
            values = value if isinstance(value, (list, tuple)) else [value]
            wrong = next((item for item in values if item not in choices[name]), value)
            sentence = f"`{name}` is {wrong!r}; choose one of {', '.join(map(repr, choices[name]))}."
            cause = ValueError(sentence)
            raise StrictDataclassFieldValidationError(field=name, cause=cause) from cause

    cls.__setattr__ = __setattr__
    return cls


@names_in_errors
@strict
class CBSAConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a Contract-and-Broadcast Transformer (CBT) or a related model: a patch embedding, layers of an
    attention and a feed-forward block each, and, for segmentation, a mask decoder. The defaults are those of the tiny
    CBT of the paper (arXiv 2509.16875).

    Args:
        hidden_size (`int`, defaults to 192): Width of the tokens.
        num_hidden_layers (`int`, defaults to 12): Number of layers.
        num_unique_layers (`int`, *optional*):
            Number of layers that have weights of their own; all when not given. With fewer, layers share weights,
            which are stored once and used several times.
        layer_sharing (`str`, defaults to `"cyclic"`):
            Which layers share: with 2 of 6 unique, `"cyclic"` uses 0 1 0 1 0 1, as the universal transformer (arXiv
            1807.03819) repeats its block, and `"repeated"` uses 0 0 0 1 1 1, as the groups of ALBERT (arXiv
            1909.11942).
        num_attention_heads (`int`, defaults to 3): Number of heads.
        head_dim (`int`, *optional*): Dimension p of one head; `hidden_size // num_attention_heads` when not given.
        attention_type (`str` or `list[str]`, defaults to `"cbsa"`):
            `"cbsa"`; `"mssa"` (CRATE), `"tssa"` (ToST), `"linear"`, `"softmax"` (ViT), `"agent"` (a ViT's attention
            through representatives), or `"mita"` (through landmarks and the tokens that they select); a list names one
            for each layer that is stored. `attention_cbsa.py` defines each.
        feed_forward_type (`str`, defaults to `"ista"`):
            `"ista"`, without a skip connection; `"odl"`, two steps in an overcomplete dictionary (CRATE-alpha), and
            `"mlp"` with GELU (ViT), both with a skip connection; or `"none"`, attention only.
        intermediate_size (`int`, *optional*):
            Width of the MLP and of the dictionary of `"odl"`; `4 * hidden_size` when not given.
        patch_embedding_type (`str`, defaults to `"conv_stem"`):
            `"conv_stem"`; `"patchify"` (CRATE's: norm, linear, norm on flattened patches), or `"linear"` (ViT's).
        representatives_type (`str`, defaults to `"pool"`):
            Whether initial representatives are a `"pool"` of the tokens or `"learned"`; for `"cbsa"`, `"agent"` and
            `"mita"`.
        representatives_size (`int` or `(int, int)`, defaults to 8):
            Height and width of the grid of representatives; 8 means 8 x 8, so m = 64.
        landmarks_size (`int` or `(int, int)`, defaults to 5):
            The same for `"mita"`, whose representatives are called landmarks.
        pooled_tokens (`str`, defaults to `"patches"`):
            Which tokens the initial representatives are pooled from: the `"patches"`, or `"all_but_last"`, which takes
            CLS for the first patch and leaves out the last one, as the published classifiers do.
        size_factor (`bool`, defaults to `True`):
            Whether the update of `"cbsa"` is multiplied by N / N0: the number of patches over the number in training.
            Without it the update shrinks as 1 / N when images grow, as in the reference implementation. The mask
            decoder counts its class tokens in both numbers.
        base_num_patches (`int`, *optional*): N0 of the encoder; the patches at `image_size` when not given.
        num_register_tokens (`int`, defaults to 0):
            Number of learned tokens between CLS and the patches (arXiv 2309.16588). No head reads them.
        ista_step_size (`float`, defaults to 0.1): Step size of the feed-forwards `"ista"` and `"odl"`.
        ista_threshold (`float`, defaults to 0.1): Weight lambda of their sparsity penalty.
        folded (`bool`, defaults to `False`):
            Whether the weights are those of a model that [`fold`] made, which merges norms, steps and the products of
            ISTA into the layers around them. For inference only.
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth (arXiv 1603.09382): the probability that an image skips the updates of the last layer in
            training. It rises linearly from 0 at the first layer. ISTA has no skip connection and is never skipped.
        image_size (`int` or `(int, int)`, defaults to 224): Height and width in pixels that there are positions for.
        patch_size (`int`, defaults to 16): Side of a patch in pixels; a power of two for `"conv_stem"`.
        position_interpolation (`str`, defaults to `"bicubic"`):
            How positions are interpolated for other sizes: `"bicubic"`, as in the published classifiers, or
            `"bilinear"`, as in the published segmenters.
        num_channels (`int`, defaults to 3): Channels of the image.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every LayerNorm.
        final_layer_norm_eps (`float`, *optional*):
            Epsilon of the LayerNorm after the last layer; `layer_norm_eps` when not given.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial CLS token, positions, class tokens and convolutions. Linear layers are
            initialised as in torch, with `kaiming_uniform_`.
        decoder_type (`str`, defaults to `"cbsa"`):
            Mask decoder of the segmenter: `"cbsa"`, `"mssa"`, `"softmax"` (Segmenter) or `"linear"`.
            `mask_decoder_cbsa.py` defines each.
        decoder_num_layers (`int`, defaults to 3): Number of its layers.
        decoder_num_heads (`int`, defaults to 3): Number of their heads.
        decoder_head_dim (`int`, *optional*): Dimension of one of its heads; when not given 100 for `"cbsa"` and
            `"mssa"`, and the width of the tokens divided by the number of heads for `"softmax"`.
        decoder_representatives_size (`int` or `(int, int)`, defaults to 10): Its grid of representatives, for
            `"cbsa"`.
        decoder_base_num_patches (`int`, *optional*):
            N0 of the mask decoder; the encoder's when not given. With another backbone there is then no size factor.
        decoder_skip (`bool`, defaults to `False`):
            Whether the segmenter also reads the maps of the stem, for detail finer than a patch, see [`StemSkip`];
            needs `patch_embedding_type="conv_stem"`. The published decoders do not.
        semantic_loss_ignore_index (`int`, defaults to 255): Label of the pixels that the loss ignores.
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of a backbone of Transformers that
            replaces the encoder of the segmenter, such as a `Dinov2Config`. The fields of the encoder then have no
            effect.
        out_features (`list[str]`, *optional*): Stages whose feature maps a backbone returns: `"stem"` for the
            embeddings, `"stage1"`, `"stage2"`, ... for the layers; the last layer alone when not given.
        out_indices (`list[int]`, *optional*): The same by number, 0 for `"stem"`.
        reshape_hidden_states (`bool`, defaults to `True`):
            Whether a backbone returns maps (batch, hidden_size, height, width) or, as the heads of DPT and
            DepthAnything take them, tokens (batch, tokens, hidden_size), CLS first. These heads count whole patches,
            and the stem rounds up, so with `"conv_stem"` give them images whose sides are multiples of the patch.

    Raises:
        ValueError or `huggingface_hub.errors.StrictDataclassError`: if no model can be built from a value.

    Example:

    ```python
    >>> from cbsa_hf import CBSAConfig, CBSAModel

    >>> model = CBSAModel(CBSAConfig(image_size=96, patch_size=8))
    >>> model.config.patch_size
    8
    ```
    """

    model_type = "cbsa"
    sub_configs = {"backbone_config": AutoConfig}
    pipeline_class: ClassVar[type | None] = None  # of [`PIPELINES`]; None where this file is remote code

    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_unique_layers: int | None = None
    layer_sharing: LayerSharing = "cyclic"
    num_attention_heads: int = 3
    head_dim: int | None = None
    attention_type: AttentionType | list[AttentionType] | tuple[AttentionType, ...] = "cbsa"
    feed_forward_type: FeedForwardType = "ista"
    intermediate_size: int | None = None
    patch_embedding_type: PatchEmbeddingType = "conv_stem"
    representatives_type: RepresentativesType = "pool"
    representatives_size: int | list[int] | tuple[int, int] = 8
    landmarks_size: int | list[int] | tuple[int, int] = 5
    pooled_tokens: PooledTokens = "patches"
    size_factor: bool = True
    base_num_patches: int | None = None
    num_register_tokens: int = 0
    ista_step_size: float | int = 0.1
    ista_threshold: float | int = 0.1
    folded: bool = False
    drop_path_rate: float | int = 0.0
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    position_interpolation: PositionInterpolation = "bicubic"
    num_channels: int = 3
    layer_norm_eps: float = 1e-5
    final_layer_norm_eps: float | None = None
    initializer_range: float = 0.02
    decoder_type: DecoderType = "cbsa"
    decoder_num_layers: int = 3
    decoder_num_heads: int = 3
    decoder_head_dim: int | None = None
    decoder_representatives_size: int | list[int] | tuple[int, int] = 10
    decoder_base_num_patches: int | None = None
    decoder_skip: bool = False
    semantic_loss_ignore_index: int = 255
    backbone_config: dict | PreTrainedConfig | None = None
    reshape_hidden_states: bool = True
    output_representative_attentions: bool = False
    output_decoder_attentions: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.check_values(kwargs)
        pipelines = kwargs.pop("custom_pipelines", None)
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if isinstance(self.backbone_config, dict):
            self.backbone_config = self.read_backbone(self.backbone_config)
        self.stage_names = ["stem"] + [f"stage{idx}" for idx in range(1, self.num_hidden_layers + 1)]
        try:
            self.set_output_features_output_indices(
                out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
            )
            super().__post_init__(**kwargs)
            if self.pipeline_class is not None:
                # This package knows the task by itself: `pipeline` need not ask whether it may run the saved code.
                pipelines = self.other_pipelines(pipelines)
            self.set_pipelines(pipelines)
        except (AttributeError, LookupError, TypeError) as error:  # Transformers does not check some values
            raise ValueError(f"The configuration has a value of the wrong type: {error}") from error

    def check_values(self, others: dict):
        """
        Raises ValueError if Transformers would fail on a value without saying on which one. `others` are the keyword
        arguments that are no fields.
        """
        check_counts({**vars(self), **others})
        for dtype in (self.dtype, others.get("torch_dtype")):
            if dtype is not None and not isinstance(dtype, torch.dtype) and dtype not in DTYPES:
                raise ValueError(f"`dtype` is {dtype!r}; choose one of {', '.join(map(repr, DTYPES))}.")
        names = self.architectures
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"`architectures` is {names!r}; give a list of the names of model classes.")
        flags = {"output_attentions": others.get("output_attentions")}
        flags |= {name: getattr(self, name) for name in ("output_hidden_states", "return_dict")}
        for name, value in flags.items():
            # Transformers takes the numbers of hidden states, too.
            numbers = value if name == "output_hidden_states" and isinstance(value, list) else []
            if (
                value is not None
                and not isinstance(value, bool)
                and not (numbers and all(type(n) is int for n in numbers))
            ):
                raise ValueError(f"`{name}` is {value!r}, and has to be true or false.")
        for name in ("quantization_config", "rope_parameters", "rope_scaling"):
            value = others.get(name)
            if value is not None and not isinstance(value, dict) and not hasattr(value, "to_dict"):
                raise ValueError(f"`{name}` is {value!r}, and has to be an object of settings.")
        num_labels = others.get("num_labels")
        if num_labels is not None and (not isinstance(num_labels, int) or num_labels < 0):
            raise ValueError(f"`num_labels` is {num_labels!r}; give the number of classes.")
        for name in others:
            attribute = inspect.getattr_static(type(self), name, None)
            is_settable = isinstance(attribute, property) and attribute.fset is not None
            if attribute is not None and not is_settable and name != "model_type":
                raise ValueError(f"`{name}` is no setting, but a part of the configuration's class; leave it out.")

    @staticmethod
    def read_backbone(values: dict) -> PreTrainedConfig:
        """
        The configuration of a backbone from the values in a dictionary. Raises ValueError if Transformers does not
        know its `model_type`, or refuses a value.
        """
        model_type = values.get("model_type")
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`backbone_config` has the `model_type` {model_type!r}, which Transformers does not know; give "
                "the configuration of one of its backbones, such as 'dinov2'."
            )
        try:
            return CONFIG_MAPPING[model_type].from_dict(values)
        except Exception as error:  # every backbone checks its values in its own way, or not at all
            reason = " ".join(str(error).split())
            raise ValueError(f"`backbone_config` is no configuration of a {model_type!r} model: {reason}") from error

    @property
    def layer_indices(self) -> list[int]:
        """The index of the stored layer that every layer uses: 0, 1, 2, ... if no layers share weights."""
        depth, stored = self.num_hidden_layers, self.num_unique_layers or self.num_hidden_layers
        if self.layer_sharing == "cyclic":
            return [i % stored for i in range(depth)]
        return [i * stored // depth for i in range(depth)]

    @property
    def stored_attention_types(self) -> list[str]:
        """The attention type of every stored layer."""
        if isinstance(self.attention_type, str):
            return [self.attention_type] * (self.num_unique_layers or self.num_hidden_layers)
        return list(self.attention_type)

    @property
    def layer_attention_types(self) -> list[str]:
        """The attention type of every layer."""
        return [self.stored_attention_types[index] for index in self.layer_indices]

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """
        (height, width) of the grid of patches of an image of `height` x `width` pixels. The stem rounds up; other
        embeddings ignore pixels that do not fill a patch.
        """
        rest = self.patch_size - 1 if self.patch_embedding_type == "conv_stem" else 0
        return (height + rest) // self.patch_size, (width + rest) // self.patch_size

    def save_pretrained(self, save_directory, **kwargs):
        """
        Writes `config.json`, with every model class of this library in `auto_map`. Transformers enters only the class
        that is saved; with all of them, `AutoModel` opens a saved classifier too. With a classifier goes the code of
        [`pipeline_class`], which `custom_pipelines` names.
        """
        self.auto_map = AUTO_MAP | (getattr(self, "auto_map", None) or {})
        others = self.other_pipelines(getattr(self, "custom_pipelines", None))
        if self.pipeline_class is not None and "CBSAForImageClassification" in (self.architectures or []):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            custom_object_save(self.pipeline_class, save_directory)
        saved = PIPELINES if (Path(save_directory) / "pipeline_cbsa.py").is_file() else {}
        self.set_pipelines(saved | others)
        super().save_pretrained(save_directory, **kwargs)
        self.set_pipelines(others)

    def set_pipelines(self, pipelines: object):
        """Set `custom_pipelines`, which a configuration without any does not have."""
        vars(self).pop("custom_pipelines", None)
        if pipelines:
            self.custom_pipelines = pipelines

    @staticmethod
    def other_pipelines(pipelines: object) -> dict:
        """The custom pipelines of a `config.json` that are not this library's."""
        known = pipelines if isinstance(pipelines, dict) else {}
        return {task: entry for task, entry in known.items() if task not in PIPELINES}

    def validate_sizes(self):
        """Counts are at least 1, and sizes are one side or a pair."""
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
            "num_channels",
            "decoder_num_layers",
            "decoder_num_heads",
        ):
            value = getattr(self, name)
            if value is None or value < 1:
                raise ValueError(f"`{name}` is {value}, and has to be at least 1.")
        for name in ("image_size", "representatives_size", "landmarks_size", "decoder_representatives_size"):
            value = getattr(self, name)
            sides = [value, value] if isinstance(value, int) else value
            if len(sides) != 2 or min(sides) < 1:
                raise ValueError(f"`{name}` is {value}; give one side or (height, width), each at least 1.")
            if name != "image_size" and sides[0] * sides[1] > MAX_REPRESENTATIVES:
                raise ValueError(
                    f"`{name}` is {value}, which makes {sides[0] * sides[1]} representatives; their cost grows with "
                    f"the square of their number, which has to be at most {MAX_REPRESENTATIVES}."
                )
        for name in ("base_num_patches", "decoder_base_num_patches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}, and has to be at least 1.")
        if self.num_register_tokens < 0:
            raise ValueError(f"`num_register_tokens` is {self.num_register_tokens}, and must not be negative.")

    def validate_layers(self):
        """There are no more unique layers than layers, and a list of attention types has one for each unique layer."""
        stored = self.num_hidden_layers if self.num_unique_layers is None else self.num_unique_layers
        if not 1 <= stored <= self.num_hidden_layers:
            raise ValueError(
                f"`num_unique_layers` is {stored}, and has to be from 1 to the number of layers, "
                f"{self.num_hidden_layers}."
            )
        if len(self.stored_attention_types) != stored:
            raise ValueError(
                f"`attention_type` lists {len(self.attention_type)} types for {stored} layers with weights of their "
                "own; give one for each, or one name for all."
            )

    def validate_representatives(self):
        """Options for representatives fit together, and need an attention type that has representatives."""
        names = get_args(RepresentativeAttentionType)
        if not set(self.stored_attention_types) & set(names):
            for name, default in (("representatives_type", "pool"), ("pooled_tokens", "patches")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` has no meaning for attention type {self.attention_type!r}, "
                        f"which has no representatives; leave it at {default!r}, or choose "
                        f"{' or '.join(map(repr, names))}."
                    )
        if self.representatives_type == "learned" and self.pooled_tokens != "patches":
            raise ValueError(
                f"`pooled_tokens={self.pooled_tokens!r}` has no meaning for learned representatives, which are not "
                "pooled; leave it at 'patches', or choose `representatives_type='pool'`."
            )
        if self.num_register_tokens and self.pooled_tokens != "patches":
            raise ValueError(
                f"`pooled_tokens={self.pooled_tokens!r}` reads CLS as the first patch, which `num_register_tokens="
                f"{self.num_register_tokens}` would turn into a register; leave it at 'patches'."
            )

    def validate_patch_size(self):
        """Each convolution of the stem halves the image, and each but the first doubles the width."""
        patch_size = self.patch_size
        if patch_size < 1:
            raise ValueError(f"`patch_size` is {patch_size}, and has to be at least 1.")
        if self.patch_embedding_type != "conv_stem":
            return
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(
                f"`patch_size` is {patch_size}, and has to be a power of two (published models: 8 and 16), because "
                "the stem is a chain of stride-2 convolutions; other sizes work with `patch_embedding_type='linear'`."
            )
        if self.hidden_size % (patch_size // 2):
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}, and has to be a multiple of {patch_size // 2} for `patch_size` "
                f"{patch_size}, because the stem doubles its width at every convolution but the first."
            )

    def validate_drop_path_rate(self):
        """The rate is a probability below 1."""
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` is {self.drop_path_rate}, and has to be from 0 to below 1.")

    def validate_numbers(self):
        """Step sizes, thresholds, epsilons and deviations are from 0 to `MAX_NUMBER`."""
        names = ("ista_step_size", "ista_threshold", "layer_norm_eps", "final_layer_norm_eps", "initializer_range")
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if not value >= 0:
                raise ValueError(f"`{name}` is {value}, and must not be negative.")
            if value > MAX_NUMBER:
                raise ValueError(f"`{name}` is {value}, and has to be at most {MAX_NUMBER}.")

    def validate_labels(self):
        """Labels are numbered 0, 1, 2, ... as the outputs are."""
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"`id2label` has to number its {len(self.id2label)} labels from 0 without a hole.")

    def validate_decoder(self):
        """The dimension of a head is at least 1, `decoder_skip` has a stem, `backbone_config` is no `CBSAConfig`."""
        if self.decoder_head_dim is not None and self.decoder_head_dim < 1:
            raise ValueError(f"`decoder_head_dim` is {self.decoder_head_dim}, and has to be at least 1.")
        if self.decoder_skip and (self.patch_embedding_type != "conv_stem" or self.backbone_config is not None):
            raise ValueError(
                "`decoder_skip=True` reads the maps of the convolutional stem, which this encoder does not have; "
                "leave it out, or choose `patch_embedding_type='conv_stem'` and no `backbone_config`."
            )
        if isinstance(self.backbone_config, CBSAConfig):
            raise ValueError(
                "`backbone_config` is a `CBSAConfig`; a CBSA encoder is described by this configuration itself, so "
                "leave `backbone_config` out."
            )


__all__ = ["CBSAConfig"]
