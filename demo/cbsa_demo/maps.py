"""A map over the patches as HTML: its picture, its colours in numbers, and what it shows in words."""

import numpy as np
import torch

from cbsa_hf.interpretability.report import describe_maps

from .drawing import Scale, draw_map


def number(value: float) -> str:
    """Two significant digits."""
    return "0" if value == 0 else f"{value:.2g}"


def colour_bar(scale: Scale, what: str) -> str:
    """Which colour is which value."""
    low = f"&le; {number(scale.low)}" if scale.is_open and scale.signed else number(scale.low)
    high = f"&ge; {number(scale.high)}" if scale.is_open else number(scale.high)
    middle = number((scale.low + scale.high) / 2)
    return (
        f'<div class="bar" role="img" aria-label="Colours from {low} to {high}: {what}">'
        f'<span class="colours" style="background:{scale.gradient()}"></span>'
        f"<span>{low}</span><span>{middle}</span><span>{high}</span></div>"
    )


def strongest(values: np.ndarray) -> str:
    """Where a map is strongest, for those who do not see it."""
    found = describe_maps(torch.from_numpy(values))
    row, column = found["peak"]
    return f"strongest at row {row}, column {column}, spread over {found['patches']:.0f} patches"


def map_stage(values: np.ndarray, scale: Scale, frame: str = "") -> str:
    """A map over the patches, the chosen one marked; a click chooses another."""
    return (
        f'<div class="stage over" data-pick="patch"><img class="map" src="{draw_map(values, scale)}" '
        f'alt="{strongest(values).capitalize()}">{frame}<span class="mark"></span></div>'
    )
