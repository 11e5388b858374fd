"""Where checkpoints come from: those in this package, a folder, or the Hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor

from .configuration_cbsa import CBSAConfig
from .modeling_cbsa import CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAPreTrainedModel


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


def default_checkpoint(task: str = "image-classification") -> str:
    """Path of the checkpoint for a task in `TASKS` that ships with this package."""
    return str(Path(__file__).parent / "checkpoints" / TASKS[task].default)


def not_found(name: str) -> ValueError:
    return ValueError(
        f"{name} is neither a folder with a complete checkpoint nor the id of one that can be reached on the Hub."
    )


def load_config(name: str) -> CBSAConfig:
    """
    Configuration of a folder or hub id.

    Raises:
        ValueError: not found, not readable, or of another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise not_found(name) from error
    if not isinstance(config, CBSAConfig):
        raise ValueError(f"{name} holds a model of type {config.model_type}; this takes `cbsa` models.")
    return config


def checkpoint_task(name: str) -> str:
    """The task in `TASKS` that the model of a folder or hub id was saved for; a ValueError as of [`load_config`]."""
    architectures = load_config(name).architectures or []
    return "semantic-segmentation" if "CBSAForSemanticSegmentation" in architectures else "image-classification"


def load_checkpoint(
    name: str | None = None, task: str = "image-classification"
) -> tuple[CBSAPreTrainedModel, BaseImageProcessor]:
    """
    Model (in evaluation mode) and image processor of a folder or hub id; of [`default_checkpoint`] when None.

    Raises:
        ValueError: not found, not readable, or of another kind of model; the message is one sentence for people.
    """
    name = default_checkpoint(task) if name is None else name
    config = load_config(name)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model, report = TASKS[task].model_class.from_pretrained(name, config=config, output_loading_info=True)
    except OSError as error:
        raise not_found(name) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"The weights of {name} cannot be read or do not fit its configuration.") from error
    if report["missing_keys"]:
        raise ValueError(
            f"{name} is no {TASKS[task].title}: {len(report['missing_keys'])} of its weights are missing."
        )
    return model.eval(), processor
