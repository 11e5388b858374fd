"""`cbsa push`, and `--push_to_hub` of the training scripts, without the upload itself."""

import ast
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import run_without_package
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import HfApi, ModelCard
from PIL import Image as PILImage
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from cbsa_hf import ZeroShotSegmenter, default_checkpoint, load_checkpoint
from cbsa_hf.checkpoints.model_cards import base_model_of
from cbsa_hf.cli import main


CODE = {"attention_cbsa.py", "configuration_cbsa.py", "mask_decoder_cbsa.py", "modeling_cbsa.py", "tiles_cbsa.py"}
PIPELINE = {"images.py", "image_files.py", "inference.py", "memory.py", "patch_grouping.py", "pipeline_cbsa.py"}
PIPELINE |= {"spectral.py", "zero_shot.py"}
FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} | CODE
LAST_EXAMPLE = """
with open("README.md") as card:
    example = card.read().rpartition("```python\\n")[2].partition("```")[0]
exec(example)
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replaces the Hub, and records the repository that would be created and the files that would be uploaded."""
    calls = {}

    def create_repo(self, repo_id, *, private, exist_ok):
        calls["repo"] = (repo_id, private, exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        calls["files"] = {path.name for path in Path(folder_path).iterdir()}
        calls["folder"] = shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        (architecture,) = AutoConfig.from_pretrained(folder_path).architectures
        auto_class = getattr(transformers, f"AutoModel{architecture.removeprefix('CBSA').removeprefix('Model')}")
        calls["model"] = auto_class.from_pretrained(folder_path).eval()
        calls["processor"] = AutoImageProcessor.from_pretrained(folder_path)
        calls["card"] = ModelCard.load(Path(folder_path) / "README.md")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def run_example(folder: Path, photo: PILImage.Image) -> str:
    """
    What the last example of the model card prints in a process without this package. A link makes the id of the
    repository a path there.
    """
    photo.save(folder / "photo.jpg")
    (folder / folder.parent.name).mkdir()
    (folder / folder.parent.name / folder.name).symlink_to(folder)
    return run_without_package(LAST_EXAMPLE, folder).strip()


def test_push_of_the_shipped_classifier(hub, shipped, photo, capsys):
    assert main(["push", "somebody/cbsa-tiny-imagenette", "--private"]) == 0
    assert capsys.readouterr().out == "https://hub/somebody/cbsa-tiny-imagenette\n"
    assert hub["repo"] == ("somebody/cbsa-tiny-imagenette", True, True)
    assert hub["files"] == FILES | PIPELINE
    metadata = hub["card"].data
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "image-classification")
    assert metadata.eval_results[0].metric_type == "accuracy"
    assert metadata.datasets == ["frgfm/imagenette"]
    # The example names the repository, and runs without this package.
    loaded = 'AutoModelForImageClassification.from_pretrained("somebody/cbsa-tiny-imagenette", trust_remote_code=True)'
    assert f"\nmodel = {loaded}\n" in hub["card"].text
    inputs = hub["processor"](photo, return_tensors="pt")
    with torch.no_grad():
        logits = shipped[0](**inputs).logits
        torch.testing.assert_close(hub["model"](**inputs).logits, logits)
    assert run_example(hub["folder"], photo) == shipped[0].config.id2label[logits.argmax().item()]
    found = np.asarray(PILImage.open(hub["folder"] / "foreground.png")) > 0
    reread = PILImage.open(hub["folder"] / "photo.jpg")
    assert np.array_equal(found, ZeroShotSegmenter(*shipped)(reread).mask)


def test_push_of_the_shipped_segmenter(hub, photo):
    assert main(["push", "somebody/streets", "--checkpoint", default_checkpoint("semantic-segmentation")]) == 0
    assert hub["files"] == FILES
    names = ast.literal_eval(run_example(hub["folder"], photo))
    model, processor = load_checkpoint(task="semantic-segmentation")
    reread = PILImage.open(hub["folder"] / "photo.jpg")
    with torch.no_grad():
        logits = model(**processor(reread, return_tensors="pt")).logits
    labels = torch.nn.functional.interpolate(logits, reread.size[::-1], mode="bilinear").argmax(1)
    assert names == {model.config.id2label[label] for label in labels.unique().tolist()}


def test_push_of_a_segmenter(hub, tiny_segmenter, saved_segmenter):
    card = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: image-segmentation\n---\n"
    (saved_segmenter / "README.md").write_text(card)
    assert main(["push", "somebody/segmenter", "--checkpoint", str(saved_segmenter)]) == 0
    pixel_values = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(hub["model"](pixel_values).logits, tiny_segmenter(pixel_values).logits)


