"""Results, checkpoints and scores of training runs in this process, on a few images."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Array3D, ClassLabel, Dataset, Features, List
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cbsa_hf import load_checkpoint
from training import score
from training.arguments import FinetuningArguments, PretrainingArguments, ScoringArguments, parse_arguments
from training.engine import interruption, setup
from training.engine.interruption import StopRequest, outlive_interruption
from training.engine.setup import build_accelerator
from training.evaluation.scores import evaluate_classifier, evaluate_segmenter
from training.finetune import finetune_classifier
from training.tasks import classification
from training.tasks.heads import load_for_classes


class TestRuns:
    def test_later_checkpoints_in_the_folder_are_not_replaced(self, start, tmp_path):
        """Neither a new run nor one resumed from an earlier checkpoint changes later checkpoints in the folder."""
        run = tmp_path / "run"
        start(run, num_epochs=2, checkpointing_steps=1, keep_checkpoints=9)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("[!.]*")}
        assert (run / "checkpoint-00000004").exists()
        for changes, step in [({}, 0), ({"resume_from_checkpoint": str(run / "checkpoint-00000003")}, 3)]:
            with pytest.raises(ValueError) as error:
                start(run, num_epochs=3, report_to="tensorboard", **changes)
            assert f"{run} holds checkpoint-00000004, beyond step {step}, where this run starts" in str(error.value)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("[!.]*")} == before
        start(run, num_epochs=3, resume_from_checkpoint="last")
        assert json.loads((run / "results.json").read_text())["step"] == 6

    @pytest.fixture
    def accuracies(self, monkeypatch):
        """A list of accuracies that the next validations return."""
        values = []

        def evaluate(*_):
            return {"accuracy": values.pop(0), "loss": float(len(values))}

        monkeypatch.setattr(classification, "evaluate_classifier", evaluate)
        return values

    @pytest.mark.parametrize("ema_decay", [None, 0.5])
    def test_keep_best_saves_and_reports_the_best(self, start, tmp_path, accuracies, ema_decay):
        accuracies += [0.25, 0.75, 0.5]
        start(tmp_path / "run", num_epochs=3, keep_best=True, ema_decay=ema_decay)
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert results["metrics"] == {"accuracy": 0.75, "loss": 1.0}
        assert (results["best"], results["best_step"], results["step"]) == (0.75, 4, 6)
        card = (tmp_path / "run" / "README.md").read_text()
        assert "| after step 4 |" in card
        assert "| accuracy | 0.7500 |" in card
        assert "value: 0.75" in card
        weights = load_file(tmp_path / "run" / "model.safetensors")
        name, prefix = ("model", "model.") if ema_decay is None else ("average", "module.model.")
        best = load_file(tmp_path / "run" / "checkpoint-00000004" / f"{name}.safetensors")
        assert all(torch.equal(tensor, best[prefix + key]) for key, tensor in weights.items())

    def test_last_weights_are_reported_by_default(self, start, tmp_path, accuracies):
        accuracies += [0.75, 0.5]
        start(tmp_path / "run", num_epochs=2)
        assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["accuracy"] == 0.5
        assert "| after step 4 |" in (tmp_path / "run" / "README.md").read_text()

    def test_keep_best_needs_the_best_checkpoint(self, start, tmp_path, accuracies):
        accuracies += [0.75, 0.5, 0.25, 0.25]
        start(tmp_path / "run", num_epochs=2, keep_best=True)
        changes = {"num_epochs": 3, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-00000004")}
        with pytest.raises(ValueError, match="`--keep_best` needs checkpoint-00000002, the best so far: copy it to"):
            start(tmp_path / "new", keep_best=True, **changes)
        assert not list(tmp_path.glob("new/checkpoint-*"))
        start(tmp_path / "new", **changes)
        shutil.copytree(tmp_path / "run" / "checkpoint-00000002", tmp_path / "copied" / "checkpoint-00000002")
        start(tmp_path / "copied", keep_best=True, **changes)
        assert json.loads((tmp_path / "copied" / "results.json").read_text())["metrics"]["accuracy"] == 0.75

    @pytest.mark.parametrize(("name", "value"), [("ema_decay", 0.5), ("keep_best", True)])
    def test_options_that_fsdp_does_not_support_raise(self, monkeypatch, name, value):
        sharded = SimpleNamespace(num_processes=1, distributed_type=DistributedType.FSDP)
        monkeypatch.setattr(setup, "Accelerator", lambda **_: sharded)
        with pytest.raises(ValueError, match=f"`--{name}` does not work with FSDP, since"):
            build_accelerator(PretrainingArguments(dataset_name="", output_dir="", **{name: value}))

    def test_sharding_needs_a_gpu(self, training, monkeypatch):
        """Accelerate would train without FSDP, and not say so."""
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="FSDP shards weights on GPUs, and this run is on 'cpu', where"):
            build_accelerator(PretrainingArguments(dataset_name="", output_dir="", report_to="none"))

    @pytest.mark.parametrize("cached", [True, False])
    def test_losses_of_distillation(self, start, vit, tmp_path, monkeypatch, cached):
        """Every loss equals its formula in float64, in one step with all eight images."""
        network, folder = vit
        forward, seen = classification.ClassificationLoss.forward, []

        def watch(task, pixel_values, labels=None, **targets):
            if labels is not None:
                outputs = task.model.base_model(pixel_values)
                patches = outputs.last_hidden_state[:, 1:]
                own = [task.model.classifier(outputs.pooler_output), task.class_head(outputs.pooler_output)]
                own.append(task.map_heads[0](patches).transpose(1, 2).unflatten(2, (4, 4)))
                losses = forward(task, pixel_values, labels, **targets)
                tensors = [pixel_values, labels, *own, targets["teacher_logits"], targets["teacher_map_0"]]
                seen.append(([tensor.detach().double() for tensor in tensors], losses))
                return losses
            return forward(task, pixel_values)

        monkeypatch.setattr(classification.ClassificationLoss, "forward", watch)
        cache = tmp_path / "targets" if cached else None
        settings = {"teacher": str(folder), "teacher_cache": cache and str(cache), "batch_size": 8}
        settings |= {"logits_weight": 2.0, "maps_weight": 3.0, "label_smoothing": 0.1}
        start(tmp_path / "run", **settings)
        ((pixels, labels, logits, own_logits, own_maps, teacher_logits, teacher_map), losses), *others = seen
        assert not others

        shares, target = logits.softmax(-1), F.one_hot(labels.long(), 2) * 0.9 + 0.05
        expected = {"cross_entropy": -(target * shares.log()).sum(-1).mean()}
        ratio = teacher_logits.softmax(-1) / own_logits.softmax(-1)
        expected["divergence"] = (teacher_logits.softmax(-1) * ratio.log()).sum(-1).mean()
        lengths = own_maps.norm(dim=1) * teacher_map.norm(dim=1)
        expected["distance"] = 1 - ((own_maps * teacher_map).sum(1) / lengths).mean()
        expected["loss"] = expected["cross_entropy"] + 2 * expected["divergence"] + 3 * expected["distance"]
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value.item(), abs=1e-5)

        if cached:  # cached targets are of whole images, others of the crops
            rows = Dataset.from_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
            pixels = torch.stack(
                [torch.from_numpy(np.array(row["image"].resize((32, 32)))).permute(2, 0, 1) for row in rows]
            )
            pixels = pixels / 127.5 - 1
        else:
            mean, std = (
                torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
            )
            pixels = ((pixels * std + mean) * 2 - 1).float()
        with torch.no_grad():
            outputs = network(pixels, output_hidden_states=True)
        maps = outputs.hidden_states[-1][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        if cached:
            order = torch.cdist(teacher_logits.float(), outputs.logits).argmin(1)
            assert sorted(order.tolist()) == list(range(8))
            assert labels.tolist() == [i % 2 for i in order.tolist()]
            torch.testing.assert_close(teacher_logits.float(), outputs.logits[order], atol=1e-3, rtol=1e-3)
        else:
            torch.testing.assert_close(teacher_logits.float(), outputs.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(teacher_map.float(), maps, atol=1e-4, rtol=1e-4)

    def test_cached_targets_of_another_run_raise(self, start, vit, labelled, tmp_path):
        _, folder = vit
        settings = {"teacher": str(folder), "teacher_cache": str(tmp_path / "targets")}
        start(tmp_path / "run", **settings)
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "targets").iterdir()}
        start(tmp_path / "again", **settings)
        (tmp_path / "targets" / "targets.json").rename(
            tmp_path / "targets" / "answers.json"
        )  # as version 0.1 wrote it
        start(tmp_path / "before", **settings)
        (tmp_path / "targets" / "answers.json").rename(tmp_path / "targets" / "targets.json")
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "targets").iterdir()} == written

        shutil.copytree(folder, tmp_path / "other")
        labelled.select(range(7)).to_parquet(tmp_path / "seven.parquet")
        for changes, difference in [
            ({"teacher": str(tmp_path / "other")}, f"teacher {folder}, not {tmp_path / 'other'}"),
            ({"image_size": 64}, "image size 32, not 64"),
            ({"patch_size": 16}, "patch size 8, not 16"),
            ({"train_split": "validation"}, "data set "),
        ]:
            with pytest.raises(ValueError) as error:
                start(tmp_path / "new", **{**settings, **changes})
            assert f"The targets in {tmp_path / 'targets'} are of {difference}" in str(error.value)
            assert "choose another `--teacher_cache`, or remove it" in str(error.value)
        for content in ("[1]", "no JSON", "[" * 100_000, None):
            description = tmp_path / "targets" / "targets.json"
            description.unlink() if content is None else description.write_text(content)
            with pytest.raises(ValueError, match="does not say what its targets are of"):
                start(tmp_path / "new", **settings)
        assert [path.name for path in tmp_path.glob("new/*")] == [".lock"]


@pytest.mark.parametrize("variable", [None, *interruption.LAUNCHED])
def test_run_stops_when_its_launcher_dies(monkeypatch, variable):
    """The death of the shell that started a run does not stop it."""
    for name in interruption.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "x")
    stop = StopRequest()
    assert stop.status == 0
    other = os.getppid() + 1  # whatever the parent of this test is: in a container it may be process 1
    monkeypatch.setattr("os.getppid", lambda: other)
    assert stop.status == (0 if variable is None else 143)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_ask_for_a_stop(number, status):
    """The first signal counts. At the end, the former handlers are restored."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with StopRequest() as stop:
        assert stop.status == 0
        signal.raise_signal(number)
        assert stop.status == status
        signal.raise_signal(signal.SIGTERM)
        assert stop.status == status
    assert {each: signal.getsignal(each) for each in before} == before


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell the sender of a signal")
def test_worker_obeys_only_its_parent():
    others = multiprocessing.active_children()
    batches = iter(DataLoader(range(100), num_workers=1, worker_init_fn=outlive_interruption))
    assert next(batches).item() == 0
    (worker,) = [child for child in multiprocessing.active_children() if child not in others]
    subprocess.run(["kill", str(worker.pid)], check=True)
    assert [next(batches).item() for _ in range(20)] == list(range(1, 21))
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


