"""After a fault, a training run keeps its checkpoints, and ends with the same weights once it is resumed."""

import errno
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import MakesFolder, assert_same_weights, rewrite_json
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from training.data.labelled_images import LabelledImages
from training.data.loading import load_images
from training.data.segmentation import SegmentationDataset, check_masks
from training.data.streaming import StreamedRows
from training.engine import interruption, loop, output, results, run_state, setup
from training.engine.interruption import exit_with_a_sentence
from training.engine.run_state import DamagedCheckpoint, DataIdentity, check_sums, write_sums
from training.tasks import classification, distillation


SETTINGS = {
    "num_epochs": 3,
    "checkpointing_steps": 1,
    "keep_checkpoints": 9,
    "ema_decay": 0.5,
}  # two steps each
RESUMED = {**SETTINGS, "resume_from_checkpoint": "last"}


def assert_same_results(folder: Path, expected: Path):
    assert_same_weights(folder, expected)
    found, results = (json.loads((path / "results.json").read_text()) for path in (folder, expected))
    for name in ("metrics", "best", "best_step", "step", "validated_step"):
        assert found[name] == results[name]


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def break_image(file: Path, index: int):
    rows = Dataset.from_parquet(str(file))
    encoded = rows.cast_column("image", Image(decode=False))["image"][:]
    encoded[index]["bytes"] = encoded[index]["bytes"][:60]
    Dataset.from_dict({"image": encoded, "label": rows["label"][:]}, features=rows.features).to_parquet(file)


@pytest.fixture
def whole(start, tmp_path):
    """The output folder of a run without any fault."""
    start(tmp_path / "whole", **SETTINGS)
    return tmp_path / "whole"


class TestValidation:
    def test_failed_validation_is_repeated(self, start, tmp_path, whole):
        """After the data are repaired, the resumed run repeats the validation and has the same results."""
        file = tmp_path / "data" / "validation-00000-of-00001.parquet"
        sound = file.read_bytes()
        break_image(file, 3)
        settings = {**SETTINGS, "checkpointing_steps": None, "max_corrupt": 0}
        with pytest.raises(ValueError, match="1 of the images cannot be read"):
            start(tmp_path / "run", **settings)
        assert checkpoint_names(tmp_path / "run") == ["checkpoint-00000002"]
        assert not (tmp_path / "run" / "checkpoint-00000002" / "validation.json").exists()
        file.write_bytes(sound)
        start(tmp_path / "run", **settings, resume_from_checkpoint="last")
        assert_same_results(tmp_path / "run", whole)

    def test_validation_that_gives_nan_removes_no_checkpoint(self, start, tmp_path, monkeypatch):
        """The checkpoints before the failed validation stay, whatever `--keep_checkpoints` says."""
        values = [0.5, float("nan")]
        monkeypatch.setattr(classification, "evaluate_classifier", lambda *_: {"accuracy": values.pop(0), "loss": 1.0})
        with pytest.raises(ValueError, match="The accuracy is nan at step 4"):
            start(tmp_path / "run", num_epochs=3, keep_checkpoints=1)
        assert checkpoint_names(tmp_path / "run") == ["checkpoint-00000002", "checkpoint-00000004"]

    def test_stop_before_a_validation(self, start, tmp_path, whole, monkeypatch):
        """A stop during the last step of an epoch writes its checkpoint before the validation."""
        take_step, stops = loop.take_step, []

        def step_and_stop(*arguments):
            losses = take_step(*arguments)
            stops.append(len(stops))
            if len(stops) == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return losses

        monkeypatch.setattr(loop, "take_step", step_and_stop)
        settings = {**SETTINGS, "checkpointing_steps": None}
        with pytest.raises(SystemExit) as ending:
            start(tmp_path / "run", **settings)
        assert ending.value.code == 130
        assert checkpoint_names(tmp_path / "run") == ["checkpoint-00000002", "checkpoint-00000004"]
        assert not (tmp_path / "run" / "checkpoint-00000004" / "validation.json").exists()
        start(tmp_path / "run", **settings, resume_from_checkpoint="last")
        assert_same_results(tmp_path / "run", whole)

    def test_killed_before_old_checkpoints_are_removed(self, start, tmp_path, monkeypatch):
        """The resumed run has no step left to do, and removes the old checkpoints."""
        settings = {**SETTINGS, "keep_checkpoints": 1}
        start(tmp_path / "whole", **settings)
        prune = loop.prune_checkpoints

        def kill(folder, progress, keep):
            if progress.validated_step == 6:
                raise SystemExit(137)
            prune(folder, progress, keep)

        with monkeypatch.context() as patches:
            patches.setattr(loop, "prune_checkpoints", kill)
            with pytest.raises(SystemExit):
                start(tmp_path / "run", **settings)
        assert checkpoint_names(tmp_path / "run") != checkpoint_names(tmp_path / "whole")
        start(tmp_path / "run", **settings, resume_from_checkpoint="last")
        assert checkpoint_names(tmp_path / "run") == checkpoint_names(tmp_path / "whole")
        assert_same_results(tmp_path / "run", tmp_path / "whole")

    def test_killed_while_a_validation_is_recorded(self, whole):
        """A checkpoint without its last checksum is complete; a wrong checksum means damage."""
        checkpoint = whole / "checkpoint-00000006"
        sums = (checkpoint / "SHA256SUMS").read_text()
        assert sums.splitlines()[-1].endswith("  validation.json")
        (checkpoint / "SHA256SUMS").write_text("".join(sums.splitlines(keepends=True)[:-1]))
        check_sums(checkpoint)
        assert run_state.read_progress(checkpoint).validated_step == 6
        (checkpoint / "SHA256SUMS").write_text(sums)
        (checkpoint / "validation.json").write_text("{}")
        with pytest.raises(DamagedCheckpoint, match=r"its validation\.json is not what was written"):
            check_sums(checkpoint)


