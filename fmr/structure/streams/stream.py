"""One residual stream: the values that it takes, who writes to it and who reads it, and the proof of each write."""

from dataclasses import dataclass
from typing import NamedTuple

from fmr.errors import number_of
from fmr.ids import TensorId
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.proof.certificate import TOLERANCE, Certificate, error, tolerance_of
from fmr.structure.proof.evaluate import Values, check_run, own_work


class Write(NamedTuple):
    """One add of a stream: `before` it, what is `added`, `times` how often, and the sum `after`.

    `origin` is the value of the stream that the write begins with: `before` itself, where that is not a gated share or a
    projection of it.
    """

    before: TensorId
    added: TensorId
    after: TensorId
    origin: TensorId
    times: float = 1.0


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream: its values in order, each write, and who wrote it; a plain stack of layers has no writes.

    `points` are the values that the stream takes, from the embedding to the final norm, normalised ones included; of a
    stack those that each of its layers reads: no data goes past any of them. `writers` are the values that each write adds,
    `readers` what reads each point.
    """

    writes: tuple[Write, ...]
    points: tuple[TensorId, ...]
    final_norm: TensorId | None
    writers: tuple[tuple[TensorId, ...], ...] = ()
    readers: tuple[tuple[TensorId, ...], ...] = ()

    def check(self, run: Run | Pass) -> Certificate:
        """Compare each write with the difference that it makes in another run of the same code."""
        check_run(run)
        with own_work():
            return certify_stream(self, run.__getitem__)

    def __repr__(self) -> str:
        if not self.writes:
            return f"no writes, a plain stack of {len(self.points)} states from {self.points[0]} to {self.points[-1]}"
        return f"{number_of(len(self.writes), 'write')} from {self.points[0]} to {self.points[-1]}"


def certify_stream(stream: Stream, value: Values) -> Certificate:
    """Compare each write with the difference that it makes."""
    worst, tolerance = 0.0, TOLERANCE
    for write in stream.writes:
        before, added, after = (value(name) for name in (write.before, write.added, write.after))
        worst = max(worst, error(before.double() + write.times * added.double(), after))
        tolerance = max(tolerance, tolerance_of(before, added, after))
    return Certificate({"writes": worst}, tolerance)
