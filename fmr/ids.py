"""Names of values: `{scope}/{op}#{k}`, `{scope}/{op}#{k}:{i}`, `param:NAME`, `buffer:NAME`, `input:NAME`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fmr.errors import IdError

SOURCES = ("param:", "buffer:", "input:")
OPAQUE = "opaque"
_OP = re.compile(r"^(?P<op>[^/#:]+)#(?P<k>\d+)(?::(?P<i>\d+))?$")


class TensorId(str):
    """The name of one value in a graph: a plain string with its parts as properties.

    >>> TensorId("h.3.attn/softmax#0").scope
    'h.3.attn'
    """

    __slots__ = ()

    @property
    def is_source(self) -> bool:
        """Whether the value came from outside the pass: a parameter, a buffer or an input."""
        return self.startswith(SOURCES)

    @property
    def is_path(self) -> bool:
        """Whether it names no op and no source but what a module call returned: "h.3.mlp", "cell@2", "h.3.attn:0"."""
        return ("#" not in self or "/" not in self) and not self.startswith(SOURCES)

    @property
    def readings(self) -> tuple[tuple[str, str], ...]:
        """The dynamic path of a module call and the position in what it returned, in each way that a path may be read.

        >>> TensorId("h.3.attn:0").readings
        (('h.3.attn:0', ''), ('h.3.attn', '0'))
        """
        parts = self.split(":")
        return tuple((":".join(parts[:n]), ":".join(parts[n:])) for n in range(len(parts), 0, -1))

    @property
    def scope(self) -> str:
        """The module call (or fused op) that the op ran in; empty for the root and for sources."""
        return "" if self.is_source else self.rpartition("/")[0]

    @property
    def parts(self) -> "OpPart":
        """The op's name, its running number and the index of the output (None for the only one)."""
        found = None if self.is_source else _OP.match(self.rpartition("/")[2])
        if found is None or "/" not in self:
            raise IdError(
                f"{str(self)!r} is not the ID of an op. Expected '{{scope}}/{{op}}#{{k}}', as in "
                f"'h.0.attn/softmax#0', with an empty scope for the root: '/add#0'."
            )
        index = found["i"]
        return OpPart(found["op"], int(found["k"]), None if index is None else int(index))


class OpPart(NamedTuple):
    """The last part of an op's ID."""

    op: str
    k: int
    output: int | None


def op_id(scope: str, op: str, k: int, index: int | None = None) -> TensorId:
    """The ID of output `index` of the k-th op of this name in a scope."""
    return TensorId(f"{scope}/{op}#{k}" if index is None else f"{scope}/{op}#{k}:{index}")


def within(scope: str, path: str) -> bool:
    """Whether a module call or a fused op is that of a path or lies inside it; everything lies inside the root.

    >>> within("h.1.attn", "h.1"), within("h.10.attn", "h.1")
    (True, False)
    """
    return not path or scope == path or scope.startswith((f"{path}.", f"{path}/"))


def relative(scope: str, path: str) -> str:
    """The place of a module call or a fused op as seen from a path around it; all of it where it lies elsewhere.

    >>> relative("h.1.attn", "h.1")
    'attn'
    """
    return scope[len(path) :].lstrip("./") if within(scope, path) else scope


class Parent(TensorId):
    """The ID of a value that an op reads, which also knows the argument that it fills.

    `at` is the argument's position: "0", "mask", or "0.2" for the third tensor of a list given first.
    """

    __slots__ = ("at",)
    at: str

    def __new__(cls, id: str, at: str) -> "Parent":
        parent = super().__new__(cls, id)
        parent.at = at
        return parent

    def __reduce__(self) -> tuple[Any, ...]:
        return Parent, (str(self), self.at)

    @property
    def id(self) -> TensorId:
        return TensorId(self)


Index = int | slice | list[int] | torch.Tensor | None

_LAYOUTS = {
    1: ("units",),
    2: ("examples", "units"),
    3: ("examples", "positions", "units"),
    4: ("examples", "heads", "positions", "units"),
}


