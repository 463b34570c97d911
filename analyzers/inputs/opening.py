"""What every way of asking begins with: each example as a question, with the baselines of its value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers.inputs.baselines import EXPECTED, baselines_of
from analyzers.inputs.perturbed import cells_of
from analyzers.inputs.places import kind_of, names_of, place_of, real_in, without_padding
from analyzers.inputs.question import Question, are_close, one_of
from analyzers.inputs.targets import NoNumbers, check_words, target_of
from analyzers.prompts import Prompts, prompts
from analyzers.protocol import AnalyzerError, Given, check_counts
from fmr.ids import Site
from fmr.nests import leaves
from fmr.nodes import Key
from fmr.runs.run import Run

TOGETHER = 1e-3
"""How far an example among others may lie from the same one alone, as a share of its numbers."""


@dataclass(frozen=True)
class Settings:
    """How much work a method does, as `InputAttribution.run` says."""

    steps: int = 64
    most: int = 2048
    within: float = 0.01
    samples: int = 200
    cells: Any = None
    rows: int = 16
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_counts(1, steps=self.steps, most=self.most, samples=self.samples, rows=self.rows)
        check_counts(0, seed=self.seed)
        if self.most < self.steps:
            raise AnalyzerError(f"most={self.most} is less than steps={self.steps}, to begin with. Expected as many.")
        if isinstance(self.within, bool) or not isinstance(self.within, int | float) or not self.within > 0:
            raise AnalyzerError(f"within={self.within!r}: expected the share that a sum may be off, as 0.01.")


class Asked(NamedTuple):
    """One example of which something is asked: the question, its baselines (baselines, ...), and how much work is done.

    real: the positions that are no padding, (1, ..., positions, ..., 1) along their dimension.
    """

    question: Question
    bases: Tensor
    own: Settings
    real: Tensor

    @property
    def kind(self) -> str:
        """What kind of value stands at the place."""
        return kind_of(self.question.value, self.question.inputs, self.question.place)

    def cells(self, given: Any = None) -> Tensor:
        """The cell of each number of the value, -1 for padding, which is none."""
        given = self.own.cells if self.own.cells is not None else given
        return cells_of(given, self.question.value, self.kind, self.real)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The target at the input and at the baselines, the mean of these."""
        at, first = self.question.ends
        with torch.no_grad():
            base = torch.stack([first, *(self.question(row[None])[0] for row in self.bases[1:])])
        return at.double().cpu(), base.double().cpu().mean()


