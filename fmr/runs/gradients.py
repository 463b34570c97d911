"""The gradients of a pass by ID, and why a value has none."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fmr.errors import IdError, TrackError, number_of
from fmr.graph.graph import Graph
from fmr.graph.paths import the_one
from fmr.graph.places import check_place
from fmr.ids import ALIAS, Site, TensorId, outer_op
from fmr.nests import Nest
from fmr.nodes import Key, id_of
from fmr.runs.listener import Heard
from fmr.watching.own import alone
from fmr.watching.tape import Slot

_DETACHING = ("detach", "detach_", "data")


class Holder(Protocol):
    """What a pass has of its values and of what was heard of their gradients."""

    history: bool
    apart: bool
    heard: Heard
    stored_grads: Mapping[TensorId, Tensor]
    slots: dict[TensorId, Slot | None]
    values: dict[TensorId, Tensor]
    places: dict[TensorId, str]
    _graph: Graph | None

    def named(self, name: TensorId) -> Nest:
        """The IDs under which what a key names is kept."""

    def _value(self, name: TensorId) -> Tensor: ...

    def _at(self, site: Site, value: Tensor) -> Tensor: ...

    def _heard_at(self, name: TensorId) -> Slot | None: ...


class Gradients(Mapping[str, Tensor]):
    """Gradients by ID. The gradient of an ID is that of the value, also where it was overwritten later."""

    def __init__(self, owner: Holder) -> None:
        self._pass = owner

    def __getitem__(self, key: Key) -> Tensor:
        return alone(lambda: self._read(key))

    def _read(self, key: Key) -> Tensor:
        here = self._pass
        name = the_one(id_of(key), here.named(id_of(key)))
        if not here.history:
            raise TrackError(f"No gradient of {str(name)!r}: the run kept no history. Track with grad=True.")
        here._value(name)
        if isinstance(key, Site):
            check_place(key, here.places, here._graph)
        grad = self._of(name)
        if grad is None:
            raise IdError(f"{str(name)!r} has no gradient: {self._why(name)}.")
        return here._at(key, grad) if isinstance(key, Site) else grad

    def __iter__(self) -> Any:
        here = self._pass
        return iter(alone(lambda: [name for name in {**here.slots, **here.values} if self._of(name) is not None]))

    def _of(self, name: TensorId) -> Tensor | None:
        here = self._pass
        if name in here.stored_grads:
            return here.stored_grads[name]
        slot = here._heard_at(name)
        return here.heard.of(slot) if slot is not None else None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        if not self._pass.history:
            return "Gradients: the run kept no history. Track with grad=True"
        return (
            f"Gradients of {number_of(len(self), 'value')}"
            if len(self)
            else "Gradients of no value: backward() has come to none yet"
        )

    def _why(self, name: TensorId) -> str:
        here = self._pass
        slot, graph = here._heard_at(name), here._graph
        untaken = here.heard.untaken.get(slot) if slot is not None else None
        aliases = [node for node in graph.nodes if node.op == ALIAS] if graph is not None else []
        later = [node.id for node in aliases if node.parents[0] == name]
        return _reason(name, here._value(name), untaken, here.apart, here.heard.reached, later)


def _reason(name: TensorId, value: Tensor, untaken: str | None, stored: bool, reached: bool, aliases: Sequence[str]) -> str:
    """Why a value has no gradient: the first reason that holds.

    untaken: what was noted when the value was made. stored: the pass was saved or copied. reached: backward came to some
    value of the pass. aliases: the IDs under which the value's tensor was read after its memory was overwritten.
    """
    if not (name.is_source or name.is_path) and outer_op(name) is not name:
        return (
            f"it lies inside {outer_op(name)}, a kernel that autograd passes as a whole, and was computed beside the path. "
            f"Expected a value outside the kernel, such as {outer_op(name)}"
        )
    if stored:
        return "the run had none when it was saved or copied. Read it in the run itself, after backward()"
    if untaken is not None:
        return f"{untaken}. Expected a value that the model computes with history"
    if not value.requires_grad:
        return _needs_none(name, value)
    if not reached:
        return "no backward() has come to any kept value of this pass. Expected backward() from a loss that depends on it"
    if aliases:
        return (
            f"its memory was overwritten through another view, and what reads it since is heard under another ID. "
            f"Expected {', '.join(aliases)}"
        )
    return "backward() ran and did not come to it. Expected a loss that depends on it"


def _needs_none(name: TensorId, value: Tensor) -> str:
    if not (value.is_floating_point() or value.is_complex()):
        return f"it holds {str(value.dtype).removeprefix('torch.')}, which autograd does not differentiate"
    if not (name.is_source or name.is_path) and name.parts.op in _DETACHING:
        return "the model detached it from the history. Expected a value before or beside it"
    return "it requires none: nothing that it was computed from does. Expected one that depends on a trained parameter"
