"""Heads and memories as maps of one residual stream: what each reads of it and what it writes, as factors of their circuits.

A circuit is a matrix `left @ right` of low rank. Where only lengths matter, a factor stands for its triangular part, so that
what is kept of a circuit that reads is `(rank, width)`, and of one that writes `(width, rank)`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from analyzers.protocol import AnalyzerError
from fmr.errors import StructureError
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.runs.run import Run
from fmr.structure.attention.factors import Factors, last_alone, matrix_of
from fmr.structure.normal.match import (
    Projection,
    above,
    below,
    between,
    contraction,
    data_inputs,
    depends_on,
    is_constant,
    projection,
    strip_views,
    weights,
)
from fmr.structure.normal.vocabulary import CONVOLUTIONS, MOVES, NORMS, STATISTICS
from fmr.structure.parts import Attention, Memory, Structure
from fmr.structure.proof.evaluate import Values, plain
from fmr.structure.streams.fold import Fold, fold_between
from fmr.structure.streams.stream import Stream

Made = TypeVar("Made")

HEADS, MEMORIES = "head", "memory"

_SUMS = MOVES | {"add", "sub", "sum", "neg"}
"""Ops after which what a part writes has the directions that it had, beside what others add."""


@dataclass(frozen=True, eq=False)
class Part:
    """A head or a memory: `reads` by role (rank, width), `writes` (width, rank), and where in its stream it does so.

    `after` is the number of writes that are in what it reads, `at` that of the write that it takes part in.
    """

    name: str
    kind: str
    layer: int
    stream: int
    after: int
    at: int
    reads: dict[str, Tensor] = field(repr=False)
    writes: Tensor = field(repr=False)


def triangle(matrix: Tensor) -> Tensor:
    """The triangular factor of tall matrices (..., rows, columns): it makes vectors of the same lengths.

    It is the root of their small Gram matrix, taken in float64; where that is singular, of a QR decomposition.
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        return matrix
    wide = matrix.double()
    root, failed = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
    found: Tensor = torch.linalg.qr(wide, mode="r")[1] if bool(failed.any()) else root
    return found.to(matrix.dtype)


