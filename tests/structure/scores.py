"""Attention as a function of queries, keys and values (examples, heads, positions, units): masks, biases, softmaxes."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.structure.idioms import HEADS, SIZE, attends, causal

INF = float("inf")


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = attends((torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(SIZE)).softmax(-1))
    return torch.einsum("bhqk,bhkd->bhqd", p, v)


def dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = attends(torch.einsum("...qd,...kd->...qk", q, k).softmax(dim=-1))
    return torch.einsum("...qk,...kd->...qd", p, v)


def by_lists(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = attends(torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3]).softmax(-1))
    return torch.einsum(p, [0, 1, 2, 3], v, [0, 1, 3, 4], [0, 1, 2, 4])


def rows_of_a_list(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores whose queries are put in another order, told by a list, and back."""
    places = list(range(q.shape[-2]))[::-1]
    scores = (q[:, :, places] @ k.mT).transpose(0, 2)[places].transpose(0, 2)
    return attends(scores.softmax(-1)) @ v


def exp_over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(causal(q @ k.mT), -INF)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return attends(e / e.sum(-1, keepdim=True)) @ v


def exp_over_sum_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The division comes after the product with the values, as in flash attention: the pattern is nowhere."""
    scores = q @ k.mT
    e = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return (e @ v) / e.sum(-1, keepdim=True)


def log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attends(F.log_softmax(q @ k.mT, -1).exp()) @ v


def logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return attends((scores - scores.logsumexp(-1, True)).exp()) @ v


def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT)
    return attends(e / (1 + e.sum(-1, keepdim=True))) @ v


def off_by_one_bounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    most = scores.amax(-1, keepdim=True).clamp(min=0.0)
    e = torch.exp(scores - most)
    return attends(e / (torch.exp(-most) + e.sum(-1, keepdim=True))) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).to(torch.float64) + torch.where(causal(q @ k.mT), -1e9, 0.0)
    return attends(torch.softmax(scores, -1, dtype=torch.float64).type_as(q)) @ v


def masked_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1) * (~causal(q @ k.mT)).float()
    return attends(p) @ v


def masked_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    e = torch.exp(scores - scores.max(-1, keepdim=True)[0].detach()) * (~causal(scores)).float()
    return attends(e / e.sum(-1, keepdim=True).clamp_min(1e-6)) @ v


def of_length_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Powers of two whose absolute values add up to one."""
    return attends(F.normalize(torch.exp2(q @ k.mT), p=1.0, dim=-1)) @ v


def negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attends(F.softmin(-(q @ k.mT), dim=-1)) @ v


def sharpened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1).pow(1.5)
    return attends(p / p.sum(-1, keepdim=True)) @ v


def itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Half of every pattern is the query's own place."""
    return attends((q @ k.mT).softmax(-1) / 2 + torch.eye(q.shape[2]) / 2) @ v


def normed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return attends(F.layer_norm(scores, scores.shape[-1:]).softmax(-1)) @ v


def renormed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1).tril()
    return attends(p / (p.sum(-1, keepdim=True) + 1e-9)) @ v


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    places = torch.arange(scores.shape[-1])
    near = (places[:, None] - places).abs() < 2
    return attends(torch.where(near, scores, torch.finfo(scores.dtype).min).softmax(-1)) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1))
    scores *= SIZE**-0.5
    scores.masked_fill_(causal(scores), -INF)
    return attends(F.softmax(scores, -1)).matmul(v)


def slice_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, causal(scores)] = -INF
    return attends(scores.softmax(-1)) @ v


