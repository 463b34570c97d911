"""How sure a mean is, from the examples that it is of."""

import numpy as np

from analyzers.numbers.embed import Floats


def ratios(above: Floats, below: Floats, seed: int = 0, draws: int = 1000) -> tuple[Floats, Floats, Floats]:
    """The ratio of two means over examples, and the ends of its 95 % interval by the bootstrap.

    >>> mean, low, high = ratios(np.array([[1.0, 3.0]]), np.array([2.0, 2.0]))
    >>> float(mean[0])
    1.0

    above: (rows, examples); below: (examples,), whose mean is not 0. Examples are drawn with replacement, the same for both;
    of one example there is no interval: NaN.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", 1979 (percentile interval).
    """
    examples = above.shape[1]
    found = above.mean(1) / below.mean()
    if examples < 2:
        return found, np.full_like(found, np.nan), np.full_like(found, np.nan)
    drawn = np.random.default_rng(seed).multinomial(examples, np.full(examples, 1 / examples), size=draws) / examples
    scale = drawn @ below
    with np.errstate(divide="ignore", invalid="ignore"):
        values = above @ drawn.T / scale
    quantile = np.nanquantile if np.isnan(values).any() else np.quantile  # the former goes row by row
    low, high = quantile(values, (0.025, 0.975), axis=1)
    return found, low, high


def means(values: Floats, seed: int = 0, draws: int = 1000) -> tuple[Floats, Floats, Floats]:
    """The mean over examples of each row, (rows, examples), and the ends of its 95 % interval by the bootstrap.

    >>> mean, low, high = means(np.array([[1.0, 3.0]]))
    >>> float(mean[0])
    2.0
    """
    return ratios(values, np.ones(values.shape[1]), seed, draws)
