"""Value vectors in words: each as the model would read a stream that holds it alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from analyzers.memories.reading import Found, experts_of
from analyzers.memories.store import Store
from analyzers.memories.written import Passage
from analyzers.protocol import AnalyzerError
from fmr.errors import StructureError
from fmr.structure.memories.memory import Memory
from fmr.structure.parts import Structure

_ROWS = 512
"""How many vectors are read at once."""


def value_vectors(memory: Memory) -> Tensor:
    """The value vectors of a memory, (memories, width); those of several experts one after the other.

    >>> value_vectors(structure.mlps[2]).shape
    torch.Size([512, 128])
    """
    weight = memory.own(memory.weights[memory.values], memory.n).detach()
    if weight.dim() == 3 and experts_of(memory) is not None:
        return weight.movedim(memory.value_dim + 1, 1).flatten(0, 1).contiguous()
    rows = weight.movedim(memory.value_dim, 0)
    rows = rows.flatten(1) if rows.dim() > 2 and rows[0].numel() == rows.shape[1] else rows
    if rows.dim() != 2 or len(rows) != memory.n:
        raise AnalyzerError(
            f"{memory.scope!r} holds its values as {tuple(weight.shape)}, where no row or column is that of one of its "
            f"{memory.n} memories. Expected one matrix, or one for each expert that a grouped product reads."
        )
    return rows.contiguous()  # products with columns of a matrix take ten times as long


def unread(structure: Structure) -> str:
    """Why vectors of a model's stream have no words; empty where they have."""
    if isinstance(structure.readout, str):
        return structure.readout
    return "" if structure.readout.of_words else "its logits are of classes, which are no words"


def wordless(structure: Structure) -> str:
    """Why vectors alone have no words: those of the stream have none, or logits are made of the stream as a whole."""
    if (why := unread(structure)) or isinstance(structure.readout, str):
        return why
    end = structure.readout.graph[structure.readout.end]
    try:
        structure.read_out(torch.zeros(2, end.shape[-1], dtype=end.dtype))
    except StructureError as error:
        return str(error).partition(" Expected")[0].rstrip(".")
    return ""


def logits_of(structure: Structure, vectors: Tensor, way: Passage | str | None = None) -> Iterator[Tensor]:
    """What each vector alone, in an otherwise empty stream, adds to the logits, a few rows at a time, (rows, words).

    >>> torch.cat([*logits_of(structure, value_vectors(structure.mlps[2]))]).shape
    torch.Size([512, 515])

    The model's own final norm, unembedding, scales and caps are run; what they make of an empty stream is taken off, so that
    a vector and its negative say opposite things. way: that of vectors into the stream, where they are what memories make.
    """
    if why := wordless(structure) or (way if isinstance(way, str) else ""):
        raise AnalyzerError(
            f"The values of {structure.model} have no words: {why}. Expected pre-norm layers and logits; triggers alone "
            "need neither."
        )

    def read(part: Tensor) -> Tensor:
        return structure.read_out(way.through(part) if isinstance(way, Passage) else part).float()

    with torch.no_grad():
        empty = read(torch.zeros_like(vectors[:1]))
        if empty.dim() != 2:
            raise AnalyzerError(
                f"{structure.model} has logits of {list(empty.shape[1:])} for each token, expected those of one vocabulary."
            )
        for part in vectors.split(_ROWS):
            yield read(part) - empty


def words_of(structure: Structure, vectors: Tensor, top: int, way: Passage | str | None = None) -> tuple[Tensor, Tensor]:
    """The tokens that vectors speak for and against most, and how much: both (vectors, 2, top).

    >>> words_of(structure, value_vectors(structure.mlps[2]), 3)[0].shape
    torch.Size([512, 2, 3])

    The first are those of the largest logits, the second those of the smallest, which a vector whose coefficient is negative
    speaks for.
    """
    tokens, scores = [], []
    for logits in logits_of(structure, vectors, way):
        both = [logits.topk(min(top, logits.shape[1]), largest=largest) for largest in (True, False)]
        tokens.append(torch.stack([one.indices for one in both], 1).to(torch.int32).cpu())
        scores.append(torch.stack([one.values for one in both], 1).cpu())
    return torch.cat(tokens), torch.cat(scores)


class Values(NamedTuple):
    """The words of the values of a layer: tokens and scores, both (memories, 2, top)."""

    tokens: Tensor
    scores: Tensor

    def first(self, top: int) -> "Values":
        """The first so many words."""
        return Values(self.tokens[..., :top], self.scores[..., :top])


class Vocabulary:
    """The words of the values of each layer, which are read once: kept here, and in a store where there is one."""

    def __init__(self, store: Store | None, decode: Callable[[Iterable[int]], Mapping[int, str]]) -> None:
        self.store, self.decode = store, decode
        self.values: dict[int, Values] = {}

    def held(self, layer: int, top: int) -> Values | None:
        """The words of a layer where so many are known: from before, or from the store."""
        known = self.values.get(layer)
        if known is None and self.store is not None and self.store.batches:
            stored = self.store.read_values(layer)
            known = None if stored is None else Values(*stored)
        return known if known is not None and known.tokens.shape[-1] >= top else None

    def of(self, found: Found, layer: int, top: int) -> Values:
        """The words of a layer, held or read."""
        known = self.held(layer, top)
        if known is None:
            place = found.layers.index(layer)
            known = Values(*words_of(found.structure, value_vectors(found.blocks[place]), top, found.ways[place]))
            if self.store is not None and self.store.batches:
                self.store.write_values(layer, *known, self.decode(known.tokens.unique().tolist()))
        self.values[layer] = known
        return known.first(top)
