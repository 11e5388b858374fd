"""
Checkpoints of other libraries -> CBSA models, by the names in `key_mappings.py`.

Sizes are read off the shapes of the renamed weights, and every weight has to find its place: none left over, none
missing.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BaseImageProcessor, PreTrainedConfig, SegformerImageProcessorPil, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .checkpoint import check_processor
from .configuration_cbsa import CBSAConfig
from .key_mappings import ORIGINS, convert_state_dict, detect_origin
from .modeling_cbsa import CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAModel, CBSAPreTrainedModel
from .source_files import find_weights, load_source_config, load_weights, read_preprocessing
from .weight_files import check_finite, one_sentence


# Heads by width in the published models. They leave no trace in the shapes of q, k and v, and 64 a head, the usual
# rule, is wrong for CRATE small (576) and ViT huge (1280).
PUBLISHED_HEADS = {192: 3, 384: 6, 576: 12, 768: 12, 1024: 16, 1280: 16}


@dataclass
class Conversion:
    """
    Args:
        model: [`CBSAForImageClassification`], [`CBSAForSemanticSegmentation`], or [`CBSAModel`] where the origin has
            neither classifier nor decoder; evaluation mode.
        processor: prepares images the way the origin did.
        origin: a name in `ORIGINS`.
        dropped: keys left out on purpose, because they have no effect on the outputs.
    """

    model: CBSAPreTrainedModel
    processor: BaseImageProcessor
    origin: str
    dropped: list[str]


def shape_of(weights: dict[str, torch.Tensor], name: str, ndim: int) -> torch.Size:
    """A ValueError when there is no weight of that name with so many dimensions."""
    if name not in weights:
        raise ValueError(f"The weights lack what becomes `{name}`.")
    if weights[name].ndim != ndim:
        raise ValueError(f"What becomes `{name}` has {weights[name].ndim} dimensions; it takes {ndim}.")
    return weights[name].shape


def count_layers(weights: dict[str, torch.Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def derive_decoder(weights: dict[str, torch.Tensor], decoder_type: str, num_heads: int) -> dict:
    """What the configuration says of a segmenter's decoder; `num_heads` is that of the encoder."""
    attention = "decoder.layers.0.attention"
    values = {
        "decoder_type": decoder_type,
        "num_labels": shape_of(weights, "decoder.class_embeddings", 3)[1],
        "decoder_num_layers": count_layers(weights, "decoder.layers."),
        "decoder_num_heads": num_heads,  # the same in all published models
        "position_interpolation": "bilinear",  # as trained
    }
    if f"{attention}.step_rep" in weights:
        num_heads = len(weights[f"{attention}.step_rep"])
        inner_size = shape_of(weights, f"{attention}.proj.weight", 2)[0]
        values |= {"decoder_num_heads": num_heads, "decoder_head_dim": inner_size // num_heads}
    return values


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

    shape = partial(shape_of, weights)
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
    if attention_type == "cbsa":
        values["base_num_patches"] = num_patches  # as trained, where N / N0 is 1
    if origin == "cbt":
        values["pooled_tokens"] = "all_but_last"  # as trained
    if "classifier.weight" in weights and source_config is not None:
        values |= {"id2label": source_config.id2label, "label2id": source_config.label2id}
    elif "classifier.weight" in weights:
        values["num_labels"] = shape("classifier.weight", 2)[0]
    if ORIGINS[origin].decoder_type is not None:
        values |= derive_decoder(weights, ORIGINS[origin].decoder_type, num_heads)
        values["decoder_base_num_patches"] = values.get("base_num_patches")
    try:
        return CBSAConfig(
            hidden_size=hidden_size,
            num_hidden_layers=count_layers(weights, "cbsa.layers."),
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
    Model with exactly these weights, which have our names, in evaluation mode; its head is the one that they have.

    Raises:
        ValueError: a weight that is missing, left over, or of another shape.
    """
    if any(name.startswith("decoder.") for name in weights):
        model_class = CBSAForSemanticSegmentation
    elif any(name.startswith("classifier.") for name in weights):
        model_class = CBSAForImageClassification
    else:
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
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"What becomes `{name}` is of type {weights[name].dtype}, which its values cannot be.")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def convert_checkpoint(
    source: str, origin: str | None = None, attention_type: str | None = None, num_heads: int | None = None
) -> Conversion:
    """
    A CBSA model with the weights of another library's.

    Images are normalised as the files beside the weights say, else with the mean and standard deviation of ImageNet:
    right for the reference models and DeiT, not for the ViTs of timm and Google that take 0.5 for both, nor for the
    Segmenters made of them.

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

    image_size = config.image_size
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    preprocessing = {
        "image_mean": IMAGENET_DEFAULT_MEAN,
        "image_std": IMAGENET_DEFAULT_STD,
        "resample": PILImageResampling.BILINEAR,
        **read_preprocessing(path.parent, origin),
    }
    segments = isinstance(model, CBSAForSemanticSegmentation)
    processor_class = SegformerImageProcessorPil if segments else ViTImageProcessorPil
    with one_sentence(f"The image processor of {source} cannot be used"):
        processor = processor_class(size={"height": height, "width": width}, do_convert_rgb=True, **preprocessing)
        check_processor(processor, config.num_channels)
    check_finite(model, source)
    return Conversion(model, processor, origin, dropped)


@torch.no_grad()
def compare_outputs(model: CBSAPreTrainedModel, path: Path) -> dict[str, tuple[float, float]]:
    """
    Recorded outputs against the model's: the largest absolute difference, and its share of the largest absolute value.

    Args:
        path: safetensors with `input.pixel_values`, and some of `output.logits`, `output.hidden_states.N` and, of a
            segmenter, `output.encoder_last_hidden_state` and `output.mask_logits_at_patch_grid`.

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
    if isinstance(model, CBSAForSemanticSegmentation):
        patches, grid, outputs = model.encode(tensors["input.pixel_values"], {})
        actual["encoder_last_hidden_state"] = outputs.last_hidden_state
        actual["mask_logits_at_patch_grid"] = model.decoder(patches, grid)[0]
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
        raise ValueError(f"{path} has no output to compare, such as `output.logits` or `output.hidden_states.N`.")
    return differences


def model_card(conversion: Conversion, name: str, source: str, license: str | None, attribution: str | None) -> str:
    """Text of README.md: where the weights come from, their licence, and how to load them."""
    origin, config = ORIGINS[conversion.origin], conversion.model.config
    auto_class, task, decoder = "AutoModel", "image-feature-extraction", ""
    if isinstance(conversion.model, CBSAForImageClassification):
        auto_class, task = "AutoModelForImageClassification", "image-classification"
    elif isinstance(conversion.model, CBSAForSemanticSegmentation):
        auto_class, task = "AutoModelForSemanticSegmentation", "image-segmentation"
        decoder = f", decoder `{config.decoder_type}` for {config.num_labels} classes"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license=license or "other",
        tags=["cbsa"],
    )
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
layers of width {config.hidden_size} with {config.num_attention_heads} heads{decoder}. {exactness}

{attribution} {licence}

```python
from transformers import AutoImageProcessor, {auto_class}

processor = AutoImageProcessor.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
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
    "model_card",
    "save_conversion",
]
