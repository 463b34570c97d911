"""From the residual stream to logits: the model's own final norm and unembedding, run again from any point of the stream."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations

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
from fmr.structure.ends import class_head
from fmr.structure.frozen import Frozen, Held, affine, apart, frozen, run_affine
from fmr.structure.normal.match import above, all_inputs, below, between, come_of, depends_on, is_constant, settled
from fmr.structure.normal.vocabulary import CLAMPS, MOVES, NORMS, STATISTICS
from fmr.structure.proof.evaluate import Values, graph_of, own_work
from fmr.structure.streams.stream import Stream

_SCALES = MOVES | CLAMPS | frozenset("add sub mul div tanh neg".split())
"""What may be done to logits before they are returned: a bias, a scale, a soft cap, a cast."""

Through = Callable[[Tensor], Mapping[TensorId, Tensor]]
"""Runs the way from the end of the stream: every value on it."""

_HELD = ("param", "buffer")

_SUMS = frozenset(["add", "sub"])
"""What makes logits of those of several heads."""

_JOINS = _SUMS | {"cat", "stack"}
"""The same, and what puts them together."""


@dataclass(frozen=True, eq=False)
class Readout:
    """The way of a stream to logits: from its `end`, before the final norm, through the nodes of `way`, the last of which
    are the logits: `of_words`, or of classes. `weights` are the parameters and constants that are read on it, `choices` what
    says there, in each run anew, which positions are read (these are among the weights with what they were where the
    structure was located)."""

    graph: Graph = field(repr=False)
    end: TensorId
    way: tuple[TensorId, ...]
    weights: Mapping[TensorId, Tensor] = field(repr=False)
    of_words: bool = True
    choices: tuple[TensorId, ...] = ()
    _orders: dict[int, bool] = field(default_factory=dict, repr=False)

    def of(self, run: Run | Pass, key: Key) -> Tensor:
        """The logits of a value of a run, as if the stream had ended with it."""
        name = self.graph[id_of(key)].id
        start = name if name in self.way else self.end
        _check(self.graph, name, start, key)
        if isinstance(key, Site) and key.positions is not None and not self._by_position(self.graph):
            raise StructureError(
                f"{key!r} has positions, and {self.way[-1]} of {list(self.graph[self.way[-1]].shape)} has none. Expected "
                "the point as a whole, or vectors of it."
            )
        with own_work():
            graph = graph_of(run, self.graph)
            whole = replace(key, positions=None, examples=None) if isinstance(key, Site) else name
            known = self._run(graph, {start: run[whole].to(graph[start].dtype)}, partial(self._weight, run))
        if isinstance(key, Site):
            return Site(self.way[-1], key.positions, examples=key.examples, layout=key.layout).of(known[self.way[-1]])
        return known[self.way[-1]]

    def columns(self, run: Run | Pass) -> Tensor | None:
        """The positions of the stream that the logits of each example are made of, (examples, positions) in booleans; None
        where each position has logits of its own."""
        graph = graph_of(run, self.graph)
        if self._by_position(graph):
            return None
        states, examples = run[self.end], graph[self.way[-1]].shape[0]
        with own_work(), torch.inference_mode(False), torch.enable_grad():
            start = {self.end: states.detach().clone().requires_grad_()}
            known = self._run(graph, start, lambda name: self._weight(run, name).detach().clone())
            made = known[self.way[-1]].float().flatten(1)
            weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(0)).to(made.device)
            sums = (made * weights).sum(1)
            ends = sums.sum(), sums[0]
            of_all, of_first = (torch.autograd.grad(one, known[self.end], retain_graph=True)[0] for one in ends)
        if len(of_first) % examples or bool((of_first.reshape(examples, -1) != 0).any(1)[1:].any()):
            raise StructureError(
                f"{self.way[-1]} of {list(made.shape)} is not made of one row of the stream, {list(states.shape)}, for each "
                "example. Expected examples first."
            )
        return (of_all.reshape(examples, -1, of_all.shape[-1]) != 0).any(-1).cpu()

    def _by_position(self, graph: Graph) -> bool:
        """Whether each vector of the stream has logits of its own."""
        states, logits = graph[self.end].shape[:-1], graph[self.way[-1]].shape
        return math.prod(logits) == math.prod(states) * math.prod(self._rest(self.way[-1]))

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """The logits of vectors (..., width) that no run holds, (..., vocabulary), as if the stream had ended with each."""
        rows = self._rows(vectors, self.graph[self.end].dtype)
        with own_work():
            read = self._read(rows, self._through, self.way[-1])
        return read.reshape(*vectors.shape[:-1], *read.shape[1:])

    def frozen(self, vectors: Tensor) -> Frozen:
        """The logits of vectors (..., width) in float64 as an affine function of these, the scale of the norm held at what
        each of them has; before what bends them, such as a soft cap (`capped`)."""
        last = self._affine_end()
        nodes, live = self._nodes, affine(self.graph, self._nodes, [self.end])

        def through(leaves: Mapping[TensorId, Tensor], held: Held) -> Tensor:
            def run(start: Tensor) -> dict[TensorId, Tensor]:
                return run_affine(self.graph, nodes, live, {self.end: start}, self.weights.__getitem__, held())

            read = self._read(leaves[self.end], run, last)
            return read.reshape(*vectors.shape[:-1], *read.shape[1:])

        return apart(through, {self.end: self._rows(vectors, torch.float64)})

    def frozen_in(self, run: Run | Pass) -> Frozen:
        """The same of the whole stream of a run, of whatever positions its logits are made."""
        return frozen(
            graph_of(run, self.graph), self._affine_end(), {self.end: run[self.end]}, lambda name: self._weight(run, name)
        )

    def _affine_end(self) -> TensorId:
        if self.linear is None:
            raise StructureError(
                f"The logits of {self.graph.model} are no sum over what is written to its stream: what lies between "
                f"{self.end} and {self.way[-1]} is not linear. Expected a norm and a projection."
            )
        return self.linear

    @property
    def capped(self) -> bool:
        """Whether something that bends, such as a soft cap, follows the projection to logits."""
        return self.linear != self.way[-1]

    @property
    def linear(self) -> TensorId | None:
        """The last value on the way that is affine in the stream when the scale of its norm is held: the logits, or what
        is bent to make them; None where that comes before the projection."""
        live = affine(self.graph, self._nodes, [self.end])
        found = [node for node in self._nodes if node.id in live]
        if found and found[-1].id != self.way[-1] and found[-1].op in ("mul", "div"):
            found.pop()  # what scales logits for their cap
        return found[-1].id if found and found[-1].shape[-1] == self.graph[self.way[-1]].shape[-1] else None

    @property
    def _nodes(self) -> list[Node]:
        return [self.graph[name] for name in self.way]

    def _rows(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors as rows where the weights are; all that the way reads beside them must be known."""
        _check_vectors(self.graph, self.end, vectors)
        beside = {parent.id for node in self._nodes for parent in node.parents} - {self.end, *self.way}
        missing = sorted(beside - self.weights.keys())
        if missing:
            raise StructureError(
                f"{missing[0]} is not known: the structure was found in a graph alone, which holds no weights, or without "
                "numbers. Expected fmr.locate(run), or a point of a run: read_out(run, site)."
            )
        device = next((weight.device for weight in self.weights.values()), vectors.device)
        return vectors.reshape(-1, vectors.shape[-1]).to(device, dtype).contiguous()

    def _through(self, start: Tensor) -> dict[TensorId, Tensor]:
        """Every value of the way when the stream ends with this one."""
        return self._run(self.graph, {self.end: start}, lambda name: self.weights[name].detach())

    def _run(self, graph: Graph, known: Mapping[TensorId, Tensor], read: Values) -> dict[TensorId, Tensor]:
        """Every value of the way that is made of a known one; what else goes in is read."""
        made = dict(known)
        for node in (graph[one] for one in self.way if one not in known):
            if any(parent in made for parent in node.parents):
                made[node.id] = _again(graph, node, {p.id: made[p.id] if p.id in made else read(p.id) for p in node.parents})
        return made

    def _read(self, rows: Tensor, through: Through, last: TensorId) -> Tensor:
        """The value at the end of the way for each row: all at once, each an example of one position, where that has no
        sizes of its own."""
        lead = self.graph[self.end].shape[:-1]
        ours = (len(rows), *(1 for _ in lead[1:]))
        try:
            known = through(rows.view(*ours, rows.shape[-1])) if lead else {}
        except (RuntimeError, StructureError):
            return self._as_recorded(rows, through, last)
        recorded = ((made.numel(), math.prod(self.graph[name].shape)) for name, made in known.items())
        alike = all(made * math.prod(lead) == before * len(rows) for made, before in recorded)
        if not lead or not alike or known[last].shape[: len(lead)] != ours:
            return self._as_recorded(rows, through, last)
        return known[last].reshape(len(rows), *self._rest(last))

    def _rest(self, last: TensorId) -> tuple[int, ...]:
        """The shape of the logits of one vector: a vocabulary, after a dimension of heads where there are several."""
        lead, logits = self.graph[self.end].shape[:-1], self.graph[last].shape
        of_rows = len(lead) == 1 and math.prod(logits[:-1]) == lead[0]
        leads = len(logits) > len(lead) and logits[: len(lead)] == lead
        return tuple(logits[len(lead) :]) if leads and not of_rows else tuple(logits[-1:])

    def _as_recorded(self, rows: Tensor, through: Through, last: TensorId) -> Tensor:
        """The same in the shape of the recorded stream, as many rows at a time as that has; where only one position of it
        has logits, one for each example, which stands at all its positions."""
        shape, logits = self.graph[self.end].shape, self.graph[last].shape
        all_rows, rest = math.prod(shape[:-1]), self._rest(last)
        size = math.prod(logits) // math.prod(rest)
        if len(shape) > 3 or not size or all_rows % size or not self._keeps_order(size):
            raise StructureError(
                f"{last} of {list(logits)} has no logits for each vector of the stream, {list(shape)}, so that vectors "
                "alone cannot be read out. Expected a point of a run: read_out(run, site)."
            )
        found = []
        for part in rows.split(size):
            full = pad(part, (0, 0, 0, size - len(part)))
            found.append(through(self._laid(full))[last].reshape(size, *rest)[: len(part)])
        return torch.cat(found)

    def _laid(self, rows: Tensor) -> Tensor:
        """Vectors as the recorded stream: each at one place of it, or at all positions of its example."""
        shape = self.graph[self.end].shape
        return rows[:, None].expand(len(rows), math.prod(shape[:-1]) // len(rows), shape[-1]).reshape(shape)

    def _keeps_order(self, size: int) -> bool:
        """Whether so many vectors come out as logits in the order in which they went in: turned by one, so are these."""
        if size not in self._orders:
            draw = torch.Generator().manual_seed(0)
            node, device = self.graph[self.end], next((weight.device for weight in self.weights.values()), None)
            rows = torch.randn(size, node.shape[-1], generator=draw).to(device, node.dtype)
            made = [self._through(self._laid(one))[self.way[-1]].float() for one in (rows, rows.roll(1, 0))]
            first, turned = (one.reshape(size, -1) for one in made)
            self._orders[size] = bool((first.roll(1, 0) - turned).abs().max() < 0.1 * first.std())
        return self._orders[size]

    def _weight(self, run: Run | Pass, name: TensorId) -> Tensor:
        if name in run:
            return run[name]
        if name in self.choices:
            raise IdError(
                f"This run did not keep {str(name)!r}, by which positions are chosen: expected fmr.run(model, keep=[site, "
                "*structure.readout.choices], ...)."
            )
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
    except (RuntimeError, IndexError) as error:
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
    end = stream.writes[-1].after
    last = class_head(graph, stream) if unembedding is None else _last(graph, graph[unembedding.id], end)
    if not isinstance(last, Node):
        return last or "no projection makes logits of the end of its residual stream"
    if is_normed_on_its_way(graph, stream):
        return "its norms stand on the stream itself (post-norm), so that none is left to read an earlier point through"
    way = list(come_of(graph, end, last.id))
    beside = {parent.id for node in way for parent in node.parents} - {end, *(node.id for node in way)}
    fed = [name for name in sorted(beside) if not is_constant(graph, name)]
    content = next((name for name in fed if not _only_chooses(graph, name)), None)
    if content is not None or not way:
        return _made_of_more(content or last.id)
    weights = {name: value(name) for name in beside} if value is not None else {}
    counts = (name for name in beside if not graph[name].dtype.is_floating_point and graph[name].op not in _HELD)
    choices = sorted({*fed, *counts})  # what is made anew in each run: numbers of positions or of examples, as a rule
    return Readout(graph, end, tuple(node.id for node in way), weights, unembedding is not None, tuple(choices))


def _only_chooses(graph: Graph, name: TensorId) -> bool:
    """Whether a value says which positions are meant: made of whole numbers and masks that are given, of no weight."""
    made = [graph[name], *above(graph, name, lambda node: True, all_inputs)]
    return not any(node.op in ("param", "opaque") or (node.op == "input" and node.dtype.is_floating_point) for node in made)


def is_normed_on_its_way(graph: Graph, stream: Stream) -> bool:
    """Whether the last write of a stream begins with a normalised value of it."""
    if len(stream.writes) < 2:
        return False
    inside = between(graph, stream.writes[-2].after, stream.writes[-1].before)
    return any(node.op in NORMS | STATISTICS for node in inside)


def _is_cap(graph: Graph, node: Node) -> bool:
    """Whether a sigmoid is a soft cap, as what it makes is scaled; else it makes probabilities of logits."""
    readers = graph.readers(node.id)
    return node.op == "sigmoid" and bool(readers) and all(one.op in ("mul", "div") for one in readers)


def _last(graph: Graph, unembedding: Node, end: TensorId) -> Node | str:
    """The logits as the model returns them: scaled, capped, and those of several heads put together; as they were projected
    where they are not returned, unless what is not made of the end of the stream is added to them."""

    def goes_on(node: Node) -> bool:
        others = [parent.id for parent in node.parents if not is_constant(graph, parent.id)]
        joins = node.op in _JOINS and all(depends_on(graph, name, end) for name in others)
        joins = joins and not (node.op in _SUMS and any(depends_on(graph, a, b) for a, b in permutations(others, 2)))
        return joins or (len(others) == 1 and (node.op in _SCALES or _is_cap(graph, node)))

    returned = set(ids_in(graph.scopes[0].output)) if graph.scopes else set()
    reached = [node for node, _ in below(graph, unembedding, goes_on)]
    lower = [node for node in reached if node is unembedding or goes_on(node)]
    last = next((node for node in reversed(lower) if node.id in returned), None)
    sums = (node for node in reached if node.op in _SUMS and node.shape == unembedding.shape)
    other = (p.id for node in sums for p in node.parents if not depends_on(graph, p.id, end))
    fed = (name for name in other if not (is_constant(graph, name) or _only_chooses(graph, name)))
    more = next(fed, None) if last is None else None
    return _made_of_more(more) if more is not None else last or settled(graph, unembedding)


def _made_of_more(name: TensorId) -> str:
    return f"its logits are made of more than the end of its residual stream: of {name} too"
