"""Values of which the dictionary is known: sums of few directions out of many."""

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE, WIDTH, ON = 48, 24, 3


def directions(seed: int = 99) -> Tensor:
    """Random directions of length 1, twice as many as there are numbers, of another seed than any start."""
    return F.normalize(torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)


def sums(rows: int, seed: int = 0) -> Tensor:
    """Rows of sums of three directions on average, about a point that is not 0."""
    draw = torch.Generator().manual_seed(seed + 1)
    on = torch.rand(rows, SIZE, generator=draw) < ON / SIZE
    return (on * (0.5 + torch.rand(rows, SIZE, generator=draw))) @ directions() * 4 + 2


def found(decoder: Tensor) -> Tensor:
    """How near the nearest direction of a dictionary is to each true one, as a cosine."""
    return (directions() @ F.normalize(decoder, dim=1).T).max(1).values