def sink_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A key and a value of zeros that every query may look at."""
    none = torch.zeros_like(k[:, :, :1])
    k, v = torch.cat([none, k], 2), torch.cat([none, v], 2)
    return attends((q @ k.mT).softmax(-1)) @ v


def sink_logit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    p = torch.cat([scores, torch.full_like(scores[..., :1], 0.3)], -1).softmax(-1)
    return attends(p[..., :-1]) @ v


def two_kinds(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One softmax over two summaries and the keys themselves, whose values are weighed apart."""
    few, means = ((t.cumsum(2)[:, :, -2:] / t.shape[2]) for t in (k, v))
    p = attends(torch.cat([q @ few.mT, (q @ k.mT).masked_fill(causal(q @ k.mT), -INF)], -1).softmax(-1))
    return p[..., :2] @ means + p[..., 2:] @ v


def cut_in_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The two halves of a pattern weigh their values in two einsums, the later ones first."""
    p = attends(torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1))
    (a, b), (c, d) = p.split([2, p.shape[-1] - 2], -1), v.split([2, v.shape[2] - 2], 2)
    return torch.einsum("bhqk,bhkd->bhqd", b, d) + torch.einsum("bhqk,bhkd->bhqd", a, c)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attends((30 * torch.tanh(q @ k.mT / 30)).softmax(-1)) @ v


def bent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attends(F.leaky_relu(q @ k.mT).softmax(-1)) @ v


def by_their_own_gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores that a product, number by number, weighs by what was made of them: it compares no queries with keys."""
    scores = q @ k.mT
    counted = torch.sigmoid(scores).flip(-1).cumsum(-1)
    return attends((scores + 0.1 * torch.einsum("bhqk,bhqk->bhqk", scores, counted)).softmax(-1)) @ v


def cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attends((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10).softmax(-1)) @ v


def distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attends((-(torch.cdist(q, k) ** 2) * 0.1).softmax(-1)) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(k.shape[2])
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    bias = slopes[:, None, None] * (places - places[:, None]).clamp(max=0)
    return attends((q @ k.mT + bias).softmax(-1)) @ v


def strongest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only the three best keys of each query."""
    scores = q @ k.mT
    least = scores.topk(3, -1).values[..., -1:]
    return attends(scores.masked_fill(scores < least, -INF).softmax(-1)) @ v


def strongest_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The softmax is over the three best keys, and then put where they are."""
    scores = q @ k.mT
    best, where = scores.topk(3, -1)
    return attends(torch.zeros_like(scores).scatter(-1, where, best.softmax(-1))) @ v


