"""What a run with edits needs besides: sources that are inputs are run before, and an edit that never fired is an error."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from fmr.edits.editor import Asked, Editor, Entry
from fmr.edits.values import Interchange
from fmr.errors import EditError, FmrError, number_of
from fmr.ids import TensorId
from fmr.nodes import Key, id_of
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.runs.sources import read_source
from fmr.runs.undisturbed import own, undisturbed
from fmr.watching.plan import Plan, is_plannable

Runs = Callable[..., Run]


def editor_of(asked: Asked, model: nn.Module | None, run: Runs) -> Editor:
    """The editor of a run: sources of interchanges that are inputs of the model have run, each once."""
    editor = Editor(asked, read_source)
    with_sources(editor.entries, model, run)
    return editor


def with_sources(entries: Iterable[Entry], model: nn.Module | None, run: Runs) -> None:
    """Run each source that is given as inputs once, and let its run stand in its place."""
    entries = list(entries)
    for entry in entries:
        if not is_plannable(entry.site.id):
            raise EditError(
                f"{entry.site!r} cannot be edited: expected the ID of an op or a source, or the path of a module."
            )
    wanted: dict[int, list[tuple[Any, Key]]] = {}
    for entry in entries:
        edit = entry.edit
        if isinstance(edit, Interchange) and edit.source is not None and not isinstance(edit.source, (Run, Pass)):
            if not isinstance(edit.source, (Tensor, tuple, Mapping)):
                named = "; `sources=` of an fmr.Intervention gives a name its run" * isinstance(edit.source, str)
                raise EditError(
                    f"The source of {edit!r} at {entry.site!r} is {type(edit.source).__name__}, expected a run, or inputs "
                    f"of the model: a tensor, a tuple or a dict of arguments{named}."
                )
            wanted.setdefault(id(edit.source), []).append((edit.source, entry.site if edit.at is None else edit.at))
    made = {key: _ran(several[0][0], [at for _, at in several], model, run) for key, several in wanted.items()}
    for entry in entries:
        if isinstance(entry.edit, Interchange) and id(entry.edit.source) in made:
            entry.edit = replace(entry.edit, source=made[id(entry.edit.source)])


def _ran(inputs: Any, sites: list[Key], model: nn.Module | None, run: Runs) -> Run:
    """A run of the model on other inputs that keeps what is read of it."""
    if model is None:
        raise EditError("An Interchange with inputs as its source needs the model: fmr.track(model, edits=...).")
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args, kwargs = tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}
    try:
        with undisturbed(model):
            return run(model, *args, keep=list({str(id_of(site)) for site in sites}), **kwargs)
    except FmrError:
        raise
    except Exception as error:
        what = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise EditError(
            f"The source of an Interchange at {sites[0]!r} is {what}, which the model was given as its inputs and raised "
            f"{type(error).__name__}: {str(error)[:120]}. Expected a run or inputs; a value goes into edits.Replace(value)."
        ) from error


def check_fired(editor: Editor, why: Callable[[TensorId], str]) -> None:
    """Raise for an edit that no pass came to, or of a position that no pass had; `why` says of an ID why none reached it."""
    for entry in editor.entries:
        missing, passes = _missing(entry), entry.site.passes
        if not missing and (entry.tally.fired or entry.waits):
            continue
        if missing:
            reason = f" at {', '.join(map(str, missing))}: it had {number_of(entry.positions, 'position')}."
        elif not any(entry.meets(number) for number in range(editor.number + 1)):
            reason = f": the run had {number_of(editor.number + 1, 'pass', 'passes')}, none of them {passes!r}."
        elif entry.met is not None:
            reason = f": {_nothing_of(entry)}"
        else:
            reason = f". {why(entry.site.id)}"
        raise EditError(f"The edit of {entry.site!r} never fired{reason} With optional=True it need not fire.")


def _nothing_of(entry: Entry) -> str:
    """How much there was of what an edit selects nothing of."""
    assert entry.met is not None
    shape, axes = entry.met
    sizes = ", ".join(f"{size} {axis}" for size, axis in zip(shape, axes, strict=False) if axis != "positions")
    positions = f" and {number_of(entry.positions, 'position')}" if entry.site.positions is not None else ""
    return f"it selects nothing of what there was, {sizes}{positions}. Expected indices within these."


def _missing(entry: Entry) -> list[int]:
    """The positions of an edit that no example had, where it was come to at all."""
    if not entry.positions or entry.site.positions is None or isinstance(entry.site.positions, slice):
        return []
    asked: list[int] = entry.site.places("positions").flatten().tolist()
    return [place for place in dict.fromkeys(asked) if not -entry.positions <= place < entry.positions]


@lru_cache(maxsize=64)
def plan_of(ids: tuple[TensorId, ...], globs: tuple[str, ...], placed: tuple[str, ...] = ()) -> Plan:
    """A plan for these names; the same in a later run needs no second thought."""
    return Plan(ids, globs, placed)
