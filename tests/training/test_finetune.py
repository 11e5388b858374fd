"""`finetune.py`, `adapt.py` and `compare.py`, run as processes on small Parquet files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from cbsa_hf import CBSAConfig, CBSAForImageClassification, SlidingWindowSegmenter
from cbsa_hf.cli import main


def run(script: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    several = ["--multi_gpu"] if processes > 1 else []
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command = [*(launcher if processes > 1 else [sys.executable]), str(ROOT / "training" / script), *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process


def write_pictures(folder: Path, counts: dict[str, int], make, features: Features):
    """Write a data set of `make(split, index)` with a Parquet file for each split."""
    folder.mkdir()
    for split, count in counts.items():
        rows = [make(split, i) for i in range(count)]
        table = {name: [row[name] for row in rows] for name in features}
        Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A small CBSA classifier with random weights, saved."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = CBSAConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, num_labels=7
    )
    CBSAForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """
    Noisy images of three sizes with a red rectangle in each. The last column is ignored. The first validation image
    has its labels swapped, so that the scores would show if it counted twice.
    """
    folder = tmp_path_factory.mktemp("masks") / "data"
    random = np.random.default_rng(0)

    def make(split: str, i: int) -> dict:
        height, width = [(48, 64), (40, 40), (64, 48)][i % 3]
        mask = np.zeros((height, width), dtype=np.uint8)
        top, left = random.integers(0, height // 2), random.integers(0, width // 2)
        mask[top : top + height // 2, left : left + width // 2] = 1
        pixels = random.integers(0, 120, (height, width, 3))
        pixels[mask == 1, 0] += 130
        if (split, i) == ("validation", 0):
            mask = 1 - mask
        mask[:, -1] = 255
        return {"image": PILImage.fromarray(pixels.astype(np.uint8)), "label": PILImage.fromarray(mask)}

    write_pictures(folder, {"train": 24, "validation": 5}, make, Features({"image": Image(), "label": Image()}))
    (folder / "id2label.json").write_text(json.dumps({"0": "noise", "1": "red", "2": "never seen"}))
    return folder


SEGMENTATION = ["--task=semantic-segmentation", "--crop_size", "32", "40", "--batch_size=8", "--num_workers=0"]
SEGMENTATION += ["--learning_rate=5e-3", "--warmup_epochs=0", "--report_to=none"]


def measure(segmenter: SlidingWindowSegmenter, masks: Path) -> dict[str, float]:
    """Pixel accuracy, and IoU of the classes that occur, over the pixels of all validation images."""
    hits, unions, right, counted = np.zeros(3), np.zeros(3), 0, 0
    for row in Dataset.from_parquet(str(masks / "validation-00000-of-00001.parquet")):
        predicted, labels = segmenter(row["image"]), np.asarray(row["label"])
        inside = labels != 255
        counted += inside.sum()
        right += (predicted == labels)[inside].sum()
        for k in range(3):
            hits[k] += ((predicted == k) & (labels == k) & inside).sum()
            unions[k] += (((predicted == k) | (labels == k)) & inside).sum()
    return {"pixel_accuracy": right / counted, "iou/noise": hits[0] / unions[0], "iou/red": hits[1] / unions[1]}


def mean_iou(metrics: dict[str, float]) -> float:
    return np.mean([value for name, value in metrics.items() if name.startswith("iou/")])


@torch.no_grad()
def loss_in_training(model, processor, masks: Path) -> float:
    """Mean cross-entropy over the training images."""
    rows = Dataset.from_parquet(str(masks / "train-00000-of-00001.parquet"))
    inputs = (processor(row["image"], segmentation_maps=row["label"], return_tensors="pt") for row in rows)
    return np.mean([model(**given).loss.item() for given in inputs])


def test_segmentation_learns_and_scores_each_image_once(classifier, masks, tmp_path):
    arguments = [*SEGMENTATION, f"--dataset_name={masks}", f"--model_name_or_path={classifier}", "--image_size=80"]
    arguments += [f"--output_dir={tmp_path}", "--num_epochs=16", "--validation_epochs=8", "--class_balanced=true"]
    arguments += ["--no_photometric_distortion"]  # it would turn red into other colours
    run("finetune.py", *arguments, processes=2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["processes"] == 2

    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert model.config.id2label == {0: "noise", 1: "red", 2: "never seen"}
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    torch.manual_seed(0)
    untrained = AutoModelForSemanticSegmentation.from_pretrained(classifier, num_labels=3).eval()
    losses = [loss_in_training(each, processor, masks) for each in (untrained, model)]
    assert losses[1] < 0.7 * losses[0]  # the worst ratio of ten seeds was 0.46
    segmenter = SlidingWindowSegmenter(model, processor)  # the processor knows the size and the windows
    for name, value in measure(segmenter, masks).items():
        # Rounding may decide the class of a few pixels.
        assert results["metrics"][name] == pytest.approx(value, abs=2e-3)
    assert results["metrics"]["mean_iou"] == pytest.approx(mean_iou(results["metrics"]))

    scoring = ["--task=semantic-segmentation", f"--dataset_name={masks}", f"--checkpoint={tmp_path}"]
    options = ["--image_size=64", "--stride", "19", "21", "--scales", "0.75", "1.25", "--flip=true"]
    chosen = {"long_side": 64, "stride": (19, 21), "scales": [0.75, 1.25], "flip": True}
    scored = run("score.py", *scoring, *options, processes=2)
    printed = dict(line.split() for line in scored.stdout.splitlines() if len(line.split()) == 2)
    for name, value in measure(SlidingWindowSegmenter(model, processor, **chosen), masks).items():
        assert float(printed[name]) == pytest.approx(value, abs=2e-3)

    picture = Dataset.from_parquet(str(masks / "validation-00000-of-00001.parquet"))[0]["image"]
    with torch.no_grad():
        logits = model(**processor(picture, return_tensors="pt")).logits
    assert logits.shape == (1, 3, 60, 80)  # 64 x 48 fills the bounds
    (expected,) = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(48, 64)])
    for found in pipeline("image-segmentation", model=model, image_processor=processor)(picture):
        assert np.array_equal(np.asarray(found["mask"]) > 0, expected == model.config.label2id[found["label"]])

    strip = tmp_path / "strip.png"
    scored = run("score.py", *scoring, f"--strip={strip}")
    printed = dict(line.split() for line in scored.stdout.splitlines() if len(line.split()) == 2)
    assert float(printed["iou/red"]) == pytest.approx(results["metrics"]["iou/red"], abs=2e-3)
    pixels, left = np.asarray(PILImage.open(strip)), 0
    rows = Dataset.from_parquet(str(masks / "validation-00000-of-00001.parquet"))
    for row in (rows[i] for i in (0, 1, 3, 4)):  # evenly spaced
        predicted, labels = segmenter(row["image"]), np.asarray(row["label"])
        height, width = labels.shape
        classes, mistakes = pixels[: 2 * height, left : left + width].reshape(2, height, width, 3)
        painted = np.stack([np.median(classes[predicted == k], axis=0) for k in np.unique(predicted)])
        assert len(np.unique(painted, axis=0)) == len(painted)  # a colour for each class
        painted = painted[np.unique(predicted, return_inverse=True)[1].reshape(predicted.shape)]
        assert (classes == painted).all(-1).mean() > 0.998
        wrong = (predicted != labels) & (labels != 255)
        assert ((mistakes == 0).all(-1) == wrong).mean() > 0.998
        assert ((mistakes == 160).all(-1) == (labels == 255)).all()
        left += width + 4


def test_segmentation_of_one_class(classifier, masks, training, tmp_path, capsys):
    """Binary segmentation: 0 is the background, and both are scored."""
    from training import score
    from training.arguments import ScoringArguments, SegmentationArguments, parse_arguments
    from training.finetune import finetune_segmenter

    data, output = tmp_path / "data", tmp_path / "output"
    shutil.copytree(masks, data)
    (data / "id2label.json").write_text(json.dumps({"0": "red"}))
    arguments = [*SEGMENTATION, f"--dataset_name={data}", f"--model_name_or_path={classifier}", "--num_epochs=1"]
    arguments += [f"--output_dir={output}", "--dice=true", "--class_balanced=true", "--no_photometric_distortion"]
    arguments.append("--decoder_skip=true")
    finetune_segmenter(parse_arguments(SegmentationArguments, arguments))
    metrics = json.loads((output / "results.json").read_text())["metrics"]
    model = AutoModelForSemanticSegmentation.from_pretrained(output).eval()
    assert model.config.id2label == {0: "red"}
    assert model.decoder_skip.classifier.weight.abs().sum() > 0  # it is there, and was trained
    expected = measure(SlidingWindowSegmenter(model, AutoImageProcessor.from_pretrained(output)), data)
    expected["iou/background"] = expected.pop("iou/noise")
    assert metrics == pytest.approx({**expected, "mean_iou": mean_iou(expected)}, abs=2e-3)
    capsys.readouterr()
    score.main(ScoringArguments(task="semantic-segmentation", dataset_name=str(data), checkpoint=str(output)))
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert {name: float(printed[name]) for name in metrics} == pytest.approx(metrics, abs=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=captioning"], "`--task` is captioning; choose one of image-classification, semantic-segmentation."),
        ([*SEGMENTATION, "--image_column=photo"], "The data set has no column 'photo'; it has image, label."),
        ([*SEGMENTATION, "--label_column=photo"], "The data set has no column 'photo'; it has image, label."),
        ([*SEGMENTATION, "--window", "8", "8", "8"], "8 8 8 is not a size; give a height and a width, or one side."),
        ([*SEGMENTATION, "--image_size=0"], "`--image_size` is 0, and has to be at least 1."),
        ([*SEGMENTATION, "--id2label=nowhere.json"], "The names of the classes are not in nowhere.json"),
        ([*SEGMENTATION, "--model_name_or_path=nobody/nothing"], "nobody/nothing is neither a folder with a complete"),
    ],
)
def test_bad_input_is_one_sentence(masks, refusal, tmp_path, arguments, message):
    sentence = refusal("finetune.py", f"--dataset_name={masks}", f"--output_dir={tmp_path / 'run'}", *arguments)
    assert sentence.startswith("finetune.py: ")
    assert message in sentence
    assert "\n" not in sentence
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Noisy images with a red half and a blue half, in one order or the other."""
    folder = tmp_path_factory.mktemp("stripes") / "data"
    random = np.random.default_rng(0)

    def make(split: str, i: int) -> dict:
        pixels = random.integers(0, 110, (32, 32, 3))
        top, bottom = (0, 2) if i % 2 else (2, 0)
        pixels[:16, :, top] += 120
        pixels[16:, :, bottom] += 120
        return {"image": PILImage.fromarray(pixels.astype(np.uint8)), "label": i % 2}

    features = Features({"image": Image(), "label": ClassLabel(names=["blue first", "red first"])})
    write_pictures(folder, {"train": 96, "validation": 40}, make, features)
    return folder