def strongest_fetched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The softmax is over the three best keys, and each query fetches their values."""
    best, where = (q @ k.mT).topk(3, -1)
    values = v.unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1).gather(3, where[..., None].expand(-1, -1, -1, -1, SIZE))
    return (attends(best.softmax(-1))[..., None] * values).sum(3)


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys times queries, and a softmax down the columns."""
    p = torch.softmax(k @ q.mT, dim=-2)
    attends(p, "bhkq")
    return (v.mT @ p).mT


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both products written as a multiplication and a sum."""
    p = attends((q.unsqueeze(3) * k.unsqueeze(2)).sum(-1).softmax(-1))
    return (p.unsqueeze(-1) * v.unsqueeze(2)).sum(3)


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotary positions by complex numbers."""

    def rotate(x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[2]), 0.1 ** torch.arange(SIZE // 2)).float()
        turns = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(3)

    return attends((rotate(q) @ rotate(k).mT).softmax(-1)) @ v


def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotary positions by halves."""
    angles = torch.outer(torch.arange(q.shape[2]), 0.1 ** torch.arange(SIZE // 2)).float().repeat(1, 2)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    return attends((rotate(q) @ rotate(k).mT).softmax(-1)) @ v


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = (t.flatten(0, 1) for t in (q, k, v))
    p = torch.bmm(a, b.transpose(1, 2)).softmax(-1)
    attends(p.view(*q.shape[:2], *p.shape[1:]))
    return torch.bmm(p, c).view_as(q)


def folded_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads lie in the batch of both products and beside it in the softmax."""
    a, b, c = (t.flatten(0, 1) for t in (q, k, v))
    p = attends(torch.bmm(a, b.mT).view(*q.shape[:3], -1).softmax(-1))
    return torch.bmm(p.flatten(0, 1), c).view_as(q)


def folded_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with the heads behind the queries in the softmax."""
    a, b, c = (t.flatten(0, 1) for t in (q, k, v))
    p = torch.bmm(a, b.mT).view(*q.shape[:3], -1).transpose(1, 2).softmax(-1)
    attends(p, "bqhk")
    return torch.bmm(p.transpose(1, 2).flatten(0, 1), c).view_as(q)


def view_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last keys are masked in place through a view of the scores."""
    scores = q @ k.mT
    scores[..., -2:][..., 1:].mul_(2).masked_fill_(torch.ones(1, dtype=torch.bool), -1.0)
    return attends((scores + 1).softmax(-1)) @ v


def some_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only the strongest queries of each head look at keys; all others get the mean of the values."""
    a, b, c = (t.flatten(0, 1) for t in (q, k, v))
    rows, best = torch.arange(len(a)).unsqueeze(-1), (a @ b.mT).sum(-1).topk(3).indices
    p = (a[rows, best] @ b.mT).softmax(-1)
    attends(p.view(*q.shape[:2], *p.shape[1:]))
    z = c.mean(1, keepdim=True).repeat(1, q.shape[2], 1)
    z[rows, best] = p @ c
    return z.view_as(q)


def query_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two queries at a time, to save memory: each chunk is an attention of its own."""
    return torch.cat([attends((part @ k.mT).softmax(-1)) @ v for part in q.split(2, 2)], 2)


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two softmaxes, one times the other: what acts on the values is no distribution either."""
    return ((q @ k.mT).softmax(-1) * (2 * q @ k.mT).softmax(-1)) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads compete for each pair of a query and a key: no query spreads its attention over keys."""
    return (q @ k.mT).softmax(1) @ v


def of_places(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each head has its share of a second softmax that looks at positions alone."""
    places, rate = torch.arange(k.shape[2]), torch.arange(1, HEADS + 1)[:, None, None] / 8
    near = (-(places[:, None] - places).abs() * rate).softmax(-1)
    p = (1 - rate) * (q @ k.mT).softmax(-1) + rate * near
    return attends(p / p.sum(-1, keepdim=True)) @ v


def of_units(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Units look at units: the scores sum over positions."""
    return (v @ (k.mT @ q).softmax(-2)).contiguous()


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT - math.log(q.shape[2])) @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Kernel features in place of the softmax: no pattern is ever made."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)


def hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores that are scaled where torch does not see it."""
    return torch.from_numpy((q @ k.mT).detach().numpy() / 2).softmax(-1) @ v


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two softmaxes over units and over positions, and no map of queries to keys."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


FOUND = (
    einsum,
    dots,
    by_lists,
    rows_of_a_list,
    exp_over_sum,
    log_softmax,
    logsumexp,
    off_by_one,
    off_by_one_bounded,
    upcast,
    masked_after,
    masked_by_hand,
    of_length_one,
    negated,
    sharpened,
    itself,
    normed,
    renormed,
    windowed,
    in_place,
    slice_filled,
    sink_key,
    sink_logit,
    two_kinds,
    cut_in_two,
    capped,
    bent,
    by_their_own_gate,
    of_places,
    cosine,
    distances,
    alibi,
    strongest,
    strongest_alone,
    strongest_fetched,
    turned,
    summed,
    interleaved,
    halves,
    view_filled,
    some_queries,
    folded,
    folded_late,
    folded_behind,
    query_chunks,
)
NOT_FOUND = {
    exp_over_sum_late: "the division comes after the values",
    multiplied: "and another softmax weighs the values",
    over_heads: "its softmax is over heads",
    hidden: "hidden from torch",
    of_units: "units by units",
    sigmoid: "",
    linear: "",
    efficient: "",
}
"""What is no attention, and the reason in which it is told; no reason where there is no softmax of scores."""