class TestHeads:
    """Heads of a saved classifier and a saved segmenter with five classes."""

    NAMES = dict(enumerate(["sky", "tree", "road", "car", "sign"]))
    OTHERS = dict(enumerate(["tree", "sky", "road", "car", "sign"]))

    @pytest.fixture(params=["classifier", "segmenter"])
    def saved(self, request, tiny_model, tiny_segmenter, tmp_path):
        model, auto_class, head = {
            "classifier": (tiny_model, AutoModelForImageClassification, {"classifier.weight", "classifier.bias"}),
            "segmenter": (
                tiny_segmenter,
                AutoModelForSemanticSegmentation,
                {"decoder.class_embeddings", "decoder.mask_norm.weight", "decoder.mask_norm.bias"},
            ),
        }[request.param]
        model.config.id2label = self.NAMES
        with torch.no_grad():
            for name in head:
                model.get_parameter(name).normal_()
        model.save_pretrained(tmp_path)
        return model, auto_class, head, tmp_path

    @pytest.mark.parametrize("names", [NAMES, OTHERS, {0: "sky", 1: "tree"}], ids=["same", "other", "fewer"])
    def test_head_is_new_for_other_classes(self, saved, names):
        model, auto_class, head, folder = saved
        loaded = load_for_classes(auto_class, str(folder), names)
        assert loaded.config.id2label == names
        expected, found = model.state_dict(), loaded.state_dict()
        same = {name for name in expected if torch.equal(expected[name], found[name])}
        assert expected.keys() - same == (set() if names == self.NAMES else head)
        assert all(tensor.isfinite().all() for tensor in found.values())

    def test_model_of_another_library_raises(self, start, vit, tmp_path):
        args = FinetuningArguments(
            task="image-classification",
            dataset_name=str(tmp_path / "data"),
            output_dir=str(tmp_path / "run"),
            model_name_or_path=str(vit[1]),
        )
        with pytest.raises(ValueError, match="holds a model of type vit; this takes `cbsa` models"):
            finetune_classifier(args)


