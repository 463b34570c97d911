"""Value vectors in words: each as the model would read a stream that holds it alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from analyzers.protocol import AnalyzerError
from fmr.structure.memories.memory import Memory
from fmr.structure.parts import Structure

_ROWS = 512
"""How many vectors are read at once."""


def value_vectors(memory: Memory) -> Tensor:
    """The value vectors of a memory, (memories, width).

    >>> value_vectors(structure.mlps[2]).shape
    torch.Size([512, 128])
    """
    weight = memory.own(memory.weights[memory.values], memory.n).detach()
    rows = weight.movedim(memory.value_dim, 0)
    rows = rows.flatten(1) if rows.dim() > 2 and rows[0].numel() == rows.shape[1] else rows
    if rows.dim() != 2 or len(rows) != memory.n:
        raise AnalyzerError(
            f"{memory.scope!r} holds its values as {tuple(weight.shape)}, where no row or column is that of one of its "
            f"{memory.n} memories. Expected one matrix for all tokens; experts have one each: choose layers without."
        )
    return rows


def unread(structure: Structure) -> str:
    """Why vectors of a model's stream have no words; empty where they have."""
    return structure.readout if isinstance(structure.readout, str) else ""


def logits_of(structure: Structure, vectors: Tensor) -> Iterator[Tensor]:
    """What each vector alone, in an otherwise empty stream, adds to the logits, a few rows at a time, (rows, words).

    >>> torch.cat([*logits_of(structure, value_vectors(structure.mlps[2]))]).shape
    torch.Size([512, 262])

    The model's own final norm, unembedding, scales and caps are run; what they make of an empty stream is taken off, so that
    a vector and its negative say opposite things.
    """
    if why := unread(structure):
        raise AnalyzerError(
            f"The values of {structure.model} have no words: {why}. Expected pre-norm layers and logits; triggers alone need "
            "neither."
        )
    with torch.no_grad():
        empty = structure.read_out(torch.zeros_like(vectors[:1])).float()
        if empty.dim() != 2:
            raise AnalyzerError(
                f"{structure.model} has logits of {list(empty.shape[1:])} for each token, expected those of one vocabulary."
            )
        for part in vectors.split(_ROWS):
            yield structure.read_out(part).float() - empty


def words_of(structure: Structure, vectors: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The tokens that vectors speak for and against most, and how much: both (vectors, 2, top).

    >>> words_of(structure, value_vectors(structure.mlps[2]), 3)[0].shape
    torch.Size([512, 2, 3])

    The first are those of the largest logits, the second those of the smallest, which a vector whose coefficient is negative
    speaks for.
    """
    tokens, scores = [], []
    for logits in logits_of(structure, vectors):
        both = [logits.topk(top, largest=largest) for largest in (True, False)]
        tokens.append(torch.stack([one.indices for one in both], 1).to(torch.int32).cpu())
        scores.append(torch.stack([one.values for one in both], 1).cpu())
    return torch.cat(tokens), torch.cat(scores)
