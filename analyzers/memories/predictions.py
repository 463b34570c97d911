"""How a layer's prediction comes of its memories, and which memories of all layers promote a word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import fmr
from analyzers.memories.reading import Found, laid
from analyzers.memories.spelling import joined
from analyzers.memories.vocabulary import logits_of, unread, value_vectors
from analyzers.memories.written import Passage, write_of
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError, check_eval
from analyzers.results import Stored
from analyzers.sites import read_at
from fmr.errors import number_of, whole_number
from fmr.runs.run import Run
from fmr.structure.frozen import frozen
from fmr.structure.memories.memory import Memory
from fmr.structure.parts import Structure
from fmr.sweeps.metrics import token_ids

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

_CELLS = 1 << 24
"""How many votes are looked at at once."""


@dataclass(frozen=True, eq=False)
class Composed(Stored):
    """How often what a layer's memories make together says what none of them says alone, by layer.

    >>> composed.none.shape
    (4,)

    none: (layers,), the share of tokens at which the layer's first word is that of none of its memories; a memory with a
    negative coefficient has the word that its value speaks against most, one with none has no word. shuffled: the same with
    the coefficients of each token dealt out to other memories of the layer. voters: how many memories have the layer's word,
    the mean over tokens, shuffled_voters: with shuffled coefficients.
    """

    layers: tuple[int, ...]
    none: Floats
    shuffled: Floats
    voters: Floats
    shuffled_voters: Floats
    n_tokens: int
    seed: int

    def table(self) -> DataFrame:
        """One row a layer.

        >>> composed.table()[["layer", "none", "shuffled"]]
        """
        import pandas as pd

        names = ("layers", "none", "shuffled", "voters", "shuffled_voters")
        return pd.DataFrame({"layer" if name == "layers" else name: getattr(self, name) for name in names})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the shares by layer, as they are and with shuffled coefficients; returns the figure.

        >>> composed.plot().savefig("composed.png")
        """
        from analyzers.memories.pictures import composition
        from fmr.pictures.heatmap import returned

        return returned(composition(self, ax)) if ax is None else composition(self, ax)

    def __repr__(self) -> str:
        return (
            f"Composed: what {len(self.layers)} layers say at {number_of(self.n_tokens, 'token')}\n"
            f"  none of a layer's memories says it: {self.none.mean():.1%} of tokens (layers {self.none.min():.1%} to "
            f"{self.none.max():.1%}); with shuffled coefficients {self.shuffled.mean():.1%}, seed {self.seed}"
        )


