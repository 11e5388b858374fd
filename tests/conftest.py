"""Fixtures and helpers that several test modules share."""

import json
import math
import os
import runpy
import subprocess
import sys


# Set before the libraries are imported: no downloads, no telemetry.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# pytest-xdist starts one process per core, so each process gets one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import SegformerImageProcessorPil, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from cbsa_hf import CBSAConfig, CBSAForImageClassification, CBSAForSemanticSegmentation, load_checkpoint


ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def assert_matches(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5):
    """Assert that no value differs by more than `tolerance` times the largest expected value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_same_weights(folder: Path, expected: Path):
    """Assert that models saved in two folders have the same weights."""
    weights, wanted = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


class MakesFolder:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flatten_outputs(outputs) -> list[torch.Tensor]:
    """All tensors of a model's outputs, however nested."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in values if value is not None for tensor in flatten_outputs(value)]


def patches_of_bins(grid: tuple[int, int], size: tuple[int, int]) -> list[list[int]]:
    """
    The indices of the patches that each bin of an adaptive average pool takes, row by row. Bin i of n over h patches
    takes those from floor(i h / n) to ceil((i + 1) h / n) - 1.
    """
    (height, width), (rows, columns) = grid, size
    bins = []
    for i in range(rows):
        for j in range(columns):
            inside_y = range(i * height // rows, math.ceil((i + 1) * height / rows))
            inside_x = range(j * width // columns, math.ceil((j + 1) * width / columns))
            bins.append([y * width + x for y in inside_y for x in inside_x])
    return bins


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Draw every weight and bias, so that a mistake in one that starts at zero or one shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def enable_activation_checkpointing(model: torch.nn.Module):
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()  # the name before Transformers 5.23


def rewrite_json(path: Path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# For scripts that measure memory in a process of their own.
PEAK_MEMORY = """
from pathlib import Path


def peak_memory() -> int:
    # In kB, of this process alone; `ru_maxrss` starts with the value of its parent.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


"""


def run_without_package(script: str, folder: Path, *arguments: str) -> str:
    """Run a script, in `folder` and a process that cannot import this package, and return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    block = 'import sys\n\nsys.modules["cbsa_hf"] = None\n'  # importing it raises ImportError
    command = [sys.executable, "-c", block + script, *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture
def training(monkeypatch):
    """Let a test run training scripts in this process, on the CPU. Accelerate's state is reset afterwards."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def refusal(training, monkeypatch):
    """A function that runs a training script in this process, and returns the message it exits with."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / "training" / script), run_name="__main__")
        return ending.value.code

    return run


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
    """A small classifier. Its step sizes and batch norm statistics are random, so that a mistake in them shows."""
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
    """A small segmenter with random weights, which finds all five classes in noise."""
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
    """The folder where `tiny_segmenter` is saved, with an image processor."""
    folder = tmp_path / "segmenter"
    tiny_segmenter.save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 32, "width": 48}, do_convert_rgb=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shipped():
    """Model and image processor of the checkpoint that the package contains."""
    return load_checkpoint()


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A cat, 451 x 300 pixels; CC0."""
    import skimage.data

    return Image.fromarray(skimage.data.chelsea())


@pytest.fixture
def processor() -> ViTImageProcessorPil:
    """An image processor for 32 x 32 pixels, with another mean and standard deviation for each channel."""
    return ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, do_convert_rgb=True)


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
    """A data set of eight smooth images in two classes."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((48, 40), Image.BILINEAR)
        for _ in range(8)
    ]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": pictures, "label": [0, 1] * 4}, features=features)


@pytest.fixture
def start(training, labelled, tmp_path):
    """A function that runs `pretrain.py` in this process, on the images of `labelled` in `tmp_path / "data"`."""
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
