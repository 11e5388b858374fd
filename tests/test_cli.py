"""The `cbsa` command as a process would see it."""

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from cbsa_hf import SlidingWindowSegmenter, ZeroShotSegmenter, default_checkpoint
from cbsa_hf.cli import main


@pytest.fixture
def photo_file(photo, tmp_path):
    photo.save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_segment(photo, photo_file, shipped, tmp_path, capsys):
    assert main(["segment", str(photo_file), "-o", str(tmp_path / "overlay.png")]) == 0
    assert "% of the pixels are foreground" in capsys.readouterr().out
    mask = np.asarray(Image.open(tmp_path / "overlay_mask.png"))
    overlay = np.asarray(Image.open(tmp_path / "overlay.png"), dtype=int)
    assert np.array_equal(mask, ZeroShotSegmenter(*shipped)(photo).mask)
    assert overlay.shape == (300, 451, 3)
    redness = overlay[..., 0] - overlay[..., 1]
    assert redness[mask].mean() > redness[~mask].mean() + 20  # the mask is tinted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "overlay.png", "overlay_mask.png"]


@pytest.mark.parametrize("long_side", [None, 160])
def test_segment_into_classes(photo, photo_file, tiny_segmenter, saved_segmenter, tmp_path, capsys, long_side):
    arguments = [] if long_side is None else ["--long-side", str(long_side)]
    command = ["segment", str(photo_file), "-o", str(tmp_path / "overlay.png"), "--task", "semantic"]
    assert main([*command, "--checkpoint", str(saved_segmenter), *arguments]) == 0
    mask = Image.open(tmp_path / "overlay_mask.png")
    labels = np.asarray(mask)
    processor = AutoImageProcessor.from_pretrained(saved_segmenter)
    segmenter = SlidingWindowSegmenter(tiny_segmenter, processor, window=(32, 48), long_side=long_side or 48)
    assert np.array_equal(labels, segmenter(photo))

    shares = {tiny_segmenter.config.id2label[i]: (labels == i).mean() for i in np.unique(labels)}
    assert len(shares) > 1
    printed = capsys.readouterr().out
    for name, share in shares.items():
        assert f"{name} {share:.0%}" in printed
    overlay = np.asarray(Image.open(tmp_path / "overlay.png"), dtype=int)
    assert overlay.shape[0] > 300 and overlay.shape[1] == 451  # the legend is below the photo
    legend = {tuple(pixel) for pixel in overlay[300:].reshape(-1, 3).tolist()}
    colours = np.asarray(mask.convert("RGB"))
    for i in np.unique(labels):
        (colour,) = {tuple(pixel) for pixel in colours[labels == i].tolist()}
        assert colour in legend


def test_attention(photo_file, tmp_path):
    assert main(["attention", str(photo_file), "-o", str(tmp_path / "maps.png"), "--long-side", "128"]) == 0
    picture = Image.open(tmp_path / "maps.png")
    assert picture.width > 1200  # twelve layers beside the photo
    assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 30


def make_bad_inputs(folder, photo_file):
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(photo_file.read_bytes()[:20000])
    (folder / "empty").mkdir()
    (folder / "vit").mkdir()
    (folder / "vit" / "config.json").write_text('{"model_type": "vit"}')
    broken = folder / "broken"
    broken.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (broken / name).write_text((type(folder)(default_checkpoint()) / name).read_text())
    (broken / "model.safetensors").write_bytes(b"not safetensors at all")


@pytest.mark.parametrize("command", ["segment", "attention", "segment --task semantic"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.png"], "There is no file"),
        (["text.png"], "is not an image"),
        (["cut.png"], "is damaged"),
        (["cat.png", "--checkpoint", "nowhere"], "is neither a folder with a complete checkpoint nor"),
        (["cat.png", "--checkpoint", "no/such/folder"], "is neither a folder with a complete checkpoint nor"),
        (["cat.png", "--checkpoint", "empty"], "is neither a folder with a complete checkpoint nor"),
        (["cat.png", "--checkpoint", "vit"], "holds a model of type vit"),
        (["cat.png", "--checkpoint", "broken"], "cannot be read"),
        (["cat.png", "-o", "picture.jpg"], "has to end in .png"),
        (["cat.png", "-o", "no/folder.png"], "There is no folder"),
    ],
)
def test_bad_input(photo_file, tmp_path, monkeypatch, capsys, command, arguments, message):
    make_bad_inputs(tmp_path, photo_file)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([*command.split(), "-o", "out.png", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("cbsa: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("task", "title"), [("foreground", "image classifier"), ("semantic", "semantic segmenter")])
def test_model_of_another_task(photo_file, saved_segmenter, tmp_path, capsys, task, title):
    checkpoint = saved_segmenter if task == "foreground" else default_checkpoint()
    command = ["segment", str(photo_file), "-o", str(tmp_path / "out.png"), "--task", task]
    assert main([*command, "--checkpoint", str(checkpoint)]) == 2
    assert f"{checkpoint} is no {title}: " in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
