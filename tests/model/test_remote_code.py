"""Saved models include their code: a process without this package loads them and computes the same."""

import json

import pytest
import torch
from conftest import run_without_package
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, SegformerImageProcessorPil, ViTImageProcessorPil

from cbsa_hf import CBSABackbone, CBSAConfig, CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAModel


CLASSIFY = """
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
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
image = Image.fromarray(load_file(f"{folder}/input.safetensors")["image"].numpy())
outputs["features"] = torch.tensor(extract(image))
classifier.save_pretrained(f"{folder}/again")
save_file(outputs, f"{folder}/output.safetensors")
"""

SEGMENT = """
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


def test_classifier_without_the_package(tiny_model, noise, tmp_path):
    pixel_values = torch.randn(2, 3, 32, 48)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48}, do_convert_rgb=True)
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = torch.frombuffer(bytearray(noise.tobytes()), dtype=torch.uint8).reshape(50, 70, 3)
    save_file({"pixel_values": pixel_values, "image": image}, tmp_path / "input.safetensors")

    run_without_package(CLASSIFY, tmp_path, str(tmp_path))
    outputs = load_file(tmp_path / "output.safetensors")

    expected = tiny_model.cbsa(pixel_values).last_hidden_state
    torch.testing.assert_close(outputs["logits"], tiny_model(pixel_values).logits)
    torch.testing.assert_close(outputs["tokens"], expected)
    torch.testing.assert_close(outputs["feature_map"].flatten(2).transpose(1, 2), expected[:, 1:])
    inputs = processor(noise, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(outputs["features"], tiny_model.cbsa(inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
    # The model that this process saves is complete and has its code, without that of the pipeline, which it lacks.
    assert {path.suffix for path in (tmp_path / "again").iterdir()} == {".json", ".py", ".safetensors"}
    assert "custom_pipelines" not in json.loads((tmp_path / "again" / "config.json").read_text())
    again = CBSAForImageClassification.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(pixel_values).logits, outputs["logits"])


def test_segmenter_without_the_package(tiny_config, tmp_path):
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

    run_without_package(SEGMENT, tmp_path, str(tmp_path))
    outputs = load_file(tmp_path / "output.safetensors")

    for name, model in models.items():
        torch.testing.assert_close(outputs[name], model(pixel_values).logits)
    expected = models["cbsa"].cbsa(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(outputs["tokens"], expected)
    assert outputs["pixels"] == 70 * 50  # every pixel has one class


@pytest.mark.parametrize(
    "model_class", [CBSAModel, CBSAForImageClassification, CBSAForSemanticSegmentation, CBSABackbone]
)
def test_every_saved_model_names_all_auto_classes(tiny_config, model_class, tmp_path):
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
    is_classifier = model_class is CBSAForImageClassification
    assert {path.name for path in tmp_path.glob("*.py")} == {
        *(f"{name}.py" for name in [*pipeline, "zero_shot"] if is_classifier),
        "attention_cbsa.py",
        "configuration_cbsa.py",
        "mask_decoder_cbsa.py",
        "modeling_cbsa.py",
        "tiles_cbsa.py",
    }


def test_auto_map_of_the_user_is_kept(tmp_path):
    config = CBSAConfig()
    config.auto_map = {"AutoModel": "modeling_mine.MyModel"}
    config.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_mine.MyModel"