def test_push_of_an_encoder(hub, tiny_model, shipped, tmp_path):
    """An encoder without head, as `cbsa convert` makes from DINOv2."""
    tiny_model.cbsa.save_pretrained(tmp_path)
    shipped[1].save_pretrained(tmp_path)
    card = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\n---\n"
    example = 'model = AutoModel.from_pretrained("{}", trust_remote_code=True)'  # as `cbsa convert` writes it
    (tmp_path / "README.md").write_text(card + example.format(tmp_path.name))
    assert main(["push", "somebody/encoder", "--checkpoint", str(tmp_path)]) == 0
    pixel_values = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        actual, expected = (model(pixel_values).last_hidden_state for model in (hub["model"], tiny_model.cbsa))
    torch.testing.assert_close(actual, expected)
    assert hub["card"].text.strip() == example.format("somebody/encoder")


def test_push_at_the_end_of_a_run(hub, training, tmp_path, monkeypatch):
    from training import pretrain
    from training.arguments import PretrainingArguments

    random = np.random.default_rng(0)
    pictures = [PILImage.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]
    rows = {"image": pictures, "label": [0, 1, 0, 1]}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    config = {"model_type": "cbsa", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_size": 16, "patch_size": 8}))
    run = tmp_path / "run"
    settings = {"batch_size": 2, "num_epochs": 1, "num_workers": 0, "report_to": "none"}
    names = {"dataset_name": str(tmp_path), "config_name": str(tmp_path / "config.json"), "output_dir": str(run)}
    monkeypatch.setattr(
        sys, "argv", [str(tmp_path / "pretrain.py"), f"--dataset_name={tmp_path}", "--output_dir", "."]
    )
    pretrain.main(PretrainingArguments(**names, **settings, push_to_hub="somebody/trained"))

    assert hub["repo"][0] == "somebody/trained"
    assert hub["files"] == FILES | PIPELINE
    assert run_example(hub["folder"], pictures[0]) in ("a", "b")
    inputs = hub["processor"](pictures, return_tensors="pt")
    trained = AutoModelForImageClassification.from_pretrained(run).eval()
    with torch.no_grad():
        torch.testing.assert_close(hub["model"](**inputs).logits, trained(**inputs).logits)
    metadata = hub["card"].data
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "image-classification")
    assert str(tmp_path.parent) not in str(hub["card"])
    assert f"`pretrain.py --dataset_name={tmp_path.name} --output_dir" in str(hub["card"])
    accuracy = json.loads((run / "results.json").read_text())["metrics"]["accuracy"]
    assert metadata.eval_results[0].metric_value == accuracy


def test_incomplete_card_is_not_pushed(hub, shipped, tmp_path, capsys):
    shipped[0].save_pretrained(tmp_path)
    shipped[1].save_pretrained(tmp_path)
    capsys.readouterr()  # discard the progress bars of saving
    for card, message in [(None, "has no model card"), ("---\nlicense: mit\n---\n", "library_name, pipeline_tag")]:
        if card is not None:
            (tmp_path / "README.md").write_text(card)
        assert main(["push", "somebody/model", "--checkpoint", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not hub


def test_unreachable_hub_is_one_sentence(capsys):
    assert main(["push", "somebody/model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cbsa: The Hub did not take somebody/model")
    assert error.count("\n") == 1


def test_files_that_the_trainer_saves(shipped, tmp_path):
    """The files that its `push_to_hub` uploads have the `base_model` and no local path."""
    arguments = TrainingArguments(tmp_path / "run", report_to="none", use_cpu=True)
    trainer = Trainer(shipped[0], arguments, processing_class=shipped[1])
    trainer.save_model()
    trainer.create_model_card(finetuned_from="somebody/model")
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == FILES | PIPELINE | {"training_args.bin"}
    assert ModelCard.load(folder / "README.md").data.base_model == "somebody/model"
    for path in [*folder.glob("*.json"), folder / "README.md"]:
        assert str(tmp_path) not in path.read_text()
        assert default_checkpoint() not in path.read_text()


def test_base_model(tmp_path):
    assert base_model_of("somebody/model") == "somebody/model"
    assert base_model_of("model") is base_model_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nbase_model: somebody/else\n---\n")
    assert base_model_of(str(tmp_path)) == "somebody/else"
    (tmp_path / "README.md").write_text("---\n[\n---\n")
    assert base_model_of(str(tmp_path)) is None
