"""What is explained: a class, a token, the difference of two, a value at a site, or any function of a model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.causal.metrics import in_tokens
from analyzers.inputs.places import is_role
from analyzers.prompts import Prompts, token_ids
from analyzers.protocol import AnalyzerError
from fmr.edits.places import parts
from fmr.errors import EditError, number_of, whole_number
from fmr.ids import Site
from fmr.nests import leaves
from fmr.nodes import id_of
from fmr.runs.run import Run
from fmr.sweeps.metrics import READY, LogProb, logits_of, measured, placed

EXPECTED = "a class or a token id, a word, a pair of these for their difference, a site, or a function of the output"


class NoNumbers(AnalyzerError):
    """A target gave something else than one number for each example."""


class OneNumber(AnalyzerError):
    """A target gave one number for several examples."""


@dataclass(frozen=True, eq=False)
class Target:
    """What is explained, in words, and as a function of what a model returned or of the value at a site."""

    words: str
    measure: Callable[[Any], Tensor]
    site: Site | None = None

    @property
    def keep(self) -> list[Site]:
        """What a run must keep for it."""
        return [] if self.site is None else [self.site]

    def read(self, run: Run) -> Any:
        """What it is measured on: the output of the model, or the value at its site."""
        return run.output if self.site is None else run[self.site]

    def of(self, run: Run, rows: int) -> Tensor:
        """One number for each row of a run."""
        return one_each(self.measure(self.read(run)), rows)


def one_each(found: Any, rows: int) -> Tensor:
    """What a target is in some rows, (rows,); `AnalyzerError` for anything but one number a row."""
    try:
        given: Tensor = measured(lambda _: found, None, rows)
    except EditError as error:
        raise NoNumbers(str(error).replace("The metric", "The target")) from error
    if given.numel() != rows:
        raise OneNumber(
            f"The target gave one number for {number_of(rows, 'row')}: expected one for each, as output.logits[:, -1, 3]."
        )
    return given.reshape(rows)


@dataclass(frozen=True)
class Logit:
    """The logit of one class or token, less that of another if there is one, at a column where there are positions."""

    right: int
    wrong: int | None
    column: int | None

    def __call__(self, output: Any) -> Tensor:
        logits = logits_of(output)
        logits = logits if self.column is None else logits[:, self.column]
        return logits[:, self.right] - (0.0 if self.wrong is None else logits[:, self.wrong])


def target_of(given: Any, run: Run, prompts: Prompts, example: int, tokenizer: Any) -> Target:
    """The target of one example, of which `run` is a run.

    given: one for all examples, or a list with one for each; None for what the model itself puts first.
    """
    given = torch.as_tensor(given) if isinstance(given, np.ndarray) and given.dtype.kind in "iu" else given
    if isinstance(given, list | Tensor) and not (isinstance(given, Tensor) and not given.dim()):
        if len(given) != len(prompts):
            raise AnalyzerError(
                f"target has {number_of(len(given), 'entry', 'entries')} for {number_of(len(prompts), 'example')}: expected "
                "one for all of them, or a list with one for each; a difference is a pair, (right, wrong)."
            )
        given = given[example]
    if isinstance(given, Target):
        return given
    if isinstance(given, Site) or (not isinstance(given, str) and isinstance(getattr(given, "id", None), str)):
        site = given if isinstance(given, Site) else Site(id_of(given))
        return Target(repr(site), lambda value: value.reshape(len(value), -1).squeeze(-1), _one_number(site, run))
    if callable(given):
        metric = in_tokens(given, tokenizer, prompts)
        if isinstance(metric, READY):
            metric = placed(metric, run.output, run.last.frames())
        return Target(type(metric).__name__ if isinstance(metric, READY) else "a function of the output", metric)
    return _of_logits(given, run, prompts, tokenizer)


def check_words(given: Any, model: nn.Module, run: Callable[[], Run]) -> None:
    """Raise for text that names a value of a model, where text as a target is a word.

    run: makes a run of the model, for the IDs that it has.
    """
    for text in filter(None, _texts(given)):
        named = text in dict(model.named_modules())
        if not named and not (any(sign in text for sign in "#:") and text in run().graph) and not is_role(text):
            continue
        place = "the number that is meant" if is_role(text) else f"fmr.Site({text!r}, positions=-1, units=3)"
        raise AnalyzerError(
            f"target={text!r} names a value of {type(model).__name__}, and text as a target is a word. Expected a site of "
            f"one number, as {place}, or for a word the number of its token."
        )


def _texts(given: Any) -> Iterator[str]:
    """What is text in a target, in pairs and lists too."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _texts(one)


