"""A translator for the logit lens: one affine map a layer to the end of the stream, fitted in closed form over text."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.lenses.opening import mask_of, points_of, rows_of
from analyzers.numbers.embed import Floats
from analyzers.prompts import prompts
from analyzers.protocol import (
    Analyzer,
    AnalyzerError,
    Given,
    check_counts,
    check_eval,
    check_other,
    later_tokens,
    layer_numbers,
    nothing_counted,
    real_tokens,
)
from analyzers.results import Stored
from analyzers.sites import found_in, read_at
from fmr.errors import number_of
from fmr.ids import Site
from fmr.weights import difference, sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


NEAR = 0.05
"""How far weights may lie from those that maps were fitted to, as a share of them: rounding to 8 bits makes 0.01 to 0.03."""


@dataclass(frozen=True, eq=False)
class Translator(Stored):
    """For each layer an affine map from the stream after it to the end of the stream: y = x @ maps[i] + biases[i].

    >>> translator.points
    ('0', '1', '2')
    >>> translator("1", run[structure.layers[1].resid_post]).shape
    torch.Size([1, 6, 128])

    explained: which share of the variance of the end each map explains, of so many tokens `held_out`, or, where that is 0,
    of those that it was fitted to. `null_maps` and `null_biases` were fitted to ends of other tokens: what is said without
    knowing the state, with `null_explained`.
    kl_before, kl_after: of a tuned one, KL to the model's own distribution on held-out text, in nats, by layer. weights:
    some numbers of the model's, by which it is known again.
    """

    points: tuple[str, ...]
    maps: Tensor = field(repr=False)
    biases: Tensor = field(repr=False)
    null_maps: Tensor = field(repr=False)
    null_biases: Tensor = field(repr=False)
    explained: Floats
    null_explained: Floats
    tokens: int
    held_out: int
    ridge: float
    seed: int
    kl_before: dict[str, float] = field(default_factory=dict)
    kl_after: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, point: str, states: Tensor, null: bool = False) -> Tensor:
        """States (..., width) after a layer as what the end of the stream would be, in their own dtype and place."""
        if point not in self.points:
            raise AnalyzerError(f"No map was fitted for {point!r}: expected one of {', '.join(map(repr, self.points))}.")
        maps, biases = (self.null_maps, self.null_biases) if null else (self.maps, self.biases)
        place, width = self.points.index(point), maps.shape[-1]
        if states.shape[-1] != width:
            raise AnalyzerError(f"States of shape {list(states.shape)}: this translator is of a model {width} wide.")
        weight, bias = maps[place].to(states.device), biases[place].to(states.device)
        return (states.to(weight.dtype) @ weight + bias).to(states.dtype)

    def apart(self, model: nn.Module, tolerance: float = NEAR) -> float:
        """How far a model's weights lie from those that the maps were fitted to, 0 to 1; an error beyond what is tolerated.

        >>> translator.apart(model)
        0.0
        """
        anyhow = "LogitLens(model, tokenizer, translator, tolerance=1)"
        if not self.weights and tolerance < 1:
            raise AnalyzerError(
                "This translator does not know which weights it was fitted to: its file was written before they were kept. "
                f"Fit it again, or, where you know that they are those of this {type(model).__name__}: {anyhow}."
            )
        found = difference(self.weights, sample(model)) if self.weights else float("nan")
        if found > tolerance:
            raise AnalyzerError(
                f"The weights of this {type(model).__name__} lie {found:.0%} from those that the translator was fitted to, "
                f"more than {tolerance:.0%}. Expected the model that it was fitted to, in any precision; for a copy that "
                f"was trained on or quantised, {anyhow}."
            )
        return found

    def table(self) -> DataFrame:
        """One row a layer: the share of the variance that is explained, beside that of the null, and the KL of a tuned one.

        >>> translator.table()
        """
        import pandas as pd

        columns: dict[str, Any] = {"explained": self.explained, "null": self.null_explained}
        if self.kl_after:
            columns |= {"kl before": [self.kl_before.get(p, np.nan) for p in self.points]}
            columns |= {"kl after": [self.kl_after.get(p, np.nan) for p in self.points]}
        return pd.DataFrame({"layer": self.points, **columns})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw which share of the end's variance each layer explains, and the null; returns the figure.

        >>> translator.plot().savefig("translator.png")
        """
        import matplotlib.pyplot as plt

        from fmr.pictures.heatmap import INK, returned

        given, ax = ax is not None, ax or plt.subplots(figsize=(4.2, 2.8), layout="constrained")[1]
        ax.plot(self.points, self.explained, "o-", color="#0072B2", markersize=3, label="fitted")
        ax.plot(self.points, self.null_explained, "x--", color=INK, markersize=3, label="fitted to other tokens")
        where = f"{self.held_out} held-out tokens" if self.held_out else "the tokens fitted to"
        ax.set(
            xlabel="layer",
            ylabel="share of variance explained",
            title=where,
            ylim=(min(0.0, *self.null_explained) - 0.05, 1.05),
        )
        ax.title.set_fontsize(9)
        ax.set_xticks(ax.get_xticks()[:: max(1, len(self.points) // 10)])
        ax.legend(fontsize=8, frameon=False)
        figure = cast("Figure", ax.figure)
        return figure if given else returned(figure)

    def __repr__(self) -> str:
        how = "tuned by KL from least squares" if self.kl_after else "least squares"
        first, last = self.points[0], self.points[-1]
        where = f" on {self.held_out} held-out tokens" if self.held_out else " on these"
        known = "\n  no more tokens than a state has numbers: the ends of texts that were fitted to are known by heart"
        return (
            f"Translator of {number_of(len(self.points), 'layer')}, {self.maps.shape[-1]} wide, {how} over "
            f"{number_of(self.tokens, 'token')}, ridge "
            f"{self.ridge:g}\n  variance of the end explained{where}: {self.explained[0]:.3f} at layer {first}, "
            f"{self.explained[-1]:.3f} at {last}; fitted to other tokens {self.null_explained.max():.3f} at most"
            f"{known if self.tokens <= self.maps.shape[-1] else ''}"
        )


@dataclass(eq=False)
class Sums:
    """What the normal equations of one layer need: sums over tokens of x, y, y of other tokens, and their products."""

    x: Tensor
    y: Tensor
    other: Tensor
    xx: Tensor
    xy: Tensor
    x_other: Tensor
    yy: Tensor

    @staticmethod
    def of(x: Tensor, y: Tensor, other: Tensor) -> Sums:
        return Sums(x.sum(0), y.sum(0), other.sum(0), x.mT @ x, x.mT @ y, x.mT @ other, y.pow(2).sum(0))

    def __add__(self, more: Sums) -> Sums:
        pairs = zip(vars(self).values(), vars(more).values(), strict=True)
        return Sums(*(one + two.to(one.device) for one, two in pairs))

    def solve(self, count: int, ridge: float, null: bool = False) -> tuple[Tensor, Tensor]:
        """The map and the bias with the least squared error.

        The ridge is a share of each coordinate's own variance, so that no coordinate's unit counts.
        """
        x, y = self.x / count, (self.other if null else self.y) / count
        of_x = self.xx / count - x[:, None] * x
        of_xy = (self.x_other if null else self.xy) / count - x[:, None] * y
        diagonal = of_x.diagonal()
        scaled = of_x + torch.diag(ridge * diagonal + 1e-12 * diagonal.mean())
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if int(failed) or (ridge == 0 and count <= len(x)):
            raise AnalyzerError(
                f"{number_of(count, 'token')} do not determine a map from {len(x)} numbers. Expected several times "
                f"as many tokens, or a "
                "ridge, such as result(ridge=1e-3)."
            )
        found = torch.cholesky_solve(of_xy, factor)
        return found, y - x @ found

    def explained(self, count: int, weight: Tensor, bias: Tensor) -> float:
        """Which share of the variance of y a map explains of these tokens."""
        x, y, weight, bias = self.x / count, self.y / count, weight.to(self.x), bias.to(self.x)
        of_both = 2 * ((weight * (self.xy / count)).sum() + bias @ (y - x @ weight))
        left = self.yy.sum() / count - of_both + (weight * (self.xx / count @ weight)).sum() + bias @ bias
        return float(1 - left / (self.yy / count - y**2).sum())


class LensTranslator(Analyzer[Translator]):
    """Fit for each layer the affine map to the end of the stream with the least squared error over the tokens of a corpus.

    >>> fitting = analyzers.LensTranslator(model, tokenizer).over(batches, progress=False)
    >>> translator = fitting.result()

    With x the stream after a layer and y its end, both (tokens, width): A = cov(x, x)^-1 cov(x, y), b = mean(y) - mean(x) A.
    Only sums are kept, in float64, three matrices of width x width a layer; how texts are cut into batches and shards
    changes nothing but the null, for which y is that of another token of the same batch, of one token that of the last one.

    model: any module with a residual stream, in eval mode. layers: which ones; None takes all. skip: how many tokens at
    the start of each text are left out.

    Source: N. Belrose et al., "Eliciting latent predictions from transformers with the tuned lens", 2023, where the maps
    are trained; A. Din et al., "Jump to conclusions", 2023, where they are linear regressions.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        layers: Sequence[int] | None = None,
        skip: int = 0,
        seed: int = 0,
    ) -> None:
        check_counts(0, skip=skip)
        self.model, self.tokenizer, self.skip, self.seed = model, tokenizer, operator.index(skip), seed
        self.layers = layer_numbers(layers)
        self._before: Tensor | None = None
        self.sites: dict[str, Site] = {}
        self.end: Site | None = None
        self.sums: dict[str, Sums] = {}
        self.tokens = 0
        self.weights: dict[str, Tensor] = {}

    def update(self, batch: Given) -> LensTranslator:
        """Count all real tokens of a batch: named arguments, token ids, a text or several.

        >>> analyzers.LensTranslator(model, tokenizer).update(texts[:2]).tokens
        34
        """
        check_eval(self.model)
        given = prompts(batch, self.model, self.tokenizer)
        with torch.no_grad():
            self._find(given.inputs)
            assert self.end is not None
            run = read_at(self.model, given.inputs, [*self.sites.values(), self.end])
            ends = rows_of(run[self.end], len(given), type(self.model).__name__, self.end.layout)
            mask = mask_of(given, ends.shape[:2], real_tokens)
            mask = later_tokens(mask, self.skip).to(ends.device)
            y = ends[mask].double()
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.seed)).to(y.device)
            other = torch.empty_like(y).index_copy_(0, order, y[order.roll(1)])  # of another token, for each
            if len(y) == 1 and self._before is not None:
                other = self._before
            self._before = y[-1:] if len(y) else self._before
            for name, site in self.sites.items():
                x = rows_of(run[site], len(given), "", site.layout)[mask].double()
                found = Sums.of(x, y, other)
                self.sums[name] = self.sums[name] + found if name in self.sums else found
        self.tokens += len(y)
        return self

    def _find(self, inputs: Any) -> None:
        """The points of the stream, found in the first batch."""
        if self.end is not None:
            return
        (points,), _ = found_in(self.model, inputs, lambda structure: (points_of(structure),))
        *names, last = points
        if not names:
            raise AnalyzerError(
                f"{type(self.model).__name__} has one layer, after which its stream ends: there is nothing to translate."
            )
        wanted = names if self.layers is None else [str(layer) for layer in self.layers]
        if not set(wanted) <= set(names):
            raise AnalyzerError(
                f"layers=[{', '.join(wanted)}]: expected some of {', '.join(names)}, the last one is the end itself."
            )
        self.sites, self.end = {name: points[name] for name in wanted}, points[last]
        self.weights = sample(self.model)

    @property
    def counted(self) -> str:
        """How many tokens were counted."""
        return number_of(self.tokens, "token") if self.tokens else ""

    def merge(self, other: LensTranslator) -> LensTranslator:
        """Add what another one counted of the same model on other texts, and return this one.

        >>> shards = [analyzers.LensTranslator(model).update(batch) for batch in batches]
        >>> shards[0].merge(shards[1]).result(ridge=1e-3)
        """
        check_other(self, other, weights=False)
        ours, theirs = ({name: getattr(one, name) for name in ("layers", "skip", "seed")} for one in (self, other))
        if ours != theirs:
            raise AnalyzerError(f"merge of {ours} with {theirs}: expected the same model and settings.")
        if other.end is None:
            return self
        if self.end is None:
            self.weights = sample(self.model)
            self._check_weights(other)
            self.sites, self.end, self.sums, self.tokens = other.sites, other.end, dict(other.sums), other.tokens
            return self
        if (self.sites, self.end) != (other.sites, other.end):
            raise AnalyzerError(
                f"merge of maps from {', '.join(self.sites)} to {self.end.id} with {', '.join(other.sites)} to "
                f"{other.end.id}: expected the same model and settings."
            )
        self._check_weights(other)
        self.sums = {name: found + other.sums[name] for name, found in self.sums.items()}
        self.tokens += other.tokens
        return self

    def result(self, *, ridge: float = 1e-4, held_out: LensTranslator | None = None) -> Translator:
        """The maps for the tokens so far; ridge: the share of its variance that is added to each coordinate's.

        >>> others = analyzers.LensTranslator(model).update(batches[1])
        >>> analyzers.LensTranslator(model).update(batches[0]).result(ridge=1e-2, held_out=others)

        held_out: one that counted other texts, of which is told how much the maps explain; None tells it of the same texts.
        """
        if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < float("inf"):
            raise AnalyzerError(f"ridge={ridge!r}: expected a share of the variance from 0 on, such as 1e-3.")
        if held_out is not None and not isinstance(held_out, LensTranslator):
            raise AnalyzerError(
                f"held_out is a {type(held_out).__name__}: expected a LensTranslator that counted other texts, as "
                "LensTranslator(model, tokenizer).over(others)."
            )
        if not all(one.tokens for one in (self, held_out) if one is not None):
            raise AnalyzerError(nothing_counted(self.skip))
        told = self if held_out is None else held_out
        if told.sums.keys() != self.sums.keys():
            raise AnalyzerError(f"held_out counted layers {', '.join(told.sums)}, expected {', '.join(self.sums)}.")
        self._check_weights(told)
        fitted = {name: found.solve(self.tokens, ridge) for name, found in self.sums.items()}
        nulls = {name: found.solve(self.tokens, ridge, null=True) for name, found in self.sums.items()}
        shares = [
            np.array([told.sums[name].explained(told.tokens, *made) for name, made in some.items()])
            for some in (fitted, nulls)
        ]
        return Translator(
            points=tuple(self.sums),
            maps=_stacked(fitted, 0),
            biases=_stacked(fitted, 1),
            null_maps=_stacked(nulls, 0),
            null_biases=_stacked(nulls, 1),
            explained=shares[0],
            null_explained=shares[1],
            tokens=self.tokens,
            held_out=held_out.tokens if held_out is not None else 0,
            ridge=ridge,
            seed=self.seed,
            weights=self.weights,
        )

    def _check_weights(self, other: LensTranslator) -> None:
        if (apart := difference(self.weights, other.weights)) > NEAR:
            raise AnalyzerError(
                f"The other LensTranslator counted a model whose weights lie {apart:.0%} from those of this one. Expected "
                "one model, in any precision."
            )


def _stacked(made: dict[str, tuple[Tensor, Tensor]], place: int) -> Tensor:
    return torch.stack([one[place] for one in made.values()]).float().cpu()
