"""How a layer got there, all layers at a glance, and what can be measured inside, as HTML."""

from html import escape

import numpy as np

from .drawing import Scale, draw_map
from .looks import Look
from .maps import colour_bar, map_stage, number, strongest
from .parameters import MEAN
from .views import sentence


PUBLISHED_NOTE = "The map {formula} says how strongly patches are tied to one another: the picture that papers show."
CONTRACTION_NOTE = (
    " Where the attention type is cbsa it is large if the same representatives read both. It leaves out the "
    "contraction, so it is not what the update is made with."
)
EXACT_NOTE = (
    "The exact map &kappa; A<sup>T</sup> S (P + &eta; A) says what the patch is given of every other: the update is "
    "this map times the tokens. S is the contraction, P the pooling; &eta; and &kappa; are step sizes, so both signs "
    "occur."
)


def panel(title: str, formula: str, stage: str, bar: str, caption: str) -> str:
    """One of the steps."""
    return (
        f"<figure><figcaption>{title} <small>{formula}</small></figcaption>{stage}{bar}"
        f'<p class="caption">{caption}</p></figure>'
    )


def pick_panel(weights: np.ndarray, patch: tuple[int, int], place: tuple[int, int], frame: str) -> str:
    """
    The grid of representatives, to pick one from.

    Args:
        weights: (rows, columns) of the grid, how much each representative reads the chosen patch.
        patch: (row, column) of that patch.
        place: (row, column) of the chosen representative.
        frame: HTML that marks it.
    """
    rows, columns = weights.shape
    scale = Scale.of(weights)
    eager = divmod(int(weights.argmax()), columns)
    return panel(
        f"{weights.size} representatives",
        "who reads the chosen patch",
        f'<div class="stage" data-pick="representative" data-rows="{rows}" data-columns="{columns}">'
        f'<img class="map" src="{draw_map(weights, scale)}" alt="A grid of {rows} x {columns} representatives; '
        f'{name_of(eager)} reads the chosen patch most">{frame}</div>',
        colour_bar(scale, "weight"),
        f"Chosen: {name_of(place)}. {name_of(eager).capitalize()} reads patch {patch} most. Click one.",
    )


def contract_panel(parts: dict[str, np.ndarray], chosen: int, columns: int) -> str:
    """How the representatives, in a grid of so many columns, attend to one another; see [`steps`]."""
    similarity = parts["similarity"]
    scale, row, size = Scale.of(similarity), similarity[chosen], len(similarity)
    others = np.where(np.arange(size) == chosen, -1, row)
    return panel(
        "2 Contract",
        "S, m x m",
        f'<div class="stage square" data-pick="matrix" data-rows="{size}" data-columns="{size}">'
        f'<img class="map" src="{draw_map(similarity, scale)}" alt="How {size} representatives attend to '
        f'one another"><span class="bin" style="left:0;width:100%;top:{100 * chosen / size}%;height:{100 / size}%">'
        "</span></div>",
        colour_bar(scale, "weight"),
        f"It keeps {row[chosen]:.0%} of itself and takes {others.max():.0%} from "
        f"{name_of(divmod(int(others.argmax()), columns))}. Reading moved it by "
        f"{parts['moved_by_reading'][chosen]:.2f} of its length, this by {parts['moved_by_contraction'][chosen]:.2f}.",
    )


def steps(look: Look, parts: dict[str, np.ndarray], patch: tuple[int, int], chosen: int) -> str:
    """
    What one head's representatives do, step by step.

    Args:
        look: whose representatives.
        parts: the fields of `RepresentativeTrace` by name, of one head or the mean of all.
        patch: (row, column) of the chosen patch.
        chosen: number of the chosen representative.
    """
    rows, columns = look.representatives_size
    place = divmod(chosen, columns)
    box = f"left:{100 * place[1] / columns}%;top:{100 * place[0] / rows}%;width:{100 / columns}%;height:{100 / rows}%"
    frame = f'<span class="bin" style="{box}"></span>'

    pick = pick_panel(parts["reads"][:, *patch].reshape(rows, columns), patch, place, frame)
    contract = contract_panel(parts, chosen, columns)

    reads = Scale.of(parts["reads"][chosen])
    extract = panel(
        "1 Extract",
        "a row of A",
        map_stage(parts["reads"][chosen], reads, frame if look.pools else ""),
        colour_bar(reads, "weight"),
        f"What it reads: {strongest(parts['reads'][chosen])}.",
    )

    writes = Scale.of(parts["writes"][chosen], signed=True)
    broadcast = panel(
        "3 Broadcast",
        "through A<sup>T</sup>",
        map_stage(parts["writes"][chosen], writes),
        colour_bar(writes, "weight"),
        f"Where what it holds is written: {strongest(parts['writes'][chosen])}.",
    )

    update = Scale.of(parts["update"])
    result = panel(
        "The update",
        "what every patch is given",
        map_stage(parts["update"], update),
        colour_bar(update, "length"),
        f"That of patch {patch} has length {number(float(parts['update'][patch]))}; {strongest(parts['update'])}.",
    )
    return f'<div class="steps">{pick}{extract}{contract}{broadcast}{result}</div>'


