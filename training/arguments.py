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


def check_names(names: list[str], known: list[str], source: str):
    """A ValueError for the first name that is not known; it says the nearest that is."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"{source} names `{name}`, which the script does not know; did you mean `{nearest}`?")


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
        raise ValueError(f"`--{name}` is {value}; choose one of {', '.join(choices)}.")
    return value


def parse_arguments(arguments_class: type[T], argv: list[str] | None = None) -> T:
    """
    Parse `--config RECIPE` and whatever else the command line says, which wins.

    Args:
        arguments_class: a dataclass whose fields are the script's options.
        argv: the command line; that of the process when None.

    Raises:
        ValueError: a recipe or an option that cannot be understood.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = [field.name for field in fields(arguments_class)]
    given = [argument[2:].split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--")]
    check_names(given, [*known, "config", "help"], "The command line")
    parser = HfArgumentParser(arguments_class, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with values for the options above; the command line overrides it")
    config = ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    if path is not None:
        recipe = read_recipe(path)
        check_names(list(recipe), known, f"The recipe {path}")
        from_recipe = []
        for name, value in recipe.items():
            if value is not None:
                from_recipe += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        argv = [*from_recipe, *argv]
    return parser.parse_args_into_dataclasses(argv)[0]
