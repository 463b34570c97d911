"""Small models that say of themselves what is true of them, and what `fmr.locate` says of them that is not.

While a model runs it hands its values to `attends`, `remembers`, `carries` and so on. These compute nothing, so the graph is
that of the plain code. What a fused kernel keeps inside is told as a function, which is called after the run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.runs.run import Run
from fmr.structure.parts import Attention, Structure

Told = Tensor | Callable[[], Tensor]


class Sizes(NamedTuple):
    """How large a model and its inputs are, and in which arithmetic it runs."""

    batch: int = 2
    tokens: int = 5
    heads: int = 4
    size: int = 4
    hidden: int = 12
    fused: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        return self.heads * self.size


SIZES = {
    "plain": Sizes(),
    "one example": Sizes(batch=1),
    "bfloat16": Sizes(dtype=torch.bfloat16),
    "fused": Sizes(fused=True),
    "one head": Sizes(heads=1, size=8),
    "alike": Sizes(4, 4, 4, 4, 16),
    "heads of one": Sizes(heads=4, size=1, hidden=6),
    "one token": Sizes(tokens=1),
}


class Seen(NamedTuple):
    """One true attention: its pattern, in which `layout` names the dimensions, the shape of its heads and what it mixes."""

    pattern: Told
    layout: str
    heads: int
    groups: int
    size: int
    kind: str
    z: Told | None
    may: bool


@dataclass
class Truth:
    """What a model told while it ran."""

    attention: list[Seen] = field(default_factory=list)
    posts: list[tuple[Told, bool]] = field(default_factory=list)
    points: list[tuple[Told, bool]] = field(default_factory=list)
    added: list[Told] = field(default_factory=list)
    never: list[tuple[Told, str]] = field(default_factory=list)
    refused: list[tuple[tuple[Told, ...], str]] = field(default_factory=list)
    final: list[Told | None] = field(default_factory=list)
    logits: list[tuple[Told, Told]] = field(default_factory=list)
    either: list[tuple[Told, ...]] = field(default_factory=list)
    layers: int | None = None
    apart: bool = False


TOLD = [Truth()]


def attends(
    pattern: Told,
    heads: int,
    size: int,
    groups: int = 0,
    kind: str = "self",
    layout: str = "bhqk",
    z: Told | None = None,
    may: bool = False,
) -> Any:
    """Say that this is the pattern of an attention; one that may be refused, with a reason, where `may`."""
    TOLD[-1].attention.append(Seen(pattern, layout, heads, groups or heads, size, kind, z, may))
    return pattern


def remembers(post: Tensor, may: bool = False) -> Tensor:
    """Say that these are the coefficients of a memory; one that may be refused, with a reason, where `may`."""
    TOLD[-1].posts.append((post, may))
    return post


def apart() -> None:
    """Say that there are several streams."""
    TOLD[-1].apart = True


def reads_out(logits: Tensor, out: Tensor) -> Tensor:
    """Say that this is the unembedding's result, and this what the end of the stream is read out as."""
    TOLD[-1].logits.append((logits, out))
    return out


def carries(point: Tensor, may: bool = False) -> Tensor:
    """Say that this is a value of a residual stream."""
    TOLD[-1].points.append((point, may))
    return point


def adds(value: Tensor) -> Tensor:
    """Say that this is added to a stream as one write."""
    TOLD[-1].added.append(value)
    return value


def never(value: Tensor, role: str = "point") -> Tensor:
    """Say that this is no point, pattern or post."""
    TOLD[-1].never.append((value, role))
    return value


def refused(value: Tensor, *others: Tensor, word: str = "") -> Tensor:
    """Say that a candidate at this value, or at one of the others, stands in `rejected`, and a word of the reason."""
    TOLD[-1].refused.append(((value, *others), word))
    return value


