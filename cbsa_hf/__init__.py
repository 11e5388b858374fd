"""Contract-and-Broadcast Self-Attention (CBSA) for Hugging Face Transformers. Importing it registers the Auto classes."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTImageProcessorPil,
)

from .attention_cbsa import ContractAndBroadcastSelfAttention
from .configuration_cbsa import CBSAConfig
from .modeling_cbsa import (
    CBSAForImageClassification,
    CBSAImageClassifierOutput,
    CBSAModel,
    CBSAModelOutput,
    CBSAPreTrainedModel,
)


__version__ = "0.1.0"

AutoConfig.register("cbsa", CBSAConfig)
AutoModel.register(CBSAConfig, CBSAModel)
AutoModelForImageClassification.register(CBSAConfig, CBSAForImageClassification)
AutoImageProcessor.register(CBSAConfig, image_processor_classes={"pil": ViTImageProcessorPil})


def default_checkpoint() -> str:
    """Path of the checkpoint that ships with this package: a tiny classifier trained on Imagenette."""
    return str(Path(__file__).parent / "checkpoints" / "cbsa-tiny-imagenette")


__all__ = [
    "CBSAConfig",
    "CBSAForImageClassification",
    "CBSAImageClassifierOutput",
    "CBSAModel",
    "CBSAModelOutput",
    "CBSAPreTrainedModel",
    "ContractAndBroadcastSelfAttention",
    "default_checkpoint",
]
