"""The shipped checkpoints: their files, and outputs as recorded by `python tests/checkpoints/record_golden.py`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from cbsa_hf import SlidingWindowSegmenter, ZeroShotSegmenter, attention_maps, default_checkpoint, load_checkpoint
from cbsa_hf.checkpoints import TASKS
from cbsa_hf.segmentation.images import to_pixel_values


GOLDEN = Path(__file__).with_name("golden.safetensors")


def compute(model, processor, photo) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        logits = model(processor(photo, return_tensors="pt")["pixel_values"]).logits
    attention_map = attention_maps(model, to_pixel_values(photo, processor, 256, 8))[-1, 0, 0]
    mask = torch.from_numpy(ZeroShotSegmenter(model, processor)(photo).mask)
    return {"logits": logits, "attention_map": attention_map.contiguous(), "mask": mask}


def test_golden_outputs(shipped, photo):
    golden, actual = load_file(GOLDEN), compute(*shipped, photo)
    torch.testing.assert_close(actual["logits"], golden["logits"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actual["attention_map"], golden["attention_map"], rtol=1e-3, atol=1e-6)
    mask = np.unpackbits(golden["mask"].numpy(), count=actual["mask"].numel()).reshape(actual["mask"].shape)
    assert (actual["mask"].numpy() == mask.astype(bool)).mean() > 0.999


@pytest.mark.parametrize("task", TASKS)
def test_shipped_files(task):
    folder = Path(default_checkpoint(task))
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "auto_map" not in config
    assert json.loads((folder / "preprocessor_config.json").read_text())["do_convert_rgb"] is True
    count = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert count // 1000 == {"image-classification": 1600, "semantic-segmentation": 2177}[task]
    assert (folder / "model.safetensors").stat().st_size < 2 * count + 2**16  # two bytes a number, and the header


def test_classification_pipeline(shipped, photo):
    classifier = pipeline("image-classification", model=default_checkpoint())
    grey = photo.convert("L")  # an image of any mode is converted
    scores = classifier(grey)
    logits = compute(*shipped, grey.convert("RGB"))["logits"]
    expected = logits.softmax(-1)[0]
    assert scores[0]["label"] == shipped[0].config.id2label[expected.argmax().item()]
    assert abs(scores[0]["score"] - expected.max().item()) < 1e-4


@pytest.mark.parametrize("function", [default_checkpoint, lambda task: load_checkpoint(task=task)])
def test_unknown_task_raises(function):
    with pytest.raises(ValueError, match="There is no task 'semantic'; choose one of 'image-classification', 'sem"):
        function("semantic")


def test_street_scene():
    """An image that is pale above and dark grey below is sky over a road."""
    model, processor = load_checkpoint(task="semantic-segmentation")
    pixels = np.full((288, 384, 3), (200, 215, 235), dtype=np.uint8)
    pixels[170:] = (70, 70, 72)
    noise = np.random.default_rng(0).normal(0, 4, pixels.shape)
    street = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
    labels = SlidingWindowSegmenter(model, processor)(street)
    names = np.vectorize(model.config.id2label.get)(labels)
    assert (names[:100] == "sky").mean() > 0.8
    assert (names[200:] == "road").mean() > 0.5


def test_dtype_and_device(shipped, photo):
    """`dtype` and `device_map` work as in `from_pretrained`. Outputs in bfloat16 are close to those in float32."""
    model, processor = load_checkpoint(dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    pixel_values = processor(photo, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found, expected = (each(pixel_values).logits.float().softmax(-1) for each in (model, shipped[0]))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert load_checkpoint(dtype="float16")[0].dtype == torch.float16
