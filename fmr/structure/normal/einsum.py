"""The dimensions of a product by letter: every product is an einsum, and what a projection does is read off its subscripts.

A letter of both operands that the result lacks is summed over.
"""

from itertools import combinations
from typing import NamedTuple

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.match import Contraction, Projection, contraction, dims_told, is_constant, unbroadcast
from fmr.structure.normal.vocabulary import CONVOLUTIONS

_BATCH, _SPACE = "ABCDEFGH", "STUVW"


class Subscripts(NamedTuple):
    """A letter for each dimension of the two operands and of the result."""

    left: str
    right: str
    result: str

    @property
    def contracted(self) -> str:
        """What the product sums over."""
        return "".join(letter for letter in self.left if letter in self.right and letter not in self.result)

    @property
    def batch(self) -> str:
        """What both operands and the result have: the dimensions of a batch of products."""
        return "".join(letter for letter in self.left if letter in self.right and letter in self.result)

    @property
    def swapped(self) -> "Subscripts":
        """The same product with its operands exchanged."""
        return Subscripts(self.right, self.left, self.result)

    def free(self, operand: str) -> str:
        """What the result has of one operand alone."""
        return "".join(letter for letter in operand if letter in self.result and letter not in self.batch)


def subscripts_of(graph: Graph, found: Contraction) -> Subscripts:
    """The subscripts of a product."""
    left, right = len(graph[found.left].shape), len(graph[found.right].shape)
    match found.node.op:
        case "einsum":
            return Subscripts(*_einsum(found.node, left, right))
        case "linear":
            return Subscripts(_BATCH[: left - 1] + "k", "nk"[-right:], _BATCH[: left - 1] + "n"[: right - 1])
        case op if op in CONVOLUTIONS:
            space = _SPACE[: right - 2]
            batch = "A"[: left - right + 1]
            weight = "kn" if "transpose" in op else "nk"
            return Subscripts(batch + "k" + space, weight + space.lower(), batch + "n" + space)
        case "sum":
            return _summed(graph, found)
        case "tensordot":
            return _tensordot(found.node, left, right)
        case "inner":
            a, b = _BATCH[: left - 1], _SPACE[: right - 1]
            return Subscripts(a + "k", b + "k", a + b)
    a = _BATCH[: max(0, left - 2)][::-1] + "mk"[-left:]
    b = _BATCH[: max(0, right - 2)][::-1] + ("nk" if found.node.op == "cdist" else "kn"[:right])
    batch = max(a[:-2], b[:-2], key=len)
    return Subscripts(a, b, batch + "m"[: left - 1] + "n"[: right - 1])


def _einsum(node: Node, *ranks: int) -> tuple[str, ...]:
    """The subscripts of an einsum, the result last; the dimensions that its dots stand for are digits, counted from the
    right."""
    equation = str(node.args.get("0", node.args.get("equation", ""))).replace(" ", "").replace("...", ".")
    before, arrow, after = equation.partition("->")
    dots = {
        word: "9876543210"[10 - (rank - len(word) + 1) :]
        for word, rank in zip(before.split(","), ranks, strict=True)
        if "." in word
    }
    widest = max(dots.values(), key=len, default="")
    words = [word.replace(".", dots.get(word, "")) for word in before.split(",")]
    every = "".join(words)
    alone = "".join(sorted(letter for letter in set(every) - set(widest) if every.count(letter) == 1))
    return *words, after.replace(".", widest) if arrow else widest + alone


def summed_alone(graph: Graph, node: Node) -> tuple[TensorId, int] | None:
    """The value that a node sums over one dimension, each place weighed by a constant or not, and the dimension."""
    if node.op == "sum" and len(node.parents) == 1:
        rank = len(graph[node.parents[0].id].shape)
        along = dims_told(node, rank)
        return (node.parents[0].id, along[0]) if len(along) == 1 and len(node.shape) < rank else None
    found = contraction(node)
    if found is not None:
        ways = ((found.left, found.right), (found.right, found.left))
        told = [name for name, other in ways if not is_constant(graph, name) and is_constant(graph, other)]
        if len(told) != 1:
            return None
        words = subscripts_of(graph, found)
        word, result = (words.left if told == [found.left] else words.right), words.result
    elif node.op == "einsum" and len(node.parents) == 1:
        told, (word, result) = [node.parents[0].id], _einsum(node, len(graph[node.parents[0].id].shape))
    else:
        return None
    gone = [n for n, letter in enumerate(word) if letter not in result]
    return (told[0], gone[0]) if len(gone) == 1 and word.replace(word[gone[0]], "") == result else None


