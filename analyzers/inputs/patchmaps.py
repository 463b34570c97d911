"""Where heads look over the patches of pictures, and which class each patch speaks for: numbers, and pictures of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from analyzers.inputs.rollout import rollout
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of, whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

KINDS = ("attention", "rollout", "classes")


@dataclass(frozen=True, eq=False)
class PatchMaps(Stored):
    """What a vision transformer does at each patch of a picture.

    >>> patchmaps.rollout.shape, patchmaps.seen_from(0, None).shape
    (torch.Size([2, 2, 2]), torch.Size([2, 2, 2, 2]))

    images: from 0 to 1. grid: rows and columns of patches, which begin at position `first`. attention: by layer, (images,
    heads, queries, keys) over all positions. Of each patch after each layer, (layers, images, rows, columns): probability
    of the class of `answers`, other, of the one of `others`, which is the null, and top, the class it speaks for most.
    why: where there are none of these, the reason.
    """

    model: str
    images: Tensor = field(repr=False)
    grid: tuple[int, int]
    first: int
    attention: dict[str, Tensor] = field(repr=False)
    points: tuple[str, ...]
    probability: Tensor = field(repr=False)
    other: Tensor = field(repr=False)
    top: Tensor = field(repr=False)
    answers: tuple[int, ...]
    others: tuple[int, ...]
    why: str
    seed: int

    @property
    def rollout(self) -> Tensor:
        """How much of each patch reaches the first position, or, where that is one, all of them, (images, rows, columns)."""
        through = rollout(list(self.attention.values()))
        return self._over(through[:, 0] if self.first else through.mean(1))

    def seen_from(self, layer: int, query: Any = None) -> Tensor:
        """How much each head looks at each patch, (images, heads, rows, columns).

        >>> patchmaps.seen_from(-1, (0, 1)).sum((-2, -1)) <= 1
        tensor([[True, True],
                [True, True]])

        query: from the patch in a row and a column, or from a position; None for the first position, which is the class
        token of most models, and where that is a patch for the mean of all.
        """
        names = list(self.attention)
        number = whole_number(layer)
        if number is None or not -len(names) <= number < len(names):
            raise AnalyzerError(f"layer={layer!r}: expected 0 to {len(names) - 1}.")
        pattern = self.attention[names[number]]
        if query is None and not self.first:
            return self._over(pattern.mean(2))
        return self._over(pattern[:, :, self._position(query)])

    def table(self) -> DataFrame:
        """One row a head: how far it looks from a patch, in patches, what goes to other tokens, and its entropy in bits.

        >>> patchmaps.table()[["layer", "head", "distance", "distance alike"]]

        Means over images and patches. distance: to the patches that it looks at, by weight; "alike" is what a head comes to
        that looks at all positions alike.
        """
        import pandas as pd

        (rows, columns), patches = self.grid, self._patches
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
        apart = torch.cdist(places, places)
        found = []
        for layer, pattern in self.attention.items():
            own = pattern.double()[:, :, patches]
            shares = own[..., patches]
            far = (shares * apart).sum(-1) / shares.sum(-1).clamp(min=1e-12)
            bits = torch.special.entr(own).sum(-1) / torch.tensor(2.0).log()
            positions = pattern.shape[-1]
            alike = {"distance alike": float(apart.mean()), "elsewhere alike": 1 - rows * columns / positions}
            for head in range(pattern.shape[1]):
                told = {
                    "distance": far[:, head].mean(),
                    "elsewhere": 1 - shares[:, head].sum(-1).mean(),
                    "bits": bits[:, head].mean(),
                }
                found.append({"layer": layer, "head": head, **{name: float(one) for name, one in told.items()}, **alike})
        return pd.DataFrame(found)

    def plot(
        self, kind: str = "attention", *, layer: int = -1, query: Any = None, example: int = 0, ax: Axes | None = None
    ) -> Figure:
        """Draw one picture under a map of its patches for each head of a layer, or for each layer.

        >>> patchmaps.plot().savefig("heads.png")
        >>> patchmaps.plot("classes").savefig("classes.png")

        kind: "attention", a panel for each head; "classes", the probability of the answer, a panel for each layer; or
        "rollout". layer, query: of "attention", as for `seen_from`. example: which picture. ax: where to draw the first
        panel alone.
        """
        from analyzers.inputs.pictures import draw_patches
        from fmr.pictures.heatmap import returned

        if kind not in KINDS:
            raise AnalyzerError(f"kind={kind!r}: expected one of {', '.join(map(repr, KINDS))}.")
        number = whole_number(example)
        if number is None or not 0 <= number < len(self.images):
            raise AnalyzerError(f"example={example!r}: expected 0 to {len(self.images) - 1}.")
        if kind == "classes" and self.why:
            raise AnalyzerError(f"No class was read in the patches: {self.why}.")
        figure = draw_patches(self, kind, layer, query, number, ax)
        return returned(figure) if ax is None else figure

    def __repr__(self) -> str:
        many, layers = number_of(len(self.images), "image"), number_of(len(self.attention), "layer")
        lines = [f"PatchMaps of {self.model}: {many} of {self.grid[0]} x {self.grid[1]} patches, {layers}"]
        if self.why:
            return "\n".join([*lines, f"  no class is read in patches: {self.why}"])
        for place in sorted({0, len(self.points) // 2, len(self.points) - 1}):
            right = (self.top[place] == torch.tensor(self.answers)[:, None, None]).double().mean()
            lines.append(
                f"  layer {self.points[place]}: the answer is on top in {right:.0%} of the patches, its probability "
                f"{self.probability[place].mean():.3g}; of another class {self.other[place].mean():.3g}"
            )
        return "\n".join(lines)

    @property
    def _patches(self) -> slice:
        return slice(self.first, self.first + self.grid[0] * self.grid[1])

    def _over(self, positions: Tensor) -> Tensor:
        """Numbers of all positions (..., positions) as those of the patches (..., rows, columns)."""
        found: Tensor = positions[..., self._patches].unflatten(-1, self.grid)
        return found

    def _position(self, query: Any) -> int:
        """The position of a patch, or a position as it is."""
        if query is None:
            return 0
        many = next(iter(self.attention.values())).shape[-1]
        place = [whole_number(one) for one in query] if isinstance(query, (tuple, list)) else [whole_number(query)]
        match place:
            case [int(row), int(column)] if 0 <= row < self.grid[0] and 0 <= column < self.grid[1]:
                return self.first + row * self.grid[1] + column
            case [int(position)] if 0 <= position < many:
                return position
        raise AnalyzerError(
            f"query={query!r}: expected a row and a column of {self.grid[0]} x {self.grid[1]} patches, or a position from "
            f"0 to {many - 1}."
        )
