"""What heads write: whether they copy the token that they look at, and whether they name the person who receives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from analyzers.heads.circuits import Circuits
from analyzers.heads.draws import People
from fmr.errors import StructureError
from fmr.structure.attention.factors import Factors, Heads, in_order, matrix_of
from fmr.structure.normal.match import MOVES, projection, strip_views
from fmr.structure.parts import Attention, Structure


class Words:
    """The two ends of a model as matrices: what tokens are looked up as, and what logits are read by, norm folded in."""

    def __init__(self, structure: Structure, circuits: Circuits) -> None:
        if structure.embedding is None or structure.unembedding is None:
            missing = "no table of tokens is looked up" if structure.embedding is None else "no logits are made"
            raise StructureError(f"{structure.model} has no words: {missing} at the end of its stream.")
        graph, value = circuits.graph, circuits.run.__getitem__
        table = graph[structure.embedding.id].parent("weight", 1)
        found = projection(graph, graph[structure.unembedding.id])
        assert table is not None
        assert found is not None
        self.normed = strip_views(graph, found.data, MOVES)
        self.end = circuits.point_of(self.normed)[2]
        self.fold = circuits.fold(self.end, self.normed)
        self.embedding = value(table.id).detach()
        self.unembedding = matrix_of(graph, found, value)
        if self.embedding.shape[1] != self.unembedding.shape[1]:
            raise StructureError(f"{structure.model} looks tokens up as vectors of another size than its stream has.")

    def gram(self) -> Tensor:
        """E^T U, (width, width), of embedding and unembedding over the mean token: once for all heads."""
        rows = min(len(self.embedding), len(self.unembedding))
        means = [table[:rows].float().mean(0) for table in (self.embedding, self.unembedding)]
        total = torch.zeros(self.embedding.shape[1], self.unembedding.shape[1], device=self.embedding.device)
        for start in range(0, rows, 8192):
            some = slice(start, min(start + 8192, rows))
            total += (self.embedding[some].float() - means[0]).T @ (self.unembedding[some].float() - means[1])
        return self.fold.into(total)


def copying(factors: Factors, gram: Tensor) -> tuple[Tensor, Tensor]:
    """How far each head raises the logit of the token that it looks at, and the most that mismatched heads do: (heads,).

    The circuit `U O V E^T` from tokens to logits has the rank of a head, and its eigenvalues but for zeros are those of the
    (head size)^2 matrix `V (E^T U) O`: the score is their sum over the sum of their sizes, 1 where all are positive. The null
    puts the values of one head before the output of the next one, two or three of the layer.

    Source: N. Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021 (copying).
    """
    read = (factors.v.matrix @ gram.to(factors.v.matrix)).cpu()
    written = factors.out.matrix.mT.cpu()
    others = [_positive(read @ written.roll(shift, 0)) for shift in range(1, min(len(read), 4))]
    own = _positive(read @ written)
    return own, torch.stack(others).amax(0) if others else torch.full_like(own, float("nan"))


def _positive(matrices: Tensor) -> Tensor:
    values = torch.linalg.eigvals(matrices)
    total: Tensor = values.real.sum(-1) / values.abs().sum(-1).clamp(min=1e-30)
    return total.double()


def naming(
    model: nn.Module,
    blocks: Sequence[Attention],
    known: Sequence[Factors],
    words: Words,
    people: People,
    edits: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each head adds to the logit of who receives, and to that of someone who is not there; and its weight on the first.

    Each is (heads, prompts), the logits over the mean of all names, by the direct way to the logits with the size of the
    token as it was. The prompts are run one by one, as they may differ in length.
    """
    lists: tuple[list[Tensor], ...] = ([], [], [])
    names = words.unembedding[people.names.to(words.unembedding.device)].float()
    read = words.fold.into(names) - words.fold.into(names).mean(0)
    column = {token: n for n, token in enumerate(people.names.tolist())}
    device = next(model.parameters()).device
    sites = [site for block in blocks for site in (block.z, block.pattern)]
    keep = [*sites, words.end, words.normed]
    for number, (inputs, to, giver) in enumerate(
        zip(people.inputs, people.receivers.tolist(), people.givers.tolist(), strict=True)
    ):
        ids = inputs["input_ids"].to(device)
        run = fmr.run(model, keep=keep, edits=edits, input_ids=ids)
        scale = _size(run[words.end], run[words.normed], words)
        absent = [token for token in column if token not in (to, giver)]
        other = absent[number % len(absent)]
        place = ids[0].tolist().index(to)
        rows = []
        for block, factors in zip(blocks, known, strict=True):
            z = in_order(run[block.z], block.z, Heads(block.n_heads, block.n_kv_heads))[0, :, -1].float()
            rows.append(torch.einsum("hu,huw,nw->hn", z, factors.out.matrix.to(z), read.to(z)) * scale)
        logits = torch.cat(rows).double().cpu()
        lists[0].append(logits[:, column[to]])
        lists[1].append(logits[:, column[other]])
        lists[2].append(torch.cat([block.maps(run)[0, :, -1, place].double().cpu() for block in blocks]))
    return tuple(torch.stack(one, 1) for one in lists)  # type: ignore[return-value]


def _size(end: Tensor, normed: Tensor, words: Words) -> float:
    """What the last token was multiplied by where it was normalised."""
    x, y = end[0, -1].double(), normed[0, -1].double()
    fold = words.fold
    moved = fold.gain * (x - x.mean() if fold.centred else x)
    return float((moved * (y - fold.bias)).sum() / (moved * moved).sum().clamp(min=1e-30))


