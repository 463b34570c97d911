"""The edits of a run, by the ID that each acts on: applied to a value when the model makes it, counted, checked."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fmr.edits.frames import Frames
from fmr.edits.layouts import unpacked
from fmr.edits.places import Part, extent, kept, parts, repeats
from fmr.edits.receipts import Receipt, Tally
from fmr.edits.values import Context, Edit, OnGradient
from fmr.errors import EditError, nearest
from fmr.ids import Site, TensorId
from fmr.nodes import Key, id_of
from fmr.subspaces.space import Space
from fmr.watching.storage import is_equal

Asked = Mapping[Key, Edit | Sequence[Edit]]
"""What a run is asked to edit: sites, IDs, nodes or module paths, each with an edit or several in their order."""

Source = Callable[[Any, Site, int, tuple[int, ...] | None, bool, bool], Tensor]
"""Reads what an `Interchange` takes: from a source, at a site, in a pass, of these examples; or the gradient there.

The last tells that the padding of this pass was told by calls inside it, as the source's has to be.
"""


@dataclass
class Entry:
    """One edit of one site; it `waits` where a gradient is yet to come back to it. `positions` is how many were there.

    `met` is the shape of a value of which the site selects nothing, with its axes.
    """

    site: Site
    edit: Edit
    tally: Tally = field(default_factory=Tally)
    waits: bool = False
    positions: int = 0
    met: tuple[tuple[int, ...], tuple[str, ...]] | None = None

    def meets(self, number: int) -> bool:
        """Whether the edit is meant for a pass."""
        passes = self.site.passes
        if passes is None:
            return True
        if isinstance(passes, slice):
            return number in range(number + 1)[passes]
        return number in ([passes] if isinstance(passes, int) else passes)


class Editor:
    """Applies the edits of a run; `frames` tells the pass's columns, `source` reads what interchanges take.

    `of_sources` says whether any is of an input, a parameter or a buffer.
    """

    def __init__(self, asked: Asked, source: Source | None = None) -> None:
        self.entries = list(entries(asked))
        self.by_id: dict[TensorId, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            self.by_id[entry.site.id].append(entry)
        self.of_sources = any(name.is_source for name in self.by_id)
        self.of_positions = any(entry.site.positions is not None for entry in self.entries)
        self.source, self.number = source, -1
        self.frames: Callable[[], Frames] = list

    @property
    def ids(self) -> tuple[TensorId, ...]:
        """The IDs and module paths that are edited."""
        return tuple(self.by_id)

    def edits_value(self, name: TensorId) -> bool:
        """Whether the value of an ID is edited, and not only what comes back to it."""
        return any(not isinstance(entry.edit, OnGradient) for entry in self.by_id[name])

    def begin(self, frames: Callable[[], Frames]) -> None:
        """The next pass begins."""
        self.number += 1
        self.frames = frames

    def apply(self, name: TensorId, value: Tensor, given: Tensor | None = None) -> Tensor:
        """The value that the model goes on with: itself where no edit changed it, else one of its own memory."""
        if value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise EditError(f"{str(name)!r} is a {kind} tensor, whose elements have no plain places. Edit what reads it.")
        if not is_computable(value.dtype):
            raise EditError(
                f"{str(name)!r} holds {value.dtype}, which torch does not turn into plain numbers. Edit what it is made of, "
                f"or what is made of it."
            )
        now = value
        for entry in self.by_id[name]:
            if not entry.meets(self.number):
                continue
            if isinstance(entry.edit, OnGradient):
                now = self._hooked(entry, entry.edit.edit, _like(now, value))
            else:
                after = self._made(entry, entry.edit, now, given)
                now = now if after is now else _like(after, value)
        if value.requires_grad and not now.requires_grad and torch.is_grad_enabled():
            now.requires_grad_()  # what comes back to it is told, and some kernels round by it
        return now

    def _made(self, entry: Entry, edit: Edit, value: Tensor, given: Tensor | None) -> Tensor:
        """The value with an edit, of a type in which torch can do what that asks for."""
        try:
            return self._changed(entry, edit, value, given)
        except NotImplementedError as error:
            raise EditError(
                f"The edit of {entry.site!r} asks for what torch does not do in {value.dtype}: {error}. Compute in another "
                f"type: lambda value, context: edit(value.float(), context).to(value.dtype)."
            ) from error

    def _changed(self, entry: Entry, edit: Edit, whole: Tensor, given: Tensor | None) -> Tensor:
        value = start = unpacked(entry.site, whole)
        known = self.frames() if entry.site.positions is not None else []
        if entry.site.positions is not None:
            entry.positions = max(entry.positions, extent(entry.site, value, known))
        entry.met = tuple(value.shape), entry.site.axes(value)
        for part in parts(entry.site, value, known):
            before = part.of(value)
            if not before.numel() and value.numel():
                continue  # of a selection of nothing an edit does not fire
            after = _result(edit, before, self._context(entry, part, given, value))
            changed = value if after is before else part.put(value, after)
            entry.tally.add(*((value, changed) if repeats(part.site, value) else (before, after)))
            value = changed
        return whole if value is start else value.reshape(whole.shape)

    def _context(self, entry: Entry, part: Part, given: Tensor | None, value: Tensor) -> Context:
        source, number = self.source, self.number
        if given is not None and given.shape == value.shape:
            given = part.of(given)

        def read(origin: Any, at: Key) -> Tensor:
            assert source is not None
            site = at if isinstance(at, Site) else Site(id_of(at))
            within = getattr(self.frames, "is_told_within", False)
            return source(origin, site, number, part.examples, isinstance(entry.edit, OnGradient), within)

        reader = read if source is not None else None
        axes = kept(entry.site, value)
        dropped = tuple(axis for axis in entry.site.selection if axis not in axes)
        return Context(
            entry.site.id, entry.site, self.number, entry.tally.fired, given, reader, part.examples, axes, dropped
        )

    def _hooked(self, entry: Entry, edit: Edit, value: Tensor) -> Tensor:
        """The value, a copy of the model's own, with an edit on the gradient that comes back to it."""
        if not (value.requires_grad and torch.is_grad_enabled()):
            raise EditError(
                f"No gradient flows back through {entry.site!r}. Expected a run with grad=True and a value that depends on "
                f"something that requires a gradient."
            )
        frames, number = self.frames, self.number
        entry.waits = True

        def change(gradient: Tensor) -> Tensor:
            before = self.frames, self.number
            self.frames, self.number = frames, number
            try:
                return _like(self._made(entry, edit, gradient, None), gradient)
            finally:
                self.frames, self.number = before

        value.register_hook(change)
        return value


