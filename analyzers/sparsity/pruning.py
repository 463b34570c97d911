"""Pruning: coefficients or weights left out in some order, what that costs, and the weights back to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers.memories.vocabulary import value_vectors
from analyzers.prompts import Prompts, prompts
from analyzers.protocol import AnalyzerError, Given, Method, check_eval
from analyzers.sparsity.activation import plain_memories
from analyzers.sparsity.curves import PruningCurves
from fmr.nodes import Key
from fmr.structure.normal.match import projection, weights
from fmr.structure.parts import Structure
from fmr.sweeps.metrics import Metric, loss, measured

ORDERS = ("magnitude", "effect", "random")
KEEP = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Keep:
    """Of the coefficients of each token the largest share, and zeros for the others: by `lengths` times their size.

    lengths: (memories,), of the values for their effect; ones for their magnitude; None for a random order, drawn from
    `seed` for each position.
    """

    share: float
    lengths: Tensor | None
    seed: int = 0

    def __call__(self, value: Tensor, context: fmr.edits.Context) -> Tensor:
        """The coefficients that are kept."""
        many = max(1, round(self.share * value.shape[-1]))
        if self.lengths is None:
            draw = torch.Generator().manual_seed(self.seed)
            scores = torch.rand(value.shape, generator=draw).to(value.device)
        else:
            scores = value.abs() * self.lengths.to(value)
        kept = torch.zeros_like(value, dtype=torch.bool).scatter_(-1, scores.topk(many, dim=-1).indices, True)
        return torch.where(kept, value, torch.zeros_like(value))


class Pruning(Method):
    """How few coefficients, or weights, a model's answers need: the loss as fewer are kept, in three orders.

    >>> pruning = analyzers.Pruning(model, tokenizer)
    >>> pruning.run(texts[:2], keep=[1.0, 0.1]).plot()
    >>> with pruning.pruned(0.5, texts=texts[:2]):
    ...     model(**inputs)

    Coefficients are those of memories: at each token each memory keeps its largest, by magnitude |post| or by effect
    |post| |value|. Weights are those of all matrices that layers project by: each keeps its largest, by magnitude |w| or by
    effect |w dL/dw|, the loss that its absence makes, to first order, on texts. The null is a random order. Weights are the
    same bits again after a block, and gradients are left as they were.

    Source: S. Han et al., "Learning both weights and connections for efficient neural networks", 2015 (magnitude);
    P. Molchanov et al., "Pruning convolutional neural networks for resource efficient inference", 2017 (effect).
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer

    def run(
        self,
        texts: Given,
        what: str = "coefficients",
        keep: Sequence[float] = KEEP,
        metric: Metric | None = None,
        *,
        calibration: Given | None = None,
        seed: int = 0,
    ) -> PruningCurves:
        """The loss at each share that is kept, in each order.

        >>> analyzers.Pruning(model, tokenizer).run(texts[:2], "weights", keep=[1.0, 0.5]).loss.shape
        (3, 2)

        texts: what the loss is of. what: "coefficients" or "weights". keep: shares from 0 on to 1. metric: as in fmr.sweep,
        larger for worse; None takes the mean cross-entropy of the next tokens in nats. calibration: texts on which the
        effect of weights is measured; None takes the same. seed: of the random order.
        """
        if what not in ("coefficients", "weights"):
            raise AnalyzerError(f"what={what!r}: expected 'coefficients' or 'weights'.")
        check_eval(self.model)
        shares = _shares(keep)
        given = prompts(texts, self.model, self.tokenizer)
        metric = loss_of(given) if metric is None else metric
        structure = fmr.locate(fmr.run(self.model, **given.inputs))
        if what == "coefficients":
            found = _of_coefficients(self.model, structure, given, metric, shares, seed)
        else:
            known = given if calibration is None else prompts(calibration, self.model, self.tokenizer)
            found = self._of_weights(structure, given, known, metric, shares, seed)
        return PruningCurves(
            model=type(self.model).__name__, what=what, orders=ORDERS, keep=np.array(shares), loss=np.array(found),
            base=_measured(self.model, given, metric), examples=len(given), seed=seed,
        )  # fmt: skip

    @contextmanager
    def pruned(
        self, keep: float, by: str = "magnitude", texts: Given | None = None, metric: Metric | None = None, *, seed: int = 0
    ) -> Iterator[nn.Module]:
        """The model with the largest share of the weights of each matrix, and zeros for the others, while a block lasts.

        >>> with analyzers.Pruning(model, tokenizer).pruned(0.5, texts=texts[:2]) as pruned:
        ...     (pruned.transformer.h[0].mlp.c_fc.weight == 0).float().mean()
        tensor(0.5000)

        by: "magnitude", "effect" or "random". texts: any by which the matrices are found, and on which the effect is
        measured.
        """
        if by not in ORDERS:
            raise AnalyzerError(f"by={by!r}: expected one of {', '.join(map(repr, ORDERS))}.")
        if texts is None:
            raise AnalyzerError("texts=None: expected texts by which the layers' matrices are found.")
        given, share = prompts(texts, self.model, self.tokenizer), _share(keep)
        structure = fmr.locate(fmr.run(self.model, **given.inputs))
        matrices = matrices_of(self.model, structure)
        metric = loss_of(given) if metric is None and by == "effect" else metric
        with _zeros(matrices, share, self._scores(matrices, by, given, metric, seed)):
            yield self.model

    def _of_weights(
        self, structure: Structure, given: Prompts, known: Prompts, metric: Metric, shares: list[float], seed: int
    ) -> list[list[float]]:
        matrices, found = matrices_of(self.model, structure), list[list[float]]()
        for by in ORDERS:
            scores = self._scores(matrices, by, known, loss_of(known) if known is not given else metric, seed)
            found.append([])
            for share in shares:
                with _zeros(matrices, share, scores):
                    found[-1].append(_measured(self.model, given, metric))
        return found

    def _scores(
        self, matrices: Mapping[str, nn.Parameter], by: str, given: Prompts, metric: Metric | None, seed: int
    ) -> dict[str, Tensor]:
        """How much each weight counts."""
        if by == "magnitude":
            return {name: weight.detach().abs() for name, weight in matrices.items()}
        if by == "random":
            draw = torch.Generator().manual_seed(seed)
            return {name: torch.rand(weight.shape, generator=draw).to(weight.device) for name, weight in matrices.items()}
        assert metric is not None
        return _effects(self.model, matrices, given, metric)


