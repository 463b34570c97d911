"""Small convolutional networks of which it is known what they look for."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ANGLES = (0.0, 45.0, 90.0, 135.0)
"""The directions, in degrees, along which the filters of `Edges` change."""


def wave(degrees: float, side: int = 9, period: float = 4.0) -> Tensor:
    """A filter that answers to waves that change along one direction, within a round window."""
    places = torch.arange(side) - side // 2
    down, across = places[:, None], places[None]
    along = across * math.cos(math.radians(degrees)) + down * math.sin(math.radians(degrees))
    found = torch.cos(2 * math.pi * along / period) * torch.exp(-(down**2 + across**2) / (2 * (side / 4) ** 2))
    return (found - found.mean()) / found.abs().sum()


class Edges(nn.Module):
    """A layer with a filter of each angle for the mean of all colours, and ReLU behind it."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.filters = nn.Conv2d(channels, len(ANGLES), 9, padding=4, bias=False)
        self.act = nn.ReLU()
        with torch.no_grad():
            self.filters.weight.copy_(torch.stack([wave(angle) for angle in ANGLES])[:, None].expand(-1, channels, -1, -1))

    def forward(self, images: Tensor) -> Tensor:
        return self.act(self.filters(images))


def orientation(image: Tensor) -> float:
    """The direction along which a grey image changes most, in degrees from 0 to 180: the main axis of its power spectrum."""
    power = torch.fft.fft2(image - image.mean()).abs().square()
    down, across = torch.fft.fftfreq(image.shape[0])[:, None], torch.fft.fftfreq(image.shape[1])
    power = power * ((down.abs() < 0.45) & (across.abs() < 0.45))
    angle = 0.5 * math.atan2(2 * float((power * down * across).sum()), float((power * (across**2 - down**2)).sum()))
    return math.degrees(angle) % 180


class Chain(nn.Module):
    """Convolutions, poolings and strides one behind the other, with a linear read-out."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(6, 8, 3, padding=1)
        self.late = nn.Conv2d(8, 5, 3, padding=2, dilation=2)
        self.out = nn.Linear(5, 4)
        with torch.no_grad():
            for one in self.parameters():
                one.copy_(torch.randn(one.shape, generator=draw) / math.sqrt(max(1, one[0].numel())))

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(images)), 2)
        x = F.relu6(self.late(F.relu(self.middle(x))))
        return self.out(x.mean((2, 3)))


class Dead(nn.Module):
    """A unit that no grey image wakes: its bias lies far below what noise reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, 2, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        with torch.no_grad():
            self.filters.weight.fill_(0.0)
            self.filters.weight[:, :, 1, 1] = 1.0
            self.filters.bias.copy_(torch.tensor([-0.8, 0.0]))

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {"map": self.act(self.filters(images))}


class Named(nn.Module):
    """A model that takes its image by name, with something beside it, and returns logits among other things."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, scale: Tensor, *, pixel_values: Tensor) -> dict[str, Tensor]:
        hidden = self.conv(pixel_values) * scale
        return {"logits": hidden.mean((2, 3)), "hidden": hidden, "rounded": hidden.round().long()}


class Patches(nn.Module):
    """Tokens of an image with a residual stream: (images, positions, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x)).mean(1)


class Attending(nn.Module):
    """A layer of attention and a feed-forward one, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in self.joint(self.before(x)).chunk(3, dim=2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.behind(x))))


class Looker(nn.Module):
    """A vision transformer of two layers over patches of 4 x 4 pixels, with a class token in front."""

    def __init__(self, size: tuple[int, int] = (8, 8), width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 1 + size[0] * size[1] // 16, width))
        self.layers = nn.ModuleList(Attending(width, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def patched(self, given: Tensor) -> Tensor:
        return self.embed(given).flatten(2).mT

    def forward(self, given: Tensor) -> Tensor:
        x = self.patched(given)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])
