"""A graph with its layout left out: the values where data meets weights or other data, or is bent, and what they read."""

from collections.abc import Container, Hashable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any, Protocol

from fmr.ids import OPAQUE, TensorId
from fmr.nests import exact, map_at
from fmr.nodes import Node, Nodes
from fmr.ops.names import OF_SHAPES

CARRIES = frozenset(
    """result alias clone contiguous data detach dropout alpha_dropout feature_dropout nan_to_num to
    T as_strided as_subclass broadcast_tensors broadcast_to cat chunk column_stack copy diagonal dstack expand expand_as
    flatten flip gather getitem hstack index_add index_copy index_put index_select mT masked_select movedim narrow pad
    permute pixel_shuffle ravel repeat repeat_interleave reshape reshape_as roll scatter scatter_add select
    setitem split split_with_sizes squeeze stack t take_along_dim tensor_split tile transpose unbind unflatten unfold
    unsqueeze view view_as vstack add sub mul div masked_fill where""".split()
)
"""Ops that hand on one value: in another layout, or scaled, shifted and masked by what no data flows into."""

_PROJECTS = frozenset("linear linear_dynamic addmm matmul mm mv bmm baddbmm einsum int_mm scaled_mm".split())
"""Products over the last dimension: of data and weights a projection, of data and data a product."""

_RIGHT = dict.fromkeys(("matmul", "mm", "bmm"), ("1", "other", "mat2")) | dict.fromkeys(
    ("addmm", "baddbmm"), ("2", "mat2", "batch2")
)
"""Products in which data may stand on the right of weights, with its units in the rows, and the arguments for that."""

_PARTS = frozenset("split chunk split_with_sizes tensor_split unbind getitem narrow select".split())
"""Ops that take a part of a value."""

_SIZES = ("1", "split_size_or_sections", "split_size", "split_sizes", "chunks")
"""What says how large the parts of a split are, or how many there are of a chunk."""

SHIFTS = frozenset("add sub mul div masked_fill where".split())
"""Ops that change the numbers that they hand on."""

_LIKE = frozenset("to view_as reshape_as expand_as".split())
"""Ops that read what follows their first operand for its shape or its dtype alone."""

UNORDERED = frozenset("add mul maximum minimum".split())


class Unfused(Nodes, Protocol):
    """What is compared of a graph: its nodes with every fused op written out."""

    @property
    def unfused(self) -> Nodes:
        """The same pass with fused ops written out."""


@dataclass
class Joint:
    """A value where data meets: what it reads of others, by argument, and who reads it.

    `likeness` is what any value that may be the same in another graph has in common with it; `named` are the weights that
    are called alike in both. `whole` is the value with a bias and a scale that are steps of their own.
    """

    node: Node
    reads: list["Joint"]
    ends: list[TensorId]
    whole: Node
    users: list[tuple[int, "Joint"]] = field(default_factory=list)
    likeness: Hashable = None
    named: tuple[str, ...] = ()
    scaled: Hashable = ()
    sides: frozenset[int] = frozenset()
    place: int = 0
    pair: int = -1
    doubtful: bool = False
    twin: bool = False

    @property
    def weighs(self) -> bool:
        """Whether weights take part."""
        return self.kind in ("project", "embedding") or self.kind.endswith("norm") or self.kind.startswith("conv")

    @property
    def kind(self) -> str:
        """The class of its op: projections and products are spelled in many ways."""
        op, live = self.node.op, len(self.reads)
        if op in _PROJECTS:
            return "project" if live == 1 else "product"
        return "part" if op in _PARTS and live == 1 else op


