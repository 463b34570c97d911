"""How many coefficients of a memory matter at each token, by what they add to its output and not by their sign."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.memories.vocabulary import value_vectors
from analyzers.numbers.embed import Floats
from analyzers.prompts import Prompts, prompts
from analyzers.protocol import (
    Analyzer,
    AnalyzerError,
    Given,
    check_counts,
    check_eval,
    check_other,
    later_tokens,
    nothing_counted,
    real_tokens,
)
from analyzers.sites import found_in, read_at
from analyzers.sparsity.sparsity import Sparsity
from fmr.errors import number_of
from fmr.structure.memories.memory import Memory
from fmr.structure.parts import Structure

MEASURES = ("active", "zero", "effective", "hoyer")
_DRAWN = 256
"""How many tokens the null has."""


class ActivationSparsity(Analyzer[Sparsity]):
    """Of each layer and token, how many coefficients of the memory matter to what it writes.

    >>> analyzers.ActivationSparsity(model, tokenizer).over(texts, progress=False).result().plot()

    A coefficient matters where the memory's output without it is another by more than `eps` of its length:
    |post| |value| > eps |sum of post times value|. That is right for any nonlinearity and
    any gate: a coefficient of a gated unit has either
    sign and is hardly ever zero, and one that is not zero adds nothing where its value is short. Beside this share stand
    that of exact zeros, the effective number (the sum of |post| |value| squared, over the sum of their squares), and
    Hoyer's measure of the same, 0 where all add alike and 1 where one does.

    The null is the same memory with coefficients drawn from a normal distribution: what a dense layer of as many values
    has. model: any module with memories that `fmr.locate` finds, in eval mode. skip: how many tokens at the start of each
    text are left out. seed: of the null.

    Source: Z. Li et al., "The lazy neuron phenomenon", 2023 (zeros of ReLU); P. Hoyer, "Non-negative matrix factorization
    with sparseness constraints", 2004; B. Kramer, A. MacKinnon, "Localization", 1993 (participation ratio).
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, eps: float = 0.01, skip: int = 0, seed: int = 0) -> None:
        if type(eps) not in (int, float) or not 0 <= eps < 1:
            raise AnalyzerError(f"eps={eps!r}: expected a share of the output's length from 0 on and below 1, such as 0.01.")
        check_counts(0, skip=skip)
        self.model, self.tokenizer, self.eps, self.seed = model, tokenizer, float(eps), seed
        self.skip = operator.index(skip)
        self.memories: tuple[tuple[int, Memory], ...] = ()
        self.sums = torch.zeros(0)
        self.tokens: dict[int, tuple[int, Tensor]] = {}
        self.seen = 0

    def update(self, batch: Given) -> ActivationSparsity:
        """Count the tokens of one batch.

        >>> analyzers.ActivationSparsity(model).update(inputs).counted
        '6 tokens'
        """
        check_eval(self.model)
        given = prompts(batch, self.model, self.tokenizer)
        if not self.memories:
            self.memories, _ = found_in(self.model, given.inputs, lambda structure: plain_memories(structure))
            self.sums = torch.zeros(len(self.memories), len(MEASURES), dtype=torch.float64)
        with torch.no_grad():
            run = read_at(self.model, given.inputs, [memory.post for _, memory in self.memories])
            found, real = [], None
            for _, memory in self.memories:
                post = run[memory.post]
                rows = post.reshape(-1, post.shape[-1]).float()
                real = self._real(given, len(rows)) if real is None else real
                found.append(measured(rows[real.to(rows.device)], value_vectors(memory).float(), self.eps).cpu())
        assert real is not None
        every = torch.stack(found)  # (layers, measures, tokens)
        self.sums = self.sums + every.sum(2)
        self.seen += every.shape[2]
        self._by_token(given.ids, real, every[:, 0])
        return self

    def _real(self, given: Prompts, rows: int) -> Tensor:
        """Which rows are tokens, no padding and not left out."""
        ids, mask = given.ids, given.inputs.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.numel() != rows:
            if self.skip:
                raise AnalyzerError(
                    f"skip={self.skip} of coefficients without token ids: expected ids, which tell positions."
                )
            return torch.ones(rows, dtype=torch.bool)
        return later_tokens(real_tokens(mask, *ids.shape), self.skip).flatten()

    def _by_token(self, ids: Any, real: Tensor, active: Tensor) -> None:
        """Add the active shares of the tokens to those of the same ones."""
        if not isinstance(ids, Tensor) or ids.numel() != len(real):
            return
        own, place, counts = ids.flatten().cpu()[real].unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(own), len(active), dtype=torch.float64).index_add_(0, place, active.T)
        for token, count, some in zip(own.tolist(), counts.tolist(), sums, strict=True):
            before, held = self.tokens.get(token, (0, torch.zeros_like(some)))
            self.tokens[token] = before + count, held + some

    @property
    def counted(self) -> str:
        """How many tokens were counted."""
        return number_of(self.seen, "token") if self.seen else ""

    def merge(self, other: ActivationSparsity) -> ActivationSparsity:
        """Add what another one of the same settings counted on other data, and return this one.

        >>> one, two = (analyzers.ActivationSparsity(model, tokenizer).over([text], progress=False) for text in texts[:2])
        >>> one.merge(two).counted
        '... tokens'
        """
        check_other(self, other)
        if (self.eps, self.seed, self.skip) != (other.eps, other.seed, other.skip):
            raise AnalyzerError(f"Cannot merge {other!r} into {self!r}: expected an analyzer of the same settings.")
        if not other.memories:
            return self
        if not self.memories:
            self.memories, self.sums = other.memories, torch.zeros_like(other.sums)
        self.sums, self.seen = self.sums + other.sums, self.seen + other.seen
        for token, (count, some) in other.tokens.items():
            before, held = self.tokens.get(token, (0, torch.zeros_like(some)))
            self.tokens[token] = before + count, held + some
        return self

    def result(self) -> Sparsity:
        """The means over the tokens so far.

        >>> analyzers.ActivationSparsity(model, tokenizer).over(texts, progress=False).result().active.shape
        (4,)
        """
        if not self.seen:
            raise AnalyzerError(nothing_counted(self.skip))
        means, nulls = (self.sums / self.seen).numpy(), self._null()
        words = sorted(self.tokens, key=lambda token: (-self.tokens[token][0], token))
        return Sparsity(
            model=type(self.model).__name__,
            layers=tuple(number for number, _ in self.memories),
            sizes=tuple(memory.n for _, memory in self.memories),
            gated=tuple(memory.w_gate is not None or memory.fused_gate for _, memory in self.memories),
            **{name: means[:, n] for n, name in enumerate(MEASURES)},
            **{f"{name}_null": nulls[:, n] for n, name in enumerate(MEASURES) if name != "zero"},
            words=tuple(str(one) if self.tokenizer is None else self.tokenizer.decode([one]) for one in words),
            counts=tuple(self.tokens[one][0] for one in words),
            by_word=torch.stack([self.tokens[one][1] / self.tokens[one][0] for one in words], 1)
            if words
            else torch.zeros(len(self.memories), 0, dtype=torch.float64),
            seen=self.seen,
            eps=self.eps,
            seed=self.seed,
            skip=self.skip,
        )

    @torch.no_grad()
    def _null(self) -> Floats:
        """The measures of coefficients from a normal distribution, (layers, measures)."""
        draw, found = torch.Generator().manual_seed(self.seed), []
        for _, memory in self.memories:
            values = value_vectors(memory).float()
            found.append(measured(torch.randn(_DRAWN, memory.n, generator=draw).to(values), values, self.eps).mean(1).cpu())
        return torch.stack(found).numpy()


