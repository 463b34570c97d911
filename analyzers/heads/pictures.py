"""Pictures of jobs and of composition: each score beside what chance gives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from analyzers.heads.jobs import COPYING, NAMING, RECEIVER
from analyzers.heads.scatter import COLOURS, INK, PALE, TAG
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.heads.compositions import Compositions
    from analyzers.heads.jobs import HeadJobs

NULL = "#b9b9b9"
NAMED, BARS, FIRST, WIDE = 3, 12, 5, 80
"""How many heads of a job have their names in the picture, how many writers of a reader, and how many pairs in how many
letters."""


def jobs(result: "HeadJobs", ax: "Axes | None", job: str | None) -> "Figure":
    """All jobs as strips of heads beside their nulls, or one job as a map."""
    import matplotlib.pyplot as plt

    if job is not None:
        return _job_map(result, job, ax)
    looks = [one for one in result.nulls if one not in (COPYING, NAMING, RECEIVER)]
    rest = [one for one in (COPYING, NAMING) if one in result.nulls]
    if ax is not None:
        _strips(result, looks, ax, "share of the attention")
        return cast("Figure", ax.figure)
    ratios = [len(looks), *(1.25 for _ in rest)]
    figure, made = plt.subplots(
        1, 1 + len(rest), figsize=(1.5 * sum(ratios) + 1.2, 4.6), squeeze=False, layout="constrained", width_ratios=ratios
    )
    _strips(result, looks, made[0, 0], "share of the attention")
    for one, axis in zip(rest, made[0, 1:], strict=True):
        _strips(result, [one], axis, "eigenvalues: sum / sum of sizes" if one == COPYING else "logit of the receiver")
    first, second = result.losses
    loss = f"; loss {first:.2f}, and {second:.2f} where they come again" if first == first else ""
    text = f"{result.examples} x {result.length} random tokens twice{loss}; grey: the null of each head"
    figure.suptitle(
        f"{number_of(len(result.heads), 'head')} of {result.model}, by job", x=0.01, ha="left", fontsize=12, color=INK
    )
    made[0, 0].set_title(text, loc="left", fontsize=8, color=INK)
    _layers(made[0, -1], max(layer for layer, _ in result.heads))
    return figure


def _strips(result: "HeadJobs", named: Sequence[str], ax: "Axes", label: str) -> None:
    """For each job the nulls in grey and beside them the scores, coloured by layer."""
    layers = np.array([layer for layer, _ in result.heads])
    spread = np.random.default_rng(0).uniform(-0.13, 0.13, len(layers))
    for place, job in enumerate(named):
        null, score, has = result.null(job), result.score(job), result.has(job)
        ax.scatter(place - 0.22 + spread, null, s=9, color=NULL, linewidths=0, zorder=2)
        colour: dict[str, Any] = {"cmap": COLOURS, "vmin": 0, "vmax": max(1, layers.max())}
        edges = [INK if one else "none" for one in has]
        ax.scatter(
            place + 0.14 + spread,
            score,
            c=layers,
            s=np.where(has, 20, 9),
            edgecolors=edges,
            linewidths=0.5,
            zorder=3,
            **colour,
        )
        _names(ax, [(place + 0.3, float(score[i]), result.names[i]) for i in np.argsort(-score) if has[i]][:NAMED])
    ax.set_xticks(range(len(named)), [job.replace(" ", "\n") for job in named], fontsize=8.5, color=INK)
    ax.set_xlim(-0.5, len(named) - 0.3)
    ax.axhline(0, color=PALE, linewidth=0.6, zorder=1)
    _plain(ax, label)


def _names(ax: "Axes", placed: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points, each below the one before where they would meet."""
    low, high = ax.get_ylim()
    last, step = float("inf"), 0.045 * max(high - low, 1e-9)
    for x, y, name in placed:
        last = min(y, last - step)
        ax.annotate(name, (x, last), fontsize=7, color=TAG, va="center", zorder=4)