@torch.no_grad()
def classify(folder: Path, stripes: Path) -> dict[str, float]:
    """Accuracy and mean cross-entropy over the validation images."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    rows = Dataset.from_parquet(str(stripes / "validation-00000-of-00001.parquet"))
    processor = AutoImageProcessor.from_pretrained(folder)
    logits = model(processor(rows["image"][:], return_tensors="pt")["pixel_values"]).logits
    labels = torch.tensor(rows["label"][:])
    hits = (logits.argmax(-1) == labels).double()
    return {"accuracy": hits.mean().item(), "loss": F.cross_entropy(logits, labels).item()}


def test_classification_with_a_new_head(classifier, stripes, tmp_path):
    arguments = ["--task=image-classification", f"--dataset_name={stripes}", f"--model_name_or_path={classifier}"]
    arguments += [f"--output_dir={tmp_path}", "--num_epochs=24", "--batch_size=16", "--learning_rate=3e-3"]
    run("finetune.py", *arguments, "--warmup_epochs=0", "--num_workers=0", "--min_crop_scale=0.9", "--layer_decay=0.7")
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics == pytest.approx(classify(tmp_path, stripes), abs=1e-5)
    assert metrics["loss"] < 0.3  # chance is log 2; it ends near 0.05, which the smoothed labels allow
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label == {
        0: "blue first",
        1: "red first",
    }


@pytest.fixture(scope="module")
def vit(stripes, tmp_path_factory):
    """A small ViT of Transformers, trained here until it tells the stripes apart."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.0,
        id2label={0: "blue first", 1: "red first"},
        label2id={"blue first": 0, "red first": 1},
    )
    model = ViTForImageClassification(config)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True)
    rows = Dataset.from_parquet(str(stripes / "train-00000-of-00001.parquet"))
    pixels = processor(rows["image"][:], return_tensors="pt")["pixel_values"]
    labels = torch.tensor(rows["label"][:])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(5000):  # ten times as many as the slowest of ten seeds needed
        loss = F.cross_entropy(model(pixels).logits, labels)
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        pytest.fail("The ViT that is to be adapted does not learn.")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attention_type", ["agent", "mita", "cbsa"])
def test_adapted_vit_recovers(vit, stripes, tmp_path, attention_type):
    """The scores of the original are right, other attention changes them, and training restores the loss."""
    arguments = [f"--model_name_or_path={vit}", f"--attention_type={attention_type}", f"--dataset_name={stripes}"]
    arguments += [f"--output_dir={tmp_path}", "--num_epochs=12", "--batch_size=16", "--learning_rate=2e-3"]
    arguments += ["--warmup_epochs=0", "--num_workers=0", "--min_crop_scale=0.9", "--hidden_states_weight=1"]
    arguments += ["--label_smoothing=0"]
    run("adapt.py", *arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["original"] == pytest.approx(classify(vit, stripes), abs=1e-5)
    if attention_type != "cbsa":  # `agent` and `mita` keep every weight
        converted = tmp_path / attention_type
        assert main(["convert", str(vit), "-o", str(converted), "--attention", attention_type]) == 0
        assert results["replaced"] == pytest.approx(classify(converted, stripes), abs=1e-5)
    else:
        assert results["replaced"]["loss"] > 2 * results["original"]["loss"]
    assert results["metrics"] == pytest.approx(classify(tmp_path, stripes), abs=1e-5)
    assert results["metrics"]["loss"] < 0.3  # chance is log 2
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.attention_type == attention_type


def test_comparison_of_members(stripes, masks, tmp_path):
    """Every member is trained once and measured. The operations of the softmax member equal a count by hand."""
    width, layers, patches = 24, 2, 16
    config = {"model_type": "cbsa", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = [f"--dataset_name={stripes}", f"--masks_name={masks}", f"--output_dir={tmp_path / 'run'}"]
    arguments += [f"--config_name={tmp_path / 'config.json'}", "--image_size=32", "--patch_size=8", "--batch_size=16"]
    arguments += ["--patch_embedding_type=patchify", "--num_epochs=2", "--num_workers=0", "--report_to=none"]
    arguments += ["--members", "cbsa", "softmax", "mita", "cbsa-1-unique"]
    printed = run("compare.py", *arguments).stdout
    table = [line for line in printed.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert header[:4] == ["member", "accuracy", "zero-shot IoU, ncut", "zero-shot IoU, attention"]
    assert header[4:] == ["parameters", "GFLOPs", "images/s, training", "images/s, inference"]
    assert [row[0] for row in rows] == ["`cbsa`", "`softmax`", "`mita`", "`cbsa-1-unique`"]
    assert all(0 < float(cell) < 1 for row in rows for cell in row[2:4])
    parameters = [int(row[4].replace(",", "")) for row in rows]
    assert parameters[1] == parameters[2]  # both are those of a ViT
    assert parameters[0] - parameters[3] == 3 * width**2 + 5 * width + 4  # one layer less: 3 matrices, norms, 4 steps

    tokens = patches + 1
    embedding = 2 * patches * (3 * 8 * 8) * width
    layer = 4 * 2 * tokens * width**2 + 2 * 2 * tokens**2 * width + 2 * 2 * tokens * width * (4 * width)
    measured = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert measured["softmax"]["flops"] == embedding + layers * layer + 2 * width * 2

    scoring = ["--task=zero-shot-segmentation", "--split=train", f"--dataset_name={masks}"]
    run("score.py", *scoring, f"--checkpoint={tmp_path / 'run/cbsa-0'}", f"--output={tmp_path / 'scores.json'}")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert measured["cbsa"]["zero-shot IoU, ncut"] == [pytest.approx(scores["ncut"])]
    assert measured["cbsa"]["zero-shot IoU, attention"] == [pytest.approx(scores["attention"])]

    weights = sorted((tmp_path / "run").glob("*/model.safetensors"))
    written = [path.stat().st_mtime_ns for path in weights]
    run("compare.py", *arguments)
    assert len(weights) == 4
    assert [path.stat().st_mtime_ns for path in weights] == written
