"""
Convert checkpoints of other libraries to CBSA models.

The weights are renamed by `key_mappings`, and `derive_config` derives the configuration from their shapes. Every
weight needs a place in the model, and every weight of the model has to be there.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BaseImageProcessor, SegformerImageProcessorPil, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from ..checkpoints import check_processor
from ..checkpoints.model_cards import auto_class_of, base_model_of, loading_example
from ..checkpoints.weight_files import check_finite, one_sentence
from ..configuration_cbsa import CBSAConfig, to_pair
from ..modeling_cbsa import CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAModel, CBSAPreTrainedModel
from .checkpoint_files import find_weights, load_source_config, load_weights, read_preprocessing
from .derive_config import derive_config
from .key_mappings import ORIGINS, convert_state_dict, detect_origin
from .originals import original_outputs


@dataclass
class Conversion:
    """
    A converted checkpoint.

    Args:
        model: in evaluation mode: [`CBSAForImageClassification`], [`CBSAForSemanticSegmentation`], or [`CBSAModel`] if
            the weights have neither classifier nor decoder.
        processor: image processor that prepares images as the origin does.
        origin: a name in `ORIGINS`.
        dropped: keys that were left out because they have no effect on the outputs.
    """

    model: CBSAPreTrainedModel
    processor: BaseImageProcessor
    origin: str
    dropped: list[str]


def build_model(config: CBSAConfig, weights: dict[str, torch.Tensor]) -> CBSAPreTrainedModel:
    """
    A model in evaluation mode with exactly these weights.

    Args:
        config: its configuration.
        weights: our name -> tensor. They decide whether the model has a decoder, a classifier or no head.

    Raises:
        ValueError: a weight is missing, left over, or has another shape.
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
    Convert a checkpoint of another library.

    Images are normalised as the files beside the weights say, else with the mean and standard deviation of ImageNet.
    These are right for the reference models and DeiT. They are wrong for the ViTs of timm and Google with 0.5 for
    both, and for Segmenters made from those.

    Args:
        source: a file of weights, a folder, or a hub id.
        origin: a name in `ORIGINS`; by default the one that the keys match.
        attention_type: for a ViT `"softmax"`, which is exact, or `"agent"` or `"mita"`, which have to be fine-tuned.
        num_heads: number of heads, if neither the weights nor a `config.json` tell it.

    Raises:
        ValueError: `source` is no checkpoint, or no CBSA model can represent it. The message is one sentence for
            people.
    """
    path = find_weights(source)
    weights = load_weights(path)
    origin = origin or detect_origin(weights)
    if not any("pos_embed" in name or "position_embeddings" in name for name in weights):
        raise ValueError(
            "The weights have no position embeddings; models with rotary positions, such as DINOv3, cannot be "
            "converted."
        )
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

    height, width = to_pair(config.image_size)
    preprocessing = {
        "image_mean": IMAGENET_DEFAULT_MEAN,
        "image_std": IMAGENET_DEFAULT_STD,
        "resample": PILImageResampling.BILINEAR,
        **read_preprocessing(path.parent, origin),
    }
    segments = isinstance(model, CBSAForSemanticSegmentation)
    processor_class = SegformerImageProcessorPil if segments else ViTImageProcessorPil
    with one_sentence(f"The image processor of {source} cannot be used"):
        processor = processor_class(
            size={"height": height, "width": width}, do_convert_rgb=config.num_channels == 3, **preprocessing
        )
        check_processor(processor, config.num_channels)
    check_finite(model, source)
    return Conversion(model, processor, origin, dropped)


@torch.no_grad()
def compare_with_original(conversion: Conversion, source: str) -> float:
    """
    Run the original and the converted model side by side, on noise of the size that they were trained for.

    Args:
        conversion: of `source`.
        source: as for [`convert_checkpoint`].

    Returns:
        The largest difference of their logits, of a segmenter's masks, or of an encoder's tokens, as a share of the
        original's largest value.

    Raises:
        ValueError: the original cannot be run, since its `config.json` does not fit its weights.
    """
    path = find_weights(source)
    source_config = load_source_config(path.parent) if ORIGINS[conversion.origin].layer_norm_eps is None else None
    model, config = conversion.model, conversion.model.config
    shape = (1, config.num_channels, *to_pair(config.image_size))
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with one_sentence(f"The original model of {source} cannot be run to compare it"):
        expected = original_outputs(load_weights(path), conversion.origin, config, pixel_values, source_config)
    if isinstance(model, CBSAForSemanticSegmentation):
        patches, grid, _ = model.encode(pixel_values, {})
        found = model.decoder(patches, grid)[0].flatten(2)
    elif isinstance(model, CBSAForImageClassification):
        found = model(pixel_values).logits
    else:
        found = model(pixel_values).last_hidden_state
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def compare_outputs(model: CBSAPreTrainedModel, path: Path) -> dict[str, tuple[float, float]]:
    """
    Compare recorded outputs with those of a model.

    Args:
        model: the model.
        path: a safetensors file with `input.pixel_values` and some of `output.logits`, `output.hidden_states.N` and,
            for a segmenter, `output.encoder_last_hidden_state` and `output.mask_logits_at_patch_grid`.

    Returns:
        Name -> the largest absolute difference, and that divided by the largest absolute recorded value.

    Raises:
        ValueError: the file has other contents, or its sizes do not fit the model.
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


def model_card(
    conversion: Conversion, name: str, source: str, license: str | None, attribution: str | None
) -> ModelCard:
    """
    The model card of a conversion: where the weights come from, their licence, and how to load them.

    Args:
        conversion: what the card describes.
        name: the model's name or hub id.
        source: where the weights come from, for people to read. A hub id is also the card's `base_model`.
        license: identifier of the weights' licence, such as `apache-2.0`; None if it is unknown.
        attribution: a sentence that says whose weights they are; by default it names the source and the paper.
    """
    origin, config = ORIGINS[conversion.origin], conversion.model.config
    task, decoder = "image-feature-extraction", ""
    if isinstance(conversion.model, CBSAForImageClassification):
        task = "image-classification"
    elif isinstance(conversion.model, CBSAForSemanticSegmentation):
        task, decoder = "image-segmentation", f", decoder `{config.decoder_type}` for {config.num_labels} classes"
    exactness = "It computes what the original computes, up to rounding."
    if config.attention_type != origin.attention_types[0]:
        exactness = "It does not compute what the original computes: fine-tune it."
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag=task,
            license=license or "other",
            base_model=base_model_of(source),
            tags=["cbsa"],
        ),
        template_path=str(Path(__file__).parent / "card_template.md"),
        name=name,
        origin=origin,
        config=config,
        decoder=decoder,
        exactness=exactness,
        attribution=attribution
        or f"The weights come from `{source}` ([paper](https://arxiv.org/abs/{origin.paper})).",
        licence=f"The weights' licence is {license or 'that of their origin'}.",
        example=loading_example(name, auto_class_of(conversion.model)),
    )


def save_conversion(conversion: Conversion, output: Path, card: ModelCard):
    """Write model, image processor and model card to a new or empty folder; if that fails, nothing is written."""
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
        folder = Path(partial) / output.name
        conversion.model.save_pretrained(folder)
        conversion.processor.save_pretrained(folder)
        card.save(folder / "README.md")
        if output.is_dir():
            output.rmdir()
        folder.rename(output)


__all__ = [
    "ORIGINS",
    "Conversion",
    "build_model",
    "compare_outputs",
    "compare_with_original",
    "convert_checkpoint",
    "convert_state_dict",
    "derive_config",
    "detect_origin",
    "model_card",
    "save_conversion",
]
