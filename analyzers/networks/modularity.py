"""How modular a network is: communities among its units against networks alike but for what makes communities."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fmr
from analyzers.networks.activity import Gauge, Sums, check_examples, counted, first_tensor, gauges, root_mean_squares
from analyzers.networks.communities import Communities
from analyzers.networks.follow import Following
from analyzers.networks.net import Net, correlated, count_edges, net_of, pruned
from analyzers.networks.nulls import NULLS
from analyzers.networks.search import Search, compared, searched, strongest
from analyzers.prompts import prompts
from analyzers.protocol import Analyzer, AnalyzerError, check_eval, check_other
from fmr.errors import number_of, whole_number
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.runs.run import Run
from fmr.structure.normal.match import projection, weights
from fmr.sweeps.bars import hidden

DRAWN = 4000
"""How many of the strongest edges a result keeps, for its pictures."""

FEW = 0.5
"""Of the edges that there may be: with a smaller share of them, spectral clustering raises strengths by their mean."""

_CHOICES = {
    "graph": ("weights", "activations", "correlations"),
    "layers": ("all", "memories"),
    "norm": ("l1", "l2"),
    "fold": ("after", "all", "none"),
    "method": ("spectral", "louvain"),
    "rows": ("shi-malik", "ng-jordan"),
    "choose": ("q", "gap"),
}


class Modularity(Analyzer[Communities]):
    """Find communities among the units of a network, and compare them with those of networks without its order.

    >>> analyzers.Modularity(fmr.zoo.load("digits-mlp").model).run(images[:1])
    Communities of MLP (weights): 202 units in 4 groups, 8832 edges
      all edges: Q 0.0..., n-cut ..., k ...
        shuffled: Q 0.0..., z ..., p 0...; n-cut ..., z ..., p 0...
        strengths kept: Q 0.0..., z ..., p 0...; n-cut ..., z ..., p 0...
      strongest 10 % of edges: Q 0.2..., n-cut ..., k ...
        shuffled: Q 0.2..., z -..., p ...; n-cut ..., z ..., p ...
        strengths kept: Q 0..., z +..., p 0...; n-cut ..., z ..., p 0...
      20 networks of each null, the same search in all; fold after, method spectral, choose q, norm l2; seed 0

    A unit is a neuron, a channel, a memory, a channel of the residual stream: numbers that a layer reads or makes as one,
    and those that are added to or multiplied with them. What leads where is read off the traced graph: a layer that is
    called twice has units for each call.

    model: any module, in eval mode. tokenizer: where texts are given. graph: the size of an edge is, by "weights", the norm
    of the weights between two units, both directions added; by "activations", that times the root mean square of what is
    read, over positions; by "correlations", that of the two units over examples, without its sign and between all pairs.
    The latter two count data: `over(batches).result()`, or `run` on one batch; mask names the argument that is 0 on padding.
    Units that go with a third go together: correlations lie above both nulls with random weights, too; compare with those.
    layers: "all" weights, or those of the "memories" alone; scope: a glob, or several, over the module calls whose weights
    count. norm: of what lies between two units, as the numbers of a kernel. fold: which scales of
    normalisations, and learned ones, count in the weights: those directly "after" a layer, as a batch norm's; "all", also
    those before the layer that reads, as a layer norm's or a filter of each channel alone; or "none".
    method: "spectral", or "louvain", which chooses the number of communities itself; rows: of spectral clustering,
    "shi-malik" or "ng-jordan". ks: the numbers of communities to try; choose: among them that of best Q ("q") or of the
    widest gap of eigenvalues ("gap"). edges: which shares of the edges are kept, strongest first, one after the other: the
    verdict may turn with them. draws: networks of each null: with the weights of each layer shuffled, then pruned alike; and
    with the edges of the graph that was divided dealt anew, where each unit keeps its strength, the sum of its edges.

    Source: D. Filan, S. Casper, S. Hod, C. Wild, A. Critch, S. Russell, "Clusterability in neural networks", 2021.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, graph: str = "weights", layers: str = "all",
        scope: str | Sequence[str] = "*",
        norm: str = "l2", fold: str = "after", method: str = "spectral", rows: str = "shi-malik",
        ks: Sequence[int] = range(2, 11), choose: str = "q", edges: Sequence[float] = (1.0, 0.1), draws: int = 20,
        mask: str = "attention_mask",
    ) -> None:  # fmt: skip
        given = {
            "graph": graph,
            "layers": layers,
            "norm": norm,
            "fold": fold,
            "method": method,
            "rows": rows,
            "choose": choose,
        }
        for name, value in given.items():
            if value not in _CHOICES[name]:
                raise AnalyzerError(f"{name}={value!r}: expected {' or '.join(map(repr, _CHOICES[name]))}.")
        _check(ks, edges, draws)
        self.model, self.tokenizer, self.graph, self.mask = model, tokenizer, graph, mask
        self.layers, self.order, self.fold = layers, int(norm[1]), fold
        self.scope = [scope] if isinstance(scope, str) else list(scope)
        self.method, self.rows, self.choose = method, rows, choose
        self.ks, self.edges, self.draws = tuple(sorted({int(k) for k in ks})), tuple(map(float, edges)), draws
        self.found: Following | None = None
        self.sums: Sums | None = None
        self.name, self.units, self.gauges = "", np.zeros(0, np.int64), list[Gauge]()

    def run(self, inputs: Any, k: int | None = None, seed: int = 0, *, progress: bool | None = None) -> Communities:
        """Look at the network on some inputs alone, and divide its graph.

        >>> analyzers.Modularity(model, layers="memories", scope="*.h.[01].*", draws=3, edges=[1.0]).run(input_ids).groups
        ('transformer.wte', 'transformer.h.0.mlp.c_fc', 'transformer.h.1.mlp.c_fc')

        inputs: what the model is called with: a tensor, several in a tuple, named ones in a mapping, or texts where there is
        a tokenizer; of a graph of weights one example is enough. k: how many communities; None looks for the best of `ks`,
        in the network and in each null. `AnalyzerError` where no weight is found, or an op between layers is not followed.
        """
        alone = copy.copy(self)
        alone.found = alone.sums = None
        return alone.update(inputs).result(k, seed, progress=progress)

    def update(self, batch: Any) -> Modularity:
        """Trace the network on the first batch, and count what its units do on every one, where the graph is one of data.

        >>> len(analyzers.Modularity(model).update(batches[0]).net())
        4227
        """
        if self.graph != "weights":
            check_eval(self.model)
        if self.found is None:
            with torch.no_grad():
                run = _run(self.model, batch, self.tokenizer)
            self._follow(run)
        elif self.graph == "weights":
            return self
        else:
            with torch.no_grad():
                run = _run(
                    self.model, batch, self.tokenizer, keep=list({place.value: 0 for place in self.gauges}), stop=True
                )
        if self.graph != "weights":
            self._count(run, batch)
        return self

    @property
    def counted(self) -> str:
        """How many examples were counted."""
        return number_of(self.sums.examples, "example") if self.sums is not None else ""

    def merge(self, other: Modularity) -> Modularity:
        """Add what another one counted on other data, and return this one.

        >>> one, other = (analyzers.Modularity(digits, graph="correlations").update(part) for part in images.split(180))
        >>> one.merge(other).result().graph
        'correlations'
        """
        check_other(self, other)
        if self._settings() != other._settings():
            raise AnalyzerError("merge got one with other settings, expected another Modularity of the same settings.")
        if other.found is None:
            return self
        if self.found is None:
            self.found, self.name, self.units, self.gauges = other.found, other.name, other.units, other.gauges
            self.sums = copy.copy(other.sums)
        elif _places(self) != _places(other):
            raise AnalyzerError("merge of networks whose values lie elsewhere. Expected one model, on inputs of one kind.")
        elif self.sums is not None and other.sums is not None:
            self.sums.add(other.sums)
        return self

    def net(self) -> Net:
        """The network as a graph of units, of what was seen so far.

        >>> analyzers.Modularity(model).update(input_ids).net().adjacency().shape
        (4227, 4227)
        """
        if self.found is None:
            raise AnalyzerError("No inputs have been seen yet. Call update(batch), over(batches) or run(inputs).")
        if self.sums is None:
            return net_of(self.found, self.order)[0]
        if self.graph == "activations":
            return net_of(self.found, self.order, root_mean_squares(self.found, self.gauges, self.sums))[0]
        return correlated(net_of(self.found, self.order)[0], self.sums.correlations())

    def result(self, k: int | None = None, seed: int = 0, *, progress: bool | None = None) -> Communities:
        """Divide the graph of what was seen, and those of its nulls; k, seed as for `run`.

        >>> analyzers.Modularity(digits, graph="activations").over(images.split(180)).result(k=3).k
        array([3, 3])
        """
        net, order = self.net().in_order()
        assert self.found is not None
        if not any(block.weights.any() for block in net.blocks):
            raise AnalyzerError(
                f"No two units of {self.name} go together on these inputs. Give several examples that differ."
            )
        search = self._search(k, len(net), seed)
        founds, nulls, graphs = [], [], [pruned(net.adjacency(), share) for share in self.edges]
        with tqdm(total=len(graphs) * len(NULLS), desc="Modularity", unit="null", disable=hidden(progress)) as bar:
            for share, graph in zip(self.edges, graphs, strict=True):
                mine = search._replace(raised=count_edges(graph) < FEW * net.room())
                founds.append(searched(graph, mine))
                for kind in NULLS:
                    nulls.append(compared(net, share, founds[-1], mine, kind, self.draws))
                    bar.update()
        shape = len(graphs), len(NULLS), self.draws
        ends, sizes = strongest(graphs[0], DRAWN)
        return Communities(
            model=self.name,
            graph=self.graph,
            groups=net.groups,
            group=net.group[order],
            place=net.place[order],
            labels=founds[0].labels[order],
            shares=self.edges,
            kinds=tuple(NULLS),
            q=np.array([found.division.q for found in founds]),
            k=np.array([found.division.k for found in founds]),
            ncut=np.array([found.division.ncut for found in founds]),
            null_q=np.array([null.q for null in nulls]).reshape(shape),
            null_k=np.array([null.k for null in nulls]).reshape(shape),
            null_ncut=np.array([null.ncut for null in nulls]).reshape(shape),
            drift=np.array([null.drift for null in nulls]).reshape(shape[:2]).max(0),
            edges=np.array([count_edges(graph) for graph in graphs]),
            ends=np.argsort(order)[ends],
            sizes=sizes,
            mixing=tuple(map(str, self.found.mixing)),
            settings={**self._settings(), "choose": self.choose if k is None else f"k={k}"},
            seed=seed,
        )

    def _follow(self, run: Run) -> None:
        """Read the network off a run."""
        graph = run.graph.unfused
        chosen = self._of_memories(run) if self.layers == "memories" else None

        def weighed(node: Node) -> bool:
            if not any(fnmatchcase(node.module, scope) for scope in self.scope):
                return False
            found = projection(graph, node)
            return chosen is None or (found is not None and not chosen.isdisjoint(weights(graph, found.weight)))

        found = Following(graph, run.__getitem__, weighed, self.order, self.fold)
        net, roots = net_of(found, self.order)
        if not any(block.weights.any() for block in net.blocks):
            if found.lost:
                lost = next(iter(found.lost.values()))
                raise AnalyzerError(f"{run.graph.model} has no weights between units but in what {found.told(lost)}")
            modules = ", ".join(repr(scope.path) for scope in run.graph.scopes[1:5])
            raise AnalyzerError(
                f"{run.graph.model} has no weights between units in scope={self.scope}, so there is no graph to divide. "
                f"Expected a glob over the calls of modules with weights, such as {modules or 'those of linear layers'}."
            )
        self.found, self.name, self.units, self.gauges = found, run.graph.model, roots, gauges(found, roots)

    def _count(self, run: Run, batch: Any) -> None:
        """Count what units do in a run."""
        inputs = prompts(batch, self.model, self.tokenizer).inputs if _is_text(batch) else batch
        given = first_tensor(inputs)
        check_examples(self.gauges, run.__getitem__, given)
        assert given is not None
        real = inputs.get(self.mask) if isinstance(inputs, Mapping) else None
        assert self.found is not None
        routed = next((edges.node for edges in self.found.edges if edges.laid is None), None)
        if routed is not None:
            raise AnalyzerError(
                f"{routed} sends rows to experts, so that units are not there for every example. Expected graph='weights'."
            )
        pairs = self.graph == "correlations"
        sums = counted(self.gauges, run.__getitem__, len(self.units), len(given), _mask(real), pairs=pairs)
        if self.sums is None:
            self.sums = sums
        else:
            self.sums.add(sums)

    def _of_memories(self, run: Run) -> set[TensorId]:
        """The parameters of all memories that are located."""
        structure = fmr.locate(run)
        if not structure.mlps:
            raise AnalyzerError(
                f"{run.graph.model} has no feed-forward memories that could be certified. Expected layers='all', or a model "
                f"in eval mode: fmr.locate(run) says what was rejected and why."
            )
        graph = structure.mlps[0].graph
        named = {name for one in structure.mlps for name in (one.keys, one.values, one.w_in, one.w_gate, one.w_out)}
        return {name for given in named if given is not None for name in (weights(graph, given) or (given,))}

    def _search(self, k: int | None, units: int, seed: int) -> Search:
        if k is not None and self.method == "louvain":
            raise AnalyzerError(f"k={k!r} with method='louvain', which chooses the number itself. Use method='spectral'.")
        if k is not None and not (isinstance(k, int) and 1 <= k < units):
            raise AnalyzerError(f"k={k!r} of {units} units: expected 1 to {units - 1}, or None for the best of {self.ks}.")
        return Search(self.method, self.rows, self.ks if k is None else (k,), self.choose, seed)

    def _settings(self) -> dict[str, Any]:
        names = "graph layers scope fold method rows choose draws".split()
        return {name: getattr(self, name) for name in names} | {"norm": f"l{self.order}", "ks": list(self.ks)}


