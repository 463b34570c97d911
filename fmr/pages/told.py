"""The values of one pass as a page shows them: norms, patterns, coefficients, and the stream read out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from fmr.errors import FmrError, StructureError, number_of
from fmr.ids import Site
from fmr.pages.arrays import Json, by_position, packed, pattern_bytes
from fmr.pages.outline import Outline, Row, writes_of
from fmr.pages.tokens import Text, token_ids
from fmr.runs.passes import Pass
from fmr.structure.attention.factors import Heads, in_order
from fmr.structure.parts import Attention, Memory, Structure

_MASK = "input:attention_mask"


def told(make: Callable[[], Json]) -> Json:
    """What a pass has to tell, or in its own words why it has not."""
    try:
        return make()
    except FmrError as error:
        return {"why": str(error)}


@dataclass(frozen=True, eq=False)
class View:
    """One pass of a run, read by an outline: `top` memories for each token, and so many words of each reading."""

    outline: Outline
    one: Pass
    top: int
    tops: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def structure(self) -> Structure:
        """The structure that says what is what."""
        return self.outline.structure

    @cached_property
    def patterns(self) -> list[Tensor | str]:
        """The pattern of each attention, (maps, heads, queries, keys), or why there is none."""
        return [self._maps(block) for block in self.structure.attention]

    def _maps(self, block: Attention) -> Tensor | str:
        try:
            return block.maps(self.one)
        except FmrError as error:
            return str(error)

    @cached_property
    def examples(self) -> int:
        """How many examples the pass has: those of the stream, or of the first pattern where it kept no stream."""
        points = [row.layer.resid_post for row in self.outline.rows if row.layer is not None]
        for site in points:
            if site.id in self.one:
                return len(by_position(self.one[site], site))
        return next((len(maps) for maps in self.patterns if isinstance(maps, Tensor)), 0)

    def nothing(self) -> str:
        """Why none of what a page shows is in the pass; empty where something is."""
        kept = [name for row in self.outline.rows if row.layer is not None for name in (row.layer.resid_post.id,)]
        kept += [block.post.id for block in self.structure.mlps]
        if any(isinstance(maps, Tensor) for maps in self.patterns) or any(name in self.one for name in kept):
            return ""
        whys = [maps for maps in self.patterns if isinstance(maps, str)]
        return (whys or [told(lambda: {"": self.one[kept[0]]}).get("why", "")])[0]

    def texts(self, past: list[int]) -> list[Text | None]:
        """The positions of each stream in this pass, those of earlier passes being known; a pass whose keys are those of
        its own positions begins anew."""
        return [self._text(stream, past[stream]) for stream in range(len(past))]

    def _text(self, stream: int, past: int) -> Text | None:
        positions = self._positions(stream)
        if positions is None:
            return None
        whole = [
            maps.shape[-1] > maps.shape[-2]
            for n, maps in enumerate(self.patterns)
            if isinstance(maps, Tensor)
            and self.outline.stream_of(n) == stream
            and self.structure.attention[n].kind != "cross"
        ]
        ids = token_ids(self.one, self.outline.tokens_of(stream), self.examples, positions)
        return Text(positions, past if any(whole) else 0, ids, self._keys(stream))

    def _keys(self, stream: int) -> Tensor | None:
        """The keys of the first self-attention of a stream, where examples lie apart in them and the pass holds them."""
        for n, block in enumerate(self.structure.attention):
            if self.outline.stream_of(n) == stream and block.kind == "self" and block.k.id in self.one:
                try:
                    site, heads = block.k, Heads(block.n_heads, block.n_kv_heads)
                    return in_order(self.one[block.k.id], site, heads, shared=True)
                except FmrError:
                    continue
        return None

    def _positions(self, stream: int) -> int | None:
        """How many positions of a stream the pass has; of a model without streams, those of its first pattern."""
        for row in self.outline.rows:
            if row.layer is not None and row.stream == stream and row.layer.resid_pre.id in self.one:
                return by_position(self.one[row.layer.resid_pre], row.layer.resid_pre).shape[1]
        known = (
            maps for n, maps in enumerate(self.patterns) if self.outline.stream_of(n) == stream and isinstance(maps, Tensor)
        )
        return next((maps.shape[-2] for maps in known if len(maps) == self.examples), None)

    # ---- what is shown

    def told(self) -> Json:
        """All of the pass in plain types; what it does not hold says why."""
        return {
            "examples": self.examples,
            "last": self._last(),
            "norms": [told(partial(self._norms, row)) for row in self.outline.rows],
            "patterns": [told(partial(self._pattern, n)) for n in range(len(self.patterns))],
            "mlps": [told(partial(self._coefficients, n)) for n in range(len(self.structure.mlps))],
            "lens": told(self._lens),
        }

    def _last(self) -> list[int]:
        """The last column of each example that is no padding; none where no mask of all positions tells it."""
        mask: Tensor | None = self.one[_MASK] if _MASK in self.one else None  # noqa: SIM401 - it is no dict
        if mask is None or (*mask.shape,) != (self.examples, self._positions(len(self.outline.streams) - 1)):
            return []
        columns = torch.arange(len(mask[0]), device=mask.device)
        found: list[int] = torch.where(mask != 0, columns, 0).amax(1).tolist()
        return found

    def _rows(self, site: Site) -> Tensor:
        return by_position(self.one[site], site)

    def _norms(self, row: Row) -> Json:
        if row.layer is None:
            raise StructureError("It is in no layer of a stream.")
        points = {"resid_pre": row.layer.resid_pre, "resid_mid": row.layer.resid_mid, "resid_post": row.layer.resid_post}
        writes = [
            {"kinds": one.kinds, "norm": packed(abs(one.times) * self._rows(one.site).float().norm(dim=-1))}
            for one in writes_of(self.outline, row)
        ]
        stream = {name: packed(self._rows(site).float().norm(dim=-1)) for name, site in points.items() if site is not None}
        return {"stream": stream, "writes": writes}

    def _pattern(self, n: int) -> Json:
        maps = self.patterns[n]
        if isinstance(maps, str):
            raise StructureError(maps)
        levels, most = pattern_bytes(maps)
        return {**packed(levels), "most": most}

    def _coefficients(self, n: int) -> Json:
        block = self.structure.mlps[n]
        rows = self._rows(block.post)
        if len(rows) != self.examples or rows.shape[1] != self._stream_positions(n):
            raise StructureError(
                f"The coefficients at {block.scope!r}, {list(self.one[block.post].shape)}, are not one row for each "
                "position of its stream."
            )
        units = rows.float().abs().topk(min(self.top, rows.shape[-1])).indices
        values = rows.float().gather(-1, units)
        self.tops[n] = units, values
        return {"units": packed(units.to(torch.int32)), "values": packed(values)}

    def _stream_positions(self, n: int) -> int | None:
        stream = next((row.stream for row in self.outline.rows if n in row.mlps), None)
        return self._positions(stream) if stream is not None else self._rows(self.structure.mlps[n].post).shape[1]

    def _lens(self) -> Json:
        """The words that each point of the last stream says, most probable first."""
        last = len(self.outline.streams) - 1
        layers = [row for row in self.outline.rows if row.layer is not None and row.stream == last]
        if not layers:
            raise StructureError(f"{self.structure.model} has no layers of a residual stream to read out.")
        sites = [layers[0].layer.resid_pre, *(row.layer.resid_post for row in layers)]  # type: ignore[union-attr]
        read = [self._said(site) for site in sites]
        return {
            "rows": [f"before {layers[0].name}", *(row.name for row in layers)],
            "layers": [None, *(self.outline.rows.index(row) for row in layers)],
            "words": packed(torch.stack([words for words, _ in read])),
            "shares": packed(torch.stack([shares for _, shares in read])),
            "whole": read[0][0].shape[1] == 1 != self._positions(last),
        }

    def _said(self, site: Site) -> tuple[Tensor, Tensor]:
        """The most probable words at each position, and how probable they are, (examples, positions, top)."""
        logits, point = self.structure.read_out(self.one, site).detach(), self.one[site]
        if logits.shape[:-1] == point.shape[:-1]:
            rows = by_position(logits, site)
        elif logits.shape[:-1] == (self.examples,):
            rows = logits[:, None]
        else:
            raise StructureError(
                f"The logits of {self.structure.model}, {list(logits.shape)}, are not one row for each position of its "
                f"stream, {list(point.shape)}, nor one for each of {number_of(self.examples, 'example')} that can be told."
            )
        shares, words = rows.float().softmax(-1).topk(min(self.top, rows.shape[-1]))
        return words.to(torch.int32), shares


def value_vectors(block: Memory) -> Tensor:
    """The value vectors of a memory, (memories, width); weights of which no row is that of one memory are refused."""
    if not block.weights:
        raise StructureError("the structure was located in a graph alone, which holds no weights. Expected fmr.locate(run)")
    weight = block.own(block.weights[block.values], block.n).detach()
    rows = weight.movedim(block.value_dim, 0)
    if rows.dim() != 2 or len(rows) != block.n:
        raise StructureError(
            f"its values are held as {list(weight.shape)}, where no row is that of one of {block.n} memories"
        )
    return rows
