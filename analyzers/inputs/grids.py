"""Where the patches of a picture stand among positions: measured, read off the graph, or told."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from analyzers.images.viewing import View
from analyzers.inputs.rollout import grid_of
from analyzers.lenses.opening import rows_of
from analyzers.protocol import AnalyzerError
from fmr.errors import whole_number
from fmr.ids import Site
from fmr.runs.run import Run
from fmr.structure.parts import Structure


class Grid(NamedTuple):
    """Where patches stand among the positions: the first of them, how many rows, and how many to a row."""

    first: int
    rows: int
    columns: int

    @property
    def positions(self) -> slice:
        """The positions that are patches."""
        return slice(self.first, self.first + self.rows * self.columns)


def grid_in(view: View, image: Tensor, structure: Structure, run: Run, positions: int, asked: Any) -> Grid:
    """Where the patches are: as a change of an image (1, ...) shows, as the graph tells, or else as is said."""
    found = measured(view, image, structure)
    if found is None and (told := grid_of(run.graph, positions)) is not None:
        found = Grid(*told)
    if asked is None:
        if found is None:
            raise AnalyzerError(
                f"Which of {positions} positions are patches, the graph does not tell. Expected grid=(rows, columns) of the "
                "patches, which are the last positions."
            )
        return found
    sides = [whole_number(one) for one in asked] if isinstance(asked, (tuple, list)) else []
    rows, columns = sides if len(sides) == 2 else (None, None)
    if rows is None or columns is None or min(rows, columns) < 1 or rows * columns > positions:
        raise AnalyzerError(f"grid={asked!r}: expected rows and columns of patches, at most {positions} in all.")
    if found is not None and (rows, columns) != found[1:]:
        raise AnalyzerError(
            f"grid={asked!r}: {structure.model} has {found.rows} rows of {found.columns} patches, from position "
            f"{found.first} on. Leave grid= out."
        )
    return found or Grid(positions - rows * columns, rows, columns)


def measured(view: View, image: Tensor, structure: Structure) -> Grid | None:
    """The positions of the stream, before its first layer, that the corners of an image come to; None where not one each."""
    site = structure.layers[0].resid_pre if structure.layers else None
    if site is None:
        return None
    plain = _before(view, image, site, structure.model)
    corners = []
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        other = image.clone()
        other[..., row, column] = (other[..., row, column] + 0.5) % 1
        moved = (_before(view, other, site, structure.model) != plain).any(-1)[0].nonzero()
        if len(moved) != 1:
            return None
        corners.append(int(moved))
    first, right, below, last = corners
    columns = right - first + 1
    rows = (below - first) // max(1, columns) + 1
    if columns < 1 or (rows - 1) * columns != below - first or rows * columns != last - first + 1:
        raise AnalyzerError(
            f"The patches of {structure.model} do not stand row by row: those in the corners of a picture are at positions "
            f"{', '.join(map(str, corners))}. Expected such, of which a map can be laid over the picture."
        )
    return Grid(first, rows, columns)


def _before(view: View, image: Tensor, site: Site, model: str) -> Tensor:
    """What stands at a point of the stream for one image, (1, positions, width)."""
    with torch.no_grad():
        run = view.run(view.inputs(image), [Site(site.id)])
    return rows_of(run[site.id].detach(), 1, model, site.layout)
