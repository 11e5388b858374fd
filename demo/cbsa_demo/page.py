"""The page: its components, and what happens when one of them changes."""

import functools
import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from starlette.middleware import Middleware

from . import text, views
from .admission import Admission, give_large_memory_back
from .answers import FIRST, MAPS, NO_OTHER, QUERIES, Answers
from .choices import Choices
from .endpoints import add_endpoints
from .looks import MAX_SEGMENTS, METHODS, Explorer, Look
from .parameters import heads_of
from .photos import EXAMPLES, MAX_BYTES, PhotoError, admit_files


TITLE = "CBSA: a photo explained by a few representatives"
FOLDER = Path(__file__).parent
CSS = (FOLDER / "page.css").read_text(encoding="utf-8")
HAS_KORNIA = find_spec("kornia") is not None
QUIET = {"api_visibility": "private", "preprocess": False}  # raw values, which `Answers` checks

SETTINGS = {
    "title": TITLE,
    "analytics_enabled": False,
    "delete_cache": (600, 3600),  # seconds: uploads are deleted after an hour
}
SERVER = {
    "css": CSS,
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        body_text_color_subdued="*neutral_600",  # Gradio's own are too faint to read
        link_text_color_dark="*secondary_300",
    ),
    "max_file_size": MAX_BYTES,
    "state_session_capacity": 100,  # what the server keeps of visitors; the page itself knows what it shows
    "max_threads": 8,  # each has memory of its own
    "show_error": True,
    "mcp_server": find_spec("mcp") is not None,
    "footer_links": ["api", "gradio"],
    "app_kwargs": {"middleware": [Middleware(Admission)]},
}


class Page(gr.Blocks):
    """A page of Gradio that opens no file which was not uploaded to it, whichever component or endpoint it is for."""

    def validate_inputs(self, block_fn, inputs):
        """Refuse fewer values than a function takes."""
        if len(inputs) < len(block_fn.inputs):  # Gradio would repeat what was sent, with the paths of uploads
            raise PhotoError(f"This takes {len(block_fn.inputs)} values, but got {len(inputs)}.")

    async def preprocess_data(self, block_fn, inputs, *args, **options):
        """What Gradio does, after files that no visitor may name are refused."""
        return await super().preprocess_data(block_fn, admit_files(inputs), *args, **options)


def script(name: str) -> str:
    """The text of a file beside this one."""
    return (FOLDER / name).read_text(encoding="utf-8")


def own_html(
    value: object = "", scripts: list[str] | None = None, classes: list[str] | None = None, **options
) -> gr.HTML:
    """A part of the page in its own HTML, with scripts beside this file."""
    code = "\n".join(f"{{\n{script(name)}\n}}" for name in scripts or []) or None
    classes = ["own-html", *(classes or [])]
    template = "" if value is None else "${value}"
    return gr.HTML(
        value, html_template=template, js_on_load=code, apply_default_css=False, elem_classes=classes, **options
    )


def answered(view: Callable[..., str | tuple[str, ...]], count: int) -> Callable[..., list[str]]:
    """The parts of a view; after an error its sentence, in each of their places."""

    @functools.wraps(view)
    def answer(*args):
        try:
            answers = view(*args) if args[0] else views.sentence(views.EMPTY)
        except (PhotoError, ValueError) as error:
            answers = views.sentence(str(error))
        except Exception:
            logging.getLogger(__name__).exception("A view failed")
            answers = views.sentence("Something went wrong on the server; its log says what.")
        answers = [answers] if isinstance(answers, str) else list(answers)
        return answers + [""] * (count - len(answers))

    return answer


def add_choice(parts: SimpleNamespace, explorer: Explorer):
    """Which photo, and which model."""
    own_html(views.header(), ["header.js"], elem_id="header")
    parts.source = gr.Textbox(FIRST["source"], visible="hidden", elem_id="source")
    with gr.Row(elem_id="choice"):
        with gr.Column(scale=4, min_width=320):
            parts.picker = own_html(views.picker(), ["picker.js"], elem_id="picker", limit=MAX_BYTES)
        with gr.Column(scale=1, min_width=220):
            parts.model = gr.Dropdown(
                list(explorer.checkpoints), value=explorer.default, label="Model", elem_id="model"
            )
    parts.status = own_html("", ["status.js"], elem_id="status")