class Receipts(Mapping[Site, Receipt]):
    """The receipts of a run by site, or by the ID of a site that was edited as a whole."""

    def __init__(self, tallies: Mapping[Site, list[Tally]]) -> None:
        self._tallies = tallies

    @classmethod
    def of(cls, editors: Iterable[Editor]) -> "Receipts":
        """What the edits of a run did so far."""
        tallies: dict[Site, list[Tally]] = defaultdict(list)
        for editor in editors:
            for entry in editor.entries:
                tallies[entry.site].append(entry.tally)
        return cls(tallies)

    def __getitem__(self, key: Key) -> Receipt:
        site = key if isinstance(key, Site) else Site(id_of(key))
        if site not in self._tallies:
            edited = ", ".join(map(repr, self._tallies)) or "none"
            close = nearest(str(site.id), [str(one.id) for one in self._tallies])
            raise EditError(f"{site!r} was not edited in this run. Edited were: {edited}.{close}")
        told = [tally.receipt for tally in self._tallies[site]]
        norm = sum(one.norm**2 for one in told) ** 0.5
        return Receipt(max(one.fired for one in told), sum(one.changed for one in told), norm)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._tallies)

    def __len__(self) -> int:
        return len(self._tallies)

    def __repr__(self) -> str:
        return "\n".join(f"{site!r}: {self[site]!r}" for site in self) or "Receipts: nothing was edited"