def _tensordot(node: Node, left: int, right: int) -> Subscripts:
    """The subscripts of a product that sums over pairs of dimensions, the last with the first where only told how many."""
    dims = node.argument("dims", 2)
    pairs = ([*range(left - dims, left)], [*range(dims)]) if isinstance(dims, int) else dims
    a, b = list(_BATCH[:left]), list(_SPACE[:right])
    for one, other in zip(*pairs, strict=True):
        b[other] = a[one] = a[one].lower()
    return Subscripts("".join(a), "".join(b), "".join(letter for letter in (*a, *b) if letter.isupper()))


def _summed(graph: Graph, found: Contraction) -> Subscripts:
    """The subscripts of a multiplication and a sum: an operand lacks those along which it is repeated."""
    factors = graph[found.node.parents[0].id]
    every = (_BATCH + _SPACE)[: len(factors.shape)]
    gone = dims_told(found.node, len(every))
    kept = len(found.node.shape) == len(every)
    result = "".join(letter.lower() if n in gone else letter for n, letter in enumerate(every) if kept or n not in gone)
    left, right = (
        _letters_kept(every, factors.shape, graph[parent].shape, graph[name].shape)
        for parent, name in zip(factors.parents, (found.left, found.right), strict=True)
    )
    return Subscripts(left, right, result)


def _letters_kept(every: str, whole: tuple[int, ...], wide: tuple[int, ...], narrow: tuple[int, ...]) -> str:
    """The subscripts of the dimensions that are left when some of size one, along which it is repeated, were taken out."""
    word, whole = every[len(every) - len(wide) :], whole[len(whole) - len(wide) :]
    ones = [n for n, size in enumerate(wide) if size == 1]
    for out in sorted(combinations(ones[::-1], len(wide) - len(narrow)), key=lambda out: [whole[n] for n in out].count(1)):
        kept = [n for n in range(len(wide)) if n not in out]
        if tuple(wide[n] for n in kept) == narrow:
            return "".join(word[n] for n in kept)
    return word


def of_projection(graph: Graph, found: Projection) -> Subscripts:
    """The subscripts of a projection: on the left those of what it reads, on the right those of its weight."""
    operands = contraction(found.node)
    assert operands is not None
    subscripts = subscripts_of(graph, operands)
    return subscripts if operands.left == found.data else subscripts.swapped


def read_dims(graph: Graph, found: Projection) -> tuple[int, ...]:
    """The dimensions of what a projection reads in which its weight differs: those that it sums over, and its heads."""
    shape = graph[found.weight].shape
    if found.node.op in CONVOLUTIONS:
        return (len(graph[found.data].shape) - len(shape) + 1,)
    subscripts = of_projection(graph, found)
    own = subscripts.right[len(shape) - len(graph[unbroadcast(graph, found.weight)].shape) :]
    sizes = dict(zip(subscripts.right, shape, strict=True))
    told = {letter for letter in own if sizes[letter] > 1 or letter in subscripts.contracted}
    return tuple(n for n, letter in enumerate(subscripts.left) if letter in told)


def summed_dim(graph: Graph, found: Projection) -> int:
    """The dimension that a projection sums over in what it reads, counted from the right."""
    subscripts = of_projection(graph, found)
    return subscripts.left.index(subscripts.contracted[-1]) - len(subscripts.left) if subscripts.contracted else -1


def made_dim(graph: Graph, found: Projection) -> int:
    """The dimension of a matrix that counts what a projection makes: 0 in the layout (out, in), 1 in (in, out)."""
    subscripts = of_projection(graph, found)
    made, summed = subscripts.free(subscripts.right), subscripts.contracted
    return int(not made or not summed or subscripts.right.index(made[-1]) > subscripts.right.index(summed[-1]))


def window(graph: Graph, node: Node) -> tuple[int, ...]:
    """Over how many places a node is a convolution, in each dimension; empty for another op, and for each place alone."""
    found = contraction(node) if node.op in CONVOLUTIONS else None
    sizes = graph[found.right].shape[2:] if found is not None else ()
    return sizes if max(sizes, default=1) > 1 else ()


def is_depthwise(graph: Graph, node: Node) -> bool:
    """Whether a node is a convolution of each unit alone, over several places."""
    found = contraction(node) if window(graph, node) else None
    return found is not None and graph[found.right].shape[1] == 1 < graph[found.right].shape[0]
