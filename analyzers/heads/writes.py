"""What heads write: whether they copy the token that they look at, and whether they name the person who receives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from analyzers.heads.circuits import Circuits
from analyzers.heads.draws import People
from fmr.errors import StructureError
from fmr.nodes import Key
from fmr.structure.attention.factors import Factors, Heads, in_order, matrix_of
from fmr.structure.normal.match import projection, strip_views
from fmr.structure.normal.vocabulary import MOVES
from fmr.structure.parts import Attention, Structure
from fmr.structure.streams.fold import Fold


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
        self.circuits = circuits
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


def copying(known: Sequence[Factors], gram: Tensor) -> tuple[Tensor, Tensor]:
    """How far each head raises the logit of the token that it looks at, and the most that mismatched heads do: (heads,).

    The circuit `U O V E^T` from tokens to logits has the rank of a head, and its eigenvalues but for zeros are those of the
    (head size)^2 matrix `V (E^T U) O`: the score is their sum over the sum of their sizes, 1 where all are positive. The
    null puts the values of a head before the outputs of three heads of the next attention; heads of one may share values.

    Source: N. Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021 (copying).
    """
    own, nulls = [], []
    for number, factors in enumerate(known):
        read = (factors.v.matrix @ gram.to(factors.v.matrix)).cpu()
        other = known[(number + 1) % len(known)].out.matrix.mT.cpu()
        own.append(_positive(read @ factors.out.matrix.mT.cpu()))
        first = 1 if len(known) == 1 else 0
        fits = other.shape == factors.out.matrix.mT.shape
        mixed = [_positive(read @ other.roll(shift, 0)) for shift in range(first, min(len(read), 3 + first)) if fits]
        nulls.append(torch.stack(mixed).amax(0) if mixed else torch.full_like(own[-1], float("nan")))
    return torch.cat(own), torch.cat(nulls)


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
    """What each head adds to the logit of who receives, and to that of someone not there; and its weight on the first.

    Each is (heads, prompts), the logits over the mean of all names, by the direct way to the logits with the size of the
    token as it was. Prompts of one length are run together.
    """
    names = words.fold.into(words.unembedding[people.names.to(words.unembedding.device)].float())
    read = names - names.mean(0)
    device = next(model.parameters()).device
    ways = [words.circuits.way_of(block) for block in blocks]
    keep: list[Key] = [site for block in blocks for site in (block.z, *block.map_sites)]
    keep += [words.end, words.normed, *(name for out, after, _ in ways if out != after for name in (out, after))]
    rows = [one["input_ids"][0] for one in people.inputs]
    found = torch.zeros(3, sum(block.n_heads for block in blocks), len(rows), dtype=torch.float64)
    for size in sorted({len(row) for row in rows}):
        which = [n for n, row in enumerate(rows) if len(row) == size]
        ids = torch.stack([rows[n] for n in which])
        run = fmr.run(model, keep=keep, edits=edits, input_ids=ids.to(device))
        scale = _sizes(run[words.end], run[words.normed], words.fold, len(which))
        logits = []
        for block, factors, (out, after, fold) in zip(blocks, known, ways, strict=True):
            z = in_order(run[block.z], block.z, Heads(block.n_heads, block.n_kv_heads))[:, :, -1].float()
            written = torch.einsum("ehu,huw,nw->hen", z, factors.out.matrix.to(z), read.to(z))
            own = scale if out == after else scale * _sizes(run[out], run[after], fold, len(which))
            logits.append(written * own[None, :, None].to(z))
        added = torch.cat(logits).double().cpu()
        weights = torch.cat([block.maps(run)[:, :, -1].transpose(0, 1).double().cpu() for block in blocks])
        for place, n in enumerate(which):
            to, other = _columns(people, n)
            found[0, :, n], found[1, :, n] = added[:, place, to], added[:, place, other]
            found[2, :, n] = weights[:, place, (ids[place] == people.receivers[n]).nonzero()[0, 0]]
    return found[0], found[1], found[2]


def _columns(people: People, n: int) -> tuple[int, int]:
    """The places among the names of who receives in a prompt, and of somebody who is not there."""
    names, there = people.names.tolist(), (int(people.receivers[n]), int(people.givers[n]))
    absent = [column for column, token in enumerate(names) if token not in there]
    return names.index(there[0]), absent[n % len(absent)]


def _sizes(before: Tensor, after: Tensor, fold: Fold, examples: int) -> Tensor:
    """What the last token of each example was multiplied by where it was normalised."""
    x, y = (one.reshape(examples, -1, one.shape[-1])[:, -1].double() for one in (before, after))
    return fold.size(fold.after(x), y)[..., 0]
