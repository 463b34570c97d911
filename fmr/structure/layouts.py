"""What the dimensions of an attention's values count: examples, heads, positions, units."""

from fmr.graph import Graph
from fmr.structure.carry import sources
from fmr.structure.heads import Heads
from fmr.structure.match import Way
from fmr.structure.mix import Use
from fmr.structure.scores import Scores

Layout = tuple[str, ...]
"""What each dimension of a value counts."""


def layouts(graph: Graph, scores: Scores, use: Use, heads: Heads) -> tuple[Layout, ...]:
    """What the dimensions of q, k, v, scores, pattern and z count."""
    one = len(heads.dims) == 1 and not heads.folded
    head = use.letters.result[heads.dims[0]] if one else ""
    weighs, values = use.letters.left, use.letters.right
    z = dict.fromkeys(use.letters.alone(values)[-1:], "units")
    own = {head: "heads"} if head else {}
    v = z | dict.fromkeys(use.letters.summed[-1:], "positions") | own
    queries = use.letters.alone(weighs).replace(head, "") or use.letters.shared.replace(head, "")[1:]
    z |= dict.fromkeys(queries[-1:], "positions")  # where each query has keys of its own, its place is that of a batch
    pattern = _moved(graph, _named(weighs, z | dict.fromkeys(use.letters.summed[-1:], "units") | own), use.way)
    above = _moved(graph, pattern, scores.way)
    letters = scores.letters
    named = {letter: name for letter, name in zip(letters.result, above, strict=True) if name != "units"}
    q = named | dict.fromkeys(letters.summed[-1:], "units")
    keys = {letter: "positions" for letter in letters.alone(letters.right)[-1:] if named.get(letter) != "heads"}
    k = {letter: name for letter, name in q.items() if name != "positions"} | keys
    mixed = _named(use.letters.result, z | own)
    return _named(letters.left, q), _named(letters.right, k), _named(values, v), pattern, pattern, mixed


def _named(word: str, names: dict[str, str]) -> Layout:
    """The name of each letter; of those that have none the first counts examples."""
    first = next((n for n, letter in enumerate(word) if letter not in names), None)
    return tuple(names.get(letter, "examples" if n == first else f"axis {n}") for n, letter in enumerate(word))


def _moved(graph: Graph, layout: Layout, way: Way) -> Layout:
    """What the dimensions at the beginning of a way count, known what they count at its end."""
    rank = len(way[0].shape)
    places = {place: name for place, name in zip(sources(graph, way), layout, strict=True) if place is not None}
    usual = ("examples", *(f"axis {n}" for n in range(1, rank - 2)), "positions", "units")[-rank:]
    return tuple(places.get(n, "" if usual[n] in places.values() else usual[n]) or f"axis {n}" for n in range(rank))
