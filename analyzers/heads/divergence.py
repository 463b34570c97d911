"""Sums over the attention of many heads: Jensen-Shannon divergence of each pair, and where each head looks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from analyzers.protocol import AnalyzerError

COLUMNS = 2048
"""Attention weights of one head taken at a time: a block of them, for all heads, stays in the processor's cache."""

TOGETHER = 64
"""Terms of an entropy that are summed up in the precision that they have."""

FAST = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Where numpy takes the logarithm to the base of 2 in a fifth of the time that torch needs on one thread."""

LOOKS = ("previous", "next", "self", "first", "last")

ATTENTION, BEYOND, OUTPUT, CKA = "attention", "beyond first", "output", "cka"
"""Distances: by attention, by attention to all keys but the first, by what is written, by likeness of what is written."""

DISTANCES = {ATTENTION: "JS divergence in bits", BEYOND: "JS divergence in bits, first token left out",
             OUTPUT: "1 - cosine of outputs", CKA: "1 - CKA of outputs"}  # fmt: skip


@dataclass
class Sums:
    """What was counted of n heads: sums in float64, so that shards add; of each distance, over how many things too."""

    apart: dict[str, Tensor]
    counted: dict[str, int]
    entropy: Tensor
    looks: dict[str, Tensor]
    asked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOOKS, 0))
    tokens: int = 0
    examples: int = 0
    skipped: int = 0

    @classmethod
    def zeros(cls, n: int, distances: Sequence[str] = (ATTENTION,)) -> "Sums":
        nothing = torch.zeros(n, dtype=torch.float64)
        apart = {one: torch.zeros(n, n, dtype=torch.float64) for one in distances}
        return cls(apart, dict.fromkeys(distances, 0), nothing.clone(), {look: nothing.clone() for look in LOOKS})

    def __len__(self) -> int:
        return len(self.entropy)

    def add(self, other: "Sums") -> None:
        for one in self.apart:
            self.apart[one] += other.apart[one]
            self.counted[one] += other.counted[one]
        self.entropy += other.entropy
        for look in LOOKS:
            self.looks[look] += other.looks[look]
            self.asked[look] += other.asked[look]
        self.tokens += other.tokens
        self.examples += other.examples
        self.skipped += other.skipped


def count(patterns: Sequence[Tensor], real: Tensor, smoothing: float, distances: Sequence[str] = (ATTENTION,)) -> Sums:
    """The sums of one batch, of those distances that are of patterns.

    >>> count([torch.eye(5).expand(2, 12, 5, 5)], torch.ones(2, 5, dtype=torch.bool), 0.0).tokens
    10

    patterns: attention weights by layer, (examples, heads, queries, keys). real: which tokens are no padding,
    (examples, positions). smoothing: the share of uniform attention over the real keys mixed into each row.
    """
    sums = Sums.zeros(sum(pattern.shape[1] for pattern in patterns), distances)
    exact = any(pattern.dtype == torch.float64 for pattern in patterns)
    dtype = torch.float64 if exact else torch.float32
    waiting = {one: _Waiting(sums.apart[one], dtype) for one in (ATTENTION, BEYOND) if one in sums.apart}
    for rows, places, n_skipped in _examples(patterns, real):
        sums.skipped += n_skipped
        if not len(places):
            continue
        sums.examples += 1
        sums.tokens += len(places)
        sums.entropy += (_nats(rows).sum((1, 2)) / math.log(2)).cpu()
        _look(sums, rows, places)
        for one, block in waiting.items():
            kept = rows if one == ATTENTION else _beyond(rows, places)
            sums.counted[one] += kept.shape[1]
            block.add((1 - smoothing) * kept + smoothing / max(kept.shape[-1], 1) if smoothing else kept)
    for block in waiting.values():
        block.flush()
    return sums


class _Waiting:
    """Rows that wait until there are enough of them to be compared at once; what no head looks at tells none apart."""

    def __init__(self, total: Tensor, dtype: torch.dtype) -> None:
        self.total, self.dtype, self.rows = total, dtype, list[Tensor]()

    def add(self, rows: Tensor) -> None:
        flat = rows.flatten(1).to(self.dtype)
        self.rows.append(flat[:, (flat != 0).any(0)])
        if sum(block.shape[1] for block in self.rows) >= 2 * COLUMNS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.total += divergences(torch.cat(self.rows, 1))
            self.rows = []


def _beyond(rows: Tensor, places: Tensor) -> Tensor:
    """The rows over all keys but the first, each with the sum 1 again, of those queries of which every head looks there."""
    rest = rows[:, :, 1:][:, (places > 0).to(rows.device)]
    mass = rest.sum(-1, keepdim=True)
    kept = (mass > 0).all(0).flatten()
    return rest[:, kept] / mass[:, kept]


def divergences(weights: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each pair of heads in bits, summed over all their rows: (heads, heads).

    >>> divergences(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)

    weights: (heads, weights), one head's rows one after the other. JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, where
    all sums are taken in the same order: equal heads give exactly 0.

    Source: J. Lin, "Divergence measures based on the Shannon entropy", 1991.
    """
    n, least = len(weights), torch.finfo(weights.dtype).tiny
    total = weights.new_zeros(n, n, dtype=torch.float64)
    room = weights.new_empty(2, n * (COLUMNS + TOGETHER))
    for block in weights.split(COLUMNS, 1):
        half = pad(block, (0, -block.shape[1] % TOGETHER)).clamp_min(4 * least).mul_(0.5)
        mixed, logs = (one[: half.numel()].view_as(half) for one in room)
        own = _negated_entropies(torch.add(half, half, out=mixed), logs).mul_(0.5)
        for i in range(n - 1):
            rest = slice(0, n - 1 - i)
            both = torch.add(half[i], half[i + 1 :], out=mixed[rest])
            total[i, i + 1 :] += own[i + 1 :] + own[i] - _negated_entropies(both, logs[rest])
    return (total + total.T).clamp_(min=0).cpu()


