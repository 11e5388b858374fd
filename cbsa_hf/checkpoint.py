"""Where checkpoints come from: the one in this package, a folder, or the Hub."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

from .configuration_cbsa import CBSAConfig
from .modeling_cbsa import CBSAForImageClassification


def default_checkpoint() -> str:
    """Path of the checkpoint that ships with this package: a tiny classifier trained on Imagenette."""
    return str(Path(__file__).parent / "checkpoints" / "cbsa-tiny-imagenette")


def load_checkpoint(name: str | None = None) -> tuple[CBSAForImageClassification, BaseImageProcessor]:
    """
    Model (in evaluation mode) and image processor of a folder or hub id; of [`default_checkpoint`] when None.

    Raises:
        ValueError: not found, not readable, or of another kind of model; the message is one sentence for people.
    """
    name = default_checkpoint() if name is None else name
    not_found = ValueError(
        f"{name} is neither a folder with a complete checkpoint nor the id of one that can be reached on the Hub."
    )
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise not_found from error
    if not isinstance(config, CBSAConfig):
        raise ValueError(f"{name} holds a model of type {config.model_type}; this takes `cbsa` models.")
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model, report = AutoModelForImageClassification.from_pretrained(name, config=config, output_loading_info=True)
    except OSError as error:
        raise not_found from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"The weights of {name} cannot be read or do not fit its configuration.") from error
    if report["missing_keys"]:
        raise ValueError(f"{name} is no image classifier: {len(report['missing_keys'])} of its weights are missing.")
    return model.eval(), processor
