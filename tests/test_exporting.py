"""`cbsa export`: exported files give the same outputs as the model."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor import config as inductor_config
from transformers import AutoImageProcessor

from cbsa_hf import CBSAConfig, exporting, open_export
from cbsa_hf.cli import main


@pytest.fixture(autouse=True)
def all_instructions(monkeypatch):
    """Unset a variable with which OpenVINO crashes and is refused. CI sets it."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.fixture
def tiny_config(tiny_config):
    """One layer, since engines take long to prepare each."""
    sizes = {"num_hidden_layers": 1, "out_features": None, "out_indices": None}
    return CBSAConfig(**tiny_config.to_dict() | sizes)


def save(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


CASES = [
    ("onnx", "encoder"),
    ("onnx", "classifier in bfloat16"),
    ("onnx", "segmenter"),
    ("openvino", "classifier"),
    ("openvino", "segmenter"),
    ("aoti", "classifier"),
]


@inductor_config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"})  # compiles in seconds
@pytest.mark.parametrize(("format", "kind"), CASES)
def test_export_gives_the_same_outputs(tiny_model, saved_segmenter, tiny_segmenter, tmp_path, capsys, format, kind):
    processor = AutoImageProcessor.from_pretrained(saved_segmenter)
    model = {"encoder": tiny_model.cbsa, "segmenter": tiny_segmenter}.get(kind, tiny_model)
    if kind == "classifier in bfloat16":
        model.bfloat16()
    folder, output = save(model, processor, tmp_path / "model"), tmp_path / "exported"
    assert main(["export", str(folder), "-o", str(output), "--format", format]) == 0
    assert f"{format}, differs by " in capsys.readouterr().out
    engine = open_export(output)
    options = {} if kind == "segmenter" else {"interpolate_pos_encoding": True}
    for shape in [(2, 3, 32, 48), (1, 3, 41, 33)]:
        pixel_values = torch.randn(shape)
        with torch.no_grad():
            expected = model.float()(pixel_values, **options)
        found = engine(pixel_values.numpy())
        np.testing.assert_allclose(found, expected[0], rtol=1e-3, atol=1e-3)
    again = AutoImageProcessor.from_pretrained(output)
    assert again.to_dict() == processor.to_dict()


def test_lower_precisions_are_close(tiny_model, saved_segmenter, tmp_path, capsys):
    """Outputs in bfloat16 and 8 bits are close to the model. The file has quantised operations."""
    processor = AutoImageProcessor.from_pretrained(saved_segmenter)
    folder = save(tiny_model, processor, tmp_path / "model")
    generator = np.random.default_rng(0)
    for i in range(4):
        photo = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(photo).save(tmp_path / f"{i}.png")
    output, photos = tmp_path / "exported", str(tmp_path / "*.png")
    assert main(["export", str(folder), "-o", str(output), "--format", "openvino", "--int8", photos]) == 0
    assert "openvino in 8 bits, differs by " in capsys.readouterr().out
    assert "FakeQuantize" in (output / "model.xml").read_text()

    pixel_values = processor(Image.fromarray(photo), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = tiny_model(pixel_values, interpolate_pos_encoding=True).logits
    for precision in ("float32", "bfloat16"):
        found = torch.from_numpy(open_export(output, precision)(pixel_values.numpy()))
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_export_that_differs_is_not_written(tiny_model, saved_segmenter, tmp_path, monkeypatch, capsys):
    folder = save(tiny_model, AutoImageProcessor.from_pretrained(saved_segmenter), tmp_path / "model")
    onnx = exporting.FORMATS["onnx"]

    def open_another(path):
        engine = onnx.open(path)
        return lambda pixel_values: engine(pixel_values) * 1.01

    monkeypatch.setitem(exporting.FORMATS, "onnx", replace(onnx, open=open_another))
    assert main(["export", str(folder), "-o", str(tmp_path / "exported")]) == 2
    assert "differ by 1.0e-02 of the largest" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "segmenter"]


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_missing_package_is_one_sentence(tiny_model, saved_segmenter, tmp_path, monkeypatch, capsys, format, package):
    folder = save(tiny_model, AutoImageProcessor.from_pretrained(saved_segmenter), tmp_path / "model")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(folder), "-o", str(tmp_path / "exported"), "--format", format]) == 2
    assert "`pip install cbsa-hf[export]`" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_bad_arguments_raise(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="8 bits are for the format 'openvino', not for 'onnx'"):
        exporting.export_model(tiny_model, None, tmp_path / "exported", "onnx", calibration=[])
    with pytest.raises(ValueError, match="is not the folder of an export"):
        open_export(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match="no precision 'float8'; choose one of float32, bfloat16"):
        open_export(tmp_path, "float8")
    with pytest.raises(ValueError, match="'onnx' has the precision float32 alone"):
        open_export(tmp_path, "bfloat16")


def test_openvino_is_refused_where_it_would_crash(tiny_model, saved_segmenter, tmp_path, monkeypatch, capsys):
    """OpenVINO is refused both for export and for opening."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    folder = save(tiny_model, AutoImageProcessor.from_pretrained(saved_segmenter), tmp_path / "model")
    assert main(["export", str(folder), "-o", str(tmp_path / "exported"), "--format", "openvino"]) == 2
    assert "OpenVINO crashes where ONEDNN_MAX_CPU_ISA is set" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
    (tmp_path / "model.xml").touch()
    with pytest.raises(ValueError, match="unset this variable"):
        open_export(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler has another name on Windows")
@inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
def test_missing_compiler_raises(tmp_path):
    with pytest.raises(ValueError, match="'aoti' needs a C"):
        exporting.write_aoti(None, "logits", tmp_path / "model.pt2")