@dataclass(frozen=True, eq=False)
class Site:
    """An ID plus a selection inside its tensor.

    >>> Site("h.3.attn/softmax#0", heads=5)
    Site('h.3.attn/softmax#0', heads=5)

    `layout` names the tensor's dimensions in order. The default reads (examples, positions, units) for three
    dimensions and (examples, heads, positions, units) for four; a tensor laid out otherwise states its own. With
    `n_heads`, a tensor with another number of heads is refused: it is laid out otherwise than where the site was found.
    `where` is the call site of what makes the value, as `fmr.locate` found it: a pass in which the value of this ID is made
    elsewhere is refused. It is neither printed nor compared.
    """

    id: TensorId
    positions: Index = None
    heads: Index = None
    units: Index = None
    examples: Index = None
    layout: tuple[str, ...] | None = None
    n_heads: int | None = None
    where: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", TensorId(self.id))

    @property
    def selection(self) -> dict[str, Index]:
        """The axes that are narrowed, with what is taken of each."""
        axes = {"positions": self.positions, "heads": self.heads, "units": self.units, "examples": self.examples}
        return {axis: index for axis, index in axes.items() if index is not None}

    def made_at(self, where: str | None) -> "Site":
        """The same site of a value that is made at this call site."""
        return replace(self, where=where)

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The selected part of the tensor; an int drops its axis, a slice or a list keeps it."""
        layout = self.layout or _LAYOUTS.get(value.dim(), ())
        for axis in self.selection:
            if axis not in layout:
                raise IdError(
                    f"{self!r} selects {axis}, but {str(self.id)!r} has shape {tuple(value.shape)} "
                    f"with axes {layout}. Pass layout=(...) that names one axis per dimension."
                )
        if self.heads is not None and self.n_heads not in (None, value.shape[layout.index("heads")]):
            raise IdError(
                f"{self!r} selects one of {self.n_heads} heads, but {str(self.id)!r} has shape {tuple(value.shape)}, not "
                f"laid out as {layout} like where it was found. Locate it in this run or pass: fmr.locate(run.passes[i])."
            )
        chosen = value
        for axis, index in sorted(self.selection.items(), key=lambda item: -layout.index(item[0])):
            try:
                chosen = chosen[(slice(None),) * layout.index(axis) + (index,)]
            except IndexError:
                raise IdError(
                    f"{self!r} selects {axis}={index!r}, but {str(self.id)!r} has shape {tuple(value.shape)}: expected "
                    f"indices below {value.shape[layout.index(axis)]} along {axis}."
                ) from None
        return chosen

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and repr(self) == repr(other) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        chosen = "".join(f", {axis}={index!r}" for axis, index in self.selection.items())
        return f"Site({str(self.id)!r}{chosen})"


ALIAS = "alias"


RESULT = "result"
"""The op of a fused node in an unfused graph: it hands on what its inner nodes made."""


def outer_scope(name: str) -> str:
    """The scope of the op of the model inside which an ID lies; empty for an ID that lies inside none."""
    parts = name.split("/", 2)
    return "/".join(parts[:2]) if len(parts) > 2 else ""


def used_name(name: str, same: Iterable[tuple[str, ...]], known: Iterable[str]) -> str:
    """What an error says of an ID or a path whose module or tensor goes by another of its registered names, else nothing.

    `same` has the names of each module and tensor that has several, `known` the IDs and paths that exist.
    """
    names = set(known)
    for group in same:
        for other in group:
            for one in group:
                renamed = one + name.removeprefix(other)
                if one != other and (name == other or name.startswith((f"{other}/", f"{other}@"))) and renamed in names:
                    return f" {other!r} is registered as {one!r}, too, and goes by that name: {renamed!r}."
    return ""


def outer_op(name: TensorId) -> TensorId:
    """The op of the model that an ID belongs to: itself, or the fused op whose scope it lies in."""
    while "/" in name.scope:
        head, _, tail = name.partition("/")
        name = TensorId(f"{head}/{tail.partition('/')[0]}")
    return name
