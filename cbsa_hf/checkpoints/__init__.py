"""Load checkpoints: those in this package, in a folder, or on the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.image_utils import PILImageResampling

from ..configuration_cbsa import MAX_NUMBER, CBSAConfig, to_pair
from ..modeling_cbsa import CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAModel, CBSAPreTrainedModel
from .weight_files import (
    CheckpointError,
    build_on_meta,
    check_finite,
    check_fit,
    find_folder,
    find_shards,
    not_found,
    one_sentence,
    read_header,
    read_json,
)


MAX_IMAGE_SIDE = 16_384  # largest side in pixels that an image processor may produce


@dataclass(frozen=True)
class Task:
    """
    A task that models are for.

    Args:
        model_class: class of its models.
        title: name of such a model in messages.
        default: name of the checkpoint for it that ships with this package.
    """

    model_class: type[CBSAPreTrainedModel]
    title: str
    default: str


TASKS = {
    "image-classification": Task(CBSAForImageClassification, "image classifier", "cbsa-tiny-imagenette"),
    "semantic-segmentation": Task(CBSAForSemanticSegmentation, "semantic segmenter", "cbsa-tiny-camvid"),
}


def find_task(name: str) -> Task:
    """The entry of `TASKS`. Raises ValueError if there is none of that name."""
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; choose one of {', '.join(map(repr, TASKS))}.")
    return TASKS[name]


def default_checkpoint(task: str = "image-classification") -> str:
    """
    Path of the checkpoint that ships with this package for a task.

    Args:
        task: `"image-classification"` or `"semantic-segmentation"`.

    Raises:
        ValueError: there is no such task.
    """
    return str(Path(__file__).parent / find_task(task).default)


def load_config(name: str) -> CBSAConfig:
    """
    The configuration in a folder or of a hub id.

    Raises:
        CheckpointError: it is not found, cannot be read, or belongs to a model of another type.
    """
    with one_sentence(f"The configuration of {name} cannot be read"):
        folder = find_folder(name)
        values = read_json(folder / "config.json")
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{name} holds an adapter; load it with PEFT, and save what `merge_and_unload()` makes of it."
            )
        if not values:
            raise not_found(name)
        model_type = values.get("model_type")
        if model_type != CBSAConfig.model_type:
            raise CheckpointError(f"{name} holds a model of type {model_type}; this takes `cbsa` models.")
        return CBSAConfig.from_pretrained(folder)


def saved_as(config: CBSAConfig) -> tuple[type[CBSAPreTrainedModel], str]:
    """The class that a checkpoint was saved as, and its name in messages; the encoder if no class is known."""
    architectures = config.architectures or [CBSAForImageClassification.__name__]
    for task in TASKS.values():
        if task.model_class.__name__ in architectures:
            return task.model_class, task.title
    return CBSAModel, "CBSA encoder"


def check_processor(processor: BaseImageProcessor, num_channels: int, least: int = 1):
    """
    Check that an image processor can prepare images.

    Args:
        processor: the image processor.
        num_channels: number of channels of the images.
        least: smallest side in pixels that it may produce.

    Raises:
        ValueError: sides would be below `least` or above `MAX_IMAGE_SIDE`, or values would not be finite.
        Exception: any error of a processor that cannot prepare an image.
    """
    for name in ("size", "crop_size", "pad_size"):
        sides = dict(getattr(processor, name, None) or {})
        if not all(
            side is None or (isinstance(side, int) and least <= side <= MAX_IMAGE_SIDE) for side in sides.values()
        ):
            raise ValueError(
                f"`{name}` is {sides}; each side has to be a whole number from {least} to {MAX_IMAGE_SIDE} pixels"
            )
    for name in ("image_mean", "image_std", "rescale_factor"):
        if np.abs(np.asarray(getattr(processor, name, None) or 0, np.float64)).max() > MAX_NUMBER:
            raise ValueError(f"`{name}` is {getattr(processor, name)}, and has to be at most {MAX_NUMBER}")
    if getattr(processor, "resample", None) is not None:
        PILImageResampling(processor.resample)
    image = np.zeros((8, 8, num_channels), dtype=np.uint8)
    options = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_last"}
    pixel_values = processor(image, return_tensors="pt", **options)["pixel_values"]
    if not torch.is_tensor(pixel_values) or not pixel_values.isfinite().all():
        raise ValueError(
            "it does not make finite numbers of an image; see `image_mean`, `image_std`, `rescale_factor`"
        )


def load_processor(name: str, config: CBSAConfig) -> BaseImageProcessor:
    """
    The image processor in a folder or of a hub id. Code from there is not run.

    Args:
        name: the folder or hub id.
        config: configuration of the model that it is for.

    Raises:
        CheckpointError: it is not found, or cannot prepare images.
    """
    folder = find_folder(name)
    with one_sentence(f"The image processor of {name} cannot be used"):
        if not any(read_json(folder / file) for file in ("preprocessor_config.json", "processor_config.json")):
            raise not_found(name)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        # The size is the window of semantic segmentation: very small windows would be very many, and see nothing.
        least = (
            1
            if config.backbone_config
            else max(config.patch_size, *(side // 8 for side in to_pair(config.image_size)))
        )
        check_processor(processor, config.num_channels, least)
    return processor


def check_weights(name: str, config: CBSAConfig, model_class: type[CBSAPreTrainedModel]):
    """
    Compare a configuration with the header of the weights, before memory for a model is allocated.

    Raises:
        CheckpointError: the weights are not found, are pickles, are cut short, or do not fit the configuration.
    """
    header = read_header(find_shards(find_folder(name)))
    with one_sentence(f"The weights of {name} do not fit its configuration"):
        model = build_on_meta(lambda: model_class(config), header)
        check_fit(model, header, f"{model_class.base_model_prefix}.")


@overload
def load_checkpoint(
    name: None = None,
    task: None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict | torch.device | None = None,
) -> tuple[CBSAForImageClassification, BaseImageProcessor]: ...


@overload
def load_checkpoint(
    name: str | None = None,
    *,
    task: Literal["image-classification"],
    dtype: str | torch.dtype | None = None,
    device_map: str | dict | torch.device | None = None,
) -> tuple[CBSAForImageClassification, BaseImageProcessor]: ...


@overload
def load_checkpoint(
    name: str | None = None,
    *,
    task: Literal["semantic-segmentation"],
    dtype: str | torch.dtype | None = None,
    device_map: str | dict | torch.device | None = None,
) -> tuple[CBSAForSemanticSegmentation, BaseImageProcessor]: ...


@overload
def load_checkpoint(
    name: str | None = None,
    task: str | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict | torch.device | None = None,
) -> tuple[CBSAPreTrainedModel, BaseImageProcessor]: ...


def load_checkpoint(
    name: str | None = None,
    task: str | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict | torch.device | None = None,
) -> tuple[CBSAPreTrainedModel, BaseImageProcessor]:
    """
    Load a model and its image processor from a folder or the Hub. Code from there is never run, and pickles are not
    opened.

    Args:
        name: the folder or hub id; by default the [`default_checkpoint`] of the task.
        task: the task that the model has to be for, `"image-classification"` or `"semantic-segmentation"`. None
            accepts what was saved: a classifier, a segmenter, or an encoder without a head.
        dtype, device_map: of the weights, as `from_pretrained` of Transformers takes them; by default what the
            configuration says, on the CPU.

    Returns:
        The model in evaluation mode, and the image processor.

    Raises:
        ValueError: the checkpoint is not found, cannot be read, is damaged, or is for another task or another type of
            model. The message is one sentence for people.
    """
    if name is None:
        name = default_checkpoint() if task is None else default_checkpoint(task)
    folder = str(find_folder(name))
    config = load_config(folder)
    model_class, title = saved_as(config) if task is None else (find_task(task).model_class, find_task(task).title)
    processor = load_processor(folder, config)
    check_weights(folder, config, model_class)
    options = {"dtype": dtype, "device_map": device_map}
    options = {option: value for option, value in options.items() if value is not None}
    with one_sentence(f"The weights of {name} cannot be read"):
        model, report = model_class.from_pretrained(
            folder, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    if report["missing_keys"]:
        raise CheckpointError(f"{name} is no {title}: {len(report['missing_keys'])} of its weights are missing.")
    check_finite(model, name)
    return model.eval(), processor
