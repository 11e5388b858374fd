"""The claims about the operator alone: 5 and 6. A workbench in, a finding out."""

import math
import time

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from workbench import FAILS, HOLDS, OPEN, Finding, Workbench, spread, table

from cbsa_hf.attention_cbsa import ATTENTIONS, PooledRepresentatives, SelfAttention
from cbsa_hf.interpretability.measures import coding_rate
from cbsa_hf.interpretability.plots import line_panels, render
from cbsa_hf.interpretability.synthetic import (
    distance_to_subspaces,
    draw_union_of_subspaces,
    iterate_operator,
    operator_of_bases,
)


def linear_cost(bench: Workbench) -> Finding:
    """Claim 5."""
    sides, timed = [8, 16, 32, 64, 128], [8, 16, 32, 64]
    counts, seconds = {}, {}

    def build(name: str) -> SelfAttention:
        return ATTENTIONS[name](192, 3, 64, PooledRepresentatives(5 if name == "mita" else 8, 1))

    for name in ATTENTIONS:
        counts[name] = []
        for side in sides:
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                build(name)(torch.empty(1, 1 + side**2, 192), (side, side))
            counts[name].append(counter.get_total_flops() / 2)
    torch.manual_seed(0)
    for name in ("cbsa", "softmax"):
        operator, seconds[name] = build(name), []
        for side in timed:
            tokens, samples = torch.randn(1, 1 + side**2, 192), []
            for _ in range(7):
                started = time.perf_counter()
                with torch.no_grad():
                    operator(tokens, (side, side))
                samples.append(time.perf_counter() - started)
            seconds[name].append(samples[2:])

    growth = {name: counts[name][-1] / counts[name][-2] / 4 for name in counts}
    slopes = {name: torch.log2(torch.tensor(count[-1] / count[-2])).item() / 2 for name, count in counts.items()}
    N, d, m, p = 1 + sides[-1] ** 2, 192, 64, 64
    formula = 2 * N * d**2 + 3 * N * m * d + 2 * m * m * p * 3
    rows = [
        [name, *(f"{count / 1e6:,.1f}" for count in counts[name]), f"{slopes[name]:.2f}", f"{growth[name]:.2f}"]
        for name in counts
    ]
    exact = "is" if counts["cbsa"][-1] == formula else "is not"
    verdict = HOLDS if abs(slopes["cbsa"] - 1) < 0.05 else FAILS
    reason = (
        f"the last fourfold of the tokens costs {4 * growth['cbsa']:.2f} times as much, for softmax "
        f"{4 * growth['softmax']:.1f} times; the count {exact} 2 N d^2 + 3 N m d + 2 m^2 d."
    )
    panels = [
        {
            "title": "multiply-adds of one layer",
            "x": "tokens",
            "y": "millions",
            "scale": "log",
            "positions": [1 + side**2 for side in sides],
            "lines": {name: [[count / 1e6 for count in counts[name]]] for name in ("cbsa", "softmax", "mssa")},
        },
        {
            "title": "time of one layer here",
            "x": "tokens",
            "y": "milliseconds",
            "scale": "log",
            "positions": [1 + side**2 for side in timed],
            "lines": {name: 1e3 * torch.tensor(values).T.numpy() for name, values in seconds.items()},
        },
    ]
    run = (
        "`torch.utils.flop_counter` on one attention layer of width 192 with 3 heads and 8 x 8 representatives "
        f"(`mita`: 5 x 5 landmarks), and its time on this CPU, {torch.get_num_threads()} thread(s), five repetitions "
        "after two."
    )
    header = [
        "million multiply-adds at N =",
        *(str(1 + side**2) for side in sides),
        "exponent",
        "cost per token, N x 4",
    ]
    timing = table(
        ["milliseconds at N =", *(str(1 + side**2) for side in timed)],
        [[name, *(spread([1e3 * s for s in samples], 2) for samples in values)] for name, values in seconds.items()],
    )
    picture = ("Operations and time against tokens, both axes logarithmic.", line_panels(panels))
    return Finding(run, {"Cost grows linearly with tokens": (verdict, reason)}, [table(header, rows), timing], picture)


