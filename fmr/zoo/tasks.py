"""What the zoo's classifiers were trained to tell: seeded data for each of them, as many fresh examples as wanted.

>>> from fmr.zoo import tasks
>>> tasks.equality(1000, seed=0).inputs.shape
torch.Size([1000, 16])
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fmr.errors import ZooError

VALUES, SIZE = 4, 4
"""Of the equality task: how many values, and the size of the vector that stands for each."""
SYMBOLS, LENGTH = 8, 10
"""Of the sequence task: how many symbols there are, and how many are read."""


class Equality(NamedTuple):
    """Examples of hierarchical equality: the inputs, its two inner variables and the label, row by row."""

    inputs: Tensor
    left: Tensor
    right: Tensor
    labels: Tensor


class Labelled(NamedTuple):
    """Inputs and the class of each, row by row."""

    inputs: Tensor
    labels: Tensor


class Toys(NamedTuple):
    """What toy models of superposition were trained on: in which share of examples each model's features are there, and
    what each is worth.

    shares: (models,); importance: (models, features). width: dimensions of each model.
    """

    shares: Tensor
    importance: Tensor
    width: int


class Digits(NamedTuple):
    """Images of handwritten digits, split for good into what training saw and what it did not."""

    train: Labelled
    test: Labelled


def equality(n: int, seed: int) -> Equality:
    """Four random vectors a row; the label is whether (first == second) agrees with (third == fourth).

    >>> task = tasks.equality(1000, seed=0)
    >>> bool((task.labels == (task.left == task.right).long()).all())
    True

    n: rows, of which about a quarter has each setting of the two inner variables. seed: which vectors; values are
    uniform in [-1, 1], so two vectors that are not made equal are different. `inputs` holds the four one after the other.
    """
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(n, VALUES, SIZE, generator=draw) * 2 - 1
    same = torch.randint(2, (n, 2), generator=draw).bool()
    values[:, 1] = torch.where(same[:, :1], values[:, 0], values[:, 1])
    values[:, 3] = torch.where(same[:, 1:], values[:, 2], values[:, 3])
    left, right = same.unbind(1)
    return Equality(values.flatten(1), left, right, (left == right).long())


def digits() -> Digits:
    """The handwritten digits of scikit-learn: 1,797 images [1, 8, 8] with values from 0 to 1, every fifth for testing.

    >>> tasks.digits().test.inputs.shape
    torch.Size([360, 1, 8, 8])
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ZooError("The digits come with scikit-learn, which is not installed: pip install 'fmr[analysis]'") from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target, dtype=torch.long)
    test = torch.arange(len(labels)) % 5 == 0
    return Digits(Labelled(images[~test], labels[~test]), Labelled(images[test], labels[test]))


def sequences(n: int, seed: int) -> Labelled:
    """Random symbols, ten a row; the label is whether the last is the first again, as it is in half of the rows.

    >>> tasks.sequences(1000, seed=0).inputs.shape
    torch.Size([1000, 10])
    """
    draw = torch.Generator().manual_seed(seed)
    symbols = torch.randint(SYMBOLS, (n, LENGTH), generator=draw)
    same = torch.randint(2, (n,), generator=draw).bool()
    other = (symbols[:, 0] + torch.randint(1, SYMBOLS, (n,), generator=draw)) % SYMBOLS
    symbols[:, -1] = torch.where(same, symbols[:, 0], other)
    return Labelled(symbols, same.long())


PHASES = 16
"""Of the toy models of two features: how many shares, and how many importances, there are."""


def toys(name: str) -> Toys:
    """The settings of toy models of superposition.

    >>> tasks.toys("superposition").shares
    tensor([1.0000, 0.5179, 0.2683, 0.1389, 0.0720, 0.0373, 0.0193, 0.0100])

    name: "superposition" is five features in two dimensions, each worth 0.9 of the one before; "superposition-geometry" is
    80 features of the same worth in 12; "superposition-phases" is two features in one dimension, every share beside every
    importance of the second, row by row of importance.
    """
    if name == "superposition":
        return Toys(_falling(8, 0.01), 0.9 ** torch.arange(5.0).expand(8, 5), 2)
    if name == "superposition-geometry":
        return Toys(_falling(20, 0.05), torch.ones(20, 80), 12)
    if name == "superposition-phases":
        shares, second = _falling(PHASES, 0.01).flip(0), torch.logspace(-1, 1, PHASES)
        importance = torch.stack([torch.ones(PHASES, PHASES), second[:, None].expand(-1, PHASES)], -1)
        return Toys(shares.repeat(PHASES), importance.flatten(0, 1), 1)
    raise ZooError(f"There are no toy models {name!r}. Expected 'superposition', '...-geometry' or '...-phases' of it.")


def _falling(many: int, last: float) -> Tensor:
    """Shares from 1 down, each the same part of the one before."""
    return last ** (torch.arange(many) / (many - 1))


def features(given: Toys, n: int, seed: int) -> Tensor:
    """Inputs of toy models, (n, models, features): each feature is there in a share of examples, uniform from 0 to 1.

    >>> tasks.features(tasks.toys("superposition"), 100, seed=0).shape
    torch.Size([100, 8, 5])
    """
    draw = torch.Generator().manual_seed(seed)
    size = (n, *given.importance.shape)
    on = torch.rand(size, generator=draw) < given.shares[:, None]
    return on * torch.rand(size, generator=draw)
