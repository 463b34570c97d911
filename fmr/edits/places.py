"""Which column of a value is which position: real tokens under padding, absolute ones while a model generates."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmr.errors import EditError
from fmr.ids import Site


class Frame(NamedTuple):
    """What a pass tells about positions: how many came before it, and which columns hold real tokens, example by example.

    `mask` covers the columns that came before, too; it is None where nothing is padded.
    """

    past: int = 0
    mask: Tensor | None = None


def frames(named: Mapping[str, Any]) -> list[tuple[int, Frame]]:
    """The frames of a pass by the number of its columns, read off its named inputs.

    Tokens stand in a two-dimensional tensor of integers `{x}input_ids` (or in `{x}inputs_embeds`), which of them are real
    in `{x}attention_mask`, and how many came before in a key-value cache that knows its length.
    """
    past = next((int(one.get_seq_length()) for one in named.values() if hasattr(one, "get_seq_length")), 0)
    found = []
    for name, value in named.items():
        kind = next((kind for kind in _TOKENS if name.endswith(kind)), None)
        if kind is not None and isinstance(value, Tensor) and value.dim() >= 2:
            mask = named.get(name.removesuffix(kind) + "attention_mask")
            real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()) else None
            before = past if _continues(mask, value.shape[1], past) else 0
            found.append((value.shape[1], Frame(before, real)))
    return found


_TOKENS = ("input_ids", "inputs_embeds")


def _continues(mask: Any, columns: int, past: int) -> bool:
    """Whether the columns of a pass follow those that a cache holds."""
    return not (isinstance(mask, Tensor) and mask.dim() == 2) or mask.shape[1] != columns or past == 0


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


def parts(site: Site, value: Tensor, known: list[tuple[int, Frame]]) -> list[Part]:
    """The parts of a value that a site means: one where every example has as many, else one for each that has any."""
    layout = site.axes(value)
    frame = _frame(site, value.shape[layout.index("positions")], known) if "positions" in site.selection else Frame()
    if frame == Frame() and _all_there(site, value, layout):
        return [Part(site)]
    columns = value.shape[layout.index("positions")]
    before = frame.past if frame.mask is None else frame.mask.shape[1] - columns
    count = value.shape[layout.index("examples")] if "examples" in layout else 1
    rows = [_columns(site.positions, frame, before, columns, example) for example in range(count)]
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


def _all_there(site: Site, value: Tensor, layout: tuple[str, ...]) -> bool:
    """Whether every position of a site is a column of this value; one that is not may be one of a later pass."""
    if site.positions is None or isinstance(site.positions, slice):
        return True
    columns, places = value.shape[layout.index("positions")], torch.as_tensor(site.positions)
    return bool(((places >= -columns) & (places < columns)).all())


def _frame(site: Site, columns: int, known: list[tuple[int, Frame]]) -> Frame:
    """The frame for a value of so many columns."""
    fitting = {id(frame.mask): frame for length, frame in known if length == columns}
    if len(fitting) > 1:
        raise EditError(
            f"{site!r} has {columns} columns, and so have several inputs of the model that are padded differently. Say "
            f"which of them are real tokens: mask=a boolean tensor (examples, positions)."
        )
    return next(iter(fitting.values()), Frame())


def _columns(positions: Any, frame: Frame, before: int, columns: int, example: int) -> list[int]:
    """The columns of the wanted positions of an example, as far as they lie in this pass."""
    real = torch.arange(before + columns) if frame.mask is None else frame.mask[example].nonzero()[:, 0].cpu()
    if isinstance(positions, slice):
        wanted = real[positions].tolist()
    else:
        asked = torch.as_tensor(positions)
        places = (asked[example] if asked.dim() == 2 else asked).reshape(-1).tolist()
        wanted = [int(real[place]) for place in places if -len(real) <= place < len(real)]
    return [column - before for column in wanted if column >= before]


def _kept(site: Site, layout: tuple[str, ...]) -> list[str]:
    """The axes that the site's part has, with that of a single position."""
    return [axis for axis in layout if axis == "positions" or not isinstance(site.selection.get(axis), int)]
