"""What units do on data: how large what they hand on is, and which of them rise and fall together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analyzers.networks.follow import Following
from analyzers.networks.layout import Laid
from analyzers.numbers.embed import Floats, Ints
from analyzers.protocol import AnalyzerError
from fmr.ids import TensorId


class Gauge(NamedTuple):
    """Where units are read: a value, how a projection lays its units out, and which unit each column is; -1 for none."""

    value: TensorId
    layer: TensorId
    laid: Laid
    units: Ints
    made: bool

    def rows(self, value: Tensor) -> Tensor:
        """The value of each unit, (positions of all examples, columns), in double precision."""
        found = self.laid.results(value) if self.made else self.laid.rows(value)
        return found.flatten(1).double()


@dataclass
class Sums:
    """What was counted: examples, the means of units over them and their products about these (both may be empty), and for
    each gauge the sum of squares of each column, and the positions that it is of."""

    examples: int
    means: Tensor
    products: Tensor
    squares: list[Tensor]
    positions: list[float]

    def add(self, other: "Sums") -> None:
        """Count what other examples came to."""
        total = self.examples + other.examples
        apart = other.means - self.means
        self.products = self.products + other.products + torch.outer(apart, apart) * (self.examples * other.examples / total)
        self.means = self.means + apart * (other.examples / total)
        self.squares = [mine + theirs for mine, theirs in zip(self.squares, other.squares, strict=True)]
        self.positions = [mine + theirs for mine, theirs in zip(self.positions, other.positions, strict=True)]
        self.examples = total

    def correlations(self) -> Floats:
        """How strongly units go together, without the sign: (units, units); 0 for a unit that never changes."""
        spread = self.products.diagonal().clamp_min(0).sqrt()
        alive = spread > 1e-12 * spread.max().clamp_min(1e-300)
        scale = torch.where(alive, 1 / spread.clamp_min(1e-300), 0.0)
        found: Floats = (self.products * scale[:, None] * scale).abs().clamp(max=1).fill_diagonal_(0).numpy()
        return found


def gauges(found: Following, roots: Ints) -> list[Gauge]:
    """Where to read each unit of a network: as it is made, and as each layer reads it."""
    made, read = [], []
    for edges in found.edges:
        if edges.laid is None or edges.group:
            continue
        group = [one for one in found.edges if one.node == edges.node]
        targets, sources = (np.concatenate([getattr(one, end) for one in group]) for end in ("targets", "sources"))
        made.append(Gauge(edges.node, edges.node, edges.laid, _numbers(found, targets, roots), True))
        read.append(Gauge(edges.read, edges.node, edges.laid, _numbers(found, sources, roots), False))
    return [*made, *read]


def _numbers(found: Following, units: Ints, roots: Ints) -> Ints:
    """The number in the network of each unit; -1 for none."""
    mine = found.units.roots(units.copy())
    return np.where(mine > 0, np.searchsorted(roots, mine), -1)


def counted(
    places: Sequence[Gauge],
    value: Callable[[TensorId], Tensor],
    units: int,
    examples: int,
    real: Tensor | None,
    *,
    pairs: bool,
) -> Sums:
    """What one batch comes to.

    real: (examples, positions), which are no padding; None where all are. pairs: whether units are held against each other,
    each as its mean over the positions of an example, as the last layer that reads it reads it.
    """
    samples = torch.zeros(examples, units if pairs else 0, dtype=torch.float64)
    squares, positions = [], []
    for place in places:
        rows = place.rows(value(place.value).detach()).cpu()
        each = rows.reshape(examples, -1, rows.shape[1])
        weights = torch.ones(each.shape[:2], dtype=torch.float64)
        if real is not None and real.shape == each.shape[:2]:
            weights = real.double()
        if pairs:
            samples = _put(samples, torch.einsum("epc,ep->ec", each, weights) / weights.sum(1, keepdim=True), place.units)
        squares.append(torch.einsum("epc,ep->c", each.square(), weights))
        positions.append(float(weights.sum()))
    means = samples.mean(0)
    apart = samples - means
    return Sums(examples, means, apart.T @ apart, squares, positions)


def _put(samples: Tensor, columns: Tensor, units: Ints) -> Tensor:
    """The mean of its columns for each unit that has some."""
    at = torch.as_tensor(units)
    columns, at = columns[:, at >= 0], at[at >= 0]
    counts = torch.bincount(at, minlength=samples.shape[1])
    sums = torch.zeros_like(samples).index_add_(1, at, columns)
    return torch.where(counts > 0, sums / counts.clamp_min(1), samples)


def check_examples(places: Sequence[Gauge], value: Callable[[TensorId], Tensor], given: Tensor | None) -> None:
    """Raise where a value that units are read in does not count the examples first."""
    if given is None or not given.dim():
        raise AnalyzerError("The inputs hold no tensor that counts examples. Expected (examples, ...) for a graph of data.")
    for place in places:
        shape = tuple(value(place.value).shape)
        if not shape or shape[0] % len(given):
            raise AnalyzerError(
                f"{place.value} has shape {shape}, whose first dimension does not count the {len(given)} examples of the "
                f"inputs. Expected examples first in inputs and values, or graph='weights', which needs no data."
            )


def root_mean_squares(found: Following, places: Sequence[Gauge], sums: Sums) -> list[Floats]:
    """For each of the edges how large what is read of each source is."""
    counts = zip(places, sums.squares, sums.positions, strict=True)
    read = {place.layer: (squares / many).sqrt() for place, squares, many in counts if not place.made}
    sizes = []
    for edges in found.edges:
        assert edges.laid is not None  # check_examples
        groups, _, wide = edges.laid.shape
        sizes.append(np.asarray(read[edges.node].reshape(groups, wide)[edges.group], dtype=np.float64))
    return sizes


def first_tensor(inputs: Any) -> Tensor | None:
    """The first tensor of some inputs."""
    if isinstance(inputs, Tensor):
        return inputs
    parts = inputs.values() if hasattr(inputs, "values") else inputs if isinstance(inputs, (tuple, list)) else ()
    return next((part for part in parts if isinstance(part, Tensor)), None)