class Opening:
    """A model that is asked, and what its inputs are: examples become questions at one place."""

    def __init__(self, model: nn.Module, tokenizer: Any, inputs: Given) -> None:
        self.model, self.tokenizer = model, tokenizer
        inputs = _as_tensors(inputs, model)
        _check_tensors(inputs)
        self.given: Prompts = prompts(inputs, model, tokenizer)

    def __len__(self) -> int:
        return len(self.given)

    def one(self, example: int) -> dict[str, Any]:
        """The arguments of one example: copies, which a model may write to."""
        own = one_of(self.given.inputs, example, len(self.given))
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in own.items()}

    def run(self, example: int, keep: Sequence[Site] | str | None = None) -> Run:
        """A run of one example, of which all is known or what is kept; `AnalyzerError` where the model does not take it."""
        one = self.one(example)
        try:
            return fmr.run(self.model, **one) if keep is None else fmr.run(self.model, keep=keep, **one)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            told = ", ".join(f"{name} {_shape(value)}" for name, value in one.items())
            why = (str(error) or repr(error)).splitlines()[0]
            raise AnalyzerError(
                f"{type(self.model).__name__} does not take these inputs, {told}: {why}. "
                "Expected what its forward runs on, of its widths and dtype."
            ) from error

    def place(self, at: Key | None) -> Site:
        """The place that is meant."""
        return place_of(at, self.model, self.one(0), lambda: self.run(0))

    def asked(self, example: int, place: Site, target: Any, baseline: Any, own: Settings) -> Asked:
        """One example as a question about what stands at a place."""
        check_words(target, self.model, lambda: self.run(example))
        one = self.one(example)
        run = self.run(example, [place, *([target] if isinstance(target, Site) else [])])
        if example == len(self) - 1:
            self._check_cut(run)
        value = run[place]
        if not isinstance(value, Tensor):
            raise AnalyzerError(
                f"{place!r} holds a {type(value).__name__}, expected one tensor: name one of it, as 'h.3:0'."
            )
        if not bool(torch.isfinite(value).all()):
            raise AnalyzerError(
                f"{place!r} holds what is no finite number in example {example}: expected finite ones, without which no "
                "difference from a baseline is known."
            )
        question = Question(self.model, one, place, target_of(target, run, self.given, example, self.tokenizer), value)
        real = real_in(question.value, one, place, run.last.frames())
        names = _check_mean(baseline, question, place)
        read, padding = self._reader(place), lambda: question.as_value(self._padded(one, place))
        bases = baselines_of(baseline, question.value, real, lambda given: question.as_value(read(given)), padding, names)
        try:
            question.check_rows(bases[:1])
        except NoNumbers as error:
            raise AnalyzerError(f"{error}{self._uneven()}") from error
        return Asked(question, bases, own, real)

    def _check_cut(self, last: Run) -> None:
        """Raise where the last example makes something else alone than among the others: what they share was cut up."""
        many, given = len(self), self.given.inputs
        cut = [name for name, one in given.items() if isinstance(one, Tensor) and one.dim() and len(one) == many]
        if many < 2 or len(cut) < 2:
            return
        copies: dict[str, Any] = {name: one.clone() if isinstance(one, Tensor) else one for name, one in given.items()}
        alone = dict(leaves(last.output))
        try:
            together = dict(leaves(fmr.run(self.model, keep="none", **copies).output))
        except Exception:  # of a model that takes one example at a time
            return
        for name, one in alone.items():
            other = together.get(name)
            if other is None or not other.dim() or len(other) != many or not one.is_floating_point():
                continue
            if one.shape != (1, *other.shape[1:]) or not are_close(
                other[-1:], one, max(TOGETHER, 32 * torch.finfo(one.dtype).eps)
            ):
                raise AnalyzerError(
                    f"{type(self.model).__name__} makes something else of the last example alone than among the others: it "
                    f"mixes examples, or {' or '.join(cut)} belongs to all of them and was cut into {many} rows. Expected "
                    "one example at a time."
                )

    def _uneven(self) -> str:
        """The numbers of rows of the inputs, where they differ."""
        rows = {name: len(one) for name, one in self.given.inputs.items() if isinstance(one, Tensor) and one.dim()}
        told = ", ".join(f"{name} {many}" for name, many in rows.items())
        return f" The inputs have different numbers of rows, {told}." if len(set(rows.values())) > 1 else ""

    def _reader(self, place: Site) -> Callable[[Any], Tensor]:
        def read(inputs: Any) -> Tensor:
            if isinstance(inputs, str) and self.tokenizer is None:
                raise AnalyzerError(f"baseline={inputs!r}: expected {EXPECTED}")
            found = Opening(self.model, self.tokenizer, inputs)
            values = [self._of_tokens(found.one(n), place) for n in range(len(found))]
            if len({one.shape[1:] for one in values}) > 1:
                sizes = ", ".join(str(list(one.shape[1:])) for one in values)
                raise AnalyzerError(f"The values of the baselines have shapes {sizes}: expected one, that of the input.")
            return torch.cat(values)

        return read

    def _of_tokens(self, one: Mapping[str, Any], place: Site) -> Tensor:
        """What stands at a place of other inputs, without their padding."""
        run = self._at(one, place)
        value: Tensor = run[place]
        return without_padding(value, real_in(value, one, place, run.last.frames()))

    def _at(self, one: Mapping[str, Any], place: Site) -> Run:
        return fmr.run(self.model, keep=[place], stop=True, **one)

    def _padded(self, one: Mapping[str, Any], place: Site) -> Tensor:
        pad, ids = getattr(self.tokenizer, "pad_token_id", None), one.get("input_ids")
        if pad is None or not isinstance(ids, Tensor):
            missing = "no tokenizer with one" if pad is None else "no input of token ids"
            raise AnalyzerError(
                f"baseline='padding' puts the padding token in every place, and there is {missing}. Take baseline='zero' or "
                "'mean', or values of your own."
            )
        value: Tensor = self._at({**one, "input_ids": torch.full_like(ids, pad)}, place)[place]
        return value


def _check_mean(baseline: Any, question: Question, place: Site) -> tuple[str, ...]:
    """What the dimensions of a value count; `AnalyzerError` where nothing says over which of four a mean goes."""
    value, names = question.value, names_of(place, question.value)
    by_name = isinstance(baseline, str) and baseline == "mean"
    if by_name and value.dim() == 4 and not names and kind_of(value, question.inputs, place) != "image":
        raise AnalyzerError(
            f"baseline='mean' of {place!r} {list(value.shape)}: nothing says over which dimensions a mean goes. Expected "
            "a role, as at='attention[1].z', or what they count, as in "
            f"fmr.Site({str(place.id)!r}, layout=('examples', 'heads', 'positions', 'units'))."
        )
    return names


def _as_tensors(inputs: Any, model: nn.Module) -> Any:
    """Arrays of NumPy among inputs as tensors, fractions in the numbers of the model; all else as it is."""
    if isinstance(inputs, Mapping) and any(isinstance(one, np.ndarray) for one in inputs.values()):
        return {name: _as_tensors(one, model) for name, one in inputs.items()}
    if not isinstance(inputs, np.ndarray) or inputs.dtype.kind not in "biuf":
        return inputs
    found = torch.from_numpy(np.array(inputs, inputs.dtype.newbyteorder("=")))
    kind = next((one.dtype for one in model.parameters() if one.is_floating_point()), found.dtype)
    return found.to(kind) if found.is_floating_point() else found


def _check_tensors(inputs: Any) -> None:
    """Raise for tensors that hold no numbers of examples."""
    for name, one in leaves(inputs):
        kind = "on meta, without numbers" if one.is_meta else f"{one.layout}" if one.layout != torch.strided else ""
        kind = "of no dimension" if not kind and isinstance(inputs, Tensor) and not one.dim() else kind
        if kind:
            raise AnalyzerError(
                f"The tensor {name or 'given'} is {kind}: expected a dense one of numbers, with examples in front."
            )


def _shape(value: Any) -> str:
    kind = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
    return f"{kind} {list(value.shape)}" if isinstance(value, Tensor) else kind
