"""How modular a network is: communities among its units, by weights, against networks alike but for their order."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fmr
from analyzers.networks.communities import Communities
from analyzers.networks.follow import Following
from analyzers.networks.net import Net, net_of
from analyzers.networks.nulls import NULLS
from analyzers.networks.search import Search, compared, searched, strongest
from analyzers.prompts import prompts
from analyzers.protocol import AnalyzerError
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.runs.run import Run
from fmr.structure.normal.match import projection, weights
from fmr.sweeps.bars import hidden

DRAWN = 4000
"""How many of the strongest edges a result keeps, for its pictures."""

_CHOICES = {
    "layers": ("all", "memories"),
    "norm": ("l1", "l2"),
    "method": ("spectral", "louvain"),
    "rows": ("shi-malik", "ng-jordan"),
    "choose": ("q", "gap"),
}


class Modularity:
    """Find communities among the units of a network, and compare them with those of networks without its order.

    >>> analyzers.Modularity(model, layers="memories", scope="*.h.[01].*").run(input_ids)

    model: any module, in eval mode. layers: "all" weights, or those of the "memories" alone; scope: a glob over the module
    calls whose weights count. norm: of what lies between two units, as the numbers of a kernel: "l1" or "l2". fold: whether
    scales of normalisations (of batch, layer) and learned scales count in the weights. method: "spectral", or "louvain",
    which chooses the number of communities itself; rows: of spectral clustering, "shi-malik" or "ng-jordan". ks: the numbers
    of communities that are tried; choose: among them the one of best Q ("q") or of the widest gap of eigenvalues ("gap").
    edges: which shares of the edges are kept, strongest first, one after the other; the verdict may turn with them. draws:
    networks of each null: weights dealt anew within layers, and dealt anew with the strength of each unit kept in each layer.

    A unit is a neuron, a channel, a memory, a channel of the residual stream: numbers that a layer reads or makes as one, and
    those that are added to or multiplied with them. The size of an edge is the norm of the weights between two units, both
    directions added. What leads where is read off the traced graph: layers called twice give units for each call.

    Source: D. Filan, S. Casper, S. Hod, C. Wild, A. Critch, S. Russell, "Clusterability in neural networks", 2021.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, layers: str = "all", scope: str = "*", norm: str = "l2",
        fold: bool = True, method: str = "spectral", rows: str = "shi-malik", ks: Sequence[int] = range(2, 11),
        choose: str = "q", edges: Sequence[float] = (1.0, 0.1), draws: int = 20,
    ) -> None:  # fmt: skip
        given = {"layers": layers, "norm": norm, "method": method, "rows": rows, "choose": choose}
        for name, value in given.items():
            if value not in _CHOICES[name]:
                raise AnalyzerError(f"{name}={value!r}: expected {' or '.join(map(repr, _CHOICES[name]))}.")
        _check(ks, edges, draws)
        self.model, self.tokenizer, self.scope, self.fold = model, tokenizer, scope, fold
        self.layers, self.order, self.draws = layers, int(norm[1]), draws
        self.method, self.rows, self.choose = method, rows, choose
        self.ks, self.edges = tuple(sorted({int(k) for k in ks})), tuple(float(share) for share in edges)

    def run(self, inputs: Any, k: int | None = None, seed: int = 0, *, progress: bool | None = None) -> Communities:
        """Trace the network on some inputs, and divide its graph.

        >>> analyzers.Modularity(model, draws=3, edges=[1.0], layers="memories").run(input_ids).q.shape
        (1,)

        inputs: what the model is called with: a tensor, several in a tuple, named ones in a mapping, or texts where there is
        a tokenizer. Numbers of activations do not count, so one example is enough. k: how many communities; None looks for
        the best of `ks`, in the network and in each null. `AnalyzerError` where no weight is found, or an op between two
        layers cannot be followed.
        """
        net, run, mixing = self.net(inputs)
        search = self._search(k, len(net), seed)
        founds, nulls, nets = [], [], [net.pruned(share) for share in self.edges]
        with tqdm(total=len(nets) * len(NULLS), desc="Modularity", unit="null", disable=hidden(progress)) as bar:
            for pruned in nets:
                founds.append(searched(pruned, search))
                for kind in NULLS:
                    nulls.append(compared(pruned, founds[-1], search, kind, self.draws))
                    bar.update()
        shape = len(nets), len(NULLS), self.draws
        ends, sizes = strongest(nets[0], DRAWN)
        return Communities(
            model=run.graph.model,
            graph="weights",
            groups=net.groups,
            group=net.group,
            place=net.place,
            labels=founds[0].labels,
            shares=self.edges,
            kinds=tuple(NULLS),
            q=np.array([found.division.q for found in founds]),
            k=np.array([found.division.k for found in founds]),
            ncut=np.array([found.division.ncut for found in founds]),
            null_q=np.array([null.q for null in nulls]).reshape(shape),
            null_k=np.array([null.k for null in nulls]).reshape(shape),
            null_ncut=np.array([null.ncut for null in nulls]).reshape(shape),
            drift=np.array([null.drift for null in nulls]).reshape(shape[:2]).max(0),
            edges=np.array([one.adjacency().nnz // 2 for one in nets]),
            ends=ends,
            sizes=sizes,
            mixing=tuple(map(str, mixing)),
            settings=self._settings(k),
            seed=seed,
        )

    def net(self, inputs: Any) -> tuple[Net, Run, list[TensorId]]:
        """The network as a graph of units, the run that it was read off, and the projections that weigh positions.

        >>> analyzers.Modularity(model).net(input_ids)[0].adjacency().shape
        (4227, 4227)
        """
        with torch.no_grad():
            run = _run(self.model, inputs, self.tokenizer)
        graph = run.graph.unfused
        chosen = self._of_memories(run) if self.layers == "memories" else None

        def weighed(node: Node) -> bool:
            if not fnmatchcase(node.module, self.scope):
                return False
            found = projection(graph, node)
            return chosen is None or (found is not None and not chosen.isdisjoint(weights(graph, found.weight)))

        followed = Following(graph, run.__getitem__, weighed, self.order, self.fold)
        net = net_of(followed, self.order)
        if not any(block.weights.any() for block in net.blocks):
            modules = ", ".join(repr(scope.path) for scope in run.graph.scopes[1:5])
            raise AnalyzerError(
                f"{run.graph.model} has no weights between units in scope={self.scope!r}, so there is no graph to divide. "
                f"Expected a glob over the calls of modules with weights, such as {modules or 'those of linear layers'}."
            )
        return net, run, followed.mixing

    def _of_memories(self, run: Run) -> set[TensorId]:
        """The parameters of all memories that are located."""
        structure = fmr.locate(run)
        if not structure.mlps:
            raise AnalyzerError(
                f"{run.graph.model} has no feed-forward memories that could be certified. Expected layers='all', or a model "
                f"in eval mode: fmr.locate(run) says what was rejected and why."
            )
        graph = structure.mlps[0].graph
        named = {name for block in structure.mlps for name in (block.keys, block.values, block.w_in, block.w_gate, block.w_out)}
        return {name for given in named if given is not None for name in (weights(graph, given) or (given,))}

    def _search(self, k: int | None, units: int, seed: int) -> Search:
        if k is not None and self.method == "louvain":
            raise AnalyzerError(f"k={k!r} with method='louvain', which chooses the number itself. Use method='spectral'.")
        if k is not None and not (isinstance(k, int) and 1 <= k < units):
            raise AnalyzerError(f"k={k!r} of {units} units: expected 1 to {units - 1}, or None for the best of {self.ks}.")
        return Search(self.method, self.rows, self.ks if k is None else (k,), self.choose, seed)

    def _settings(self, k: int | None) -> dict[str, Any]:
        return {
            "layers": self.layers, "scope": self.scope, "norm": f"l{self.order}", "fold": self.fold, "method": self.method,
            "rows": self.rows, "ks": list(self.ks), "choose": self.choose if k is None else f"k={k}",
        }  # fmt: skip


def _check(ks: Sequence[int], edges: Sequence[float], draws: int) -> None:
    if not len(ks) or any(int(k) != k or k < 1 for k in ks):
        raise AnalyzerError(f"ks={list(ks)}: expected numbers of communities from 1, such as range(2, 11).")
    if not len(edges) or any(not 0 < share <= 1 for share in edges):
        raise AnalyzerError(f"edges={list(edges)}: expected shares of the edges above 0 and up to 1, such as [1.0, 0.1].")
    if draws < 0:
        raise AnalyzerError(f"draws={draws}: expected a number of networks from 0; p is at least 1 / (1 + draws).")


def _run(model: nn.Module, inputs: Any, tokenizer: Any) -> Run:
    """A run of the model that keeps everything, on inputs of any kind."""
    if isinstance(inputs, str) or (isinstance(inputs, (list, tuple)) and inputs and isinstance(inputs[0], str)):
        return fmr.run(model, **prompts(inputs, model, tokenizer).inputs)
    if isinstance(inputs, Mapping):
        return fmr.run(model, **inputs)
    if isinstance(inputs, Tensor):
        return fmr.run(model, inputs)
    if isinstance(inputs, tuple):
        return fmr.run(model, *inputs)
    raise AnalyzerError(
        f"inputs is {type(inputs).__name__}, expected what the model is called with: a tensor, several in a tuple, named ones "
        f"in a mapping, or texts with a tokenizer."
    )
