"""The claims about the operator alone: 5 and 6. Each function takes a workbench and returns a finding."""

import math
import time
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.synthetic import (
    distance_to_subspaces,
    draw_union_of_subspaces,
    iterate_operator,
    operator_of_bases,
)
from benchmarks.workbench import FAILS, HOLDS, OPEN, Finding, Workbench, spread, table
from cbsa_hf.attention_cbsa import ATTENTIONS, PooledRepresentatives, SelfAttention
from cbsa_hf.interpretability.measures import coding_rate
from cbsa_hf.interpretability.plots import line_panels, render


SIDES, TIMED_SIDES = (8, 16, 32, 64, 128), (8, 16, 32, 64)  # claim 5: sides of the grids, in patches
NUM_STEPS = 12  # claim 6


def build_operator(name: str) -> SelfAttention:
    """An operator with width 192 and 3 heads. If it has representatives, they are 8 x 8; 5 x 5 for `mita`."""
    return ATTENTIONS[name](192, 3, 64, PooledRepresentatives(5 if name == "mita" else 8, 1))


def count_operations(name: str, side: int) -> float:
    """Multiply-adds of one operator on CLS and side x side patches."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_operator(name)(torch.empty(1, 1 + side**2, 192), (side, side))
    return counter.get_total_flops() / 2


@torch.no_grad()
def time_operator(operator: SelfAttention, side: int) -> list[float]:
    """Milliseconds of five runs on CLS and side x side patches, after two runs that do not count."""
    tokens, samples = torch.randn(1, 1 + side**2, 192), []
    for _ in range(7):
        started = time.perf_counter()
        operator(tokens, (side, side))
        samples.append(1e3 * (time.perf_counter() - started))
    return samples[2:]


def cost_panels(counts: dict[str, list[float]], milliseconds: dict[str, list[list[float]]]) -> Image.Image:
    """Draw multiply-adds and time of each operator against the number of tokens."""
    shared = {"x": "tokens", "scale": "log"}
    panels = [
        {
            "title": "multiply-adds of one layer",
            "y": "millions",
            "positions": [1 + side**2 for side in SIDES],
            "lines": {name: [[count / 1e6 for count in counts[name]]] for name in ("cbsa", "softmax", "mssa")},
        },
        {
            "title": "time of one layer here",
            "y": "milliseconds",
            "positions": [1 + side**2 for side in TIMED_SIDES],
            "lines": {name: torch.tensor(values).T.numpy() for name, values in milliseconds.items()},
        },
    ]
    return line_panels([shared | panel for panel in panels])


def linear_cost(bench: Workbench) -> Finding:
    """Check claim 5."""
    counts = {name: [count_operations(name, side) for side in SIDES] for name in ATTENTIONS}
    torch.manual_seed(0)
    operators = {name: build_operator(name) for name in ("cbsa", "softmax")}
    milliseconds = {name: [time_operator(found, side) for side in TIMED_SIDES] for name, found in operators.items()}

    growth = {name: count[-1] / count[-2] / 4 for name, count in counts.items()}
    slopes = {name: math.log2(count[-1] / count[-2]) / 2 for name, count in counts.items()}
    N, d, m, p = 1 + SIDES[-1] ** 2, 192, 64, 64
    exact = "is" if counts["cbsa"][-1] == 2 * N * d**2 + 3 * N * m * d + 2 * m * m * p * 3 else "is not"
    reason = (
        f"the last fourfold of the tokens costs {4 * growth['cbsa']:.2f} times as much, for softmax "
        f"{4 * growth['softmax']:.1f} times; the count {exact} 2 N d^2 + 3 N m d + 2 m^2 d."
    )
    verdict = HOLDS if abs(slopes["cbsa"] - 1) < 0.05 else FAILS
    run = (
        "`torch.utils.flop_counter` on one attention layer of width 192 with 3 heads and 8 x 8 representatives "
        f"(`mita`: 5 x 5 landmarks), and its time on this CPU, {torch.get_num_threads()} thread(s), five repetitions "
        "after two."
    )
    header = ["million multiply-adds at N =", *(str(1 + side**2) for side in SIDES)]
    operations = table(
        [*header, "exponent", "cost per token, N x 4"],
        [
            [name, *(f"{count / 1e6:,.1f}" for count in found), f"{slopes[name]:.2f}", f"{growth[name]:.2f}"]
            for name, found in counts.items()
        ],
    )
    timing = table(
        ["milliseconds at N =", *(str(1 + side**2) for side in TIMED_SIDES)],
        [[name, *(spread(samples, 2) for samples in found)] for name, found in milliseconds.items()],
    )
    picture = ("Operations and time against tokens, both axes logarithmic.", cost_panels(counts, milliseconds))
    return Finding(run, {"Cost grows linearly with tokens": (verdict, reason)}, [operations, timing], picture)


def plane_panels(states: torch.Tensor, bases: torch.Tensor, labels: torch.Tensor, steps: list[int]) -> Image.Image:
    """
    Draw tokens around two planes in three dimensions, one panel for each step. The view is nearly along the line where
    the planes meet. The circles show where the planes cut the sphere of the tokens.
    """
    normals = torch.linalg.cross(bases[:, 0], bases[:, 1])
    x, y, z = torch.linalg.cross(*normals).tolist()
    elevation, azimuth = math.degrees(math.asin(z / math.hypot(x, y, z))), math.degrees(math.atan2(y, x))
    angles = torch.linspace(0, 2 * math.pi, 100, dtype=states.dtype)
    circle = states[0, 0].norm() * torch.stack([angles.cos(), angles.sin()], dim=1)
    figure = Figure(figsize=(2.7 * len(steps), 2.9), dpi=100)
    for index, step in enumerate(steps):
        axis = figure.add_subplot(1, len(steps), index + 1, projection="3d")
        for label, (basis, colour) in enumerate(zip(bases, ("tab:blue", "tab:red"), strict=True)):
            axis.plot(*(circle @ basis).T.numpy(), color=colour, linewidth=0.7, alpha=0.6)
            axis.scatter(*states[step][labels == label].T.numpy(), color=colour, s=5)
        axis.view_init(elevation + 12, azimuth + 12)
        axis.set_box_aspect((1, 1, 1), zoom=1.3)
        axis.set_axis_off()
        title = f"after {step} steps" if step else "tokens"
        axis.text2D(0.5, 0.98, title, transform=axis.transAxes, ha="center", va="top", fontsize=11)
    figure.tight_layout(pad=0.4)
    return render(figure)


def stack_pictures(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Put one picture above the other, on white."""
    picture = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), "white")
    picture.paste(upper, (0, 0))
    picture.paste(lower, (0, upper.height))
    return picture


