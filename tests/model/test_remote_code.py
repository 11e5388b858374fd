"""Saved models bring their code: a process that cannot import this package loads them and computes the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, SegformerImageProcessorPil, ViTImageProcessorPil

from cbsa_hf import CBSABackbone, CBSAConfig, CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAModel


STRANGER = """
import sys

sys.modules["cbsa_hf"] = None  # importing it raises ImportError

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

folder = sys.argv[1]
pixel_values = load_file(f"{folder}/input.safetensors")["pixel_values"]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
encoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
backbone = AutoBackbone.from_config(config, trust_remote_code=True)
backbone.load_state_dict(classifier.state_dict(), strict=False)
outputs = {
    "logits": classifier(pixel_values).logits,
    "tokens": encoder(pixel_values).last_hidden_state,
    "feature_map": backbone.eval()(pixel_values).feature_maps[-1].contiguous(),
}
if "pipeline" in sys.argv:
    extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
    image = Image.fromarray(load_file(f"{folder}/input.safetensors")["image"].numpy())
    outputs["features"] = torch.tensor(extract(image))
    classifier.save_pretrained(f"{folder}/again")
save_file(outputs, f"{folder}/output.safetensors")
"""

SEGMENTING_STRANGER = """
import sys

sys.modules["cbsa_hf"] = None  # importing it raises ImportError

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSemanticSegmentation, pipeline

folder = sys.argv[1]
pixel_values = load_file(f"{folder}/input.safetensors")["pixel_values"]
outputs = {}
for name in ("cbsa", "dinov2"):
    model = AutoModelForSemanticSegmentation.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    outputs[name] = model(pixel_values).logits.contiguous()
encoder = AutoModel.from_pretrained(f"{folder}/cbsa", trust_remote_code=True)
outputs["tokens"] = encoder(pixel_values, interpolate_pos_encoding=True).last_hidden_state
segments = pipeline("image-segmentation", model=f"{folder}/cbsa", trust_remote_code=True)(Image.new("RGB", (70, 50)))
outputs["pixels"] = torch.tensor(sum(segment["mask"].histogram()[255] for segment in segments))
save_file(outputs, f"{folder}/output.safetensors")
"""


def run_stranger(folder, script: str, *args: str) -> dict[str, torch.Tensor]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    command = [sys.executable, "-c", script, str(folder), *args]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return load_file(folder / "output.safetensors")


def test_a_process_without_the_package_computes_the_same(tiny_model, noise, tmp_path):
    pixel_values = torch.randn(2, 3, 32, 48)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48}, do_convert_rgb=True)
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = torch.frombuffer(bytearray(noise.tobytes()), dtype=torch.uint8).reshape(50, 70, 3)
    save_file({"pixel_values": pixel_values, "image": image}, tmp_path / "input.safetensors")

    outputs = run_stranger(tmp_path, STRANGER, "pipeline")

    expected = tiny_model.cbsa(pixel_values).last_hidden_state
    torch.testing.assert_close(outputs["logits"], tiny_model(pixel_values).logits)
    torch.testing.assert_close(outputs["tokens"], expected)
    torch.testing.assert_close(outputs["feature_map"].flatten(2).transpose(1, 2), expected[:, 1:])
    inputs = processor(noise, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(outputs["features"], tiny_model.cbsa(inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
    # What it saves is complete again, code included but for that of the pipeline, which it does not have and does not
    # name, and is known here by its type.
    assert {path.suffix for path in (tmp_path / "again").iterdir()} == {".json", ".py", ".safetensors"}
    assert "custom_pipelines" not in json.loads((tmp_path / "again" / "config.json").read_text())
    again = CBSAForImageClassification.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(pixel_values).logits, outputs["logits"])


def test_segmentation_without_the_package(tiny_config, tmp_path):
    dinov2 = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    models = {
        "cbsa": CBSAForSemanticSegmentation(tiny_config).eval(),
        "dinov2": CBSAForSemanticSegmentation(CBSAConfig(num_labels=5, backbone_config=dinov2)).eval(),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    SegformerImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(tmp_path / "cbsa")
    pixel_values = torch.randn(2, 3, 40, 56)
    save_file({"pixel_values": pixel_values}, tmp_path / "input.safetensors")

    outputs = run_stranger(tmp_path, SEGMENTING_STRANGER)

    for name, model in models.items():
        torch.testing.assert_close(outputs[name], model(pixel_values).logits)
    expected = models["cbsa"].cbsa(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(outputs["tokens"], expected)
    assert outputs["pixels"] == 70 * 50  # every pixel has one class


@pytest.mark.parametrize(
    "model_class", [CBSAModel, CBSAForImageClassification, CBSAForSemanticSegmentation, CBSABackbone]
)
def test_whatever_is_saved_names_every_class(tiny_config, model_class, tmp_path):
    model_class(tiny_config).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_cbsa.CBSAConfig",
        "AutoModel": "modeling_cbsa.CBSAModel",
        "AutoModelForImageClassification": "modeling_cbsa.CBSAForImageClassification",
        "AutoModelForSemanticSegmentation": "modeling_cbsa.CBSAForSemanticSegmentation",
        "AutoBackbone": "modeling_cbsa.CBSABackbone",
    }
    pipeline = ["images", "image_files", "inference", "memory", "patch_grouping", "pipeline_cbsa", "spectral"]
    of_classifiers = model_class is CBSAForImageClassification
    assert {path.name for path in tmp_path.glob("*.py")} == {
        *(f"{name}.py" for name in [*pipeline, "zero_shot"] if of_classifiers),
        "attention_cbsa.py",
        "configuration_cbsa.py",
        "mask_decoder_cbsa.py",
        "modeling_cbsa.py",
        "tiles_cbsa.py",
    }


def test_a_class_of_the_user_keeps_its_own_entry(tmp_path):
    config = CBSAConfig()
    config.auto_map = {"AutoModel": "modeling_mine.MyModel"}
    config.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_mine.MyModel"
