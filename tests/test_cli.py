"""The `cbsa` command: its files, what it prints, errors, and exit codes."""

import io
import json
import math
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PEAK_MEMORY, ROOT
from PIL import Image
from transformers import AutoImageProcessor, Dinov2Config, SegformerImageProcessorPil

import cbsa_command
from cbsa_hf import (
    CBSAConfig,
    CBSAForSemanticSegmentation,
    SlidingWindowSegmenter,
    ZeroShotSegmenter,
    attention_maps,
    cli,
    default_checkpoint,
)
from cbsa_hf.cli import main
from cbsa_hf.interpretability.attention_maps import exact_maps
from cbsa_hf.interpretability.report import Report
from cbsa_hf.segmentation.images import MAX_PIXELS, to_pixel_values


@pytest.fixture
def photo_file(photo, tmp_path):
    photo.save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_segment_the_foreground(photo, photo_file, shipped, tmp_path, capsys):
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
    segmenter = SlidingWindowSegmenter(tiny_segmenter, processor, long_side=long_side)
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


def test_segment_into_one_class(photo, photo_file, tiny_config, tmp_path, capsys):
    """A model with one label marks the class where the sigmoid is above 0.5, and the background elsewhere."""
    torch.manual_seed(0)
    tiny_config.id2label, tiny_config.label2id = {0: "fur"}, {"fur": 0}
    model = CBSAForSemanticSegmentation(tiny_config).eval()
    processor = SegformerImageProcessorPil(size={"height": 300, "width": 451})
    pixel_values = processor(photo, do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model.decoder.mask_norm.bias -= model(pixel_values).logits.median()
        probabilities = model(pixel_values).logits[0, 0].sigmoid().numpy()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    command = ["segment", str(photo_file), "-o", str(tmp_path / "x.png"), "--task", "semantic"]
    assert main([*command, "--checkpoint", str(folder)]) == 0
    labels = np.asarray(Image.open(tmp_path / "x_mask.png"))
    clear = np.abs(probabilities - 0.5) > 1e-4
    assert np.array_equal(labels[clear], (probabilities > 0.5)[clear])
    share = labels.mean()
    assert 0.1 < share < 0.9
    printed = capsys.readouterr().out
    assert f"fur {share:.0%}" in printed and f"background {1 - share:.0%}" in printed


MEASURE_MEMORY = (
    PEAK_MEMORY
    + """
import sys

from cbsa_hf.cli import main

before = peak_memory()
assert main(sys.argv[1:]) == 0
print((peak_memory() - before) / 1000)
"""
)


def test_memory_of_the_largest_photo(tmp_path):
    """The file is small, and has the largest number of pixels allowed, in a mode that is converted."""
    side = math.isqrt(MAX_PIXELS)
    Image.new("RGBA", (side, side), (9, 99, 200, 128)).save(tmp_path / "large.png")
    command = ["segment", str(tmp_path / "large.png"), "-o", str(tmp_path / "x.png")]
    result = subprocess.run([sys.executable, "-c", MEASURE_MEMORY, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[-1]) < 300  # MB, without the imports


def test_pictures_of_attention(photo_file, tmp_path):
    assert main(["attention", str(photo_file), "-o", str(tmp_path / "maps.png"), "--long-side", "128"]) == 0
    picture = Image.open(tmp_path / "maps.png")
    assert picture.width > 1200  # twelve layers beside the photo
    assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 30


@pytest.mark.parametrize("patch", [None, (1, 2)])
def test_report_of_inspect(photo, photo_file, shipped, tmp_path, capsys, patch):
    folder = tmp_path / "report"
    folder.mkdir()  # an empty folder is accepted
    arguments = [] if patch is None else ["--patch", *map(str, patch)]
    assert main(["inspect", str(photo_file), "-o", str(folder), "--long-side", "64", *arguments]) == 0
    assert "report.json and 15 pictures" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "report"]
    report = json.loads((folder / "report.json").read_text())
    parts = ("attention", "exact_map", "measures")
    pictures = [*(report[part]["picture"] for part in parts), *report["representatives"]["pictures"]]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["report.json", *pictures])
    for name in pictures:
        assert len(set(Image.open(folder / name).convert("L").resize((64, 64)).tobytes())) > 30

    model, processor = shipped
    pixel_values = to_pixel_values(photo, processor, 64, 8)
    assert (report["input"], report["grid"]) == ([40, 64], [5, 8])
    assert report["query"] == ("CLS" if patch is None else "patch (1, 2)")
    probabilities = model(pixel_values, interpolate_pos_encoding=True).logits[0].softmax(-1)
    assert report["predictions"][0]["probability"] == pytest.approx(probabilities.max().item(), rel=1e-4)
    maps = attention_maps(model, pixel_values, patch)[:, 0]
    assert report["attention"]["exact"] is False
    np.testing.assert_allclose(report["attention"]["values"], maps, rtol=1e-4)
    token = 0 if patch is None else 1 + 1 * 8 + 2
    dense = torch.stack(
        [layer.dense()[0, :, token, 1:].unflatten(-1, (5, 8)) for layer in exact_maps(model, pixel_values)]
    )
    assert report["exact_map"]["exact"] is True
    np.testing.assert_allclose(report["exact_map"]["values"], dense, rtol=1e-3, atol=1e-5)
    peaks = np.asarray(report["representatives"]["reads"][7]["peak"])
    attention = exact_maps(model, pixel_values)[7].representative_attentions[0, ..., 1:]
    assert (peaks @ [8, 1] == attention.argmax(-1).numpy()).all()
    assert np.asarray(report["measures"]["coding_rate_after"]).shape == (12, 3)


