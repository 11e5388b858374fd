"""Cases of checkpoints: files changed, damaged or hostile, and the ways to use them."""

import io
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cbsa_hf import SlidingWindowSegmenter, ZeroShotSegmenter, cli, load_checkpoint

from . import SCRATCH
from .cases import Case, Folders, Random
from .drawing import damage, pick


CODE = "from pathlib import Path\nPath({marker!r}).write_text('code was run')\n"
ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 10**20, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, "", "x"),
    *("cbsa", "float16", "bfloat16", "float64", "int8", "cuda", "\0", "é" * 500, [], [0], [-1], [1, 2], [[]], ["x"]),
    *({}, {"": ""}, {"0": "a"}, {"0": "a", "5": "b"}, {"height": 0, "width": 0}, {"x": {"y": []}}, [10**9] * 2),
)
ODD_KEYS = {
    "config.json": (
        *("model_type", "architectures", "dtype", "torch_dtype", "auto_map", "quantization_config", "id2label"),
        *("label2id", "num_labels", "attn_implementation", "_attn_implementation", "hidden_act", "layer_norm_eps"),
        *("transformers_version", "return_dict", "output_attentions", "problem_type", "backbone_config", "backbone"),
        *("use_pretrained_backbone", "num_channels", "image_size", "patch_size", "_name_or_path", "out_features"),
    ),
    "preprocessor_config.json": (
        *("image_processor_type", "size", "crop_size", "do_resize", "resample", "image_mean", "image_std", "auto_map"),
        *("rescale_factor", "do_rescale", "do_normalize", "do_convert_rgb", "feature_extractor_type", "size_divisor"),
        *("processor_class", "do_center_crop", "do_reduce_labels", "data_format", "input_data_format", "device"),
    ),
}


def odd_value(random: Random, value: object) -> object:
    """Another value: a variation of this one, or one of [`ODD_VALUES`]."""
    if isinstance(value, dict) and value and random.random() < 0.6:
        return change_json(random, value)
    if isinstance(value, list) and value and random.random() < 0.4:
        return pick(random, (value * 2, value[:-1], [odd_value(random, value[0]), *value[1:]]))
    if isinstance(value, (int, float)) and random.random() < 0.3:
        return pick(random, (-value, value + 1, value * 1000, str(value), [value], float(value)))
    return pick(random, ODD_VALUES)


def change_json(random: Random, content: dict, names: tuple[str, ...] = ()) -> dict:
    """The content with one value changed, removed or added; `names` are keys that may be added."""
    content, keys = dict(content), list(content)
    name, kind = pick(random, keys), random.random()
    if kind < 0.15:
        del content[name]
    elif kind < 0.6 or not names:
        content[name] = odd_value(random, content[name])
    else:
        name = pick(random, names)
        content[name] = odd_value(random, content.get(name))
    return content


def change_text(random: Random, path: Path):
    """Change the values or the bytes of a JSON file."""
    content, kind = json.loads(path.read_text()), random.random()
    if kind < 0.75:
        for _ in range(int(random.integers(1, 4))):
            content = change_json(random, content, ODD_KEYS.get(path.name, ())) or {"": ""}
        path.write_text(json.dumps(content))
        return
    data, depth = path.read_bytes(), int(random.integers(10, 200_000))
    whole = (b"", b"[]", b"null", b"3", b'"x"', b"{", b"[" * depth, b'{"a":' * depth, b"\xff\xfe{}", b"\xef\xbb\xbf{}")
    path.write_bytes(pick(random, (*whole, b'{"a": ' + b"9" * depth + b"}", *(damage(random, data),) * 6)))


def change_tensors(random: Random, path: Path) -> str | None:
    """Change the tensors of a safetensors file. Returns `sentence` if no checkpoint can have such weights."""
    tensors = load_file(path)
    name = pick(random, sorted(key for key, tensor in tensors.items() if tensor.is_floating_point()))
    kind = int(random.integers(8))
    if kind <= 1:
        tensors[name].view(-1)[0] = pick(random, (math.nan, math.inf, -math.inf))
    elif kind == 2:
        tensors = {key: tensor * math.nan for key, tensor in tensors.items()}
    elif kind == 3:
        tensors[name] = pick(random, (tensors[name][None], tensors[name].flatten()[:1], torch.zeros(0)))
    elif kind == 4:
        del tensors[name]
    elif kind == 5:
        tensors["unknown.weight"] = torch.zeros(3)
    elif kind == 6:
        tensors[name] = tensors[name].to(pick(random, (torch.int32, torch.bool, torch.float64, torch.float16)))
    else:
        tensors = {}
    save_file(tensors, path, {"format": "pt"})
    return "sentence" if kind in (0, 1, 2, 4, 7) else None


