"""What a visitor does: picks, clicks, links and downloads, as values for the components of the page."""

import math

import gradio as gr

from . import views
from .answers import FIRST
from .looks import Explorer
from .parameters import heads_of, one_of, whole
from .photos import EXAMPLES, PhotoError, source_of


ADDRESS = ("photo", "layer", "head", "row", "column", "representative")


def sent(event: gr.EventData) -> dict:
    """What came with an event. Gradio gives single entries as attributes, but no public list of those that came."""
    return event._data if isinstance(event._data, dict) else {}


class Choices:
    """One method for each action. It returns values for the components that it changes; the others stay."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer

    def pick(self, model: object, event: gr.EventData):
        """An example, a file, a problem of the browser, or nothing for removal: source, row, column, status."""
        chosen = sent(event)
        try:
            if "problem" in chosen:
                raise PhotoError(str(chosen["problem"])[:300])
            if not chosen:
                return "", gr.skip(), gr.skip(), views.status("The photo is removed.")
            source = (
                one_of(chosen["example"], "example", EXAMPLES)
                if "example" in chosen
                else source_of(chosen.get("file"))
            )
            look = self.explorer.look(source, model)
        except (PhotoError, ValueError) as error:
            return gr.skip(), gr.skip(), gr.skip(), views.status(str(error), is_problem=True)
        row, column = EXAMPLES[source].patch if source in EXAMPLES else (look.grid[0] // 2, look.grid[1] // 2)
        done = f"{look.photo.title} is here. {look.photo.remark}".strip()
        return source, row, column, views.status(done)

    def click(self, event: gr.EventData):
        """A patch, a representative, or a map: row, column, layer, head, representative."""
        chosen = sent(event)
        names = ("row", "column", "layer", "head", "representative")
        return [chosen.get(name, gr.skip()) for name in names]

    def adapt(self, model: object, layer: object, head: object):
        """The layers and heads that a model has; the last layer and the mean where it lacks those chosen."""
        config = self.explorer.model(model)[0].config
        last = config.num_hidden_layers - 1
        heads = heads_of(config)
        return (
            gr.Slider(maximum=last, value=min(whole(layer, "layer", 0, 10**3), last)),
            gr.Radio(heads, value=head if head in heads else heads[0]),
        )

    def follow_link(self, model: object, request: gr.Request):
        """The values of [`ADDRESS`] in the page's address, or defaults where they are missing; and the status."""
        given = dict(request.query_params)
        if not given.keys() & set(ADDRESS):
            return [gr.skip()] * (len(ADDRESS) + 1)
        try:
            return [*self.read(given, model), views.status("")]
        except PhotoError as error:
            problem = views.status(f"This link cannot be shown: {error}", is_problem=True)
            return [*[gr.skip()] * len(ADDRESS), problem]

    def read(self, given: dict[str, str], model: object) -> list:
        """The values of [`ADDRESS`] in an address, checked."""
        source = one_of(given.get("photo", FIRST["source"]), "photo", EXAMPLES)
        look = self.explorer.look(source, model)
        row, column = EXAMPLES[source].patch
        limits = {
            "layer": (FIRST["layer"], look.model.config.num_hidden_layers),
            "row": (row, look.grid[0]),
            "column": (column, look.grid[1]),
            "representative": (FIRST["representative"], math.prod(look.representatives_size)),
        }
        values = {
            "photo": source,
            "head": one_of(given.get("head", FIRST["head"]), "head", heads_of(look.model.config)),
        }
        for name, (default, count) in limits.items():
            text = given.get(name, str(min(default, count - 1)))
            is_number = text.isascii() and text.isdecimal() and len(text) < 6
            values[name] = whole(int(text) if is_number else text, name, 0, count - 1)
        return [values[name] for name in ADDRESS]