def test_weights_that_are_not_finite_are_not_saved(start, tmp_path, monkeypatch):
    take_step = loop.take_step

    def step_too_far(args, accelerator, task, *others):
        losses = take_step(args, accelerator, task, *others)
        with torch.no_grad():
            task.model.classifier.weight[0, 0] = float("inf")
        return losses

    monkeypatch.setattr(loop, "take_step", step_too_far)
    with pytest.raises(ValueError, match=r"The largest weight of model\.classifier\.weight is inf at step 1"):
        start(tmp_path / "run", **SETTINGS)
    assert checkpoint_names(tmp_path / "run") == []


class TestDamage:
    FILES = ["model.safetensors", "average.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"]
    FILES += ["progress.json", "validation.json", "data.json", "SHA256SUMS"]

    def assert_damaged(self, checkpoint: Path, message: str = "its "):
        with pytest.raises(DamagedCheckpoint, match=message):
            check_sums(checkpoint)

    def test_damage_to_any_file_is_found(self, whole):
        """Any damage to any file is found before the file is loaded."""
        newest = whole / "checkpoint-00000006"
        assert sorted(path.name for path in newest.iterdir()) == sorted(self.FILES)
        assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=newest).returncode == 0
        for name in self.FILES:
            file = newest / name
            sound = file.read_bytes()
            damages = [b"", sound[: len(sound) // 2], os.urandom(50), sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:]]
            for damage in damages:
                file.write_bytes(damage)
                self.assert_damaged(newest)
            if name != "SHA256SUMS":  # without it the checkpoint is one of version 0.1
                message = f"its {name} is not what was written"
                file.unlink()
                self.assert_damaged(newest, message)
                file.mkdir()
                self.assert_damaged(newest, message)
                file.rmdir()
                os.mkfifo(file)
                self.assert_damaged(newest, message)
                file.unlink()
            file.write_bytes(sound)
            check_sums(newest)

    @pytest.mark.parametrize("case", ["empty", "noise", "hostile", "hostile, no sums", "step", "step, no sums", "two"])
    def test_newest_undamaged_checkpoint_is_resumed(self, start, whole, tmp_path, caplog, case):
        """The run resumes to the same weights; damaged checkpoints are named in the log and renamed."""
        run = shutil.copytree(whole, tmp_path / "run")
        for path in run.glob("*.*"):
            if path.is_file():
                path.unlink()
        newest, expected = run / "checkpoint-00000006", ["checkpoint-00000006"]
        attack = pickle.dumps(MakesFolder(tmp_path / "attacked"))
        if case == "empty":
            (newest / "optimizer.bin").write_bytes(b"")
        elif case == "noise":
            (newest / "model.safetensors").write_bytes(os.urandom(200))
        elif case.startswith("hostile"):
            (newest / "optimizer.bin").write_bytes(attack)
        elif case.startswith("step"):
            rewrite_json(newest / "validation.json", step=600)
        else:
            (newest / "scheduler.bin").unlink()
            shutil.rmtree(run / "checkpoint-00000005")
            (run / "checkpoint-00000005").mkdir()
            expected.append("checkpoint-00000005")
        if case.endswith("no sums"):
            (newest / "SHA256SUMS").unlink()
        elif case in ("hostile", "step"):
            write_sums(newest)  # an attacker could write these, too
        start(run, **RESUMED)
        assert not (tmp_path / "attacked").exists()
        for name in expected:
            assert f"{run / name} is damaged and now called {name}.damaged: " in caplog.text
            assert (run / f"{name}.damaged").is_dir()
        assert_same_results(run, whole)

    def test_no_undamaged_checkpoint_raises(self, start, whole):
        for checkpoint in whole.glob("checkpoint-*"):
            (checkpoint / "optimizer.bin").write_bytes(b"")
        with pytest.raises(ValueError) as error:
            start(whole, **RESUMED)
        assert f"No checkpoint in {whole} is whole (checkpoint-00000006: its optimizer.bin is not" in str(error.value)
        assert checkpoint_names(whole) == [f"checkpoint-0000000{step}" for step in range(1, 7)]

    def test_damaged_checkpoint_given_by_name_raises(self, start, whole, tmp_path):
        named = whole / "checkpoint-00000004"
        (named / "optimizer.bin").write_bytes(b"")
        with pytest.raises(ValueError) as error:
            start(tmp_path / "new", **{**SETTINGS, "resume_from_checkpoint": str(named)})
        assert f"{named} is damaged or not of this run: its optimizer.bin is not what was" in str(error.value)

    def test_checkpoint_of_another_model_raises(self, start, whole):
        """A checkpoint of another model is not damaged, so it is not renamed."""
        with pytest.raises(ValueError, match=r"checkpoint-00000006 is of another model or other settings: .*size"):
            start(whole, **RESUMED, image_size=64)
        assert checkpoint_names(whole) == [f"checkpoint-0000000{step}" for step in range(1, 7)]

    def test_checkpoints_of_version_0_1(self, start, whole, tmp_path):
        """These checkpoints have no checksums, and no record of their data and of their validation."""
        run = tmp_path / "run"
        shutil.copytree(whole / "checkpoint-00000003", run / "checkpoint-00000003")
        (old,) = run.iterdir()
        progress = json.loads((old / "progress.json").read_text())
        del progress["validated_step"]
        (old / "progress.json").write_text(json.dumps(progress))
        for name in ("SHA256SUMS", "data.json"):
            (old / name).unlink()
        start(run, **RESUMED)
        assert_same_results(run, whole)

    def test_damaged_best_checkpoint_raises(self, start, tmp_path, monkeypatch):
        values = [0.5, 0.25]
        monkeypatch.setattr(classification, "evaluate_classifier", lambda *_: {"accuracy": values.pop(0), "loss": 1.0})
        run = tmp_path / "run"
        prune = loop.prune_checkpoints

        def prune_and_damage(*arguments):
            prune(*arguments)
            (run / "checkpoint-00000002" / "model.safetensors").write_bytes(b"")

        monkeypatch.setattr(loop, "prune_checkpoints", prune_and_damage)
        with pytest.raises(ValueError, match=r"The best checkpoint, .*checkpoint-00000002, is damaged \(its model"):
            start(run, num_epochs=2, keep_best=True)
        start(run, num_epochs=2, keep_best=False, resume_from_checkpoint="last")
        assert json.loads((run / "results.json").read_text())["step"] == 4


class TestOtherData:
    def test_another_batch_size_raises(self, start, whole):
        with pytest.raises(ValueError, match=r"was trained with `--batch_size 4`, not 8`?: resume with what it began"):
            start(whole, **RESUMED, batch_size=8)

    def test_another_data_set_raises(self, start, whole, tmp_path, labelled):
        file = tmp_path / "data" / "train-00000-of-00001.parquet"
        sound = file.read_bytes()
        labelled.select([*range(8), 0, 1, 2, 3]).to_parquet(file)
        with pytest.raises(ValueError, match="was trained with 8 training images, not 12: resume with what it began"):
            start(whole, **RESUMED)
        others = [PILImage.new("RGB", (40, 40), (30 * i, 0, 0)) for i in range(8)]
        Dataset.from_dict({"image": others, "label": [0, 1] * 4}, features=labelled.features).to_parquet(file)
        with pytest.raises(ValueError, match="was trained on other images: resume with those it began with"):
            start(whole, **RESUMED)
        file.write_bytes(sound)
        break_image(file, 2)  # as if it had been repaired
        start(whole, **RESUMED)

    def test_checkpoint_beyond_the_last_step_raises(self, start, whole):
        with pytest.raises(ValueError, match="checkpoint-00000006 is at step 6, and this run has 4: give a larger"):
            start(whole, **{**RESUMED, "num_epochs": 2})

    def test_half_of_the_images_have_to_agree(self, tmp_path):
        before = DataIdentity(4, 8, [1, 2, 3, 4])
        DataIdentity(4, 8, [1, 2, 0, 0]).check(before, tmp_path)
        with pytest.raises(ValueError, match="other images"):
            DataIdentity(4, 8, [1, 0, 0, 0]).check(before, tmp_path)

    def test_number_of_processes_has_to_agree(self, tmp_path):
        DataIdentity(4, 8, [1], 2).check(DataIdentity(4, 8, [1]), tmp_path)  # version 0.1 did not say
        with pytest.raises(ValueError, match="was trained with a stream read by 2 processes, not 1: resume with what"):
            DataIdentity(4, 8, [1], 1).check(DataIdentity(4, 8, [1], 2), tmp_path)


class TestOutput:
    @pytest.fixture
    def nothing_is_loaded(self, monkeypatch):
        """Let the test fail if a run loads images."""
        monkeypatch.setattr(setup, "load_images", lambda *_: pytest.fail("something was loaded"))

    def test_file_in_place_of_the_folder_raises(self, start, tmp_path, nothing_is_loaded):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match="file is a file; choose a folder as `--output_dir`"):
            start(tmp_path / "file")
        with pytest.raises(ValueError, match=r"run cannot be written \(Not a directory\); choose another `--out"):
            start(tmp_path / "file" / "run")
        assert (tmp_path / "file").read_text() == "x"

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder is unwritable for everybody")
    def test_unwritable_folder_raises(self, start, nothing_is_loaded):
        with pytest.raises(ValueError, match=r"/proc/run cannot be written \(.*\); choose another `--output_dir`"):
            start(Path("/proc/run"))

    def test_too_little_room_raises(self, start, tmp_path, monkeypatch):
        """Two checkpoints need room, and existing ones count as room. The check comes before any data is loaded."""
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage(0, 0, 10_000))
        with pytest.raises(ValueError, match=r"run has 0\.0 MB left, and this run needs 0\.\d MB for two checkp"):
            start(tmp_path / "run", **{**SETTINGS, "dataset_name": "nowhere"})
        assert checkpoint_names(tmp_path / "run") == []

        config = json.loads((tmp_path / "data" / "config.json").read_text())
        (tmp_path / "wide.json").write_text(json.dumps(config | {"hidden_size": 96}))
        settings, rooms = {**SETTINGS, "config_name": str(tmp_path / "wide.json")}, []
        monkeypatch.setattr(setup, "check_free", lambda folder, num_bytes: rooms.append(num_bytes))
        start(tmp_path / "run", **settings)
        sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in (tmp_path / "run").glob("check*")]
        assert rooms == [pytest.approx(2 * max(sizes), rel=0.1)]
        start(tmp_path / "run", **settings, resume_from_checkpoint="last")
        assert rooms[1] == rooms[0] / 2

    def test_one_run_at_a_time(self, start, tmp_path, nothing_is_loaded):
        refused = pytest.raises(ValueError, match=r"Another run is at work in .*run: wait until it has ended")
        with output.open_output(tmp_path / "run"), refused:
            start(tmp_path / "run")
        with output.open_output(tmp_path / "run"):
            pass

    def test_lock_ends_with_its_process(self, tmp_path):
        """The lock ends even if child processes, such as data loaders, live on."""
        code = f"""
import os, sys, time
from training.engine.output import open_output
with open_output({str(tmp_path)!r}):
    if not os.fork():
        print(os.getpid(), flush=True)  # the child runs, so it has released the lock
    time.sleep(600)
"""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        child = int(process.stdout.readline())
        try:
            with pytest.raises(ValueError, match="Another run is at work"), output.open_output(tmp_path):
                pass
            process.kill()
            process.wait()
            with output.open_output(tmp_path):
                os.kill(child, 0)  # the child is alive
        finally:
            os.kill(child, signal.SIGKILL)
            process.stdout.close()

    def test_only_the_main_process_locks(self, tmp_path, monkeypatch):
        class Second:
            is_main_process = False

        monkeypatch.setattr(setup, "build_accelerator", lambda _: Second())
        arguments = type("Arguments", (), {"output_dir": str(tmp_path)})
        with output.open_output(tmp_path), setup.start_run(arguments) as accelerator:
            assert accelerator.is_main_process is False


