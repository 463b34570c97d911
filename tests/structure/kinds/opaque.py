"""K9: projections that torch does not show."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.structure.kinds.truth import Heads, Layers, Plain, look, remembers


class _Outside(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = (
            x.detach().float().numpy() @ self.inner.weight.detach().float().numpy().T
            + self.inner.bias.detach().float().numpy()
        )
        return torch.from_numpy(y).to(x.dtype)


def _scripted(inner):
    return torch.jit.script(inner)


def _vmapped(inner):
    class Mapped(nn.Module):
        def forward(self, x):
            return torch.vmap(lambda row: F.linear(row, inner.weight, inner.bias))(x)

    made = Mapped()
    made.inner = inner
    return made


def _dynamic(inner):
    whole = nn.Sequential(inner)
    return torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, dtype=torch.qint8)[0]


@torch.library.custom_op("kinds14::project", mutates_args=())
def project(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w, b)


class _Custom(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return project(x, self.inner.weight, self.inner.bias)


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, g):
        return g, None, None


class _OwnGradient(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return _Inner.apply(x, self.inner.weight, self.inner.bias)


class _Int8(nn.Module):
    """Whole numbers and a scale for each row, by hand."""

    def __init__(self, inner):
        super().__init__()
        scale = inner.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("w", (inner.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(inner.weight.dtype))
        self.bias = inner.bias

    def forward(self, x):
        return F.linear(x, self.w.to(x.dtype) * self.scale, self.bias)


class _Int8After(_Int8):
    def forward(self, x):
        return F.linear(x, self.w.to(x.dtype)) * self.scale.squeeze(1) + self.bias


class _Hidden(Layers):
    """Some projections of the attention, or of the memory, are hidden."""

    case = False
    wrap = _Outside
    which: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    may = False
    skip = ("bfloat16",)

    def __init__(self, s):
        super().__init__(s)
        wrap = type(self).wrap
        for one in self.looks:
            for n in self.which:
                setattr(one, n, wrap(getattr(one, n)))
        for m in self.mlps:
            for n in self.mlp:
                setattr(m, n, wrap(getattr(m, n)))

    class attention(Heads):
        def mix(self, q, k, v):
            return look(self.s, q, k, v, may=True)

    class memory(Plain):
        def bend(self, x):
            return x

        def forward(self, x):
            h = torch.relu(self.up(x))
            y = self.down(h)
            if type(self.up) is nn.Linear and type(self.down) is nn.Linear:
                remembers(h)
            else:
                remembers(h, may=True)
            return y


class OutsideQ(_Hidden):
    """Queries by NumPy: self, or refused; never cross."""

    which = ("q",)


class OutsideK(_Hidden):
    """Keys by NumPy."""

    which = ("k",)


class OutsideV(_Hidden):
    """Values by NumPy."""

    which = ("v",)


class ScriptedQK(_Hidden):
    """Queries and keys scripted."""

    wrap, which = _scripted, ("q", "k")


class ScriptedMlp(_Hidden):
    """Both projections of a memory scripted."""

    wrap, mlp = _scripted, ("up", "down")


class VmappedQKV(_Hidden):
    """Projections in a transform."""

    wrap, which = _vmapped, ("q", "k", "v")


class CustomOpDown(_Hidden):
    """A custom op is the second projection of a memory."""

    wrap, mlp = _Custom, ("down",)


class CustomOpUp(_Hidden):
    """A custom op is the first projection of a memory."""

    wrap, mlp = _Custom, ("up",)


class OwnGradientAll(_Hidden):
    """Projections with gradients of their own, which show."""

    wrap, which, mlp = _OwnGradient, ("q", "k", "v", "o"), ("up", "down")


class Int8All(_Hidden):
    """Weights of whole numbers, written out before the product."""

    wrap, which, mlp = _Int8, ("q", "k", "v", "o"), ("up", "down")


class Int8AfterAll(_Hidden):
    """Weights of whole numbers, scaled after the product."""

    wrap, which, mlp = _Int8After, ("q", "k", "v", "o"), ("up", "down")
