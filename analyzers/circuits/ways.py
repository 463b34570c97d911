"""How a value follows from others: the ops of a recording that lie between them, run again on other values."""

from collections.abc import Collection, Mapping, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from analyzers.protocol import AnalyzerError
from fmr.graph.graph import Graph
from fmr.graph.state import casting
from fmr.ids import TensorId
from fmr.runs.passes import Pass
from fmr.structure.normal.match import computed_from
from fmr.sweeps.steps import Step, run_step, steps_of
from fmr.watching.calls import unwatched


class Way:
    """The steps from some values to one that follows from them.

    >>> point = structure.layers[3].resid_mid.id
    >>> way = Way(graph, [point], structure.mlps[3].out.id)
    >>> way({point: 2 * run[point]}, run.last).shape
    torch.Size([1, 6, 128])

    `beside` is what else the steps compute with: weights, masks and whatever else does not follow from the given values.
    """

    def __init__(self, graph: Graph, starts: Sequence[TensorId], end: TensorId) -> None:
        self.graph, self.starts, self.end = graph, tuple(starts), end
        self.steps = _between(graph, self.starts, end)
        made = {node.id for step in self.steps for node in step.nodes}
        self.made = made | set(self.starts)
        self.beside = {name for step in self.steps for node in step.nodes for name in computed_from(node)} - self.made
        if end not in self.made:
            raise AnalyzerError(f"{end} does not follow from {', '.join(self.starts)} in {graph.model}.")

    def __call__(self, given: Mapping[TensorId, Tensor], base: Pass) -> Tensor:
        """The value at the end, with the given values at the starts and those of a pass beside the way."""
        known = dict(given)

        def read(name: TensorId) -> Tensor:
            return known[name] if name in known else base.as_read(name)

        with unwatched(), casting(base.casts):
            for step in self.steps:
                known.update(run_step(step, read, self.graph.__getitem__))
        return known[self.end]


def sources(graph: Graph, end: TensorId, among: Collection[TensorId]) -> set[TensorId]:
    """Which of some values one is made of, without looking past any of them."""
    found, waiting, seen = set(), [end], {end}
    while waiting:
        for parent in graph[waiting.pop()].parents:
            if parent.id in among:
                found.add(parent.id)
            elif parent.id not in seen:
                seen.add(parent.id)
                waiting.append(parent.id)
    return found


def _between(graph: Graph, starts: tuple[TensorId, ...], end: TensorId) -> tuple[Step, ...]:
    """The steps that lead from the starts to the end, in execution order."""
    first = min(graph.place(name) for name in starts)
    by_id = _by_id(graph)
    above, waiting = {end: by_id[end]}, [end]
    while waiting:
        name = waiting.pop()
        for parent in by_id[name].reads if name not in starts else ():
            if parent not in above and graph.place(parent) >= first:
                above[parent] = by_id[parent]
                waiting.append(parent)
    reached, steps = set(starts), []
    for name in sorted(above, key=graph.place):
        step = above[name]
        if name not in reached and any(read in reached for read in step.reads):
            reached.update(node.id for node in step.nodes)
            steps.append(step)
    return tuple(steps)


def _by_id(graph: Graph) -> dict[TensorId, Step]:
    """The step that makes each value; they are remembered while the graph lives."""
    if graph not in _known:
        _known[graph] = {node.id: step for step in steps_of(graph) for node in step.nodes}
    return _known[graph]


_known: "WeakKeyDictionary[Graph, dict[TensorId, Step]]" = WeakKeyDictionary()