def add_pictures(parts: SimpleNamespace):
    """The photo and its segments, the same size, and what decides them."""
    row, column = EXAMPLES[FIRST["source"]].patch
    with gr.Row(elem_id="pictures"):
        with gr.Column(scale=5, min_width=320):
            parts.photo = own_html("", ["photo.js", "picks.js"], elem_id="photo")
            with gr.Row():
                parts.row = gr.Number(row, label="Patch row", precision=0, minimum=0, elem_id="row")
                parts.column = gr.Number(column, label="Patch column", precision=0, minimum=0, elem_id="column")
        with gr.Column(scale=5, min_width=320):
            parts.segments = own_html(elem_id="segments", classes=["result"])
            parts.legend = own_html(elem_id="legend", classes=["result"])
        with gr.Column(scale=3, min_width=240):
            parts.method = gr.Dropdown(list(METHODS), value=METHODS[0], label="Method", elem_id="method")
            parts.num_segments = gr.Slider(2, MAX_SEGMENTS, 4, step=1, label="Segments", buttons=[], elem_id="number")
            parts.opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", buttons=[], elem_id="opacity")
            parts.sharp = gr.Checkbox(False, label="Edges follow the photo", visible=HAS_KORNIA, elem_id="sharp")
            with gr.Row():
                parts.save = {
                    kind: gr.Button(label, size="sm", min_width=60, elem_id=f"save-{kind}")
                    for kind, label in {"mask": "Save mask", "segments": "Save labels", "maps": "Save maps"}.items()
                }
            parts.saved = own_html(None, ["downloads.js"], elem_id="saved")


def add_story(parts: SimpleNamespace, look: Look):
    """The steps of one layer, all layers at a glance, and what can be measured inside."""
    own_html("<h2>How it got there</h2>")
    last = look.model.config.num_hidden_layers - 1
    with gr.Row(elem_id="layers"):
        layer = min(FIRST["layer"], last)
        parts.layer = gr.Slider(0, last, layer, step=1, label="Layer", buttons=[], elem_id="layer")
        parts.head = gr.Radio(heads_of(look.model.config), value=FIRST["head"], label="Head", elem_id="head")
    parts.steps = own_html("", ["picks.js"], elem_id="steps", classes=["result"])
    with gr.Row():
        parts.representative = gr.Number(
            min(FIRST["representative"], math.prod(look.representatives_size) - 1),
            label="Representative",
            precision=0,
            minimum=0,
            scale=0,
            min_width=200,
            elem_id="representative",
        )
        parts.behind = gr.Checkbox(False, label="The photo behind the maps", elem_id="behind")
    own_html("<h2>Layers at a glance <small>click a map to choose its layer and head</small></h2>")
    with gr.Row():
        parts.query = gr.Radio(list(QUERIES), value=next(iter(QUERIES)), label="What is tied to", elem_id="query")
        parts.kind = gr.Radio(list(MAPS), value=next(iter(MAPS)), label="By which map", elem_id="kind")
        parts.shared = gr.Checkbox(False, label="One scale for all layers", elem_id="shared")
    parts.glance = own_html("", ["picks.js"], elem_id="glance", classes=["result"])
    own_html("<h2>Inside <small>what this photo becomes, layer by layer</small></h2>")
    parts.inside = own_html(elem_id="inside", classes=["result"])


def add_more(parts: SimpleNamespace, explorer: Explorer):
    """What is folded away at first."""
    with gr.Accordion("Compare two models", open=False):
        parts.other = gr.Dropdown(
            [NO_OTHER, *explorer.checkpoints], value=NO_OTHER, label="The second model", elem_id="other"
        )
        parts.comparison = own_html("", ["compare.js"], elem_id="comparison", classes=["result"])
    with gr.Accordion("Street scenes", open=False):
        own_html(text.STREET)
        with gr.Row():
            parts.find = gr.Button("Find the classes of this photo", elem_id="find")
            parts.flip = gr.Checkbox(True, label="Mirrored too", elem_id="flip")
            parts.edges = gr.Checkbox(HAS_KORNIA, label="Edges follow the photo", visible=HAS_KORNIA, elem_id="edges")
        parts.street = own_html(elem_id="street", classes=["result"])
    with gr.Accordion("Use it from code", open=False, elem_id="code"):
        gr.Markdown(text.ENDPOINTS)
        gr.Code(text.CODE, language="python", label="The library", interactive=False)
        gr.Code(text.CLIENT, language="python", label="This page as a server", interactive=False)
        gr.Code(text.SHELL, language="shell", label="The command line", interactive=False)
        gr.Code(text.AGENT, language="json", label="An agent, by MCP", interactive=False)
    with gr.Accordion("What it cannot do", open=False, elem_id="limits"):
        gr.Markdown(text.LIMITS)
    with gr.Accordion("Model card", open=False, elem_id="card"):
        parts.card = gr.Markdown(explorer.card(explorer.default))


