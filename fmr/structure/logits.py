"""From the residual stream to logits: the model's own final norm and unembedding, run again from any point of the stream."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fmr.errors import IdError, StructureError
from fmr.graph.execute import execute, overwritten
from fmr.graph.graph import Graph
from fmr.ids import ALIAS, Site, TensorId
from fmr.nests import ids_in
from fmr.nodes import Key, Node, id_of
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.normal.match import CLAMPS, MOVES, NORMS, STATISTICS, below, between, depends_on, is_constant, settled
from fmr.structure.proof.evaluate import Values, graph_of, own_work
from fmr.structure.streams.stream import Stream

_SCALES = MOVES | CLAMPS | frozenset("add sub mul div tanh neg".split())
"""What may be done to logits before they are returned: a bias, a scale, a soft cap, a cast."""

_JOINS = frozenset(["cat", "stack"])
"""What puts the logits of several heads together."""


@dataclass(frozen=True, eq=False)
class Readout:
    """The way of a stream to logits: from its `end`, before the final norm, through the nodes of `way`, the last of which
    are the logits. `weights` are the parameters and constants that are read on it."""

    graph: Graph = field(repr=False)
    end: TensorId
    way: tuple[TensorId, ...]
    weights: Mapping[TensorId, Tensor] = field(repr=False)

    def of(self, run: Run | Pass, key: Key) -> Tensor:
        """The logits of a value of a run, as if the stream had ended with it."""
        name = self.graph[id_of(key)].id
        start = name if name in self.way else self.end
        _check(self.graph, name, start, key)
        with own_work():
            graph = graph_of(run, self.graph)
            whole = replace(key, positions=None, examples=None) if isinstance(key, Site) else name
            known = {start: run[whole].to(graph[start].dtype)}
            for node in (graph[one] for one in self.way):
                if node.id != start and any(parent in known for parent in node.parents):
                    read = {p.id: known[p.id] if p.id in known else self._weight(run, p.id) for p in node.parents}
                    known[node.id] = _again(graph, node, read)
        if isinstance(key, Site):
            return Site(self.way[-1], key.positions, examples=key.examples, layout=key.layout).of(known[self.way[-1]])
        return known[self.way[-1]]

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """The logits of vectors (..., width) that no run holds, (..., vocabulary), as if the stream had ended with each."""
        _check_vectors(self.graph, self.end, vectors)
        missing = next((name for node in self._nodes for name in node.parents if not self._knows(name.id)), None)
        if missing is not None:
            raise StructureError(
                f"{missing.id} is not known: the structure was found in a graph alone, which holds no weights, or without "
                "numbers. Expected fmr.locate(run), or a point of a run: read_out(run, site)."
            )
        width, dtype = vectors.shape[-1], self.graph[self.end].dtype
        device = next((weight.device for weight in self.weights.values()), vectors.device)
        with own_work():
            rows = vectors.reshape(-1, width).to(device, dtype)
            read = self._freely(rows)
            if read is None:
                read = self._as_recorded(rows)
        return read.reshape(*vectors.shape[:-1], *read.shape[1:])

    @property
    def _nodes(self) -> list[Node]:
        return [self.graph[name] for name in self.way]

    def _knows(self, name: TensorId) -> bool:
        return name == self.end or name in self.way or name in self.weights

    def _through(self, start: Tensor) -> dict[TensorId, Tensor]:
        """Every value of the way when the stream ends with this one."""
        known = {self.end: start}
        for node in self._nodes:
            read = {p.id: known[p.id] if p.id in known else self.weights[p.id].detach() for p in node.parents}
            known[node.id] = _again(self.graph, node, read)
        return known

    def _freely(self, rows: Tensor) -> Tensor | None:
        """The logits of all rows at once, each an example of one position; None where the way has sizes of its own."""
        lead = self.graph[self.end].shape[:-1]
        if not lead:
            return None
        ours = (len(rows), *(1 for _ in lead[1:]))
        try:
            known = self._through(rows.view(*ours, rows.shape[-1]))
        except StructureError:
            return None
        recorded = ((known[node.id].numel(), math.prod(node.shape)) for node in self._nodes)
        alike = all(made * math.prod(lead) == before * len(rows) for made, before in recorded)
        logits = known[self.way[-1]]
        return logits.flatten(0, len(lead) - 1) if alike and logits.shape[: len(lead)] == ours else None

    def _as_recorded(self, rows: Tensor) -> Tensor:
        """The logits of rows in the shape of the recorded stream, as many at a time as that has; where only one position of
        it has logits, one for each example, which stands at all its positions."""
        shape, logits = self.graph[self.end].shape, self.graph[self.way[-1]].shape
        lead = shape[:-1]
        if logits[: len(lead)] == lead:
            size, rest = math.prod(lead), logits[len(lead) :]
        elif len(lead) == 2 and math.prod(logits) == lead[0] * logits[-1]:
            size, rest = lead[0], logits[-1:]
        else:
            raise StructureError(
                f"{self.way[-1]} of {list(logits)} has no logits for each vector of the stream, {list(shape)}, so that "
                "vectors alone cannot be read out. Expected a point of a run: read_out(run, site)."
            )
        found = []
        for part in rows.split(size):
            full = pad(part, (0, 0, 0, size - len(part)))
            start = full.view(shape) if size == math.prod(lead) else full[:, None].expand(shape)
            found.append(self._through(start)[self.way[-1]].reshape(size, *rest)[: len(part)])
        return torch.cat(found)

    def _weight(self, run: Run | Pass, name: TensorId) -> Tensor:
        if name in run:
            return run[name]
        if name not in self.weights:
            raise IdError(
                f"This run did not keep {str(name)!r}, nor was the structure found in one that did: fmr.locate(run)."
            )
        return self.weights[name]


def _check(graph: Graph, name: TensorId, start: TensorId, key: Key) -> None:
    """Whether a value has the width of the stream, and its selection leaves that whole."""
    shape, width = graph[name].shape, graph[start].shape[-1]
    if len(shape) != len(graph[start].shape) or shape[-1:] != (width,):
        raise StructureError(
            f"{str(name)!r} has shape {list(shape)}: expected a value of the stream, {list(graph[start].shape)}, such as "
            "structure.layers[0].resid_post."
        )
    if isinstance(key, Site) and not {"heads", "units"}.isdisjoint(key.selection):
        raise StructureError(f"{key!r} is a part of a vector, which has no logits: expected positions or examples.")


def _check_vectors(graph: Graph, end: TensorId, vectors: Tensor) -> None:
    """Whether vectors have the width of the stream."""
    width = graph[end].shape[-1]
    if not vectors.is_floating_point() or vectors.shape[-1:] != (width,):
        raise StructureError(
            f"Vectors of {vectors.dtype} and shape {list(vectors.shape)}: expected numbers of shape (..., {width}), "
            f"as wide as the residual stream {end}."
        )


def _again(graph: Graph, node: Node, read: Mapping[TensorId, Tensor]) -> Tensor:
    """The result of a node, in the model's own dtype."""
    try:
        value = overwritten(graph.__getitem__, node, read) if node.op == ALIAS else execute(node, read)
    except RuntimeError as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in read.values())
        raise StructureError(
            f"{node.id}, on the way to the logits, cannot be run on {shapes}: {error}. Expected a run with keep='all', "
            "or one of the shapes in which the structure was located."
        ) from error
    return value.to(node.dtype)