def _plain(ax: "Axes", label: str) -> None:
    ax.set_ylabel(label, fontsize=8.5, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(PALE)
    ax.tick_params(colors=INK, color=PALE, labelsize=8)


def _layers(ax: "Axes", most: int) -> None:
    """The scale of the layers."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers = ScalarMappable(Normalize(0, max(1, most)), COLOURS)
    whole = range(0, most + 1, -(-(most + 1) // 12))
    bar = ax.figure.colorbar(layers, ax=ax, shrink=0.7, pad=0.05, aspect=18, ticks=whole)
    bar.set_label("layer", fontsize=8.5)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)


def _job_map(result: "HeadJobs", job: str, ax: "Axes | None") -> "Figure":
    """Layers up, heads across; beside it the null on the same scale."""
    import matplotlib.pyplot as plt

    score, null = result.score(job), result.null(job)
    rows, columns = (max(one[n] for one in result.heads) + 1 for n in (0, 1))
    if ax is None:
        size = (2.2 + 0.36 * columns * 2, 1.4 + 0.2 * rows)
        _, made = plt.subplots(1, 2, figsize=(max(size[0], 5.0), max(size[1], 3.0)), layout="constrained", sharey=True)
        axes: list[Axes] = list(made)
    else:
        axes = [ax]
    signed = float(min(np.nanmin(score), np.nanmin(null))) < -0.05
    most = float(np.nanmax(np.abs(score))) or 1.0
    scale: dict[str, Any] = (
        {"cmap": "PuOr_r", "vmin": -most, "vmax": most} if signed else {"cmap": COLOURS, "vmin": 0, "vmax": most}
    )
    for axis, values, title in zip(axes, (score, null), (job, "null"), strict=False):
        grid = np.full((rows, columns), np.nan)
        grid[tuple(np.array(result.heads).T)] = values
        image = axis.imshow(grid, origin="lower", aspect="auto", interpolation="nearest", **scale)
        axis.set_title(title, fontsize=10, loc="left", color=INK)
        axis.set_xlabel("head", fontsize=8.5, color=INK)
        axis.set_xticks(range(0, columns, max(1, columns // 12)))
        axis.tick_params(labelsize=8, length=2, colors=INK)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("layer", fontsize=8.5, color=INK)
    for name, _ in result.best(job, 6):
        layer, head = result.heads[result.names.index(name)]
        axes[0].annotate(
            name,
            (head, layer),
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if signed or score[result.names.index(name)] < 0.6 * most else "black",
        )
    bar = axes[-1].figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    units = {COPYING: "eigenvalues: sum / sum of sizes", NAMING: "logit of the receiver"}
    bar.set_label(units.get(job, "share of the attention"), fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
    return cast("Figure", axes[0].figure)


def compositions(result: "Compositions", ax: "Axes | None", role: str, reader: str | None) -> "Figure":
    """Scores as a map of heads by heads, or the writers of one reader as bars."""
    import matplotlib.pyplot as plt

    if reader is not None:
        if ax is None:
            ax = plt.subplots(figsize=(5.6, 3.6), layout="constrained")[1]
        return _bars(result, ax, role, reader)
    columns = [n for n, name in enumerate(result.writers) if not name.startswith("mlp")]
    every = [n for n in range(len(result.readers)) if np.isfinite(result.scores[n, columns]).any()]
    rows = [n for n in every if result.roles[n] == role]
    if not rows:
        roles = ", ".join(dict.fromkeys(repr(result.roles[n]) for n in every))
        one = f"plot(reader={result.readers[-1]!r}, role={result.roles[-1]!r}), what one part reads of memories"
        raise AnalyzerError(f"role={role!r} has no reader of heads. Expected {f'one of {roles}' if roles else one}.")
    if ax is None:
        size = min(max(0.05 * len(columns) + 2.5, 5.5), 9.5), min(max(0.05 * len(rows) + 1.6, 2.6), 8.0)
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    return _score_map(result, ax, role, rows, columns)


def _score_map(result: "Compositions", ax: "Axes", role: str, rows: Sequence[int], columns: Sequence[int]) -> "Figure":
    values = result.scores[np.ix_(rows, columns)]
    image = ax.imshow(values, cmap=COLOURS, vmin=0, vmax=float(np.nanmax(values)), aspect="auto", interpolation="nearest")
    ax.set_facecolor("#f1f1f1")
    for axis, names, what in (
        (
            ax.yaxis,
            [result.readers[n] for n in rows],
            f"head that reads by its {_ROLES[role]}" if role in _ROLES else "memory that reads",
        ),
        (ax.xaxis, [result.writers[n] for n in columns], "head that writes"),
    ):
        starts = [n for n, name in enumerate(names) if not n or name.split(".")[0] != names[n - 1].split(".")[0]]
        few = len(names) <= 24
        kept = list(range(len(names))) if few else starts[:: max(1, len(starts) // 15)]
        axis.set_ticks(kept, [names[n] if few else names[n].split(".")[0] for n in kept])
        axis.set_label_text(what if few else f"{what}, by layer", fontsize=8.5, color=INK)
    ax.tick_params(labelsize=7.5, length=2, colors=INK)
    ax.spines[:].set_visible(False)
    strongest = np.argsort(-np.nan_to_num(values, nan=-1), axis=None)[: min(FIRST, int(np.isfinite(values).sum()))]
    places = [tuple(map(int, np.unravel_index(n, values.shape))) for n in strongest]
    y, x = zip(*places, strict=True)
    for width, colour in ((2.4, "white"), (1.0, INK)):
        ax.scatter(x, y, s=46, facecolors="none", edgecolors=colour, linewidths=width)
    told = [f"{result.readers[rows[i]]} ← {result.writers[columns[j]]}  {values[i, j]:.2f}" for i, j in places]
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=25)
    bar.ax.axhline(result.expected, color="white", linewidth=1.5)
    bar.set_label(f"score; white: {result.expected:.3f}, turned at random", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
    title = f"{role.upper()}-composition in {result.model}, by weights alone"
    title = title if role in _ROLES else f"what memories of {result.model} read of heads"
    ax.set_title(title, loc="left", fontsize=10, color=INK, pad=16)
    shown = ", ".join(told[: next(n for n in range(FIRST, 0, -1) if len("".join(told[:n])) < WIDE or n == 1)])
    named = ax.annotate(f"circles: {shown}", (0, 1), (0, 4), "axes fraction", "offset points", fontsize=7, color=INK)
    named.set_in_layout(False)
    return cast("Figure", ax.figure)


_ROLES = {"q": "queries", "k": "keys", "v": "values"}


def _by(role: str) -> str:
    """By what a part reads, where there are several ways."""
    return f" by its {_ROLES[role]}" if role in _ROLES else ""


def _bars(result: "Compositions", ax: "Axes", role: str, reader: str) -> "Figure":
    """The first writers of one reader, with the score of random directions and the mean of all writers."""
    every = result.into(reader, role)
    first = every[:BARS]
    scores: Floats = np.array([score for _, score in first])
    ax.barh(
        range(len(first)),
        scores,
        color=["#7a5195" if name.startswith("mlp") else "#2f6f8f" for name, _ in first],
        height=0.7,
    )
    ax.set_yticks(range(len(first)), [name for name, _ in first])
    ax.invert_yaxis()
    ax.axvline(result.expected, color=INK, linewidth=1)
    text, place = f"turned at random {result.expected:.3f}", (result.expected, len(first) - 0.4)
    ax.annotate(text, place, (4, 0), textcoords="offset points", fontsize=7.5, color=INK, va="center")
    ax.set_title(
        f"what {reader} reads{_by(role)}: first of {number_of(len(every), 'writer')}",
        loc="left",
        fontsize=10,
        color=INK,
    )
    _plain(ax, "writer")
    ax.set_xlabel("composition", fontsize=8.5, color=INK)
    return cast("Figure", ax.figure)
