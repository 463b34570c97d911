"""Residual streams that are more than one add after another: mixed over depth, split, gathered, shortened, joined."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.blocks import Attention, Block
from tests.structure.idioms import TOKENS, WIDTH, Plain, carries, weight
from tests.structure.projections import Fused


class Deep(nn.Module):
    """Tokens, layers, a last norm and logits; `go` is the way through the layers."""

    layers = 2

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(TOKENS, WIDTH), nn.ModuleList(Block() for _ in range(self.layers))
        self.norm, self.logits = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH + 1)
        self.rates = nn.Parameter(torch.rand(self.layers, self.layers + 1) + 0.1)

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(carries(self.norm(self.go(carries(self.tokens(ids))))))


class FirstAgain(Deep):
    """The first state is mixed in before each layer."""

    def go(self, x: Tensor) -> Tensor:
        first = x
        for block, (a, b, _) in zip(self.blocks, self.rates, strict=True):
            x = block(carries(a * x + b * first))
        return x


class Dense(Deep):
    """After each layer a sum of all states so far, weighed by what is learned."""

    layers = 3

    def go(self, x: Tensor) -> Tensor:
        states = [x]
        for block, rates in zip(self.blocks, self.rates, strict=True):
            states.append(block(x))
            x = carries(sum(rate * state for rate, state in zip(rates, states, strict=False)))
        return x


class DenseStack(Dense):
    """The same of states that are laid on one another."""

    def go(self, x: Tensor) -> Tensor:
        states = [x]
        for block, rates in zip(self.blocks, self.rates, strict=True):
            states.append(block(x))
            x = carries(torch.tensordot(rates[: len(states)], torch.stack(states), dims=1))
        return x


class DenseLook(Dense):
    """The states are weighed by a softmax of what a learned query says of each."""

    def __init__(self) -> None:
        super().__init__()
        self.query = weight(self.layers, WIDTH)

    def go(self, x: Tensor) -> Tensor:
        states = [x]
        for block, query in zip(self.blocks, self.query, strict=True):
            states.append(block(x))
            seen = F.normalize(torch.stack(states, 2), dim=-1)
            p = (seen @ query).softmax(-1)
            x = carries((p[..., None, :] @ seen)[:, :, 0])
        return x


class Restarted(Deep):
    """The sum begins anew with what the first layer says; each layer reads a weighed sum of it and the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = weight(WIDTH, 1)

    def look(self, *states: Tensor) -> Tensor:
        seen = torch.cat([state.unsqueeze(-2) for state in states], -2)
        return torch.einsum("btn,btnd->btd", (F.normalize(seen, dim=-1) @ self.query).squeeze(-1).softmax(-1), seen)

    def go(self, x: Tensor) -> Tensor:
        one, two = self.blocks
        y = one.a(x)
        z = carries(one.attend(y, y))
        z = carries(z + one.memory(one.b(self.look(x, z))))
        y = two.a(self.look(x, z))
        z = carries(z + two.attend(y, y))
        z = carries(z + two.memory(two.b(self.look(x, z))))
        return carries(self.look(x, z))


class RestartedFused(Restarted):
    """The states are read by a fused kernel, with the one query repeated at every position."""

    def look(self, *states: Tensor) -> Tensor:
        seen = torch.stack(states, -2)
        return F.scaled_dot_product_attention(self.query.T.expand(*seen.shape[:-2], 1, -1), seen, seen)[..., 0, :]


class Arch(Deep):
    """Long skips by a sum from the first half to the second."""

    layers = 4

    def go(self, x: Tensor) -> Tensor:
        a = self.blocks[0](x)
        b = self.blocks[1](a)
        c = self.blocks[2](b)
        return self.blocks[3](carries(c + a))