def find_readout(graph: Graph, stream: Stream | None, unembedding: Site | None, value: Values | None) -> Readout | str:
    """The way from the end of a stream to the model's logits, or why there is none."""
    if stream is None:
        return "it has no residual stream"
    if unembedding is None:
        return "no projection makes logits of the end of its residual stream"
    if _is_normed_on_its_way(graph, stream):
        return "its norms stand on the stream itself (post-norm), so that none is left to read an earlier point through"
    end = stream.writes[-1].after
    last = _last(graph, graph[unembedding.id], end)
    way = [node for node in between(graph, end, last.id) if depends_on(graph, node.id, end)]
    beside = {parent.id for node in way for parent in node.parents} - {end, *(node.id for node in way)}
    fed = next((name for name in sorted(beside) if not is_constant(graph, name)), None)
    if fed is not None or not way:
        return f"its logits are made of more than the end of its residual stream: of {fed or unembedding.id} too"
    weights = {name: value(name) for name in beside} if value is not None else {}
    return Readout(graph, end, tuple(node.id for node in way), weights)


def _is_normed_on_its_way(graph: Graph, stream: Stream) -> bool:
    """Whether the last write of a stream begins with a normalised value of it."""
    if len(stream.writes) < 2:
        return False
    inside = between(graph, stream.writes[-2].after, stream.writes[-1].before)
    return any(node.op in NORMS | STATISTICS for node in inside)


def _last(graph: Graph, unembedding: Node, end: TensorId) -> Node:
    """The logits as the model returns them: scaled, capped, and those of several heads put together; as they were projected
    where they are not returned."""

    def goes_on(node: Node) -> bool:
        others = [parent.id for parent in node.parents if not is_constant(graph, parent.id)]
        joins = node.op in _JOINS and all(depends_on(graph, name, end) for name in others)
        return joins or (node.op in _SCALES and len(others) == 1)

    returned = set(ids_in(graph.scopes[0].output)) if graph.scopes else set()
    lower = [node for node, _ in below(graph, unembedding, goes_on) if node is unembedding or goes_on(node)]
    return next((node for node in reversed(lower) if node.id in returned), settled(graph, unembedding))
