"""Polysemanticity measured: to how many types of things a unit answers, beside labels that mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError, Method, check_counts
from analyzers.results import Stored
from fmr.errors import number_of, whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Answers(Stored):
    """To which types each unit answers.

    >>> answers = analyzers.Polysemanticity(draws=20).run(torch.randn(60, 8), ["town", "name", "trade"] * 20)
    >>> answers.scores.shape, answers.types
    ((8, 3), ('name', 'town', 'trade'))

    scores: (units, types), how far things of a type excite a unit above all others, in standard errors. threshold: by unit,
    what the largest score of shuffled labels exceeds in a share `level` of draws. null: (draws, units), to how many types a
    unit answers under shuffled labels. things: how many there are of each type.
    """

    types: tuple[str, ...]
    things: tuple[int, ...]
    scores: Floats = field(repr=False)
    threshold: Floats = field(repr=False)
    null: Floats = field(repr=False)
    level: float
    seed: int

    @property
    def answers(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether a unit answers to a type, (units, types)."""
        found: np.ndarray[Any, np.dtype[np.bool_]] = self.scores > self.threshold[:, None]
        return found

    @property
    def counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """To how many types each unit answers."""
        found: np.ndarray[Any, np.dtype[np.int64]] = self.answers.sum(1)
        return found

    @property
    def shares(self) -> tuple[float, float, float]:
        """The shares of units that answer to no type, to one, and to several."""
        return tuple(float(one.mean()) for one in (self.counts == 0, self.counts == 1, self.counts > 1))  # type: ignore[return-value]

    def of(self, unit: int) -> dict[str, float]:
        """The types that a unit answers to, the strongest first, with their scores.

        >>> analyzers.Polysemanticity(draws=20).run(torch.eye(60)[:, :2], ["town", "name", "trade"] * 20).of(0)
        {}
        """
        order = np.argsort(-self.scores[unit], kind="stable")
        return {self.types[n]: float(self.scores[unit, n]) for n in order if self.answers[unit, n]}

    def table(self) -> DataFrame:
        """One row a type: how many units answer to it, and how many of these to no other.

        >>> analyzers.Polysemanticity(draws=20).run(torch.randn(60, 8), ["town", "name", "trade"] * 20).table()
        """
        import pandas as pd

        alone = self.counts == 1
        return pd.DataFrame(
            {"things": self.things, "units": self.answers.sum(0), "alone": (self.answers & alone[:, None]).sum(0)},
            pd.Index(self.types, name="type"),
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """How many units answer to how many types, and the same of shuffled labels.

        >>> analyzers.Polysemanticity(draws=20).run(torch.randn(60, 8), ["town", "name", "trade"] * 20).plot()
        """
        from analyzers.dictionaries.pictures import draw_answers

        return draw_answers(self, ax)

    def __repr__(self) -> str:
        nothing, one, several = self.shares
        return (
            f"Answers of {number_of(len(self.scores), 'unit')} to {number_of(len(self.types), 'type')} of "
            f"{number_of(sum(self.things), 'thing')}\n"
            f"  {nothing:.1%} answer to none, {one:.1%} to one, {several:.1%} to several; {self.counts.mean():.2f} types a "
            f"unit, with shuffled labels {self.null.mean():.2f}\n"
            f"  level {self.level:g} for each unit, {number_of(len(self.null), 'draw')}, seed {self.seed}"
        )


class Polysemanticity(Method):
    """Measure to how many types of things units answer: neurons, latents, any directions.

    >>> values = run["transformer.h.3.mlp"][0]
    >>> analyzers.Polysemanticity(draws=20).run(values, ["name", "name", "verb"] * 2)
    Answers of 128 units to 2 types of 6 things
    ...

    draws: how many times labels are shuffled. level: how often a unit may answer to any type by chance. seed: of the draws.

    A unit answers to a type where things of that type excite it more than all others do, by more than the best of all types
    does with shuffled labels in all but a share `level` of draws.
    """

    def __init__(self, *, draws: int = 200, level: float = 0.05, seed: int = 0) -> None:
        check_counts(1, draws=draws)
        check_counts(0, seed=seed)
        if isinstance(level, bool) or not isinstance(level, float) or not 0 < level < 1:
            raise AnalyzerError(f"level={level!r}: expected a share between 0 and 1, such as 0.05.")
        self.draws, self.level, self.seed = int(draws), level, int(seed)

    def run(self, values: Tensor, labels: Sequence[Any] | Tensor, things: Sequence[Any] | Tensor | None = None) -> Answers:
        """Measure units by the labels of things.

        >>> draw = torch.randn(100, 4)
        >>> analyzers.Polysemanticity(draws=20).run(draw, [n % 5 for n in range(100)], [n % 50 for n in range(100)]).things
        (10, 10, 10, 10, 10)

        values: (rows, units). labels: the type of each row, as text or as a number. things: what each row is of, as its
        token: rows of one thing count once, by their mean, and labels are shuffled among things, all rows of one together.
        None takes each row for a thing of its own.
        """
        means, kinds, types = _by_thing(values, labels, things)
        spread = means.std(0, correction=0)
        spread = torch.where(spread > 1e-9 * spread.max(), spread, torch.inf)
        draw = torch.Generator().manual_seed(self.seed)
        found = _scores(means, kinds, len(types), spread)
        shuffled = [
            _scores(means, kinds[torch.randperm(len(kinds), generator=draw)], len(types), spread) for _ in range(self.draws)
        ]
        threshold = torch.stack([one.max(1).values for one in shuffled]).quantile(1 - self.level, 0, interpolation="higher")
        return Answers(
            types=types,
            things=tuple(torch.bincount(kinds, minlength=len(types)).tolist()),
            scores=found.numpy(),
            threshold=threshold.numpy(),
            null=torch.stack([(one > threshold[:, None]).sum(1) for one in shuffled]).double().numpy(),
            level=self.level,
            seed=self.seed,
        )


def _scores(means: Tensor, kinds: Tensor, types: int, spread: Tensor) -> Tensor:
    """How far things of each type excite each unit above all others, in standard errors, (units, types)."""
    member = torch.nn.functional.one_hot(kinds, types).double()
    many = member.sum(0)
    inside = member.T @ means / many[:, None]
    outside = (means.sum(0) - member.T @ means) / (len(means) - many)[:, None]
    errors = (1 / many + 1 / (len(means) - many)).sqrt()
    found: Tensor = ((inside - outside) / errors[:, None] / spread).T
    return found


def _by_thing(values: Any, labels: Any, things: Any) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The mean of each thing (things, units) in double, the number of its type, and the names of types."""
    if not isinstance(values, Tensor) or values.dim() != 2 or not values.is_floating_point():
        told = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise AnalyzerError(f"The values are {told}: expected numbers with fractions, (rows, units).")
    rows = values.detach().double().cpu()
    named = [_plain(one) for one in labels]
    whose = list(range(len(rows))) if things is None else [_plain(one) for one in things]
    if len(named) != len(rows) or len(whose) != len(rows):
        raise AnalyzerError(f"There are {len(rows)} rows, {len(named)} labels and {len(whose)} things: expected as many.")
    first: dict[Any, int] = {}
    places = torch.tensor([first.setdefault(one, len(first)) for one in whose])
    kinds = dict(zip(whose, named, strict=True))
    if odd := [one for one, label in zip(whose, named, strict=True) if kinds[one] != label]:
        raise AnalyzerError(f"The thing {odd[0]!r} has more than one label. Expected one type for each.")
    types = sorted(set(named), key=lambda one: (isinstance(one, str), one))
    if len(types) < 2 or len(first) <= len(types):
        raise AnalyzerError(f"There are {len(types)} types of {len(first)} things: expected two or more, of several things.")
    if not bool(rows.isfinite().all()):
        raise AnalyzerError("The values are not all finite. Expected finite ones.")
    means = torch.zeros(len(first), rows.shape[1], dtype=torch.float64).index_add_(0, places, rows)
    means /= torch.bincount(places, minlength=len(first))[:, None]
    return means, torch.tensor([types.index(kinds[one]) for one in first]), tuple(map(str, types))


def _plain(one: Any) -> Any:
    """A label as text or as a number of Python's."""
    number = whole_number(one)
    return str(one) if number is None else number
