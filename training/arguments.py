"""Arguments of a training script: a YAML recipe, overridden by the command line."""

import difflib
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser


T = TypeVar("T")

LEAST = {
    "batch_size": 1,
    "checkpointing_steps": 1,
    "crop_sizes": 1,
    "gradient_accumulation_steps": 1,
    "image_size": 1,
    "keep_checkpoints": 1,
    "num_epochs": 1,
    "num_train_images": 1,
    "num_workers": 0,
    "picture_epochs": 1,
    "validation_epochs": 1,
}
NEEDED = {"num_train_images": "streaming", "teacher_cache": "teacher"}  # by the option that does nothing without it


def check_names(names: list[str], known: list[str], source: str):
    """A ValueError for the first name that is not known; it says one that is and looks like it."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{nearest[0]}`?" if nearest else "`--help` lists those that it knows."
            raise ValueError(f"{source} names `{name}`, which the script does not know; {hint}")


def check_values(args: object):
    """A ValueError for an option below its [`LEAST`] value, or without the one that it is [`NEEDED`] with."""
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        smallest = min(value) if isinstance(value, list) else value
        if smallest is not None and smallest < least:
            raise ValueError(f"`--{name}` is {smallest}, and has to be at least {least}.")
    for name, needed in NEEDED.items():
        if getattr(args, name, None) is not None and not getattr(args, needed):
            raise ValueError(f"`--{name}` does nothing without `--{needed}`.")


def read_recipe(path: str) -> dict:
    """
    The values of a recipe.

    Raises:
        ValueError: no such file, or not a mapping in YAML.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} has to be a list of `name: value` lines.")
    return {str(name): value for name, value in recipe.items()}


def find_value(name: str, choices: Iterable[str]) -> str:
    """
    The value of one option that decides which others there are, from the process's command line or its recipe.

    Raises:
        ValueError: it is not given, or none of the choices.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument(f"--{name}")
    given = parser.parse_known_args()[0]
    value = getattr(given, name)
    if value is None and given.config is not None:
        value = read_recipe(given.config).get(name)
    if value not in choices:
        given = "not given" if value is None else value
        raise ValueError(f"`--{name}` is {given}; choose one of {', '.join(choices)}.")
    return value


def parse_arguments(arguments_class: type[T], argv: list[str] | None = None) -> T:
    """
    Parse `--config RECIPE` and whatever else the command line says, which wins.

    Args:
        arguments_class: a dataclass whose fields are the script's options.
        argv: the command line; that of the process when None.

    Raises:
        ValueError: a recipe or an option that cannot be understood, or is out of bounds.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(arguments_class, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with values for the options above; the command line overrides it")
    known = [option[2:].replace("-", "_") for action in parser._actions for option in action.option_strings]
    given = [argument[2:].split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--")]
    check_names(given, known, "The command line")
    config = ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    if path is not None:
        recipe = read_recipe(path)
        check_names(list(recipe), [f.name for f in fields(arguments_class) if f.init], f"The recipe {path}")
        from_recipe = []
        for name, value in recipe.items():
            if value is not None:
                from_recipe += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        argv = [*from_recipe, *argv]
    args = parser.parse_args_into_dataclasses(argv)[0]
    check_values(args)
    return args
