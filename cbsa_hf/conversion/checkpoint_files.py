"""Read weights and configurations of other libraries from files, folders and the Hub."""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig

from ..checkpoints.weight_files import one_sentence, read_json
from ..configuration_cbsa import check_counts


TRANSFORMERS_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")


def load_pickle(path: Path) -> object:
    """The tensors in a pickle, or dictionaries and lists of them. Raises any error of torch for other contents."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("It is compressed, as torch does not save, and could be of any size.")
    return torch.load(path, map_location="cpu", weights_only=True)


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor has all its values in memory: it is dense, and its strides repeat no value."""
    if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    The state dict in a file of safetensors or torch: by itself, or under `state_dict` or `model`. A prefix `module.`
    is removed.

    Raises:
        ValueError: the file is no checkpoint, is cut short, or is a pickle with other objects than tensors. Such
            objects are never loaded.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
            prefix = "state_dict."
            weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)} or weights
        else:
            weights = load_pickle(path)
    except PermissionError:
        raise
    except Exception as error:  # torch raises many types: EOFError, KeyError, OSError ...
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # a class or function by name
            raise ValueError(
                f"{path} is a pickle with more in it than tensors, which could run code and is not loaded "
                "(`weights_only=True`); save its state dict alone where it was made."
            ) from error
        raise ValueError(f"{path} is not a checkpoint, or is cut short.") from error
    for name in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(name), dict):
            weights = weights[name]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and is_whole(tensor) for name, tensor in weights.items()
    ):
        raise ValueError(
            f"{path} holds no state dict of dense tensors: neither bare, nor under `state_dict` or `model`."
        )
    return {key.removeprefix("module."): tensor for key, tensor in weights.items()}


def find_weights(source: str) -> Path:
    """
    The file with the weights.

    Args:
        source: the file itself, a folder, or a hub id.

    Returns:
        The path; `config.json`, if there is one, lies beside it.

    Raises:
        ValueError: there is no file of weights.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        try:
            path = Path(snapshot_download(source, allow_patterns=["*.json", "model.safetensors"]))
        except (OSError, HTTPError, HFValidationError) as error:
            raise ValueError(
                f"{source} is neither a file, nor a folder, nor the id of a model that can be reached on the Hub."
            ) from error
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{source} has no model.safetensors or pytorch_model.bin in it.")


def load_source_config(folder: Path) -> PreTrainedConfig:
    """
    The configuration in the folder of a Transformers model.

    Raises:
        ValueError: there is none, or its model cannot be converted.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"There is no {path}, which tells the number of heads and the LayerNorms' epsilon.")
    model_type = read_json(path).get("model_type")
    if model_type not in TRANSFORMERS_TYPES:
        raise ValueError(f"{path} is of a model of type {model_type}; convert takes {', '.join(TRANSFORMERS_TYPES)}.")
    with one_sentence(f"{path} cannot be right"):
        check_counts(read_json(path))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.hidden_act != "gelu":
        raise ValueError(f"The activation is {config.hidden_act!r}; the MLP of a CBSA model has 'gelu'.")
    return config


def read_preprocessing(folder: Path, origin: str) -> dict:
    """
    The `image_mean`, `image_std` and `resample` in the files beside weights of that origin, as far as they say so.
    """
    if origin == "timm":
        said = read_json(folder / "config.json").get("pretrained_cfg")
        said = said if isinstance(said, dict) else {}
        said = {"image_mean": said.get("mean"), "image_std": said.get("std")}
    elif origin == "segmenter":
        variant = folder / "variant.yml"
        text = variant.read_text(encoding="utf-8", errors="replace") if variant.is_file() else ""
        by_half = re.search(r"^\s*normalization: vit$", text, re.MULTILINE)
        said = dict.fromkeys(("image_mean", "image_std"), [0.5] * 3 if by_half else None)
    elif origin in ("vit", "dinov2"):
        said = read_json(folder / "preprocessor_config.json")
    else:
        said = {}
    return {name: said[name] for name in ("image_mean", "image_std", "resample") if said.get(name) is not None}
