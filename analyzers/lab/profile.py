"""What work takes: time, memory and FLOPs by module and op, parts that add up to the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from analyzers.lab.errors import LabError
from analyzers.numbers.embed import Floats, Ints
from analyzers.results import Stored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

ROOT, BETWEEN = "(root)", "(between ops)"


@dataclass(frozen=True, eq=False)
class Profile(Stored):
    """Time, memory and FLOPs of some work, in parts that do not overlap and add up to the whole.

    >>> profile = lab.profile(**inputs)
    >>> round(float(profile.seconds.sum()) / profile.whole, 6)
    1.0
    >>> profile.table("op").head(1)[["op", "flops"]]
    >>> profile.plot().savefig("flame.png")

    One entry for each op below each stack of module calls. stacks: paths of the modules that were being called, outermost
    first, joined by ";". ops: names of torch's ops, or "(between ops)": Python, and what the profiler itself takes. calls;
    seconds: of the op itself, without those it calls, on the thread of the work; device_seconds: on a GPU; memory: bytes
    taken, on any device, of which some are given back; flops: as torch counts them, 2 for a multiplication with an
    addition; products and convolutions count, what goes number by number does not, and neither do kernels without a
    formula (quantised and bilinear ones, transforms, decompositions). whole: seconds; peak: of memory, in
    bytes above what there was at the begin.
    """

    stacks: tuple[str, ...] = field(repr=False)
    ops: tuple[str, ...] = field(repr=False)
    calls: Ints
    seconds: Floats
    device_seconds: Floats
    memory: Ints
    flops: Ints
    whole: float
    peak: int

    @property
    def modules(self) -> list[str]:
        """By entry, the path of the innermost module; empty outside of all modules."""
        return [stack.rpartition(";")[2] for stack in self.stacks]

    def table(self, by: str | None = "module") -> DataFrame:
        """One row a module, an op, or with None each op below each stack of calls; what took most time first.

        >>> profile.table("module").columns[:4].tolist()
        ['module', 'calls', 'seconds', 'share']

        by: "module", "op" or None. Rows add up to the whole; `with_inner` are the seconds of a module with all it calls.
        """
        import pandas as pd

        numbers = ["calls", "seconds", "share", "device_seconds", "memory", "flops"]
        frame = pd.DataFrame({"stack": self.stacks, "module": self.modules, "op": self.ops})
        for name in ("calls", "seconds", "device_seconds", "memory", "flops"):
            frame[name] = getattr(self, name)
        frame["share"] = frame["seconds"] / self.whole
        if by is None:
            return frame[["stack", "op", *numbers]].sort_values("seconds", ascending=False, ignore_index=True)
        if by not in ("module", "op"):
            raise LabError(f"by={by!r}: expected 'module', 'op', or None for each op below each stack of calls.")
        if by == "module":
            frame["calls"] = frame["calls"].where(frame["op"] == BETWEEN, 0)
        table = frame.groupby(by, sort=False)[numbers].sum().reset_index()
        if by == "module":
            inside = [set(stack.split(";")) for stack in self.stacks]
            table["with_inner"] = [self.seconds[[one in paths for paths in inside]].sum() for one in table["module"]]
            table.loc[table["module"] == "", "with_inner"] = self.whole
        return table.sort_values("seconds", ascending=False, ignore_index=True)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw where the time goes as a flame: modules on what calls them, ops uppermost, as wide as their seconds.

        >>> profile.plot().savefig("flame.png")
        """
        from analyzers.lab.flame import draw

        return draw(self, ax)

    def __repr__(self) -> str:
        head = f"Profile: {self.whole * 1e3:.3g} ms, {self.flops.sum():,} FLOPs, {self.peak:,} bytes at the peak"
        lines = []
        for by in ("module", "op"):
            top = self.table(by).head(3)
            told = ", ".join(f"{name or 'outside'} {share:.0%}" for name, share in zip(top[by], top["share"], strict=True))
            lines.append(f"  by {by}, each by itself: {told}")
        return "\n".join([head, *lines])
