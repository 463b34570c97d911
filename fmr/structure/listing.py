"""A structure in words: line by line, and as a table in a notebook."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from fmr.pictures.notebook import table
from fmr.structure.proof.certify import Certificate

if TYPE_CHECKING:
    from fmr.structure.parts import AttentionBlock, MemoryBlock, Residual, Structure

_FOLD, _STACKS, _REASONS = 12, 4, 8
"""How many blocks of one size are printed one by one, how many plain stacks, the longest, and how many reasons."""


def as_lines(structure: "Structure") -> Iterator[str]:
    """A structure on about one screen."""
    yield _headline(structure)
    yield from [f"  embedding     {structure.embedding.id}"] if structure.embedding else []
    yield from (f"  attention{row}" for row in _rows(structure.attention))
    yield from (f"  mlps{row}" for row in _rows(structure.mlps))
    yield from _stream_rows(structure.streams)
    yield from [f"  final norm    {structure.final_norm.id}"] if structure.final_norm else []
    yield from [f"  unembedding   {structure.unembedding.id}"] if structure.unembedding else []
    yield from (f"  rejected      {row}" for row in _reasons(structure))


def as_html(structure: "Structure") -> str:
    """A structure as a table: a row for each attention and memory, layer by layer, and what is in none at the end."""
    every: tuple[AttentionBlock | MemoryBlock, ...] = (*structure.attention, *structure.mlps)
    groups: list[tuple[str, tuple[AttentionBlock | MemoryBlock, ...]]]
    groups = [(f"layers[{n}]", (*layer.attentions, *layer.mlps)) for n, layer in enumerate(structure.layers)]
    placed = {id(part) for _, parts in groups for part in parts}
    groups += [("", (part,)) for part in every if id(part) not in placed]
    named = [("" if n else name, part) for name, parts in groups for n, part in enumerate(parts)]
    rows = [(name, part.scope, part.size, _short(part.certified)) for name, part in named]
    reasons = "\n".join(f"rejected: {row}" for row in _reasons(structure))
    return table(_headline(structure), ("layer", "where", "what", "certificate"), rows, reasons)


def proof(certificate: Certificate | None) -> str:
    """What a certificate says, if there is one."""
    return "not computed" if certificate is None else repr(certificate)


def _short(certificate: Certificate | None) -> str:
    """A certificate in few words: the largest of its errors."""
    if certificate is None:
        return "not computed"
    return f"{'certified' if certificate else 'NOT certified'}, error {max(certificate.errors.values()):.0e}"


def _headline(structure: "Structure") -> str:
    parts = f"{len(structure.layers)} layers, {len(structure.attention)} attentions, {len(structure.mlps)} memories"
    return f"Structure of {structure.model}: {parts}, {len(structure.rejected)} rejected"


def _reasons(structure: "Structure") -> list[str]:
    more = len(structure.rejected) - _REASONS
    return [*map(repr, structure.rejected[:_REASONS]), *([f"... and {more} more"] if more > 0 else [])]


def _rows(blocks: Sequence["AttentionBlock | MemoryBlock"]) -> Iterator[str]:
    """A row for each block; where many of one size follow one another, one for all of them with their worst errors."""
    start = 0
    for _, group in groupby(blocks, key=lambda block: (block.size, getattr(block, "kind", ""), block.certified is None)):
        alike = list(group)
        if len(alike) <= _FOLD:
            yield from (f"[{start + n}]  {block!r}" for n, block in enumerate(alike))
        else:
            names = f"{alike[0].scope} ... {alike[-1].scope}"
            kind = f"{getattr(alike[0], 'kind', '')}  ".lstrip()
            worst = proof(_worst([block.certified for block in alike if block.certified is not None]))
            yield f"[{start}..{start + len(alike) - 1}]  {names}  {kind}{alike[0].size}  {worst}"
        start += len(alike)


def _worst(proofs: Sequence[Certificate]) -> Certificate | None:
    """The largest of each error."""
    if not proofs:
        return None
    names = dict.fromkeys(name for proof in proofs for name in proof.errors)
    return Certificate({name: max(p.errors.get(name, 0.0) for p in proofs) for name in names}, proofs[0].tolerance)


def _stream_rows(streams: Sequence["Residual"]) -> Iterator[str]:
    """A row for each stream and for the longest of the plain stacks."""
    stacks = sorted((one for one in streams if not one.writes), key=lambda one: -len(one.points))
    short = stacks[_STACKS:]
    yield from (f"  stack         {one!r}" for one in streams if not one.writes and one not in short)
    yield from [f"  stack         ... and {len(short)} shorter ones"] if short else []
    yield from (f"  residual      {one!r}" for one in streams if one.writes)