class Joints:
    """The joints of one graph in order of execution, and for each value the joint whose numbers it hands on.

    `known` are buffers whose numbers are those of weights in the other graph.
    """

    def __init__(self, graph: Unfused, known: Container[str] = ()) -> None:
        self.graph, self.known = graph.unfused, known
        self.nodes = {node.id: node for node in self.graph.nodes}
        self.kinds: dict[TensorId, str] = {}
        self.fed: set[TensorId] = set()
        self.sources: dict[TensorId, frozenset[str]] = {}
        self.head: dict[TensorId, Joint] = {}
        self.joints: list[Joint] = []
        self.called: dict[str, str] = {}
        for node in self.graph.nodes:
            self._add(node)
        for at, name in _returned(self.graph):
            if name in self.head:
                output = self.nodes[name]._replace(id=TensorId(f"output:{at}"), op="output", args={})
                self._join(output, [name])
        for joint in self.joints:
            joint.scaled = self._scales(joint)
        for joint in reversed(self.joints):
            joint.sides = frozenset(side for at, user in joint.users for side in _side(at, user))

    def _add(self, node: Node) -> None:
        """Tell what a value is made of: data, weights alone, or neither; a joint where data does not just pass."""
        if node.op in ("input", OPAQUE) or not self.fed.isdisjoint(_read(node)):
            self.fed.add(node.id)
        kind = self.kinds[node.id] = self._kind(node)
        if kind == "weight":
            made = (self.sources[name] for name in _read(node) if self.kinds[name] == "weight")
            self.sources[node.id] = frozenset([str(node.id)]) if node.id.is_source else frozenset().union(*made)
        if kind != "data":
            return
        live = [name for name in _read(node) if self.kinds[name] == "data"]
        if len(live) == 1 and node.op in CARRIES and not self._is_part(node, live[0]):
            head = self.head[node.id] = self.head[live[0]]
            if self._completes(node, head):
                head.whole = node
        else:
            self._join(node, live)

    def _kind(self, node: Node) -> str:
        if node.id.is_source:
            floats = node.dtype.is_floating_point or node.dtype.is_complex
            is_weight = node.op == "param" or node.id in self.known
            return "weight" if is_weight else "data" if node.op == "input" and floats else ""
        kinds = {self.kinds[name] for name in _read(node)}
        if not (node.dtype.is_floating_point or node.dtype.is_complex):
            whole = [self.nodes[name] for name in _read(node) if not self.nodes[name].dtype.is_floating_point]
            return "weight" if any(self.kinds[one.id] == "weight" for one in whole) else ""
        fed = any(name in self.fed for name in _read(node))
        if "data" in kinds or node.op == OPAQUE or ("weight" in kinds and fed):
            return "data"
        return "weight" if "weight" in kinds else ""

    def _completes(self, node: Node, head: Joint) -> bool:
        """Whether a step adds the only bias of a projection, or scales its units by what its weights were divided by."""
        if head.kind != "project" or (node.op == "mul" and node.shape != head.node.shape):
            return False
        beside = [self.nodes[parent.id] for parent in node.parents if self.kinds[parent.id] != "data"]
        if node.op == "mul":
            return any(prod(one.shape) == node.shape[-1] > 1 and self.kinds[one.id] == "" for one in beside)
        sources = frozenset().union(*(self.sources.get(one.id, frozenset()) for one in beside))
        is_bias = bool(sources) and all(map(self._is_vector, sources))
        return node.op == "add" and is_bias and not any(map(self._is_vector, self.weights(head)))

    def _is_vector(self, name: str) -> bool:
        return len(self.nodes[TensorId(name)].shape) == 1

    def _is_part(self, node: Node, read: TensorId) -> bool:
        return node.op in _PARTS and prod(node.shape) < prod(self.nodes[read].shape)

    def _join(self, node: Node, live: list[TensorId]) -> None:
        """Note a joint; what it reads in any order stands in that of its making."""
        heads = [self.head[name] for name in live]
        joint = Joint(node, list(heads), live, node, place=len(self.joints))
        self.joints.append(joint)
        self.head[node.id] = joint
        for at, head in enumerate(heads):
            head.users.append((0 if node.op in UNORDERED else at, joint))

    def way(self, end: TensorId) -> list[Node]:
        """The steps by which a value comes from the nearest joint that has a pair or reads several values, that first."""
        steps, head = [self.nodes[end]], self.head[end]
        while steps[-1].id != head.node.id or (head.pair < 0 and len(head.reads) == 1):
            above = next(name for name in _read(steps[-1]) if self.kinds[name] == "data")
            steps.append(self.nodes[above])
            head = self.head[above]
        return steps[::-1]

    def is_joint(self, node: Node) -> bool:
        """Whether data meets in a value or is bent there."""
        return self.head[node.id].node.id == node.id

    def _scales(self, joint: Joint) -> Hashable:
        """By which numbers a value was scaled and shifted before it is bent; a softmax may read scores scaled elsewhere."""
        if len(joint.reads) != 1 or joint.weighs or joint.kind in ("softmax", "part", "output"):
            return ()
        steps = self.way(joint.ends[0])
        return tuple((node.op, exact(node.args)) for node in steps if node.op in SHIFTS and len(node.parents) == 1)

    def weights(self, joint: Joint) -> frozenset[str]:
        """The parameters that a joint reads, however they were prepared for it, a bias that is added later too."""
        read = (self.sources.get(parent.id, frozenset()) for node in (joint.node, joint.whole) for parent in node.parents)
        return frozenset().union(*read)

    def share(self, joint: Joint) -> Hashable:
        """Which part of what it reads a joint takes, where its op tells."""
        return _share(joint.node, self.nodes[joint.ends[0]].shape) if joint.kind == "part" else ()

    def sizes(self, joint: Joint) -> Hashable:
        """The sizes that a joint has however its op is spelled: the widths of data before and after weights."""
        node, shape = joint.node, joint.node.shape
        if joint.kind == "project":
            read = self.nodes[joint.ends[0]].shape
            at = next(parent.at for parent in node.parents if parent.id == joint.ends[0])
            is_right = at in _RIGHT.get(node.op, ()) and min(len(read), len(shape)) > 1
            return (read[-2:-1], shape[-2:-1]) if is_right else (read[-1:], shape[-1:])
        return shape[-1:] if joint.weighs else ()


