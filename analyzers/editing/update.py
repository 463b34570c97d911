"""A rank-one update as numbers: what a key gets of which change, and the weight with it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from analyzers.editing.memories import Values
from analyzers.results import Stored


@dataclass(frozen=True, eq=False)
class Update(Stored):
    """A rank-one update of the values of a memory, which gains the outer product of `direction` and `delta`.

    >>> edit.update.ratio < 4, round(float(edit.update.direction @ edit.update.key), 6)
    (True, 1.0)

    key: (memories,), the mean key of the subject. direction: (memories,), of which a key gets its share of the change, 1
    for the key itself. delta: (units,), the change of what the memory writes for it. parameter, dim, first: where the values
    lie. before, after: p(target) of the prompt as the change was optimised. condition: of the covariance of the keys.
    """

    prompt: str
    subject: str
    target: str
    answer: str
    layer: int
    parameter: str
    dim: int
    first: int
    key: Tensor = field(repr=False)
    direction: Tensor = field(repr=False)
    delta: Tensor = field(repr=False)
    value_norm: float
    weight_norm: float
    clamp: float
    losses: tuple[float, ...] = field(repr=False)
    before: float
    after: float
    tokens: int
    condition: float
    seed: int

    @property
    def ratio(self) -> float:
        """How long the change of the value is, in lengths of the value."""
        return float(self.delta.norm()) / self.value_norm

    @property
    def weight_ratio(self) -> float:
        """How large the change of the matrix is, as a share of the matrix."""
        return float(self.direction.norm() * self.delta.norm()) / self.weight_norm

    @property
    def values(self) -> Values:
        """Where the values lie that are changed."""
        return Values(self.parameter, self.dim, self.first, len(self.key))

    def of(self, weight: Tensor, delta: Tensor | None = None) -> Tensor:
        """A weight with the update in it, in the same type; delta: another change instead."""
        made = weight.detach().to(torch.double, copy=True)
        change = torch.outer(self.direction, self.delta if delta is None else delta)
        self.values.of(made).add_(change.to(made.device))
        return made.to(weight.dtype)