@contextmanager
def full_disk(room: int):
    """Simulate a full disk: no file of this process can grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    def test_file_is_complete_or_unchanged(self, tmp_path):
        file = tmp_path / "file"
        for before in (None, "before"):
            with full_disk(10), pytest.raises(OSError) as error:
                output.write_file(file, "x" * 100)
            assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(file))
            assert (file.read_text() if file.exists() else None) == before
            file.write_text("before")
        output.write_file(file, "after")
        assert file.read_text() == "after"
        assert list(tmp_path.iterdir()) == [file]

    def test_full_disk_at_the_result(self, start, tmp_path, monkeypatch):
        """The result is complete or absent, and the checkpoint holds the training."""
        write_card, run = results.write_card, tmp_path / "run"

        def write_too_much(folder, *arguments):
            with full_disk(10):
                write_card(folder, *arguments)

        monkeypatch.setattr(results, "write_card", write_too_much)
        with pytest.raises(ValueError, match=r"The result cannot be written to .*run \(.*File too large.*\); make"):
            start(run)
        assert sorted(path.name for path in run.iterdir()) == [".lock", "checkpoint-00000002", "log.csv", "log.jsonl"]
        monkeypatch.setattr(results, "write_card", write_card)
        start(run, resume_from_checkpoint="last")
        assert json.loads((run / "results.json").read_text())["step"] == 2
        assert not (run / "results.partial").exists()

    def test_full_disk_at_a_validation(self, start, tmp_path, monkeypatch):
        record = loop.record_validation

        def record_too_much(*arguments):
            with full_disk(10):
                record(*arguments)

        monkeypatch.setattr(loop, "record_validation", record_too_much)
        with pytest.raises(ValueError, match=r"checkpoint-00000002/validation\.json cannot be written: File too l"):
            start(tmp_path / "run")
        monkeypatch.setattr(loop, "record_validation", record)
        start(tmp_path / "run", resume_from_checkpoint="last")

    def test_full_disk_at_the_start_of_the_log(self, start, tmp_path, monkeypatch, capfd):
        """The run ends with one sentence, and leaves no empty file but the lock."""
        begin = Accelerator.init_trackers

        def begin_on_a_full_disk(*arguments, **options):
            with full_disk(0):
                begin(*arguments, **options)

        monkeypatch.setattr(Accelerator, "init_trackers", begin_on_a_full_disk)
        with pytest.raises(SystemExit) as ending, exit_with_a_sentence():
            start(tmp_path / "run", report_to="tensorboard")
        assert re.search(r"The log in .*run/.* cannot be written \(File too large\); make room", ending.value.code)
        assert "Traceback" not in capfd.readouterr().err
        assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == [".lock"]

    def test_full_disk_at_the_log(self, start, tmp_path, whole, monkeypatch):
        """The run saves a checkpoint and ends. The resumed run has the same results."""
        log = Accelerator.log

        def log_on_a_full_disk(accelerator, values, step):
            if step == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            log(accelerator, values, step=step)

        with monkeypatch.context() as patches:
            patches.setattr(Accelerator, "log", log_on_a_full_disk)
            with pytest.raises(ValueError, match=r"The log in .* cannot be written .* goes on from step 3"):
                start(tmp_path / "run", **SETTINGS)
        assert checkpoint_names(tmp_path / "run")[-1] == "checkpoint-00000003"
        start(tmp_path / "run", **RESUMED)
        assert_same_results(tmp_path / "run", whole)

    def test_full_disk_at_the_end_of_the_log(self, start, tmp_path, monkeypatch):
        """The results are complete."""
        end = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        monkeypatch.setattr(Accelerator, "end_training", end)
        with pytest.raises(ValueError, match=r"The log in .* cannot be written \(No space left on device\)"):
            start(tmp_path / "run")
        assert (tmp_path / "run" / "results.json").exists()

    def test_full_disk_at_the_targets_of_a_teacher(self, start, tmp_path, vit, monkeypatch):
        """No part of the targets is left, and the next run works."""
        settings = {"teacher": str(vit[1]), "teacher_cache": str(tmp_path / "targets")}
        write = distillation.write_arrays

        def write_on_a_full_disk(*arguments):
            with full_disk(150):  # the header of a file takes 128 bytes
                write(*arguments)

        with monkeypatch.context() as patches:
            patches.setattr(distillation, "write_arrays", write_on_a_full_disk)
            with pytest.raises(OSError) as error:
                start(tmp_path / "run", **settings)
        assert (error.value.errno, error.value.filename) == (errno.EFBIG, settings["teacher_cache"])
        assert not list(tmp_path.glob("targets*"))

        usage = namedtuple("usage", "total used free")
        with monkeypatch.context() as patches:
            patches.setattr(
                output.shutil,
                "disk_usage",
                lambda folder: usage(0, 0, 99 if folder.name.startswith("targets") else 10**9),
            )
            with pytest.raises(
                ValueError, match=r"needs 0\.0 MB for the teacher's targets: make room, or choose another"
            ):
                start(tmp_path / "run", **settings)
        assert not list(tmp_path.glob("targets*"))
        start(tmp_path / "run", **settings)

    def test_partial_results_of_an_earlier_run_are_removed(self, start, tmp_path):
        run = tmp_path / "run"
        (run / "results.partial").mkdir(parents=True)
        (run / "results.json.partial").write_text("{")
        start(run)
        assert not list(run.glob("*.partial"))


def test_checkpoint_is_synced_before_it_is_renamed(start, tmp_path, monkeypatch):
    """Before the renaming, all files and the folder are synced to the disk; after it, the parent folder."""
    run, events = tmp_path / "run", []
    fsync, rename = os.fsync, Path.rename

    def watch_fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watch_rename(path, target):
        files = {str(file) for file in path.rglob("*")}
        events.append(("rename", str(path), files))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch_rename)
    start(run)
    (position,) = [i for i, event in enumerate(events) if event[0] == "rename"]
    _, partial, files = events[position]
    synced = {path for _, path in events[:position]}
    sums = f"{partial}/SHA256SUMS"
    assert len(files) >= 7
    assert files - {sums} <= synced
    assert {f"{sums}.partial", partial} <= synced
    assert ("sync", str(run)) in events[position:]


class TestWorkers:
    @pytest.mark.parametrize("where", ["training", "validation"])
    def test_killed_worker_ends_the_run(self, start, tmp_path, monkeypatch, where):
        """The run ends with one sentence."""
        others = set(multiprocessing.active_children())
        function = {"training": "take_step", "validation": "evaluate_classifier"}[where]
        module = {"training": loop, "validation": classification}[where]
        run, killed = getattr(module, function), []

        def kill(*arguments):
            if not killed:
                batches = interruption.read_batches
                monkeypatch.setattr(
                    "training.evaluation.scores.read_batches", lambda loader: kill_all(batches(loader))
                )
                if where == "training":
                    kill_workers()
            return run(*arguments)

        def kill_all(batches):
            for batch in batches:
                kill_workers()
                yield batch

        def kill_workers():
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
                worker.join()
                killed.append(worker)

        monkeypatch.setattr(module, function, kill)
        settings = {**SETTINGS, "checkpointing_steps": None, "batch_size": 4, "num_workers": 1}
        with pytest.raises(
            ValueError, match="A process that loads images was killed, as happens where memory"
        ) as error:
            start(tmp_path / "run", **settings)
        assert len(str(error.value).splitlines()) == 1
        assert killed
        monkeypatch.undo()

    def test_unreadable_images_end_the_run(self, start, tmp_path, monkeypatch):
        """If images cannot be read in the second epoch, the run ends and says from which step it goes on."""
        set_epoch = LabelledImages.set_epoch
        file = tmp_path / "data" / "train-00000-of-00001.parquet"

        def break_all(images, epoch):
            set_epoch(images, epoch)
            if epoch == 1:
                images.corrupt[:] = True

        monkeypatch.setattr(LabelledImages, "set_epoch", break_all)
        break_image(file, 0)
        settings = {**SETTINGS, "checkpointing_steps": None, "max_corrupt": 7}
        with pytest.raises(ValueError, match=r"8 of the images cannot be read .* goes on from step [23]"):
            start(tmp_path / "run", **settings)


class TestScripts:
    @pytest.mark.parametrize(
        ("error", "ending"),
        [
            (ValueError("first\n second"), "script.py: first second"),
            (
                OSError(errno.ENOSPC, "No space left on device", "/log"),
                "script.py: /log cannot be written: No space left on device.",
            ),
            (KeyboardInterrupt(), 130),
        ],
    )
    def test_errors_of_users_are_one_sentence(self, monkeypatch, error, ending):
        monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
        with pytest.raises(SystemExit) as ended, exit_with_a_sentence():
            raise error
        assert ended.value.code == ending

    def test_other_errors_keep_their_traceback(self):
        with pytest.raises(PermissionError), exit_with_a_sentence():
            raise PermissionError(errno.EACCES, "Permission denied", "/log")

    def test_threads_get_a_turn_before_the_interpreter_ends(self, monkeypatch):
        """Otherwise a process could wait for ever for a thread that waits for the interpreter's lock."""
        monkeypatch.setenv("WORLD_SIZE", "2")
        waiting, done = threading.Lock(), []
        thread = threading.Thread(target=lambda: (waiting.acquire(), done.append(True)))
        waiting.acquire()
        thread.start()
        before = sys.getswitchinterval()
        sys.setswitchinterval(100)  # seconds, so other threads run only if this one releases the lock
        try:
            with exit_with_a_sentence():
                waiting.release()
            assert done
        finally:
            sys.setswitchinterval(before)
            thread.join()


