"""Steering along a latent: what a metric does as more of its direction is added, beside random directions as long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from analyzers.dictionaries.autoencoder import SparseAutoencoder
from analyzers.dictionaries.dictionary import Dictionary
from analyzers.dictionaries.standing import Standing, opened
from analyzers.numbers.embed import Floats
from analyzers.prompts import prompts
from analyzers.protocol import AnalyzerError, Given, Method, check_counts, check_eval
from analyzers.results import Stored
from fmr.edits import Add
from fmr.errors import number_of
from fmr.nodes import Key
from fmr.sweeps.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class LatentSteered(Stored):
    """What steering along a latent does to a metric, by dose.

    >>> steering = analyzers.LatentSteering(model, tokenizer, dictionary, site)
    >>> steered = steering.run("Junel Dunoth grew up in", 7, fmr.sweeps.log_prob(5), doses=[1.0, 4.0], draws=4)
    >>> steered.effect.shape, steered.random.shape
    ((2,), (2, 4))

    doses: what is added, in the units of the latent's coefficient, which is the length of what is added. effect: by dose,
    the metric less that without steering, the mean over examples; random: of each random direction of that length.
    p: the share of random directions, and of the latent itself, with an effect at least as large either way.
    """

    site: str
    latent: int
    doses: Floats
    effect: Floats
    random: Floats = field(repr=False)
    base: float
    examples: int
    how: str
    seed: int

    @property
    def p(self) -> Floats:
        """By dose, the share of directions whose effect is at least as large as the latent's, itself among them."""
        larger = (np.abs(self.random) >= np.abs(self.effect)[:, None]).sum(1)
        found: Floats = (larger + 1) / (self.random.shape[1] + 1)
        return found

    def table(self) -> DataFrame:
        """One row a dose.

        >>> steered = analyzers.LatentSteering(model, tokenizer, dictionary, site).run(texts[0], 7, fmr.sweeps.log_prob(5))
        >>> steered.table()
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "dose": self.doses,
                "effect": self.effect,
                "random": self.random.mean(1),
                "random_low": self.random.min(1),
                "random_high": self.random.max(1),
                "p": self.p,
            }
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """The effect by dose, and those of random directions in grey.

        >>> steered = analyzers.LatentSteering(model, tokenizer, dictionary, site).run(texts[0], 7, fmr.sweeps.log_prob(5))
        >>> steered.plot()
        """
        from analyzers.dictionaries.pictures import draw_steered

        return draw_steered(self, ax)

    def __repr__(self) -> str:
        rows = "\n".join(
            f"  {dose:g} added: {effect:+.3f}; random {low:+.3f} to {high:+.3f}, p {p:.3f}"
            for dose, effect, low, high, p in zip(
                self.doses, self.effect, self.random.min(1), self.random.max(1), self.p, strict=True
            )
        )
        directions = number_of(self.random.shape[1], "random direction")
        return (
            f"LatentSteered by latent {self.latent} at {self.site}: {number_of(self.examples, 'example')}, metric "
            f"{self.base:.3f} without, {directions}, seed {self.seed}\n{rows}"
        )


class LatentSteering(Method):
    """Add a latent's direction to what a model holds at a site, and measure what follows.

    >>> steering = analyzers.LatentSteering(model, tokenizer, dictionary, structure.layers[2].resid_post)
    >>> steering.run("Junel Dunoth grew up in", 7, fmr.sweeps.log_prob(5), draws=4).p.shape
    (4,)

    model: any module in eval mode. dictionary: a `Dictionary`, or a `SparseAutoencoder`. site: where it stands; one with
    positions, as `site.at(positions=-1)`, steers there alone. For generation, `edits={site: autoencoder.steering(7, 3.0)}`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, dictionary: Dictionary | SparseAutoencoder, site: Key) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.standing = Standing(dictionary, site)
        self.autoencoder, self.site = opened(dictionary, model)[0], self.standing.site

    def run(
        self,
        inputs: Given,
        latent: int,
        metric: Metric,
        doses: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
        *,
        draws: int = 20,
        seed: int = 0,
        progress: bool | None = None,
    ) -> LatentSteered:
        """Measure a metric with more and more of a latent, and of random directions.

        >>> steering = analyzers.LatentSteering(model, tokenizer, dictionary, site)
        >>> steering.run("Junel Dunoth grew up in", 7, fmr.sweeps.log_prob(5), draws=4, progress=False).examples
        1

        metric: of the model's output, one number or one for each example. doses: in the units of the latent's coefficient;
        below 0 it is taken away. draws: how many random directions, the same for each dose. seed: of these.
        """
        check_eval(self.model)
        check_counts(1, draws=draws)
        check_counts(0, seed=seed)
        every = [float(dose) for dose in doses if isinstance(dose, int | float) and not isinstance(dose, bool)]
        if len(every) != len(doses) or not every or not np.isfinite(every).all():
            raise AnalyzerError(f"doses={doses!r}: expected finite numbers, in the units of the latent's coefficient.")
        given, width = prompts(inputs, self.model, self.tokenizer), self.autoencoder.width
        self.standing.check(self.model, given.inputs)
        draw = torch.Generator().manual_seed(seed)
        length = float(self.autoencoder.direction(latent).norm())
        random = F.normalize(torch.randn(draws, width, generator=draw), dim=1) * length
        kept = next(self.model.parameters(), random)
        directions = [one.to(kept.device, kept.dtype) for one in (self.autoencoder.direction(latent), *random)]
        cells: list[dict[Key, Any]] = [{self.site: Add(dose * one)} for dose in every for one in directions]
        grid = fmr.sweep(self.model, given.inputs, cells, None, metric, progress=progress)
        clean = grid.base.double().mean().cpu()
        found = _means(grid.values, len(cells)).view(len(every), len(directions)) - clean
        return LatentSteered(
            site=str(self.site.id),
            latent=latent,
            doses=np.array(every),
            effect=found[:, 0].numpy(),
            random=found[:, 1:].numpy(),
            base=float(clean),
            examples=len(given),
            how=grid.how,
            seed=seed,
        )


def _means(values: Tensor, cells: int) -> Tensor:
    """The mean over examples of each cell."""
    found: Tensor = values.double().cpu().reshape(cells, -1).mean(1)
    return found
