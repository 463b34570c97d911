"""Whether what follows a memory's triggers is what its value says, beside values dealt out to other memories."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analyzers.numbers.embed import Floats

_CELLS = 1 << 24
"""How many comparisons are made at once."""

Tokens = NDArray[Any]


class Agreement(NamedTuple):
    """A share of memories, beside the mean and the 97.5 % point of that share with values permuted over memories.

    among: the share whose word is among the next tokens of all its triggers, beside its mean over all permutations.
    memories: how many had a trigger that a token follows. p_value: the share of permutations that do as well.
    """

    share: float
    chance: float
    high: float
    p_value: float
    among: float
    among_chance: float
    memories: int


NONE = Agreement(*(6 * (float("nan"),)), memories=0)
"""That of no memories."""


def agreement(following: Tokens, words: Tokens, seed: int, draws: int) -> Agreement:
    """How often the first word of a memory is the token after its strongest trigger.

    >>> agreement(np.array([[4], [7]]), np.array([4, 7]), seed=0, draws=100).share
    1.0

    following: (memories, triggers), the token after each, the strongest first, -1 where none is; words: (memories,). The
    means by chance are those over all permutations, which follow from counts; `draws` of them give the rest.
    """
    followed = (following >= 0).any(1)
    following, words = following[followed], words[followed]
    n = len(words)
    if n == 0:
        return NONE
    first = following[np.arange(n), (following >= 0).argmax(1)]
    share = float((first == words).mean())
    counts = np.bincount(words, minlength=int(max(words.max(), following.max())) + 1) / n
    chance = float(counts[first].mean())
    several = np.sort(following, 1)
    fresh = np.concatenate([np.ones((n, 1), bool), several[:, 1:] != several[:, :-1]], 1) & (several >= 0)
    among_chance = float(np.where(fresh, counts[several], 0).sum(1).mean())
    null = _permuted(first, words, seed, draws)
    return Agreement(
        share,
        chance,
        float(np.quantile(null, 0.975)) if draws else float("nan"),
        (1 + float((null >= share).sum())) / (1 + draws) if draws else float("nan"),
        float((following == words[:, None]).any(1).mean()),
        among_chance,
        n,
    )


def _permuted(first: Tokens, words: Tokens, seed: int, draws: int) -> Floats:
    """The shares of equal pairs with words permuted, one a draw."""
    generator, shares = np.random.default_rng(seed), []
    step = max(1, _CELLS // len(words))
    for start in range(0, draws, step):
        many = np.tile(words, (min(step, draws - start), 1))
        shares.append((generator.permuted(many, axis=1, out=many) == first).mean(1))
    return np.concatenate(shares) if shares else np.zeros(0)
