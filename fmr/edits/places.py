"""Which column of a value is which position: real tokens under padding, absolute ones while a model generates."""

import weakref
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
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


_TOKENS = ("input_ids", "inputs_embeds")
_MASK = "attention_mask"


def frames(columns: Mapping[str, int], masks: Mapping[str, Tensor], past: int | None) -> Frames:
    """The frames of a pass: of its tokens, and of what another pass has made of tokens whose mask is given alone.

    columns: how many tokens there are, by the prefix of their name. masks: the same for which of them are real. past: how
    many columns a cache held before; of an encoder's and a decoder's tokens, the decoder's follow those.
    """
    padded = {name: mask for name, mask in masks.items() if not bool(mask.all())}
    found = [(mask.shape[1], Frame(0, padded.get(name))) for name, mask in masks.items() if name not in columns]
    for name, count in columns.items():
        mask, longest = padded.get(name), masks[name].shape[1] if name in masks else 0
        before = past if len(columns) == 1 or name.endswith("decoder_") else 0
        if longest > count:
            before = longest - count
        elif mask is not None and before:
            before = None  # which of the columns before are real is not told
        found.append((count, Frame(before, mask)))
        if before:
            found.append((before + count, Frame(0, mask)))
    return found


class Pasts:
    """What the passes of a block tell about positions; of a cache that does not know its length, what went into it."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Callable[[], Any], int, Mapping[str, Tensor]]] = {}

    def frames_of(self, arguments: Mapping[str, Any]) -> Callable[[], Frames]:
        """The frames of a pass that begins with these arguments, by name; worked out when they are first asked for.

        Tokens stand in a two-dimensional tensor of integers `{x}input_ids` (or in `{x}inputs_embeds`), which of them are
        real in `{x}attention_mask`, and how many came before in a key-value cache.
        """
        given = {**arguments}
        for name, value in arguments.items():
            given.update((f"{name}.{key}", item) for key, item in _held(value))
        columns, masks = {}, {}
        for name, value in given.items():
            if name.endswith((*_TOKENS, _MASK)) and isinstance(value, Tensor) and not value.is_meta and value.dim() > 1:
                prefix = name.removesuffix(next(kind for kind in (*_TOKENS, _MASK) if name.endswith(kind)))
                if not name.endswith(_MASK):
                    columns[prefix] = value.shape[1]
                elif value.dim() == 2:
                    masks[prefix] = _boolean(value)
        cache = next((value for value in given.values() if hasattr(type(value), "get_seq_length")), None)
        past = 0 if cache is None else self._past(cache, columns, masks)
        return once(lambda: frames(columns, masks, past))

    def _past(self, cache: Any, columns: dict[str, int], masks: dict[str, Tensor]) -> int | None:
        """How many columns a cache holds; where it cannot tell, those of the passes that it was in since it was new."""
        with suppress(ValueError, TypeError, NotImplementedError):
            return int(cache.get_seq_length())
        is_new = hasattr(cache, "has_previous_state") and not cache.has_previous_state()
        kept, past, known = (lambda: cache, 0, {}) if is_new else self._seen.get(id(cache), (lambda: None, 0, {}))
        if kept() is not cache:
            return None
        for prefix, mask in known.items():
            masks.setdefault(prefix, torch.cat([mask, mask.new_ones(len(mask), columns[prefix])], 1))
        self._seen[id(cache)] = weakref.ref(cache), past + next(iter(columns.values()), 0), masks
        return past


def _held(value: Any) -> Iterable[tuple[Any, Any]]:
    """What a dictionary holds, as it lies there."""
    held = vars(value).get("data") if issubclass(type(value), UserDict) else value
    return dict.items(held) if issubclass(type(held), dict) else ()


def _boolean(mask: Tensor) -> Tensor:
    """A mask as it is now."""
    with unseen():
        return mask.detach().to(torch.bool, copy=True)


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
        if frame.mask is not None and len({tuple(mask) for mask in frame.mask.tolist()}) > 1:
            raise EditError(
                f"{site!r} has no axis of examples in its layout, {layout}, and these are padded differently, so that "
                f"positions are other columns in each. Expected one example at a time, or a function of the whole value."
            )
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
    padded = [length for length, frame in known if frame.mask is not None]
    if padded and not fitting and columns > 1:
        raise EditError(
            f"{site!r} has {columns} columns where the padded inputs of the model have {padded[0]}, so that nothing tells "
            f"which of them are real tokens. Expected one example at a time, or a function of the whole value."
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
