"""
Checkpoints of other libraries -> CBSA models: the reference implementations (CBT, CRATE, ToST), timm, Transformers.

One function an origin renames its parameters, one table by name; to add one, write the function and enter it there.
Sizes are read off the shapes of the renamed weights, and every weight has to find its place: none left over, none
missing.
"""

import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .configuration_cbsa import CBSAConfig
from .modeling_cbsa import CBSAForImageClassification, CBSAModel, CBSAPreTrainedModel


# Heads by width in the published models. They leave no trace in the shapes of q, k and v, and 64 a head, the usual
# rule, is wrong for CRATE small (576) and ViT huge (1280).
PUBLISHED_HEADS = {192: 3, 384: 6, 576: 12, 768: 12, 1024: 16, 1280: 16}

TRANSFORMERS_TYPES = ("vit", "deit", "dinov2")

VIT_ATTENTIONS = ("softmax", "agent")

TIMM_LAYER = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out_proj",
    "ls1": "attention.layer_scale",
    "norm2": "layernorm_after",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
    "ls2": "feed_forward.layer_scale",
}

TRANSFORMERS_LAYER = {
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "layer_scale1": "attention.layer_scale",
    "layer_scale2": "feed_forward.layer_scale",
    # in files
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "intermediate.dense": "feed_forward.fc1",
    "output.dense": "feed_forward.fc2",
    # in memory, since transformers 5
    "attention.q_proj": "attention.q_proj",
    "attention.k_proj": "attention.k_proj",
    "attention.v_proj": "attention.v_proj",
    "attention.o_proj": "attention.out_proj",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
}


def rename_reference(key: str) -> str | None:
    """Parameter name of the reference classifiers (CBT, CRATE, ToST) -> ours, or None."""
    match key.split("."):
        case ["cls_token"]:
            return "cbsa.embeddings.cls_token"
        case ["pos_embedding"]:
            return "cbsa.embeddings.position_embeddings"
        case ["to_patch_embedding", "proj", i, j, kind] if i.isdecimal() and j.isdecimal():
            index = int(i) // 2 * 3 + int(j)  # there (conv, norm) pairs with a GELU between, here a flat chain
            return f"cbsa.embeddings.patch_embeddings.layers.{index}.{kind}"
        case ["to_patch_embedding", ("1" | "2" | "3") as i, kind]:
            name = {"1": "layernorm_before", "2": "projection", "3": "layernorm_after"}[i]
            return f"cbsa.embeddings.patch_embeddings.{name}.{kind}"
        case ["mlp_head", "0", kind]:
            return f"cbsa.layernorm.{kind}"
        case ["mlp_head", "1", kind]:
            return f"classifier.{kind}"
        case ["transformer", "layers", layer, "0", "norm", kind]:
            return f"cbsa.layers.{layer}.layernorm_before.{kind}"
        case ["transformer", "layers", layer, "0", "fn", "to_out", *_, kind]:
            return f"cbsa.layers.{layer}.attention.out_proj.{kind}"
        case ["transformer", "layers", layer, "0", "fn", "proj" | "qkv", kind]:
            return f"cbsa.layers.{layer}.attention.proj.{kind}"
        case ["transformer", "layers", layer, "0", "fn", ("step_rep" | "step_x" | "temp") as name]:
            return f"cbsa.layers.{layer}.attention.{name}"
        case ["transformer", "layers", layer, "1", "norm", kind]:
            return f"cbsa.layers.{layer}.layernorm_after.{kind}"
        case ["transformer", "layers", layer, "1", "fn", "weight"]:
            return f"cbsa.layers.{layer}.feed_forward.weight"
    return None


