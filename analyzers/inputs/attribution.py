"""Which inputs an answer rests on: attribution to tokens, pixels or any value, with how far it is complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fmr
from analyzers.inputs.baselines import baselines_of
from analyzers.inputs.gradients import Found, gradient_shap, input_gradient, integrated, saliency
from analyzers.inputs.perturbed import cells_of, kernel_shap, lime, occlusion
from analyzers.inputs.places import images_of, kind_of, place_of, real_of
from analyzers.inputs.question import Question, one_of
from analyzers.inputs.rescale import deeplift
from analyzers.inputs.result import Attribution
from analyzers.inputs.targets import target_of
from analyzers.prompts import Prompts, prompts
from analyzers.protocol import AnalyzerError, Given, Method, check_counts, check_eval
from fmr.errors import number_of
from fmr.ids import Site
from fmr.nodes import Key
from fmr.runs.run import Run


@dataclass(frozen=True)
class Settings:
    """How much work a method does."""

    steps: int = 64
    most: int = 2048
    within: float = 0.01
    samples: int = 200
    cells: Any = None
    rows: int = 16
    seed: int = 0


class Asked(NamedTuple):
    """One example of which something is asked: the question, its baselines, and the cells of its value."""

    question: Question
    bases: Tensor
    cells: Callable[[], Tensor]
    own: Settings


def _over_bases(asked: Asked, one: Callable[[Tensor], Found]) -> Found:
    """The mean of what is found from each baseline."""
    found = [one(base[None]) for base in asked.bases]
    values = torch.stack([each.values for each in found]).mean(0)
    many = f", mean over {number_of(len(found), 'baseline')}" if len(found) > 1 else ""
    return Found(values, found[0].how + many, tuple(dict.fromkeys(note for each in found for note in each.notes)))


def _ig(asked: Asked) -> Found:
    own = asked.own
    return _over_bases(asked, lambda base: integrated(asked.question, base, own.steps, own.most, own.within, own.rows))


def _occlusion(asked: Asked) -> Found:
    cells = asked.cells()
    return _over_bases(asked, lambda base: occlusion(asked.question, base, cells, asked.own.rows))


def _lime(asked: Asked) -> Found:
    own, cells = asked.own, asked.cells()
    return _over_bases(asked, lambda base: lime(asked.question, base, cells, own.samples, own.seed, own.rows))


def _kernel_shap(asked: Asked) -> Found:
    own, cells = asked.own, asked.cells()
    return _over_bases(asked, lambda base: kernel_shap(asked.question, base, cells, own.samples, own.seed, own.rows))


def _gradient_shap(asked: Asked) -> Found:
    return gradient_shap(asked.question, asked.bases, asked.own.samples, asked.own.seed, asked.own.rows)


GRADIENTS: Mapping[str, Callable[[Asked], Found]] = {
    "ig": _ig,
    "gradient-shap": _gradient_shap,
    "saliency": lambda asked: saliency(asked.question),
    "input-x-gradient": lambda asked: input_gradient(asked.question),
}
"""Methods that need the gradient of the target."""

METHODS: Mapping[str, Callable[[Asked], Found]] = {
    **GRADIENTS,
    "deeplift": lambda asked: _over_bases(asked, lambda base: deeplift(asked.question, base)),
    "occlusion": _occlusion,
    "lime": _lime,
    "kernel-shap": _kernel_shap,
}


class InputAttribution(Method):
    """Find which inputs an answer rests on: tokens, pixels, or the numbers of any value by its ID, path or role.

    >>> answered = analyzers.InputAttribution(model, tokenizer).run("Junel Dunoth grew up in", " Brigost")
    >>> answered.strongest(2)
    ['Junel', 'Dunoth']

    model: any module in eval mode; it is run with other values at one place, by edits, and left as it is. tokenizer: for
    prompts and targets that are text.

    "ig" are integrated gradients (Sundararajan et al. 2017), taken at more points until the sum is the difference of the
    target between input and baseline; "deeplift" the same difference followed back through every operation of the recorded
    graph (Shrikumar et al. 2017). captum does the work of all but "deeplift" and
    "rollout".
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer

    def run(
        self,
        inputs: Given,
        target: Any = None,
        method: str = "ig",
        *,
        at: Key | None = None,
        baseline: Any = "zero",
        steps: int = Settings.steps,
        most: int = Settings.most,
        within: float = Settings.within,
        samples: int = Settings.samples,
        cells: Any = None,
        rows: int = Settings.rows,
        seed: int = 0,
    ) -> Attribution:
        """Attribute a target to what stands at one place.

        >>> analyzers.InputAttribution(model, tokenizer).run("Junel Dunoth grew up in", (" Brigost", " Oranby"), "occlusion")
        Attribution of ...

        inputs: a text or several, a tensor, or arguments by name. target: a class, a token id or a word at the last
        position; a pair for their difference; a site of one number; or a function of the output that gives one number for
        each example. A list has one for each example, None is what the model puts first. method: one of "ig", "deeplift",
        "gradient-shap", "kernel-shap", "lime", "occlusion", "saliency", "input-x-gradient", "rollout". at: the place, an
        ID, a site, the path of a module or a role as "layers[2].resid_post"; by default the embedding of tokens, or the
        first input of floating-point numbers. baseline: "zero", "mean", "blur" (pictures), "padding" (tokens), a tensor of
        the shape of the value or several, or other inputs, over which the mean is taken. steps, most, within: of "ig", how
        many gradients to begin with, at most, and up to which share the sum may be off. samples: of the methods that draw.
        cells: of "occlusion", "lime" and "kernel-shap", how many lie along a side of a picture, or a tensor with the number
        of the cell of each number. rows: how many go through the model at once. seed: of what is drawn.
        """
        check_eval(self.model)
        check_counts(1, steps=steps, most=most, samples=samples, rows=rows)
        if method not in METHODS:
            raise AnalyzerError(f"method={method!r}: expected one of {', '.join(map(repr, METHODS))}.")
        given = prompts(inputs, self.model, self.tokenizer)
        own = Settings(steps, most, within, samples, cells, rows, seed)
        place, found, asked = None, [], []
        for example in range(len(given)):
            one = one_of(given.inputs, example, len(given))
            place = place if place is not None else place_of(at, self.model, one)
            asked.append(self._asked(given, example, one, place, target, baseline, own))
            if method in GRADIENTS:
                asked[-1].question.check_gradient()
            found.append(METHODS[method](asked[-1]))
        assert place is not None
        return self._result(given, place, method, baseline, asked, found)

    def _asked(
        self, given: Prompts, example: int, one: Mapping[str, Any], place: Site, target: Any, baseline: Any, own: Settings
    ) -> Asked:
        run = fmr.run(self.model, keep=[place, *([target] if isinstance(target, Site) else [])], **one)
        value = run[place]
        if not isinstance(value, Tensor):
            raise AnalyzerError(f"{place!r} holds a {type(value).__name__}, expected one tensor: name one of it, as 'h.3:0'.")
        question = Question(self.model, one, place, target_of(target, run, given, example, self.tokenizer), value)
        bases = baselines_of(baseline, question.value, self._reader(place), lambda: self._padded(one, place))
        question.check_rows(bases[:1])
        return Asked(question, bases, lambda: cells_of(own.cells, question.value, kind_of(question.value, given)), own)

    def _reader(self, place: Site) -> Callable[[Any], Tensor]:
        def read(inputs: Any) -> Tensor:
            found = prompts(inputs, self.model, self.tokenizer)
            return torch.cat([self._at(one_of(found.inputs, n, len(found)), place) for n in range(len(found))])

        return read

    def _at(self, one: Mapping[str, Any], place: Site) -> Tensor:
        run: Run = fmr.run(self.model, keep=[place], stop=True, **one)
        return run[place]

    def _padded(self, one: Mapping[str, Any], place: Site) -> Tensor:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        ids = one.get("input_ids")
        if pad is None or not isinstance(ids, Tensor):
            raise AnalyzerError(
                "baseline='padding' puts the padding token in every place, and there is "
                f"{'no tokenizer with one' if pad is None else 'no input of token ids'}. Take baseline='zero' or 'mean', or "
                "values of your own."
            )
        return self._at({**one, "input_ids": torch.full_like(ids, pad)}, place)

    def _result(
        self, given: Prompts, place: Site, method: str, baseline: Any, asked: list[Asked], found: list[Found]
    ) -> Attribution:
        questions = [one.question for one in asked]
        values = torch.cat([one.values.detach().float().cpu() for one in found])
        with torch.no_grad():
            output = torch.cat([one.question(one.question.value) for one in asked]).double().cpu()
            base = torch.stack([torch.cat([one.question(row[None]) for row in one.bases]).mean() for one in asked])
        notes = [note for one in found for note in one.notes]
        notes += [f"rows were run one by one: {one.why}" for one in questions if one.why]
        notes += ["the target is the same at input and baseline: there is nothing to attribute"] * bool(
            (output == base.double().cpu()).any()
        )
        kind = kind_of(questions[0].value, given)
        tokens, real = real_of(given, values, kind)
        return Attribution(
            method=method,
            target=tuple(one.target.words for one in questions),
            place=repr(place),
            kind=kind,
            baseline=baseline if isinstance(baseline, str) and len(baseline) < 8 else "given",
            values=values,
            output=output,
            base=base.double().cpu(),
            tokens=tokens,
            real=real,
            images=images_of(given),
            how=found[0].how,
            notes=tuple(dict.fromkeys(notes)),
        )