class TestScores:
    ID2LABEL = {0: "tench", 1: "English springer", 2: "LABEL_2"}

    def test_classes_have_to_match(self):
        for names in (["tench", "English springer"], ["Tench", "english_springer", "chain saw"], ["0", "1", "2"]):
            score.check_classes(names, self.ID2LABEL)
        with pytest.raises(ValueError, match="Class 1 of the data is 'tench', of the model 'English springer'"):
            score.check_classes(["0", "tench"], self.ID2LABEL)
        with pytest.raises(ValueError, match="The data has 4 classes, the model 3"):
            score.check_classes(["0", "1", "2", "3"], self.ID2LABEL)

    @pytest.mark.parametrize("label", [-1, 2])
    def test_label_of_no_class_raises(self, label):
        batches = [{"pixel_values": torch.zeros(2, 2), "labels": torch.tensor([-100, label])}]
        accelerator = SimpleNamespace(is_main_process=True, autocast=nullcontext)
        with pytest.raises(ValueError, match=f"An image has the label {label}; the model has the classes 0 to 1"):
            evaluate_classifier(lambda pixels: pixels, batches, accelerator)

    @pytest.mark.parametrize("name", ["output", "strip"])
    def test_unwritable_output_raises_before_loading(self, tmp_path, monkeypatch, name):
        monkeypatch.setattr(score, "load_checkpoint", lambda *_: pytest.fail("a checkpoint was loaded"))
        for path in (tmp_path, tmp_path / "nowhere" / "file"):
            with pytest.raises(ValueError, match=f"{path} cannot be written: "):
                score.main(ScoringArguments(dataset_name="nowhere", **{name: str(path)}))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("task", "options"),
        [
            ("image-classification", {"flip": [], "stride": ["8"], "scales": ["1", "2"], "reduce_labels": ["true"]}),
            ("image-classification", {"strip": ["strip.png"], "sharp": [], "min-foreground": ["0.5"]}),
            ("semantic-segmentation", {"batch_size": ["64"], "min_foreground": ["0.02"]}),  # even if it is the default
            ("zero-shot-segmentation", {"batch-size": ["2"], "flip": ["false"], "strip": ["x.png"], "stride": ["8"]}),
        ],
    )
    def test_options_of_another_task_raise(self, task, options):
        for name, value in options.items():
            with pytest.raises(ValueError, match=f"`--{name.replace('-', '_')}` has no effect with `--task {task}`"):
                parse_arguments(ScoringArguments, ["--dataset_name=nowhere", f"--task={task}", f"--{name}", *value])

    @pytest.mark.parametrize("name", ["output", "strip"])
    def test_existing_file_is_replaced_only_with_force(self, tmp_path, monkeypatch, name):
        monkeypatch.setattr(score, "load_checkpoint", Mock(side_effect=ValueError("loading")))
        (tmp_path / "file").write_text("mine")
        options = {"dataset_name": "nowhere", "task": "semantic-segmentation", name: str(tmp_path / "file")}
        with pytest.raises(ValueError, match="file exists; name another file, or give --force"):
            score.main(ScoringArguments(**options))
        with pytest.raises(ValueError, match="loading"):
            score.main(ScoringArguments(**options, force=True))
        assert (tmp_path / "file").read_text() == "mine"

    def test_zero_shot_scoring_takes_one_process(self, monkeypatch):
        monkeypatch.setattr(score, "Accelerator", lambda **_: SimpleNamespace(num_processes=2))
        with pytest.raises(ValueError, match="`--task zero-shot-segmentation` is for one process, not 2"):
            score.main(ScoringArguments(dataset_name="nowhere", task="zero-shot-segmentation"))

    def test_class_that_never_occurs_is_left_out(self, training, tiny_segmenter):
        accelerator = build_accelerator(PretrainingArguments(dataset_name="", output_dir="", report_to="none"))
        segmenter = Mock(return_value=np.array([[0, 1, 1]]), model=tiny_segmenter)
        scores = evaluate_segmenter(segmenter, lambda _: (None, np.array([[0, 1, 3]])), 1, accelerator)
        assert scores == pytest.approx(
            {"mean_iou": 0.5, "pixel_accuracy": 2 / 3, "iou/sky": 1.0, "iou/tree": 0.5, "iou/car": 0.0}
        )


