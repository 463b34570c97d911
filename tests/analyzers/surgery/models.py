"""Models by hand: layers called in a loop, one after the other by name, and with more than the stream between them."""

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A layer with one attention and one memory."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """The stream after the layer."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        pattern = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((pattern @ v).transpose(1, 2).flatten(-2))
        return x + self.down(torch.relu(self.up(self.second(x))))


class Looped(nn.Module):
    """Layers in a list that a loop goes through."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 16), nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Unrolled(nn.Module):
    """Layers that are attributes, called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 16), nn.LayerNorm(16), nn.Linear(16, 11)
        self.a, self.b, self.c = Block(), Block(), Block()

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.norm(self.c(self.b(self.a(self.embed(tokens))))))


class Shared(Looped):
    """One layer that is called several times."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(tokens)
        for _ in range(3):
            x = self.blocks[0](x)
        return self.head(self.norm(x))


class Kept(Looped):
    """Layers that are registered in one list and run from another."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(tokens)
        for block in self.__dict__.setdefault("own", list(self.blocks)):
            x = block(x)
        return self.head(self.norm(x))


class Scaled(Looped):
    """Layers between which the code does something with the stream."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x * 1.5)
        return self.head(self.norm(x))


class TiedOut(Looped):
    """Layers whose heads write by one matrix."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.out.weight = self.blocks[0].out.weight


class _Counting(Block):
    """A layer that knows its number and computes with it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, kept: object = None) -> Tensor:
        """The stream after the layer, whatever it may keep state in."""
        return x + self.down(torch.relu(self.up(self.second(x)))) / (self.number + 1)


class Numbered(Looped):
    """Layers that compute with their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(_Counting, range(3)))

    def forward(self, tokens: Tensor, kept: object = None) -> Tensor:
        """The logits."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, kept)
        return self.head(self.norm(x))


class _Telling(Block):
    """A layer that returns what it made of its memory beside the stream, and reads what the one before made."""

    def forward(self, x: Tensor, told: Tensor | None = None) -> Any:
        """The stream, and what the next layer is told."""
        x = super().forward(x if told is None else x + 0.1 * told.mean())
        return x, self.up(self.second(x))


class _Shared(Block):
    """A layer that is told beside the stream how much of its memory to write once more."""

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """The stream after the layer."""
        x = super().forward(x)
        return x if share is None else x + share * self.down(torch.relu(self.up(x)))


class Shares(Looped):
    """Layers that are given something else by their place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.shares = nn.ModuleList(_Shared() for _ in range(3)), nn.Parameter(torch.rand(3))

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(tokens)
        for n, block in enumerate(self.blocks):
            x = block(x, self.shares[n])
        return self.head(self.norm(x))


class Telling(Looped):
    """Layers that tell one another more than the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Telling() for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        x, told = self.embed(tokens), None
        for block in self.blocks:
            x, told = block(x, told)
        return self.head(self.norm(x))


def made(kind: type[nn.Module]) -> nn.Module:
    """A model in eval mode, with the same weights each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return kind().eval()
