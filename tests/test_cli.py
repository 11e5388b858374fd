"""The `cbsa` command as a process would see it."""

import numpy as np
import pytest
from PIL import Image

from cbsa_hf import ZeroShotSegmenter, default_checkpoint
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


@pytest.mark.parametrize("command", ["segment", "attention"])
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
    assert main([command, "-o", "out.png", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("cbsa: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
