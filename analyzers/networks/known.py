"""What is known of a value: the unit of each of its numbers; and what projections leave behind: edges between units."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from analyzers.networks.layout import Laid
from analyzers.numbers.embed import Floats, Ints
from fmr.ids import TensorId


@dataclass
class Edges:
    """The weights of one projection, or of one group of it: (targets, sources), each the size of what lies between.

    gain: (sources,), what scales lie between a unit and what is read of it. `read` is what the projection reads, `node` what
    it makes, `laid` where units are in both, None for rows that are sent to experts, `group` which of its groups this is.
    """

    node: TensorId
    read: TensorId
    scope: str
    targets: Ints
    sources: Ints
    weights: Floats
    gain: Floats
    laid: Laid | None
    group: int


class Known(NamedTuple):
    """The unit of each number of a value, what scales lie between unit and value, and the edges that just made it."""

    units: Tensor
    gain: Tensor | None = None
    fresh: tuple[int, ...] = ()
