"""Operations as they are written out in others that have a rule of DeepLIFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from analyzers.inputs.recurrent import RECURRENT
from fmr.nodes import Node


def _layer_norm(input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    return _scaled(centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt(), weight, bias)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return _scaled(input * (input.square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None)


def _group_norm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    groups = input.reshape(len(input), num_groups, -1)
    normed = _layer_norm(groups, groups.shape[2:], eps=eps).reshape(input.shape)
    return _scaled(normed.movedim(1, -1), weight, bias).movedim(-1, 1)


def _scaled(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    return input * _vector_norm(input, p, dim, keepdim=True).clamp_min(eps).reciprocal()


def _log_softmax(input: Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> Tensor:
    return input - input.logsumexp(dim, keepdim=True)


def _softmax(input: Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> Tensor:
    return (input - input.logsumexp(dim, keepdim=True)).exp()


def _size(input: Tensor) -> Tensor:
    return (input.real.square() + input.imag.square()).sqrt()


def _div(input: Any, other: Any) -> Tensor:
    quotient: Tensor = input * (other.reciprocal() if isinstance(other, Tensor) else 1 / other)
    return quotient


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _vector_norm(input: Tensor, ord: float = 2.0, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    dims = tuple(range(input.dim())) if dim is None else dim
    if abs(ord) == inf:
        sizes = input.abs()
        return sizes.amax(dims, keepdim=keepdim) if ord > 0 else sizes.amin(dims, keepdim=keepdim)
    return input.abs().pow(ord).sum(dims, keepdim=keepdim).pow(1 / ord)


def _std(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.var(*args, **kwargs).sqrt()


def _norm(input: Tensor, p: float = 2.0, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    return _vector_norm(input, p if isinstance(p, int | float) else 2.0, dim, keepdim)


def _instance_norm(
    input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    beside = F.pad(input.square().movedim(1, -1), (size // 2, (size - 1) // 2))
    return input * (k + alpha * beside.unfold(-1, size, 1).mean(-1).movedim(-1, 1)).pow(-beta)


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Any = None, size_average: None = None, ignore_index: int = -100,
    reduce: None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    dim = min(1, input.dim() - 1)
    chances = _log_softmax(input, dim)
    if not target.is_floating_point():
        return F.nll_loss(chances, target, weight, None, ignore_index, None, reduction)
    scale = 1.0 if weight is None else weight.view(-1, *[1] * (input.dim() - dim - 1))
    rows = -(scale * target * chances).sum(dim)
    return rows if reduction == "none" else rows.sum() / (1 if reduction == "sum" else rows.numel())


def _softmin(input: Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> Tensor:
    return _softmax(-input, dim)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    one, other = (_normalize(each, dim=dim, eps=eps) for each in torch.broadcast_tensors(x1, x2))
    return (one * other).sum(dim)


def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1.0) -> Tensor:
    return input + value * _div(tensor1, tensor2)


def _pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    return _vector_norm(x1 - x2 + eps, p, -1, keepdim)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
    return _vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _hypot(input: Tensor, other: Tensor) -> Tensor:
    return (input.square() + other.square()).sqrt()


def _logaddexp(input: Tensor, other: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(input, other)).logsumexp(0)


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    found = input
    for bound, chosen in ((min, torch.maximum), (max, torch.minimum)):
        if bound is not None:
            found = chosen(found, bound if isinstance(bound, Tensor) else input.new_full((), bound))
    return found


def _clamp_min(input: Tensor, min: Any) -> Tensor:
    return _clamp(input, min)


def _clamp_max(input: Tensor, max: Any) -> Tensor:
    return _clamp(input, None, max)


def _std_mean(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(input, *args, **kwargs)
    return variance.sqrt(), mean


def _sorted(input: Tensor, dim: int = -1) -> Tensor:
    """Numbers from the largest on, by a network of maxima and minima that merges ever longer sorted parts.

    Source: K. Batcher, "Sorting networks and their applications", 1968.
    """
    found = input.movedim(dim, -1)
    many = found.shape[-1]
    whole, part = 1 << (many - 1).bit_length(), 1
    found = F.pad(found, (0, whole - many), value=-inf)
    while part < whole:
        first, second = found.unflatten(-1, (-1, 2, part)).unbind(-2)
        found, apart = _apart(first, second.flip(-1)), part
        while apart > 1:
            apart //= 2
            found = _apart(*found.unflatten(-1, (-1, 2, apart)).unbind(-2))
        part *= 2
    return found[..., :many].movedim(-1, dim)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """The larger of each two numbers in front of the smaller ones, part by part (..., parts, numbers)."""
    return torch.stack([torch.maximum(one, other), torch.minimum(one, other)], -2).flatten(-3)


def _sort(input: Tensor, dim: int = -1, descending: bool = False, **kwargs: Any) -> Tensor:
    found = _sorted(input, dim)
    return found if descending else found.flip(dim)


def _topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Tensor:
    found = _sorted(input, dim) if largest else _sorted(input, dim).flip(dim)
    return found.narrow(dim, 0, k)


def _kthvalue(input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Tensor:
    found = _sorted(input, dim).narrow(dim, input.shape[dim] - k, 1)
    return found if keepdim else found.squeeze(dim)


def _median(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    given, along = (input.flatten(), 0) if dim is None else (input, dim)
    return _kthvalue(given, (given.shape[along] + 1) // 2, along, keepdim)


FORMS: Mapping[str, Callable[..., Any]] = {
    "abs": _size,
    "addcdiv": _addcdiv,
    "cdist": _cdist,
    "clamp": _clamp,
    "clamp_max": _clamp_max,
    "clamp_min": _clamp_min,
    "cosine_similarity": _cosine_similarity,
    "cross_entropy": _cross_entropy,
    "div": _div,
    "glu": _glu,
    "group_norm": _group_norm,
    "hypot": _hypot,
    "instance_norm": _instance_norm,
    "kthvalue": _kthvalue,
    "layer_norm": _layer_norm,
    "local_response_norm": _local_response_norm,
    "log_softmax": _log_softmax,
    "logaddexp": _logaddexp,
    "median": _median,
    "norm": _norm,
    "normalize": _normalize,
    "pairwise_distance": _pairwise_distance,
    "rms_norm": _rms_norm,
    "softmax": _softmax,
    "softmin": _softmin,
    "sort": _sort,
    "std": _std,
    "std_mean": _std_mean,
    "topk": _topk,
    "vector_norm": _vector_norm,
    **RECURRENT,
}
"""Operations as they are written out in others that have a rule; "abs" is that of complex numbers."""


def has_form(node: Node) -> bool:
    """Whether an operation is written out: not where it rounds or counts, or leaves the order of what it chose open."""
    match node.op:
        case "div":
            return not node.argument("rounding_mode", 2)
        case "cross_entropy":
            return not node.argument("label_smoothing", 7, 0.0) and len(node.parents) > 1
        case "topk":
            return bool(node.argument("sorted", 4, True))
        case "cdist" | "pairwise_distance":
            return bool(node.argument("p", 2, 2.0) != 0)
        case "norm" | "vector_norm":
            return node.argument("p" if node.op == "norm" else "ord", 1, 2.0) not in (0, "nuc")
        case _:
            return node.op in FORMS
