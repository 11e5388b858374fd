"""`pretrain.py`, run as a process on small Parquet files."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_weights
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from cbsa_hf import load_checkpoint


# With everything that is random or has a state: Mixup, stochastic depth, an average of the weights.
SETTINGS = {
    "image_size": 32,
    "patch_size": 8,
    "crop_sizes": 24,
    "batch_size": 8,
    "num_workers": 0,
    "warmup_epochs": 0,
    "num_epochs": 8,
    "learning_rate": 1e-2,
    "mixup_alpha": 0.2,
    "drop_path_rate": 0.2,
    "ema_decay": 0.5,
}
NUM_STEPS = 24
STREAMING = ["--streaming=true", "--num_train_images=24", "--mixup_alpha=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Reddish and bluish noise as Parquet, 24 images for training and 7 for validation; and a small configuration."""
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


def command(data: Path, output_dir: Path, *arguments: str, processes: int | None = None) -> list[str]:
    """The command of a run: one process, or Accelerate's launcher if `processes` is given."""
    launcher = []
    if processes is not None:
        # On CPU, two processes start only with `--multi_gpu` and ACCELERATE_USE_CPU: see docs/guides/training.md.
        several = ["--multi_gpu"] if processes > 1 else []
        launcher = ["-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    script = [str(ROOT / "training" / "pretrain.py"), "--dataset_name", str(data), "--output_dir", str(output_dir)]
    return [sys.executable, *launcher, *script, "--config_name", str(data / "config.json"), *settings, *arguments]


def start(command: list[str], **options) -> subprocess.Popen:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def pretrain(data: Path, output_dir: Path, *arguments: str, processes: int | None = None, **options) -> str:
    """Run the script, assert that it succeeds, and return what it prints."""
    process = start(command(data, output_dir, *arguments, processes=processes), **options)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed


def fail(data: Path, output_dir: Path, *arguments: str, **options) -> str:
    """Run the script, assert that it fails without a traceback, and return its one sentence."""
    process = start(command(data, output_dir, *arguments), **options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    (sentence,) = [line for line in errors.splitlines() if line.startswith("pretrain.py: ")]
    return sentence


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    return sorted(int(path.name[-8:]) for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run from beginning to end."""
    output_dir = tmp_path_factory.mktemp("trained")
    pretrain(data, output_dir, "--picture_epochs", "4", processes=1)
    return output_dir


def assert_scored(folder: Path, data: Path) -> dict:
    """
    Assert that the metrics of a run are those of its model on the validation images, each counted once. Return the
    results.
    """
    results = json.loads((folder / "results.json").read_text())
    rows = Dataset.from_parquet(str(data / "validation-00000-of-00001.parquet"))
    model, processor = load_checkpoint(str(folder))
    labels = torch.tensor(rows["kind"][:])
    with torch.no_grad():
        logits = model(**processor(rows["picture"][:], return_tensors="pt")).logits
    assert results["metrics"]["accuracy"] == (logits.argmax(-1) == labels).sum().item() / 7
    assert results["metrics"]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    return results


def test_pretraining_learns(data, trained):
    results = assert_scored(trained, data)
    assert results["best"] >= 6 / 7  # rounding changes the end of so short a run, but not its best
    assert (results["processes"], results["step"]) == (1, NUM_STEPS)
    model, processor = load_checkpoint(str(trained))
    assert model.config.id2label == {0: "red", 1: "blue"}
    assert processor.size == {"height": 32, "width": 32}
    assert processor.do_convert_rgb
    card = (trained / "README.md").read_text()
    assert "--mixup_alpha=0.2" in card
    assert f"value: {round(results['metrics']['accuracy'], 4)}" in card


def test_logs_to_tensorboard(trained):
    (events,) = [path for path in trained.rglob("events.out.*") if path.parent.name == "pretrain"]
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("validation/accuracy")] == list(range(3, NUM_STEPS + 1, 3))
    assert {event.step for event in log.Scalars("train/loss")} >= {10, 20}
    assert [event.step for event in log.Images("validation/attention_0")] == [12, 24]


def test_newest_and_best_checkpoints_are_kept(trained):
    best = json.loads((trained / "results.json").read_text())["best_step"]
    assert checkpoint_steps(trained) == sorted({best, NUM_STEPS - 3, NUM_STEPS})


@pytest.mark.parametrize("writing", [False, True])
def test_killed_runs_resume_exactly(data, trained, tmp_path, writing):
    """The run is killed in the middle of an epoch, between two checkpoints or while one is written."""
    process = start(command(data, tmp_path, "--checkpointing_steps=2", "--keep_checkpoints=100"))
    waited = time.time()
    while not ((tmp_path / "checkpoint-00000004").exists() and any(tmp_path.glob("*.partial")) == writing):
        assert process.poll() is None
        assert time.time() - waited < 300
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert checkpoints_are_complete(tmp_path)
    printed = pretrain(data, tmp_path, "--resume_from_checkpoint", "last")
    assert "Resumed from" in printed
    assert_same_weights(tmp_path, trained)


def checkpoints_are_complete(folder: Path) -> bool:
    """Whether every checkpoint with its final name has all its files."""
    found = list(folder.glob("checkpoint-" + "[0-9]" * 8))
    parts = ("progress.json", "average.safetensors", "model.safetensors", "optimizer.bin", "scheduler.bin")
    return bool(found) and all((path / part).stat().st_size for path in found for part in parts)


@pytest.mark.parametrize(("num_workers", "number"), [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_stopped_run_writes_a_checkpoint(data, trained, tmp_path, num_workers, number):
    """The signal reaches all processes of the run, as on a cluster."""
    arguments = [f"--num_workers={num_workers}", "--checkpointing_steps=1"]
    process = start(command(data, tmp_path, *arguments), start_new_session=True)
    wait_for(tmp_path, "checkpoint-00000001")
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    step = checkpoint_steps(tmp_path)[-1]
    assert f"Stopped at step {step};" in printed
    assert 0 < step < NUM_STEPS
    pretrain(data, tmp_path, "--resume_from_checkpoint", "last")
    assert_same_weights(tmp_path, trained)


def wait_for(folder: Path, pattern: str):
    """Wait until a run has created a file or folder with such a name."""
    waited = time.time()
    while not list(folder.rglob(pattern)):
        assert time.time() - waited < 300
        time.sleep(0.01)


def test_no_process_outlives_a_terminated_launcher(data, tmp_path):
    launcher = start(command(data, tmp_path, "--num_epochs=100000", processes=1))
    wait_for(tmp_path, "events.out.*")
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=300)  # returns when the last process that holds its pipes has ended
    assert launcher.returncode == -signal.SIGTERM  # 143 in a shell
    assert checkpoint_steps(tmp_path)


LAUNCHED = """
import os, pathlib, sys, time

launcher = os.getppid()
pathlib.Path(sys.argv[1]).touch()
while sys.argv[2] != "0" and os.getppid() == launcher:
    time.sleep(0.01)
sys.exit(143)
"""
LAUNCHES = """
import os, signal, sys, time
from pathlib import Path

from accelerate.commands import launch

script = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in this process
for processes in (1, 2):
    for number in (0, signal.SIGINT, signal.SIGTERM):
        started = script.with_name(f"{processes}-{number:d}")
        options = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        options += ["--multi_gpu", "--main_process_port=0"] if processes > 1 else []
        sys.argv = ["accelerate", f"--num_processes={processes}", *options, str(script), str(started), f"{number:d}"]
        if not (pid := os.fork()):
            launch.main()
            sys.exit()
        while number and not started.exists():
            time.sleep(0.01)
        if number:
            os.kill(pid, number)
        print(processes, f"{number:d}", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_exit_status_of_the_launcher(tmp_path):
    """The statuses in the guide: 1 if the script fails; after a signal, it depends on the number of processes."""
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    process = start([sys.executable, "-c", LAUNCHES, str(script)])
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    statuses = {tuple(map(int, line.split()[:2])): int(line.split()[2]) for line in printed.splitlines()}
    expected = {(1, 0): 1, (2, 0): 1}
    for number in (signal.SIGINT, signal.SIGTERM):
        expected |= {(1, number): -number, (2, number): 1}  # -number is 128 + number in a shell
    assert statuses == expected


def test_two_processes_learn_as_one(data, tmp_path):
    """With a stem without batch norm, the losses are the same. Each validation image counts once."""
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = ["--patch_embedding_type=patchify", "--drop_path_rate=0", "--num_epochs=4", "--learning_rate=3e-3"]
        arguments += ["--checkpointing_steps=1", "--keep_checkpoints=1"]
        pretrain(data, folder, *arguments, processes=processes)
        results = assert_scored(folder, data)
        assert (results["processes"], results["step"]) == (processes, 12)
        (events,) = [path for path in folder.rglob("events.out.*") if path.parent.name == "pretrain"]
        losses.append([event.value for event in EventAccumulator(str(events)).Reload().Scalars("train/loss")])
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_two_processes_read_a_stream(data, tmp_path):
    """Each process reads its own files. A run resumed in the middle of an epoch ends with the same weights."""
    folder, whole, resumed = tmp_path / "data", tmp_path / "whole", tmp_path / "resumed"
    folder.mkdir()
    for name in ("validation-00000-of-00001.parquet", "config.json"):
        (folder / name).symlink_to(data / name)
    rows = Dataset.from_parquet(str(data / "train-00000-of-00001.parquet"))
    for shard, part in enumerate((range(10), range(10, 24))):
        rows.select(part).to_parquet(folder / f"train-0000{shard}-of-00002.parquet")
    arguments = [*STREAMING, "--num_epochs=3", "--num_workers=1"]
    pretrain(folder, whole, *arguments, "--checkpointing_steps=4", "--keep_checkpoints=9", processes=2)
    results = assert_scored(whole, data)
    assert (results["processes"], results["step"]) == (2, 9)
    arguments.append(f"--resume_from_checkpoint={whole / 'checkpoint-00000004'}")
    assert "4 of 9 steps done" in pretrain(folder, resumed, *arguments, processes=2)
    assert_same_weights(resumed, whole)


def test_throughput_table(data):
    """The printed share follows from the printed speeds, and the share of time spent waiting is below one."""
    script = str(ROOT / "benchmarks" / "training_throughput.py")
    settings = ["--config_name", str(data / "config.json"), "--image_size=32", "--batch_size=4", "--turns=1"]
    process = start([sys.executable, script, "--dataset_name", str(data), *settings, "--steps=2"])
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    training, bare = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[-2:])
    share, waited = (float(cell.rstrip("%")) / 100 for cell in training[2:])
    assert share == pytest.approx(float(training[1]) / float(bare[1]), abs=0.01)
    assert 0 <= waited < 1


@pytest.mark.parametrize(
    ("arguments", "num_steps"),
    # The stream has few epochs, since `datasets` waits for five seconds at the end of each.
    [
        ([*STREAMING, "--num_workers=1", "--num_epochs=4"], 12),
        (["--optimizer=lion", "--learning_rate=1e-3"], NUM_STEPS),
    ],
    ids=["stream", "lion"],
)
def test_learns_and_resumes_exactly(data, tmp_path, arguments, num_steps):
    """The run is resumed in the middle of an epoch."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pretrain(data, whole, *arguments, "--checkpointing_steps=4", "--keep_checkpoints=100")
    assert assert_scored(whole, data)["step"] == num_steps
    printed = pretrain(data, resumed, *arguments, f"--resume_from_checkpoint={whole / 'checkpoint-00000004'}")
    assert f"4 of {num_steps} steps done" in printed
    assert_same_weights(resumed, whole)


def test_gradient_accumulation_changes_nothing(data, tmp_path):
    losses = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        arguments = ["--patch_embedding_type=patchify", "--drop_path_rate=0", "--num_epochs=2", "--learning_rate=3e-3"]
        pretrain(data, folder, *arguments, f"--gradient_accumulation_steps={parts}")
        losses.append(json.loads((folder / "results.json").read_text())["metrics"]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_full_disk_keeps_earlier_checkpoints(data, tmp_path):
    """If a checkpoint cannot be written, the run ends, and the checkpoints before it stay."""
    pretrain(data, tmp_path, "--num_epochs=1")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    sentence = fail(data, tmp_path, "--resume_from_checkpoint=last", "--report_to=none", preexec_fn=limit)
    assert "checkpoint-00000006 cannot be written" in sentence
    assert "checkpoint-00000003 is the newest whole one" in sentence
    assert checkpoint_steps(tmp_path) == [3]


def test_corrupt_images_are_skipped(data, tmp_path):
    rows = Dataset.from_parquet(str(data / "train-00000-of-00001.parquet")).cast_column("picture", Image(decode=False))
    table = rows.to_dict()
    for index in (3, 7):
        table["picture"][index]["bytes"] = table["picture"][index]["bytes"][:60]
    folder = tmp_path / "data"
    folder.mkdir()
    features = Features({"picture": Image(), "kind": ClassLabel(names=["red", "blue"])})
    Dataset.from_dict(table, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    for name in ("validation-00000-of-00001.parquet", "config.json"):
        (folder / name).symlink_to(data / name)
    process = start(command(folder, tmp_path / "run", "--num_epochs=2"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("Skipped image 3,") == errors.count("Skipped image 7,") == 1
    sentence = fail(folder, tmp_path / "stopped", "--num_epochs=2", "--max_corrupt=1", "--num_workers=1")
    assert "2 of the images cannot be read (the log names them), more than `--max_corrupt 1`" in sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "nobody/nothing"], "nobody/nothing is neither a folder or Parquet file with images, nor"),
        (["--config_name", "cbt-huge"], "`--config_name cbt-huge` is neither one of cbt-base"),
        (["--patch_size", "12"], "`patch_size` is 12, and has to be a power of two"),
        (["--streaming", "true"], "`--mixup_alpha` needs any image at any time, which `--streaming` does not give"),
        (["--streaming", "true", "--mixup_alpha", "0"], "does not say how many images it has: give `--num_train_"),
        ([*STREAMING, "--num_train_images", "30"], "has 24 images, not 30: see `--num_train_images`"),
        (["--learning_rate", "1e30"], "at step 3; lower `--learning_rate`"),
        (["--train_split", "training"], "has no split 'training'; it has train, validation"),
        (["--image_column", "photo"], "has no column 'photo'; it has picture, kind"),
        (["--label_column", "picture"], "needs a column of images, of type `Image` or `Array3D`, and one of classes"),
        (["--batch_size", "32"], "24 training images are less than one batch of 32"),
        (["--num_epochs", "0"], "`--num_epochs` is 0, and has to be at least 1"),
        (["--gradient_accumulation_steps", "3"], "`--batch_size 8` is not a multiple of 3"),
        (["--resume_from_checkpoint", "last"], "There is no checkpoint in"),
        (
            ["--lerning_rate", "1"],
            "names `lerning_rate`, which the script does not know; did you mean `learning_",
        ),
        (["--teacher", "nobody/nothing"], "The teacher nobody/nothing is neither `efficientnet-lite0`"),
    ],
)
def test_bad_input_is_one_sentence(data, refusal, tmp_path, arguments, message):
    # A copy, since `datasets` remembers the number of images in a folder.
    data = shutil.copytree(data, tmp_path / "data")
    _, script, *settings = command(data, tmp_path / "run", *arguments)
    sentence = refusal(Path(script).name, *settings)
    assert sentence.startswith("pretrain.py: ")
    assert message in sentence
    assert "\n" not in sentence
    assert not list(tmp_path.rglob("*.safetensors"))
