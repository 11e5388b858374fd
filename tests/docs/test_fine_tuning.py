"""The commands of the fine-tuning guide run, on a few images with the columns of its data set."""

import json
import shlex

import numpy as np
import torch
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from test_readme import blocks
from transformers import ViTImageProcessorPil

from cbsa_hf import CBSAConfig, CBSAForImageClassification, load_checkpoint
from training import score
from training.arguments import FinetuningArguments, ScoringArguments, parse_arguments
from training.finetune import finetune_classifier


BREEDS = [f"breed {i}" for i in range(37)]


def options(script: str, **replaced: str) -> list[str]:
    """The arguments that the guide gives to a script, with other folders."""
    text = "\n".join(blocks(ROOT / "docs" / "guides" / "fine-tuning.md", "bash")).replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if script in line]
    words = shlex.split(line.partition(script)[2])
    return [replaced.get(word.replace("/", "_").replace("-", "_"), word) for word in words]


def test_commands_of_the_guide(training, tmp_path):
    features = {"image": Image(), "label": ClassLabel(names=BREEDS), "image_id": Value("string")}
    features |= {"label_cat_dog": ClassLabel(names=["cat", "dog"])}
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        images = [PILImage.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in BREEDS]
        rows = {"image": images, "label": list(range(37)), "image_id": BREEDS, "label_cat_dog": [0] * 37}
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(rows, features=Features(features)).to_parquet(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    CBSAForImageClassification(CBSAConfig(**sizes)).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(tmp_path / "model")

    folders = {"timm_oxford_iiit_pet": str(tmp_path / "data"), "runs_pets": str(tmp_path / "pets")}
    smaller = ["--num_epochs=2", "--batch_size=8", "--num_workers=0", f"--model_name_or_path={tmp_path / 'model'}"]
    given = options("training/finetune.py", **folders)
    finetune_classifier(parse_arguments(FinetuningArguments, [*given, *smaller, "--report_to=none"]))
    results = json.loads((tmp_path / "pets" / "results.json").read_text())
    assert results["step"] == 2 * (33 // 8)  # 4 of the 37 images validate
    assert len((tmp_path / "pets" / "log.csv").read_text().splitlines()) == 3
    model, _ = load_checkpoint(str(tmp_path / "pets"))
    assert list(model.config.id2label.values()) == BREEDS

    output = tmp_path / "scores.json"
    given = options("training/score.py", **folders)
    score.main(parse_arguments(ScoringArguments, [*given, f"--output={output}"]))
    assert 0 <= json.loads(output.read_text())["accuracy"] <= 1