@dataclass
class Compression:
    """
    What the iterated operator does to tokens around subspaces.

    Args:
        distances: (seeds, 1 + steps), sine of the angle between a token and its own subspace, mean over tokens.
        rates: (seeds, 1 + steps), coding rate in nats, sum over the bases.
        kept: (seeds,), share of the tokens whose nearest subspace is still their own after the last step.
    """

    distances: torch.Tensor
    rates: torch.Tensor
    kept: torch.Tensor


def compress(shape: tuple[int, int, int], size: int, interleaved: bool, seeds: tuple[int, ...]) -> Compression:
    """
    Iterate the operator with the true bases on 256 tokens.

    Args:
        shape: number of subspaces, their dimension, and the dimension of the space.
        size: side of the grid of representatives.
        interleaved: whether tokens of different subspaces are mixed on the grid.
        seeds: seeds of the tokens.
    """
    distances, rates, kept = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        tokens, bases, labels = draw_union_of_subspaces(*shape, 256, 0.5, generator, interleaved)
        states = iterate_operator(operator_of_bases(bases, size), tokens, (16, 16), NUM_STEPS)
        found = distance_to_subspaces(states, bases)
        distances.append(found.gather(2, labels.expand(len(states), -1).unsqueeze(2)).mean((1, 2)))
        rates.append(sum(coding_rate(states @ basis.T) for basis in bases))
        kept.append((found[-1].argmin(1) == labels).double().mean())
    return Compression(torch.stack(distances), torch.stack(rates), torch.stack(kept))


def draw_compression(found: dict[str, Compression]) -> Image.Image:
    """Draw tokens around two planes, step by step, and below them distances and coding rates of all settings."""
    tokens, bases, labels = draw_union_of_subspaces(2, 2, 3, 256, 0.4, torch.Generator().manual_seed(4))
    states = iterate_operator(operator_of_bases(bases, 16), tokens, (16, 16), 8, length=9.0)
    panels = [
        {
            "title": title,
            "x": "step",
            "y": unit,
            "positions": list(range(NUM_STEPS + 1)),
            "lines": {name: getattr(setting, field).numpy() for name, setting in found.items()},
        }
        for title, unit, field in (
            ("distance to the own subspace", "sine of the angle", "distances"),
            ("coding rate, sum over bases", "nats", "rates"),
        )
    ]
    return stack_pictures(plane_panels(states, bases, labels, [0, 1, 2, 4, 8]), line_panels(panels, width=6.5))


def union_of_subspaces(bench: Workbench) -> Finding:
    """Check claim 6."""
    found = {
        "4 subspaces of 4 dimensions in 64": compress((4, 4, 64), 8, True, bench.seeds),
        "the same, 16 x 16 representatives": compress((4, 4, 64), 16, True, bench.seeds),
        "the same, subspace after subspace": compress((4, 4, 64), 8, False, bench.seeds),
        "8 of 8 dimensions, which fill the 64": compress((8, 8, 64), 8, True, bench.seeds),
    }
    rows = [
        [
            name,
            *(spread(setting.distances[:, step]) for step in (0, 4, NUM_STEPS)),
            f"{spread(setting.rates[:, 0], 1)}, {spread(setting.rates[:, -1], 1)}",
            spread(setting.kept, 2),
        ]
        for name, setting in found.items()
    ]
    paths = next(iter(found.values())).distances
    ratio = (paths[:, -1] / paths[:, 0]).max().item()
    verdict = HOLDS if ratio < 0.5 else OPEN if ratio < 1 else FAILS
    reason = (
        f"the distance falls to {spread(paths[:, -1] / paths[:, 0], 2)} of what it was, every seed below {ratio:.2f}. "
        "It falls less where each representative is pooled from one subspace, and where the subspaces fill the space. "
        "In both cases some tokens go over to another subspace."
    )
    run = (
        "`ContractAndBroadcastSelfAttention` with the true bases as projections and their transposes as output, steps "
        "1, 8 x 8 representatives over 256 tokens; residual steps `z + operator(z)`, tokens brought to length sqrt(d) "
        f"before each; noise of half the signal's length; {len(bench.seeds)} seeds, ± over them."
    )
    header = ["tokens", "distance at the start", "after 4 steps", f"after {NUM_STEPS}", "coding rate, start and end"]
    header.append("still nearest to their own")
    shown = (
        "Above: two planes in three dimensions, nearly perpendicular. Below: mean and standard deviation over seeds."
    )
    parts = {"Iterating the operator with the true bases compresses tokens onto the subspaces": (verdict, reason)}
    return Finding(run, parts, [table(header, rows)], (shown, draw_compression(found)))