def show(view: Callable, inputs: list, *outputs: gr.HTML, triggers: list | None = None, at_once: bool = True):
    """
    Keep parts of the page at what the inputs say: at once, and again whenever one of them changes, or with triggers
    only.
    """
    view = answered(view, len(outputs))
    if at_once:
        for output, value in zip(outputs, view(*(component.value for component in inputs)), strict=True):
            output.value = value
    gr.on(
        triggers or [component.change for component in inputs],
        view,
        inputs,
        list(outputs),
        # Each change is answered, one after the other, so that what stands is what the controls say. Gradio's own
        # "always_last" never comes to rest where two parts follow the same control: each starts the other again.
        trigger_mode="multiple",
        concurrency_limit=1,
        show_progress="minimal",
        **QUIET,
    )


def keep_current(parts: SimpleNamespace, answers: Answers):
    """Each part of the page, and what it depends on."""
    seen = [parts.source, parts.model]
    cut = [parts.method, parts.num_segments, parts.sharp]
    patch = [parts.row, parts.column]
    show(answers.photo, seen, parts.photo)
    show(answers.segments, [*seen, *cut], parts.segments, parts.legend, parts.status)
    show(answers.steps, [*seen, parts.layer, parts.head, *patch, parts.representative], parts.steps)
    show(answers.glance, [*seen, *patch, parts.query, parts.kind, parts.shared], parts.glance)
    show(answers.inside, seen, parts.inside)
    show(answers.compare, [*seen, parts.other, *cut, parts.layer, parts.head, *patch], parts.comparison)
    street = [*seen, parts.flip, parts.edges]
    show(answers.street, street, parts.street, triggers=[parts.find.click], at_once=False)
    gr.on([component.change for component in street], lambda: "", None, parts.street, **QUIET)
    for kind, button in parts.save.items():
        button.click(functools.partial(answers.download, kind), [*seen, *cut, *patch], parts.saved, **QUIET)


def follow(parts: SimpleNamespace, choices: Choices, page: gr.Blocks):
    """What a visitor does, and which components it changes."""
    patch = [parts.row, parts.column]
    # All choices, and the link that opened the page, are answered in their order, so the last one stands. By default
    # Gradio drops a choice that is made while another of the same component is answered.
    quiet = {"show_progress": "hidden", "trigger_mode": "multiple", **QUIET}
    quiet |= {"concurrency_id": "choices", "concurrency_limit": 1}
    picked = parts.picker.select(choices.pick, parts.model, [parts.source, *patch, parts.status], **quiet)
    picked.then(js="() => document.body.classList.remove('working')", api_visibility="private")
    clicked = [*patch, parts.layer, parts.head, parts.representative]
    for picture in (parts.photo, parts.steps, parts.glance):
        picture.select(choices.click, None, clicked, **quiet)
    parts.model.change(choices.explorer.card, parts.model, parts.card, **quiet)
    parts.model.change(choices.adapt, [parts.model, parts.layer, parts.head], [parts.layer, parts.head], **quiet)
    address = [parts.source, parts.layer, parts.head, *patch, parts.representative]
    page.load(choices.follow_link, parts.model, [*address, parts.status], **quiet)
    state = [*address, parts.opacity, parts.behind]
    triggers = [component.change for component in (*state, parts.glance)]
    gr.on([*triggers, page.load], js=script("page.js"), inputs=state, api_visibility="private")


def build_page(explorer: Explorer) -> gr.Blocks:
    """The page, its first result already computed."""
    give_large_memory_back()
    answers = Answers(explorer)
    for name in explorer.checkpoints:  # all at once, so that what is wrong with one is the operator's to read
        explorer.model(name)
    first = explorer.look(FIRST["source"], explorer.default)
    parts = SimpleNamespace()
    with Page(**SETTINGS) as page:
        add_choice(parts, explorer)
        add_pictures(parts)
        with gr.Column():  # within which a phone keeps the choice of the layer in reach
            add_story(parts, first)
        add_more(parts, explorer)
        add_endpoints(answers)  # first, so that their names are theirs
        keep_current(parts, answers)
        follow(parts, Choices(explorer), page)
    page.queue(max_size=200)
    return page
