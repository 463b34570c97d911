"""Models of images: attention within windows, along axes and over pixels, and mixing without any."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.blocks import Block
from tests.structure.idioms import HEADS, HIDDEN, SIZE, WIDTH, Plain, attends, carries, weight


class Inside(nn.Module):
    """A transformer with a stream of its own inside a residual block of an image model."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        x = carries(self.enter(image))
        y = carries(self.inner(x.flatten(2).mT))
        for block in self.blocks:
            y = block(y)
        return carries(x + self.leave(y).mT.view(x.shape))


class Windows(nn.Module):
    """Attention within shifted windows of an image, with a bias for each offset."""

    def __init__(self, shift: int = 1) -> None:
        super().__init__()
        self.qkv, self.out, self.bias, self.shift = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            weight(HEADS, 4, 4),
            shift,
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, WIDTH)
        q, k, v = self.qkv(y).reshape(-1, 4, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        p = attends((q @ k.transpose(-2, -1) + self.bias.unsqueeze(0)).softmax(-1))
        y = self.out((p @ v).transpose(1, 2).reshape(-1, 4, WIDTH))
        y = y.view(b, h // 2, w // 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, WIDTH)
        return carries(x + torch.roll(y, (self.shift, self.shift), (1, 2)))


class Vision(nn.Module):
    """Patches, windows, memories, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.windows = nn.Conv2d(3, WIDTH, 2, 2), nn.ModuleList(Windows(n) for n in range(2))
        self.memories, self.norms = (
            nn.ModuleList(Plain() for _ in range(2)),
            nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3)),
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).permute(0, 2, 3, 1)
        for n in range(2):
            x = self.windows[n](x)
            x = carries(x + self.memories[n](self.norms[n](x)))
        return self.head(self.norms[2](x).mean((1, 2)))


class Axial(nn.Module):
    """Along rows, then along columns."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, WIDTH, 2, 2)
        self.qkv, self.out = (nn.ModuleList(nn.Linear(WIDTH, n * WIDTH) for _ in range(2)) for n in (3, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.enter(image).permute(0, 2, 3, 1)
        for n in range(2):
            y = x.transpose(1, 2) if n else x
            q, k, v = self.qkv[n](y).unflatten(-1, (3, HEADS, SIZE)).permute(3, 0, 1, 4, 2, 5)
            p = attends((q @ k.mT).softmax(-1), "bwhqk")
            y = self.out[n]((p @ v).transpose(2, 3).flatten(3))
            x = carries(x + (y.transpose(1, 2) if n else y))
        return x


class Pixels(nn.Module):
    """Attention over all pixels between convolutions, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(4, WIDTH), nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, HEADS, SIZE, h * w).unbind(1)
        p = attends((q.transpose(-2, -1) @ k * SIZE**-0.5).softmax(-1))
        return x + self.out((v @ p.transpose(-2, -1)).reshape(b, c, h, w))


class Convolved(nn.Module):
    """Two convolutions of width three around a time embedding: what image generators are made of."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm, self.time = nn.GroupNorm(4, channels), nn.Linear(WIDTH, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.a(F.silu(self.norm(x))) + self.time(F.silu(time))[:, :, None, None]
        return x + self.b(F.silu(y))


class Denoiser(nn.Module):
    """Down, attention in the middle, up again with what was seen on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH))
        self.enter, self.down, self.middle = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, WIDTH, 2, 2), Pixels()
        self.first, self.last = Convolved(16), Convolved(WIDTH)
        self.up, self.leave = nn.ConvTranspose2d(WIDTH, 16, 2, 2), nn.Conv2d(32, 3, 3, 1, 1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        time = self.time(time)
        before = self.first(self.enter(image), time)
        x = self.last(self.middle(self.down(before)), time)
        return self.leave(torch.cat([self.up(x), before], 1))


class Mixer(nn.Module):
    """Positions mixed by a network of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.units = nn.Linear(7, WIDTH), Plain()
        self.positions = nn.Sequential(nn.Linear(5, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 5))
        self.a, self.b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = carries(self.enter(x))
        x = carries(x + self.positions(self.a(x).mT).mT)
        return carries(x + self.units(self.b(x)))


class MixedFirst(Mixer):
    """The stream begins with what a network over positions says, normed."""

    def forward(self, x: Tensor) -> Tensor:
        x = carries(self.a(self.positions(self.enter(x).mT).mT))
        return carries(x + self.units(self.b(x)))


class Separable(nn.Module):
    """Depthwise convolutions, then a memory over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.near = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
        self.norm, self.memory = nn.LayerNorm(WIDTH), Plain()

    def forward(self, image: Tensor) -> Tensor:
        x = carries(self.enter(image))
        return carries(x + self.memory(self.norm(self.near(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


class TiedRows(nn.Module):
    """The rows of an image share a pattern: its scores are summed over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norms = nn.Conv2d(3, WIDTH, 2, 2), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(WIDTH, n * WIDTH) for _ in range(2)) for n in (3, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = carries(self.enter(image).permute(0, 2, 3, 1))
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, HEADS, SIZE)).unbind(3)
            p = attends((torch.einsum("brihd,brjhd->bhij", q, k) * 0.1).softmax(-1))
            x = carries(x + out(torch.einsum("bhij,brjhd->brihd", p, v).flatten(3)))
        return x
