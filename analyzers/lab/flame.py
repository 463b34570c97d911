"""A profile as a flame picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from analyzers.lab.profile import BETWEEN, Profile
from fmr.pictures.heatmap import pyplot, returned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODULE, OP, INK = ("#F4A259", "#E8743B"), ("#FBE3C8", "#F9D5AE"), "#333333"
LETTER = 0.075  # inches of a letter
WIDE = 12.0


@dataclass
class _Part:
    """A module call or an op: its seconds with all above it, and what lies above it."""

    name: str
    is_op: bool
    seconds: float = 0.0
    above: dict[str, _Part] = field(default_factory=dict)


def tree_of(profile: Profile) -> _Part:
    """The entries of a profile as parts within parts."""
    root = _Part("all", False)
    for stack, op, seconds in zip(profile.stacks, profile.ops, profile.seconds, strict=True):
        here = root
        here.seconds += seconds
        for path in stack.split(";") if stack else ():
            here = here.above.setdefault(path, _Part(path, False))
            here.seconds += seconds
        if op != BETWEEN:
            above = here.above.setdefault(op, _Part(op, True))
            above.seconds += seconds
    return root


def _depth(part: _Part) -> int:
    return 1 + max(map(_depth, part.above.values()), default=0)


def draw(profile: Profile, ax: Axes | None) -> Figure:
    """Each part a bar on the bar of what called it."""
    root = tree_of(profile)
    figure, axes = canvas(ax, WIDE, 1.0 + 0.32 * _depth(root))
    _bars(axes, root, "", 0.0, 0, WIDE / max(profile.whole, 1e-9))
    axes.set_xlim(0, profile.whole * 1e3)
    axes.set_ylim(-0.5, _depth(root) - 0.5)
    axes.set_yticks([])
    axes.set_xlabel("milliseconds, of all calls of one path together")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    return returned(figure) if ax is None else figure


def canvas(ax: Axes | None, wide: float, high: float) -> tuple[Figure, Axes]:
    """The axes that were given, or new ones of so many inches, and their figure."""
    if ax is not None:
        return cast("Figure", ax.figure), ax
    return cast("tuple[Figure, Axes]", pyplot().subplots(figsize=(wide, high), layout="constrained"))


def _bars(axes: Axes, part: _Part, parent: str, start: float, depth: int, scale: float) -> None:
    colours = OP if part.is_op else MODULE
    axes.barh(
        depth, part.seconds * 1e3, left=start * 1e3, height=0.92, color=colours[depth % 2], edgecolor="white", linewidth=0.4
    )
    name = part.name.removeprefix(f"{parent}.").removeprefix("aten::") if parent else part.name.removeprefix("aten::")
    if part.seconds * scale > LETTER * (len(name) + 1):
        axes.text((start + part.seconds / 2) * 1e3, depth, name, ha="center", va="center", fontsize=8, color=INK)
    for one in part.above.values():
        _bars(axes, one, part.name, start, depth + 1, scale)
        start += one.seconds
