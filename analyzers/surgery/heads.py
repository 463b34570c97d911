"""The weights of single heads, as entries of parameters: heads without what they write, or with the weights of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from analyzers.protocol import AnalyzerError
from analyzers.surgery.apart import told_apart
from fmr.errors import StructureError, whole_number
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.attention.factors import Heads as Counts
from fmr.structure.attention.factors import read_by, written_by
from fmr.structure.normal.indices import iota, trace
from fmr.structure.normal.match import weights
from fmr.structure.parts import Attention, Structure
from fmr.structure.proof.evaluate import own_work

HeadOrder = Mapping[tuple[int, int], tuple[int, int] | None]
"""By layer and head the layer and head whose weights stand there; None for a head that writes nothing."""


@dataclass(frozen=True)
class Entries:
    """Where the weights of each head lie: of queries, keys, values and output, as places in all parameters laid end to end.

    Weights are (heads, units, width), biases (heads, units), with -1 where there is none.
    """

    read: dict[str, Tensor]
    biases: dict[str, Tensor]
    out: Tensor

    def of(self, head: int) -> Tensor:
        """All entries of a head, in one order for every head."""
        held = (*self.read.values(), *self.biases.values(), self.out)
        return torch.cat([one[head].flatten() for one in held])


class _Places:
    """Stands for the values of a run: a parameter, and what is made of one by moves, holds the places of its numbers.

    more: is added to each place, so that what is multiplied with it on its way is told from it.
    """

    def __init__(self, graph: Graph, more: int = 0) -> None:
        self.graph, self.more = graph, more
        self.names = [node.id for node in graph.sources if node.op == "param"]
        sizes = torch.tensor([0, *(_size(graph, name) for name in self.names)])
        self.starts = sizes.cumsum(0)

    def __call__(self, name: TensorId | str) -> Tensor:
        node = self.graph[name]
        found = torch.full(node.shape, 0.0, dtype=torch.float64)
        for one in weights(self.graph, node.id):
            if one in self.names:
                start = int(self.starts[self.names.index(one)]) + 1 + self.more
                own = iota(*self.graph[one].shape).double() + start
                sent = own if one == node.id else trace(self.graph, own, (self.graph[one], node))
                found = found if sent is None else torch.where(sent >= start, sent.double(), found)
        return found

    def split(self, entries: Tensor) -> dict[str, Tensor]:
        """Which of some entries lie in which parameter, by its name: the numbers of these entries."""
        owner = torch.searchsorted(self.starts, entries, right=True) - 1
        return {self.names[n].removeprefix("param:"): (owner == n).nonzero().flatten() for n in owner.unique().tolist()}

    def within(self, entries: Tensor) -> Tensor:
        """The places of entries in their own parameter."""
        return entries - self.starts[torch.searchsorted(self.starts, entries, right=True) - 1]


def _size(graph: Graph, name: TensorId) -> int:
    return int(torch.Size(graph[name].shape).numel())


@dataclass(frozen=True, eq=False)
class Heads:
    """What is done to single heads of a structure: by layer and head whose weights stand there."""

    structure: Structure
    order: HeadOrder

    def joined(self, pairs: HeadOrder) -> Heads:
        """The same with more of it, each head once."""
        for layer, head in [one for pair in pairs.items() for one in pair if one is not None]:
            self._check(layer, head)
        twice = next((one for one in pairs if one in self.order), None)
        if twice is not None:
            raise AnalyzerError(f"Head {twice[1]} of layer {twice[0]} is changed already. Expected each head once.")
        found = replace(self, order={**self.order, **pairs})
        found.sources()
        return found

    def check_order(self, layer: int, order: Sequence[int]) -> None:
        """Raise for what is no order of the heads of a layer."""
        many = self._attention(layer).n_heads
        if sorted(order) != list(range(many)):
            raise AnalyzerError(f"order={list(order)!r}: expected each of heads 0 to {many - 1} of layer {layer} once.")
        apart = told_apart(self._attention(layer))
        if apart is not None:
            raise AnalyzerError(
                f"The scores of layer {layer}'s heads meet {apart}, which may be another for each head and does not move "
                "with their weights: in another order these are other heads. Expected heads that weights alone tell apart."
            )

    def sources(self) -> tuple[Tensor, Tensor]:
        """The entries that change, and for each the entry whose number stands there then, -1 for a zero."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for layer in dict.fromkeys(layer for layer, _ in self.order):
            heads = {head: self.order.get((layer, head), (layer, head)) for head in range(self._attention(layer).n_heads)}
            only_gone = all(source in (None, (layer, head)) for head, source in heads.items())
            own = self._entries(layer, written=only_gone)
            for head, source in heads.items():
                if source is None:
                    pairs.append((own.out[head].flatten(), torch.full((own.out[head].numel(),), -1)))
                    pairs.append((own.of(head)[: -own.out[head].numel()],) * 2)
                else:
                    pairs.append((own.of(head), self._like(own, layer, source, only_gone).of(source[1])))
        if not pairs:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        targets, origins = (torch.cat(several) for several in zip(*pairs, strict=True))
        if bool(((targets < 0) & (origins >= 0)).any() | ((targets >= 0) & (origins < -1)).any()):
            raise AnalyzerError("One of the heads has a bias and the other has none. Expected heads that are made alike.")
        both = torch.stack([targets, origins])[:, targets >= 0].unique(dim=1)
        if len(both[0].unique()) < both.shape[1]:
            raise AnalyzerError(
                "Heads that share keys and values would need different ones. Expected all heads that share them to be "
                "replaced by heads that share theirs."
            )
        changed = both[0] != both[1]
        self._check_own(both[0][changed])
        return both[0][changed], both[1][changed]

    def _check_own(self, targets: Tensor) -> None:
        """Raise where what would be written is a weight that other layers than those of its heads read too."""
        graph, places = self.structure.graph, _Places(self.structure.graph)
        for layer in dict.fromkeys(layer for layer, _ in self.order):
            block, own = self._attention(layer), self.structure.layers[layer]
            first, last = graph.place(own.resid_pre.id), graph.place(own.resid_post.id)
            mine = torch.isin(targets, torch.cat([self._entries(layer, written=True).out.flatten()]))
            for name in places.split(targets[mine]):
                others = [node for node in graph.readers(f"param:{name}") if not first <= graph.place(node.id) <= last]
                if others:
                    raise AnalyzerError(
                        f"The heads of layer {layer} at {block.scope!r} lie in {name!r}, which {others[0].id} reads too: "
                        "another layer would change with them. Expected weights that one layer has for itself."
                    )

    def write(self, model: nn.Module, undo: ExitStack) -> None:
        """Write the numbers into the weights of a model; `undo` puts the bits back that were there."""
        targets, origins = self.sources()
        if not len(targets):
            return
        places, parameters = _Places(self.structure.graph), dict(model.named_parameters(remove_duplicate=False))
        values = torch.zeros(len(targets), dtype=torch.float64)
        known = (origins >= 0).nonzero().flatten()
        for name, some in places.split(origins[known]).items():
            rows = known[some]
            weight = parameters[name].detach()
            values[rows] = weight[torch.unravel_index(places.within(origins[rows]), weight.shape)].double().cpu()
        for name, rows in places.split(targets).items():
            weight = parameters[name]
            undo.callback(_put_back, weight, weight.detach().clone())
            with torch.no_grad():
                weight[torch.unravel_index(places.within(targets[rows]), weight.shape)] = values[rows].to(weight)

    def _like(self, own: Entries, layer: int, source: tuple[int, int], written: bool) -> Entries:
        """The entries of the layer that a head is taken from, which must be made alike."""
        other = self._entries(source[0], written)
        shapes = [[*(one.shape[1:] for one in entries.read.values()), entries.out.shape[1:]] for entries in (own, other)]
        if shapes[0] != shapes[1]:
            raise AnalyzerError(
                f"Heads of layers {layer} and {source[0]} have other sizes. Expected heads that are made alike."
            )
        return other

    def _entries(self, layer: int, written: bool) -> Entries:
        """The entries of a layer's heads; of what they write alone where nothing else is asked for."""
        block = self._attention(layer)
        try:
            return _entries_of(block, written)
        except StructureError as refused:
            raise AnalyzerError(f"The heads of layer {layer} have no weights of their own: {refused}") from None

    def _attention(self, layer: int) -> Attention:
        number, layers = whole_number(layer), self.structure.layers
        found = layers[number].attention if number is not None and 0 <= number < len(layers) else None
        if found is None or found.kind != "self" or found.out is None:
            have = [n for n, one in enumerate(layers) if one.attention is not None and one.attention.kind == "self"]
            raise AnalyzerError(f"Layer {layer!r} has no self-attention with heads. Expected one of {have}.")
        return found

    def _check(self, layer: int, head: int) -> None:
        many = self._attention(layer).n_heads
        number = whole_number(head)
        if number is None or not 0 <= number < many:
            raise AnalyzerError(f"Head {head!r} of layer {layer}: expected 0 to {many - 1}.")


