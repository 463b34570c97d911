"""Which words the values of memories promote, read out by the model's own norm and unembedding."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.pages.arrays import Json, packed
from fmr.pages.told import View, value_vectors
from fmr.structure.normal.match import between, depends_on
from fmr.structure.normal.vocabulary import MOVES
from fmr.structure.parts import Memory, Structure

AT_ONCE = 256
"""How many vectors are read out at a time."""


def promoted(structure: Structure, views: Iterable[View], n: int, top: int) -> Json:
    """The words of the memories of one layer that some token has among its largest: by memory and sign of its coefficient.

    A key is the number of the memory where the coefficient is positive, and its complement (-1 for 0) where it is negative;
    gains are logits beside those of an empty stream.
    """
    block = structure.mlps[n]
    seen = [
        torch.where(values < 0, -1 - units, units) for view in views if n in view.tops for units, values in [view.tops[n]]
    ]
    if not seen:
        raise StructureError("No pass has coefficients of it.")
    if isinstance(structure.readout, str):
        raise StructureError(f"Its values have no words: {structure.readout}.")
    if not _is_written(structure, block):
        raise StructureError("Its values have no words: what it makes is changed before it is added to the stream.")
    keys = torch.cat([one.flatten() for one in seen]).unique()
    units, signs = torch.where(keys < 0, -1 - keys, keys), torch.where(keys < 0, -1.0, 1.0)
    try:
        vectors = value_vectors(block)
        chosen = vectors[units.to(vectors.device)] * signs.to(vectors)[:, None]
        read = [_read(structure, part, top) for part in chosen.split(AT_ONCE)]
    except StructureError as error:
        raise StructureError(f"Its values have no words: {str(error).rstrip('.')}.") from None
    words, gains = (torch.cat(parts) for parts in zip(*read, strict=True))
    return {"keys": packed(keys.to(torch.int32)), "words": packed(words), "gains": packed(gains)}


def _is_written(structure: Structure, block: Memory) -> bool:
    """Whether what a memory makes is added to a stream as it is, beside what others add."""
    graph, start = structure.graph, block.down
    writes = (write for stream in structure.streams for write in stream.writes if depends_on(graph, write.after, start))
    first = min(writes, key=lambda write: graph.place(write.after), default=None)
    if first is None or not (first.added == start or depends_on(graph, first.added, start)):
        return False
    return all(node.op in MOVES | {"add"} for node in between(graph, start, first.added) if node.id != start)


def _read(structure: Structure, vectors: Tensor, top: int) -> tuple[Tensor, Tensor]:
    both = structure.read_out(torch.cat([torch.zeros_like(vectors[:1]), vectors])).detach().float()
    gains, words = (both[1:] - both[:1]).flatten(1).topk(min(top, both[0].numel()))
    return words.to(torch.int32), gains