def _places(one: Modularity) -> list[tuple[str, int]]:
    return [(str(place.value), len(place.units)) for place in one.gauges]


def _check(ks: Sequence[int], edges: Sequence[float], draws: int) -> None:
    if not len(ks) or any(int(k) != k or k < 1 for k in ks):
        raise AnalyzerError(f"ks={list(ks)}: expected numbers of communities from 1, such as range(2, 11).")
    if not len(edges) or any(not 0 < share <= 1 for share in edges):
        raise AnalyzerError(f"edges={list(edges)}: expected shares of the edges above 0 and up to 1, such as [1.0, 0.1].")
    if whole_number(draws) is None or draws < 0:
        raise AnalyzerError(f"draws={draws!r}: expected a number of networks from 0; p is at least 1 / (1 + draws).")


def _is_text(inputs: Any) -> bool:
    return isinstance(inputs, str) or (isinstance(inputs, (list, tuple)) and bool(inputs) and isinstance(inputs[0], str))


def _mask(given: Any) -> Tensor | None:
    return None if given is None else torch.as_tensor(given).cpu() != 0


def _run(model: nn.Module, inputs: Any, tokenizer: Any, **how: Any) -> Run:
    """A run of the model on inputs of any kind."""
    if _is_text(inputs):
        return fmr.run(model, **how, **prompts(inputs, model, tokenizer).inputs)
    if isinstance(inputs, Mapping):
        return fmr.run(model, **how, **inputs)
    if isinstance(inputs, Tensor):
        return fmr.run(model, inputs, **how)
    if isinstance(inputs, tuple):
        return fmr.run(model, *inputs, **how)
    raise AnalyzerError(
        f"inputs is {type(inputs).__name__}, expected what the model is called with: a tensor, several in a tuple, named "
        f"ones in a mapping, or texts with a tokenizer."
    )
