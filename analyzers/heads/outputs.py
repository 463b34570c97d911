"""Sums over what many heads write: the cosine of each pair token by token, and how alike they lay tokens out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from analyzers.heads.circuits import Circuits
from analyzers.heads.divergence import CKA, OUTPUT, Sums
from analyzers.protocol import AnalyzerError
from fmr.errors import StructureError
from fmr.ids import TensorId
from fmr.nodes import Key
from fmr.runs.run import Run
from fmr.structure.attention.factors import Factor, Heads, in_order, written_by
from fmr.structure.parts import Attention, Structure
from fmr.structure.proof.certificate import error, tolerance_of
from fmr.structure.proof.evaluate import own_work
from fmr.structure.streams.fold import Fold

LEAST = 4
"""The tokens below which the likeness of two layouts is not defined."""

SIDE = 48
"""Heads whose products with the others are taken at once."""


@dataclass(frozen=True, eq=False)
class Writing:
    """How the heads of an attention write: `matrix` (heads, units, width) is that of their projection, with a norm or scale
    between it and the stream folded in; `fold` is that, `bias` what it makes of the projection's, and `end` what is added
    to the stream. Where nothing lies between, `end` is None.
    """

    block: Attention
    matrix: Tensor
    bias: Tensor
    fold: Fold | None = None
    end: TensorId | None = None

    @property
    def keys(self) -> list[Key]:
        """What is read of a run."""
        return [self.block.z, *([] if self.end is None else [self.end])]

    def read(self, run: Run) -> Tensor:
        """What each head adds to the stream in a run, (examples, heads, positions, width)."""
        block = self.block
        z = in_order(run[block.z], block.z, Heads(block.n_heads, block.n_kv_heads)).detach().float()
        written = torch.einsum("ehtu,huw->ehtw", z, self.matrix.to(z))
        if self.fold is None or self.end is None:
            return written
        moved, end = written.sum(1) + self.bias.to(z), run[self.end].detach()
        for seen in _laid(end.float(), moved.shape):
            size = self.fold.size(moved, seen)
            if error(size * moved + self.fold.bias.to(z), seen) <= tolerance_of(end, run[block.z]):
                return written * size[:, None]
        raise StructureError(f"{self.end} is not what the heads of {block.scope!r} write, normalised.")


def _laid(value: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """A value with one vector for each token as (examples, positions, width), in the orders in which it may lie."""
    if value.numel() == shape.numel():
        yield value.reshape(shape)
        yield value.reshape(shape[1], shape[0], shape[2]).transpose(0, 1)


def writings(structure: Structure, run: Run, blocks: Sequence[Attention]) -> list[Writing]:
    """How the heads of some attentions write, found in a run that kept every value."""
    circuits = Circuits(structure, run) if any(stream.writes for stream in structure.streams) else None
    return [_writing(circuits, run, block) for block in blocks]


def _writing(circuits: Circuits | None, run: Run, block: Attention) -> Writing:
    try:
        out = _written(run, block)
        if circuits is None or circuits.write_of(out.of) is None:
            return Writing(block, out.matrix, out.bias)
        _, end, fold = circuits.way_of(block)
    except StructureError as refused:
        raise AnalyzerError(
            f"What the heads of {block.scope!r} write does not arrive in the stream as a sum over them: {refused} "
            "Expected distances of 'attention' or 'beyond first', or another scope."
        ) from refused
    if end == out.of:
        return Writing(block, out.matrix, out.bias)
    return Writing(block, fold.after(out.matrix), fold.after(out.bias), fold, end)


def _written(run: Run, block: Attention) -> Factor:
    """The weights by which heads write, proven by a run; how queries and keys are made does not matter."""
    if block.out is None:
        raise StructureError(f"{block.scope!r} has no projection behind its heads.")
    with own_work():
        heads = Heads(block.n_heads, block.n_kv_heads)
        out, off = written_by(run.graph.unfused, block.z, block.path, block.out, heads, run.__getitem__)
    if off > tolerance_of(run[block.z], run[block.out]):
        raise StructureError(f"{block.out.id} is not what one projection makes of its heads (error {off:.0e}).")
    return out


def count_outputs(sums: Sums, written: Sequence[Tensor], real: Tensor) -> None:
    """Add what the heads of a batch wrote to the sums of those distances that are of outputs.

    written: by layer, (examples, heads, positions, width). real: which tokens are no padding, (examples, positions).
    """
    if OUTPUT in sums.apart and len({one.shape[-1] for one in written}) > 1:
        sizes = sorted({one.shape[-1] for one in written})
        raise AnalyzerError(f"Outputs of {sizes} numbers have no cosine. Expected one width, or distances='cka'.")
    for e, kept in enumerate(real):
        outputs = [one[e] if bool(kept.all()) else one[e][:, kept.to(one.device)] for one in written]
        if CKA in sums.apart and kept.sum() >= LEAST:
            sums.apart[CKA] += _likeness(torch.cat([one @ one.mT for one in outputs]).double())
            sums.counted[CKA] += 1
        if OUTPUT in sums.apart:
            sums.apart[OUTPUT] += _cosines(torch.cat(outputs))
            sums.counted[OUTPUT] += int(kept.sum())


def _cosines(outputs: Tensor) -> Tensor:
    """1 - cosine of each pair of heads, summed over tokens: (heads, heads). outputs: (heads, tokens, width), normalised in
    place."""
    rows = outputs.div_(outputs.norm(dim=-1, keepdim=True).clamp_min_(1e-12)).flatten(1)
    total = outputs.shape[1] - _gram(rows).double()
    return total.fill_diagonal_(0.0).clamp_(min=0.0).cpu()


def _gram(rows: Tensor) -> Tensor:
    """rows @ rows.T, of which about half is computed."""
    total = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), SIDE):
        some = slice(start, start + SIDE)
        total[some, start:] = rows[some] @ rows[start:].T
    return total.triu() + total.triu(1).T


def _likeness(kernels: Tensor) -> Tensor:
    """The unbiased Hilbert-Schmidt criterion of each pair of heads: (heads, heads). kernels: (heads, tokens, tokens).

    Source: L. Song et al., "Feature Selection via Dependence Maximization", 2012; T. Nguyen et al., "Do Wide and Deep
    Networks Learn the Same Things?", 2021 (summed over batches, here over examples).
    """
    n = kernels.shape[-1]
    kernels = kernels - torch.diag_embed(kernels.diagonal(dim1=1, dim2=2))
    rows, flat = kernels.sum(-1), kernels.flatten(1)
    whole = rows.sum(-1)
    total = _gram(flat) + whole[:, None] * whole[None] / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
    return (total / (n * (n - 3))).cpu()


def from_likeness(total: Tensor) -> Tensor:
    """1 - CKA of each pair of heads, from the sums of their criteria."""
    own = total.diagonal().clamp(min=0).sqrt()
    found = 1 - total / (own[:, None] * own[None]).clamp(min=1e-30)
    return found.clamp(0.0, 2.0).fill_diagonal_(0.0)
