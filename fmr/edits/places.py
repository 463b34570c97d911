"""Which column of a value is which position: real tokens under padding, absolute ones while a model generates."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.edits.frames import Frame, Frames, is_plain
from fmr.edits.layouts import unpacked
from fmr.errors import EditError, IdError
from fmr.ids import Site
from fmr.watching.storage import is_equal


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
    if is_plain(frame) and _all_there(site, columns):
        return [Part(site)]
    count = value.shape[layout.index("examples")] if "examples" in layout else 1
    site.check_examples(value, layout)
    rows = [_columns(site, frame, columns, example) for example in range(count)]
    drop = kept(replace(site, positions=None), value).index("positions") if isinstance(site.positions, int) else None
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


def read(site: Site, value: Tensor, known: Frames) -> Tensor:
    """What a value holds at a site: the same columns that an edit there is given, as one tensor."""
    value = unpacked(site, value)
    try:
        found = parts(site, value, known)
    except EditError as error:
        raise IdError(str(error)) from None
    if not found and isinstance(site.positions, slice):
        return replace(site, positions=slice(0)).of(value)
    if len(found) == 1 and found[0].examples is None and is_whole(site, found[0]):
        return found[0].of(value)
    columns = value.shape[site.axes(value).index("positions")]
    frame = _frame(site, columns, known)
    if is_plain(frame):
        return site.of(value)  # which says what there is
    raise IdError(
        f"{site!r} is no one part of {str(site.id)!r} in this pass, whose examples hold the positions "
        f"{_held(frame, columns)}. Expected positions that each of them holds, as many in each: narrow it with examples=, "
        f"or read another pass, run.passes[i][site]."
    )


def is_whole(site: Site, part: Part) -> bool:
    """Whether a part has every position that the site names one by one."""
    if part.site is site or site.positions is None or isinstance(site.positions, slice):
        return True
    rows = torch.as_tensor(part.site.positions)
    places = site.places("positions")
    return rows.shape[-1] == (places.shape[-1] if places.dim() else 1)


def _held(frame: Frame, columns: int) -> str:
    """The positions of the columns of a pass, example by example where these differ."""
    if frame.mask is None:
        before = frame.past or 0
        return f"{before} to {before + columns - 1}"
    ends = frame.mask.sum(1).tolist()
    begins = frame.mask[:, : frame.mask.shape[1] - columns].sum(1).tolist()
    told = [f"{begin} to {end - 1}" if end > begin else "none" for begin, end in zip(begins, ends, strict=True)]
    return told[0] if len(set(told)) == 1 else ", ".join(told)


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
    fitting = _apart(frame for length, frame in known if length == columns)
    unclear = next((frame.unclear for frame in fitting or [frame for _, frame in known] if frame.unclear), "")
    if unclear and (fitting or columns > 1):
        raise EditError(
            f"{site!r} counts real tokens, and {unclear}. Expected attention_mask=... of shape (examples, columns), or a "
            f"function of the whole value."
        )
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
    if not fitting and columns > 1 and any(frame.cached for _, frame in known):
        lengths = ", ".join(str(length) for length, _ in known)
        raise EditError(
            f"{site!r} has {columns} columns where the pass and its cache have {lengths}: those of a window, of a buffer or "
            f"of other inputs, and nothing tells which positions they hold. Expected a function of the whole value, or a "
            f"run without a cache."
        )
    return fitting[0] if fitting else Frame()


def _apart(frames: Iterable[Frame]) -> list[Frame]:
    """The frames without those that say what another says."""
    found: list[Frame] = []
    for frame in frames:
        if not any(_is_same(frame, one) for one in found):
            found.append(frame)
    return found


def _is_same(frame: Frame, other: Frame) -> bool:
    if (frame.past, frame.unclear) != (other.past, other.unclear) or frame.mask is None or other.mask is None:
        return frame.mask is other.mask and (frame.past, frame.unclear) == (other.past, other.unclear)
    return is_equal(frame.mask, other.mask)


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


def kept(site: Site, value: Tensor) -> tuple[str, ...]:
    """What each dimension of a site's part counts: an int drops its axis."""
    return tuple(axis for axis in site.axes(value) if not isinstance(site.selection.get(axis), int))


def repeats(site: Site, value: Tensor) -> bool:
    """Whether a site takes a place of the tensor several times."""
    lists = [axis for axis, index in site.selection.items() if not isinstance(index, (int, slice))]
    if not lists:
        return False
    lengths = dict(zip(site.axes(value), value.shape, strict=False))
    ordered = [(site.places(axis) % lengths[axis]).sort(-1).values for axis in lists]
    return any(bool((places[..., 1:] == places[..., :-1]).any()) for places in ordered)