def ends(value: Tensor | None) -> Any:
    """Say that this is the final norm of the stream; None that there is none."""
    TOLD[-1].final.append(value)
    if value is not None:
        carries(value, may=True)
    return value


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, up to a view and the last bits."""
    if a.numel() != b.numel():
        return False
    if not type(a) is type(b) is Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            a, b = a.as_subclass(Tensor), b.as_subclass(Tensor)
    if a.is_complex() or b.is_complex():
        return a.shape == b.shape and torch.equal(a, b)
    loose = 2e-2 if torch.bfloat16 in (a.dtype, b.dtype) and a.dtype != b.dtype else 1e-5
    return torch.allclose(
        *(t.detach().double().reshape(-1).sort().values for t in (a, b)), atol=loose, rtol=loose, equal_nan=True
    )


def number(value: Told) -> Tensor:
    return value() if callable(value) and not isinstance(value, Tensor) else value


class Model(nn.Module):
    """A model of some sizes; `inputs` are what it is called with."""

    skip: tuple[str, ...] = ()

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s

    def inputs(self) -> tuple[Any, ...]:
        return (torch.randn(self.s.batch, self.s.tokens, self.s.width, dtype=self.s.dtype),)


def ran(kind: Callable[[Sizes], Model], s: Sizes) -> tuple[Run, Truth]:
    torch.manual_seed(0)
    model = kind(s).eval()
    model = model if s.dtype is torch.float32 else model.to(s.dtype)
    inputs = model.inputs()
    TOLD.append(Truth())
    try:
        return fmr.run(model, *inputs), TOLD[-1]
    finally:
        TOLD.pop()


def faults(run: Run, truth: Truth) -> list[str]:
    """Everything in which what is located differs from what the model told."""
    try:
        found = fmr.locate(run)
        repr(found)
        return [
            *of_attention(run, truth, found),
            *of_memories(run, truth, found),
            *of_streams(run, truth, found),
            *of_reasons(run, truth, found),
        ]
    except Exception as error:
        import traceback

        at = traceback.extract_tb(error.__traceback__)[-1]
        return [f"CRASH {type(error).__name__}: {str(error)[:120]} ({at.filename.rpartition('/fmr/')[2]}:{at.lineno})"]


def value_of(run: Run, name: Any) -> Tensor:
    return run[getattr(name, "id", name)]


def of_attention(run: Run, truth: Truth, found: Structure) -> list[str]:
    left, wrong = list(found.attention), []
    for seen in truth.attention:
        pattern = number(seen.pattern)
        alike = [block for block in left if same(pattern, block.maps(run) if block.minus else value_of(run, block.pattern))]
        told = (seen.heads, seen.groups, seen.size, seen.kind)
        alike.sort(key=lambda b: (b.n_heads, b.n_kv_heads, b.head_dim, b.kind) != told)
        if not alike:
            wrong += (
                [f"UNSAID attention {told}"] * unsaid(run, found, seen.pattern) if seen.may else [f"MISSED attention {told}"]
            )
            continue
        block = alike[0]
        left.remove(block)
        wrong += of_heads(run, seen, pattern, block)
    return wrong + [f"FALSE attention {b.pattern.id} ({b.n_heads} heads of {b.head_dim}, {b.kind}), certified" for b in left]


def of_heads(run: Run, seen: Seen, pattern: Tensor, block: Attention) -> list[str]:
    told, read = (
        (seen.heads, seen.groups, seen.size, seen.kind),
        (block.n_heads, block.n_kv_heads, block.head_dim, block.kind),
    )
    wrong = [] if told == read else [f"FALSE heads, key-value heads, size, kind: {read}, not {told}"]
    if seen.z is not None and not same(number(seen.z), value_of(run, block.z)):
        wrong.append(f"FALSE z {block.z.id}")
    if set(seen.layout) == set("bhqk") and pattern.dim() == 4:
        maps = pattern.permute(*(seen.layout.index(letter) for letter in "bhqk"))
        try:
            read_maps = block.maps(run)
        except fmr.errors.FmrError as error:
            return [*wrong, f"MISSED maps: {str(error)[:80]}"]
        if read_maps.shape != maps.shape or not torch.allclose(
            read_maps.float(), maps.detach().float(), atol=2e-2 if pattern.dtype == torch.bfloat16 else 1e-5, equal_nan=True
        ):
            wrong.append(f"FALSE maps {tuple(read_maps.shape)}, not {tuple(maps.shape)} or in another order")
    return wrong


def of_memories(run: Run, truth: Truth, found: Structure) -> list[str]:
    left, wrong = list(found.mlps), []
    for post, may in truth.posts:
        hit = next((block for block in left if same(number(post), value_of(run, block.post))), None)
        if hit is not None:
            left.remove(hit)
            wrong += of_vectors(run, hit)
        elif not may:
            wrong.append(f"MISSED memory {tuple(number(post).shape)}")
        elif unsaid(run, found, post):
            wrong.append(f"UNSAID memory {tuple(number(post).shape)}")
    return wrong + [f"FALSE memory {b.post.id} to {b.out.id}, n={b.n}, certified" for b in left]


def of_vectors(run: Run, block: Any) -> list[str]:
    """What `memory()` promises: a key and a value, as wide as what it reads and writes."""
    try:
        key, value = block.memory(block.n - 1)
    except fmr.errors.StructureError:
        return []  # it says so
    if block.axis != -1:
        return []
    wide = run.graph.unfused[block.source].shape[-1], run.graph.unfused[block.out.id].shape[-1]
    return (
        []
        if (key.numel(), value.numel()) == wide
        else [f"FALSE vectors of {key.numel()} and {value.numel()}, stream of {wide}"]
    )


def of_streams(run: Run, truth: Truth, found: Structure) -> list[str]:
    streams = [one for one in found.streams if one.writes]
    points = [(name, value_of(run, name)) for one in streams for name in one.points]
    told = [(number(point), may) for point, may in truth.points]
    wrong = [
        f"MISSED point {tuple(p.shape)} #{n}"
        for n, (p, may) in enumerate(told)
        if not may and not any(same(p, v) for _, v in points)
    ]
    wrong += [f"FALSE point {name}" for name, v in points if not any(same(p, v) for p, _ in told)]
    added = [value_of(run, write.added) for one in streams for write in one.writes]
    wrong += ["MISSED write" for value in truth.added if not any(same(number(value), one) for one in added)]
    for value, role in truth.never:
        if role == "point" and any(same(number(value), v) for _, v in points):
            wrong.append("FALSE point that is none")
    if truth.final:
        final = truth.final[-1]
        ours = None if found.final_norm is None else value_of(run, found.final_norm)
        if (final is None) != (ours is None):
            wrong.append("MISSED final norm" if ours is None else f"FALSE final norm {found.final_norm.id}")
        elif final is not None and not same(number(final), ours):
            wrong.append(f"FALSE final norm {found.final_norm.id}")
    wrong += of_ends(run, truth, found)
    if truth.layers is not None and len(found.layers) != truth.layers:
        wrong.append(f"FALSE layers: {len(found.layers)}, not {truth.layers}")
    pieces = len(streams)
    if pieces > max(1, len({tuple(p.shape[-1:]) for p, _ in told})) and not truth.apart:
        wrong.append(f"FALSE streams: {pieces} pieces")
    return wrong


def of_ends(run: Run, truth: Truth, found: Structure) -> list[str]:
    wrong = []
    for logits, out in truth.logits:
        ours = None if found.unembedding is None else value_of(run, found.unembedding)
        wrong += (
            []
            if ours is not None and same(number(logits), ours)
            else ["MISSED unembedding" if ours is None else f"FALSE unembedding {found.unembedding.id}"]
        )
        try:
            point = found.residual.writes[-1].after
            read = found.read_out(run, point)
            if read.shape == number(out).shape and not torch.allclose(
                read.float(), number(out).float(), atol=5e-2 if read.dtype == torch.bfloat16 else 1e-4
            ):
                wrong.append("FALSE read-out")
        except fmr.errors.FmrError as error:
            wrong.append(f"MISSED read-out: {str(error)[:100]}")
    return wrong


def unsaid(run: Run, found: Structure, value: Told) -> bool:
    """Whether no finding and no rejected candidate lies in the scope where this value is made."""
    if callable(value) and not isinstance(value, Tensor):
        return False
    scopes = {str(node.id).rpartition("/")[0] for node in run.graph.unfused.nodes if same(value, value_of(run, node.id))}
    there = (
        [one.id for one in found.rejected]
        + [block.pattern.id for block in found.attention]
        + [m.post.id for m in found.mlps]
        + [m.out.id for m in found.mlps]
    )
    return bool(scopes) and not any(str(name).startswith(scope) for name in there for scope in scopes)


def of_reasons(run: Run, truth: Truth, found: Structure) -> list[str]:
    """Softmaxes and told candidates that are neither claimed nor in `rejected`; words that a reason must have."""
    graph = run.graph.unfused
    claimed = {block.softmax for block in found.attention}
    noted = {one.id: one for one in found.rejected}
    values = [value_of(run, site) for block in found.attention for site in block.map_sites]
    wrong = []
    for node in graph.nodes:
        if (
            node.op == "softmax"
            and node.id not in claimed
            and node.id not in noted
            and not any(same(value_of(run, node.id), v) for v in values)
        ):
            wrong.append(f"UNSAID softmax {node.id}")
    for candidates, word in truth.refused:
        entries = [one for one in found.rejected if any(same(number(c), value_of(run, one.id)) for c in candidates)]
        if not entries and not word:
            scopes = {
                str(n.id).rpartition("/")[0] for n in graph.nodes for c in candidates if same(number(c), value_of(run, n.id))
            }
            entries = [
                one for one in found.rejected if str(one.id).rpartition("/")[0].startswith(tuple(scopes)) and scopes - {""}
            ]
        if not entries:
            wrong.append(f"UNSAID candidate {tuple(number(candidates[0]).shape)}{': ' + word if word else ''}")
        elif word and not any(any(w in one.reason for w in word.split("|")) for one in entries):
            wrong.append(f"MISLEADING, no '{word}' in: {entries[0].reason[:120]}")
    told = [(one.id, one.what) for one in found.rejected]
    wrong += [f"TWICE {name} is no {what}" for name, what in {*told} if told.count((name, what)) > 1]
    return wrong + [
        f"MISLEADING raw error: {one!r}"[:160] for one in found.rejected if "Error" in one.reason or "aten::" in one.reason
    ]


# what most models are made of


def linear(a: int, b: int) -> nn.Linear:
    return nn.Linear(a, b)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


def heads(x: Tensor, n: int) -> Tensor:
    """(examples, positions, width) as (examples, heads, positions, units)."""
    return x.view(*x.shape[:2], n, x.shape[2] // n).transpose(1, 2)


def joined(z: Tensor) -> Tensor:
    return z.transpose(1, 2).flatten(2)


def look(
    s: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    kind: str = "self",
    scale: float | None = None,
    may: bool = False,
) -> Tensor:
    """Heads that look, by hand or in a kernel."""
    n, groups = q.shape[1], k.shape[1]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if s.fused:
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=factor, enable_gqa=groups != n)
        many = k.repeat_interleave(n // groups, 1) if groups != n else k

        def inside() -> Tensor:
            scores = q.detach() @ many.detach().mT * factor
            return (scores if bias is None else scores + bias.detach()).softmax(-1)

        attends(inside, n, q.shape[-1], groups, kind, may=may)
        return z
    if groups != n:
        k, v = k.repeat_interleave(n // groups, 1), v.repeat_interleave(n // groups, 1)
    scores = q @ k.mT * factor
    p = attends((scores if bias is None else scores + bias).softmax(-1), n, q.shape[-1], groups, kind, may=may)
    return p @ v


class Heads(Model):
    """Four projections and heads between them."""

    def __init__(self, s: Sizes, groups: int = 0, out: bool = True) -> None:
        super().__init__(s)
        self.groups = groups or s.heads
        self.q, self.o = linear(s.width, s.width), linear(s.width, s.width)
        self.k, self.v = linear(s.width, self.groups * s.size), linear(s.width, self.groups * s.size)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return look(self.s, q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.q(x), self.s.heads), heads(self.k(x), self.groups), heads(self.v(x), self.groups)
        return self.o(joined(self.mix(q, k, v)))


class Plain(Model):
    """The memory of most."""

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.up, self.down = linear(s.width, s.hidden), linear(s.hidden, s.width)

    def bend(self, x: Tensor) -> Tensor:
        return remembers(torch.relu(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.bend(self.up(x)))


class Layers(Model):
    """A first projection, layers of an attention and a memory with a norm before each, the final norm, logits."""

    attention: type[Model] = Heads
    memory: type[Model] = Plain
    depth = 2

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.enter = linear(s.width, s.width)
        self.looks = nn.ModuleList(self.attention(s) for _ in range(self.depth))
        self.mlps = nn.ModuleList(self.memory(s) for _ in range(self.depth))
        self.norms = nn.ModuleList(nn.LayerNorm(s.width) for _ in range(2 * self.depth + 1))
        self.logits = linear(s.width, 2 * s.width + 1)

    def layers(self, x: Tensor) -> Tensor:
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=True)):
            x = carries(x + adds(a(self.norms[2 * n](x))))
            x = carries(x + adds(m(self.norms[2 * n + 1](x))))
        TOLD[-1].layers = self.depth
        return x

    def end(self, x: Tensor) -> Tensor:
        y = self.logits(ends(self.norms[-1](x)))
        return reads_out(y, y)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layers(carries(self.enter(x))))
