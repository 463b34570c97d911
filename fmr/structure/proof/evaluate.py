"""Recomputing a part of a graph from its values, in double precision: what every certificate rests on."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from fmr.errors import StructureError, TrackError
from fmr.graph.execute import execute, overwritten
from fmr.graph.graph import Graph
from fmr.graph.places import check_place
from fmr.ids import ALIAS, Site, TensorId
from fmr.nests import replaced
from fmr.nodes import Node
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.normal.einsum import of_projection
from fmr.structure.normal.match import Projection, between, projection, strip_views
from fmr.watching.calls import unwatched

Values = Callable[[TensorId], Tensor]
"""Gives the recorded value of an ID: a run, or anything that reads like one."""


class Doubles:
    """The values of a run as one certificate reads them: each is read, and brought to another precision, once."""

    def __init__(self, value: Values) -> None:
        self._value = value
        self._known: dict[tuple[TensorId, str], Tensor] = {}

    def __call__(self, name: TensorId) -> Tensor:
        return self._once(name, "recorded", lambda: self._value(name))

    def double(self, name: TensorId) -> Tensor:
        """A value in double precision."""
        return self._once(name, "double", lambda: double(self(name)))

    def single(self, name: TensorId) -> Tensor:
        """A value in its own precision, single at least."""
        return self._once(name, "single", lambda: single(self(name)))

    def _once(self, name: TensorId, precision: str, read: Callable[[], Tensor]) -> Tensor:
        if (name, precision) not in self._known:
            self._known[name, precision] = read()
        return self._known[name, precision]


def evaluate(graph: Graph, target: TensorId, given: Mapping[TensorId, Tensor], value: Values) -> Tensor:
    """The value of `target` when some of the values that it depends on are given anew.

    What does not depend on a given value is taken as it was recorded, and so are choices, which rounding may tip: places
    of the largest, of what is sorted, and which of two values in half precision is larger. Everything is computed in
    float64 but what projections make, which is computed in the precision of their weights, float32 at least: so that no
    weight is copied.
    """
    first, read = min(given, key=graph.place), value if isinstance(value, Doubles) else Doubles(value)
    known = {name: double(tensor) for name, tensor in given.items()}
    for node in between(graph, first, target, lambda node: node.id not in given):
        if node.id not in known and not is_choice(graph, node) and any(parent in known for parent in node.parents):
            found = projection(graph, node)
            if found is not None and found.weight not in known and node.dtype.is_floating_point:
                known[node.id] = _projected(node, found, known, read)
                continue
            tensors = {p.id: known[p.id] if p.id in known else read.double(p.id) for p in node.parents}
            known[node.id] = made_again(graph, node, tensors)
    if target not in known:
        raise StructureError(f"{target} does not depend on any of {', '.join(given)}.")
    return known[target]


def is_choice(graph: Graph, node: Node) -> bool:
    """Whether a value says where another one is, or which of two that are rounded coarsely is larger."""
    halves = (torch.float16, torch.bfloat16)
    compared = len(node.parents) > 1 and all(graph[name].dtype in halves for name in node.parents)
    return node.dtype == torch.int64 or (node.dtype == torch.bool and compared)


def evaluate_each(
    graph: Graph,
    target: TensorId,
    name: TensorId,
    several: Tensor,
    value: Values,
    held: Mapping[TensorId, Tensor] = MappingProxyType({}),
) -> Tensor:
    """The values of `target` when another value is given anew in several ways, which lie one behind the other, and some are
    `held`."""

    def again(one: Tensor) -> Tensor:
        return evaluate(graph, target, {name: one, **held}, value)

    try:
        return torch.vmap(again)(several) if len(several) > 1 else again(several[0]).unsqueeze(0)
    except RuntimeError:  # of an op on the way torch does not know what it makes of several
        return torch.stack([again(one) for one in several])


def at_zero(graph: Graph, target: TensorId, name: TensorId, value: Values) -> Tensor:
    """The value of `target` when another one is zero: what projects that has nothing to sum up, whatever its weights are."""
    read = value if isinstance(value, Doubles) else Doubles(value)
    given = {name: torch.zeros_like(read.single(name))}
    for node in between(graph, name, target):
        found = projection(graph, node) if node.op in _MATRICES else None
        own = found is not None and name in (found.data, strip_views(graph, found.data))
        if found is not None and own and type(weight := read.single(found.weight)) is Tensor:  # others may not be cut
            words = of_projection(graph, found)
            tensors = {p.id: read.single(p.id) for p in node.parents if p.id != found.data}
            tensors[found.data] = weight.new_zeros(()).expand(read(found.data).shape)
            for one, word in ((found.data, words.left), (found.weight, words.right)):
                tensors[one] = tensors[one][tuple(slice(0 if letter in words.contracted else None) for letter in word)]
            given[node.id] = in_double(node, tensors)
    return evaluate(graph, target, given, read)


_MATRICES = frozenset("linear matmul mm addmm".split())
"""Projections that sum over nothing where there is nothing."""


def _projected(node: Node, found: Projection, known: Mapping[TensorId, Tensor], read: Doubles) -> Tensor:
    """What a projection makes, computed in the precision of its weight, single at least."""
    tensors = {p.id: known[p.id] if p.id in known else read.single(p.id) for p in node.parents}
    kind = tensors[found.weight].dtype
    return double(in_double(node, {name: one.to(kind) if one.is_floating_point() else one for name, one in tensors.items()}))


def in_double(node: Node, tensors: Mapping[TensorId, Tensor]) -> Tensor:
    """Run the op of a node again in double precision, whatever it was cast to; dropout hands its input on."""
    read = [tensors[parent.id] for parent in node.parents]
    match node.op:
        case "dropout":
            return read[0]
        case "to":
            return read[0].to(_widened(node.dtype))
        case "copy" if len(read) == 2:
            return read[1].expand_as(read[0])
        case "grouped_mm" if len(read) == 3:
            return _grouped(*read)
    gone = ("dtype", "out") if node.dtype.is_floating_point else ("out",)
    args = {at: replaced(arg, torch.dtype, _widened) for at, arg in node.args.items() if at not in gone}
    if node.op == "rms_norm" and node.argument("eps", 3) is None:  # the smallest step of the numbers that it was given
        eps = torch.finfo(torch.promote_types(node.dtype, torch.float32)).eps
        args = {at: arg for at, arg in args.items() if at != "3"} | {"eps": eps}
    parents = tuple(parent for parent in node.parents if parent.at.partition(".")[0] != "out")
    return execute(node._replace(args=args, parents=parents), tensors)


def made_again(graph: Graph, node: Node, tensors: Mapping[TensorId, Tensor]) -> Tensor:
    """What a node holds, computed again in double precision, also where its storage was written over."""
    return overwritten(graph.__getitem__, node, tensors, in_double) if node.op == ALIAS else in_double(node, tensors)


def _widened(dtype: torch.dtype) -> torch.dtype:
    """The type of double precision for a type."""
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype


def _grouped(rows: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """The product of each group of rows with its own matrix; `offs` are the ends of the groups."""
    ends = offs.tolist()
    parts = [rows[start:end] @ matrix for start, end, matrix in zip([0, *ends], ends, matrices, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], matrices.shape[-1])])


def plain(tensor: Tensor) -> Tensor:
    """A tensor in numbers: a quantised one, torch's or of a class of its own that says what it means, is written out."""
    quantised = tensor.is_quantized or type(tensor).dequantize is not Tensor.dequantize
    return tensor.dequantize() if quantised else tensor


