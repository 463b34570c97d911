"""Self-attention as a module to itself: what lies between two positions, and what is looked at in place of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HEADS, SIZE, WIDTH, attends, joined, split, weight
from tests.structure.projections import Fused


class Relative(Fused):
    """Shaw's relative positions, among keys and among values."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = weight(7, SIZE), weight(7, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        places = torch.arange(x.shape[1])
        away = (places - places[:, None]).clamp(-3, 3) + 3
        scores = q @ k.mT + torch.einsum("bhqd,qkd->bhqk", q, self.near[away])
        p = attends((scores / SIZE**0.5).softmax(-1))
        return self.out(joined(p @ v + torch.einsum("bhqk,qkd->bhqd", p, self.far[away])))


class Bucketed(Fused):
    """A learned bias for each head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(7, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        places = torch.arange(x.shape[1])
        bias = self.bias((places - places[:, None]).clamp(-3, 3) + 3).permute(2, 0, 1)
        return self.out(joined(attends((q @ k.mT + bias).softmax(-1)) @ v))


class Disentangled(Fused):
    """A query's bias and a second product with positions, shifted row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.w, self.r = weight(HEADS, 1, SIZE), weight(HEADS, 1, SIZE), nn.Linear(WIDTH, WIDTH)
        self.places = weight(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        r = split(self.r(self.places[: x.shape[1]]).unsqueeze(0))
        far = F.pad((q + self.w) @ r.mT, (1, 0)).view(*q.shape[:2], -1, x.shape[1])[:, :, 1:].view(*q.shape[:3], -1)
        return self.out(joined(attends(((q + self.u) @ k.mT + far).softmax(-1)) @ v))


class Edges(nn.Module):
    """Each position has keys and values of its own: those of the others with what lies between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.between = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        between = self.between(x[:, :, None] * x[:, None]).unflatten(-1, (HEADS, SIZE)).permute(0, 3, 1, 2, 4)
        k, v = (split(w(x)).unsqueeze(2) + between for w in (self.k, self.v))
        p = attends((torch.einsum("bhid,bhijd->bhij", split(self.q(x)), k) * SIZE**-0.5).softmax(-1))
        return self.out(joined(torch.einsum("bhij,bhijd->bhid", p, v)))


class Landmarks(Fused):
    """Only means of the queries look at all keys; how queries look at those is approximated by two more softmaxes."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        few, least = (torch.stack([t[:, :, ::2].mean(2), t[:, :, 1::2].mean(2)], 2) for t in (q, k))
        near, among = (q @ least.mT).softmax(-1), (few @ least.mT).softmax(-1)
        rough = 2 * among.mT - among.mT @ (among @ among.mT)
        return self.out(joined(near @ rough @ (attends((few @ k.mT).softmax(-1)) @ v)))


FOUND = (
    Relative,
    Bucketed,
    Disentangled,
    Edges,
)