class ArchJoined(Arch):
    """Long skips that are laid beside the stream and projected with it."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def go(self, x: Tensor) -> Tensor:
        a = self.blocks[0](x)
        b = self.blocks[1](a)
        c = self.blocks[2](b)
        return self.blocks[3](carries(self.join(torch.cat([c, a], -1))))


class Scaled(Deep):
    """What the stream carries is scaled at each write."""

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block.a(x)
            x = carries(x * 2**-0.5 + block.attend(y, y))
            x = carries((x + block.memory(block.b(x))) * 2**-0.5)
        return x


class DropPath(Deep):
    """Whether an example is written to is drawn; here every one is."""

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block.a(x)
            mask = x.new_ones(len(x), 1, 1).bernoulli_(1.0) / 1.0
            x = carries(x + block.attend(y, y) * mask)
            x = carries(x + F.dropout(0.5 * block.memory(block.b(x)), training=False))
        return x


class Exits(Deep):
    """Logits of every layer."""

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x, out = carries(self.tokens(ids)), []
        for block in self.blocks:
            x = block(x)
            out.append(self.logits(carries(self.norm(x))))
        return tuple(out)


class Shortened(Deep):
    """Tokens are pooled in the middle."""

    def go(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = carries(F.avg_pool1d(x.mT, 2).mT)
        return self.blocks[1](x)


class Merged(Deep):
    """Neighbours are laid side by side and projected in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def go(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = carries(self.join(torch.cat([x[:, 0:4:2], x[:, 1:4:2]], -1)))
        return self.blocks[1](x)


class Modulated(Deep):
    """Shift, scale and gate of each write are read off a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(WIDTH, 6 * WIDTH)

    def go(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f = self.condition(F.silu(x.mean(1, keepdim=True))).chunk(6, -1)
        for block in self.blocks:
            y = block.a(x) * (1 + a) + b
            x = carries(x + c * block.attend(y, y))
            x = carries(x + d * block.memory(block.b(x) * (1 + e) + f))
        return x


class LowRank(Deep):
    """The skip has a learned low-rank part beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 5, bias=False), nn.Linear(5, WIDTH, bias=False)

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block.a(x)
            x = carries(block.attend(y, y) + x + self.up(self.down(x)))
            x = carries(x + block.memory(block.b(x)))
        return x


class TwoStreams(Deep):
    """Two streams that look at one another."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.others = nn.Embedding(TOKENS, WIDTH), nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x, z = carries(self.tokens(ids)), carries(self.other(ids))
        for one, two in zip(self.blocks, self.others, strict=True):
            a, b = one.a(x), two.a(z)
            x = carries(x + one.attend(a, b, kind="cross"))
            z = carries(z + two.attend(b, a, kind="cross"))
            x, z = carries(x + one.memory(one.b(x))), carries(z + two.memory(two.b(z)))
        return self.logits(self.norm(x)) + self.logits(self.norm(z))


class Joint(TwoStreams):
    """Two streams that share one attention over both."""

    def forward(self, ids: Tensor) -> Tensor:
        x, z = carries(self.tokens(ids)), carries(self.other(ids))
        for one, two in zip(self.blocks, self.others, strict=True):
            both = torch.cat([one.a(x), two.a(z)], 1)
            both = one.attend(both, both)
            x, z = carries(x + both[:, : x.shape[1]]), carries(z + both[:, x.shape[1] :])
            x, z = carries(x + one.memory(one.b(x))), carries(z + two.memory(two.b(z)))
        return self.logits(self.norm(x)) + self.logits(self.norm(z))


class Reversible(Deep):
    """Two streams that write to one another."""

    def go(self, x: Tensor) -> Tensor:
        a, b = x, x
        for block in self.blocks:
            y = block.a(b)
            a = carries(a + block.attend(y, y))
            b = carries(b + block.memory(block.b(a)))
        return (a + b) / 2


class Halves(Deep):
    """A stream in two halves, of which each writes to the other."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.maps = nn.ModuleList(Plain(half) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(half) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        a, b = carries(self.tokens(ids)).chunk(2, -1)
        for n in range(2):
            a = carries(a + self.maps[2 * n](self.norms[2 * n](b)))
            b = carries(b + self.maps[2 * n + 1](self.norms[2 * n + 1](a)))
        return self.logits(carries(torch.cat([a, b], -1)))


