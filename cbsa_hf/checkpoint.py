"""Where checkpoints come from: those in this package, a folder, or the Hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor

from .configuration_cbsa import CBSAConfig
from .modeling_cbsa import CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAModel, CBSAPreTrainedModel


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
    return str(Path(__file__).parent / "checkpoints" / find_task(task).default)


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


def saved_as(config: CBSAConfig) -> tuple[type[CBSAPreTrainedModel], str]:
    """The class that a checkpoint's weights fill, and what to call it; the encoder where there is no head."""
    architectures = config.architectures or [CBSAForImageClassification.__name__]
    for task in TASKS.values():
        if task.model_class.__name__ in architectures:
            return task.model_class, task.title
    return CBSAModel, "CBSA encoder"


def load_checkpoint(
    name: str | None = None, task: str | None = None
) -> tuple[CBSAPreTrainedModel, BaseImageProcessor]:
    """
    Model (in evaluation mode) and image processor of a folder or hub id.

    Args:
        name: the folder or hub id; [`default_checkpoint`] when None.
        task: what the model has to be for, of `TASKS`; when None it is what it was saved as: a classifier, a
            segmenter, or an encoder without a head.

    Raises:
        ValueError: not found, not readable, of another kind of model or for another task; the message is one sentence
            for people.
    """
    if name is None:
        name = default_checkpoint() if task is None else default_checkpoint(task)
    config = load_config(name)
    model_class, title = saved_as(config) if task is None else (find_task(task).model_class, find_task(task).title)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model, report = model_class.from_pretrained(name, config=config, output_loading_info=True)
    except OSError as error:
        raise not_found(name) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"The weights of {name} cannot be read or do not fit its configuration.") from error
    if report["missing_keys"]:
        raise ValueError(f"{name} is no {title}: {len(report['missing_keys'])} of its weights are missing.")
    return model.eval(), processor
