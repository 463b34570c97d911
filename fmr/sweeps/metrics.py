"""Ready-made metrics of a model's output: one number for each example, read at a position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fmr.edits.frames import Frames
from fmr.edits.places import parts
from fmr.errors import EditError, number_of, whole_number
from fmr.ids import Site, TensorId
from fmr.nests import leaves

Metric = Callable[[Any], Tensor]
"""What is measured on the output of a model: `metric(output)` is one number, or one for each example."""

At = int | Tensor
"""A column of the logits for all examples, or one for each."""

UNREAD = -100
"""A target that a loss leaves out."""


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: its attribute or entry of that name, or the first tensor."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    first = found if isinstance(found, Tensor) else next((tensor for _, tensor in leaves(output)), None)
    if first is None:
        raise EditError(
            f"The output {type(output).__name__} holds no tensor to measure. Give a metric of your own: f(output)."
        )
    return first


def logits_by_position(output: Any) -> Tensor:
    """The logits in what a model returned, (examples, positions, tokens)."""
    logits = logits_of(output)
    if logits.dim() != 3:
        raise EditError(
            f"The logits have shape {tuple(logits.shape)}, expected (examples, positions, tokens). Give a metric of your "
            f"own, as lambda output: output[:, 0]."
        )
    return logits


def read_at(logits: Tensor, at: At) -> Tensor:
    """The logits of one column, (examples, tokens)."""
    if isinstance(at, Tensor) and at.dim() == 1 and len(at) == len(logits):
        return logits[torch.arange(len(logits), device=logits.device), at.to(logits.device)]
    many, column = logits.shape[1], whole_number(at)
    if column is None or not -many <= column < many:
        raise EditError(
            f"at={at!r}: the logits have {number_of(many, 'position')}, expected a whole number from {-many} to {many - 1}."
        )
    return logits[:, column]


def token_ids(tokens: Any, logits: Tensor, several: bool = False) -> Tensor:
    """A token for all examples or one for each, as one for each; (examples, tokens) where it may be several."""
    every, vocabulary = tokens if isinstance(tokens, (list, tuple)) else [tokens], logits.shape[-1]
    text = next((token for token in every if isinstance(token, str)), None)
    if text is not None:
        raise EditError(
            f"The token {text!r} is text, and a metric reads numbers. Expected its ID, as "
            f"tokenizer({text!r}, add_special_tokens=False)['input_ids']; analyzers with a tokenizer take text."
        )
    try:
        found = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor(0.5)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise EditError(f"The tokens {_short(tokens)} are no token IDs. Expected a whole number, or one for each example.")
    follow = several and found.dim() == 2 and found.shape[1] > 0
    fits = not found.dim() or len(found) == len(logits) or (follow and len(found) == 1)
    if not fits or found.dim() > 1 + follow:
        raise EditError(
            f"The tokens {_short(tokens)} have shape {tuple(found.shape)}, and there are "
            f"{number_of(len(logits), 'example')}. Expected "
            f"one token for all of them, as a number, or a list with one for each."
        )
    outside = found[(found < 0) | (found >= vocabulary)].flatten().tolist()
    if outside:
        raise EditError(f"There is no token {outside[0]}: the logits have {vocabulary}. Expected 0 to {vocabulary - 1}.")
    found = found.to(logits.device)
    if several:
        found = found if follow else found.reshape(-1, 1)
        return found.expand(len(logits), -1)
    return found.expand(len(logits)) if found.dim() == 0 else found


def _short(value: Any) -> str:
    shown = repr(value.tolist() if isinstance(value, Tensor) else value)
    return shown if len(shown) < 60 else shown[:56] + " ..."


@dataclass(frozen=True, eq=False)
class LogitDiff:
    """The logit of one token less that of another."""

    right: Any
    wrong: Any
    at: At = -1

    @property
    def tokens(self) -> Tensor:
        """The tokens whose logits are read."""
        both = [torch.as_tensor(token).flatten() for token in (self.right, self.wrong)]
        found: Tensor = torch.cat(both).unique()
        return found

    def __call__(self, output: Any) -> Tensor:
        logits = read_at(logits_by_position(output), self.at)
        right, wrong = token_ids(self.right, logits), token_ids(self.wrong, logits)
        return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]


@dataclass(frozen=True, eq=False)
class LogProb:
    """The log-probability of a token, in nats."""

    token: Any
    at: At = -1

    def __call__(self, output: Any) -> Tensor:
        logits = read_at(logits_by_position(output), self.at)
        return logits.log_softmax(-1).gather(1, token_ids(self.token, logits)[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class Probability:
    """The probability of a token, or of several that follow one another."""

    token: Any
    at: At = -1

    def __call__(self, output: Any) -> Tensor:
        logits = logits_by_position(output)
        tokens, at = token_ids(self.token, logits, several=True), self.at
        if not isinstance(at, Tensor):
            read_at(logits, at)
            many, first = tokens.shape[1], at % logits.shape[1]
            if first + many > logits.shape[1]:
                raise EditError(
                    f"at={at}: {number_of(many, 'token')} follow from there, and the logits have "
                    f"{number_of(logits.shape[1], 'position')}."
                )
            at = torch.arange(first, first + many)
        each = logits[torch.arange(len(logits), device=logits.device)[:, None], at.to(logits.device)].log_softmax(-1)
        return each.gather(2, tokens[..., None]).sum((1, 2)).exp()


@dataclass(frozen=True, eq=False)
class KL:
    """The Kullback-Leibler divergence from reference logits, in nats."""

    reference: Tensor
    at: At = -1

    def __call__(self, output: Any) -> Tensor:
        logits = logits_by_position(output)
        if self.reference.shape != logits.shape:
            raise EditError(
                f"The reference has shape {tuple(self.reference.shape)}, and the logits have {tuple(logits.shape)}. "
                f"Expected the output of the model on as many examples and positions: kl(model(*inputs))."
            )
        was, now = read_at(self.reference, self.at).log_softmax(-1), read_at(logits, self.at).log_softmax(-1)
        return (was.exp() * (was - now)).sum(-1)


@dataclass(frozen=True, eq=False)
class Loss:
    """The mean cross-entropy of the next tokens, in nats."""

    targets: Tensor

    def __call__(self, output: Any) -> Tensor:
        logits = logits_by_position(output)
        if not isinstance(self.targets, Tensor) or self.targets.shape != logits.shape[:2]:
            shape = tuple(self.targets.shape) if isinstance(self.targets, Tensor) else type(self.targets).__name__
            raise EditError(f"The targets are {shape}, expected token IDs of shape {tuple(logits.shape[:2])}, as input_ids.")
        targets = self.targets[:, 1:].to(logits.device)
        read = targets != UNREAD
        token_ids(targets[read], logits[:, :-1][read])
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
        return each.sum(1) / read.sum(1)


READY = (LogitDiff, LogProb, Probability, KL, Loss)


# ---- what is measured of a run


def placed(metric: Metric, output: Any, known: Frames) -> Metric:
    """A metric of this module that means positions as sites do: the tokens of each example, whatever pads them."""
    if isinstance(metric, Loss):
        metric(output)
        return replace(metric, targets=_told(metric.targets, _columns(slice(None), logits_of(output), known)))
    if not isinstance(metric, (LogitDiff, LogProb, Probability, KL)) or isinstance(metric.at, Tensor):
        return metric
    metric(output)
    logits, first = logits_of(output), metric.at
    many = token_ids(metric.token, logits, several=True).shape[1] if isinstance(metric, Probability) else 1
    rows = [_columns(first + place, logits, known) for place in range(many)]
    none = next((example for row in rows for example, columns in enumerate(row) if not columns), None)
    if none is not None:
        raise EditError(f"at={first!r}: example {none} has no such token. Expected one that each example has, as at=-1.")
    at = torch.tensor(rows)[..., 0].T  # (examples, tokens)
    if bool((at[:, 0] == at[0, 0]).all()) and bool((at.diff() == 1).all()):
        return replace(metric, at=int(at[0, 0]))
    return replace(metric, at=at if isinstance(metric, Probability) else at[:, 0])


def _told(targets: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """The targets that are tokens, and of which the column before tells."""
    read = torch.zeros(targets.shape, dtype=torch.bool)
    for example, row in enumerate(rows):
        read[example, [column for column in row if column - 1 in row]] = True
    return targets.masked_fill(~read.to(targets.device), UNREAD)


def _columns(positions: int | slice, logits: Tensor, known: Frames) -> list[Sequence[int]]:
    """The columns of the logits that are these positions, of each example."""
    rows: list[Sequence[int]] = [()] * len(logits)
    for part in parts(Site(TensorId("logits"), positions=positions), logits, known):
        chosen: Any = part.site.positions
        for example in part.examples or range(len(logits)):
            if isinstance(chosen, (int, slice)):
                rows[example] = torch.arange(logits.shape[1])[chosen].reshape(-1).tolist()
            else:
                rows[example] = chosen if part.examples else chosen[example]
    return rows


def measured(metric: Metric, output: Any, examples: int) -> Tensor:
    """The metric of an output, one number or one for each example; what is counted or true or false becomes numbers."""
    given = metric(output)
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(2, 2)
    if found.dim() > 1 or found.is_complex() or (found.dim() == 1 and len(found) not in (1, examples)):
        shown = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise EditError(
            f"The metric returned {shown}, expected one number or one for each of the {number_of(examples, 'example')}."
        )
    return found if found.is_floating_point() else found.double()


def why_no_metric(given: Any) -> str | None:
    """Why something is no metric, and what to give in its place; None for what may be one."""
    if isinstance(given, type) or any(given is maker for maker in _MAKERS):
        parameters = {} if isinstance(given, type) else signature(given).parameters
        takes = ", ".join(name for name, one in parameters.items() if one.default is one.empty)
        called = f"{given.__name__}({takes or '...'})"
        return f"metric is {given.__name__} itself, not what it returns: expected a metric, as {called}."
    if callable(given):
        return None
    return f"metric is {type(given).__name__}, expected a function of the model's output, as logit_diff(right, wrong)."


def logit_diff(right: Any, wrong: Any, at: int = -1) -> LogitDiff:
    """The logit of one token less that of another, as a metric.

    >>> fmr.sweep(model, inputs, [site], edits.Zero(), logit_diff(right=3, wrong=7), progress=False).values.shape
    torch.Size([1, 1])

    right, wrong: the ID of a token for all examples, or a list with one for each; text only for analyzers that have a
    tokenizer. at: the position that is read, in sweeps and analyzers one of the tokens as in a site, so that -1 is the last
    token whatever pads it. Called by hand, metric(output), it is a column of the logits.
    """
    return LogitDiff(right, wrong, at)


def log_prob(token: Any, at: int = -1) -> LogProb:
    """The log-probability of a token in nats, as a metric; token and at as in `logit_diff`."""
    return LogProb(token, at)


def probability(token: Any, at: int | None = None) -> Probability:
    """The probability of a token as a metric, or of several tokens that follow one another.

    >>> metric = fmr.sweeps.probability(3)
    >>> fmr.sweep(model, inputs, [site], edits.Zero(), metric, progress=False).values.shape
    torch.Size([1, 1])

    token: one for all examples, one for each, or (examples, tokens) for an answer of several, of which the inputs hold all
    but the last. at: the position that the first is read at, as in `logit_diff`; by default the last token of the inputs is
    read for the last.
    """
    shape = torch.as_tensor(token).shape if not isinstance(token, str) else ()
    return Probability(token, at if at is not None else -shape[1] if len(shape) == 2 else -1)


def kl(reference: Any, at: int = -1) -> KL:
    """The Kullback-Leibler divergence in nats from the logits of a reference output, as a metric; at as in `logit_diff`."""
    return KL(logits_of(reference).detach(), at)


def loss(targets: Tensor) -> Loss:
    """The mean cross-entropy of the next tokens in nats, as a metric; padding counts for nothing in sweeps and analyzers.

    targets: the token IDs themselves, -100 for those that count for nothing.
    """
    return Loss(targets)


_MAKERS = (logit_diff, log_prob, probability, kl, loss)
"""What makes a metric and is none."""
