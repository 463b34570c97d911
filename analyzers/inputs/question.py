"""A target as a function of the value at one place of a model, for one example: all that methods need to know of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from analyzers.inputs.targets import OneNumber, Target
from analyzers.protocol import AnalyzerError
from fmr.ids import Site
from fmr.runs.run import Run

SLACK = 1e-4
"""How far a row of many may lie from the same row by itself, as a share of the numbers there."""


class Question:
    """What a target is when other values stand at a place, row by row; the model is run and nothing is left on it.

    `value` is what stands there, (1, ...); `ends` the target at it and at the first baseline, once rows were checked; `why`
    says why rows are run one by one, and is empty where they go together; `repeats` is whether the same input gives the same
    numbers again, and `changed` the buffer of a model that changes as it is run.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], place: Site, target: Target, value: Tensor) -> None:
        self.model, self.inputs, self.place, self.target = model, inputs, place, target
        self.alone = value.dim() == 0 or len(value) != 1
        self.value = self.as_value(value.detach())
        self.why = "the value has no axis of examples" if self.alone else ""
        self.changed = ""
        self.repeats = True
        self.ends = torch.empty(0)

    def __call__(self, values: Tensor) -> Tensor:
        """The target of each row of values, (rows,), with its history where gradients are on."""
        if self.why:
            return self._apart(values)
        return self._together(values)

    @property
    def precision(self) -> torch.dtype:
        """The numbers that attributions are: those of the value, or of the model for whole ones, in 32 bits at least."""
        kinds = [self.value.dtype] if self.value.is_floating_point() else [one.dtype for one in self.model.parameters()]
        return torch.float64 if torch.float64 in kinds else torch.float32

    @property
    def rounding(self) -> float:
        """The unit in the last place of the coarsest numbers that the model computes in, as a share of their size."""
        kinds = {self.value.dtype, *(one.dtype for one in self.model.parameters())}
        return max((torch.finfo(kind).eps for kind in kinds if kind.is_floating_point), default=0.0)

    def as_value(self, found: Tensor) -> Tensor:
        """What stands at the place in another run, with rows in front as the value has them."""
        return found[None] if self.alone else found

    def run(self, values: Tensor, keep: Any = (), grad: bool = False) -> Run:
        """A run with a row of the model's inputs for each row of values, which stand at the place."""
        rows, given = len(values), (values[0] if self.alone else values).to(self.value.dtype)
        inputs = {name: repeated(one, rows) for name, one in self.inputs.items()}
        return fmr.run(self.model, keep=keep, grad=grad, edits={self.place: lambda value, context: given.clone()}, **inputs)

    def _together(self, values: Tensor) -> Tensor:
        grad = torch.is_grad_enabled()
        return self.target.of(self.run(values, self.target.keep, grad), len(values))

    def check_rows(self, other: Tensor) -> None:
        """See whether rows stay apart: the value and another one, together and each by itself, which are the `ends`."""
        both = torch.cat([self.value, other])
        with torch.no_grad():
            own = self.ends = self._apart(both)
            for end, number in zip(("input", "baseline"), own, strict=False):
                if not bool(torch.isfinite(number)):
                    raise AnalyzerError(
                        f"{self.target.words} is {float(number)} at the {end}: expected a finite number, which attributions "
                        "could sum to."
                    )
            self.why = self.why or self._why_apart(both, own)
            if self.why:
                versions = _versions(self.model)
                self.repeats = are_close(self._apart(both), own)
                if not self.repeats:
                    self.why = "the same input gives other numbers when it is run again, and attributions are off by as much"
                    changed = (name for name, one in _versions(self.model).items() if versions.get(name) != one)
                    self.changed = next(changed, "")

    def _apart(self, values: Tensor) -> Tensor:
        """The target of each row by itself."""
        return torch.cat([self._together(row[None]) for row in values])

    def _why_apart(self, both: Tensor, own: Tensor) -> str:
        """Why rows are run one by one, which by themselves give these numbers; nothing where they go together."""
        try:
            found = self._together(both)
        except OneNumber:
            return "the target gives one number for several rows, as if their sum or mean were asked for"
        except Exception as error:
            return f"the model does not take several rows ({str(error).splitlines()[0][:80]})"
        return "" if are_close(found, own) else "rows of the model are not independent"

    def check_gradient(self) -> Tensor:
        """The gradient of the target at the value; `AnalyzerError` where there is none."""
        if not self.value.is_floating_point():
            kind = str(self.value.dtype).removeprefix("torch.")
            raise AnalyzerError(
                f"{self.place!r} holds {kind}, which has no derivative. Expected floating-point numbers: the embedding of "
                "tokens, at=structure.embedding, or method='occlusion' there."
            )
        if any(one.is_inference() for one in self.model.parameters()):
            raise AnalyzerError(
                f"The weights of {type(self.model).__name__} were made in inference mode, where torch takes no gradient. "
                "Expected a model that was made outside of it; method='deeplift' and 'occlusion' need none."
            )
        if self.changed:
            raise AnalyzerError(
                f"{type(self.model).__name__} changes its buffer {self.changed!r} as it runs, and gives other numbers for "
                "the same input then, so that no gradient is that of one function. Expected a model that keeps no count in "
                "eval mode, or method='occlusion'."
            )
        with torch.enable_grad():
            values = self.value.clone().requires_grad_()
            found = self(values)
            if not found.requires_grad:
                raise AnalyzerError(
                    f"{self.target.words} has no gradient at {self.place!r}: no value on the way is differentiable, or none "
                    "leads there. Expected a target made of the output without argmax, counts or detach, and a place before "
                    "it; method='occlusion' needs no gradient."
                )
            try:
                (gradient,) = torch.autograd.grad(found.sum(), values, allow_unused=True)
            except RuntimeError as error:
                why = str(error).split(":")[0]
                raise AnalyzerError(
                    f"torch takes no gradient of {self.target.words} at {self.place!r}: {why}. Expected a model that leaves "
                    "what its gradient needs as it is; method='deeplift' and 'occlusion' need none."
                ) from error
        if gradient is None:
            raise AnalyzerError(
                f"The gradient of {self.target.words} does not reach {self.place!r}. Expected a place that the target "
                "depends on through differentiable operations; method='occlusion' needs no gradient."
            )
        return gradient


def are_close(found: Tensor, own: Tensor, slack: float = SLACK) -> bool:
    """Whether numbers of rows together are those of each by itself, up to rounding."""
    return torch.allclose(found, own, rtol=slack, atol=slack * float(own.abs().max()))


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Each buffer of a model, and how often it was written to."""
    return {name: (id(one), 0 if one.is_inference() else one._version) for name, one in model.named_buffers()}


def repeated(value: Any, rows: int) -> Any:
    """An argument of one example for several rows: a copy, which a model may write to."""
    if not isinstance(value, Tensor):
        return value
    return (value.expand(rows, *value.shape[1:]) if value.dim() and len(value) == 1 else value).clone()


def one_of(inputs: Mapping[str, Any], example: int, examples: int) -> dict[str, Any]:
    """The arguments of one example."""
    return {
        name: one[example : example + 1] if isinstance(one, Tensor) and one.dim() and len(one) == examples else one
        for name, one in inputs.items()
    }
