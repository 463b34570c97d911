"""Where heads look on random tokens: how much of their attention goes to the keys of a job, and to those of its null."""

from dataclasses import dataclass

import torch
from torch import Tensor

from analyzers.heads.draws import Draws

LOOKS = ("previous token", "duplicate token", "induction", "first token", "self", "positional")


@dataclass(frozen=True, eq=False)
class Looked:
    """By job: the scores of each head and sequence, and those of its null, (heads, examples); and entropies in bits."""

    scores: dict[str, Tensor]
    nulls: dict[str, Tensor]
    entropy: Tensor
    uniform: Tensor


def look(twice: Tensor, once: Tensor, draws: Draws, causal: bool, seed: int) -> Looked:
    """The scores of the heads of one attention.

    twice, once: their patterns on tokens that are said again and on those that are not, (examples, heads, queries, keys).
    causal: whether no query sees what comes after it.
    """
    n = draws.length
    maps, other = twice.double().transpose(0, 1), once.double().transpose(0, 1)
    size = maps.shape[-1]
    visible = torch.ones(size, size, dtype=torch.bool, device=maps.device)
    visible = visible.tril() if causal else visible
    every, second = torch.arange(2, size), torch.arange(n + 1, size)
    scores, nulls = {}, {}
    for job, queries, keys in (
        ("previous token", every, every - 1),
        ("first token", every, 0 * every),
        ("self", every, every),
    ):
        scores[job], nulls[job] = _at(maps, queries, keys), _elsewhere(maps, visible, queries, keys)
    for job, keys in (("duplicate token", second - n), ("induction", second - n + 1)):
        scores[job], nulls[job] = _at(maps, second, keys), _at(other, second, keys)
    scores["positional"], nulls["positional"] = _positional(maps, visible, seed)
    bits = -(maps * maps.clamp_min(1e-300).log2()).sum(-1)[..., 1:].mean(-1)
    uniform = visible.sum(-1).double().log2()[1:].mean().expand_as(bits)
    return Looked({job: scores[job] for job in LOOKS}, {job: nulls[job] for job in LOOKS}, bits, uniform)


def _at(maps: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The mean weight from these queries to these keys, one each: (heads, examples)."""
    return maps[:, :, queries, keys].mean(-1)


def _elsewhere(maps: Tensor, visible: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The mean weight on one key drawn from the others: what the score is in the mean where keys are permuted.

    The first token is not among them, as it takes what weight is left over.
    """
    free = visible[queries].clone()
    free[:, 0] = False
    free[torch.arange(len(queries)), keys] = False
    kept = free.sum(-1) > 0
    weights = (maps[:, :, queries] * free).sum(-1)[..., kept] / free.sum(-1)[kept]
    return weights.mean(-1)


def _positional(maps: Tensor, visible: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The weight beyond the first token, times how alike the pattern is on other tokens; and with the keys permuted.

    Alike is the covariance of the weights of one sequence with those of another, over the keys that a query sees but for the
    first, relative to their variance: 1 where places alone decide, 0 where the tokens do.
    """
    inner = maps[..., 1:, 1:]
    free = visible[1:, 1:].double()
    mass = (inner * free).sum(-1).mean(-1)
    centred = (inner - (inner * free).sum(-1, keepdim=True) / free.sum(-1, keepdim=True)) * free
    drawn = torch.rand(free.shape, generator=torch.Generator().manual_seed(seed)).to(free.device)
    order = (drawn + 2 * (1 - free)).argsort(-1)  # what a query sees comes first, at random
    back = free.cumsum(-1).long().sub(1).clamp(min=0)  # the running number of each key that it sees
    shuffled = torch.gather(order, -1, back).expand(centred.shape)
    permuted = torch.gather(centred, -1, shuffled) * free
    return tuple(mass * _alike(centred, others) for others in (centred, permuted))  # type: ignore[return-value]


def _alike(own: Tensor, others: Tensor) -> Tensor:
    """The covariance of each example's weights with those of the other examples, relative to its variance."""
    examples = own.shape[1]
    if examples < 2:
        return own.new_full(own.shape[:2], float("nan"))
    rest = others.sum(1, keepdim=True) - others
    return (own * rest).sum((-1, -2)) / ((examples - 1) * (own * own).sum((-1, -2))).clamp(min=1e-30)
