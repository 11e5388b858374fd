"""What visitors choose, checked: one sentence says what was given and what is accepted."""

from collections.abc import Iterable

from cbsa_hf import CBSAConfig

from .photos import PhotoError


MEAN = "mean"  # of the heads, where one is chosen


def heads_of(config: CBSAConfig) -> list[str]:
    """The names of the heads that a visitor may choose, the mean of all first."""
    return [MEAN, *map(str, range(config.num_attention_heads))]


def shown(value: object) -> str:
    """A value as text for a sentence; a long one is cut off."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def whole(value: object, name: str, low: int, high: int) -> int:
    """A whole number in that range, its ends included; a PhotoError for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and low <= value <= high and value == int(value)):
        raise PhotoError(f"The {name} is {shown(value)}; give a whole number from {low} to {high}.")
    return int(value)


def one_of(value: object, name: str, choices: Iterable[str]) -> str:
    """One of some words; a PhotoError for anything else."""
    if not isinstance(value, str) or value not in choices:
        raise PhotoError(f"The {name} is {shown(value)}; choose one of {', '.join(choices)}.")
    return value


def flag(value: object, name: str) -> bool:
    """True or false; a PhotoError for anything else."""
    if not isinstance(value, bool):
        raise PhotoError(f"The switch `{name}` is {shown(value)}; give true or false.")
    return value
