"""How sparse memories are, layer by layer and word by word, beside what dense ones would be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from analyzers.numbers.embed import Floats
from analyzers.results import Stored, told_skip
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Sparsity(Stored):
    """How many coefficients of each layer's memory matter at a token: means over tokens.

    >>> found = analyzers.ActivationSparsity(model, tokenizer).over(texts, progress=False).result()
    >>> found.active.shape, found.by_word.shape[0]
    ((4,), 4)

    By layer: active, the share of coefficients without which the output is another by more than `eps` of its length; zero,
    that of exact zeros; effective, how many add as much as all do if they added alike; hoyer, from 0 (dense) to 1 (one
    alone). `..._null`: the same of coefficients from a normal distribution. by_word: (layers, words), the active share at
    each word of `words`, the most frequent first, `counts` times each. skip: how many tokens at the start of each text were
    left out.
    """

    model: str
    layers: tuple[int, ...]
    sizes: tuple[int, ...]
    gated: tuple[bool, ...]
    active: Floats
    zero: Floats
    effective: Floats
    hoyer: Floats
    active_null: Floats
    effective_null: Floats
    hoyer_null: Floats
    words: tuple[str, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)
    by_word: Tensor = field(repr=False)
    seen: int
    eps: float
    seed: int
    skip: int = 0

    def table(self) -> DataFrame:
        """One row a layer.

        >>> analyzers.ActivationSparsity(model, tokenizer).over(texts, progress=False).result().table()["active"]
        """
        import pandas as pd

        names = ("active", "active_null", "zero", "effective", "effective_null", "hoyer", "hoyer_null")
        told = {name.replace("_", " "): getattr(self, name) for name in names}
        return pd.DataFrame({"layer": self.layers, "memories": self.sizes, "gated": self.gated, **told})

    def word_table(self, least: int = 3) -> DataFrame:
        """One row a word that came so often at least, with its active share in each layer, the largest first.

        >>> analyzers.ActivationSparsity(model, tokenizer).over(texts, progress=False).result().word_table().head(3)
        """
        import pandas as pd

        kept = [n for n, count in enumerate(self.counts) if count >= least]
        columns = {f"layer {layer}": row[kept].numpy() for layer, row in zip(self.layers, self.by_word, strict=True)}
        frame = pd.DataFrame({"word": [self.words[n] for n in kept], "count": [self.counts[n] for n in kept], **columns})
        return frame.iloc[np.argsort(-self.by_word[:, kept].mean(0).numpy(), kind="stable")].reset_index(drop=True)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the active and the effective share by layer, beside what dense coefficients have; returns the figure.

        >>> analyzers.ActivationSparsity(model, tokenizer).over(texts, progress=False).result().plot().savefig("sparse.png")
        """
        from analyzers.sparsity.pictures import draw_sparsity
        from fmr.pictures.heatmap import returned

        return returned(draw_sparsity(self, ax)) if ax is None else draw_sparsity(self, ax)

    def __repr__(self) -> str:
        rows = [
            f"  layer {layer}: {active:.3f} of {size} matter ({null:.3f} of dense ones), {zero:.3f} are zero, "
            f"effective number {effective:.0f}, Hoyer {hoyer:.2f}"
            for layer, active, size, null, zero, effective, hoyer in zip(
                self.layers, self.active, self.sizes, self.active_null, self.zero, self.effective, self.hoyer, strict=True
            )
        ]
        more = [f"  ... and {len(rows) - 8} more"] if len(rows) > 8 else []
        over = f"{number_of(self.seen, 'token')}{told_skip(self.skip)}"
        head = f"Sparsity of {self.model} over {over}, eps {self.eps:g}, seed {self.seed}"
        return "\n".join([head, *rows[:8], *more])