def make_bad_inputs(folder, photo_file):
    """Write files that the commands refuse."""
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(photo_file.read_bytes()[:20000])
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file.txt").write_text("mine")
    (folder / "vit").mkdir()
    (folder / "vit" / "config.json").write_text('{"model_type": "vit"}')
    broken = folder / "broken"
    broken.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (broken / name).write_text(Path(default_checkpoint(), name).read_text())
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
def test_bad_input_is_one_sentence(photo_file, tmp_path, monkeypatch, capsys, command, arguments, message):
    make_bad_inputs(tmp_path, photo_file)
    monkeypatch.chdir(tmp_path)
    check_refusal([*command.split(), "-o", "out.png", *arguments], message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.png"], "There is no file"),
        (["cut.png"], "is damaged"),
        (["cat.png", "--checkpoint", "vit"], "holds a model of type vit"),
        (["cat.png", "--checkpoint", "broken"], "cannot be read"),
        (["cat.png", "--long-side", "64", "--patch", "5", "0"], "outside the grid of 5 x 8 patches"),
        (["cat.png", "-o", "full"], "is not an empty folder"),
        (["cat.png", "-o", "cat.png"], "is not an empty folder"),
        (["cat.png", "-o", "no/folder"], "There is no folder"),
    ],
)
def test_bad_input_of_inspect_is_one_sentence(photo_file, tmp_path, monkeypatch, capsys, arguments, message):
    make_bad_inputs(tmp_path, photo_file)
    monkeypatch.chdir(tmp_path)
    check_refusal(["inspect", "-o", "report", *arguments], message, tmp_path, capsys)


def test_inspect_that_fails_leaves_nothing(photo_file, tmp_path, monkeypatch, capsys):
    def save(image, path, **options):
        path.write_bytes(b"half a picture")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", save)
    report = Report({}, {"attention.png": Image.new("RGB", (8, 8))})
    monkeypatch.setattr("cbsa_hf.interpretability.report.inspect_photo", lambda *args: report)
    check_refusal(["inspect", str(photo_file), "-o", str(tmp_path / "report")], "is full", tmp_path, capsys)