@dataclass(frozen=True, eq=False)
class Promotion(Stored):
    """How each memory of all layers promotes one word at the last token of a prompt.

    >>> promotion.strongest(1), promotion.by_layer.shape
    ((3, 147), (4,))
    >>> promotion.table().head()

    added: (memories,), layer by layer, `sizes` of them: coefficient times what the value adds to the logit of the word, with
    the scales of norms held at what they are, before any soft cap of logits; average: the same for the mean of all words.
    What is above the average is `promoted`: what all words get alike moves none. by_layer: (layers,), the sums of that;
    spread: how far those of `draws` other words lie from 0, the root of the mean square. coefficients: (memories,). logit:
    that of the word, less that of an empty stream at the same scale; probability: as the model says it.
    """

    prompt: tuple[str, ...]
    between: str
    word: str
    token: int
    layers: tuple[int, ...]
    sizes: tuple[int, ...]
    added: Floats = field(repr=False)
    average: Floats = field(repr=False)
    coefficients: Floats = field(repr=False)
    by_layer: Floats
    spread: Floats
    logit: float
    probability: float
    seed: int
    draws: int

    @property
    def promoted(self) -> Floats:
        """What each memory adds to the word above what it adds to a word on average, (memories,)."""
        return self.added - self.average

    def place(self, row: int) -> tuple[int, int]:
        """The layer and the number in it of a memory."""
        ends = np.cumsum(self.sizes)
        if whole_number(row) is None or not 0 <= row < ends[-1]:
            raise AnalyzerError(f"row={row!r}: expected that of a memory, from 0 to {ends[-1] - 1}.")
        layer = int(np.searchsorted(ends, row, side="right"))
        return self.layers[layer], int(row - ends[layer] + self.sizes[layer])

    def strongest(self, rank: int = 1) -> tuple[int, int]:
        """The memory that promotes the word most, or the one of a rank: its layer and its number in it."""
        if whole_number(rank) is None or not 1 <= rank <= len(self.added):
            raise AnalyzerError(f"rank={rank!r}: expected 1 for the first, up to {len(self.added)}.")
        return self.place(int(np.argsort(-self.promoted, kind="stable")[rank - 1]))

    def table(self) -> DataFrame:
        """One row a memory, the one that promotes the word most first.

        >>> promotion.table().tail(3)
        """
        import pandas as pd

        order = np.argsort(-self.promoted, kind="stable")
        layers, numbers = zip(*(self.place(int(row)) for row in order), strict=True)
        columns = {"promoted": self.promoted, "added": self.added, "coefficient": self.coefficients}
        return pd.DataFrame({"layer": layers, "memory": numbers, **{name: one[order] for name, one in columns.items()}})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw how the memories of each layer promote the word, beside other words; returns the figure.

        >>> promotion.plot().savefig("promotion.png")
        """
        from analyzers.memories.pictures import promoted
        from fmr.pictures.heatmap import returned

        return returned(promoted(self, ax)) if ax is None else promoted(self, ax)

    def __repr__(self) -> str:
        prompt = joined(self.prompt, self.between)
        best = [f"{layer}.{number}" for layer, number in map(self.strongest, (1, 2, 3))]
        top, layer = np.sort(self.promoted)[::-1], int(np.argmax(self.by_layer))
        return (
            f"Promotion of {self.word!r} after {prompt[-60:]!r}: p {self.probability:.3f}, logit {self.logit:.2f}\n"
            f"  {number_of(len(self.added), 'memory', 'memories')} of {len(self.layers)} layers add "
            f"{self.added.sum():+.2f}, to a word on average "
            f"{self.average.sum():+.2f}; above that most in layer {self.layers[layer]}, {self.by_layer[layer]:+.2f} "
            f"({self.draws} other words ± {self.spread[layer]:.2f}, seed {self.seed})\n"
            f"  strongest memories: {', '.join(f'{name} {value:+.2f}' for name, value in zip(best, top, strict=False))}"
        )


def composed(
    model: nn.Module,
    inputs: Mapping[str, Any],
    found: Found,
    real: Tensor,
    first_words: Callable[[int], Tensor],
    seed: int,
) -> Composed:
    """How each layer's first word comes of those of its memories.

    first_words: of the number of a layer, the tokens that its values speak for and against most, (memories, 2).
    """
    check_eval(model)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    sites = [site for block in found.blocks for site in (block.post, block.out)]
    with torch.no_grad():
        run = read_at(model, inputs, sites)
        for number, block, way in zip(found.layers, found.blocks, found.ways, strict=True):
            shape = (len(real), real.shape[1])
            made = laid(run[block.out.id], block.out.layout, block, number, shape)[real.to(run[block.out.id].device)]
            weights = laid(run[block.post.id], block.post.layout, block, number, shape)[real.to(made.device)]
            values = value_vectors(block)
            orders = torch.rand(weights.shape, generator=generator).argsort(1).to(weights.device)
            dealt = weights.gather(1, orders)
            other = made.float() + (dealt.float() - weights.float()) @ values.float()
            words = first_words(number).to(weights.device)
            pairs = ((made, weights), (other.to(made.dtype), dealt))
            votes = [_votes(found, way, vectors, own, words) for vectors, own in pairs]
            rows.append(
                [share for vote in votes for share in (float((vote == 0).float().mean()), float(vote.float().mean()))]
            )
    none, voters, shuffled, shuffled_voters = np.array(rows).T
    return Composed(found.layers, none, shuffled, voters, shuffled_voters, int(real.sum()), seed)


def _votes(found: Found, way: Passage | str, vectors: Tensor, weights: Tensor, words: Tensor) -> Tensor:
    """How many memories have as their first word that of what they make together, for each token."""
    said = torch.cat([logits.argmax(1) for logits in logits_of(found.structure, vectors, way)])
    counts = []
    rows = max(1, _CELLS // weights.shape[1])
    for own, word in zip(weights.split(rows), said.split(rows), strict=True):
        voted = torch.where(own > 0, words[:, 0], words[:, 1])
        counts.append(((voted == word[:, None]) & (own != 0)).sum(1))
    return torch.cat(counts)


def promotion(
    model: nn.Module,
    inputs: Mapping[str, Any],
    found: Found,
    prompt: Sequence[str],
    between: str,
    real: Tensor,
    token: int,
    decode: Callable[[Iterable[int]], Mapping[int, str]],
    seed: int,
    draws: int,
) -> Promotion:
    """What each memory adds to the logit of a word at the last token of one prompt.

    With the scales of norms held at what they are in this run, what a vector adds to a logit is linear in it.
    """
    structure, last = found.structure, int(real[0].nonzero()[-1])
    if (why := unread(structure)) or isinstance(structure.readout, str):
        raise AnalyzerError(f"No word is promoted in {structure.model}: {why}. Expected pre-norm layers and logits.")
    check_eval(model)
    run = fmr.run(model, **inputs)
    state = run[structure.readout.end].detach().reshape(*real.shape, -1)[0, last]
    said = structure.read_out(state).detach().float()
    token_ids(token, said[None])
    others = torch.randint(len(said), (draws,), generator=torch.Generator().manual_seed(seed))
    logits = structure.frozen(state.expand(draws + 2, -1))
    asked = one_hot(torch.cat([torch.tensor([token, 0]), others]), len(said)).double()
    asked[1] = 1 / len(said)
    (maps,) = logits.back(asked).values()
    added, coefficients, sums = [], [], []
    for number, block, way in zip(found.layers, found.blocks, found.ways, strict=True):
        value = laid(run[block.post.id].detach(), block.post.layout, block, number, (1, real.shape[1]))
        weights = value[0, last].double()
        each = (value_vectors(block).double() @ _of_memories(run, block, way, structure, maps, last).mT) * weights[:, None]
        added.append(each[:, :2].cpu())
        coefficients.append(weights.cpu())
        sums.append(each.sum(0).cpu())
    table = torch.stack(sums).numpy()
    table -= table[:, 1:2].copy()
    every = torch.cat(added).numpy()
    return Promotion(
        prompt=tuple(prompt),
        between=between,
        word=decode([token])[token],
        token=token,
        layers=found.layers,
        sizes=tuple(len(one) for one in added),
        added=every[:, 0].copy(),
        average=every[:, 1].copy(),
        coefficients=torch.cat(coefficients).numpy(),
        by_layer=table[:, 0].copy(),
        spread=np.sqrt(np.square(table[:, 2:]).mean(1)) if draws else np.full(len(table), np.nan),
        logit=float(logits.value[0, token] - logits.rest[0, token]),
        probability=float(said.softmax(-1)[token]),
        seed=seed,
        draws=draws,
    )


def _of_memories(run: Run, block: Memory, way: Passage | str, structure: Structure, maps: Tensor, last: int) -> Tensor:
    """What numbers of what memories make add to logits, from what numbers of the stream do, (words, width)."""
    write = write_of(structure, block)
    if isinstance(way, Passage) and not way.changes:
        return maps * write.times
    out = block.out.id
    made = frozen(run.graph.unfused, write.added, {out: run[out].detach()}, run.__getitem__)
    rows = []
    for one in maps:
        weights = torch.zeros_like(made.value)
        weights.view(-1, len(one))[last] = one
        rows.append(made.back(weights)[out].reshape(-1, len(one))[last])
    return torch.stack(rows) * write.times