def _read(node: Node) -> list[TensorId]:
    """What a node reads for its numbers."""
    return [] if node.op in OF_SHAPES else [parent.id for parent in node.parents[: 1 if node.op in _LIKE else None]]


def _side(at: int, user: Joint) -> Iterable[int]:
    """As which operand a value enters the next products of data with data, through all that is not one."""
    return [at] if user.kind == "product" else user.sides


def _returned(graph: Nodes) -> list[tuple[str, TensorId]]:
    """What the model returned, each with its position."""
    found: list[tuple[str, TensorId]] = []
    if graph.scopes:
        map_at(lambda at, name: found.append((at, TensorId(name))), graph.scopes[0].output)
    return found


def _share(node: Node, shape: tuple[int, ...]) -> Hashable:
    """Where a part begins and ends in what it is a part of, as fractions along its dimension; its arguments for others."""
    dim, start = _begin(node, shape)
    if not isinstance(dim, int) or not isinstance(start, int) or not -len(shape) <= dim < len(shape):
        return node.op, node.id.parts.output, exact(node.args), shape
    size = shape[dim]
    length = 1 if len(node.shape) < len(shape) else node.shape[dim]
    return Fraction(start % size, size), Fraction(start % size + length, size)


def _begin(node: Node, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The dimension along which an op takes a part, and where that begins; None where neither is a number."""
    index = node.id.parts.output or 0
    if node.op == "narrow" or node.op == "select":
        return node.argument("dim", 1), node.argument("start", 2, node.argument("index", 2))
    if node.op == "unbind":
        return node.argument("dim", 1, 0), index
    if node.op == "getitem":
        return _begin_of_index(node.args.get("1"), len(shape))
    dim = node.argument("dim", 2, 0)
    each = next((node.args[name] for name in _SIZES if name in node.args), None)
    if isinstance(each, (list, tuple)) and node.op != "tensor_split" and all(isinstance(one, int) for one in each):
        return dim, sum(each[:index])
    if not isinstance(each, int) or node.op == "tensor_split" or not isinstance(dim, int):
        return None, None
    if node.op == "split":
        return dim, index * each
    return dim, index * -(-shape[dim] // each)


def _begin_of_index(index: Any, dims: int) -> tuple[Any, Any]:
    """The one dimension of which an index takes a part, and where that begins."""
    given = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in given:
        at = given.index(Ellipsis)
        given[at : at + 1] = [slice(None)] * (dims - len(given) + 1)
    cuts = [(dim, one) for dim, one in enumerate(given) if one != slice(None)]
    if len(cuts) != 1 or len(given) > dims:
        return None, None
    dim, one = cuts[0]
    if isinstance(one, slice):
        return (dim, one.start or 0) if one.step in (None, 1) else (None, None)
    return dim, one