def double(tensor: Tensor) -> Tensor:
    """A tensor in numbers of double precision, apart from its history; whole numbers and truth values as they are."""
    numbers = plain(tensor).detach()
    return numbers.to(_widened(numbers.dtype))


def single(tensor: Tensor) -> Tensor:
    """A tensor in numbers of its own precision, single at least, apart from its history; no copy where it has that."""
    numbers = plain(tensor).detach()
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32)) if numbers.is_floating_point() else numbers


@contextmanager
def own_work() -> Iterator[None]:
    """Compute inside the block as torch does by itself, whatever modes and default device are on around it."""
    with unwatched(), _disable_current_modes():
        yield


def why_unproving(names: Iterable[TensorId], value: Values) -> str:
    """Which of some values has no finite number, so that comparing it proves nothing; empty where all have some."""
    for name in names:
        numbers = plain(value(name))
        if not numbers.numel():
            return f"{name} has no numbers, {list(numbers.shape)}, that prove anything"
        if not any(bool(torch.isfinite(some).any()) for some in (numbers[(0,) * numbers.dim()], numbers)):
            every = "NaN" if bool(numbers.isnan().all()) else "NaN or infinite"
            return f"the values of {name} are all {every}, which proves nothing"
    return ""


def why_without_numbers(run: Run | Pass) -> str:
    """Why nothing can be recomputed in a run: its values have shapes alone; empty where they have numbers."""
    if any(node.device.type == "meta" for node in run.graph.nodes if not node.id.is_source):
        return "the run was on the meta device, where values have no numbers"
    kept = run.passes[-1].kept if isinstance(run, Run) else run.kept
    if any(isinstance(run[name], FakeTensor) for name in kept[-1:]):
        return "the run was in fake tensor mode, where values have no numbers"
    return ""


def check_run(run: Any) -> None:
    """Raise for what is neither a run nor a pass of one."""
    if not isinstance(run, (Run, Pass)):
        raise StructureError(f"Got {type(run).__name__}, expected a run or one of its passes, as fmr.run(model, *inputs).")


def check_places(run: Run | Pass, sites: Iterable[Site]) -> None:
    """Raise where a pass makes the value of a site in another place than where the site was found."""
    one = run.last if isinstance(run, Run) else run
    for site in sites:
        check_place(site, one.places, one._graph)


def graph_of(run: Run | Pass, graph: Graph) -> Graph:
    """The graph to recompute a run in: its own, whose shapes are those of its values, where it recorded one."""
    check_run(run)
    try:
        own = run.graph.unfused
    except TrackError:
        return graph
    if nothing := why_without_numbers(run):
        raise StructureError(f"Nothing can be recomputed: {nothing}. Expected a run with real tensors.")
    return own
