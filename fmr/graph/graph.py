"""A pass as a small immutable value: nodes in execution order, parents, module scopes, sources. No tensors inside."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fmr.disk.files import read_whole, seal, understood, unseal, write_whole
from fmr.errors import GraphError, IdError, nearest, number_of
from fmr.graph.align import align, diff
from fmr.graph.expand import Inner, inner_nodes
from fmr.graph.hints import used_name
from fmr.graph.pack import packed, unpacked
from fmr.graph.paths import call_at, returned, the_one
from fmr.graph.table import table
from fmr.ids import OPAQUE, RESULT, Parent, TensorId, outer_scope, within
from fmr.nests import Nest, ids_in, map_ids
from fmr.nodes import Key, Node, Scope, id_of, scope_of
from fmr.ops.fused import is_fused
from fmr.pictures.draw import save_dot, save_svg
from fmr.pictures.explorer import save_explorer
from fmr.pictures.notebook import drawn, preformatted

if TYPE_CHECKING:
    import networkx


class Graph:
    """The operations of one pass of a model.

    >>> graph["transformer.h.0.attn/softmax#0"].parents
    ('transformer.h.0.attn/add#0',)

    `nodes` holds one node for each value in execution order, sources included, each before its readers; `scopes` the
    module calls in the order in which they began; `model` the class name of the root, for display; `edited` the values that
    edits of the run replaced; `asked` those of which Python was told numbers, each with the first line that asked.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        scopes: Iterable[Scope],
        model: str,
        same: tuple[tuple[str, ...], ...] = (),
        edited: Iterable[TensorId] = (),
        asked: Mapping[TensorId, str] | None = None,
    ) -> None:
        self.nodes = tuple(nodes)
        self.scopes = tuple(scopes)
        self.model = model
        self.edited = tuple(edited)
        self.asked = dict(asked or {})
        self.same = same  # the names of each module and tensor that has several; files do not keep them
        self._place = {node.id: place for place, node in enumerate(self.nodes)}
        self._inner: dict[str, Inner] = {}
        self.known: dict[object, Any] = {}  # what functions found out about it, each under itself

    def __getstate__(self) -> dict[str, Any]:
        """What is found out again is not copied."""
        return self.__dict__ | {"known": {}}

    # ---- looking things up

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __contains__(self, key: "Key") -> bool:
        try:
            return bool(self[key])
        except IdError:
            return False

    def __getitem__(self, key: "Key") -> Node:
        """The node of an ID, inner values of fused ops included; for the path of a module that of the tensor it returned."""
        name = key if isinstance(key, TensorId) else id_of(key)
        if (place := self._place.get(name)) is not None:
            return self.nodes[place]
        if name.is_path:
            return self[the_one(name, returned(self, name))]
        for node in self._inside(name):
            if node.id == name:
                return node
        close = used_name(name, self.same, self._place) or nearest(name, self.ids())
        close = close or " Expected one of graph.ids(), or of graph.find('*softmax*') for a glob."
        raise IdError(f"{self.model} has no value {str(name)!r} in this graph.{close}")

    def place(self, key: "Key") -> int:
        """The position of a value in execution order."""
        place = self._place.get(key) if isinstance(key, TensorId) else None
        if place is None and (place := self._place.get(self._name(key))) is None:
            raise IdError(f"{self[key].id!s} lies inside a fused op, which has one place. Expected graph.unfused.place(id).")
        return place

    def _name(self, key: "Key") -> TensorId:
        """The ID that a key names; where that is the path of a module, the ID of what it returned."""
        name = key if isinstance(key, TensorId) else id_of(key)
        return name if name in self._place or not name.is_path else self[name].id

    def find(self, pattern: str) -> tuple[Node, ...]:
        """The nodes whose ID matches a glob, in execution order; inner values of fused ops stand after their op.

        Where none does, the glob is one over paths of module calls: the nodes of what these returned.

        >>> [node.id for node in graph.find("*.[01].attn/softmax#*")]
        ['transformer.h.0.attn/softmax#0', 'transformer.h.1.attn/softmax#0']
        """
        if not isinstance(pattern, str):
            raise IdError(f"graph.find got {type(pattern).__name__}, expected a glob over IDs, such as '*softmax*'.")
        found = tuple(node for node in self._with_inner() if fnmatchcase(node.id, pattern))
        if found:
            return found
        made = {name for path, scope in self.calls.items() if fnmatchcase(path, pattern) for name in ids_in(scope.output)}
        return tuple(node for node in self.nodes if node.id in made)

    def module(self, path: str) -> "ModuleCall":
        """The call of a module, by its dynamic path as in the IDs; the root is the empty path.

        >>> graph.module("transformer.h.3.mlp").output.id
        'transformer.h.3.mlp.dropout/dropout#0'
        """
        return ModuleCall(self, call_at(self, path))

    @cached_property
    def calls(self) -> Mapping[str, Scope]:
        """The module calls by their dynamic paths."""
        return {scope.path: scope for scope in self.scopes}

    @property
    def sources(self) -> tuple[Node, ...]:
        """Parameters, buffers and inputs that the pass read."""
        return tuple(node for node in self.nodes if node.id.is_source)

    @property
    def opaque(self) -> tuple[Node, ...]:
        """Values whose producer could not be seen: scripted code, foreign kernels, functorch transforms, other threads."""
        return tuple(node for node in self.nodes if node.op == OPAQUE)

    # ---- inner values of fused ops

    def inner(self, key: "Key") -> tuple[Node, ...]:
        """The values inside a fused op; empty for any other op."""
        node = self[key]
        return self._expand(node, self._lookup).nodes if is_fused(node) else ()

    def _lookup(self, name: str) -> Node:
        return self[name]

    def _expand(self, node: Node, lookup: Callable[[str], Node]) -> Inner:
        scope = scope_of(node)
        if scope not in self._inner:
            self._inner[scope] = inner_nodes(node, {name: lookup(name) for name in node.parents})
        return self._inner[scope]

    def _inside(self, name: TensorId) -> tuple[Node, ...]:
        """The nodes of the innermost fused op whose scope an ID lies in."""
        owner = self.fused.get(outer_scope(name))
        found: tuple[Node, ...] = ()
        while owner is not None:
            local = {node.id: node for node in found}
            found = self._expand(owner, lambda key, local=local: local.get(TensorId(key)) or self[key]).nodes  # type: ignore[misc]
            if name.scope == scope_of(owner):
                return found
            owner = next((n for n in found if is_fused(n) and name.startswith(scope_of(n) + "/")), None)
        return found

    @cached_property
    def fused(self) -> Mapping[str, Node]:
        """The fused ops by the scope that holds their inner values."""
        return {scope_of(node): node for node in reversed(self.nodes) if is_fused(node)}

    def _with_inner(self) -> Iterator[Node]:
        seen: set[str] = set()

        def unfold(node: Node) -> Iterator[Node]:
            yield node
            if is_fused(node) and scope_of(node) not in seen:
                seen.add(scope_of(node))
                for inner in self.inner(node.id):
                    yield from unfold(inner)

        for node in self.nodes:
            yield from unfold(node)

    @cached_property
    def unfused(self) -> "Graph":
        """The same pass with each fused op written out: its inner nodes stand before it, and it hands on their result."""
        nodes: list[Node] = []
        known: dict[str, Node] = {}

        def add(node: Node) -> None:
            if is_fused(node):
                inner = self._expand(node, known.__getitem__)
                for one in inner.nodes:
                    if one.id not in known:
                        add(one)
                index = node.id.parts.output
                result = inner.output if index is None or inner.output is None else inner.output[index]
                if isinstance(result, str):
                    node = node._replace(op=RESULT, parents=(Parent(result, "0"),), args={})
            known[node.id] = node
            nodes.append(node)

        for node in self.nodes:
            add(node)
        return Graph(nodes, self.scopes, self.model, self.same)

    def ids(self) -> Iterator[TensorId]:
        """Every ID, those inside fused ops included."""
        return (node.id for node in self._with_inner())

    # ---- dataflow

    @cached_property
    def _readers(self) -> dict[TensorId, tuple[Node, ...]]:
        readers: dict[TensorId, dict[TensorId, Node]] = {node.id: {} for node in self.nodes}
        for node in self.nodes:
            for parent in node.parents:
                readers[parent][node.id] = node
        return {name: tuple(nodes.values()) for name, nodes in readers.items()}

    def readers(self, key: "Key") -> tuple[Node, ...]:
        """The nodes that read a value."""
        name = self._name(key)
        found = self._readers.get(name)
        return found if found is not None else self._holding(name)._readers[name]

    def ancestors(self, key: "Key") -> tuple[Node, ...]:
        """Every node that a value depends on, in execution order."""
        here = self._holding(key)
        return here._closure(here[key], lambda node: [here[parent] for parent in node.parents])

    def descendants(self, key: "Key") -> tuple[Node, ...]:
        """Every node that depends on a value, in execution order."""
        here = self._holding(key)
        return here._closure(here[key], lambda node: here._readers[node.id])

    def between(self, start: "Key", end: "Key") -> tuple[Node, ...]:
        """The nodes on the paths from one value to another, both ends included; empty where there is no path."""
        here = self._holding(start, end)
        below = {here._name(start), *(node.id for node in here.descendants(start))}
        above = {here._name(end), *(node.id for node in here.ancestors(end))}
        return tuple(node for node in here.nodes if node.id in below and node.id in above)

    def _holding(self, *keys: Key) -> "Graph":
        """The graph in which these values are nodes: the one with fused ops written out where one lies inside such an op."""
        return self if all(self[key].id in self._place for key in keys) else self.unfused

    def _closure(self, start: Node, step: Callable[[Node], Iterable[Node]]) -> tuple[Node, ...]:
        seen: set[TensorId] = set()
        waiting = list(step(start))
        while waiting:
            node = waiting.pop()
            if node.id not in seen:
                seen.add(node.id)
                waiting.extend(step(node))
        return tuple(sorted((self[name] for name in seen), key=lambda node: self._place[node.id]))

    # ---- comparing and checking

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the ops, their IDs and their edges; shapes, dtypes, devices and call sites do not count."""
        lines = (f"{node.id} {node.op} {[(str(p), p.at) for p in node.parents]}\n" for node in self.nodes)
        return hashlib.blake2b("".join(lines).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    table = table
    align = align
    diff = diff

    def lint(self) -> None:
        """Check the graph's invariants; raise `GraphError` with everything that is wrong.

        IDs are unique, every parent comes before its child, every edge resolves, every module output has a producer.
        """
        problems: list[str] = []
        seen: set[str] = set()
        for node in self.nodes:
            late = [parent for parent in node.parents if parent not in seen]
            problems += [f"{node.id} reads {parent}, which does not come before it" for parent in late]
            problems += [f"{node.id} stands twice"] if node.id in seen else []
            seen.add(node.id)
        for scope in self.scopes:
            lost = [name for name in ids_in(scope.output) if name not in seen]
            problems += [f"the output of {scope.path!r} has no producer {name}" for name in lost]
        if problems:
            raise GraphError(f"The graph of {self.model} breaks {len(problems)} rules: " + "; ".join(problems[:5]) + ".")

    # ---- leaving

    def to_networkx(self) -> "networkx.MultiDiGraph":
        """The graph for networkx: a node per ID with op, scope, shape and dtype, an edge per argument with its position.

        >>> import networkx
        >>> networkx.write_graphml(graph.to_networkx(), "model.graphml")

        Every attribute is a text, so that GraphML and other formats take the graph as it is.
        """
        import networkx

        result = networkx.MultiDiGraph(model=self.model, fingerprint=self.fingerprint)
        for node in self.nodes:
            told = {"op": node.op, "scope": node.scope, "shape": str(node.shape), "dtype": node.kind, "where": node.where}
            result.add_node(str(node.id), **told)
        for node in self.nodes:
            for parent in node.parents:
                result.add_edge(str(parent), str(node.id), at=parent.at)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph as one JSON file, whole or not at all."""
        write_whole(path, seal("graph", self.to_dict()))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Graph":
        """Read a graph that `save` wrote; a damaged, foreign or newer file is a `StoreError`."""
        body = unseal("graph", read_whole(path, "a graph that graph.save(path) wrote"), str(path))
        return Graph.from_dict(body, str(path))

    def to_dict(self) -> dict[str, Any]:
        """The graph in plain types for JSON."""
        edited = {"edited": [str(name) for name in self.edited]} if self.edited else {}
        asked = {"asked": {str(name): where for name, where in self.asked.items()}} if self.asked else {}
        return {"model": self.model, "fingerprint": self.fingerprint, **packed(self.nodes, self.scopes), **edited, **asked}

    @staticmethod
    def from_dict(body: dict[str, Any], source: str = "This dict") -> "Graph":
        """The graph that `to_dict` gave; what is no graph is a `StoreError` that names the source."""
        with understood(source):
            edited = tuple(TensorId(str(name)) for name in body.get("edited", ()))
            asked = {TensorId(str(name)): str(where) for name, where in body.get("asked", {}).items()}
            return Graph(*unpacked(body), edited=edited, asked=asked)

    save_dot = save_dot
    save_svg = save_svg
    save_explorer = save_explorer

    # ---- printing

    def __repr__(self) -> str:
        ops = Counter(node.op for node in self.nodes if not node.id.is_source)
        kinds = Counter(node.op for node in self.sources)
        sources = ", ".join(number_of(count, kind) for kind, count in kinds.items())
        common = ", ".join(f"{op} {count}" for op, count in ops.most_common(6))
        lines = [
            f"Graph of {self.model}: {number_of(ops.total(), 'op')} in {number_of(len(self.scopes), 'module call')}, "
            f"reading {sources}"
        ]
        lines += [f"  most used: {common}"]
        lines += [f"  input   {node}" for node in self.sources if node.op == "input"]
        lines += [f"  output  {self[name]}" for name in list(ids_in(self.scopes[0].output))[:3]] if self.scopes else []
        lines += [f"  edited  {', '.join(self.edited[:3])}{' ...' * (len(self.edited) > 3)}"] if self.edited else []
        lines += (
            [f"  opaque  {number_of(len(self.opaque), 'value')} whose producer could not be seen"] if self.opaque else []
        )
        return "\n".join(lines)

    @cached_property
    def _drawn(self) -> str | None:
        return drawn(self)

    def _repr_svg_(self) -> str | None:
        return self._drawn

    def _repr_html_(self) -> str | None:
        return None if self._drawn else preformatted(self)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module in a graph: what went in, what came out, what ran inside."""

    graph: Graph
    scope: Scope

    @property
    def output(self) -> Nest:
        """The node that the module returned, or a tuple or dict of nodes as it returned them."""
        return map_ids(self.graph.__getitem__, self.scope.output)

    @property
    def input(self) -> Nest:
        """The nodes that the module was given: positional arguments, then those by name."""
        return map_ids(self.graph.__getitem__, self.scope.inputs)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node that ran inside, submodules included."""
        return tuple(n for n in self.graph.nodes if within(n.scope, self.scope.path) and not n.id.is_source)

    def __repr__(self) -> str:
        path = self.scope.path or "root"
        return f"{path} ({self.scope.kind}): {number_of(len(self.nodes), 'op')}, output {list(ids_in(self.scope.output))}"