def rename_timm(key: str) -> str | None:
    """Parameter name of timm's vision transformers, and of the first DeiT and DINOv2 -> ours, or None."""
    match key.split("."):
        case ["cls_token"]:
            return "cbsa.embeddings.cls_token"
        case ["pos_embed"]:
            return "cbsa.embeddings.position_embeddings"
        case ["patch_embed", "proj", kind]:
            return f"cbsa.embeddings.patch_embeddings.projection.{kind}"
        case ["norm", kind]:
            return f"cbsa.layernorm.{kind}"
        case ["head", kind]:
            return f"classifier.{kind}"
        case ["blocks", layer, *module, kind] if ".".join(module) in TIMM_LAYER:
            return f"cbsa.layers.{layer}.{TIMM_LAYER['.'.join(module)]}.{kind}"
    return None


def rename_transformers(key: str) -> str | None:
    """Parameter name of ViT, DeiT and DINOv2 in Transformers, of files and of version 5 in memory -> ours, or None."""
    key = re.sub(r"^(vit|deit|dinov2)\.", "", key)
    match key.removeprefix("encoder.").split("."):
        case ["embeddings", "cls_token" | "position_embeddings"] | ["embeddings", "patch_embeddings", "projection", _]:
            return f"cbsa.{key}"
        case ["layernorm", kind]:
            return f"cbsa.layernorm.{kind}"
        case ["classifier", kind]:
            return f"classifier.{kind}"
        case ["layer" | "layers", layer, *module, kind] if ".".join(module) in TRANSFORMERS_LAYER:
            return f"cbsa.layers.{layer}.{TRANSFORMERS_LAYER['.'.join(module)]}.{kind}"
    return None


@dataclass(frozen=True)
class Origin:
    """
    Where checkpoints come from.

    Args:
        title: what to call it.
        paper: where it was published.
        mark: how a key ends that state dicts of this origin have.
        rename: a parameter's name there -> ours, None for one without a place.
        attention_types: what its attention can become, the exact one first.
        layer_norm_eps: epsilon of its LayerNorms; None where its `config.json` says.
    """

    title: str
    paper: str
    mark: str
    rename: Callable[[str], str | None]
    attention_types: tuple[str, ...]
    layer_norm_eps: float | None = None


# In the order in which they are tried: ToST has the mark of CRATE too, and DINOv2 that of ViT.
ORIGINS = {
    "cbt": Origin(
        "CBT", "2509.16875", "transformer.layers.0.0.fn.step_rep", rename_reference, ("cbsa",), layer_norm_eps=1e-5
    ),
    "tost": Origin(
        "ToST", "2412.17810", "transformer.layers.0.0.fn.temp", rename_reference, ("tssa",), layer_norm_eps=1e-5
    ),
    "crate": Origin(
        "CRATE", "2306.01129", "transformer.layers.0.0.fn.qkv.weight", rename_reference, ("mssa",), layer_norm_eps=1e-5
    ),
    "timm": Origin(
        "ViT of timm", "2010.11929", "blocks.0.attn.qkv.weight", rename_timm, VIT_ATTENTIONS, layer_norm_eps=1e-6
    ),
    "dinov2": Origin("DINOv2", "2304.07193", "0.layer_scale1.lambda1", rename_transformers, VIT_ATTENTIONS),
    "vit": Origin(
        "ViT", "2010.11929", "embeddings.patch_embeddings.projection.weight", rename_transformers, VIT_ATTENTIONS
    ),
}

# A pooler that no classifier reads, and what stands for masked patches in pretraining: without effect on the outputs.
UNUSED = re.compile(r"(^|\.)(mask_token|pooler\.dense\.(weight|bias))$")

REFUSED = {
    r"(^|\.)(distillation_token|dist_token|register_tokens|reg_token)$": (
        "is a token besides CLS, which a CBSA model has no place for; convert a model without distillation or "
        "register tokens"
    ),
    r"\.mlp\.(weights_in|w12|gate_proj)\.": (
        "is a SwiGLU feed-forward, which a CBSA model does not have; convert a model with an MLP"
    ),
}


