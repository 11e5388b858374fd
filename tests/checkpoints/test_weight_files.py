"""Foreign or damaged checkpoints give a model or one sentence, and their code never runs."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rewrite_json
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from cbsa_hf import CBSAConfig, default_checkpoint, load_checkpoint
from cbsa_hf.checkpoints.weight_files import CheckpointError


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(default_checkpoint(), tmp_path / "checkpoint"))


def refuse(folder: Path, message: str):
    """Assert that loading raises one sentence and takes little memory, so the model is not built."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as raised:
        load_checkpoint(str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a JSON file"),
        (b"\xff\xfe", "is not a JSON file"),
        (b"[]", "has to hold a JSON object, and holds a list"),
        (b"[" * 100_000 + b"]" * 100_000, "is not a JSON file"),
        (b"[" + b"0," * 2**22 + b"0]", "has more than 4 MiB"),
    ],
    ids=["empty", "bytes", "list", "deep", "long"],
)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_settings_that_are_no_json_object_are_refused(folder, name, content, message):
    (folder / name).write_bytes(content)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` is 1000000000, and has to be at most 10000"),
        ({"num_hidden_layers": 10_000}, "describes a model that is much larger"),
        ({"decoder_num_layers": 10**9}, "`decoder_num_layers` is 1000000000"),
        ({"num_labels": 10**9, "id2label": None}, "`num_labels` is 1000000000"),
        ({"num_labels": "many", "id2label": None}, "`num_labels` is 'many'; give the number"),
        ({"hidden_size": 10**7}, "do not fit its configuration"),
        ({"hidden_size": 10**18}, "do not fit its configuration"),
        ({"representatives_size": 10**5}, "which makes 10000000000 representatives"),
        ({"id2label": ["a", "b"]}, "configuration of .* cannot be read"),
        ({"id2label": {"0": "a", "2": "b"}}, "`id2label` has to number its 2 labels from 0 without a hole"),
        ({"id2label": {"a": "b"}}, "configuration of .* cannot be read"),
        ({"dtype": "float7"}, "`dtype` is 'float7'; choose one of 'float32'"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"ista_threshold": float("nan")}, "`ista_threshold` is nan"),
        ({"layer_norm_eps": float("inf")}, "`layer_norm_eps` is inf, and has to be at most 1000000"),
        ({"ista_step_size": 10**30}, "`ista_step_size` is 10*, and has to be at most 1000000"),
        ({"to_dict": 1}, "`to_dict` is no setting"),
        ({"layer_attention_types": 1}, "`layer_attention_types` is no setting"),
        ({"out_features": 3}, "Field '_out_features' with value 3"),
        ({"backbone_config": {"model_type": []}}, "has the `model_type` \\[\\]"),
        ({"backbone_config": {"model_type": "dinov2", "num_hidden_layers": 10**9}}, "`num_hidden_layers` is 1000000"),
        ({"backbone_config": {"model_type": "swin", "depths": [10**9]}}, "`depths` is \\[1000000000\\]"),
        ({"backbone_config": {"model_type": "dinov2", "hidden_size": "x"}}, "is no configuration of a 'dinov2' model"),
        ({"output_hidden_states": 1.5}, "`output_hidden_states` is 1.5, and has to be true or false"),
        ({"output_attentions": {"a": 1}}, "`output_attentions` is {'a': 1}, and has to be"),
        ({"architectures": 1.5}, "`architectures` is 1.5; give a list"),
        ({"model_type": "bert"}, "holds a model of type bert"),
        ({"model_type": [1]}, "holds a model of type \\[1\\]"),
    ],
    ids=str,
)
def test_bad_configuration_is_refused(folder, changes, message):
    rewrite_json(folder / "config.json", **changes)
    refuse(folder, message)


@pytest.mark.parametrize(
    "values",
    [
        {"id2label": ["a"]},
        {"id2label": {"x": "y"}},
        {"dtype": 3},
        {"torch_dtype": "x"},
        {"out_indices": {}},
        {"quantization_config": [1]},
        {"rope_parameters": "x"},
        {"num_hidden_layers": 10**400},
        {"ista_step_size": 10**400},
        {"attention_type": []},
        {"__class__": 1},
        {"attribute_map": 1},
        {"backbone_config": {"model_type": "dinov2", "id2label": 7}},
    ],
    ids=str,
)
def test_wrong_types_in_a_configuration_raise(values):
    with pytest.raises((ValueError, StrictDataclassError)):
        CBSAConfig.from_dict({"model_type": "cbsa"} | values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": []}, "image processor of .* cannot be used"),
        ({"size": {"height": 10**9, "width": 10**9}}, "each side has to be a whole number from 16 to 16384"),
        ({"crop_size": {"height": 10**9, "width": 10**9}}, "`crop_size` is"),
        ({"size": 3}, "each side has to be a whole number from 16"),
        ({"crop_size": {"height": 32.0, "width": 32.0}}, "each side has to be a whole number"),
        ({"image_std": [0, 0, 0]}, "cannot be used"),
        ({"image_std": [1e300, 1, 1]}, "`image_std` is .*, and has to be at most 1000000"),
        ({"image_mean": [1, 2]}, "cannot be used"),
        ({"image_mean": "x"}, "cannot be used"),
        ({"resample": 99}, "99 is not a valid"),
        ({"rescale_factor": float("inf")}, "cannot be used"),
        ({"image_processor_type": []}, "cannot be used"),
        ({"image_processor_type": "NoSuchProcessor"}, "cannot be used"),
    ],
    ids=str,
)
def test_bad_image_processor_is_refused(folder, changes, message):
    rewrite_json(folder / "preprocessor_config.json", **changes)
    refuse(folder, message)


def edit_header(path: Path, edit):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, struct.pack("<Q", 10**15) + b"{}"], ids=repr)
def test_damaged_safetensors_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refuse(folder, "The weights in .*model.safetensors cannot be read")


def test_weights_of_wrong_type_or_shape_are_refused(folder):
    weights = folder / "model.safetensors"
    edit_header(weights, lambda header: header["classifier.weight"].update(dtype="I16"))
    refuse(folder, "`classifier.weight` is of type I16")
    edit_header(weights, lambda header: header["classifier.weight"].update(dtype="F16", shape=[1920]))
    refuse(folder, "`classifier.weight` has the shape \\(1920,\\), and the configuration makes it \\(10, 192\\)")
    edit_header(weights, lambda header: header["classifier.weight"].update(shape=[10, 10**12]))
    refuse(folder, "cannot be read")
    weights.write_bytes(Path(default_checkpoint(), "model.safetensors").read_bytes()[:-1])
    refuse(folder, "cannot be read")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refuse(folder, "`classifier.bias` has values that are not finite")


def test_outputs_that_overflow_raise(folder, photo):
    """Finite weights can give outputs that overflow. These raise, and are not taken for background."""
    from cbsa_hf import ZeroShotSegmenter, attention_maps

    weights = load_file(folder / "model.safetensors")
    name = "cbsa.layers.3.attention.out_proj.weight"
    weights[name] = weights[name].float() * 1e36
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, processor = load_checkpoint(str(folder))
    for method in ("ncut", "representatives", "attention"):
        with pytest.raises(ValueError, match="outputs are not finite"):
            ZeroShotSegmenter(model, processor, method=method)(photo)
    with pytest.raises(ValueError, match="outputs are not finite"):
        attention_maps(model, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickle_is_refused(folder, name):
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    refuse(folder, f"{name} is a pickle, which could run code and is not loaded")


def test_sharded_weights(folder, shipped):
    model, _ = shipped
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    index = folder / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    loaded, _ = load_checkpoint(str(folder))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    content = json.loads(index.read_text())
    for other in ("../model.safetensors", "/etc/passwd", 3, "gone.safetensors", "config.json"):
        content["weight_map"]["classifier.bias"] = other
        index.write_text(json.dumps(content))
        refuse(folder, "index.json (has to name a file in the same folder|names .*, which is no file of safetensors)")


def test_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    refuse(folder, "holds an adapter; load it with PEFT")


FOREIGN_CODE = (
    "from pathlib import Path\n\nPath(__file__).parents[0].joinpath('ran').touch()\nraise SystemExit('it ran')\n"
)


@pytest.mark.parametrize("kind", ["config", "processor"])
def test_code_of_a_checkpoint_is_not_run(folder, photo, tmp_path, kind):
    photo.save(tmp_path / "cat.png")
    (folder / "own.py").write_text(FOREIGN_CODE)
    if kind == "config":
        rewrite_json(
            folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"}
        )
    else:
        path = folder / "preprocessor_config.json"
        rewrite_json(path, auto_map={"AutoImageProcessor": "own.Own"}, image_processor_type="Own")
    command = ["segment", "cat.png", "-o", "out.png", "--checkpoint", "checkpoint"]
    program = "import sys; from cbsa_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")}
    process = subprocess.run(
        [sys.executable, "-c", program, *command],
        cwd=tmp_path,
        env=environment,
        input="yes\n" * 1000,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("cbsa: ") and process.stderr.count("\n") == 1
    assert process.stdout == ""
    assert not list(tmp_path.rglob("ran")) and not (tmp_path / "out.png").exists()


@pytest.fixture
def teacher(tmp_path) -> Path:
    """The folder of a small ViT that can teach."""
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=224)
    ViTForImageClassification(config).save_pretrained(tmp_path / "teacher")
    ViTImageProcessorPil().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_teacher_is_checked(training, teacher):
    """The folder of a teacher is checked like a checkpoint."""
    from training.tasks.teachers import AutoTeacher

    assert AutoTeacher(str(teacher)).stride == 16
    weights = load_file(teacher / "model.safetensors")

    def refuse_teacher(message):
        with pytest.raises(ValueError, match=message) as raised:
            AutoTeacher(str(teacher))
        assert "\n" not in str(raised.value)

    weights["classifier.bias"][0] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    refuse_teacher("`classifier.bias` has values that are not finite")
    rewrite_json(teacher / "config.json", num_hidden_layers=9_999)
    refuse_teacher("describes a model that is much larger")
    rewrite_json(teacher / "config.json", num_hidden_layers=10**9)
    refuse_teacher("`num_hidden_layers` is 1000000000")
    rewrite_json(teacher / "config.json", num_hidden_layers=1, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (teacher / "own.py").write_text(FOREIGN_CODE)
    refuse_teacher("cannot be loaded")
    (teacher / "model.safetensors").unlink()
    torch.save({}, teacher / "pytorch_model.bin")
    rewrite_json(teacher / "config.json", model_type="vit", auto_map={})
    refuse_teacher("pytorch_model.bin is a pickle")


def test_initial_checkpoint_of_fine_tuning_is_checked(training, folder):
    from transformers import AutoModelForImageClassification

    from training.tasks.heads import load_for_classes

    rewrite_json(folder / "config.json", num_hidden_layers=9_999)
    with pytest.raises(CheckpointError, match="describes a model that is much larger"):
        load_for_classes(AutoModelForImageClassification, str(folder), {0: "a", 1: "b"})
