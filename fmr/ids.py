"""Names of values: `{scope}/{op}#{k}`, `{scope}/{op}#{k}:{i}`, `param:NAME`, `buffer:NAME`, `input:NAME`.

A scope and a NAME are registered names joined by dots. What has a meaning in IDs or globs is written in a registered name as
in an address: a module that is called "a/b" has the path "a%2Fb".
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

import torch

from fmr.errors import IdError, whole_number

SOURCES = ("param:", "buffer:", "input:")
OPAQUE = "opaque"
_OP = re.compile(r"^(?P<op>[^/#:]+)#(?P<k>\d+)(?::(?P<i>\d+))?$")

_SPECIAL = re.compile(r"[/*?\[\].%\x00-\x1f\x7f]|@(?=\d+$)|(?<=^param):|(?<=^buffer):|(?<=^input):")
_NAMELESS = "%"


@lru_cache(maxsize=4096)
def spelled(name: str) -> str:
    """A registered name as it stands in paths and IDs, without what would have a meaning there.

    >>> spelled("c_attn"), spelled("en->de:0"), spelled("a/b"), spelled("cell@1"), spelled("")
    ('c_attn', 'en->de:0', 'a%2Fb', 'cell%401', '%')
    """
    return _SPECIAL.sub(lambda found: f"%{ord(found[0]):02X}", name) or _NAMELESS


def unspelled(part: str) -> str:
    """The registered name that stands in a path so.

    >>> unspelled("a%2Fb")
    'a/b'
    """
    return "" if part == _NAMELESS else unquote(part)


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
    @lru_cache(maxsize=1 << 14)  # noqa: B019 (it is a string, and holds nothing)
    def parts(self) -> "OpPart":
        """The op's name, its running number and the index of the output (None for the only one)."""
        found = None if self.is_source else _OP.match(self.rpartition("/")[2])
        if found is None or "/" not in self:
            raise IdError(
                f"{str(self)!r} is not the ID of an op. Expected '{{scope}}/{{op}}#{{k}}', as in "
                f"'h.0.attn/softmax#0', with an empty scope for the root: '/add#0'."
            )
        return OpPart(found["op"], int(found["k"]), None if found["i"] is None else int(found["i"]))


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

    `at` is the argument's position: "0", "mask", or "0.2" for the third tensor of a list given first; `id` is the ID alone.
    """

    __slots__ = ("at", "id")
    at: str
    id: TensorId

    def __new__(cls, id: str, at: str) -> "Parent":
        parent = super().__new__(cls, id)
        parent.at, parent.id = at, TensorId(id)
        return parent

    def __reduce__(self) -> tuple[Any, ...]:
        return Parent, (str(self), self.at)


Index = int | slice | list[int] | list[list[int]] | torch.Tensor | None
"""What is taken of an axis: one, a range, several, or a row of them for each example."""

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
    >>> Site("h.3.attn/softmax#0").at(positions=[[3], [7]])  # a row for each example
    Site('h.3.attn/softmax#0', positions=[[3], [7]])

    An index is an int (its axis is dropped), a slice, a list, or a list of one row per example, which means that example
    alone. `positions` are those of real tokens under padding, and absolute under a cache.
    `passes` narrows an edit to some of the model's calls. `layout` names the tensor's dimensions in order. The
    default reads (examples, positions, units) for three dimensions and (examples, heads, positions, units) for four; a
    tensor laid out otherwise states its own. With `n_heads`, a tensor with another number of heads is refused: it is laid
    out otherwise than where the site was found.
    `where` is the call site of what makes the value, as `fmr.locate` found it: a pass in which the value of this ID is made
    elsewhere is refused. It is neither printed nor compared.
    """

    id: TensorId
    positions: "Index" = None
    heads: "Index" = None
    units: "Index" = None
    examples: "Index" = None
    passes: int | slice | list[int] | None = None
    layout: tuple[str, ...] | None = None
    n_heads: int | None = None
    where: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            raise IdError(
                f"fmr.Site got {type(self.id).__name__}, expected an ID or the path of a module, as a node's .id is."
            )
        object.__setattr__(self, "id", TensorId(self.id))
        for axis in _AXES:
            if getattr(index := getattr(self, axis), "ndim", 0) == 0 and whole_number(index) is not None:
                object.__setattr__(self, axis, whole_number(index))
            if not _is_index(getattr(self, axis)):
                raise IdError(
                    f"{axis}={getattr(self, axis)!r} of a Site at {str(self.id)!r} is no index. Expected a whole number, a "
                    "slice, a list of whole numbers or of as many for each example, as [[1, 2], [3, 3]], or a tensor."
                )

    def at(self, **chosen: Any) -> "Site":
        """The same site, narrowed further: `positions`, `heads`, `units`, `examples` or `passes`.

        >>> Site("h.3.attn/softmax#0").at(heads=[1, 5], positions=-1)
        Site('h.3.attn/softmax#0', positions=-1, heads=[1, 5])
        """
        known = (*_AXES, "passes")
        for axis, index in chosen.items():
            if axis not in known:
                raise IdError(f"{self!r} has no {axis!r} to narrow. Expected one of {', '.join(known)}.")
            if index is not None and getattr(self, axis) is not None:
                again = f"Narrow another axis, or begin with fmr.Site({str(self.id)!r})."
                raise IdError(f"{self!r} selects {axis} already. {again}")
        return replace(self, **chosen)

    @property
    def selection(self) -> "dict[str, Index]":
        """The axes that are narrowed, with what is taken of each."""
        return {axis: getattr(self, axis) for axis in _AXES if getattr(self, axis) is not None}

    def made_at(self, where: str | None) -> "Site":
        """The same site of a value that is made at this call site."""
        return replace(self, where=where)

    def check_made_at(self, here: str, now: str = "") -> None:
        """Raise where the value of this ID is made at another call site; files are told by their names alone.

        `now` is the ID that what was found goes by, where that is known; then it is an error, too, that nothing has this ID.
        """
        if not self.where or here.rpartition("/")[2] == self.where.rpartition("/")[2] or not (here or now):
            return
        made = f"{here} makes {str(self.id)!r}, which is another value" if here else "nothing has this ID"
        found = f" What is made there has the ID {now!r} now." if now else ""
        raise IdError(
            f"{self!r} was found as the value that {self.where} makes. In this pass {made}: the model took another branch."
            f"{found} Locate it in this run or pass: fmr.locate(run.passes[i])."
        )

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The selected part of the tensor; an int drops its axis, a slice or a list keeps it."""
        return value[self.index(value)] if self.selection else value

    def put(self, value: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """A new tensor: the value with its selected part replaced."""
        if not self.selection:
            return part
        changed = value.clone()
        changed[self.index(value)] = part
        return changed

    def index(self, value: torch.Tensor) -> tuple[Any, ...]:
        """What to index the tensor with: each axis is taken by itself, a row by its example."""
        shape, layout = tuple(value.shape), self.axes(value)
        chosen = {axis: self._checked(axis, index, shape, layout) for axis, index in self.selection.items()}
        if all(isinstance(index, (int, slice)) for index in chosen.values()):
            return tuple(chosen.get(axis, slice(None)) for axis in layout)
        return self._crossed(chosen, shape, layout, value.device)

    def axes(self, value: torch.Tensor) -> tuple[str, ...]:
        """What each dimension of the tensor counts."""
        layout = self.layout or _LAYOUTS.get(value.dim(), ())
        if self.layout and (len(layout) != value.dim() or len(set(layout)) != len(layout)):
            raise IdError(
                f"{self!r} has layout={layout}, but {str(self.id)!r} has shape {tuple(value.shape)}. Expected a name for "
                f"each dimension, each once."
            )
        for axis in self.selection:
            if axis not in layout:
                raise IdError(
                    f"{self!r} selects {axis}, but {str(self.id)!r} has shape {tuple(value.shape)} "
                    f"with axes {layout}. Pass layout=(...) that names one axis per dimension."
                )
        chosen = "heads" in layout and not self.selection.keys().isdisjoint(("heads", "positions"))
        if chosen and self.n_heads not in (None, value.shape[layout.index("heads")]):
            raise IdError(
                f"{self!r} means a value of {self.n_heads} heads, but {str(self.id)!r} has shape {tuple(value.shape)}, not "
                f"laid out as {layout} like where it was found. Locate it in this run or pass: fmr.locate(run.passes[i])."
            )
        return layout

    def _checked(self, axis: str, index: Index, shape: tuple[int, ...], layout: tuple[str, ...]) -> Any:
        """An index as an int, a slice, or a tensor of places of one or two dimensions, all within the axis."""
        length = shape[layout.index(axis)]
        if isinstance(index, slice):
            return index
        if (chosen := torch.as_tensor(index)).dtype == torch.bool and len(chosen) != length:
            raise IdError(f"{self!r} has a mask of {len(chosen)} over {length} {axis}: expected as many.")
        places = self.places(axis)
        if axis == "examples" and places.dim() > 1:
            raise IdError(f"{self!r} has rows of examples, expected one list of them: examples=[0, 2].")
        if ((places < -length) | (places >= length)).any():
            raise IdError(
                f"{self!r} selects {axis}={index!r}, but {str(self.id)!r} has shape {shape}: expected "
                f"indices below {length} along {axis}."
            )
        self._check_rows(axis, places, shape, layout)
        return int(places) if places.dim() == 0 else places % length

    def places(self, axis: str) -> torch.Tensor:
        """The indices along an axis: one, several, or a row of them for each example."""
        places = torch.as_tensor(getattr(self, axis))
        return places.nonzero()[:, 0] if places.dtype == torch.bool else places.long()

    def check_examples(self, value: torch.Tensor, layout: tuple[str, ...]) -> None:
        """Raise for examples that a tensor does not have, and for rows of positions of more or fewer examples."""
        shape = tuple(value.shape)
        if "examples" in self.selection:
            self._checked("examples", self.examples, shape, layout)
        if self.positions is not None and not isinstance(self.positions, slice):
            self._check_rows("positions", self.places("positions"), shape, layout)

    def _check_rows(self, axis: str, places: torch.Tensor, shape: tuple[int, ...], layout: tuple[str, ...]) -> None:
        """Raise for rows of places that are not one for each example."""
        rows = shape[layout.index("examples")] if "examples" in layout else "no"
        if places.dim() == 2 and len(places) != rows:
            raise IdError(f"{self!r} has {len(places)} rows of {axis}, but {str(self.id)!r} has {rows} examples.")

    def _crossed(
        self, chosen: dict[str, Any], shape: tuple[int, ...], layout: tuple[str, ...], device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """The same as one tensor of places for each axis, which broadcast against one another."""
        kept = [axis for axis in layout if not isinstance(chosen.get(axis), int)]
        examples = self._places(chosen.get("examples"), shape[layout.index("examples")]) if "examples" in layout else None
        found = []
        for axis, length in zip(layout, shape, strict=True):
            index = chosen.get(axis)
            if isinstance(index, torch.Tensor) and index.dim() == 2:
                index = index[examples]
            places = self._places(index, length)
            counted = ["examples"] * (places.dim() == 2) + [axis] * (axis in kept)
            if places.dim() == 2 and kept.index("examples") > kept.index(axis):
                places = places.T
            sizes = [places.shape[counted.index(one)] if one in counted else 1 for one in kept]
            found.append(places.to(device).reshape(sizes))
        return tuple(found)

    @staticmethod
    def _places(index: Any, length: int) -> torch.Tensor:
        if isinstance(index, torch.Tensor):
            return index
        every = torch.arange(length)
        return every if index is None else every[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self._told() == other._told() and self.layout == other.layout

    def __hash__(self) -> int:
        return hash(self._told())

    def _told(self) -> str:
        """All that is selected, where a long tensor prints its ends alone."""
        plain = (one.tolist() if isinstance(one, torch.Tensor) else one for one in self.selection.values())
        return f"{self.id} {list(self.selection)} {list(plain)} {self.passes}"

    def __repr__(self) -> str:
        told = self.selection if self.passes is None else {**self.selection, "passes": self.passes}
        chosen = "".join(f", {axis}={index!r}" for axis, index in told.items())
        return f"Site({str(self.id)!r}{chosen})"


_AXES = ("positions", "heads", "units", "examples")


def _is_index(given: object) -> bool:
    """Whether an object says what is taken of an axis."""
    if given is None or isinstance(given, slice):
        return True
    if isinstance(given, (str, bytes, dict)):
        return False
    try:
        places = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    if places.dtype == torch.bool:
        return places.dim() == 1
    return places.numel() == 0 or not (places.is_floating_point() or places.is_complex() or places.dim() > 2)


ALIAS = "alias"
RESULT = "result"
"""The op of a fused node in an unfused graph: it hands on what its inner nodes made."""


def outer_scope(name: str) -> str:
    """The scope of the op of the model inside which an ID lies; empty for an ID that lies inside none."""
    parts = name.split("/", 2)
    return "/".join(parts[:2]) if len(parts) > 2 else ""


def outer_op(name: TensorId) -> TensorId:
    """The op of the model that an ID belongs to: itself, or the fused op whose scope it lies in."""
    whole = name
    while "/" in name.scope:
        head, _, tail = name.partition("/")
        name = TensorId(f"{head}/{tail.partition('/')[0]}")
    if name != whole and _OP.match(name.rpartition("/")[2]) is None:
        raise IdError(
            f"{str(whole)!r} is no ID: its part {str(name)!r} is no op with values inside it. "
            "Expected '{scope}/{op}#{k}'; a '/' in the name of a module is written '%2F'."
        )
    return name
