"""Which column of a value is which position: real tokens under padding, absolute ones while a model generates."""

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache as once
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmr.errors import EditError
from fmr.ids import Site
from fmr.watching.own import unseen


class Frame(NamedTuple):
    """What a pass tells about positions: how many came before it, and which columns hold real tokens, example by example.

    `mask` covers the columns that came before, too; it is None where nothing is padded. `past` is None where nothing tells.
    """

    past: int | None = 0
    mask: Tensor | None = None


Frames = list[tuple[int, Frame]]
"""The frames of a pass, each with how many columns it is for."""


def frames(named: Mapping[str, Any], past: int | None = 0) -> Frames:
    """The frames of a pass, read off its named inputs; `past` is how many columns a cache held before.

    Tokens stand in a two-dimensional tensor of integers `{x}input_ids` (or in `{x}inputs_embeds`), which of them are real
    in `{x}attention_mask`; a mask without tokens is that of what another pass has made of them.
    """
    found = []
    kinds = {name: next((kind for kind in _KINDS if name.endswith(kind)), "") for name in named}
    tokens = {name.removesuffix(kind) for name, kind in kinds.items() if kind in _TOKENS and named[name].dim() >= 2}
    for name, kind in kinds.items():
        prefix = name.removesuffix(kind)
        given = named.get(prefix + _MASK)
        real = given.bool() if given is not None and given.dim() == 2 else None
        mask = None if real is None or bool(real.all()) else real
        if kind in _TOKENS and prefix in tokens:
            columns = named[name].shape[1]
            before = past if len(tokens) == 1 or prefix.endswith("decoder_") else 0
            if real is not None and real.shape[1] > columns:
                before = real.shape[1] - columns
            elif mask is not None and before:
                before = None  # which of the columns before are real is not told
            found.append((columns, Frame(before, mask)))
            if before:
                found.append((before + columns, Frame(0, mask)))
        elif kind == _MASK and prefix not in tokens and real is not None:
            found.append((real.shape[1], Frame(0, mask)))
    return found


_TOKENS = ("input_ids", "inputs_embeds")
_MASK = "attention_mask"
_KINDS = (*_TOKENS, _MASK)