def _negated_entropies(p: Tensor, logs: Tensor) -> Tensor:
    """The sum of p log p of each row, in float64; few at a time are summed up in the precision that they have.

    logs: where the logarithms go, those to the base of 2, of which that of a half is exact.
    """
    if p.device.type == "cpu" and FAST and torch.get_num_threads() < 5:
        np.log2(p.numpy(), out=logs.numpy())
    else:
        torch.log2(p, out=logs)
    few: Tensor = logs.mul_(p).unflatten(1, (-1, TOGETHER)).sum(-1)
    return few.sum(-1, dtype=torch.float64)


def _nats(p: Tensor) -> Tensor:
    """-p log p of each weight, 0 for a weight of 0."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log_().mul_(p).neg_()


def _examples(patterns: Sequence[Tensor], real: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Each example's rows (heads, queries, keys) in float64 over its real keys, their places, and the queries left out.

    A query of which some head keeps no weight on real keys says nothing about that head and is left out for all.
    """
    for e in range(len(real)):
        places = real[e].nonzero().flatten()
        rows = torch.cat([_wide(pattern[e])[:, places][:, :, places] for pattern in patterns])
        mass = rows.sum(-1, keepdim=True)
        if not bool(mass.isfinite().all()):
            raise AnalyzerError(
                f"Example {e} has attention weights that are not finite. Expected probabilities: run the model in float32, "
                f"and give it an attention mask in which each real token may attend to something."
            )
        if rows.numel() and float(rows.amin()) < 0:
            raise AnalyzerError(
                f"Example {e} has negative attention weights. Expected probabilities: patterns as after the softmax."
            )
        kept = (mass > 0).all(0).flatten().nonzero().flatten()
        yield rows[:, kept] / mass[:, kept], kept.cpu(), len(places) - len(kept)


def _wide(pattern: Tensor) -> Tensor:
    """The pattern in float64, on the CPU where its own device has none."""
    return pattern.detach().to("cpu" if pattern.device.type == "mps" else pattern.device).double()


def _look(sums: Sums, rows: Tensor, places: Tensor) -> None:
    """Add the weight that each head gives to the neighbours, to the token itself and to the ends."""
    n = rows.shape[-1]
    for look, keys in {
        "previous": places - 1,
        "next": places + 1,
        "self": places,
        "first": 0 * places,
        "last": 0 * places + n - 1,
    }.items():
        there = ((keys >= 0) & (keys < n)).nonzero().flatten()
        sums.looks[look] += rows[:, there, keys[there]].sum(1).cpu()
        sums.asked[look] += len(there)
