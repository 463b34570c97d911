"""Certificates: a finding is recomputed from its parts, in double precision, and compared with what the model computed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fmr.ids import TensorId

TOLERANCE = 1e-4
"""The largest error, relative to the largest value, in float32."""

_COARSE = {torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""The same in half precision: what ten or twenty roundings come to."""


@dataclass(frozen=True)
class Certificate:
    """How far each recomputed value lies from the recorded one: the maximum error relative to the largest value."""

    errors: Mapping[str, float]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        parts = ", ".join(f"{what} {error:.0e}" for what, error in self.errors.items())
        return f"{'certified' if self.ok else 'NOT certified'}: {parts} (tolerance {self.tolerance:.0e})"


def proof(certificate: Certificate | None) -> str:
    """What a certificate says, if there is one."""
    return "not computed" if certificate is None else repr(certificate)


@dataclass(frozen=True)
class Rejected:
    """A candidate that is not claimed, and why."""

    id: TensorId
    what: str
    reason: str

    def __repr__(self) -> str:
        return f"{self.id} is no {self.what}: {self.reason}"


def tolerance_of(*values: Tensor) -> float:
    """What the least precise of these allows: under autocast a pattern is float32 and what it mixes is not."""
    return max(_COARSE.get(value.dtype, TOLERANCE) for value in values)


def error(recomputed: Tensor, recorded: Tensor) -> float:
    """The maximum absolute difference relative to the largest recorded value; infinite where the shapes differ.

    A model may compute NaN (rows that are masked as a whole); then the recomputation must say so too.
    """
    recorded = recorded.detach()
    if recomputed.shape != recorded.shape or not torch.equal(recomputed.isnan(), recorded.isnan()):
        return float("inf")
    finite = torch.isfinite(recorded)
    if not finite.all():  # elsewhere nothing is picked out, which is slow
        recomputed, recorded = recomputed[finite], recorded[finite]
    if not recorded.numel():
        return 0.0
    difference = (recomputed.double() - recorded.double()).abs()
    worst = float(difference.max() / recorded.abs().max().double().clamp(min=1e-12))
    return worst if worst == worst else float("inf")