def plane_panels(states: torch.Tensor, bases: torch.Tensor, labels: torch.Tensor, steps: list[int]) -> Image.Image:
    """
    Tokens around two planes in three dimensions, a panel per step, seen nearly along the
    planes' common line; the circles are where the planes meet the sphere that the tokens are on.
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
    picture = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), "white")
    picture.paste(upper, (0, 0))
    picture.paste(lower, (0, upper.height))
    return picture


def union_of_subspaces(bench: Workbench) -> Finding:
    """Claim 6."""
    settings = {
        "4 subspaces of 4 dimensions in 64": ((4, 4, 64), 8, True),
        "the same, 16 x 16 representatives": ((4, 4, 64), 16, True),
        "the same, subspace after subspace": ((4, 4, 64), 8, False),
        "8 of 8 dimensions, which fill the 64": ((8, 8, 64), 8, True),
    }
    num_steps, rows, distances, rates = 12, [], {}, {}
    for name, (shape, representatives_size, interleaved) in settings.items():
        distances[name], rates[name], kept = [], [], []
        for seed in bench.seeds:
            generator = torch.Generator().manual_seed(seed)
            tokens, bases, labels = draw_union_of_subspaces(*shape, 256, 0.5, generator, interleaved)
            operator = operator_of_bases(bases, representatives_size)
            states = iterate_operator(operator, tokens, (16, 16), num_steps)
            found = distance_to_subspaces(states, bases)
            distances[name].append(found.gather(2, labels.expand(len(states), -1).unsqueeze(2)).mean((1, 2)))
            rates[name].append(sum(coding_rate(states @ basis.T) for basis in bases))
            kept.append((found[-1].argmin(1) == labels).double().mean())
        path, rate = torch.stack(distances[name]), torch.stack(rates[name])
        rows.append(
            [
                name,
                *(spread(path[:, step]) for step in (0, 4, num_steps)),
                f"{spread(rate[:, 0], 1)}, {spread(rate[:, -1], 1)}",
                spread(kept, 2),
            ]
        )
    paths = torch.stack(distances["4 subspaces of 4 dimensions in 64"])
    ratio = (paths[:, -1] / paths[:, 0]).max().item()
    verdict = HOLDS if ratio < 0.5 else OPEN if ratio < 1 else FAILS
    reason = (
        f"the distance falls to {spread(paths[:, -1] / paths[:, 0], 2)} of what it was, every seed below {ratio:.2f}. "
        "Less so where representatives are pooled from one subspace each, and where the subspaces fill the space; and "
        "there tokens go over to other subspaces."
    )
    tokens, bases, labels = draw_union_of_subspaces(2, 2, 3, 256, 0.4, torch.Generator().manual_seed(4))
    states = iterate_operator(operator_of_bases(bases, 16), tokens, (16, 16), 8, length=9.0)
    panels = [
        {
            "title": title,
            "x": "step",
            "y": unit,
            "positions": list(range(num_steps + 1)),
            "lines": {name: torch.stack(found[name]).numpy() for name in settings},
        }
        for title, unit, found in (
            ("distance to the own subspace", "sine of the angle", distances),
            ("coding rate, sum over bases", "nats", rates),
        )
    ]
    picture = stack_pictures(plane_panels(states, bases, labels, [0, 1, 2, 4, 8]), line_panels(panels, width=6.5))
    run = (
        "`ContractAndBroadcastSelfAttention` with the true bases as projections and their transposes as output, steps "
        "1, 8 x 8 representatives over 256 tokens; residual steps `z + operator(z)`, tokens brought to length sqrt(d) "
        f"before each; noise of half the signal's length; {len(bench.seeds)} seeds, ± over them."
    )
    header = ["tokens", "distance at the start", "after 4 steps", f"after {num_steps}", "coding rate, start and end"]
    header.append("still nearest to their own")
    shown = (
        "Above: two planes in three dimensions, nearly perpendicular. Below: mean and standard deviation over seeds."
    )
    parts = {"Iterating the operator with the true bases compresses tokens onto the subspaces": (verdict, reason)}
    return Finding(run, parts, [table(header, rows)], (shown, picture))
