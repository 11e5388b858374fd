import json
import os
import runpy
import sys


# Before any import of the libraries: nothing is fetched, and nothing is reported home.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# The tests run in as many processes as there are cores; more threads than that would only be in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import SegformerImageProcessorPil, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from cbsa_hf import CBSAConfig, CBSAForImageClassification, CBSAForSemanticSegmentation, load_checkpoint


ROOT = Path(__file__).parents[1]


@pytest.fixture
def training(monkeypatch):
    """The training scripts can be run in this process; afterwards it is as it was."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def refusal(training, monkeypatch):
    """Runs a training script in this process -> what it ends with."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / "training" / script), run_name="__main__")
        return ending.value.code

    return run


def enable_activation_checkpointing(model):
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()  # its name before Transformers 5.23


@pytest.fixture
def tiny_config() -> CBSAConfig:
    return CBSAConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=(32, 48),
        patch_size=8,
        representatives_size=(2, 3),
        num_labels=5,
    )


@pytest.fixture
def tiny_model(tiny_config) -> CBSAForImageClassification:
    """Random weights, with random step sizes and batch norm statistics lest a mistake in them cancels out."""
    torch.manual_seed(0)
    model = CBSAForImageClassification(tiny_config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("step_rep", "step_x", "running_var")):
                tensor.uniform_(0.5, 2)
            elif name.endswith(("running_mean", "bias", "position_embeddings", "cls_token")):
                tensor.normal_()
    return model


@pytest.fixture
def tiny_segmenter(tiny_config) -> CBSAForSemanticSegmentation:
    """Random weights that see all five classes in noise."""
    torch.manual_seed(0)
    names = ["sky", "tree", "road", "car", "sign"]
    tiny_config.id2label = dict(enumerate(names))
    tiny_config.label2id = {name: index for index, name in enumerate(names)}
    tiny_config.decoder_representatives_size = 2
    model = CBSAForSemanticSegmentation(tiny_config).eval()
    with torch.no_grad():
        model.cbsa.embeddings.position_embeddings.normal_()
        model.decoder.class_embeddings.normal_()
    return model


@pytest.fixture
def saved_segmenter(tiny_segmenter, tmp_path) -> Path:
    """Its folder, with an image processor."""
    folder = tmp_path / "segmenter"
    tiny_segmenter.save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 32, "width": 48}, do_convert_rgb=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shipped():
    """Model and processor of the checkpoint in the package."""
    return load_checkpoint()


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A cat, 451 x 300 pixels; CC0."""
    import skimage.data

    return Image.fromarray(skimage.data.chelsea())


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture
def vit(tmp_path):
    """A small ViT of Transformers with random weights, and the folder where it is saved."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, id2label={0: "x", 1: "y", 2: "z"})
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil().save_pretrained(tmp_path / "vit")
    return model, tmp_path / "vit"


@pytest.fixture
def labelled():
    """Eight smooth pictures of two classes."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((48, 40), Image.BILINEAR)
        for _ in range(8)
    ]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": pictures, "label": [0, 1] * 4}, features=features)


@pytest.fixture
def start(training, labelled, tmp_path):
    """Starts runs of `pretrain.py` in this process on those pictures, in `tmp_path / "data"`."""
    from accelerate.state import AcceleratorState

    from training import pretrain
    from training.arguments import PretrainingArguments

    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        labelled.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    config = {"model_type": "cbsa", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"image_size": 32, "patch_size": 8}))

    def start(output_dir: Path, **changes):
        settings = {"batch_size": 4, "num_epochs": 1, "warmup_epochs": 0.0, "num_workers": 0, "report_to": "none"}
        settings |= {"dataset_name": str(folder), "config_name": str(folder / "config.json")}
        settings |= {"patch_embedding_type": "patchify", "output_dir": str(output_dir)}
        AcceleratorState._reset_state()
        pretrain.main(PretrainingArguments(**{**settings, **changes}))

    return start