def measured(post: Tensor, values: Tensor, eps: float) -> Tensor:
    """The measures of coefficients (tokens, memories) that weigh values (memories, width): (measures, tokens).

    >>> measured(torch.tensor([[3.0, 0.0, 0.01, 0.0]]), torch.eye(4), eps=0.01)[:2, 0]
    tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    n = post.shape[-1]
    adds = (post.abs() * values.norm(dim=1)).double()
    length = (post @ values).norm(dim=1, keepdim=True).double()
    total, squares = adds.sum(1), adds.square().sum(1)
    effective = total.square() / squares.clamp(min=1e-300)
    hoyer = (n**0.5 - effective.sqrt()) / (n**0.5 - 1)
    return torch.stack([(adds > eps * length).double().mean(1), (post == 0).double().mean(1), effective, hoyer])


def plain_memories(structure: Structure) -> tuple[tuple[int, Memory], ...]:
    """The memories of a structure with their layers, each with one matrix of values; of others it is told why not."""
    every = [(number, memory) for number, layer in enumerate(structure.layers) for memory in layer.mlps]
    if not every:
        raise AnalyzerError(f"{structure.model} has no memories that were found. Expected layers with two projections each.")
    for number, memory in every:
        if memory.axis != -1 or len(value_vectors(memory)) != memory.n:
            raise AnalyzerError(
                f"The memories of layer {number} are several experts, or channels of an image: their coefficients are not "
                "one row a token. Expected layers with one memory for every token."
            )
    return tuple(every)