class Circuits:
    """The heads and memories of a structure as maps of its residual streams, found in a run that kept every value.

    `refused` says of those that are none, by scope, why.
    """

    def __init__(self, structure: Structure, run: Run) -> None:
        self.structure, self.run = structure, run
        self.graph = run.graph.unfused
        self.streams = [stream for stream in structure.streams if stream.writes]
        self.refused: dict[str, str] = {}
        if not self.streams:
            raise AnalyzerError(f"{structure.model} has no residual stream, so that nothing is read that others wrote.")
        self._folds: dict[tuple[TensorId, TensorId], Fold] = {}

    def heads(self, layers: range | None = None) -> Iterator[list[Part]]:
        """The heads, attention by attention; of these layers alone where they are named."""
        for number, block in self.numbered():
            if layers is None or number in layers:
                parts = self._tried(block.scope, partial(self._heads, block, number))
                if parts:
                    yield parts

    def numbered(self) -> list[tuple[int, Attention]]:
        """Each self-attention with the number of its layer; of its own place where there are no layers."""
        layers = self.structure.layers
        by_layer = [(n, block) for n, layer in enumerate(layers) for block in layer.attentions if block.kind == "self"]
        return by_layer or [(n, block) for n, block in enumerate(self.structure.attention) if block.kind == "self"]

    def memories(self, layers: range | None = None) -> Iterator[Part]:
        """The memories of each layer as one map each, from what the coefficients read to what they write; each expert as one
        of its own, since what weighs experts does not turn what they write."""
        for number, layer in enumerate(self.structure.layers):
            if layers is not None and number not in layers:
                continue
            several = _apart(layer.mlps)
            for place, memory in enumerate(several):
                name = f"mlp {number}" + (f".{place}" if len(several) > 1 else "")
                yield from self._tried(memory.scope, partial(self._memory, memory, number, name)) or []

    def factors(self, block: Attention) -> Factors:
        """The weights of the heads of an attention, with the norm before them folded in, and that after them."""
        found = block.factors(self.run)
        folded = {}
        for role in ("q", "k", "v"):
            factor = getattr(found, role)
            fold = self.fold(self.point_of(factor.of)[2], factor.of)
            offset = factor.bias + factor.matrix @ fold.bias.to(factor.matrix)
            folded[role] = factor._replace(matrix=fold.into(factor.matrix), bias=offset)
        out = found.out._replace(matrix=self.way_of(block)[2].after(found.out.matrix))
        return Factors(folded["q"], folded["k"], folded["v"], out, found.certified)

    def way_of(self, block: Attention) -> tuple[TensorId, TensorId, Fold]:
        """The output of an attention, what is written of it alone, and the norm or scale between the two."""
        assert block.out is not None
        written = self.written(block.out.id)[2]
        return block.out.id, written, self.fold(block.out.id, written)

    def point_of(self, name: TensorId) -> tuple[int, int, TensorId]:
        """The stream that a value is read from, how many of its writes are in it, and the point itself."""
        points = {
            point: number
            for number, stream in enumerate(self.streams)
            for point in (stream.points[0], stream.writes[0].before, *(write.after for write in stream.writes))
        }
        for node in above(self.graph, name, lambda node: node.id not in points and contraction(node) is None):
            if node.id in points:
                self._check_norms(points[node.id])
                stream, place = self.streams[points[node.id]], self.graph.place(node.id)
                before = sum(self.graph.place(write.after) <= place for write in stream.writes)
                return points[node.id], before, node.id
        raise StructureError(f"{name} is not read from a residual stream through a normalisation alone.")

    def written(self, name: TensorId) -> tuple[int, int, TensorId]:
        """The stream that a value is written to, with the number of the write, and the value that is added there: the last
        one that is made of it alone, where it is added up with others on its way."""
        found = self.write_of(name)
        if found is None:
            raise StructureError(f"{name} is written to no residual stream.")
        number, place = found
        return number, place, self._alone(name, self.streams[number].writes[place].added)

    def write_of(self, name: TensorId) -> tuple[int, int] | None:
        """The stream that a value is written to, if it is one, with the number of the write."""
        added = {
            writer: (number, place)
            for number, stream in enumerate(self.streams)
            for place, (write, names) in enumerate(zip(stream.writes, stream.writers, strict=True))
            for writer in (*names, write.added)
        }
        lower = below(self.graph, self.graph[name], lambda node: contraction(node) is None)
        return next((added[node.id] for node, _ in lower if node.id in added), None)

    def _alone(self, name: TensorId, added: TensorId) -> TensorId:
        """The last value on the way to what is added that is made of one alone, before it is laid out for that; whatever
        follows it must be sums."""
        graph = self.graph
        alone = last_alone(graph, graph[name], graph[added], lambda other: _is_number(graph, other))
        bends = [
            node
            for node in between(graph, alone.id, added)
            if node.op not in _SUMS and not _is_scaled(graph, node) and depends_on(graph, node.id, alone.id)
        ]
        if bends:
            raise StructureError(f"{name} goes through {bends[0].id} together with what others write.")
        while alone.id != name and alone.op in MOVES and len(read := data_inputs(graph, alone)) == 1:
            alone = graph[read[0]]
        return alone.id

    def fold(self, start: TensorId, end: TensorId) -> Fold:
        """The norm between two values."""
        if (start, end) not in self._folds:
            self._folds[start, end] = fold_between(self.graph, start, end, self.run.__getitem__)
        return self._folds[start, end]

    def _check_norms(self, number: int) -> None:
        """Raise for a stream that is normalised itself: what was written is not what is read."""
        stream = self.streams[number]
        if _is_normed_itself(self.graph, stream):
            raise AnalyzerError(
                f"{self.structure.model} normalises its residual stream itself (post-norm), so that what a head wrote is "
                "not what later heads read. Expected layers that normalise what they read (pre-norm)."
            )

    def _tried(self, scope: str, make: Callable[[], Made]) -> Made | None:
        try:
            return make()
        except StructureError as refused:
            self.refused[scope] = str(refused)
            return None

    def _heads(self, block: Attention, layer: int) -> list[Part]:
        found = self.factors(block)
        stream, after, _ = self.point_of(found.v.of)
        assert block.out is not None
        _, at, _ = self.written(block.out.id)
        q, k, v, out = (getattr(found, role).matrix for role in ("q", "k", "v", "out"))
        reads = {
            "q": triangle(k.mT) @ q,
            "k": triangle(q.mT) @ k,
            "v": triangle(out.mT) @ v,
        }
        writes = out.mT @ triangle(v.mT).mT
        return [
            Part(f"{layer}.{h}", HEADS, layer, stream, after, at, {role: x[h] for role, x in reads.items()}, writes[h])
            for h in range(len(out))
        ]

    def _memory(self, memory: Memory, layer: int, name: str) -> list[Part]:
        graph, value = self.graph, self.run.__getitem__
        source = strip_views(graph, memory.source, MOVES)
        higher = above(graph, memory.post.id, lambda node: projection(graph, node) is None)
        ups = [one for node in higher if (one := projection(graph, node)) and strip_views(graph, one.data, MOVES) == source]
        down = projection(graph, graph[memory.down])
        assert down is not None
        experts = len(memory.weights[memory.values]) if _is_of_experts(memory) else 1
        keys = torch.cat([_matrices(graph, up, value, experts) for up in ups], 1)
        values = _matrices(graph, down, value, experts)
        values = values if memory.first is None else values.narrow(2, memory.first, memory.n)
        if keys.shape[1] not in (memory.n, 2 * memory.n) or values.shape[2] != memory.n:
            raise StructureError(
                f"its projections make {keys.shape[1]} numbers of a token and read {values.shape[2]} for {memory.n} "
                "memories: one matrix for all tokens was expected, or one for each expert."
            )
        stream, after, point = self.point_of(source)
        _, at, written = self.written(memory.out.id)
        reads, writes = self.fold(point, source).into(keys), self.fold(memory.out.id, written).after(values.mT)
        return [
            Part(
                name if experts == 1 else f"{name} expert {n}", MEMORIES, layer, stream, after, at,
                {"in": triangle(_single(reads[n]))}, triangle(_single(writes[n])).mT,
            )
            for n in range(experts)
        ]  # fmt: skip


