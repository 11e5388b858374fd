"""Where checkpoints come from: those in this package, a folder, or the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.image_utils import PILImageResampling

from ..attention_cbsa import to_pair
from ..configuration_cbsa import CBSAConfig
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


MAX_IMAGE_SIDE = 16_384  # pixels that an image processor may make of a side


@dataclass(frozen=True)
class Task:
    """
    Args:
        model_class: what does it.
        title: what to call such a model.
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
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; choose one of {', '.join(map(repr, TASKS))}.")
    return TASKS[name]


def default_checkpoint(task: str = "image-classification") -> str:
    """Path of the checkpoint for a task in `TASKS` that ships with this package; a ValueError for another one."""
    return str(Path(__file__).parent / find_task(task).default)


def load_config(name: str) -> CBSAConfig:
    """
    Configuration of a folder or hub id.

    Raises:
        CheckpointError: not found, not readable, or of another kind of model.
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
    """The class that a checkpoint's weights fill, and what to call it; the encoder where there is no head."""
    architectures = config.architectures or [CBSAForImageClassification.__name__]
    for task in TASKS.values():
        if task.model_class.__name__ in architectures:
            return task.model_class, task.title
    return CBSAModel, "CBSA encoder"


def check_processor(processor: BaseImageProcessor, num_channels: int, least: int = 1):
    """
    A ValueError when images would have sides below the `least` or above [`MAX_IMAGE_SIDE`]; any of several errors when
    one cannot be prepared.
    """
    for name in ("size", "crop_size", "pad_size"):
        sides = dict(getattr(processor, name, None) or {})
        if not all(side is None or least <= side <= MAX_IMAGE_SIDE for side in sides.values()):
            raise ValueError(f"`{name}` is {sides}; each side has to be from {least} to {MAX_IMAGE_SIDE} pixels")
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
    Image processor of a folder or hub id, for a model of that configuration. No code from there is run.

    Raises:
        CheckpointError: not found, or not one that prepares images.
    """
    folder = find_folder(name)
    with one_sentence(f"The image processor of {name} cannot be used"):
        if not any(read_json(folder / file) for file in ("preprocessor_config.json", "processor_config.json")):
            raise not_found(name)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        # A window of semantic segmentation much smaller than the model is made for sees nothing, many times.
        least = (
            1
            if config.backbone_config
            else max(config.patch_size, *(side // 8 for side in to_pair(config.image_size)))
        )
        check_processor(processor, config.num_channels, least)
    return processor


def check_weights(name: str, config: CBSAConfig, model_class: type[CBSAPreTrainedModel]):
    """
    Compare a configuration with the header of the weights, before there is memory for a model.

    Raises:
        CheckpointError: the weights are not found, are pickles or cut short, or do not fit the configuration.
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
    Model (in evaluation mode) and image processor of a folder or hub id. Code from there is never run, and pickles are
    not opened.

    Args:
        name: the folder or hub id; [`default_checkpoint`] when None.
        task: what the model has to be for, of `TASKS`; when None it is what it was saved as: a classifier, a
            segmenter, or an encoder without a head.
        dtype, device_map: of the weights, as `from_pretrained` of Transformers takes them; by default what the
            configuration says, on the CPU.

    Raises:
        ValueError: not found, not readable, of another kind of model or for another task, or damaged; the message is
            one sentence for people.
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
