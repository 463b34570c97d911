"""What is restored one at a time: states, and windows of what attention or memories write, at single tokens and groups."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from analyzers.protocol import AnalyzerError
from fmr.edits import Edit
from fmr.ids import Site
from fmr.nodes import Key
from fmr.structure.parts import Layer, Structure

KINDS = ("state", "attention", "mlp", "state without attention", "state without mlp")
"""What can be restored: the state after a layer, what attention or memories of a window of layers write, and a state whose
later attentions or memories are held at what they are in the corrupted run, at the tokens that are restored."""


class Column(NamedTuple):
    """Where something is restored: the text on the axis, the role in a sentence, and the positions."""

    label: str
    role: str
    positions: tuple[int, ...]


ALL = "all of the subject"

ROLES = (
    "before the subject",
    "first subject token",
    "middle subject tokens",
    "last subject token",
    ALL,
    "first token after",
    "tokens between",
    "last token",
)


def columns_of(tokens: Sequence[str], subject: Sequence[int]) -> list[Column]:
    """Each token of a prompt with its role, and the subject as a whole."""
    found = [Column(token, _role(place, len(tokens), subject), (place,)) for place, token in enumerate(tokens)]
    return [*found, Column(ALL, ALL, tuple(subject))]


def _role(place: int, length: int, subject: Sequence[int]) -> str:
    if place == subject[-1]:
        return "last subject token"
    if place in subject:
        return "first subject token" if place == subject[0] else "middle subject tokens"
    if place < subject[-1]:
        return "before the subject"
    if place == length - 1:
        return "last token"
    return "first token after" if place == subject[-1] + 1 else "tokens between"


class Cell(NamedTuple):
    """One cell of a map: what is restored there, after which layer, in which column, and at which sites."""

    kind: str
    layer: int
    column: int
    restored: tuple[Site, ...]
    held: tuple[Site, ...]

    def row(self, clean: Edit, corrupted: Edit | None) -> Mapping[Key, Edit]:
        """The edits of the cell in a corrupted run."""
        return {
            **dict.fromkeys(self.restored, clean),
            **({} if corrupted is None else dict.fromkeys(self.held, corrupted)),
        }


def checked_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds, if all of them are some."""
    found = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not found or any(kind not in KINDS for kind in found):
        raise AnalyzerError(f"kinds={kinds!r}: expected some of {', '.join(map(repr, KINDS))}.")
    return found


def window_of(layers: int, window: int | None) -> int:
    """How many layers go into one cell of attention or memory; by default a sixth; the paper takes 10 of 48."""
    return max(1, layers // 6) if window is None else window


def cells_of(structure: Structure, columns: Sequence[Column], kinds: Sequence[str], window: int) -> Iterator[Cell]:
    """All cells of these kinds, layer by layer and column by column; none where a layer has nothing of the kind."""
    if not structure.layers or not structure.streams or not structure.streams[-1].writes:
        raise AnalyzerError(
            f"fmr.locate found no layers with a residual stream in {structure.model}, so there is no state to restore. "
            "Expected a model whose layers add to what they read, such as a transformer."
        )
    for kind in kinds:
        for number in range(len(structure.layers)):
            restored, held = _sites(structure.layers, kind, number, window)
            for place, column in enumerate(columns) if restored else ():
                yield Cell(kind, number, place, *(_at(sites, column.positions) for sites in (restored, held)))


def _sites(layers: Sequence[Layer], kind: str, number: int, window: int) -> tuple[list[Site], list[Site]]:
    """What is restored around a layer, and what is held behind it."""
    if kind.startswith("state"):
        what = kind.removeprefix("state").removeprefix(" without ")
        return [layers[number].resid_post], [site for layer in layers[number + 1 :] for site in _writes(layer, what)]
    first = max(0, number - window // 2)
    return [site for layer in layers[first : number - window // 2 + window] for site in _writes(layer, kind)], []


def _writes(layer: Layer, what: str) -> list[Site]:
    if what == "attention":
        return [block.out for block in layer.attentions if block.out is not None]
    return [block.out for block in layer.mlps] if what == "mlp" else []


def _at(sites: Sequence[Site], positions: Sequence[int]) -> tuple[Site, ...]:
    """Single positions, each a site of its own: what is known of one token's way holds for each of several."""
    return tuple(site.at(positions=place) for site in sites for place in positions)
