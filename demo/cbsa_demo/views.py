"""A look as HTML, one function a part of the page."""

from html import escape
from importlib.metadata import PackageNotFoundError, metadata

import numpy as np

from cbsa_hf.overlays import class_colours, class_legend

from .drawing import Scale, draw_labels, draw_map, draw_outline, draw_photo
from .looks import Look, Segmented
from .maps import colour_bar, strongest
from .photos import EXAMPLES, LIMITS, open_example


EMPTY = "Choose an example or upload a photo."


def source_link() -> dict[str, str]:
    """Where the code is, once the package says so."""
    try:
        lines = metadata("cbsa-hf").get_all("Project-URL") or []
    except PackageNotFoundError:  # run from a checkout
        lines = []
    addresses = [line.removeprefix("Source, ") for line in lines if line.startswith("Source, ")]
    return {"Code": addresses[0]} if addresses else {}


def header() -> str:
    """What the page is about."""
    links = {"Paper": "https://arxiv.org/abs/2509.16875"} | source_link()
    anchors = "".join(f'<a href="{escape(address)}">{name}</a>' for name, address in links.items())
    return f"""
<header>
  <h1>CBSA: a photo explained by a few representatives</h1>
  <p>In Contract-and-Broadcast Self-Attention a few representatives <b>extract</b> what they need from all tokens,
  <b>contract</b> toward one another, and <b>broadcast</b> what they found back to the tokens: with one projection, and
  at a cost that is linear in the number of tokens.</p>
  <nav aria-label="Links">{anchors}<a href="#card">Model card</a><a href="#code">Use it from code</a>
  <a href="#limits">What it cannot do</a></nav>
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


def swatch(colour: np.ndarray) -> str:
    """A small square of a colour, as HTML."""
    return f'<span class="swatch" style="background:rgb({" ".join(map(str, colour))})"></span>'


def legend(found: Segmented) -> str:
    """The segments with their colours, names and scores."""
    colours = class_colours(len(found.segments))
    rows = []
    for colour, segment in zip(colours, found.segments, strict=True):
        name = f"{escape(segment['name'])}, {segment['probability']:.0%}" if segment["name"] else "unknown"
        role = "foreground" if segment["foreground"] else "background"
        rows.append(
            f"<tr><td>{swatch(colour)}</td><td>{role}</td>"
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
    return f"{len(found.segments)} segments; the foreground covers {found.mask.mean():.0%} of the photo"


def segments(found: Segmented) -> str:
    """The segments over the photo."""
    picture = draw_labels(found.labels, class_colours(len(found.segments)))
    return (
        "<figure><figcaption>Segments <small>the white line is around the foreground</small>"
        "</figcaption>"
        f'<div class="stage over"><img class="labels" src="{picture}" alt="{describe_segments(found)}">'
        f'<img src="{draw_outline(found.mask)}" alt=""><span class="mark"></span></div></figure>'
    )


def curtain(name: str, kind: str, left: str, right: str, description: str) -> str:
    """Two pictures over the photo, and a slider that moves the line between them."""
    return (
        f'<figure><figcaption>{name}</figcaption><div class="stage over">'
        f'<img class="under {kind}" src="{left}" alt="{escape(description)}">'
        f'<img class="upper {kind}" src="{right}" alt=""><span class="mark"></span></div>'
        '<input class="split" type="range" min="0" max="100" value="50" '
        f'aria-label="{name}: how much of the left model"></figure>'
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
    bars = "".join(
        f'<p class="caption">{escape(name)}</p>{colour_bar(scale, escape(name))}'
        for name, scale in zip(names, scales, strict=True)
    )
    seen = [f"{name}: {strongest(each)}" for name, each in zip(names, maps, strict=True)]
    left, right = (
        f"<b>{escape(name)}</b> ({escape(look.attention_types)})" for name, look in zip(names, looks, strict=True)
    )
    return (
        f"<p>Left {left}, right {right}.</p>"
        f'<div class="pair">{curtain("Segments", "labels", *pictures, "; ".join(described))}'
        f"<div>{curtain(what, 'map', *drawn, '; '.join(seen))}{bars}</div></div>"
    )


def street(labels: np.ndarray, names: dict[int, str]) -> str:
    """The classes of a street scene over the photo, with their legend."""
    colours = class_colours(len(names))
    entries = class_legend(labels, names)
    rows = "".join(f"<li>{swatch(colours[index])} {escape(text)}</li>" for index, text in entries)
    described = "Classes and their shares: " + ", ".join(text for _, text in entries)
    return (
        f'<figure><div class="stage over"><img class="labels" src="{draw_labels(labels, colours)}" '
        f'alt="{escape(described)}"></div><ul class="classes">{rows}</ul></figure>'
    )