def _is_of_experts(memory: Memory) -> bool:
    """Whether its parameters hold a matrix for each of several experts, of which each token reads some."""
    keys, values = (memory.weights[name] for name in (memory.keys, memory.values))
    return keys.dim() == values.dim() == 3 and memory.graph[memory.down].op not in CONVOLUTIONS


def _apart(memories: Sequence[Memory]) -> list[Memory]:
    """The memories of a layer, of experts that are called one by one but have one parameter the first alone."""
    first = {memory.w_out if _is_of_experts(memory) else id(memory): memory for memory in reversed(memories)}
    return [memory for memory in memories if any(memory is one for one in first.values())]


def _matrices(graph: Graph, found: Projection, value: Values, experts: int) -> Tensor:
    """The matrix of a projection for each expert, (experts, what it makes, what it sums over), if it reads only one, too."""
    matrix = matrix_of(graph, found, value)
    if experts == 1:
        return matrix[None]
    stacks: list[Tensor] = [plain(value(name)).detach() for name in weights(graph, found.weight)]
    laid = [turned for one in stacks if one.dim() == 3 for turned in (one, one.mT)]
    known = [one for one in laid if one.shape[1:] == matrix.shape and any(torch.equal(part, matrix) for part in one)]
    every: Tensor = known[0] if known else matrix.unflatten(0, (experts, -1))
    return every


def _is_number(graph: Graph, name: TensorId) -> bool:
    """Whether a value is of numbers that a run makes."""
    return graph[name].dtype.is_floating_point and not is_constant(graph, name)


def _is_scaled(graph: Graph, node: Node) -> bool:
    """Whether a node multiplies each token with one number at most."""
    return node.op in ("mul", "div") and sum(graph[parent.id].shape[-1:] not in ((), (1,)) for parent in node.parents) == 1


def _single(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _is_normed_itself(graph: Graph, stream: Stream) -> bool:
    """Whether a norm stands between two writes of a stream."""
    steps = zip(stream.writes, stream.writes[1:], strict=False)
    return any(
        node.op in NORMS | STATISTICS
        for one, next_ in steps
        if graph.place(next_.before) > graph.place(one.after)
        for node in between(graph, one.after, next_.before)
    )
