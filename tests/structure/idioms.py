"""Models that say of themselves what is true of them: what `fmr.locate` finds in one is compared with what it told.

While a model runs it hands its own patterns, coefficients and sums to `attends`, `remembers` and `carries`. These compute
nothing, so the graph is the one of the plain code. The sizes differ from one another, so that no two can be mistaken.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WIDTH, HEADS, SIZE, HIDDEN, TOKENS = 32, 4, 8, 24, 11


class Seen(NamedTuple):
    """One true attention: its pattern, in which `layout` names the dimensions, and the shape of its heads."""

    pattern: Tensor
    layout: str
    heads: int
    groups: int
    size: int
    kind: str

    @property
    def maps(self) -> Tensor:
        """The pattern as (heads, everything else, queries, keys)."""
        if "h" not in self.layout:
            return self.pattern[None]
        rest = [letter for letter in self.layout if letter not in "hqk"]
        return self.pattern.permute(*(self.layout.index(letter) for letter in ["h", *rest, *"qk"] if letter in self.layout))


@dataclass
class Truth:
    """What a model told while it ran."""

    attention: list[Seen] = field(default_factory=list)
    posts: list[Tensor] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)


TOLD = [Truth()]


def attends(
    pattern: Tensor, layout: str = "bhqk", heads: int = HEADS, groups: int = 0, size: int = SIZE, kind: str = "self"
) -> Tensor:
    """Say that this is the pattern of an attention."""
    TOLD[-1].attention.append(Seen(pattern, layout, heads, groups or heads, size, kind))
    return pattern


def remembers(post: Tensor) -> Tensor:
    """Say that these are the coefficients of a memory."""
    TOLD[-1].posts.append(post)
    return post


def carries(point: Tensor) -> Tensor:
    """Say that this is a value of the residual stream."""
    TOLD[-1].points.append(point)
    return point


@dataclass(frozen=True)
class Case:
    """A model, its inputs for a number of examples and positions, and how many layers it has."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], tuple[Any, ...]] = lambda examples, length: (torch.randint(TOKENS, (examples, length)),)
    layers: int | None = 2
    reason: str = ""


class Stack(nn.Module):
    """Tokens, then layers of an attention and a memory with a norm before each, then the logits."""

    def __init__(self, attention: Callable[[], nn.Module], memory: Callable[[], nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Parameter(torch.randn(64, WIDTH) / 4)
        self.attention = nn.ModuleList(attention() for _ in range(layers))
        self.memory = nn.ModuleList(memory() for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers + 1))
        self.logits = nn.Linear(WIDTH, 2 * WIDTH + 1, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = carries(self.tokens(ids) + self.places[: ids.shape[1]])
        for n, (attention, memory) in enumerate(zip(self.attention, self.memory, strict=True)):
            x = carries(x + attention(self.norms[2 * n](x)))
            x = carries(x + memory(self.norms[2 * n + 1](x)))
        logits: Tensor = self.logits(self.norms[-1](x))
        return logits


class Plain(nn.Module):
    """The memory of most: up, bend, down."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(remembers(torch.relu(self.up(x))))


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """(examples, positions, width) as (examples, heads, positions, units)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def joined(z: Tensor) -> Tensor:
    """The inverse of `split`."""
    return z.transpose(1, 2).flatten(2)


def causal(scores: Tensor) -> Tensor:
    """Which of the keys come after a query."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


class Heads(nn.Module):
    """Four projections and heads between them; `mix` is the spelling under test."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor], groups: int = HEADS) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, groups * SIZE), nn.Linear(WIDTH, groups * SIZE)
        self.mix, self.groups = mix, groups

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        seen = x if context is None else context
        q, k, v = split(self.q(x)), split(self.k(seen), self.groups), split(self.v(seen), self.groups)
        return self.out(joined(self.mix(q, k, v)))


def weight(*shape: int) -> nn.Parameter:
    """A weight of this shape, about as large as a layer begins with."""
    return nn.Parameter(torch.randn(shape) / WIDTH**0.5)


def rounded(x: Tensor) -> Tensor:
    """A value in 255 steps, with the gradient of the value itself."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return x + ((x / scale).round() * scale - x).detach()