def entries(asked: Asked) -> Iterator[Entry]:
    """The edits of a mapping one by one, in its order."""
    if not isinstance(asked, Mapping):
        raise EditError(
            f"edits is {type(asked).__name__}, expected a mapping from sites to edits: edits={{site: edits.Zero()}}."
        )
    for key, wanted in asked.items():
        site = key if isinstance(key, Site) else Site(id_of(key))
        _check_passes(site)
        several = wanted if isinstance(wanted, (list, tuple)) else (wanted,)
        for edit in several:
            if not callable(edit) or isinstance(edit, (type, Space)):
                raise EditError(f"The edit of {site!r} is {_no_edit(edit)}")
            yield Entry(site, edit)


def _no_edit(given: object) -> str:
    """What was given in place of an edit, and what was expected."""
    if isinstance(given, Tensor):
        shape = tuple(given.shape)
        return (
            f"a tensor of shape {shape}, expected one of fmr.edits: edits.Replace(tensor) puts it there, edits.Add adds it."
        )
    if isinstance(given, Space):
        return (
            f"{given!r}, a subspace, expected an edit within it: edits.Zero(within=...), edits.Interchange(..., within=...)."
        )
    hint = f" Make one: {given.__name__}(...)." if isinstance(given, type) else ""
    return f"{given!r}, expected one of fmr.edits or f(value, context).{hint}"


@lru_cache(maxsize=64)
def is_computable(dtype: torch.dtype) -> bool:
    """Whether the numbers of a type can be told: those of a quantised or packed one cannot without more."""
    try:
        return dtype.is_complex or torch.empty(1, dtype=dtype).double().numel() == 1
    except (RuntimeError, NotImplementedError):
        return False


def _check_passes(site: Site) -> None:
    """Raise for passes that are no numbers of passes."""
    passes = site.passes
    found = [passes.start, passes.stop] if isinstance(passes, slice) else passes if isinstance(passes, list) else [passes]
    numbers = [number for number in found if number is not None]
    if any(type(number) is not int for number in numbers):
        raise EditError(f"{site!r} chooses passes={passes!r}. Expected a whole number, a slice, or a list of whole numbers.")
    if any(number < 0 for number in numbers):
        raise EditError(f"{site!r} counts passes from the last, which no run knows before it ends. Count from 0.")


def _result(edit: Edit, value: Tensor, context: Context) -> Tensor:
    """What an edit makes of a part, checked."""
    version = None if value.is_inference() else value._version
    named = f"The edit of {context.site!r}"
    numbers = None if type(edit).__module__ == Context.__module__ else value.detach().clone()  # which write nothing
    try:
        found = edit(value, context)
    except BaseException as error:
        _put_back(value, numbers)
        if not isinstance(
            error, TypeError
        ):  # which Python's operators take for "not of this kind", and ask the other operand
            raise
        raise EditError(f"{named} raised a TypeError: {error}. Expected f(value, context) that returns a tensor.") from error
    if value._version != version if version is not None else numbers is not None and not is_equal(value, numbers):
        _put_back(value, numbers)
        raise EditError(f"{named} wrote into the value that it was given. Expected a new tensor: begin with value.clone().")
    if not isinstance(found, Tensor):
        raise EditError(f"{named} returned {type(found).__name__}, expected a tensor of shape {tuple(value.shape)}.")
    if found.shape != value.shape or found.dtype != value.dtype or found.device != value.device:
        raise EditError(
            f"{named} returned {found.dtype} {tuple(found.shape)} on {found.device}, expected {value.dtype} "
            f"{tuple(value.shape)} on {value.device}, like what it was given."
        )
    return found


def _put_back(value: Tensor, numbers: Tensor | None) -> None:
    """Give a value, which may lie in the memory of a parameter, an input or a recording, the numbers that it had."""
    if numbers is not None and not is_equal(value, numbers):
        with torch.no_grad():
            value.copy_(numbers)


def _like(made: Tensor, value: Tensor) -> Tensor:
    """A new tensor with these numbers, laid out in memory like the value, since kernels round by layout."""
    dense = all(stride or size == 1 for size, stride in zip(value.shape, value.stride(), strict=True))
    if not dense:
        return made.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(made)