def change_weights(random: Random, path: Path) -> str | None:
    """Change tensors, header or bytes of a safetensors file. Returns `sentence` if no model can have such weights."""
    data, kind = path.read_bytes(), random.random()
    if kind < 0.4:
        return change_tensors(random, path)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if kind < 0.6:
        name = pick(random, sorted(set(header) - {"__metadata__"}))
        header[name] = change_json(random, header[name], ("dtype", "shape", "data_offsets"))
        text = json.dumps(pick(random, (header, header, change_json(random, header), [], None))).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    elif kind < 0.7:
        length = pick(random, (0, 1, length - 1, length + 1, len(data), 10**8, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + data[8:])
    else:
        pickled = io.BytesIO()
        torch.save({"x": torch.zeros(2)}, pickled)
        page = b"<html>not found</html>"
        others = (
            b"",
            page,
            b"version https://git-lfs.github.com/spec/v1\n",
            pickled.getvalue(),
            data[:-1],
            data + b"x",
        )
        path.write_bytes(pick(random, (*others, *(damage(random, data),) * 6)))
    return None


class Hostile:
    """An object whose pickle opens a file for writing when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def add_code(random: Random, folder: Path, marker: Path) -> str | None:
    """Add files that would run code if the library trusted them. Returns `sentence` if no readable weights remain."""
    kind = int(random.integers(5))
    if kind <= 2:
        path = folder / pick(random, ("config.json", "preprocessor_config.json"))
        content = json.loads(path.read_text())
        classes = ("AutoConfig", "AutoImageProcessor", "AutoModelForImageClassification", "AutoModel", "AutoProcessor")
        content["auto_map"] = dict.fromkeys(classes, "custom.Custom")
        if random.random() < 0.5:
            content |= {"model_type": "custom"} if path.name == "config.json" else {"image_processor_type": "Custom"}
        path.write_text(json.dumps(content))
        (folder / "custom.py").write_text(CODE.format(marker=str(marker)))
        return None
    (folder / "model.safetensors").unlink()
    weights = {"x": Hostile(marker)} if kind == 3 else {"x": torch.zeros(2)}
    torch.save(weights, folder / "pytorch_model.bin")
    return "sentence"


def change_files(random: Random, folder: Path):
    """Remove one of the files, put something else in its place, or add an index to parts that do not exist."""
    path, kind = folder / pick(random, sorted(os.listdir(folder))), int(random.integers(6))
    content = path.read_bytes()
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        index = {"metadata": {}, "weight_map": {"x": pick(random, ("../x", "missing", "/dev/zero", "", 3))}}
        path.write_bytes(content)
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def use_checkpoint(random: Random, folder: Path, output: Path) -> tuple[Callable[[], object], bool]:
    """One of the ways to use a checkpoint, and whether it is a command."""
    photo, name = str(SCRATCH / "models" / "photo.png"), str(folder)
    options = ["--checkpoint", name, "-o", str(output / "out.png")]
    task = "semantic-segmentation" if folder.name == "segmenter" else None
    ways = [
        (lambda: ZeroShotSegmenter(*load_checkpoint(name))(photo).mask, False),
        (lambda: load_checkpoint(name, task), False),
        (lambda: cli.main(["segment", photo, *options]), True),
        (lambda: cli.main(["segment", photo, "--task=semantic", *options]), True),
        (lambda: cli.main(["attention", photo, *options]), True),
        (lambda: cli.main(["inspect", photo, "--checkpoint", name, "-o", str(output / "folder")]), True),
        (lambda: cli.main(["convert", name, "-o", str(output / "folder")]), True),
    ]
    if folder.name == "segmenter":
        ways.append((lambda: SlidingWindowSegmenter(*load_checkpoint(name, task))(photo), False))
    return pick(random, ways)


def make_checkpoint(random: Random, folders: Folders) -> Case:
    """A checkpoint, sound or not, and a way to use it."""
    name = pick(random, ("classifier", "classifier", "segmenter", "segmenter", "encoder"))
    folder = folders.inputs / name
    shutil.copytree(SCRATCH / "models" / name, folder)
    kind, expected = random.random(), None
    if kind < 0.45:
        change_text(random, folder / pick(random, ("config.json", "config.json", "preprocessor_config.json")))
    elif kind < 0.8:
        expected = change_weights(random, folder / "model.safetensors")
    elif kind < 0.9:
        expected = add_code(random, folder, folders.inputs / "marker")
    elif kind < 0.97:
        change_files(random, folder)
    use, is_command = use_checkpoint(random, folder, folders.output)
    return Case(use, expected, (name, "The weights", "The model's outputs"), is_command=is_command)
