"""Saved models bring their code: a process that cannot import this package loads them and computes the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessorPil

from cbsa_hf import CBSABackbone, CBSAConfig, CBSAForImageClassification, CBSAModel


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


def run_stranger(folder, *args: str) -> dict[str, torch.Tensor]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    command = [sys.executable, "-c", STRANGER, str(folder), *args]
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

    outputs = run_stranger(tmp_path, "pipeline")

    expected = tiny_model.cbsa(pixel_values).last_hidden_state
    torch.testing.assert_close(outputs["logits"], tiny_model(pixel_values).logits)
    torch.testing.assert_close(outputs["tokens"], expected)
    torch.testing.assert_close(outputs["feature_map"].flatten(2).transpose(1, 2), expected[:, 1:])
    inputs = processor(noise, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(outputs["features"], tiny_model.cbsa(inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
    # What it saves is complete again, code included, and is known here by its type.
    assert {path.suffix for path in (tmp_path / "again").iterdir()} == {".json", ".py", ".safetensors"}
    again = CBSAForImageClassification.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(pixel_values).logits, outputs["logits"])


@pytest.mark.parametrize("model_class", [CBSAModel, CBSAForImageClassification, CBSABackbone])
def test_whatever_is_saved_names_every_class(tiny_config, model_class, tmp_path):
    model_class(tiny_config).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_cbsa.CBSAConfig",
        "AutoModel": "modeling_cbsa.CBSAModel",
        "AutoModelForImageClassification": "modeling_cbsa.CBSAForImageClassification",
        "AutoBackbone": "modeling_cbsa.CBSABackbone",
    }
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "attention_cbsa.py",
        "configuration_cbsa.py",
        "modeling_cbsa.py",
    }


def test_a_class_of_the_user_keeps_its_own_entry(tmp_path):
    config = CBSAConfig()
    config.auto_map = {"AutoModel": "modeling_mine.MyModel"}
    config.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_mine.MyModel"
