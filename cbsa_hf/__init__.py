"""Contract-and-Broadcast Self-Attention (CBSA) for Transformers. Importing this package registers the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    ViTImageProcessorPil,
)

from .attention_cbsa import ContractAndBroadcastSelfAttention, ContractionSteps
from .checkpoints import default_checkpoint, load_checkpoint
from .configuration_cbsa import CBSAConfig
from .exporting import export_model, open_export
from .folding import fold
from .interpretability.attention_maps import attention_maps, exact_maps
from .interpretability.class_maps import class_attention_maps
from .interpretability.measures import accuracy_under_noise, coding_rate, measure_layers
from .modeling_cbsa import (
    CBSABackbone,
    CBSAForImageClassification,
    CBSAForSemanticSegmentation,
    CBSAImageClassifierOutput,
    CBSAModel,
    CBSAModelOutput,
    CBSAPreTrainedModel,
    CBSASemanticSegmenterOutput,
)
from .presets import PRESETS, preset_path
from .segmentation.images import ImageError
from .segmentation.inference import Encoding, encode
from .segmentation.pipeline_cbsa import ZeroShotSegmentationPipeline, register_pipeline
from .segmentation.sliding_window import SlidingWindowSegmenter
from .segmentation.zero_shot import Segment, ZeroShotSegmentation, ZeroShotSegmenter


__version__ = "0.1.0"

AutoConfig.register("cbsa", CBSAConfig)
AutoModel.register(CBSAConfig, CBSAModel)
AutoModelForImageClassification.register(CBSAConfig, CBSAForImageClassification)
AutoModelForSemanticSegmentation.register(CBSAConfig, CBSAForSemanticSegmentation)
AutoBackbone.register(CBSAConfig, CBSABackbone)
AutoImageProcessor.register(CBSAConfig, image_processor_classes={"pil": ViTImageProcessorPil})
register_pipeline(default_checkpoint())

# So that saved models bring their code, and open with `trust_remote_code=True` where this package is not installed.
CBSAConfig.register_for_auto_class()
CBSAConfig.pipeline_class = ZeroShotSegmentationPipeline
CBSAModel.register_for_auto_class("AutoModel")
CBSAForImageClassification.register_for_auto_class("AutoModelForImageClassification")
CBSAForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
CBSABackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "PRESETS",
    "CBSABackbone",
    "CBSAConfig",
    "CBSAForImageClassification",
    "CBSAForSemanticSegmentation",
    "CBSAImageClassifierOutput",
    "CBSAModel",
    "CBSAModelOutput",
    "CBSAPreTrainedModel",
    "CBSASemanticSegmenterOutput",
    "ContractAndBroadcastSelfAttention",
    "ContractionSteps",
    "Encoding",
    "ImageError",
    "Segment",
    "SlidingWindowSegmenter",
    "ZeroShotSegmentation",
    "ZeroShotSegmentationPipeline",
    "ZeroShotSegmenter",
    "accuracy_under_noise",
    "attention_maps",
    "class_attention_maps",
    "coding_rate",
    "default_checkpoint",
    "encode",
    "exact_maps",
    "export_model",
    "fold",
    "load_checkpoint",
    "measure_layers",
    "open_export",
    "preset_path",
]
