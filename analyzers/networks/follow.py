"""A traced pass followed unit by unit: which number of each value belongs to which unit, and which weights lead where.

Every value gets a tensor of its shape that holds the unit of each number, 0 for none. Ops that move numbers are run again on
it; sums and products of activations make one unit of two; a projection makes new ones, and edges from those that it reads.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from analyzers.networks.known import Edges, Known
from analyzers.networks.layout import Laid, laid_out, spread, spread_rows
from analyzers.networks.positions import pooled, reduced, summed_along
from analyzers.networks.scales import OVER_UNITS, norm_scale
from analyzers.networks.tags import is_free, is_gate, level, narrowed, united
from analyzers.networks.units import Units
from analyzers.protocol import AnalyzerError
from fmr.errors import FmrError
from fmr.graph.execute import overwritten
from fmr.graph.graph import Graph
from fmr.ids import ALIAS, RESULT, TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import subscripts_of
from fmr.structure.normal.match import Contraction, Projection, contraction, is_constant, projection, value_number, weights
from fmr.structure.normal.vocabulary import ELEMENTWISE, MOVES, NORMS, STATISTICS
from fmr.structure.proof.evaluate import in_double, plain

_BY_NUMBER = (ELEMENTWISE | frozenset("softmax log_softmax softmin dropout1d dropout2d dropout3d".split())) - {"glu"}
_REDUCING = STATISTICS | frozenset("sum mean amax amin max min prod logsumexp median".split())
_WINDOWS = tuple("avg_pool max_pool lp_pool interpolate upsample".split())
_ADDING = frozenset("index_add scatter_add".split())
_SCALING = frozenset("mul div".split())


class Following:
    """A graph followed from its inputs to its end.

    value: gives recorded values; weighed: which projections give edges; order: of the norm over what a kernel holds; fold:
    which scales count in the weights, as `Modularity` has it. `edges` is what was found, `known` the units
    of each value, `mixing` the projections that weigh positions and leave units alone.
    """

    def __init__(
        self, graph: Graph, value: Callable[[TensorId], Tensor], weighed: Callable[[Node], bool], order: int, fold: str
    ) -> None:
        self.graph, self.value, self.weighed, self.order, self.fold = graph, value, weighed, order, fold
        self.units = Units()
        self.edges: list[Edges] = []
        self.known: dict[str, Known] = {}
        self.lost: dict[str, TensorId] = {}
        self.mixing: list[TensorId] = []
        with torch.no_grad():
            for node in graph.nodes:
                self._read(node)

    # ---- one node

    def _read(self, node: Node) -> None:
        """Take in what one op makes of the units of what it reads."""
        if not node.dtype.is_floating_point or is_constant(self.graph, node.id):
            return
        first = value_number(self.graph, node.id)
        if first != node.id:
            self._same(node, first)
            return
        try:
            found = self._made(node)
        except (FmrError, RuntimeError, TypeError, KeyError, IndexError, ValueError) as error:
            if isinstance(error, AnalyzerError):
                raise
            found = None
        if found is not None and tuple(found.units.shape) == node.shape:
            self.known[node.id] = found
        else:
            blamed = (self.lost[parent] for parent in node.parents if parent in self.lost)
            self.lost[node.id] = next(blamed, node.id)

    def _same(self, node: Node, first: TensorId) -> None:
        """What is computed again is what it was, and gives no second edges."""
        if first in self.known:
            self.known[node.id] = self.known[first]._replace(fresh=())
        elif first in self.lost:
            self.lost[node.id] = self.lost[first]

    def _made(self, node: Node) -> Known | None:
        """The units of what a node makes; None where they cannot be told."""
        read = [self.known[parent.id] for parent in node.parents if parent.id in self.known]
        if node.op == "input" or (node.op == "to" and not self._is_number(node.parents[0].id)):
            return self._given(node)
        if node.op == "embedding":
            units = torch.as_tensor(self.units.new(node.shape[-1], _named(node))).double()
            return Known(units.expand(node.shape))
        found = projection(self.graph, node)
        if found is not None:
            return self._projected(node, found)
        both = contraction(node)
        if both is not None:
            return self._multiplied(node, both)
        if not read:
            return None
        if node.op in _ADDING:
            return self._added(node)
        if node.op in MOVES or node.op == ALIAS:
            return self._moved(node, read)
        if node.op in NORMS:
            return self._normed(node)
        if node.op == "glu":
            halves = read[0].units.chunk(2, int(node.argument("dim", 1, -1)))
            return self._together(node, [Known(halves[0]), Known(halves[1])])
        if node.op in _REDUCING and (node.op in STATISTICS or len(node.parents) == 1):
            return reduced(self.units, node, read[0])
        if any(part in node.op for part in _WINDOWS):
            return pooled(self.units, node, read[0])
        if node.op in _BY_NUMBER:
            return self._elementwise(node, read)
        if node.op in ("cumsum", "cumprod"):
            return summed_along(self.units, node, read[0])
        return None

    def _is_number(self, name: TensorId) -> bool:
        return self.graph[name].dtype.is_floating_point

    def _given(self, node: Node) -> Known:
        """Each number of an input is free, until a layer reads it together with others."""
        count = int(np.prod(node.shape))
        units = self.units.new(count, "input" if node.op == "input" else str(node.id), free=True)
        return Known(torch.as_tensor(units).double().reshape(node.shape))

    # ---- ops that move numbers or work number by number

    def _moved(self, node: Node, read: list[Known]) -> Known:
        """The same op on the units, and on the scales between them and the value."""
        if node.op == RESULT:
            return self.known[node.parents[0].id]
        fresh = read[0].fresh if len(read) == 1 and self._alone(node) else ()
        units = self._run(node, lambda known, like: known.units if known else torch.zeros(()).double().expand(like))
        if all(known.gain is None for known in read):
            return Known(units, None, fresh)
        gain = self._run(node, lambda known, like: known.gain if known and known.gain is not None else _ones(like))
        return Known(units, gain, fresh)

    def _run(self, node: Node, given: Callable[[Known | None, tuple[int, ...]], Tensor]) -> Tensor:
        """An op on what stands for its operands; what is no amount, as an index, is what it was."""
        tensors = {}
        for parent in node.parents:
            here = self.graph[parent.id]
            number = here.dtype.is_floating_point
            tensors[parent.id] = given(self.known.get(parent.id), here.shape) if number else self.value(parent.id)
        if node.op == ALIAS:
            return overwritten(self.graph.__getitem__, node, tensors, in_double)
        return in_double(node, tensors)

    def _alone(self, node: Node) -> bool:
        """Whether nothing else reads what a node reads."""
        return all(len(self.graph.readers(parent.id)) == 1 for parent in node.parents if parent.id in self.known)

    def _added(self, node: Node) -> Known:
        """Rows added at places: each place is one unit with what comes there."""
        base, index, source, *_ = node.parents
        dim, where = int(node.argument("dim", 1)), self.value(index.id)
        placed, rows = torch.zeros(node.shape).double(), self.known[source.id].units
        placed = placed.index_copy(dim, where, rows) if node.op == "index_add" else placed.scatter(dim, where, rows)
        first = [self.known[base.id]] if base.id in self.known else []
        return self._together(node, [*first, Known(placed)])

    def _elementwise(self, node: Node, read: list[Known]) -> Known | None:
        """Number by number: activations that meet are one unit, and a constant scales."""
        lost = any(parent.id in self.lost for parent in node.parents)
        if lost and all(is_free(self.units, known.units) for known in read):
            return None
        if lost and node.op in _SCALING:  # a scale that the data give, as a norm's
            read = [known._replace(gain=None, fresh=()) for known in read]
        if len(read) == 1 and node.op in _SCALING and self.fold != "none":
            scale = next((self.value(parent.id) for parent in node.parents if is_constant(self.graph, parent.id)), None)
            if scale is not None:
                over = node.op == "div"
                if over and node.parents[0].id not in self.known:
                    return Known(read[0].units.expand(node.shape))
                size = plain(scale).detach().double().abs().cpu()
                return self._scaled(node, read[0], 1 / size.clamp_min(1e-30) if over else size)
        if len(read) == 1 and node.op in ("add", "sub") and self._alone(node) and not lost:
            known = read[0]
            gain = known.gain.expand(node.shape) if known.gain is not None else None
            return Known(known.units.expand(node.shape), gain, known.fresh)
        return self._together(node, read)

    def _scaled(self, node: Node, known: Known, scale: Tensor) -> Known:
        """A learned scale: of the edges that made the units, where nothing else reads those, else of what reads them."""
        units = known.units.expand(node.shape)
        if known.fresh and known.gain is None and self._alone(node) and scale.dim() <= units.dim():
            self._fold(known.fresh, units, scale.expand(node.shape))
            return Known(units, None, known.fresh)
        if self.fold != "all":
            return Known(units)
        gain = scale.expand(node.shape) if known.gain is None else known.gain.expand(node.shape) * scale
        return Known(units, gain)

    def _fold(self, fresh: Iterable[int], units: Tensor, scale: Tensor) -> None:
        """Scale the edges to some units."""
        units, scale = narrowed(units, scale)
        places, first = np.unique(units.long().numpy().ravel(), return_index=True)
        sizes = scale.numpy().ravel()[first]
        for number in fresh:
            edges = self.edges[number]
            at = np.minimum(np.searchsorted(places, edges.targets), len(places) - 1)
            edges.weights = edges.weights * np.where(places[at] == edges.targets, sizes[at], 1.0)[:, None]

    def _together(self, node: Node, read: list[Known]) -> Known:
        """Values that meet number by number; one that is repeated along the units of another only weighs it."""
        read = [one for one in read if not any(is_gate(self.units, one.units, two.units) for two in read if two is not one)]
        wide = [known.units.expand(node.shape) for known in read]
        units, joined = wide[0], False
        for other in wide[1:]:
            units, new = united(self.units, units, other)
            joined = joined or new
        gains = [known.gain for known in read if known.gain is not None]
        keeps = gains and not (joined and node.op in ("add", "sub"))
        return Known(units, gains[0].expand(node.shape) if keeps else None)

    # ---- normalisations

    def _normed(self, node: Node) -> Known:
        """A normalisation leaves the units alone and scales each."""
        known = self.known[node.parents[0].id]
        if node.op in OVER_UNITS:
            known = known._replace(gain=None)
        scale = norm_scale(node, self.value) if self.fold != "none" else None
        return Known(known.units, known.gain) if scale is None else self._scaled(node, known, scale)

    # ---- products

    def _multiplied(self, node: Node, found: Contraction) -> Known | None:
        """A product of two activations: what it does not sum over goes on, as the values do that a pattern weighs."""
        word = subscripts_of(self.graph, found)
        if len(word.result) != len(node.shape):
            return None
        kept = []
        for name, letters in ((found.left, word.left), (found.right, word.right)):
            known = self.known.get(name)
            if known is None or is_free(self.units, known.units):
                continue
            dims = tuple(n for n, letter in enumerate(letters) if letter in word.contracted)
            units = level(self.units, known.units, dims, unite=False)
            if units is not None:
                gain = None if known.gain is None else known.gain.mean(dims, keepdim=True)
                kept.append((letters, units, gain))
        if len(kept) != 1:
            return None
        letters, units, gain = kept[0]
        gains = None if gain is None else spread(gain, letters, word.result, node.shape)
        return Known(spread(units, letters, word.result, node.shape), gains)

    def _projected(self, node: Node, found: Projection) -> Known | None:
        """A projection: new units, with edges from those that it reads."""
        if not is_constant(self.graph, found.weight):  # matrices that the data choose, one for each row
            self._refuse(node, found.weight)
            return None
        if node.op == "grouped_mm":
            return self._routed(node, found)
        laid = laid_out(self.graph, node, found, plain(self.value(found.weight)))
        known = self.known.get(found.data)
        if laid is None:
            self._refuse(node, node.id)
            return None
        groups, many, wide = laid.shape
        if known is None:
            if found.data in self.lost:
                self._refuse(node, self.lost[found.data])
            columns = torch.zeros(groups, wide).double()
        else:
            rows = laid.rows(known.units)
            flat = level(self.units, rows, (0,))
            if flat is None:
                return self._mixed(node, laid, known, rows)
            columns = flat[0]
        gain = laid.rows(known.gain).mean(0) if known is not None and known.gain is not None else _ones((groups, wide))
        if laid.apart:
            sizes = (
                laid.made((laid.weights(self.order) * gain[:, None]).reshape(-1), node.shape) if self.fold == "all" else None
            )
            return Known(laid.made(columns.reshape(-1), node.shape), sizes)
        if laid.windowed:
            targets = self.units.new(groups * many, _named(node)).reshape(groups, many)
        else:
            targets = np.stack([self.units.new(many, _named(node)) for _ in range(groups)])
        fresh: tuple[int, ...] = ()
        if self.weighed(node):
            fresh = tuple(range(len(self.edges), len(self.edges) + groups))
            self.units.settle(columns.long().numpy().ravel())
            matrices = laid.weights(self.order).numpy()
            for n in range(groups):
                sources, scales = columns[n].long().numpy(), gain[n].numpy()
                edges = Edges(node.id, found.data, _named(node), targets[n], sources, matrices[n], scales, laid, n)
                self.edges.append(edges)
        return Known(laid.made(torch.as_tensor(targets).double().reshape(-1), node.shape), None, fresh)

    def _routed(self, node: Node, found: Projection) -> Known | None:
        """Rows that are sent to experts: each has units of its own; one that no row was sent to has none."""
        known, ends = self.known.get(found.data), node.parent("offs", 2)
        matrices = plain(self.value(found.weight)).detach()
        if known is None or ends is None or matrices.dim() != 3:
            self._refuse(node, self.lost.get(found.data, node.id))
            return None
        units, first, start = torch.zeros(node.shape).double(), len(self.edges), 0
        for expert, end in enumerate(self.value(ends.id).tolist()):
            if end > start:
                flat = level(self.units, known.units[start:end], (0,))
                if flat is None:
                    self._refuse(node, node.id)
                    return None
                targets, sources = self.units.new(matrices.shape[2], _named(node)), flat[0].long().numpy()
                units[start:end] = torch.as_tensor(targets).double()
                if self.weighed(node):
                    self.units.settle(sources)
                    gain = (known.gain[start:end].mean(0) if known.gain is not None else _ones(flat[0].shape)).numpy()
                    sizes = matrices[expert].double().abs().T.cpu().numpy()
                    self.edges.append(Edges(node.id, found.data, _named(node), targets, sources, sizes, gain, None, expert))
            start = end
        return Known(units, None, tuple(range(first, len(self.edges))))

    def _mixed(self, node: Node, laid: Laid, known: Known, rows: Tensor) -> Known | None:
        """A projection over positions, each row of one unit: it leaves the units alone."""
        units = level(self.units, rows, (2,), unite=False)
        if units is None or laid.windowed:
            self._refuse(node, node.id)
            return None
        self.mixing.append(node.id)
        full = spread_rows(laid, known.units, units, node)
        return Known(full) if full is not None else None

    def _refuse(self, node: Node, blamed: TensorId) -> None:
        """Raise where edges are wanted of a projection of which it is not known what it reads."""
        if self.weighed(node):
            raise AnalyzerError(
                f"{node.id} reads what {self.told(blamed)} To leave this layer out, give scope=, a glob over the module "
                "calls whose weights count."
            )

    def told(self, name: TensorId) -> str:
        """What made a value whose units are lost, and what was expected instead."""
        made = f"{name} ({self.graph[name].op}) made, in which units cannot be followed"
        if any(weights(self.graph, parent.id) for parent in self.graph[name].parents):
            return (
                f"{made}: it reads its weights inside one op. Expected the layer written out, as linear layers and ops that "
                "work number by number."
            )
        return f"{made}. Expected ops between layers that move numbers or work number by number."


def _ones(shape: Iterable[int]) -> Tensor:
    return torch.ones(()).double().expand(tuple(shape))


def _named(node: Node) -> str:
    """What a layer is called: the module call that it ran in, else the op."""
    return node.module or str(node.id)
