"""Types of the public package. Pyright checks this file; nothing runs it."""

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from cbsa_hf import (
    PRESETS,
    CBSAConfig,
    CBSAForImageClassification,
    CBSAForSemanticSegmentation,
    CBSAPreTrainedModel,
    ImageError,
    SlidingWindowSegmenter,
    ZeroShotSegmentation,
    ZeroShotSegmenter,
    accuracy_under_noise,
    attention_maps,
    default_checkpoint,
    load_checkpoint,
    measure_layers,
    preset_path,
)
from cbsa_hf.segmentation.images import open_image, open_mask, to_image


photo, pixels = Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8)

assert_type(load_checkpoint(), tuple[CBSAForImageClassification, BaseImageProcessor])
assert_type(load_checkpoint(task="semantic-segmentation"), tuple[CBSAForSemanticSegmentation, BaseImageProcessor])
assert_type(load_checkpoint("folder"), tuple[CBSAPreTrainedModel, BaseImageProcessor])
assert_type(
    load_checkpoint("folder", task="image-classification", dtype=torch.bfloat16, device_map="auto"),
    tuple[CBSAForImageClassification, BaseImageProcessor],
)

classifier, processor = load_checkpoint()
segment = ZeroShotSegmenter(classifier, processor, method="ncut", num_segments=6)
for source in (photo, pixels, torch.zeros(8, 8, 3), "photo.jpg", Path("photo.jpg"), b""):
    assert_type(segment(source), ZeroShotSegmentation)
assert_type(segment([photo, pixels]), list[ZeroShotSegmentation | ImageError])
assert_type(segment(("a.jpg", "b.jpg")), list[ZeroShotSegmentation | ImageError])
found = segment(photo)
assert_type(found.mask, np.ndarray)
assert_type(found.scores, np.ndarray)
assert_type(found.segments[0].name, str | None)

segmenter, segmenter_processor = load_checkpoint(task="semantic-segmentation")
windows = SlidingWindowSegmenter(segmenter, segmenter_processor, window=(64, 64))
assert_type(windows(photo), np.ndarray)
assert_type(windows([photo]), list[np.ndarray | ImageError])

assert_type(open_image("photo.jpg"), Image.Image)
assert_type(open_mask("mask.png"), Image.Image)
assert_type(to_image(pixels), Image.Image)
assert_type(to_image(pixels, num_channels=13), Image.Image | np.ndarray)

assert_type(attention_maps(classifier, torch.zeros(1, 3, 64, 64)), torch.Tensor)
assert_type(accuracy_under_noise(classifier, [], [0.1]), list[float])
assert_type(measure_layers(classifier, []).representative_attention_rank, torch.Tensor | None)
assert_type(default_checkpoint(), str)
assert_type(CBSAConfig.from_pretrained(preset_path(next(iter(PRESETS)))), CBSAConfig)
