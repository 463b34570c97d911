"""The residual stream as a sum: what each write adds to it at each position, how far it moves it, and in which direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from analyzers.lenses.opening import Reading, labelled, layout_of, mask_of, rows_of, run_with
from analyzers.lenses.writers import named
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError, Given
from analyzers.results import Stored
from fmr.errors import number_of
from fmr.ids import TensorId
from fmr.runs.run import Run
from fmr.structure.parts import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

MEASURED = {
    "norm": "norm of what is added",
    "movement": "movement: norm of the change over that of the state",
    "cosine_before": "cosine with the state before",
    "cosine_end": "cosine with the end of the stream",
    "share": "share of the end of the stream",
}
WITH_SIGN = ("cosine_before", "cosine_end", "share")
NULLS = {"cosine_end": "other_cosine", "share": "other_share"}


@dataclass(frozen=True, eq=False)
class Decomposition(Stored):
    """What each part added to the stream: (parts, examples, positions), NaN on padding.

    >>> decomposition.names[:3]
    ('embedding', 'attention 0', 'mlp 0')
    >>> decomposition.table().query("part == 'mlp 3'")

    norm: of what is added; movement: that over the norm of the state before; cosine_before, cosine_end: of what is added
    with the state before and with the end of the stream; share: its component along the end, over the norm of that: shares
    add up to 1 at each position. state_norm: of the state after. other_cosine, other_share: the same with the end at another
    token, which is what directions that all tokens have in common come to. error: how far the sum of all that was added lies
    from the end, relative to its largest value.
    """

    names: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    norm: Tensor = field(repr=False)
    movement: Tensor = field(repr=False)
    cosine_before: Tensor = field(repr=False)
    cosine_end: Tensor = field(repr=False)
    share: Tensor = field(repr=False)
    state_norm: Tensor = field(repr=False)
    other_cosine: Tensor = field(repr=False)
    other_share: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    error: float
    seed: int

    def table(self) -> DataFrame:
        """One row a part: means over all real tokens.

        >>> decomposition.table().sort_values("share").tail(3)
        """
        import pandas as pd

        columns = {
            name: getattr(self, name)[:, self.mask].double().nanmean(1)
            for name in (*MEASURED, "state_norm", "other_cosine", "other_share")
        }
        return pd.DataFrame({"part": self.names, **columns})

    def medians(self, what: str) -> Floats:
        """The median of a measure over all real tokens, by part: one token that is unlike all others does not count."""
        return np.asarray(getattr(self, what)[:, self.mask].double().nanquantile(0.5, 1))

    @property
    def labels(self) -> list[list[str]]:
        """The token at each column of each example; nothing on padding."""
        return labelled(self.tokens, self.mask)

    def plot(self, ax: Axes | None = None, *, what: str = "share", example: int = 0) -> Figure:
        """Draw a measure as a map, parts up, tokens across, and its mean with the null beside it; returns the figure.

        >>> decomposition.plot(what="movement").savefig("decomposition.png")
        """
        from analyzers.lenses.pictures import draw_decomposition
        from fmr.pictures.heatmap import returned

        if what not in MEASURED or not 0 <= example < len(self.tokens):
            raise AnalyzerError(
                f"what={what!r}, example={example!r}: expected one of {', '.join(map(repr, MEASURED))}, and 0 to "
                f"{len(self.tokens) - 1}."
            )
        figure = draw_decomposition(self, ax, what, example)
        return returned(figure) if ax is None else figure

    def __repr__(self) -> str:
        table, (shares, moved) = self.table().set_index("part"), map(self.medians, ("share", "movement"))
        order = np.argsort(-shares, kind="stable")
        told = [", ".join(f"{self.names[n]} {shares[n]:+.2f}" for n in some) for some in (order[:3], order[:-3:-1])]
        movers = ", ".join(f"{self.names[n]} {moved[n]:.2f}" for n in np.argsort(-moved[1:], kind="stable")[:3] + 1)
        written = table["cosine_end"].iloc[1:].abs().mean(), table["other_cosine"].iloc[1:].abs().mean()
        prompts = f"{number_of(len(self.tokens), 'prompt')}, {number_of(int(self.mask.sum()), 'token')}"
        return (
            f"Decomposition of the stream of {prompts}, {len(self.names)} parts (error {self.error:.0e})\n"
            f"  shares of its end, medians over tokens: {told[0]}; least {told[1]}\n"
            f"  moved most by {movers} (change over state, medians)\n"
            f"  cosine with the end {written[0]:.3f}, with the end at another token {written[1]:.3f} (means of sizes)"
        )


class ResidualDecomposition(Reading):
    """Who wrote what into the residual stream, layer by layer and token by token.

    >>> decomposition = analyzers.ResidualDecomposition(model, tokenizer).run("Junel Dunoth grew up in")
    >>> decomposition.error < 1e-5
    True

    The stream at its end is x = embedding + sum of what attention and memories added. Of each addition w to a state s: |w|,
    |w| / |s|, cos(w, s), cos(w, x), and its share w.x / |x|^2 of the end. Where norms stand on the stream itself, what they
    change is a part, too, so that the sum closes in any model.

    model: any module with a residual stream, in eval mode.
    """

    def run(self, inputs: Given, *, seed: int = 0) -> Decomposition:
        """Take the stream of prompts apart.

        >>> analyzers.ResidualDecomposition(model).run(inputs).names[-1]
        'mlp 3'
        """
        given, structure = self._opened(inputs)
        writes = structure.residual.writes
        wanted = {name for write in writes for name in (write.before, write.added, write.after)}
        run = run_with(self.model, given, wanted)
        parts = list(_parts(structure, run, len(given)))
        end = parts[-1].after
        mask = mask_of(given, end.shape[:2])
        other = _elsewhere(end, mask, seed)
        measured = [_measured(part, end, other) for part in parts]
        total = torch.stack([part.added for part in parts]).sum(0)
        padding = ~mask
        return Decomposition(
            names=tuple(part.name for part in parts),
            tokens=given.tokens,
            **{
                name: torch.stack([one[name].float().cpu().masked_fill(padding, torch.nan) for one in measured])
                for name in measured[0]
            },
            mask=mask,
            error=float((total - end).abs().max() / end.abs().max()),
            seed=seed,
        )


class Part(NamedTuple):
    """What is added to the stream, the state before, and the state after it, (examples, positions, width)."""

    name: str
    added: Tensor
    before: Tensor
    after: Tensor


def _parts(structure: Structure, run: Run, examples: int) -> Iterator[Part]:
    """The stream write by write, and what happens to it between two."""
    graph, writes, layout = run.graph.unfused, structure.residual.writes, layout_of(structure)

    def value(name: TensorId, like: TensorId | None = None) -> Tensor:
        found = run[name].detach()
        found = found.expand_as(run[like]) if like is not None else found
        return rows_of(found, examples, structure.model, layout).double()

    name = named(structure, graph)
    start = value(writes[0].before)
    yield Part("embedding", start, torch.zeros_like(start), start)
    for last, write in zip((None, *writes), writes, strict=False):
        before = value(write.before)
        if last is not None and last.after != write.before:
            earlier = value(last.after)
            if not torch.equal(earlier, before):
                yield Part(f"norm before {name(write)}", before - earlier, earlier, before)
        yield Part(name(write), write.times * value(write.added, write.before), before, value(write.after))


def _measured(part: Part, end: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Sizes and directions of what one part adds, (examples, positions)."""
    size = part.added.norm(dim=-1)
    return {
        "norm": size,
        "movement": size / part.before.norm(dim=-1),
        "cosine_before": cosine_similarity(part.added, part.before, dim=-1),
        "cosine_end": cosine_similarity(part.added, end, dim=-1),
        "share": (part.added * end).sum(-1) / end.pow(2).sum(-1),
        "state_norm": part.after.norm(dim=-1),
        "other_cosine": cosine_similarity(part.added, other, dim=-1),
        "other_share": (part.added * other).sum(-1) / other.pow(2).sum(-1),
    }


def _elsewhere(end: Tensor, mask: Tensor, seed: int) -> Tensor:
    """For each real token the end of the stream at another one; of a single token, a random direction of that size."""
    mask = mask.to(end.device)
    own, draw = end[mask], torch.Generator().manual_seed(seed)
    if len(own) > 1:
        order = torch.randperm(len(own), generator=draw)
        turned = torch.empty_like(order).scatter_(0, order, order.roll(1)).to(end.device)
        other = own[turned]
    else:
        other = torch.nn.functional.normalize(torch.randn(own.shape, generator=draw)).to(own) * own.norm(
            dim=-1, keepdim=True
        )
    return torch.ones_like(end).masked_scatter(mask[..., None], other)
