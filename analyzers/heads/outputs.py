"""Sums over what many heads write: the cosine of each pair token by token, and how alike they lay tokens out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from analyzers.heads.divergence import CKA, OUTPUT, Sums
from analyzers.protocol import AnalyzerError

LEAST = 4
"""The tokens below which the likeness of two layouts is not defined."""


def count_outputs(sums: Sums, written: Sequence[Tensor], real: Tensor) -> None:
    """Add what the heads of a batch wrote to the sums of those distances that are of outputs.

    written: by layer, (examples, heads, positions, width). real: which tokens are no padding, (examples, positions).
    """
    if OUTPUT in sums.apart and len({one.shape[-1] for one in written}) > 1:
        sizes = sorted({one.shape[-1] for one in written})
        raise AnalyzerError(f"Outputs of {sizes} numbers have no cosine. Expected one width, or distances='cka'.")
    for e, kept in enumerate(real):
        outputs = [one[e][:, kept.to(one.device)].float() for one in written]
        if OUTPUT in sums.apart:
            sums.apart[OUTPUT] += _cosines(torch.cat(outputs))
            sums.counted[OUTPUT] += int(kept.sum())
        if CKA in sums.apart and kept.sum() >= LEAST:
            sums.apart[CKA] += _likeness(torch.cat([one @ one.mT for one in outputs]).double())
            sums.counted[CKA] += 1


def _cosines(outputs: Tensor) -> Tensor:
    """1 - cosine of each pair of heads, summed over tokens: (heads, heads). outputs: (heads, tokens, width)."""
    rows = torch.nn.functional.normalize(outputs, dim=-1).flatten(1)
    total = outputs.shape[1] - (rows @ rows.T).double()
    return total.fill_diagonal_(0.0).clamp_(min=0.0).cpu()


def _likeness(kernels: Tensor) -> Tensor:
    """The unbiased Hilbert-Schmidt criterion of each pair of heads: (heads, heads). kernels: (heads, tokens, tokens).

    Source: L. Song et al., "Feature Selection via Dependence Maximization", 2012; T. Nguyen et al., "Do Wide and Deep
    Networks Learn the Same Things?", 2021 (summed over batches, here over examples).
    """
    n = kernels.shape[-1]
    kernels = kernels - torch.diag_embed(kernels.diagonal(dim1=1, dim2=2))
    rows, flat = kernels.sum(-1), kernels.flatten(1)
    whole = rows.sum(-1)
    total = flat @ flat.T + whole[:, None] * whole[None] / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
    return (total / (n * (n - 3))).cpu()


def from_likeness(total: Tensor) -> Tensor:
    """1 - CKA of each pair of heads, from the sums of their criteria."""
    own = total.diagonal().clamp(min=0).sqrt()
    found = 1 - total / (own[:, None] * own[None]).clamp(min=1e-30)
    return found.clamp(0.0, 2.0).fill_diagonal_(0.0)
