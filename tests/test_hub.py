"""`cbsa push`, up to the upload."""

from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from transformers import AutoConfig, AutoImageProcessor

from cbsa_hf.cli import main


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the network: what would be created and uploaded."""
    calls = {}

    def create_repo(self, repo_id, *, private, exist_ok):
        calls["repo"] = (repo_id, private, exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        calls["files"] = {path.name for path in Path(folder_path).iterdir()}
        (architecture,) = AutoConfig.from_pretrained(folder_path).architectures
        auto_class = getattr(transformers, architecture.replace("CBSA", "AutoModel"))
        calls["model"] = auto_class.from_pretrained(folder_path).eval()
        calls["processor"] = AutoImageProcessor.from_pretrained(folder_path)
        calls["card"] = ModelCard.load(Path(folder_path) / "README.md")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def test_push(hub, shipped, photo, capsys):
    assert main(["push", "somebody/cbsa-tiny-imagenette", "--private"]) == 0
    assert capsys.readouterr().out == "https://hub/somebody/cbsa-tiny-imagenette\n"
    assert hub["repo"] == ("somebody/cbsa-tiny-imagenette", True, True)
    code = {"attention_cbsa.py", "configuration_cbsa.py", "mask_decoder_cbsa.py", "modeling_cbsa.py"}
    assert hub["files"] == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} | code
    metadata = hub["card"].data
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "image-classification")
    assert metadata.eval_results[0].metric_type == "accuracy"
    assert metadata.datasets == ["frgfm/imagenette"]
    inputs = hub["processor"](photo, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(hub["model"](**inputs).logits, shipped[0](**inputs).logits)


def test_push_of_a_segmenter(hub, tiny_segmenter, saved_segmenter):
    card = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: image-segmentation\n---\n"
    (saved_segmenter / "README.md").write_text(card)
    assert main(["push", "somebody/segmenter", "--checkpoint", str(saved_segmenter)]) == 0
    pixel_values = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(hub["model"](pixel_values).logits, tiny_segmenter(pixel_values).logits)


def test_nothing_is_pushed_without_a_complete_card(hub, shipped, tmp_path, capsys):
    shipped[0].save_pretrained(tmp_path)
    shipped[1].save_pretrained(tmp_path)
    for card, message in [(None, "has no model card"), ("---\nlicense: mit\n---\n", "library_name, pipeline_tag")]:
        if card is not None:
            (tmp_path / "README.md").write_text(card)
        assert main(["push", "somebody/model", "--checkpoint", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not hub


def test_the_hub_out_of_reach_is_one_sentence(capsys):
    assert main(["push", "somebody/model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cbsa: The Hub did not take somebody/model")
    assert error.count("\n") == 1