def _one_number(site: Site, run: Run) -> Site:
    many = run[site].numel() if site in run else 1
    if many != 1:
        raise AnalyzerError(
            f"The target {site!r} holds {many} numbers: expected one, as .at(positions=-1, units=3), or a function of it "
            "in a model of your own."
        )
    return site


def _of_logits(given: Any, run: Run, prompts: Prompts, tokenizer: Any) -> Target:
    logits = logits_of(run.output)
    column: int | None = None
    if logits.dim() == 1 and len(logits) == 1 and given is None:
        return Target("the output", lambda output: logits_of(output))
    if logits.dim() == 3:
        metric = placed(LogProb(0), run.output, run.last.frames())
        assert isinstance(metric, LogProb)
        column = int(torch.as_tensor(metric.at).reshape(-1)[0]) % logits.shape[1]
    elif logits.dim() != 2:
        raise AnalyzerError(_no_classes(run.output, logits))
    if given is None:
        given = int((logits[0] if column is None else logits[0, column]).argmax())
    pair = given if isinstance(given, tuple) else (given,)
    if len(pair) not in (1, 2):
        raise AnalyzerError(f"target={given!r}: expected {EXPECTED}.")
    kind = "class" if column is None else "token"
    ids = [_number(one, kind, logits.shape[-1], prompts, tokenizer) for one in pair]
    words = [_word(one, kind, tokenizer) for one in ids]
    return Target(" less ".join(words), Logit(ids[0], ids[1] if len(ids) == 2 else None, column))


def _no_classes(output: Any, logits: Tensor) -> str:
    """Why there is no class to be asked for."""
    known = dict(leaves(output))
    several = ", ".join(f"{name} {list(one.shape)}" for name, one in known.items())
    told = f", of {several}" if len(known) > 1 else ""
    name = next((name for name, one in known.items() if one.dim() == 2), None)
    how = f"output[{name!r}][:, 0]" if told and name and isinstance(output, Mapping) else "output[:, 0]"
    single = " A number for each example is asked for by target=None." if logits.dim() == 1 else ""
    return (
        f"The output has shape {list(logits.shape)}, which is no classes (examples, classes) and no tokens (examples, "
        f"positions, tokens){told}. Expected a function of the output as target, as lambda output: "
        f"{how}.{single}"
    )


def _number(given: Any, kind: str, many: int, prompts: Prompts, tokenizer: Any) -> int:
    """The number of a class or of a token."""
    number = whole_number(token_ids(given, tokenizer, prompts) if isinstance(given, str) else given)
    if number is None:
        raise AnalyzerError(f"target={given!r} is no {kind}: expected {EXPECTED}.")
    if not 0 <= number < many:
        raise AnalyzerError(f"There is no {kind} {number}: the output has {many}. Expected one from 0 to {many - 1}.")
    return number


def _word(number: int, kind: str, tokenizer: Any) -> str:
    return f"{kind} {number}" if kind == "class" or tokenizer is None else repr(tokenizer.decode([number]))


def chosen_part(site: Site, value: Tensor, run: Run) -> Tensor:
    """The part of a value that a site means, also of numbers that belong to the value of a run."""
    if not site.selection:
        return value
    found = parts(site, value, run.last.frames())
    if len(found) != 1:
        raise AnalyzerError(f"{site!r} is no one part of {list(value.shape)}: expected a site that one tensor holds.")
    return found[0].of(value)
