"""The training script as its users start it: `accelerate launch`, on a small Parquet file that the test writes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cbsa_hf import load_checkpoint


SIZES = {"image_size": 32, "patch_size": 8, "crop_size": 24, "batch_size": 8, "num_workers": 0, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 noisy images for training and 7 for validation, reddish or bluish, as Parquet; and a small configuration."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)

    def make(label: int) -> PILImage.Image:
        pixels = random.integers(0, 160, (40, 36, 3))
        pixels[..., 2 * label] += 90
        return PILImage.fromarray(pixels.astype(np.uint8))

    features = Features({"picture": Image(), "kind": ClassLabel(names=["red", "blue"])})
    for split, count in [("train", 24), ("validation", 7)]:
        labels = [i % 2 for i in range(count)]
        rows = Dataset.from_dict({"picture": [make(i) for i in labels], "kind": labels}, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    config = {"model_type": "cbsa", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pretrain(data, output_dir, *arguments, processes: int = 1, succeeds: bool = True) -> subprocess.CompletedProcess:
    # Two processes on CPU start only with this flag and this variable: see the script's documentation.
    several = ["--multi_gpu"] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(ROOT / "training" / "pretrain.py"), "--dataset_name", str(data), "--output_dir", str(output_dir)]
    command += ["--config_name", str(data / "config.json")]
    command += [*(f"--{name}={value}" for name, value in SIZES.items()), *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (process.returncode == 0) == succeeds, process.stderr
    return process


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained")
    pretrain(data, output_dir, "--num_epochs", "12", "--learning_rate", "3e-3")
    return output_dir


def test_learns(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["accuracy"] == 1.0
    assert (results["processes"], results["epoch"], results["step"]) == (1, 12, 36)
    model, processor = load_checkpoint(str(trained))
    assert model.config.id2label == {0: "red", 1: "blue"}
    assert processor.size == {"height": 32, "width": 32}
    assert processor.do_convert_rgb


def test_logs_to_tensorboard(trained):
    (events,) = [path for path in trained.rglob("events.out.*") if path.parent.name == "pretrain"]
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("validation/accuracy")] == list(range(3, 37, 3))
    assert [event.step for event in log.Scalars("train/loss")] == [10, 20, 30]


def test_resumes_exactly(data, trained, tmp_path):
    checkpoints = sorted(path.name for path in trained.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-0011", "checkpoint-0012"]
    # The run as it was after epoch 11: the script is to find that state, and end where the first run ended.
    (tmp_path / "checkpoint-0011").symlink_to(trained / "checkpoint-0011")
    (tmp_path / "checkpoint-0012.partial").mkdir()  # and not what was being written when it was killed
    arguments = ["--num_epochs", "12", "--learning_rate", "3e-3", "--resume_from_checkpoint", "last"]
    process = pretrain(data, tmp_path, *arguments)
    assert "11 epochs done" in process.stdout
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert all((expected[name] == resumed[name]).all() for name in expected)
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 36


def test_two_processes(data, tmp_path):
    pretrain(data, tmp_path, "--num_epochs", "1", processes=2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["processes"], results["step"]) == (2, 3)  # three global batches of 8, whatever the processes
    # Seven validation images over two processes and an uneven batch: each counted once.
    assert results["accuracy"] * 7 == pytest.approx(round(results["accuracy"] * 7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "nobody/nothing"], "nobody/nothing is neither a folder or Parquet file with images, nor"),
        (["--config_name", "cbt-huge"], "`--config_name cbt-huge` is neither one of cbt-base"),
        (["--patch_size", "12"], "`patch_size` is 12, and has to be a power of two"),
        (["--learning_rate", "1e30"], "The loss is nan at step 3"),
        (["--train_split", "training"], "has no split 'training'; it has train, validation"),
        (["--batch_size", "32"], "24 training images are less than one batch of 32"),
        (["--resume_from_checkpoint", "last"], "There is no checkpoint in"),
    ],
)
def test_bad_input(data, tmp_path, arguments, message):
    process = pretrain(data, tmp_path / "run", *arguments, succeeds=False)
    sentences = [line for line in process.stderr.splitlines() if line.startswith("pretrain.py: ")]
    assert len(sentences) == 1
    assert message in sentences[0]
    assert not list(tmp_path.rglob("*.safetensors"))
