"""Certificates: a finding is recomputed from its parts, in double precision, and compared with what the model computed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.structure.attention import Attention
from fmr.structure.evaluate import Values, evaluate

TOLERANCE = 1e-4
"""The largest error, relative to the largest value, in float32; half precision is allowed a hundred times more."""


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


def certify_attention(graph: Graph, found: Attention, value: Values) -> Certificate:
    """Recompute the pattern from q, k, mask and scale, z from pattern and v, and the output from the single heads.

    The pattern must also be a distribution: nothing negative, no row above one.
    """
    q, k, pattern, z = (value(name) for name in (found.q, found.k, found.pattern, found.z))
    errors = {
        "pattern": error(evaluate(graph, found.pattern, {found.q: q, found.k: k}, value), pattern),
        "rows": max(float((pattern.double().sum(-1) - 1).clamp(min=0).max()), float((-pattern).clamp(min=0).max())),
        "z": error(evaluate(graph, found.z, {found.pattern: pattern, found.v: value(found.v)}, value), z),
    }
    if found.out is not None:
        errors["out"] = error(_sum_of_heads(graph, found, z, value), value(found.out))
    return Certificate(errors, TOLERANCE if pattern.dtype in (torch.float32, torch.float64) else 100 * TOLERANCE)


def _sum_of_heads(graph: Graph, found: Attention, z: Tensor, value: Values) -> Tensor:
    """The output as the sum of what each head writes alone, plus the bias once."""
    assert found.out is not None
    heads = by_head(z, found.n_heads)
    bias = evaluate(graph, found.out, {found.z: torch.zeros_like(z)}, value)
    total = bias.clone()
    for head in range(found.n_heads):
        alone = torch.zeros_like(heads)
        alone[:, head] = heads[:, head]
        total += evaluate(graph, found.out, {found.z: alone.reshape(z.shape)}, value) - bias
    return total


def by_head(z: Tensor, n_heads: int) -> Tensor:
    """The mixed values with the heads as second dimension, also where they were folded into the batch."""
    return z if z.dim() == 4 else z.reshape(-1, n_heads, *z.shape[1:])


def error(recomputed: Tensor, recorded: Tensor) -> float:
    """The maximum absolute difference relative to the largest recorded value; infinite where the shapes differ."""
    if recomputed.shape != recorded.shape:
        return float("inf")
    difference = (recomputed.double() - recorded.double()).abs()
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.max() / recorded.double().abs().max().clamp(min=1e-12)) if difference.numel() else 0.0

