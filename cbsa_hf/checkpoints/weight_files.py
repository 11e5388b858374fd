"""
Check the files of a checkpoint before a model is built from them. Any content leads either to a model or to an error
of one sentence, in short time and little memory, and code from the files never runs.
"""

import json
import math
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, StrictDataclassError
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


MAX_JSON_BYTES = 2**22
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SAFETENSORS_FLOATS = re.compile(r"B?F\d")  # F32, BF16, F8_E4M3


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message is one sentence for people."""


def reason(error: BaseException) -> str:
    """The message of an error on one line, without a full stop, cut off after 300 characters."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        return reason(error.__cause__)
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = " ".join(str(error).split())
    return (text[:300] or type(error).__name__).rstrip(".")


@contextmanager
def one_sentence(beginning: str):
    """
    Turns any error inside the `with` block, such as a TypeError or RecursionError of a library, into a
    [`CheckpointError`] whose message is `beginning` and the reason.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{beginning}: {reason(error)}.") from error


def not_found(name: str) -> CheckpointError:
    """The error for a name that is neither a folder nor a hub id."""
    return CheckpointError(
        f"{name} is neither a folder with a complete checkpoint nor the id of one that can be reached on the Hub."
    )


def find_folder(name: str) -> Path:
    """
    The folder of a checkpoint: `name` itself, or a download of that hub id. Raises CheckpointError without either.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"]))
    except (OSError, HTTPError, HFValidationError) as error:
        raise not_found(name) from error


def read_json(path: Path) -> dict:
    """
    The object in a JSON file; an empty dictionary if there is no such file.

    Raises:
        CheckpointError: the file is larger than `MAX_JSON_BYTES`, or does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has more than {MAX_JSON_BYTES >> 20} MiB, too many for a file of settings.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON file.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} has to hold a JSON object, and holds a {type(content).__name__}.")
    return content


def find_shards(folder: Path) -> list[Path]:
    """
    The safetensors files in the folder of a checkpoint.

    Raises:
        CheckpointError: there are none, or only pickles.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = read_json(index).get("weight_map", {})
    if not isinstance(names, dict) or not all(isinstance(n, str) and n == Path(n).name for n in names.values()):
        raise CheckpointError(f"{index} has to name a file in the same folder for each weight.")
    shards = [folder / name for name in sorted(set(names.values()))]
    for shard in shards:
        if not shard.is_file() or shard.suffix != ".safetensors":
            raise CheckpointError(f"{index} names {shard.name}, which is no file of safetensors in that folder.")
    if shards:
        return shards
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]} is a pickle, which could run code and is not loaded; where you trust it, open it "
            "with `from_pretrained` and write it again with `save_pretrained`, as model.safetensors."
        )
    raise CheckpointError(f"{folder} has no {SAFE_WEIGHTS_NAME} in it, so it is not a complete checkpoint.")


def read_header(shards: list[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """
    The names of the weights in safetensors files, with type (as safetensors names it) and shape.

    Raises:
        CheckpointError: a file is not safetensors, or is cut short.
    """
    header = {}
    for path in shards:
        with one_sentence(f"The weights in {path} cannot be read"):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"The weights in {path} cannot be read: it is no file of safetensors.")
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118, it is no dictionary
                    part = weights.get_slice(name)
                    header[name] = part.get_dtype(), tuple(part.get_shape())
    return header


def build_on_meta(build: Callable[[], nn.Module], header: dict[str, tuple[str, tuple[int, ...]]]) -> nn.Module:
    """
    Build a model on the meta device, without memory for its weights.

    Building stops as soon as the model has many more weights than the header, so that no configuration takes long.

    Args:
        build: returns the model.
        header: the weights that it is meant for, see [`read_header`].

    Raises:
        ValueError: the model is much larger than the weights.
    """
    # A weight can become several where names are converted while weights are read.
    most, thread, count = 4 * len(header) + 16, threading.get_ident(), 0
    too_large = ValueError("it describes a model that is much larger than they are")

    def stop_at_most(module, name, parameter):  # called for each parameter of any model, in any thread
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise too_large

    hook = register_module_parameter_registration_hook(stop_at_most)
    try:
        with torch.device("meta"):
            model = build()
    finally:
        hook.remove()
    size = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if size > 4 * sum(math.prod(shape) for _, shape in header.values()) + 2**22:
        raise too_large
    return model


def check_fit(model: nn.Module, header: dict[str, tuple[str, tuple[int, ...]]], prefix: str = ""):
    """
    Raises ValueError if a weight has another shape or kind of type than the model's. Missing weights are not reported.

    Args:
        model: may be on the meta device.
        header: see [`read_header`].
        prefix: prefix of names that only models with a head have.
    """
    for name, tensor in model.state_dict().items():
        there = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in header), None)
        if there is None:
            continue
        dtype, shape = header[there]
        if shape != tuple(tensor.shape):
            raise ValueError(f"`{there}` has the shape {shape}, and the configuration makes it {tuple(tensor.shape)}")
        if tensor.is_floating_point() != bool(SAFETENSORS_FLOATS.match(dtype)):
            raise ValueError(f"`{there}` is of type {dtype}, which its values cannot be")


def check_finite(model: nn.Module, name: str):
    """
    Raises CheckpointError for the first weight with a value that is not a finite number; `name` is for the message.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"The weights of {name} are damaged: `{key}` has values that are not finite, which make every result "
                "meaningless."
            )
