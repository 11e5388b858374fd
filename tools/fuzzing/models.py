"""Small checkpoints, and functions that read photos with them."""

from collections.abc import Callable

import numpy as np
import torch
import transformers
from transformers import (
    SegformerImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from cbsa_hf import (
    CBSAConfig,
    CBSAForImageClassification,
    CBSAForSemanticSegmentation,
    SlidingWindowSegmenter,
    ZeroShotSegmenter,
    load_checkpoint,
)

from . import SCRATCH
from .drawing import draw_picture


READERS: dict[str, Callable] = {}
"""Functions that read a photo, by name; [`build_models`] fills this."""

CLASSES = ["sky", "tree", "road"]


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def build_models():
    """Save small checkpoints in the scratch folder, and fill [`READERS`]."""
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, names = SCRATCH / "models", dict(enumerate(CLASSES))
    config = CBSAConfig(**SIZES, id2label=names, label2id={name: i for i, name in names.items()})
    classifier = CBSAForImageClassification(config)
    classifier.save_pretrained(folder / "classifier")
    classifier.base_model.save_pretrained(folder / "encoder")
    config.decoder_representatives_size = 2
    CBSAForSemanticSegmentation(config).save_pretrained(folder / "segmenter")
    sizes = {**SIZES, "intermediate_size": 24, "id2label": config.id2label, "label2id": config.label2id}
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(folder / "vit")
    for name in ("classifier", "encoder", "vit"):
        ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(folder / name)
    processor = SegformerImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True)
    processor.save_pretrained(folder / "segmenter")
    draw_picture(np.random.default_rng(0)).save(folder / "photo.png")
    READERS["zero-shot"] = ZeroShotSegmenter(*load_checkpoint(str(folder / "classifier")), long_side=64)
    READERS["sliding"] = SlidingWindowSegmenter(*load_checkpoint(str(folder / "segmenter"), "semantic-segmentation"))
    READERS["pipeline"] = pipeline("cbsa-zero-shot-segmentation", model=str(folder / "classifier"), device="cpu")
