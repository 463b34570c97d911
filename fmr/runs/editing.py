"""What a run with edits needs besides: sources that are inputs are run before, and an edit that never fired is an error."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from fmr.edits.editor import Asked, Editor
from fmr.edits.values import Interchange
from fmr.errors import EditError
from fmr.ids import TensorId
from fmr.nodes import Key, id_of
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.runs.sources import read_source
from fmr.watching.plan import Plan, is_plannable
from fmr.watching.scopes import name_inputs

Runs = Callable[..., Run]


def editor_of(asked: Asked, model: nn.Module | None, run: Runs) -> Editor:
    """The editor of a run: sources of interchanges that are inputs of the model have run, each once."""
    editor = Editor(asked, read_source)
    for entry in editor.entries:
        if not is_plannable(entry.site.id):
            raise EditError(
                f"{entry.site!r} cannot be edited: expected the ID of an op or a source, or the path of a module."
            )
    wanted: dict[int, list[tuple[Any, Key]]] = {}
    for entry in editor.entries:
        edit = entry.edit
        if isinstance(edit, Interchange) and edit.source is not None and not isinstance(edit.source, (Run, Pass)):
            if not isinstance(edit.source, (Tensor, tuple, Mapping)):
                raise EditError(
                    f"The source of {edit!r} at {entry.site!r} is {type(edit.source).__name__}, expected a run, or inputs "
                    f"of the model: a tensor, a tuple or a dict of arguments."
                )
            wanted.setdefault(id(edit.source), []).append((edit.source, entry.site if edit.at is None else edit.at))
    made = {key: _ran(several[0][0], [at for _, at in several], model, run) for key, several in wanted.items()}
    for entry in editor.entries:
        if isinstance(entry.edit, Interchange) and id(entry.edit.source) in made:
            entry.edit = replace(entry.edit, source=made[id(entry.edit.source)])
    return editor


def _ran(inputs: Any, sites: list[Key], model: nn.Module | None, run: Runs) -> Run:
    """A run of the model on other inputs that keeps what is read of it, and its inputs, which tell its positions."""
    if model is None:
        raise EditError("An Interchange with inputs as its source needs the model: fmr.track(model, edits=...).")
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    named = [name for name, tensor in name_inputs(model, args, kwargs) if tensor.dim() == 2]
    return run(model, *args, keep=[*{str(id_of(site)) for site in sites}, *named], **kwargs)


def check_fired(editor: Editor) -> None:
    """Raise for an edit that no pass came to."""
    for entry in editor.entries:
        if not (entry.tally.fired or entry.waits):
            why = (
                "no pass came to it" if entry.site.passes is None else f"none of its passes {entry.site.passes!r} came to it"
            )
            raise EditError(
                f"The edit of {entry.site!r} never fired: {why}, or no position of it lies there. Expected a value that the "
                f"model computes in this run; fmr.run(model, *inputs, keep='none').graph lists them. With optional=True it "
                f"need not fire."
            )


@lru_cache(maxsize=64)
def plan_of(ids: tuple[TensorId, ...], globs: tuple[str, ...], placed: tuple[str, ...] = ()) -> Plan:
    """A plan for these names; the same in a later run needs no second thought."""
    return Plan(ids, globs, placed)
