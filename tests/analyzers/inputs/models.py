"""Small models of which it is known what they rest on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from analyzers.inputs.methods import OWN, SHARED


class Single(nn.Module):
    """A function of one tensor as a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def made(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Single(function).eval()


TOKENS = fmr.Site("input:x", layout=("examples", "positions", "units"))
"""The input of a `Single` that is said to be of tokens."""


def own(method: str, **settings: Any) -> dict[str, Any]:
    """Those settings that a method goes by."""
    return {name: one for name, one in settings.items() if name in (*OWN.get(method, ()), *SHARED)}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers around zero, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Gated(nn.Module):
    """A layer of a gated kind with one activation that is used again, a norm and a softmax: functional throughout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)
        self.q, self.k, self.v, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (6,), self.scale, None)
        pattern = (self.q(y) @ self.k(y).transpose(-1, -2) / 6**0.5).softmax(-1)
        x = x + pattern @ self.v(y)
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * F.gelu(self.up(y)))
        return self.out(x.mean(1))


class Reused(nn.Module):
    """A network of convolutions with one module of ReLU6 for all of them, as mobile networks have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.norm, self.act, self.pool = nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.first(4 * x))))
        x = self.act(self.second(x))
        return self.out(x.mean((2, 3)))


def reused() -> nn.Module:
    return Reused().eval()


def gated() -> nn.Module:
    return Gated().eval()


class Words:
    """In place of a tokenizer: a word is a number."""

    pad_token_id = 0

    def __call__(self, text: Any, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
        rows = [[int(word) for word in one.split()] for one in ([text] if isinstance(text, str) else text)]
        if isinstance(text, str) and return_tensors is None:
            return {"input_ids": rows[0]}
        return {"input_ids": torch.tensor(rows) if return_tensors else rows}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Additive(nn.Module):
    """Tokens that speak for classes, one by one: what is true of each is a row of its table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.table.weight.data = numbers(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids).sum(1)


class Twice(Additive):
    """The same, looked up in two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Embedding(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + self.other(input_ids).sum(1)
