"""What `cbsa convert` reads: weights and configurations of other libraries, from files, folders and the Hub."""

import json
import pickle
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig


TRANSFORMERS_TYPES = ("vit", "deit", "dinov2")


def read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file.") from error
    return content if isinstance(content, dict) else {}


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    State dict in a file of safetensors or torch: bare, or under `state_dict` or `model`, with or without `module.`.

    Raises:
        ValueError: not a checkpoint, cut short, or a pickle with more in it than tensors, which is never loaded.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
            prefix = "state_dict."
            weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)} or weights
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # whatever the bytes lead torch to: EOFError, KeyError, OSError ...
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # a class or function by name
            raise ValueError(
                f"{path} is a pickle with more in it than tensors, which could run code and is not loaded "
                "(`weights_only=True`); save its state dict alone where it was made."
            ) from error
        raise ValueError(f"{path} is not a checkpoint, or is cut short.") from error
    for name in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(name), dict):
            weights = weights[name]
    if not isinstance(weights, dict) or not all(torch.is_tensor(tensor) for tensor in weights.values()):
        raise ValueError(f"{path} holds no state dict: neither bare, nor under `state_dict` or `model`.")
    return {key.removeprefix("module."): tensor for key, tensor in weights.items()}


def find_weights(source: str) -> Path:
    """
    The file with the weights of a file, folder or hub id; `config.json`, if there is one, lies beside it.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        try:
            path = Path(snapshot_download(source, allow_patterns=["*.json", "model.safetensors"]))
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"{source} is neither a file, nor a folder, nor the id of a model that can be reached on the Hub."
            ) from error
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{source} has no model.safetensors or pytorch_model.bin in it.")


def load_source_config(folder: Path) -> PreTrainedConfig:
    """
    Configuration in the folder of a Transformers model.

    Raises:
        ValueError: there is none, or it is of a model that cannot be converted.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"There is no {path}, which tells the number of heads and the LayerNorms' epsilon.")
    model_type = read_json(path).get("model_type")
    if model_type not in TRANSFORMERS_TYPES:
        raise ValueError(f"{path} is of a model of type {model_type}; convert takes {', '.join(TRANSFORMERS_TYPES)}.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{path} cannot be right: {error.__cause__}") from error
    if config.hidden_act != "gelu":
        raise ValueError(f"The activation is {config.hidden_act!r}; the MLP of a CBSA model has 'gelu'.")
    return config


def read_preprocessing(folder: Path, origin: str) -> dict:
    """What the files beside weights of that origin say of `image_mean`, `image_std` and `resample`, if they do."""
    if origin == "timm":
        said = read_json(folder / "config.json").get("pretrained_cfg") or {}
        said = {"image_mean": said.get("mean"), "image_std": said.get("std")}
    elif origin == "segmenter":
        variant = folder / "variant.yml"
        by_half = variant.is_file() and re.search(r"^\s*normalization: vit$", variant.read_text(), re.MULTILINE)
        said = dict.fromkeys(("image_mean", "image_std"), [0.5] * 3 if by_half else None)
    elif origin in ("vit", "dinov2"):
        said = read_json(folder / "preprocessor_config.json")
    else:
        said = {}
    return {name: said[name] for name in ("image_mean", "image_std", "resample") if said.get(name) is not None}