class Pasts:
    """What the passes of a block tell about positions; of a cache that does not know its length, what went into it."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, int, Tensor | None]] = {}

    def frames_of(self, arguments: Mapping[str, Any]) -> Callable[[], Frames]:
        """The frames of a pass that begins with these arguments, by name; worked out when they are first asked for."""
        given = dict(arguments)
        for name, value in arguments.items():
            if isinstance(value, Mapping):
                given.update((f"{name}.{key}", item) for key, item in value.items())
        named = {name: _apart(name, value) for name, value in given.items() if name.endswith(_KINDS) and _is_table(value)}
        cache = next((value for value in given.values() if hasattr(value, "get_seq_length")), None)
        past = 0 if cache is None else self._past(cache, named)
        return once(lambda: frames(named, past))

    def _past(self, cache: Any, named: dict[str, Tensor]) -> int | None:
        """How many columns a cache holds; where it cannot tell, those of the passes that it was given to since it was new."""
        with suppress(ValueError, TypeError, NotImplementedError):
            return int(cache.get_seq_length())
        is_new = hasattr(cache, "has_previous_state") and not cache.has_previous_state()
        kept, past, mask = (lambda: cache, 0, None) if is_new else self._seen.get(id(cache), (lambda: None, 0, None))
        if kept() is not cache:
            return None
        columns = next((value.shape[1] for name, value in named.items() if name.endswith(_TOKENS)), 0)
        now = next((value for name, value in named.items() if name.endswith(_MASK)), None)
        if now is None and mask is not None:
            now = torch.cat([mask, mask.new_ones(len(mask), columns)], 1)
            named.update({name.removesuffix(kind) + _MASK: now for name in [*named] for kind in _TOKENS if name.endswith(kind)})
        self._seen[id(cache)] = weakref.ref(cache), past + columns, now
        return past


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and value.dim() >= 2


def _apart(name: str, value: Tensor) -> Tensor:
    """A mask that stays as it is now; of tokens only the shape counts."""
    with unseen():
        return value.detach().clone() if name.endswith(_MASK) else value.detach()


class Part(NamedTuple):
    """A part of a value that an edit acts on at once: a site with columns for positions, and the examples if not all.

    `drop` is the axis that a single position leaves, for an edit that was promised none.
    """

    site: Site
    examples: tuple[int, ...] | None = None
    drop: int | None = None

    def of(self, value: Tensor) -> Tensor:
        """The part as the edit sees it."""
        part = self.site.of(value)
        return part if self.drop is None else part.squeeze(self.drop)

    def put(self, value: Tensor, part: Tensor) -> Tensor:
        """A new value with the part replaced."""
        return self.site.put(value, part if self.drop is None else part.unsqueeze(self.drop))


def parts(site: Site, value: Tensor, known: Frames) -> list[Part]:
    """The parts of a value that a site means: one where every example has as many, else one for each that has any."""
    layout = site.axes(value)
    if "positions" not in site.selection:
        return [Part(site)]
    columns = value.shape[layout.index("positions")]
    frame = _frame(site, columns, known)
    if frame == Frame() and _all_there(site, columns):
        return [Part(site)]
    count = value.shape[layout.index("examples")] if "examples" in layout else 1
    site.check_examples(value, layout)
    rows = [_columns(site, frame, columns, example) for example in range(count)]
    drop = _kept(site, layout).index("positions") if isinstance(site.positions, int) else None
    if "examples" not in layout:
        return [Part(replace(site, positions=rows[0]), None, drop)] if rows[0] else []
    chosen = range(count) if site.examples is None else torch.arange(count)[site.examples].reshape(-1).tolist()
    if len({len(rows[example]) for example in chosen}) == 1:
        as_many = [row if len(row) == len(rows[chosen[0]]) else rows[chosen[0]] for row in rows]
        return [Part(replace(site, positions=as_many), None, drop)] if rows[chosen[0]] else []
    return [
        Part(replace(site, positions=rows[example], examples=[example]), (example,), drop)
        for example in chosen
        if rows[example]
    ]


def extent(site: Site, value: Tensor, known: Frames) -> int:
    """How many positions a value is known to have, with those that came before: of its longest example."""
    columns = value.shape[site.axes(value).index("positions")]
    frame = _frame(site, columns, known)
    return (frame.past or 0) + columns if frame.mask is None else int(frame.mask.sum(1).max())


def _all_there(site: Site, columns: int) -> bool:
    """Whether every position of a site is a column of this value; one that is not may be one of a later pass."""
    if isinstance(site.positions, slice):
        return True
    places = site.places("positions")
    return bool(((places >= -columns) & (places < columns)).all())


def _frame(site: Site, columns: int, known: Frames) -> Frame:
    """The frame for a value of so many columns."""
    fitting = {(frame.past, id(frame.mask)): frame for length, frame in known if length == columns}
    if len(fitting) > 1:
        raise EditError(
            f"{site!r} has {columns} columns, and so have several inputs of the model that count or pad them differently. "
            f"Expected inputs of different lengths (pad one of them further), or a function of the whole value."
        )
    return next(iter(fitting.values()), Frame())


def _columns(site: Site, frame: Frame, columns: int, example: int) -> list[int]:
    """The columns of the wanted positions of an example, as far as they lie in this pass."""
    asked = site.positions if isinstance(site.positions, slice) else site.places("positions")
    if frame.past is None:
        return _last_columns(site, columns)
    before = frame.past if frame.mask is None else frame.mask.shape[1] - columns
    real = torch.arange(before + columns) if frame.mask is None else frame.mask[example].nonzero()[:, 0].cpu()
    if isinstance(asked, slice):
        wanted = real[asked].tolist()
    else:
        places = (asked[example] if asked.dim() == 2 else asked).reshape(-1).tolist()
        wanted = [int(real[place]) for place in places if -len(real) <= place < len(real)]
    return [column - before for column in wanted if column >= before]


def _last_columns(site: Site, columns: int) -> list[int]:
    """The columns of positions that are counted from the end, where nothing tells how many came before."""
    places = [] if isinstance(site.positions, slice) else site.places("positions").reshape(-1).tolist()
    if not places or not all(-columns <= place < 0 for place in places):
        raise EditError(
            f"{site!r} counts positions from the first token, but nothing tells how many came before this pass: its cache "
            f"does not know its length. Expected a pass that begins anew, or positions from the end, as -1, with passes=."
        )
    return [columns + place for place in places]


def _kept(site: Site, layout: tuple[str, ...]) -> list[str]:
    """The axes that the site's part has, with that of a single position."""
    return [axis for axis in layout if axis == "positions" or not isinstance(site.selection.get(axis), int)]
