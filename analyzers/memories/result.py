"""Memories as numbers: what triggers each, what each says, and how often the two agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from analyzers.memories.agreement import NONE, agreement
from analyzers.memories.counted import SIGNS, Counts
from analyzers.memories.spelling import joined
from analyzers.memories.vocabulary import Values
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

Array = NDArray[Any]

_LONGEST = 60
"""How many characters of a prefix are shown, the last ones."""


@dataclass(frozen=True, eq=False)
class Memories(Stored):
    """The memories of a model: what triggers each, what each says, and how often the two agree, by layer.

    >>> found.agreement.shape, found.coefficients.shape
    ((4, 1), (2048, 1, 5))
    >>> found.table().query("layer == 3").sort_values("z").tail()

    All memories of all layers lie in one row, layer by layer, `sizes` of them. coefficients: (memories, signs, k), those of
    the strongest triggers, the strongest first, positive and then negative; 0 where there is none. texts, positions: the
    number of the text of each and the place of its last token; following: the token after it, -1 where none is. means,
    deviations: of the coefficients of each memory over all tokens that were counted, (memories,). words: (memories, 2, top),
    the tokens that each value speaks for and against most, with scores: what it adds to their logits.

    agreement: (layers, signs), the share of memories whose strongest trigger is followed by the first word of their value;
    of negative triggers, by the word that the value speaks against most. chance: the mean of that share with values permuted
    over the memories of the layer, high: its 97.5 % point, p_values: the share of permutations that do as well. among: the
    share whose word is among the next tokens of all k triggers, among_chance: the same by chance. unread: why values have no
    words, if so; these are NaN then.
    """

    layers: tuple[int, ...]
    sites: tuple[str, ...]
    sizes: tuple[int, ...]
    coefficients: Array = field(repr=False)
    texts: Array = field(repr=False)
    positions: Array = field(repr=False)
    following: Array = field(repr=False)
    means: Array = field(repr=False)
    deviations: Array = field(repr=False)
    words: Array = field(repr=False)
    scores: Array = field(repr=False)
    agreement: Array
    chance: Array
    high: Array
    p_values: Array
    among: Array
    among_chance: Array
    corpus: Array = field(repr=False)
    starts: Array = field(repr=False)
    spelled: dict[str, str] = field(repr=False)
    between: str
    n_texts: int
    n_tokens: int
    k: int
    position: int | None
    unread: str
    seed: int
    draws: int

    def __len__(self) -> int:
        return len(self.means)

    @property
    def signs(self) -> tuple[int, ...]:
        """The signs of coefficients that have triggers."""
        return SIGNS[: self.coefficients.shape[1]]

    @property
    def z(self) -> Array:
        """How many standard deviations each trigger lies above the mean of its memory, (memories, signs, k); NaN: none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            far = (self.coefficients - self.means[:, None, None]) / self.deviations[:, None, None]
        return np.where(self.coefficients == 0, np.nan, far)

    def row(self, layer: int, memory: int) -> int:
        """Where a memory lies among those of all layers.

        >>> found.row(1, 7)
        519
        """
        if layer not in self.layers or not 0 <= memory < self.sizes[self.layers.index(layer)]:
            raise AnalyzerError(
                f"layer={layer!r}, memory={memory!r}: expected one of the layers {', '.join(map(str, self.layers))}, and a "
                f"memory from 0 to {max(self.sizes) - 1}."
            )
        return sum(self.sizes[: self.layers.index(layer)]) + memory

    def word(self, token: int) -> str:
        """The text of a token."""
        return self.spelled.get(str(token), str(token))

    def prefix(self, text: int, position: int, longest: int | None = _LONGEST) -> str:
        """The text of a prefix, the last characters of it."""
        own = self.corpus[self.starts[text] : self.starts[text + 1]][: position + 1]
        whole = joined((self.word(int(token)) for token in own), self.between)
        return whole if longest is None or len(whole) <= longest else "…" + whole[-longest:]

    def triggers(self, layer: int, memory: int, sign: int = 1) -> DataFrame:
        """The strongest triggers of a memory: prefix, the token that followed, coefficient and z.

        >>> found.triggers(3, 7)["prefix"]
        """
        import pandas as pd

        row, side = self.row(layer, memory), self._side(sign)
        kept = self.coefficients[row, side] != 0
        places = zip(self.texts[row, side][kept], self.positions[row, side][kept], strict=True)
        return pd.DataFrame(
            {
                "prefix": [self.prefix(int(text), int(position)) for text, position in places],
                "next": ["" if token < 0 else self.word(int(token)) for token in self.following[row, side][kept]],
                "coefficient": self.coefficients[row, side][kept],
                "z": self.z[row, side][kept],
            }
        )

    def says(self, layer: int, memory: int, sign: int = 1) -> DataFrame:
        """The words that a memory speaks for when its coefficient has a sign, with what its value adds to their logits.

        >>> found.says(3, 7).head(3)
        """
        import pandas as pd

        if self.unread:
            raise AnalyzerError(f"The values have no words: {self.unread}.")
        if sign not in SIGNS:
            raise AnalyzerError(f"sign={sign!r}: expected 1, or -1 for what is said by a negative coefficient.")
        row, side = self.row(layer, memory), SIGNS.index(sign)
        return pd.DataFrame(
            {"word": [self.word(int(token)) for token in self.words[row, side]], "score": self.scores[row, side]}
        )

    def table(self) -> DataFrame:
        """One row a memory and sign: moments, the strongest trigger, what followed, what the value says.

        `next` is the token after the strongest trigger that any token follows.

        >>> found.table().query("agrees")
        """
        import pandas as pd

        n, signs = len(self), len(self.signs)
        best, followed = self.coefficients[:, :, 0], self.following >= 0
        following = np.take_along_axis(self.following, followed.argmax(2)[..., None], 2)[..., 0]
        words = self.words[:, :signs, 0] if not self.unread else np.full((n, signs), -1)
        where = np.repeat(np.arange(len(self.sizes)), self.sizes)
        within = np.concatenate([np.arange(size) for size in self.sizes])
        return pd.DataFrame(
            {
                "layer": np.repeat(np.array(self.layers)[where], signs),
                "memory": np.repeat(within, signs),
                "sign": np.tile(self.signs, n),
                "mean": np.repeat(self.means, signs),
                "deviation": np.repeat(self.deviations, signs),
                "coefficient": best.ravel(),
                "z": self.z[:, :, 0].ravel(),
                "next": [self.word(int(token)) if token >= 0 else "" for token in following.ravel()],
                "says": [self.word(int(token)) if token >= 0 else "" for token in words.ravel()],
                "agrees": ((following == words) & (words >= 0)).ravel(),
            }
        )

    def by_layer(self) -> DataFrame:
        """One row a layer and sign: how often triggers and values agree, beside chance.

        >>> found.by_layer()[["layer", "agreement", "chance", "high"]]
        """
        import pandas as pd

        signs = len(self.signs)
        numbers = ("agreement", "chance", "high", "p_values", "among", "among_chance")
        columns = {name: getattr(self, name).ravel() for name in numbers}
        return pd.DataFrame(
            {"layer": np.repeat(self.layers, signs), "sign": np.tile(self.signs, len(self.layers)), **columns}
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw agreement by layer, one line a sign, over the band of chance; returns the figure.

        >>> found.plot().savefig("memories.png")
        """
        from analyzers.memories.pictures import by_layer
        from fmr.pictures.heatmap import returned

        return returned(by_layer(self, ax)) if ax is None else by_layer(self, ax)

    def plot_memory(self, layer: int, memory: int, sign: int = 1, ax: Axes | None = None) -> Figure:
        """Draw one memory: its triggers with what followed each, and the words of its value; returns the figure.

        >>> found.plot_memory(3, 7).savefig("memory.png")
        """
        from analyzers.memories.pictures import one_memory
        from fmr.pictures.heatmap import returned

        figure = one_memory(self, layer, memory, sign, ax)
        return returned(figure) if ax is None else figure

    def _side(self, sign: int) -> int:
        if sign not in self.signs:
            raise AnalyzerError(
                f"sign={sign!r}: expected one of {self.signs}; KeyValueMemories(model, signs=2) counts both."
            )
        return self.signs.index(sign)

    def __repr__(self) -> str:
        counted = "all tokens" if self.position is None else f"token {self.position} of each text"
        signs = " and sign" if len(self.signs) == 2 else ""
        lines = [
            f"Memories: {len(self)} of {number_of(len(self.layers), 'layer')} over "
            f"{number_of(self.n_tokens, 'token')} in {number_of(self.n_texts, 'text')} "
            f"({counted}); {number_of(self.k, 'trigger')} a memory{signs}"
        ]
        if self.unread:
            return f"{lines[0]}\n  values without words: {self.unread}"
        lines += [self._agreeing(side, sign) for side, sign in enumerate(self.signs)]
        return "\n".join([*lines, f"  chance: {self.draws} permutations of values over memories, seed {self.seed}"])

    def _agreeing(self, side: int, sign: int) -> str:
        shares = np.nan_to_num(self.agreement[:, side])
        layer, above = int(shares.argmax()), int((shares > self.high[:, side]).sum())
        which, word = ("positive", "for") if sign > 0 else ("negative", "against")
        if np.isnan(self.agreement[:, side]).all():
            return f"  {which} triggers: no token follows any of them"
        return (
            f"  {which} triggers followed by the word that their value speaks {word} most: layer {self.layers[layer]} "
            f"{shares[layer]:.2%} (chance {self.chance[layer, side]:.2%}, p {self.p_values[layer, side]:.2g}); above chance "
            f"in {above} of {number_of(len(shares), 'layer')}"
        )


def made(
    counts: Counts,
    values: Sequence[Values],
    unread: str,
    decode: Callable[[Iterable[int]], Mapping[int, str]],
    between: str,
    settings: Mapping[str, Any],
    seed: int,
    draws: int,
) -> Memories:
    """The result of counts and of what values say."""
    counts.forget()
    texts = {number: place for place, number in enumerate(sorted(counts.texts))}
    rows = [counts.texts[number] for number in texts]
    starts = np.cumsum([0, *map(len, rows)])
    corpus = np.concatenate([*rows, np.zeros(0, np.int32)])
    coefficients, numbers, positions = (np.concatenate(column) for column in zip(*map(_lists, counts.layers), strict=True))
    known = np.array([*texts, 0])
    where = np.searchsorted(known[:-1], numbers).astype(np.int32)
    after = starts[where] + positions + 1
    has_next = (after < starts[where + 1]) & (coefficients != 0) if len(rows) else np.zeros_like(coefficients, bool)
    following = np.where(has_next, corpus[np.where(has_next, after, 0)] if len(corpus) else -1, -1).astype(np.int32)
    words = np.concatenate([one.tokens.numpy() for one in values]) if values else np.zeros((0, 2, 0), np.int32)
    scores = np.concatenate([one.scores.numpy() for one in values]) if values else np.zeros((0, 2, 0), np.float32)
    sizes = [layer.n for layer in counts.layers]
    found = _agreements(following, words, sizes, seed, draws)
    spelled = decode(int(one) for one in np.unique(np.concatenate([corpus, words.ravel()])))
    return Memories(
        layers=tuple(layer.number for layer in counts.layers),
        sites=tuple(layer.site for layer in counts.layers),
        sizes=tuple(sizes),
        coefficients=coefficients,
        texts=where,
        positions=positions,
        following=following,
        means=torch.cat([layer.moments.mean for layer in counts.layers]).numpy(),
        deviations=torch.cat([layer.moments.variance.sqrt() for layer in counts.layers]).numpy(),
        words=words,
        scores=scores,
        corpus=corpus,
        starts=starts,
        spelled={str(token): word for token, word in spelled.items()},
        between=between,
        n_texts=counts.n_texts,
        n_tokens=counts.n_tokens,
        k=settings["k"],
        position=settings["position"],
        unread=unread,
        seed=seed,
        draws=draws,
        **found,
    )


def _lists(layer: Any) -> tuple[Array, Array, Array]:
    """The lists of a layer, each (memories, signs, k): coefficients, numbers of texts, positions."""
    pairs = list(zip(SIGNS, layer.tops, strict=False))
    return (
        torch.stack([sign * tops.values for sign, tops in pairs], 1).numpy(),
        torch.stack([tops.texts for _, tops in pairs], 1).numpy(),
        torch.stack([tops.places for _, tops in pairs], 1).numpy(),
    )


def _agreements(following: Array, words: Array, sizes: Sequence[int], seed: int, draws: int) -> dict[str, Array]:
    """How triggers and values agree, by layer and sign."""
    signs = following.shape[1]
    rows, start = [], 0
    for size in sizes:
        own = slice(start, start + size)
        start += size
        for side in range(signs):
            rows.append(agreement(following[own, side], words[own, side, 0], seed, draws) if len(words) else NONE)
    table = np.array(rows).reshape(len(sizes), signs, -1)
    names = {"agreement": 0, "chance": 1, "high": 2, "p_values": 3, "among": 4, "among_chance": 5}
    return {name: table[:, :, column] for name, column in names.items()}
