"""Contract-and-Broadcast Self-Attention (CBSA) for Transformers. Importing this package registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTImageProcessorPil,
)

from .attention_cbsa import ContractAndBroadcastSelfAttention
from .checkpoint import default_checkpoint, load_checkpoint
from .configuration_cbsa import CBSAConfig
from .interpretability import attention_maps
from .modeling_cbsa import (
    CBSAForImageClassification,
    CBSAImageClassifierOutput,
    CBSAModel,
    CBSAModelOutput,
    CBSAPreTrainedModel,
)
from .presets import PRESETS, preset_path
from .zero_shot import ZeroShotSegmentation, ZeroShotSegmenter


__version__ = "0.1.0"

AutoConfig.register("cbsa", CBSAConfig)
AutoModel.register(CBSAConfig, CBSAModel)
AutoModelForImageClassification.register(CBSAConfig, CBSAForImageClassification)
AutoImageProcessor.register(CBSAConfig, image_processor_classes={"pil": ViTImageProcessorPil})

__all__ = [
    "PRESETS",
    "CBSAConfig",
    "CBSAForImageClassification",
    "CBSAImageClassifierOutput",
    "CBSAModel",
    "CBSAModelOutput",
    "CBSAPreTrainedModel",
    "ContractAndBroadcastSelfAttention",
    "ZeroShotSegmentation",
    "ZeroShotSegmenter",
    "attention_maps",
    "default_checkpoint",
    "load_checkpoint",
    "preset_path",
]