class TestLabels:
    """Labels are checked before the first step."""

    def write(self, folder: Path, split: str, labels: list, images: list | None = None):
        """Write a split with labels that `ClassLabel` would not accept, and with any encoded images."""
        file = folder / f"{split}-00000-of-00001.parquet"
        table = pq.read_table(file)
        image, label = table.schema
        images = table.column(0) if images is None else pa.array(images, image.type)
        pq.write_table(pa.table([images, pa.array(labels, label.type)], schema=table.schema), file)

    def encoded(self, rows: Dataset) -> list[dict]:
        return rows.cast_column("image", Image(decode=False))["image"][:]

    def broken(self, rows: Dataset) -> list[dict]:
        return [{"bytes": image["bytes"][:60], "path": None} for image in self.encoded(rows)]

    @pytest.mark.parametrize("split", ["train", "validation"])
    @pytest.mark.parametrize(("label", "given"), [(-1, "the label -1"), (-100, "the label -100"), (None, "no label")])
    def test_label_of_no_class_raises(self, start, tmp_path, split, label, given):
        self.write(tmp_path / "data", split, [0, 1, 0, label, 0, 1, 0, label])
        with pytest.raises(ValueError) as error:
            start(tmp_path / "run", mixup_alpha=0.2)
        expected = f"Image 3 of the split {split!r} (and 1 more) has {given}; the data set names the classes 0 to 1."
        assert str(error.value) == expected
        assert checkpoint_names(tmp_path / "run") == []

    def test_label_beyond_the_classes_raises(self, start, tmp_path):
        self.write(tmp_path / "data", "train", [0, 1, 0, 2, 0, 1, 0, 1])
        with pytest.raises(ValueError, match="Image 3 of the split 'train' has the label 2; the data set names"):
            start(tmp_path / "run")

    def test_class_without_an_image_is_logged(self, start, tmp_path, caplog):
        self.write(tmp_path / "data", "validation", [0] * 8)
        start(tmp_path / "run")
        assert "No image of the split 'validation' is of the class 'b'." in caplog.text
        assert "No image of the split 'train'" not in caplog.text

    @pytest.mark.parametrize(("label", "given"), [(-1, "the label -1"), (None, "no label")])
    def test_bad_label_of_a_stream_raises(self, start, labelled, tmp_path, label, given):
        """A wrong label of a stream ends the run at its row, with the name of the image."""
        images = [{"bytes": image["bytes"], "path": f"{i}.png"} for i, image in enumerate(self.encoded(labelled))]
        self.write(tmp_path / "data", "train", [0, 1, 0, 1, 0, label, 0, 1], images)
        with pytest.raises(ValueError, match=rf"Image \d of this epoch \(5\.png\) has {given}"):
            start(tmp_path / "run", streaming=True, num_train_images=8, batch_size=2)

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_damaged_file_of_a_stream_raises(self, start, tmp_path, split):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        content = bytearray(path.read_bytes())
        content[8:200] = bytes(192)  # overwrites rows; the schema is at the end of the file
        path.write_bytes(content)
        with pytest.raises(ValueError, match="The rows of the data set cannot be read: "):
            start(tmp_path / "run", streaming=True, num_train_images=8, batch_size=2)

    def test_damaged_footer_of_a_stream_raises(self, tmp_path, labelled):
        """The schema cannot be read, or is another one; no error of Arrow itself gets out."""
        path = tmp_path / "train.parquet"
        labelled.to_parquet(path)
        sound, random, refused = path.read_bytes(), np.random.default_rng(0), 0
        for _ in range(20):
            content = np.frombuffer(sound, np.uint8).copy()
            content[-1 - random.integers(8, 400, 3)] = random.integers(0, 256, 3)
            path.write_bytes(content.tobytes())
            try:
                load_images(str(path), streaming=True)
            except ValueError as error:
                refused += 1
                assert str(path) in str(error)
        assert refused > 0

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_missing_image_is_skipped(self, start, labelled, tmp_path, caplog, split):
        self.write(tmp_path / "data", split, [0, 1] * 4, [None, *self.encoded(labelled)[1:]])
        start(tmp_path / "run", max_corrupt=1)
        assert "Skipped image 0, which cannot be read" in caplog.text

    @pytest.mark.parametrize("streaming", [False, True])
    def test_no_readable_image_raises(self, start, labelled, tmp_path, streaming):
        """If no image can be read, the run ends, whatever `--max_corrupt` says."""
        self.write(tmp_path / "data", "train", [0, 1] * 4, self.broken(labelled))
        settings = {"streaming": True, "num_train_images": 8} if streaming else {}
        with pytest.raises(ValueError, match=r"None of [48] images in turn can be read"):
            start(tmp_path / "run", max_corrupt=100, **settings)

    def test_no_readable_validation_image_raises(self, start, labelled, tmp_path):
        self.write(tmp_path / "data", "validation", [0, 1] * 4, self.broken(labelled))
        with pytest.raises(ValueError, match="None of the images to score on can be read"):
            start(tmp_path / "run", max_corrupt=100)