def check_refusal(arguments, message, folder, capsys):
    """Assert that the command prints one sentence, exits with 2, and writes nothing."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()  # discard what was printed before, such as progress bars
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("cbsa: ")
    assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_classifier_is_refused_for_semantic_segmentation(photo_file, tmp_path, capsys):
    command = ["segment", str(photo_file), "-o", str(tmp_path / "out.png"), "--task", "semantic"]
    assert main([*command, "--checkpoint", default_checkpoint()]) == 2
    assert f"{default_checkpoint()} is no semantic segmenter: " in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("command", ["segment", "attention", "inspect"])
@pytest.mark.parametrize("kind", ["encoder", "segmenter"])
def test_commands_need_no_classifier(photo_file, tiny_model, shipped, saved_segmenter, tmp_path, command, kind):
    """The commands work for a segmenter, and for an encoder without head, as `cbsa convert` makes from DINOv2."""
    checkpoint = saved_segmenter
    if kind == "encoder":
        checkpoint = tmp_path / "encoder"
        tiny_model.cbsa.save_pretrained(checkpoint)
        shipped[1].save_pretrained(checkpoint)
    output = tmp_path / ("report" if command == "inspect" else "out.png")
    arguments = [command, str(photo_file), "-o", str(output), "--long-side", "48"]
    assert main([*arguments, "--checkpoint", str(checkpoint)]) == 0
    if command == "inspect":
        report = json.loads((output / "report.json").read_text())
        assert report["predictions"] == []
        output = output / "attention.png"
    assert len(set(Image.open(output).convert("L").resize((64, 64)).tobytes())) > 30


def test_backbone_of_another_type_is_refused(photo_file, tmp_path, capsys):
    backbone = Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    model = CBSAForSemanticSegmentation(CBSAConfig(backbone_config=backbone))
    folder = tmp_path / "segmenter"
    model.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(default_checkpoint()).save_pretrained(folder)
    for command in ("attention", "inspect", "segment"):
        output = tmp_path / ("report" if command == "inspect" else "out.png")
        arguments = [command, str(photo_file), "-o", str(output), "--checkpoint", str(folder)]
        check_refusal(arguments, "This segmenter has a backbone of type 'dinov2'", tmp_path, capsys)


@pytest.mark.parametrize("name", ["cat.png", "link.png", "hard.png", "./cat.png"])
@pytest.mark.parametrize("command", ["segment", "attention", "segment --mask"])
def test_photo_is_never_overwritten(photo_file, tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to(photo_file)
    (tmp_path / "hard.png").hardlink_to(photo_file)
    before = photo_file.read_bytes()
    outputs = ["-o", "out.png", "--mask", name] if command.endswith("--mask") else ["-o", name]
    arguments = [command.split()[0], "cat.png", *outputs, "--force"]
    check_refusal(arguments, "is the photo cat.png itself", tmp_path, capsys)
    assert photo_file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.png", "--mask", "out.png"], "the mask needs another"),
        (["-o", "out.png", "--mask", "./sub/../out.png"], "the mask needs another"),
        (["-o", "folder.png"], "is a folder"),
        (["-o", "out.png", "--mask", "folder.png"], "is a folder"),
        (["-o", "there.png"], "there.png exists; name another file, or give --force"),
        (["-o", "gone.png"], "gone.png exists"),  # a dangling link
        (["-o", "out.png", "--mask", "there.png"], "there.png exists"),
        (
            ["-o", "out.png", "--task", "semantic", "--method", "ncut"],
            "`--method` has no effect with `--task sem",
        ),
        (["-o", "out.png", "--task", "semantic", "--segments", "4"], "`--segments` has no effect"),
        (["cat.png", "other.png", "-o", "new", "--mask", "m.png"], "`--mask` names the mask of one photo"),
        (["other.png", "-o", "there.png"], "is a file; name a folder for several photos"),
        (["sub/cat.jpg", "-o", "new"], "would be made of cat.png and of sub/cat.jpg"),
        (["no*.png", "-o", "new"], "There is no file that no*.png fits"),
        (["sub/none", "-o", "new"], "has no images in it"),
    ],
)
def test_arguments_are_checked_before_a_checkpoint_is_loaded(
    photo_file, photo, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cbsa_hf.cli.load_checkpoint", lambda *_: pytest.fail("a checkpoint was loaded"))
    for folder in ("folder.png", "sub", "sub/none"):
        (tmp_path / folder).mkdir()
    (tmp_path / "there.png").write_text("mine")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    photo.save("other.png")
    photo.save("sub/cat.jpg")
    check_refusal(["segment", "cat.png", *arguments], message, tmp_path, capsys)


def test_force_replaces_files(photo_file, tmp_path):
    (tmp_path / "out.png").write_text("old")
    for command in ("segment", "attention"):
        assert main([command, str(photo_file), "-o", str(tmp_path / "out.png"), "--long-side", "48", "--force"]) == 0
        Image.open(tmp_path / "out.png").load()


@pytest.mark.parametrize("named_by", ["names", "folder", "pattern"])
def test_several_photos(photo, photo_file, shipped, tmp_path, monkeypatch, capsys, named_by):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    photo.rotate(90, expand=True).save("in/a.jpg", quality=95)
    photo.save("in/b.PNG")
    photo.save("in/d.png")
    (tmp_path / "in/c.png").write_bytes(photo_file.read_bytes()[:20000])
    (tmp_path / "in/notes.txt").write_text("no photo")
    (tmp_path / "out/d_mask.png").write_text("mine")
    names = {"names": ["in/a.jpg", "in/b.PNG", "in/c.png", "in/d.png"], "folder": ["in"], "pattern": ["in/*.[jpP]*"]}
    assert main(["segment", *names[named_by], "-o", "out"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("of the pixels are foreground") == 2
    assert "0/4" in captured.err
    assert not [line for line in shown(captured.err) if "/4" in line]  # the progress bar is erased
    last = captured.err.splitlines()[-3:]
    assert last[0] == "cbsa: 2 of 4 photos could not be segmented:"
    assert "in/c.png is damaged" in last[1] and "out/d_mask.png exists" in last[2]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a.png", "a_mask.png", "b.png", "b_mask.png", "d_mask.png"]
    assert (tmp_path / "out/d_mask.png").read_text() == "mine"
    segmenter = ZeroShotSegmenter(*shipped)
    for name, source in (("a", "in/a.jpg"), ("b", "in/b.PNG")):
        assert np.array_equal(np.asarray(Image.open(f"out/{name}_mask.png")), segmenter(source).mask)


def test_several_photos_into_their_own_folder(photo_file, photo, tmp_path, monkeypatch, capsys):
    """The overlay of a .png photo would overwrite the photo."""
    monkeypatch.chdir(tmp_path)
    photo.save("dog.jpg", quality=95)
    before = photo_file.read_bytes()
    assert main(["segment", "cat.png", "dog.jpg", "-o", ".", "--force", "--long-side", "48"]) == 1
    assert "cat.png is the photo cat.png itself" in capsys.readouterr().err
    assert photo_file.read_bytes() == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"cat.png", "dog.jpg", "dog.png", "dog_mask.png"}


def test_missing_checkpoint_leaves_no_folder(photo_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["segment", "cat.png", "nothing.png", "-o", "new", "--checkpoint", "nowhere"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("cbsa: nowhere is neither a folder")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["segment", "attention", "inspect"])
def test_photo_on_standard_input(photo, photo_file, tiny_segmenter, saved_segmenter, tmp_path, monkeypatch, command):
    class Stdin:
        buffer = io.BytesIO(photo_file.read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    output = tmp_path / ("report" if command == "inspect" else "out.png")
    assert main([command, "-", "-o", str(output), "--long-side", "64", "--checkpoint", str(saved_segmenter)]) == 0
    if command == "segment":
        processor = AutoImageProcessor.from_pretrained(saved_segmenter)
        expected = ZeroShotSegmenter(tiny_segmenter, processor, long_side=64)(photo).mask
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out_mask.png")), expected)


def test_limits_of_pixels_and_ratio(photo_file, tmp_path, capsys):
    arguments = ["segment", str(photo_file), "-o", str(tmp_path / "out.png")]
    check_refusal([*arguments, "--max-pixels", "135000"], "the limit is 135,000; raise", tmp_path, capsys)
    check_refusal([*arguments, "--max-ratio", "1.1"], "the limit for the ratio of the sides is 1.1", tmp_path, capsys)


def shown(printed: str) -> list[str]:
    """The lines that a terminal shows: text after a carriage return overwrites the line."""
    lines = []
    for line in printed.split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).strip())
    return [line for line in lines if line]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("sources", [["cat.png"], ["cat.png", "dog.png"]])
def test_interruption_while_writing_leaves_no_files(
    photo_file, photo, tmp_path, monkeypatch, capsys, sources, terminal
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    photo.save("dog.png")
    save, saved = Image.Image.save, []

    def interrupt(image, path, **options):
        save(image, path, **options)
        saved.append(path)
        if len(saved) == 2:  # mask and overlay are written, but not renamed
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    output = "out.png" if len(sources) == 1 else "out"
    assert main(["segment", *sources, "-o", output, "--long-side", "48"]) == 130
    error = capsys.readouterr().err
    assert shown(error) == ["cbsa: Interrupted."]
    assert ("photo" in error) == (terminal and len(sources) == 2)  # the progress bar names photos
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "dog.png"]


@pytest.mark.parametrize("seconds", [1, 3])
def test_ctrl_c_is_one_sentence(photo_file, tmp_path, seconds):
    """Ctrl-C during the imports, and later during the work (on a slow machine still during the imports)."""
    for index in range(200):
        (tmp_path / f"cat{index}.png").hardlink_to(photo_file)
    arguments = [str(ROOT / "cbsa_command.py"), "segment", str(tmp_path), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # If pytest runs in the background of a shell, it ignores SIGINT, and so do its child processes.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error == "cbsa: Interrupted.\n"
    assert not list(tmp_path.rglob("*partial*"))


def swallow():
    """Catch an interruption, as some libraries do while they are imported."""
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    return 0


def ignore():
    """Be interrupted in a destructor, where Python ignores exceptions."""

    class Last:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    Last()
    time.sleep(10)
    raise AssertionError("the KeyboardInterrupt was not raised again")


@pytest.mark.parametrize("work", [swallow, ignore])
def test_interruption_is_not_lost(monkeypatch, capsys, work):
    monkeypatch.setattr(cli, "main", work)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cbsa_command.main() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "cbsa: Interrupted.\n"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny_model, saved_segmenter, photo_file, tmp_path, dtype):
    """Every command works with checkpoints in half precision, and its numbers are finite."""
    folders = {"classifier": tmp_path / "classifier", "segmenter": saved_segmenter}
    tiny_model.to(dtype).save_pretrained(folders["classifier"])
    AutoImageProcessor.from_pretrained(saved_segmenter).save_pretrained(folders["classifier"])
    CBSAForSemanticSegmentation.from_pretrained(saved_segmenter, dtype=dtype).save_pretrained(saved_segmenter)
    number = 0
    for name, commands in {
        "classifier": ["segment", "segment --segments 3", "segment --method attention", "attention", "inspect"],
        "segmenter": ["segment", "segment --task semantic", "attention", "inspect --patch 1 1"],
    }.items():
        for command in commands:
            output = tmp_path / (f"{number}.png" if command.split()[0] != "inspect" else str(number))
            number += 1
            arguments = ["--long-side", "48", "--checkpoint", str(folders[name]), "-o", str(output)]
            assert main([*command.split(), str(photo_file), *arguments]) == 0, command
            assert json.loads((folders[name] / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
            if command.startswith("inspect"):
                json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)  # NaN and infinity
            else:
                assert np.asarray(Image.open(output).convert("RGB")).std() > 10


def test_error_with_a_line_break_in_a_name_is_one_line(capsys):
    assert main(["segment", "no\nphoto.png", "-o", "overlay.png"]) == 2
    assert capsys.readouterr().err == "cbsa: There is no file no photo.png.\n"
    with pytest.raises(SystemExit):
        main(["segment", "photo.png", "-o", "overlay.png", "--no\nsuch"])
    assert capsys.readouterr().err.splitlines()[-1] == "cbsa: error: unrecognized arguments: --no such"