def test_multi_label_classification(start, tmp_path):
    """Images show none, one or both of two colours. Metric and loss of the saved model follow their definitions."""
    features = Features({"image": ImageFeature(), "labels": List(ClassLabel(names=["red", "blue"]))})
    random, lists = np.random.default_rng(0), [[], [0], [1], [0, 1]] * 4
    for split in ("train", "validation"):
        arrays = random.integers(0, 100, (16, 32, 32, 3))
        for array, each in zip(arrays, lists, strict=True):
            array[..., [2 * label for label in each]] += 120
        pictures = [Image.fromarray(array.astype(np.uint8)) for array in arrays]
        rows = Dataset.from_dict({"image": pictures, "labels": lists}, features=features)
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    start(tmp_path / "run", num_epochs=20, learning_rate=1e-2, label_smoothing=0.0, mixup_alpha=0.1, keep_best=True)
    model, processor = load_checkpoint(str(tmp_path / "run"))
    assert model.config.problem_type == "multi_label_classification"
    with torch.no_grad():
        logits = model(**processor(pictures, return_tensors="pt")).logits.double()
    labels = torch.tensor([[float(label in each) for label in range(2)] for each in lists]).double()
    shares = logits.sigmoid()
    expected = -(labels * shares.log() + (1 - labels) * (1 - shares).log()).mean()
    precisions = [
        np.mean([labels[logits[:, k] >= logits[i, k], k].mean() for i in range(16) if labels[i, k]]) for k in range(2)
    ]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    metrics = results["metrics"]
    assert metrics == pytest.approx({"mean_average_precision": np.mean(precisions), "loss": expected.item()}, abs=1e-4)
    assert metrics["mean_average_precision"] > 0.9  # chance is about a half
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"type: mean_average_precision\n      value: {round(metrics['mean_average_precision'], 4)}" in card
    args = ScoringArguments(
        dataset_name=str(tmp_path / "data"), checkpoint=str(tmp_path / "run"), output=str(tmp_path / "s")
    )
    score.main(args)
    assert json.loads((tmp_path / "s").read_text()) == pytest.approx(metrics, abs=1e-5)
    with pytest.raises(
        ValueError, match="`--teacher` knows one class an image, and this data set has lists of labels"
    ):
        start(tmp_path / "taught", teacher="efficientnet-lite0")