@lru_cache(maxsize=256)
def _entries_of(block: Attention, written: bool) -> Entries:
    """The entries of the heads of an attention: its weights are read as `factors` does, with places for numbers."""
    graph, counts = block.graph, Counts(block.n_heads, block.n_kv_heads)
    sites = {} if written else {"q": block.q, "k": block.k, "v": block.v}
    assert block.out is not None
    told = []
    with own_work():
        for values in (_Places(graph), _Places(graph, more=1)):
            read = {role: read_by(graph, site, counts, values, role != "q").factor for role, site in sites.items()}
            told.append((read, written_by(graph, block.z, block.path, block.out, counts, values)[0]))
    (read, out), (other, other_out) = told
    found = Entries(
        {role: _whole(read[role].matrix, other[role].matrix, block) for role in sites},
        {role: _whole(read[role].bias, other[role].bias, block) for role in sites},
        _whole(out.matrix, other_out.matrix, block),
    )
    every = (*found.read.values(), found.out)
    if any(bool((one < 0).any()) for one in every):
        raise StructureError(f"not every weight of {block.scope!r} is a number of a parameter.")
    return found


def _whole(places: Tensor, others: Tensor, block: Attention) -> Tensor:
    """Places as whole numbers from 0 on, -1 for none: both are multiplied with the same, and `others` are one more.

    A norm between a projection and its heads, of which the gain is a parameter itself, leaves none.
    """
    scale = others - places
    found = torch.where(scale == 0, 0.0, places / scale)
    if not bool(((found - found.round()).abs() < 1e-3).all() & (found.round() >= 0).all()):
        raise StructureError(f"{block.scope!r} has a gain of its own between its projections and its heads.")
    return found.round().long() - 1


def _put_back(weight: nn.Parameter, before: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(before)
