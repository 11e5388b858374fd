"""A look as HTML, one function a part of the page."""

from html import escape
from importlib.metadata import metadata

import numpy as np
import torch

from cbsa_hf.figures import class_colours, class_legend
from cbsa_hf.report import describe_maps

from .drawing import Scale, draw_labels, draw_map, draw_photo
from .looks import Look, Segmented
from .photos import EXAMPLES, LIMITS, open_example


HEADS = ("mean",)
PUBLISHED, EXACT = "as published", "exact"

PUBLISHED_NOTE = (
    "The map {formula} says which patches the same representatives read: the picture that papers show. Where the attention "
    "type is cbsa it leaves out the contraction, so it is not what the update is made with."
)
EXACT_NOTE = (
    "The exact map &kappa; A<sup>T</sup> S (P + &eta; A) says what the patch is given of every other: the update is this "
    "map times the tokens. S is the contraction, P the pooling, &eta; and &kappa; the step sizes. It has both signs."
)
EMPTY = "Choose an example or upload a photo."


def header() -> str:
    """What the page is about."""
    links = {"Paper": "https://arxiv.org/abs/2509.16875"}
    for line in metadata("cbsa-hf").get_all("Project-URL") or []:
        name, address = line.split(", ", 1)
        links |= {"Code": address} if name == "Source" else {}
    anchors = "".join(f'<a href="{escape(address)}">{name}</a>' for name, address in links.items())
    return f"""
<header>
  <h1>CBSA: a photo explained by a few representatives</h1>
  <p>In Contract-and-Broadcast Self-Attention a few representatives <b>extract</b> what they need from all tokens,
  <b>contract</b> toward one another, and <b>broadcast</b> what they found back to the tokens: with one projection, and at
  a cost that is linear in the number of tokens.</p>
  <nav>{anchors}<a href="#limits">What it cannot do</a></nav>
</header>
"""


def sentence(text: str) -> str:
    """What stands in place of a result."""
    return f'<p class="sentence">{escape(text)}</p>'


def status(text: str, is_problem: bool = False) -> str:
    """The line that is read out when it changes."""
    return f'<p class="{"problem" if is_problem else ""}">{escape(text)}</p>'


def picker() -> str:
    """The examples, and where a photo of one's own goes in."""
    buttons = []
    for name, example in EXAMPLES.items():
        image = open_example(name).image.copy()
        image.thumbnail((160, 160))
        kind = "example fails" if example.failure else "example"
        buttons.append(
            f'<button type="button" class="{kind}" data-example="{name}">'
            f'<img src="{draw_photo(image)}" alt="{escape(example.description)}">'
            f"<span>{escape(example.title)}</span></button>"
        )
    return (
        f'<div class="examples" role="group" aria-label="Example photos">{"".join(buttons)}</div>'
        '<div class="own"><label class="upload"><input type="file" accept="image/*" aria-label="Upload a photo">'
        "<span>Upload a photo</span></label>"
        '<button type="button" class="paste">Paste</button><button type="button" class="remove">Remove</button>'
        f"<small>or drop it anywhere; {LIMITS}. It stays on this server for an hour at most.</small></div>"
    )


def photo(look: Look) -> str:
    """The photo, on which a patch can be clicked."""
    shown, (rows, columns) = look.photo, look.grid
    width, height = shown.image.size
    remark = f'<p class="remark">{escape(shown.remark)}</p>' if shown.remark else ""
    return (
        f'<figure data-source="{escape(shown.source)}" data-rows="{rows}" data-columns="{columns}" '
        f'data-ratio="{width / height:.4f}">'
        f"<figcaption>Photo <small>{escape(shown.title)}: {rows} x {columns} patches; click one</small></figcaption>"
        f'<div class="stage" data-pick="patch"><img src="{draw_photo(shown.image)}" alt="{escape(shown.description)}">'
        f'<span class="mark"></span></div>{remark}</figure>'
    )