def test_log_has_a_row_for_each_epoch(start, tmp_path):
    """The log has the same rows as JSON lines, as a table, and after the run is resumed."""
    settings = {"num_epochs": 4, "validation_epochs": 2, "keep_checkpoints": 9, "checkpointing_steps": 3}
    start(tmp_path / "run", **settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (2, 4), (3, 6), (4, 8)]
    assert ["validation/accuracy" in row for row in rows] == [False, True, False, True]
    assert (
        rows[-1]["validation/loss"] == json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["loss"]
    )
    with (tmp_path / "run" / "log.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items() if v} for row in table] == rows
    for checkpoint in (3, 6):
        shutil.copytree(tmp_path / "run", tmp_path / f"{checkpoint}")
        for later in (tmp_path / f"{checkpoint}").glob("checkpoint-*"):
            if int(later.name[-8:]) > checkpoint:
                shutil.rmtree(later)
        start(tmp_path / f"{checkpoint}", **settings, resume_from_checkpoint="last")
        again = [json.loads(line) for line in (tmp_path / f"{checkpoint}" / "log.jsonl").read_text().splitlines()]
        num_kept = checkpoint // 2  # epochs before the checkpoint
        assert again[:num_kept] == rows[:num_kept]
        assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
    for line in ("[1]", "{}", "no JSON", "[" * 100_000):
        (tmp_path / "run" / "log.jsonl").write_text(line)
        with pytest.raises(ValueError, match=r"log\.jsonl is not the log of a run: move it away"):
            start(tmp_path / "run", **settings, resume_from_checkpoint="last")


@pytest.mark.parametrize(("num_channels", "kind"), [(4, "uint8"), (13, "uint16")])
def test_other_numbers_of_channels(start, tmp_path, num_channels, kind):
    """Images are arrays, from the data set to the scores. Each channel is resized by itself."""
    largest = np.iinfo(kind).max
    arrays = np.random.default_rng(0).integers(0, largest + 1, (8, 40, 48, num_channels), dtype=kind)
    features = Features({"image": Array3D((40, 48, num_channels), kind), "label": ClassLabel(names=["a", "b"])})
    for split in ("train", "validation"):
        rows = Dataset.from_dict({"image": list(arrays), "label": [0, 1] * 4}, features=features)
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    config = json.loads((tmp_path / "data" / "config.json").read_text())
    (tmp_path / "data" / "config.json").write_text(json.dumps({**config, "num_channels": num_channels}))
    start(tmp_path / "run")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run").eval()
    logits = []
    for array in (arrays // (largest // 255)).astype(np.uint8):
        channels = [Image.fromarray(channel).resize((32, 32), Image.BILINEAR) for channel in array.transpose(2, 0, 1)]
        pixels = np.stack([np.asarray(channel) for channel in channels]) / 255
        with torch.no_grad():
            logits.append(model(torch.from_numpy(pixels[None] * 2 - 1).float()).logits)
    logits, labels = torch.cat(logits), torch.tensor([0, 1] * 4)
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-3)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