@dataclass
class Conversion:
    """
    Args:
        model: [`CBSAForImageClassification`], or [`CBSAModel`] where the origin has no classifier; evaluation mode.
        processor: prepares images the way the origin did.
        origin: a name in `ORIGINS`.
        dropped: keys left out on purpose, because they have no effect on the outputs.
    """

    model: CBSAPreTrainedModel
    processor: ViTImageProcessorPil
    origin: str
    dropped: list[str]


def detect_origin(weights: dict[str, torch.Tensor]) -> str:
    """The name in `ORIGINS` that the keys speak for; a ValueError when there is none."""
    for name, origin in ORIGINS.items():
        if any(key.endswith(origin.mark) for key in weights):
            return name
    raise ValueError(
        f"The weights are of no known origin (one is called `{min(weights, default='')}`); "
        f"known are {', '.join(ORIGINS)}."
    )


def convert_state_dict(weights: dict[str, torch.Tensor], origin: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Weights of that origin, by their names there -> by our names, float32; and the keys dropped on purpose.

    Raises:
        ValueError: a weight that has no place in a CBSA model.
    """
    for pattern, reason in REFUSED.items():
        for key in weights:
            if re.search(pattern, key):
                raise ValueError(f"`{key}` {reason}.")
    dropped = sorted(key for key in weights if UNUSED.search(key))
    converted = {}
    for key, tensor in weights.items():
        if key in dropped:
            continue
        name = ORIGINS[origin].rename(key)
        if name is None or name in converted:
            raise ValueError(f"`{key}` has no place in a CBSA model; is this a classifier of origin {origin}?")
        converted[name] = tensor.float() if tensor.is_floating_point() else tensor
    return fold_layer_scale(split_qkv(converted)), dropped


def split_qkv(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries, keys and values, thirds of one layer at the origin, each as a layer."""
    split = {}
    for name, tensor in weights.items():
        if ".qkv." in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{letter}_proj.")] = third.clone()
        else:
            split[name] = tensor
    return split


def fold_layer_scale(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factor per channel that DINOv2 multiplies each update with, into the layer that makes the update."""
    folded = {name: tensor for name, tensor in weights.items() if ".layer_scale." not in name}
    for name in weights.keys() - folded.keys():
        module = name.split(".layer_scale.")[0]
        layer = f"{module}.out_proj" if module.endswith("attention") else f"{module}.fc2"
        for key, factor in ((f"{layer}.weight", weights[name].unsqueeze(1)), (f"{layer}.bias", weights[name])):
            if key not in folded:
                raise ValueError(f"The weights lack what becomes `{key}`.")
            folded[key] = folded[key] * factor
    return folded


def derive_config(
    weights: dict[str, torch.Tensor],
    origin: str,
    attention_type: str,
    num_heads: int | None = None,
    source_config: PreTrainedConfig | None = None,
) -> CBSAConfig:
    """
    Configuration of weights that have our names, from their shapes.

    Args:
        num_heads: where the weights do not tell; by default what `source_config` says, else the published models.
        source_config: the configuration at the origin, if it has any.

    Raises:
        ValueError: sizes that cannot be told from the weights.
    """

    def shape(name: str, ndim: int) -> torch.Size:
        if name not in weights:
            raise ValueError(f"The weights lack what becomes `{name}`.")
        if weights[name].ndim != ndim:
            raise ValueError(f"What becomes `{name}` has {weights[name].ndim} dimensions; it takes {ndim}.")
        return weights[name].shape

    hidden_size = shape("cbsa.embeddings.cls_token", 3)[-1]
    stem = "cbsa.embeddings.patch_embeddings"
    convolutions = [tensor for name, tensor in weights.items() if name.startswith(stem) and tensor.ndim == 4]
    if f"{stem}.layers.0.weight" in weights:
        patch_embedding_type, patch_size = "conv_stem", 2 ** len(convolutions)
        num_channels = shape(f"{stem}.layers.0.weight", 4)[1]
    elif convolutions:
        patch_embedding_type = "linear"
        _, num_channels, patch_size, patch_width = shape(f"{stem}.projection.weight", 4)
        if patch_size != patch_width:
            raise ValueError(f"The patches are {patch_size} x {patch_width} pixels; a CBSA model takes square ones.")
    else:
        patch_embedding_type, num_channels = "patchify", 3
        patch_size = math.isqrt(shape(f"{stem}.projection.weight", 2)[1] // num_channels)

    num_patches = shape("cbsa.embeddings.position_embeddings", 3)[1] - 1
    side = math.isqrt(num_patches)
    if source_config is not None:
        image_size = source_config.image_size
    elif side**2 == num_patches:
        image_size = side * patch_size
    else:
        raise ValueError(f"There are positions for CLS and {num_patches} patches, which make no square.")

    attention = "cbsa.layers.0.attention"
    steps = weights.get(f"{attention}.step_rep", weights.get(f"{attention}.temp"))
    if num_heads is None and source_config is not None:
        num_heads = source_config.num_attention_heads
    elif num_heads is None:
        num_heads = PUBLISHED_HEADS.get(hidden_size) if steps is None else len(steps)
    if num_heads is None:
        raise ValueError(
            f"The weights do not tell the number of heads, and no published model is {hidden_size} wide; "
            "give it with --num-heads."
        )
    projection = "q_proj" if f"{attention}.q_proj.weight" in weights else "proj"
    inner_size = shape(f"{attention}.{projection}.weight", 2)[0]
    if inner_size % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the attention's width of {inner_size}.")

    values = {}
    if "cbsa.layers.0.feed_forward.weight" not in weights:
        values["feed_forward_type"] = "mlp"
        values["intermediate_size"] = shape("cbsa.layers.0.feed_forward.fc1.weight", 2)[0]
    if origin == "cbt":
        values["pooled_tokens"] = "all_but_last"  # as trained
    if "classifier.weight" in weights and source_config is not None:
        values |= {"id2label": source_config.id2label, "label2id": source_config.label2id}
    elif "classifier.weight" in weights:
        values["num_labels"] = shape("classifier.weight", 2)[0]
    try:
        return CBSAConfig(
            hidden_size=hidden_size,
            num_hidden_layers=len({name.split(".")[2] for name in weights if name.startswith("cbsa.layers.")}),
            num_attention_heads=num_heads,
            head_dim=inner_size // num_heads,
            attention_type=attention_type,
            patch_embedding_type=patch_embedding_type,
            image_size=image_size,
            patch_size=patch_size,
            num_channels=num_channels,
            layer_norm_eps=ORIGINS[origin].layer_norm_eps or source_config.layer_norm_eps,
            **values,
        )
    except StrictDataclassError as error:
        raise ValueError(f"No CBSA model has such sizes: {error.__cause__}") from error


def build_model(config: CBSAConfig, weights: dict[str, torch.Tensor]) -> CBSAPreTrainedModel:
    """
    Model with exactly these weights, which have our names, in evaluation mode; without a classifier if they have none.

    Raises:
        ValueError: a weight that is missing, left over, or of another shape.
    """
    model_class = CBSAForImageClassification
    if not any(name.startswith("classifier.") for name in weights):
        model_class = CBSAModel
        weights = {name.removeprefix("cbsa."): tensor for name, tensor in weights.items()}
    with torch.device("meta"):  # no initial values: all are replaced
        model = model_class(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() - weights.keys()):
        raise ValueError(f"The weights lack what becomes `{name}`.")
    for name in sorted(weights.keys() - expected.keys()):
        raise ValueError(f"What becomes `{name}` is left over: the model has no such weight.")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"What becomes `{name}` has the shape {tuple(weights[name].shape)}; {tuple(tensor.shape)} fits."
            )
    model.load_state_dict(weights, assign=True)
    return model.eval()


def read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file.") from error
    return content if isinstance(content, dict) else {}


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    State dict in a file of safetensors or torch: bare, or under `state_dict` or `model`, with or without `module.`.

    Raises:
        ValueError: not a checkpoint, cut short, or a pickle with more in it than tensors, which is never loaded.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
            prefix = "state_dict."
            weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)} or weights
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # whatever the bytes lead torch to: EOFError, KeyError, OSError ...
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # a class or function by name
            raise ValueError(
                f"{path} is a pickle with more in it than tensors, which could run code and is not loaded "
                "(`weights_only=True`); save its state dict alone where it was made."
            ) from error
        raise ValueError(f"{path} is not a checkpoint, or is cut short.") from error
    for name in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(name), dict):
            weights = weights[name]
    if not isinstance(weights, dict) or not all(torch.is_tensor(tensor) for tensor in weights.values()):
        raise ValueError(f"{path} holds no state dict: neither bare, nor under `state_dict` or `model`.")
    return {key.removeprefix("module."): tensor for key, tensor in weights.items()}


def find_weights(source: str) -> Path:
    """
    The file with the weights of a file, folder or hub id; `config.json`, if there is one, lies beside it.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        try:
            path = Path(snapshot_download(source, allow_patterns=["*.json", "model.safetensors"]))
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"{source} is neither a file, nor a folder, nor the id of a model that can be reached on the Hub."
            ) from error
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{source} has no model.safetensors or pytorch_model.bin in it.")


def load_source_config(folder: Path) -> PreTrainedConfig:
    """
    Configuration in the folder of a Transformers model.

    Raises:
        ValueError: there is none, or it is of a model that cannot be converted.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"There is no {path}, which tells the number of heads and the LayerNorms' epsilon.")
    model_type = read_json(path).get("model_type")
    if model_type not in TRANSFORMERS_TYPES:
        raise ValueError(f"{path} is of a model of type {model_type}; convert takes {', '.join(TRANSFORMERS_TYPES)}.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{path} cannot be right: {error.__cause__}") from error
    if config.hidden_act != "gelu":
        raise ValueError(f"The activation is {config.hidden_act!r}; the MLP of a CBSA model has 'gelu'.")
    return config


def convert_checkpoint(
    source: str, origin: str | None = None, attention_type: str | None = None, num_heads: int | None = None
) -> Conversion:
    """
    A CBSA model with the weights of another library's.

    Images are normalised as the files beside the weights say, else with the mean and standard deviation of ImageNet:
    right for the reference models and DeiT, not for the ViTs of timm and Google that take 0.5 for both.

    Args:
        source: a file of weights, a folder, or a hub id.
        origin: a name in `ORIGINS`; told from the keys by default.
        attention_type: `"softmax"`, which is exact, or `"agent"`, which has to be fine-tuned, for a ViT.
        num_heads: number of heads, where neither the weights nor a `config.json` tell.

    Raises:
        ValueError: no checkpoint, or not one that a CBSA model can represent; one sentence for people.
    """
    path = find_weights(source)
    weights = load_weights(path)
    origin = origin or detect_origin(weights)
    attention_types = ORIGINS[origin].attention_types
    attention_type = attention_type or attention_types[0]
    if attention_type not in attention_types:
        raise ValueError(
            f"The attention of origin {origin} cannot become {attention_type!r}, only {' or '.join(attention_types)}."
        )
    source_config = load_source_config(path.parent) if ORIGINS[origin].layer_norm_eps is None else None
    weights, dropped = convert_state_dict(weights, origin)
    if origin == "dinov2" and "classifier.weight" in weights:
        raise ValueError(
            "The classifier of DINOv2 reads CLS and the mean of the patches, that of a CBSA model CLS alone; convert "
            "the backbone without classifier."
        )
    config = derive_config(weights, origin, attention_type, num_heads, source_config)
    model = build_model(config, weights)

    # timm's folders say in `config.json` what those of Transformers say in `preprocessor_config.json`.
    timm = read_json(path.parent / "config.json").get("pretrained_cfg") or {} if origin == "timm" else {}
    preprocessor = read_json(path.parent / "preprocessor_config.json") if source_config is not None else {}
    image_size = config.image_size
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=preprocessor.get("image_mean") or timm.get("mean") or IMAGENET_DEFAULT_MEAN,
        image_std=preprocessor.get("image_std") or timm.get("std") or IMAGENET_DEFAULT_STD,
        resample=preprocessor.get("resample", PILImageResampling.BILINEAR),
        do_convert_rgb=True,
    )
    return Conversion(model, processor, origin, dropped)


@torch.no_grad()
def compare_outputs(model: CBSAPreTrainedModel, path: Path) -> dict[str, tuple[float, float]]:
    """
    Recorded outputs against the model's: the largest absolute difference, and its share of the largest absolute value.

    Args:
        path: safetensors with `input.pixel_values`, and `output.logits` or `output.hidden_states.N` or both.

    Raises:
        ValueError: not such a file, or its sizes do not fit the model.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a file of safetensors, or is cut short.") from error
    if "input.pixel_values" not in tensors:
        raise ValueError(f"{path} has no `input.pixel_values` to compare the outputs for.")
    outputs = model(tensors["input.pixel_values"], output_hidden_states=True)
    actual = {f"hidden_states.{i}": hidden_state for i, hidden_state in enumerate(outputs.hidden_states)}
    if "logits" in outputs:
        actual["logits"] = outputs.logits
    differences = {}
    for name, value in actual.items():
        expected = tensors.get(f"output.{name}")
        if expected is None:
            continue
        if expected.shape != value.shape:
            raise ValueError(
                f"`output.{name}` has the shape {tuple(expected.shape)}, the model's has {tuple(value.shape)}."
            )
        difference = (value - expected).abs().max()
        differences[name] = (difference.item(), (difference / expected.abs().max()).item())
    if not differences:
        raise ValueError(f"{path} has neither `output.logits` nor `output.hidden_states.N` to compare.")
    return differences


def model_card(conversion: Conversion, name: str, source: str, license: str | None, attribution: str | None) -> str:
    """Text of README.md: where the weights come from, their licence, and how to load them."""
    origin, config = ORIGINS[conversion.origin], conversion.model.config
    classifies = isinstance(conversion.model, CBSAForImageClassification)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if classifies else "image-feature-extraction",
        license=license or "other",
        tags=["cbsa"],
    )
    auto_class = "AutoModelForImageClassification" if classifies else "AutoModel"
    exactness = "It computes what the original computes, up to rounding."
    if config.attention_type != origin.attention_types[0]:
        exactness = "It does not compute what the original computes: fine-tune it."
    licence = f"The weights' licence is {license}." if license else "The weights' licence is that of their origin."
    attribution = attribution or f"The weights come from `{source}` ([paper](https://arxiv.org/abs/{origin.paper}))."
    return f"""---
{data.to_yaml()}
---

# {name}

{origin.title}, converted by `cbsa convert` of cbsa-hf: attention `{config.attention_type}`, {config.num_hidden_layers}
layers of width {config.hidden_size} with {config.num_attention_heads} heads. {exactness}

{attribution} {licence}

```python
import cbsa_hf
from transformers import AutoImageProcessor, {auto_class}

processor = AutoImageProcessor.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}")
```
"""


def save_conversion(conversion: Conversion, output: Path, card: str):
    """Write model, image processor and model card to a new or empty folder: all of it, or nothing."""
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
        folder = Path(partial) / output.name
        conversion.model.save_pretrained(folder)
        conversion.processor.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if output.is_dir():
            output.rmdir()
        folder.rename(output)


__all__ = [
    "ORIGINS",
    "Conversion",
    "build_model",
    "compare_outputs",
    "convert_checkpoint",
    "convert_state_dict",
    "derive_config",
    "detect_origin",
    "load_weights",
    "model_card",
    "save_conversion",
]
