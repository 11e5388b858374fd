"""`cbsa export`: what is written computes what the model computes."""

import sys

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoImageProcessor

from cbsa_hf import exporting
from cbsa_hf.cli import main


def save(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["encoder", "classifier", "classifier in bfloat16", "segmenter"])
def test_export(tiny_model, saved_segmenter, tiny_segmenter, tmp_path, capsys, kind):
    processor = AutoImageProcessor.from_pretrained(saved_segmenter)
    model = {"encoder": tiny_model.cbsa, "segmenter": tiny_segmenter}.get(kind, tiny_model)
    if kind == "classifier in bfloat16":
        model.bfloat16()
    folder = save(model, processor, tmp_path / "model")
    assert main(["export", str(folder), "-o", str(tmp_path / "exported")]) == 0
    assert "onnx, differs by " in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "exported" / "model.onnx")
    options = {} if kind == "segmenter" else {"interpolate_pos_encoding": True}
    for shape in [(2, 3, 32, 48), (1, 3, 41, 33)]:
        pixel_values = torch.randn(shape)
        with torch.no_grad():
            expected = model.float()(pixel_values, **options)
        (found,) = session.run(None, {"pixel_values": pixel_values.numpy()})
        np.testing.assert_allclose(found, expected[0], rtol=1e-3, atol=1e-3)
    again = AutoImageProcessor.from_pretrained(tmp_path / "exported")
    assert again.to_dict() == processor.to_dict()


def test_nothing_is_written_that_differs(tiny_model, saved_segmenter, tmp_path, monkeypatch, capsys):
    folder = save(tiny_model, AutoImageProcessor.from_pretrained(saved_segmenter), tmp_path / "model")

    def other_engine(program, name, folder):
        (folder / "model.onnx").touch()
        return lambda pixel_values: program.module()(torch.from_numpy(pixel_values)).detach().numpy() * 1.01

    monkeypatch.setitem(exporting.FORMATS, "onnx", other_engine)
    assert main(["export", str(folder), "-o", str(tmp_path / "exported")]) == 2
    assert "differ by 1.0e-02 of the largest" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "segmenter"]


def test_a_missing_package(tiny_model, saved_segmenter, tmp_path, monkeypatch, capsys):
    folder = save(tiny_model, AutoImageProcessor.from_pretrained(saved_segmenter), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(folder), "-o", str(tmp_path / "exported")]) == 2
    assert "`pip install cbsa-hf[export]`" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