class TestMasks:
    NAMES = {0: "sky", 1: "cat"}

    def images(self, *masks) -> SegmentationDataset:
        pictures = [PILImage.new("RGB", (4, 3), (9, 9, 9)) for _ in masks]
        features = Features({"image": Image(), "label": Image()})
        rows = Dataset.from_dict({"image": pictures, "label": list(masks)}, features=features)
        return SegmentationDataset(rows, max_corrupt=9, num_labels=2, reduce_labels=False)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (np.full((3, 4), 7, np.uint8), "The mask of Image 1 has the label 7; masks are grey, with labels below 2"),
            (np.full((3, 4), -1, np.int32), "The mask of Image 1 has the label -1; masks"),
            (np.full((3, 4), 0.5, np.float32), "The mask of Image 1 has values of shape (3, 4) and type float32"),
            (np.zeros((3, 4, 3), np.uint8), "The mask of Image 1 has values of shape (3, 4, 3) and type uint8"),
            (np.zeros((4, 3), np.uint8), "Image 1 has (4, 3) pixels across and down, its mask (3, 4)"),
        ],
    )
    def test_bad_mask_raises(self, mask, message):
        stream = BytesIO()
        PILImage.fromarray(mask).save(stream, format="TIFF")
        images = self.images(PILImage.new("L", (4, 3)), {"bytes": stream.getvalue(), "path": None})
        with pytest.raises(ValueError) as error:
            check_masks(images, "train", self.NAMES)
        assert message in str(error.value)

    def test_class_without_a_pixel_is_logged(self, caplog):
        """If masks have only the values 0 and 255, the log names the likely reason."""
        mask = np.zeros((3, 4), np.uint8)
        mask[0] = 255
        check_masks(self.images(PILImage.fromarray(mask)), "train", self.NAMES)
        assert (
            "No pixel of the masks looked at in the split 'train' (1) is of the class 'cat'. 33% of the" in caplog.text
        )
        assert "have the label 255, which does not count: if it is meant as a class, write that" in caplog.text
        caplog.clear()
        check_masks(self.images(PILImage.fromarray(mask // 255)), "train", self.NAMES)
        assert not caplog.text

    @pytest.mark.parametrize("mask", [PILImage.new("L", (4, 3), 7), PILImage.new("L", (3, 4))], ids=["label", "size"])
    def test_bad_mask_of_a_stream_raises(self, mask):
        """A wrong mask of a stream is refused at its row, with the name of the image."""
        masks = [PILImage.new("L", (4, 3)), mask]
        features = Features({"image": Image(), "label": Image()})
        rows = Dataset.from_dict({"image": [PILImage.new("RGB", (4, 3))] * 2, "label": masks}, features=features)
        stream = StreamedRows(rows.to_iterable_dataset(), 2, seed=0)
        images = SegmentationDataset(stream, max_corrupt=9, num_labels=2, reduce_labels=False)
        check_masks(images, "train", self.NAMES)  # does not read the stream
        with pytest.raises(ValueError, match=r"Image [01] of this epoch.* (has \(4, 3\) pixels|has the label 7)"):
            for index in images.indices(list(stream)):
                images.read(index)

    def test_broken_or_missing_mask_is_skipped(self, caplog):
        images = self.images({"bytes": b"x", "path": "a.png"}, None, PILImage.new("L", (4, 3)))
        assert [images.read(i) is None for i in range(3)] == [True, True, False]
        assert images.corrupt.tolist() == [True, True, False]
        assert "Skipped image 0, which cannot be read: The mask of Image 0" in caplog.text


class TestAddresses:
    """Images whose names in a stream are addresses, not paths."""

    def encode(self, image: PILImage.Image) -> bytes:
        stream = BytesIO()
        image.save(stream, format="PNG")
        return stream.getvalue()

    def test_images_in_an_archive(self, tmp_path, caplog):
        picture, mask = PILImage.new("RGB", (4, 3), (9, 8, 7)), PILImage.new("L", (4, 3), 1)
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            archive.writestr("0.png", self.encode(picture))
            archive.writestr("mask.png", self.encode(mask))
            archive.writestr("1.png", self.encode(picture)[:40])
        address = f"zip://{{}}.png::{tmp_path / 'all.zip'}"
        paths = [address.format(name) for name in ("0", "1", "2")] + [
            "zip://0.png::/nowhere.zip",
            "hf://datasets/a/b/c",
        ]
        rows = {"image": [{"path": path, "bytes": None} for path in paths]}
        rows["label"] = [{"path": address.format("mask"), "bytes": None}] * len(paths)
        dataset = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Image()}))
        images = SegmentationDataset(dataset, max_corrupt=9, num_labels=2, reduce_labels=False)
        found = [images.read(index) for index in range(len(paths))]
        assert np.array_equal(np.array(found[0][0]), np.array(picture))
        assert np.array_equal(found[0][1], np.ones((3, 4)))
        assert found[1:] == [None] * 4
        assert images.corrupt.tolist() == [False, *[True] * 4]
        for index, path in enumerate(paths[1:], start=1):
            assert f"Skipped image {index}, which cannot be read: Image {index} ({path}) " in caplog.text