def name_of(place: tuple[int, int]) -> str:
    """What a representative is called, by its row and column."""
    return f"representative {place}"


def no_steps(look: Look, layer: int) -> str:
    """Why a layer has no steps to show."""
    kind = look.model.config.layer_attention_types[layer]
    return (
        f"The attention type of layer {layer} is {kind}. It has no representatives that contract, so there is "
        "nothing to extract, contract or broadcast."
    )


def glance(look: Look, patch: tuple[int, int] | None, exact: bool, shared: bool) -> str:
    """The maps of every layer and head, and of the mean of the heads, as a table of buttons."""
    if exact and not look.has_representatives:
        return sentence(f"There is no other exact map here: the attention type is {look.attention_types}.")
    maps = look.maps(patch, exact)
    maps = np.concatenate([maps.mean(1, keepdims=True), maps], axis=1)
    num_layers, num_rows = maps.shape[:2]
    known = [layer for layer in range(num_layers) if not np.isnan(maps[layer]).any()]
    one = Scale.of(maps[known], exact)
    head = "".join(f'<th scope="col">{layer}</th>' for layer in range(num_layers))
    rows = []
    for row in range(num_rows):
        cells = []
        for layer in range(num_layers):
            if layer not in known:
                cells.append("<td>none</td>")
                continue
            name = f"Layer {layer}, {'mean of the heads' if row == 0 else f'head {row - 1}'}"
            scale = one if shared else Scale.of(maps[layer, row], exact)
            cells.append(
                f'<td><button type="button" data-layer="{layer}" data-head="{MEAN if row == 0 else row - 1}" '
                f'aria-label="{name}: {strongest(maps[layer, row])}" '
                f'title="{name}: {number(scale.low)} to {number(scale.high)}">'
                f'<img alt="" src="{draw_map(maps[layer, row], scale)}"></button></td>'
            )
        rows.append(f'<tr><th scope="row">{"mean" if row == 0 else f"head {row - 1}"}</th>{"".join(cells)}</tr>')
    bar = (
        colour_bar(one, "weight in all maps")
        if shared
        else "<p>Each map has a scale of its own; point at it to see it.</p>"
    )
    note = EXACT_NOTE
    if not exact:
        note = PUBLISHED_NOTE.format(formula=look.map_formula) + CONTRACTION_NOTE * look.has_representatives
    return (
        f'<div class="scroll"><table class="glance"><thead><tr><th scope="row">layer</th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><div class="notes">{bar}<p>{note}</p></div>'
    )


def cell(value: float | None, most: float, text: str = "{:.1f}") -> str:
    """A number above a bar as long as it is large."""
    if value is None:
        return '<td class="number">none</td>'
    width = 100 * max(value, 0) / most if most > 0 else 0
    return f'<td class="number"><span style="--share:{width:.0f}%">{text.format(value)}</span></td>'


MEASURED = {
    "coding rate before": ("normalised_coding_rate_before", "{:.0f}"),
    "coding rate after": ("normalised_coding_rate_after", "{:.0f}"),
    "zeros after the feed-forward": ("zeros_after", "{:.0%}"),
    "rank of A": ("representative_attention_rank", "{:.1f}"),
    "rank of the map": ("map_rank", "{:.1f}"),
}


def inside(look: Look) -> str:
    """What can be measured in every layer, and the classes."""
    found = look.measures()
    columns = {}
    for title, (name, text) in MEASURED.items():
        values = found[name]
        if values is not None:
            columns[title] = ([None if v is None else float(np.mean(v)) for v in values], text)
    most = {title: max((v for v in values if v is not None), default=0) for title, (values, _) in columns.items()}
    rates = [title for title in most if title.startswith("coding rate")]
    most |= dict.fromkeys(rates, max((most[title] for title in rates), default=0))  # on one scale
    num_layers = look.model.config.num_hidden_layers
    body = "".join(
        f'<tr><th scope="row">{layer}</th>'
        + "".join(cell(values[layer], most[title], text) for title, (values, text) in columns.items())
        + "</tr>"
        for layer in range(num_layers)
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in columns)
    return (
        '<div class="inside"><div class="scroll"><table class="measures layers"><thead><tr><th scope="col">layer</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>{classes(look)}</div>"
    )


def classes(look: Look) -> str:
    """The most probable classes."""
    found = look.predictions()
    if not found:
        return sentence("This model has no classifier.")
    rows = "".join(
        f'<tr><th scope="row">{escape(entry["label"])}</th>{cell(entry["probability"], 1, "{:.1%}")}</tr>'
        for entry in found
    )
    return (
        '<div><table class="measures"><thead><tr><th scope="col">most probable classes</th>'
        f'<th scope="col">probability</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="caption">It knows {look.model.config.num_labels} classes, and names one of them whatever it sees.'
        "</p></div>"
    )