class DepthMixed(Deep):
    """Some tokens are gathered, go through the layer, and are scattered back."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 1)

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            top = self.router(x)[..., 0].topk(3, dim=1).indices.sort(1).values[..., None].expand(-1, -1, WIDTH)
            y = block.a(part := x.gather(1, top))
            z = part + block.attend(y, y)
            z = z + block.memory(block.b(z))
            x = carries(x.scatter(1, top, z))
        return x


class DepthMixedAdded(DepthMixed):
    """What the layer adds to those is scattered onto the stream."""

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            r = self.router(x)[..., 0]
            top = r.topk(3, dim=1).indices.sort(1).values
            wide = top[..., None].expand(-1, -1, WIDTH)
            y = block.a(x.gather(1, wide))
            x = carries(x.scatter_add(1, wide, block.attend(y, y) * r.gather(1, top)[..., None].sigmoid()))
            x = carries(x + block.memory(block.b(x)))
        return x


class ClassLast(Deep):
    """Attention of one token over all, which alone is written to, after the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mark, self.looks, self.last = weight(1, 1, WIDTH), Attention(), Plain()
        self.a, self.b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def go(self, x: Tensor) -> Tensor:
        x = super().go(x)
        mark = carries(self.mark.expand(len(x), -1, -1))
        seen = self.a(torch.cat([mark, x], 1))
        mark = carries(mark + self.looks(seen[:, :1], seen))
        mark = carries(mark + self.last(self.b(mark)))
        return torch.cat([mark, x], 1)


class Registers(Deep):
    """Tokens that are learned join the stream and leave it in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = weight(3, WIDTH)

    def go(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = self.blocks[1](carries(torch.cat([self.extra.expand(len(x), -1, -1), x], 1)))
        return x[:, 3:]


class Prompts(Registers):
    """Fresh prompts are laid before the tokens at each layer, in place of those before."""

    layers = 3

    def go(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for n, block in enumerate(self.blocks[1:]):
            x = carries(torch.cat([self.extra.expand(len(x), -1, -1) * (n + 1.0), x], 1))
            x = block(x)[:, 3:]
        return x


class Highway(Deep):
    """A gate keeps a share of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def go(self, x: Tensor) -> Tensor:
        for n, block in enumerate(self.blocks):
            y, gate = block.a(x), torch.sigmoid(self.gates[2 * n](x))
            x = carries((1 - gate) * x + gate * block.attend(y, y))
            gate = torch.sigmoid(self.gates[2 * n + 1](x))
            x = carries((1 - gate) * x + gate * block.memory(block.b(x)))
        return x


class Several(nn.Module):
    """Three streams side by side: a weighed sum of them is read, and each has its share of what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.shares = nn.Linear(7, WIDTH), nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(4))
        self.parts = nn.ModuleList([Fused(), Plain(), Fused(), Plain()])
        self.norms, self.read = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4)), weight(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = carries(self.enter(x)[:, :, None].repeat(1, 1, 3, 1))
        for part, norm, share, read in zip(self.parts, self.norms, self.shares, self.read, strict=True):
            x = carries(x + part(norm((x * read).sum(2))).unsqueeze(2) * torch.sigmoid(share(x)))
        return x.sum(2)


FOUND = {
    None: (Restarted, RestartedFused, DepthMixedAdded, Halves),
    2: (Scaled, DropPath, Exits, Shortened, Merged, Modulated, LowRank, FirstAgain, DepthMixed, Registers, Highway),
    3: (Dense, DenseStack, DenseLook, ClassLast, Prompts),
    4: (Arch, ArchJoined, TwoStreams, Joint, Reversible),
}
"""What is found, by how many layers it has."""
