"""Ready-made metrics of a model's output: one number for each example, read at a position."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmr.errors import EditError
from fmr.nests import leaves

Metric = Callable[[Any], Tensor]
"""What is measured on the output of a model: `metric(output)` is one number, or one for each example."""


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: its attribute of that name, or the first tensor."""
    found = getattr(output, "logits", None)
    first = found if isinstance(found, Tensor) else next((tensor for _, tensor in leaves(output)), None)
    if first is None:
        raise EditError(
            f"The output {type(output).__name__} holds no tensor to measure. Give a metric of your own: f(output)."
        )
    return first


def _tokens(tokens: Any, logits: Tensor) -> Tensor:
    found = torch.as_tensor(tokens, device=logits.device)
    return found.expand(len(logits)) if found.dim() == 0 else found


@dataclass(frozen=True, eq=False)
class LogitDiff:
    """The logit of one token less that of another."""

    right: Any
    wrong: Any
    at: int = -1

    @property
    def tokens(self) -> Tensor:
        """The tokens whose logits are read."""
        both = [torch.as_tensor(token).flatten() for token in (self.right, self.wrong)]
        found: Tensor = torch.cat(both).unique()
        return found

    def __call__(self, output: Any) -> Tensor:
        logits = logits_of(output)[:, self.at]
        right, wrong = _tokens(self.right, logits), _tokens(self.wrong, logits)
        return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]


@dataclass(frozen=True, eq=False)
class LogProb:
    """The log-probability of a token, in nats."""

    token: Any
    at: int = -1

    def __call__(self, output: Any) -> Tensor:
        logits = logits_of(output)[:, self.at]
        return logits.log_softmax(-1).gather(1, _tokens(self.token, logits)[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class Probability:
    """The probability of a token, or of several that follow one another."""

    token: Any
    at: int = -1

    def __call__(self, output: Any) -> Tensor:
        logits = logits_of(output)
        tokens = _tokens(self.token, logits)
        several = tokens if tokens.dim() == 2 else tokens[:, None]
        read = logits[:, self.at :][:, : several.shape[1]].log_softmax(-1)
        return read.gather(2, several.expand(len(read), -1)[..., None]).sum((1, 2)).exp()


@dataclass(frozen=True, eq=False)
class KL:
    """The Kullback-Leibler divergence from reference logits, in nats."""

    reference: Tensor
    at: int = -1

    def __call__(self, output: Any) -> Tensor:
        was = self.reference[:, self.at].log_softmax(-1)
        now = logits_of(output)[:, self.at].log_softmax(-1)
        return (was.exp() * (was - now)).sum(-1)


@dataclass(frozen=True, eq=False)
class Loss:
    """The mean cross-entropy of the next tokens, in nats."""

    targets: Tensor

    def __call__(self, output: Any) -> Tensor:
        logits = logits_of(output)[:, :-1]
        targets = self.targets[:, 1:].to(logits.device)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def logit_diff(right: Any, wrong: Any, at: int = -1) -> LogitDiff:
    """The logit of one token less that of another, as a metric.

    >>> fmr.sweep(model, inputs, [site], edits.Zero(), logit_diff(right=3, wrong=7), progress=False).values.shape
    torch.Size([1, 1])

    right, wrong: a token for all examples, or one for each. at: the position that is read.
    """
    return LogitDiff(right, wrong, at)


def log_prob(token: Any, at: int = -1) -> LogProb:
    """The log-probability of a token in nats, as a metric."""
    return LogProb(token, at)


def probability(token: Any, at: int | None = None) -> Probability:
    """The probability of a token as a metric, or of several tokens that follow one another.

    >>> metric = fmr.sweeps.probability(3)
    >>> fmr.sweep(model, inputs, [site], edits.Zero(), metric, progress=False).values.shape
    torch.Size([1, 1])

    token: one for all examples, one for each, or (examples, tokens) for an answer of several, of which the inputs hold all
    but the last. at: the position that the first is read at; by default the last of the inputs is read for the last token.
    """
    shape = torch.as_tensor(token).shape if not isinstance(token, str) else ()
    return Probability(token, at if at is not None else -shape[1] if len(shape) == 2 else -1)


def kl(reference: Any, at: int = -1) -> KL:
    """The Kullback-Leibler divergence in nats from the logits of a reference output, as a metric."""
    return KL(logits_of(reference).detach(), at)


def loss(targets: Tensor) -> Loss:
    """The mean cross-entropy of the next tokens in nats, as a metric; `targets` are the token ids themselves."""
    return Loss(targets)