def matrices_of(model: nn.Module, structure: Structure) -> dict[str, nn.Parameter]:
    """The parameters by which layers project, by name: matrices, neither those of embeddings nor of logits.

    >>> [name for name in matrices_of(model, structure) if ".0." in name]
    ['transformer.h.0.attn.c_attn.weight', ..., 'transformer.h.0.mlp.c_proj.weight']
    """
    graph = structure.graph
    ends = {one for node in graph.nodes if node.op == "embedding" for one in node.parents}
    ends |= set(graph[structure.unembedding.id].parents) if structure.unembedding is not None else set()
    first, last = (graph.place(site.id) for site in (structure.layers[0].resid_pre, structure.layers[-1].resid_post))
    within = (node for node in graph.nodes[first : last + 1] if (found := projection(graph, node)) is not None and found)
    read = [one for node in within if (found := projection(graph, node)) for one in weights(graph, found.weight)]
    names = [name.removeprefix("param:") for name in dict.fromkeys(read) if name not in ends]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters[name] for name in names if name in parameters and parameters[name].dim() > 1}


def loss_of(given: Prompts) -> Metric:
    """The mean cross-entropy of the next tokens of prompts."""
    ids = given.ids
    if ids is None:
        raise AnalyzerError("The inputs have no token ids whose next tokens a loss would be of. Expected metric=f(output).")
    mask = given.inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if not isinstance(mask, Tensor) or mask.shape != ids.shape else mask != 0
    read = real & real.roll(1, 1)
    if bool((none := ~read[:, 1:].any(1)).any()):
        raise AnalyzerError(
            f"Example {int(none.nonzero()[0])} has one real token, and no next one that a loss would be of. Expected two "
            "tokens or more in each: leave it out."
        )
    return loss(ids.masked_fill(~read, -100))


def _of_coefficients(
    model: nn.Module, structure: Structure, given: Prompts, metric: Metric, shares: list[float], seed: int
) -> list[list[float]]:
    memories = plain_memories(structure)
    lengths = [value_vectors(memory).norm(dim=1) for _, memory in memories]
    chosen = {"magnitude": [torch.ones_like(one) for one in lengths], "effect": lengths, "random": [None] * len(lengths)}
    found: list[list[float]] = []
    for order in ORDERS:
        found.append([])
        for share in shares:
            told: dict[Key, Any] = {
                memory.post: Keep(share, own, seed + number)
                for (number, memory), own in zip(memories, chosen[order], strict=True)
            }
            found[-1].append(_measured(model, given, metric, told))
    return found


def _measured(model: nn.Module, given: Prompts, metric: Metric, edits: Mapping[Key, Any] | None = None) -> float:
    """The mean of a metric over examples."""
    with torch.no_grad():
        output = model(**given.inputs) if edits is None else fmr.run(model, keep=(), edits=edits, **given.inputs).output
        return float(measured(metric, output, len(given)).double().mean())


def _effects(model: nn.Module, matrices: Mapping[str, nn.Parameter], given: Prompts, metric: Metric) -> dict[str, Tensor]:
    """The size of weight times gradient; what wants gradients is as it was afterwards."""
    if torch.is_inference_mode_enabled():
        raise AnalyzerError("The effect of weights takes gradients, and torch.inference_mode() is on. Expected it off here.")
    asked = {name: weight.requires_grad for name, weight in matrices.items()}
    try:
        for weight in matrices.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            total = measured(metric, model(**given.inputs), len(given)).mean()
            slopes = torch.autograd.grad(total, list(matrices.values()), allow_unused=True)
    finally:
        for name, weight in matrices.items():
            weight.requires_grad_(asked[name])
    return {
        name: torch.zeros_like(weight) if slope is None else (weight.detach() * slope).abs()
        for (name, weight), slope in zip(matrices.items(), slopes, strict=True)
    }


@contextmanager
def _zeros(matrices: Mapping[str, nn.Parameter], share: float, scores: Mapping[str, Tensor]) -> Iterator[None]:
    """Zeros for the weights of each matrix that count least, while a block lasts."""
    before = {name: weight.detach().clone() for name, weight in matrices.items()}
    try:
        with torch.no_grad():
            for name, weight in matrices.items():
                least = weight.numel() - round(share * weight.numel())
                gone = scores[name].flatten().argsort(stable=True)[:least]
                weight[torch.unravel_index(gone, weight.shape)] = 0
        yield
    finally:
        with torch.no_grad():
            for name, weight in matrices.items():
                weight.copy_(before[name])


def _shares(keep: Any) -> list[float]:
    if not isinstance(keep, Sequence | np.ndarray) or isinstance(keep, str) or not len(keep):
        raise AnalyzerError(f"keep={keep!r}: expected shares of what is kept, one or more, as [1.0, 0.5].")
    return [_share(float(one) if isinstance(one, np.floating) else one) for one in keep]


def _share(keep: Any) -> float:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 <= keep <= 1:
        raise AnalyzerError(f"keep={keep!r}: expected a share of what is kept, from 0 on to 1.")
    return float(keep)