def legend(found: Segmented) -> str:
    """The segments with their colours, names and scores."""
    colours = class_colours(len(found.segments))
    rows = []
    for (red, green, blue), segment in zip(colours, found.segments, strict=True):
        name = f"{escape(segment['name'])}, {segment['probability']:.0%}" if segment["name"] else "none of its classes"
        role = "foreground" if segment["foreground"] else "background"
        rows.append(
            f'<tr><td><span class="swatch" style="background:rgb({red} {green} {blue})"></span></td><td>{role}</td>'
            f'<td>{name}</td><td class="number">{segment["score"]:+.2f}</td>'
            f'<td class="number">{segment["share"]:.0%}</td></tr>'
        )
    return (
        '<table class="legend"><thead><tr><th scope="col"><span class="unseen">colour</span></th>'
        '<th scope="col">segment</th><th scope="col">looks like</th><th scope="col">score</th>'
        f'<th scope="col">area</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def describe_segments(found: Segmented) -> str:
    """For those who do not see them."""
    count = sum(segment["foreground"] for segment in found.segments)
    share = f"the foreground covers {found.mask.mean():.0%} of the photo"
    return f"{len(found.segments)} segments, {count} of them foreground; {share}"


def segments(found: Segmented) -> str:
    """The segments over the photo."""
    picture = draw_labels(found.labels, class_colours(len(found.segments)))
    return (
        "<figure><figcaption>Segments <small>the model never saw a mask</small></figcaption>"
        f'<div class="stage over"><img class="labels" src="{picture}" alt="{describe_segments(found)}">'
        '<span class="mark"></span></div></figure>'
    )


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


def panel(title: str, formula: str, stage: str, bar: str, caption: str) -> str:
    """One of the steps."""
    return (
        f'<figure><figcaption>{title} <small>{formula}</small></figcaption>{stage}{bar}<p class="caption">{caption}</p>'
        "</figure>"
    )


def map_stage(values: np.ndarray, scale: Scale, frame: str = "") -> str:
    """A map over the patches, the chosen one marked; a click chooses another."""
    return (
        f'<div class="stage over" data-pick="patch"><img class="map" src="{draw_map(values, scale)}" '
        f'alt="{strongest(values).capitalize()}">{frame}<span class="mark"></span></div>'
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

    weights = parts["reads"][:, *patch].reshape(rows, columns)
    readers = Scale.of(weights)
    eager = divmod(int(weights.argmax()), columns)
    pick = panel(
        f"{len(parts['reads'])} representatives",
        "who reads the chosen patch",
        f'<div class="stage" data-pick="representative" data-rows="{rows}" data-columns="{columns}">'
        f'<img class="map" src="{draw_map(weights, readers)}" alt="A grid of {rows} x {columns} representatives; '
        f'{name_of(eager)} reads the chosen patch most">{frame}</div>',
        colour_bar(readers, "weight"),
        f"Chosen: {name_of(place)}. {name_of(eager).capitalize()} reads patch {patch} most. Click one.",
    )

    reads = Scale.of(parts["reads"][chosen])
    extract = panel(
        "1 Extract",
        "a row of A",
        map_stage(parts["reads"][chosen], reads, frame if look.pools else ""),
        colour_bar(reads, "weight"),
        f"What it reads: {strongest(parts['reads'][chosen])}.",
    )

    similar = Scale.of(parts["similarity"])
    row = parts["similarity"][chosen]
    others = np.where(np.arange(len(row)) == chosen, -1, row)
    size = len(row)
    contract = panel(
        "2 Contract",
        "S, m x m",
        f'<div class="stage square" data-pick="matrix" data-rows="{size}" data-columns="{size}">'
        f'<img class="map" src="{draw_map(parts["similarity"], similar)}" alt="How {size} representatives attend to one '
        f'another"><span class="bin" style="left:0;width:100%;top:{100 * chosen / size}%;height:{100 / size}%"></span></div>',
        colour_bar(similar, "weight"),
        f"It keeps {row[chosen]:.0%} of itself and takes {others.max():.0%} from "
        f"{name_of(divmod(int(others.argmax()), columns))}. Reading moved it by {parts['moved_by_reading'][chosen]:.2f} "
        f"of its length, this by {parts['moved_by_contraction'][chosen]:.2f}.",
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
        "of every patch, from all representatives",
        map_stage(parts["update"], update),
        colour_bar(update, "length"),
        f"That of patch {patch} has length {number(float(parts['update'][patch]))}; {strongest(parts['update'])}.",
    )
    return f'<div class="steps">{pick}{extract}{contract}{broadcast}{result}</div>'


def name_of(place: tuple[int, int]) -> str:
    return f"representative {place}"


def without_representatives(look: Look, layer: int) -> str:
    """What stands in place of the steps where there are none."""
    kind = look.model.config.layer_attention_types[layer]
    return sentence(
        f"The attention type of layer {layer} is {kind}. It has no representatives that contract, so there is nothing to "
        "extract, contract or broadcast; its maps are below."
    )


def glance(look: Look, patch: tuple[int, int] | None, exact: bool, shared: bool) -> str:
    """The maps of every layer and head, and of the mean of the heads, as a table of buttons."""
    if exact and not look.has_exact_maps:
        return sentence(f"There is no other exact map here: the attention type is {look.model.config.attention_type}.")
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
                f'<td><button type="button" data-layer="{layer}" data-head="{HEADS[0] if row == 0 else row - 1}" '
                f'aria-label="{name}: {strongest(maps[layer, row])}" title="{name}: {number(scale.low)} to {number(scale.high)}">'
                f'<img alt="" src="{draw_map(maps[layer, row], scale)}"></button></td>'
            )
        rows.append(f'<tr><th scope="row">{"mean" if row == 0 else f"head {row - 1}"}</th>{"".join(cells)}</tr>')
    bar = (
        colour_bar(one, "weight in all maps")
        if shared
        else "<p>Each map has a scale of its own; point at it to see it.</p>"
    )
    note = EXACT_NOTE if exact else PUBLISHED_NOTE.format(formula=look.map_formula)
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
    "after": ("normalised_coding_rate_after", "{:.0f}"),
    "zeros after the feed-forward": ("zeros_after", "{:.0%}"),
    "rank of A": ("factor_rank", "{:.1f}"),
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
    if "after" in most:
        most["after"] = most["coding rate before"] = max(most["after"], most["coding rate before"])
    num_layers = look.model.config.num_hidden_layers
    body = "".join(
        f'<tr><th scope="row">{layer}</th>'
        + "".join(cell(values[layer], most[title], text) for title, (values, text) in columns.items())
        + "</tr>"
        for layer in range(num_layers)
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in columns)
    return (
        f'<div class="inside"><div class="scroll"><table class="measures"><thead><tr><th scope="col">layer</th>{head}'
        f"</tr></thead><tbody>{body}</tbody></table></div>{classes(look)}</div>"
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
        f'<th scope="col">probability</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def curtain(name: str, left: str, right: str, description: str) -> str:
    """Two pictures over the photo, and a slider that moves the line between them."""
    return (
        f'<figure><figcaption>{name}</figcaption><div class="stage over">'
        f'<img class="under" src="{left}" alt="{escape(description)}">'
        f'<img class="upper" src="{right}" alt=""><span class="mark"></span></div>'
        f'<input class="split" type="range" min="0" max="100" value="50" aria-label="{name}: how much of the left model">'
        "</figure>"
    )


def compare(
    looks: list[Look],
    names: list[str],
    found: list[Segmented],
    maps: list[np.ndarray],
    what: str,
) -> str:
    """Segments and one map of a photo by two models, each with a line to move between them."""
    pictures = [draw_labels(each.labels, class_colours(len(each.segments))) for each in found]
    described = [f"{name}: {describe_segments(each)}" for name, each in zip(names, found, strict=True)]
    scales = [Scale.of(each) for each in maps]
    drawn = [draw_map(each, scale) for each, scale in zip(maps, scales, strict=True)]
    bars = "".join(colour_bar(scale, escape(name)) for scale, name in zip(scales, names, strict=True))
    seen = [f"{name}: {strongest(each)}" for name, each in zip(names, maps, strict=True)]
    kinds = " and ".join(dict.fromkeys(look.model.config.attention_type for look in looks))
    return (
        f"<p>Left <b>{escape(names[0])}</b>, right <b>{escape(names[1])}</b>; attention type {escape(kinds)}.</p>"
        f'<div class="pair">{curtain("Segments", *pictures, "; ".join(described))}'
        f"<div>{curtain(what, *drawn, '; '.join(seen))}{bars}</div></div>"
    )


def street(labels: np.ndarray, names: dict[int, str]) -> str:
    """The classes of a street scene over the photo, with their legend."""
    colours = class_colours(len(names))
    entries = class_legend(labels, names)
    rows = "".join(
        f'<li><span class="swatch" style="background:rgb({" ".join(map(str, colours[index]))})"></span> {escape(text)}</li>'
        for index, text in entries
    )
    described = "Classes and their shares: " + ", ".join(text for _, text in entries)
    return (
        f'<figure><div class="stage over"><img class="labels" src="{draw_labels(labels, colours)}" '
        f'alt="{escape(described)}"></div><ul class="classes">{rows}</ul></figure>'
    )
