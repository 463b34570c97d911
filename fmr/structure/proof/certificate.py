"""Certificates: a finding is recomputed from its parts, in double precision, and compared with what the model computed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.normal.match import depends_on

TOLERANCE = 1e-4
"""The largest error, relative to the largest value, in float32."""

_COARSE = {torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""The same in half precision: what ten or twenty roundings come to."""


MEANS = {
    "pattern": "its pattern is not what its queries and keys make when they are multiplied again",
    "rows": "its weights are no distribution: some are negative, or those of a query do not add up to one",
    "z": "what it mixes is not its pattern times its values",
    "difference": "what it mixes is not the difference of its two patterns times its values",
    "heads": "its heads are not apart: without the pattern of the last one, what others mix changes",
    "layout": "its dimensions do not count what they should: one query or key moves scores of others",
    "out": "its output is not the sum of what its parts write",
    "post": "its coefficients are not what comes of the value that it reads",
    "places": "its coefficients are made of other positions, too: they follow what was changed there",
    "keys": "what its first projection makes is not its keys times the value that it reads",
    "mixed": "what it writes is not what comes of its inputs",
    "inputs": "what it writes is made of more than its inputs, or one of them does not go in",
    "reach": "positions do not hear one another as is said",
    "written": "what it writes is moved or lost on the way to the sum",
    "through": "positions hear one another past what is mixed",
    "after": "what it mixes is mixed again, in another way",
    "examples": "what it writes of one example is made of others, too",
    "gates": "a gate acts at other positions than its own",
    "state": "what one position makes of another does not go through its states alone",
    "multiplied": "what is multiplied is bent before",
    "weights": "its weights are not what comes of its scores",
    "sum": "what is written is not the sum of what each expert writes with its weight",
    "experts": "with the weight of one expert alone others matter, or it does not",
    "tokens": "a weight of a token does not count for what is written there, as where experts take no more tokens than fit",
    "writes": "a sum is not the value before plus what is added",
    "q": "its queries are not what its weights make",
    "k": "its keys are not what its weights make",
    "v": "its values are not what its weights make",
    "q.k": "its queries and keys do not count their units alike",
}
"""What it means that a proof fails."""


@dataclass(frozen=True)
class Certificate:
    """How far each recomputed value lies from the recorded one: the maximum error relative to the largest value."""

    errors: Mapping[str, float]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())

    @property
    def why(self) -> str:
        """Which proofs failed, what that means, and by how much; empty where none did."""
        failed = ((MEANS[what], off) for what, off in self.errors.items() if not off <= self.tolerance)
        allowed = f"of the largest value, where {self.tolerance:.0e} is allowed"
        return "; ".join(f"{words}{f' (off by {off:.0e} {allowed})' * math.isfinite(off)}" for words, off in failed)

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


def unmade(graph: Graph, pairs: Iterable[tuple[TensorId, TensorId]]) -> str:
    """Which value is said to be computed from another one and is not; empty where all are."""
    wrong = ((lower, higher) for lower, higher in pairs if lower == higher or not depends_on(graph, lower, higher))
    return next((f"{lower} is not computed from {higher}" for lower, higher in wrong), "")


def tolerance_of(*values: Tensor) -> float:
    """What the least precise of these allows: under autocast a pattern is float32 and what it mixes is not."""
    return max(_COARSE.get(value.dtype, TOLERANCE) for value in values)


def error(recomputed: Tensor, recorded: Tensor) -> float:
    """The maximum absolute difference relative to the largest recorded value; infinite where the shapes differ.

    A model may compute NaN (rows that are masked as a whole); then the recomputation must say so too.
    """
    recorded = recorded.detach()
    if recomputed.shape != recorded.shape:
        return float("inf")
    worst = _worst(recomputed, recorded)
    if math.isfinite(worst):
        return worst
    if not torch.equal(recomputed.isnan(), recorded.isnan()):
        return float("inf")
    finite = torch.isfinite(recorded)
    worst = _worst(recomputed[finite], recorded[finite])
    return worst if worst == worst else float("inf")


def _worst(recomputed: Tensor, recorded: Tensor) -> float:
    return largest(recomputed.double() - recorded) / max(largest(recorded), 1e-12)


def largest(value: Tensor) -> float:
    """The largest number of a value, whatever its sign: NaN where one of them is, and 0 where there are none."""
    return abs(max(-float(value.min()), float(value.max()))) if value.numel() else 0.0
