"""Which inputs an answer rests on: attribution to tokens, pixels or any value, with how far it is to be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import fmr
from analyzers.inputs.baselines import NAMED, taken
from analyzers.inputs.curves import FINER, Curves, as_value, curves_of, together
from analyzers.inputs.gradients import Found
from analyzers.inputs.methods import METHODS, check_baseline, check_settings
from analyzers.inputs.opening import Asked, Opening, Settings
from analyzers.inputs.places import assumed_layout, images_of, strange_layout, tokens_of
from analyzers.inputs.randomised import layers_from_the_top, randomised
from analyzers.inputs.result import UNSIGNED, Attribution
from analyzers.inputs.rollout import rolled
from analyzers.inputs.sanity import Sanity, rank_correlation
from analyzers.protocol import AnalyzerError, Given, Method, check_counts, check_eval
from fmr.errors import number_of
from fmr.ids import Site
from fmr.nodes import Key
from fmr.sweeps.bars import bar, hidden


class InputAttribution(Method):
    """Find which inputs an answer rests on: tokens, pixels, or the numbers of any value by its ID, path or role.

    >>> analyzers.InputAttribution(model, tokenizer).run("Junel Dunoth grew up in", "Brigost").strongest(3)
    ['in', 'Dunoth', 'Junel']

    model: any module in eval mode; it is run with other values at one place, by edits, and left as it is. tokenizer: for
    prompts and targets that are text.

    "ig" are integrated gradients (Sundararajan et al. 2017), taken at more points until their sum is the difference of the
    target between input and baseline; what is missed on the way of one number and of another, and cancels in the sum, this
    test does not see. "deeplift" is that difference followed back through every operation of the recorded
    graph by the rescale rule, "deeplift-reveal-cancel" by the other rule of the same authors (Shrikumar et al. 2017): what
    raises and what lowers an activation (relu, gelu, silu, tanh, clamp, abs, ...) is followed back apart, so that causes
    that hide each other are seen. Sums split their terms by sign for it; maxima, norms, softmaxes, powers, exponentials and
    choices by a comparison work on the whole difference by either rule. "kernel-shap" takes all sets of cells where they
    are no more than `samples`, and else says its standard error. "saliency" is the gradient, whose length is the score of a
    token or pixel. "rollout" follows attention patterns (Abnar and Zuidema 2020). captum does the work of the others, and
    takes the gradients of "ig".
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
        progress: bool | None = None,
    ) -> Attribution:
        """Attribute a target to what stands at one place.

        >>> asking = analyzers.InputAttribution(model, tokenizer)
        >>> asking.run("Junel Dunoth grew up in", ("Brigost", "Oranby"), "deeplift", baseline="padding").complete
        True

        inputs: a text or several, a tensor or array, or arguments by name. target: a class, a token id or a word at the last
        position; a pair for their difference; a site of one number; or a function of the output that gives one number for
        each example. A list has one for each example, None is what the model puts first, or its one number. method: "ig",
        "deeplift", "deeplift-reveal-cancel", "gradient-shap", "kernel-shap", "lime", "occlusion", "saliency",
        "input-x-gradient" or "rollout". at: the place, an ID, a site, the path of a module or a role as
        "layers[2].resid_post"; by default where `input_ids` are looked up, or the first input of floating-point numbers;
        what lies otherwise than (examples, positions, units) or (examples, colours, height, width) says so, as in
        fmr.Site("input:x", layout=("examples", "units", "positions")), and has a score for each number. baseline: "zero",
        "mean", "blur" (pictures), "padding" (tokens), a number, a tensor or array of the shape of the value, several, or
        other inputs, over which the mean is taken; the gradient at the input and rollouts take none. steps, most, within: of
        "ig", how many gradients to begin with, at most, and up to which share the sum may be off. samples: of the methods
        that draw. cells: of "occlusion", "lime" and "kernel-shap", how many lie along a side of a picture, or a tensor with
        the number of the cell of each number. rows: how many go through the model at once. seed: of what is drawn. progress:
        show a bar over the examples; None shows it on a terminal only.
        """
        check_eval(self.model)
        own = Settings(steps, most, within, samples, cells, rows, seed, progress)
        check_settings(_known(method), own)
        check_baseline(method, baseline)
        return self._run(Opening(self.model, self.tokenizer, inputs), target, method, at, baseline, own)[0]

    def sanity(
        self, inputs: Given, target: Any = None, method: str = "ig", *, stages: int = 8, seed: int = 0, **settings: Any
    ) -> Sanity:
        """Make weights random from the last layer to the first, and compare attributions with those of the trained model.

        >>> asking = analyzers.InputAttribution(model, tokenizer)
        >>> sanity = asking.sanity("Junel Dunoth grew up in", "Brigost", "input-x-gradient", stages=2)
        >>> sanity.plot(), float(sanity.signed[0])
        (<Figure ...>, 1.0)

        stages: in how many steps, equally many layers each. seed: of the order of the numbers of each parameter. settings:
        as for `run`. The weights are put back bit by bit, whatever happens.
        """
        check_counts(1, stages=stages)
        check_eval(self.model)
        settings = {"at": None, "baseline": "zero", **settings}
        at, baseline, own = settings.pop("at"), settings.pop("baseline"), _settings(seed, settings)
        check_settings(_known(method), own)
        check_baseline(method, baseline)
        opening = Opening(self.model, self.tokenizer, inputs)
        run = opening.run(0)
        layers = layers_from_the_top(self.model, run.graph)
        counts = np.unique(np.linspace(0, len(layers), min(stages, len(layers)) + 1).round().astype(int))
        found: list[Attribution] = []
        for count in tqdm(counts.tolist(), "sanity", unit="stage", disable=hidden(own.progress)):
            random = [one for _, several in layers[:count] for one in several]
            with torch.inference_mode(False), randomised(random, seed):
                now, asked = self._run(opening, target, method, at, baseline, replace(own, progress=False))
            found.append(now)
            target = [one.question.target for one in asked]  # what a model puts first changes with its weights
            at = at if method == "rollout" else asked[0].question.place
        scores = [_counted(one) for one in found]
        signed, sizes = _correlations(scores), _correlations([[each.abs() for each in one] for one in scores])
        return Sanity(
            method=method,
            target=found[0].target,
            layers=("none", *(layers[count - 1][0] or "(root)" for count in counts[1:].tolist())),
            randomised=counts,
            signed=signed,
            sizes=sizes,
            outputs=np.array([float(one.output[0]) for one in found]),
            chance=float(np.mean([float(one.numel() - 1 or 1) ** -0.5 for one in scores[0]])),
        )

    def curves(
        self,
        inputs: Given,
        target: Any = None,
        method: str | Attribution = "ig",
        *,
        points: int = 16,
        draws: int = 20,
        seed: int = 0,
        at: Key | None = None,
        baseline: Any = "zero",
        **settings: Any,
    ) -> Curves:
        """Take cells away in the order of their scores, and put them into the baseline in that order, beside random orders.

        >>> asking = analyzers.InputAttribution(model, tokenizer)
        >>> curves = asking.curves("Junel Dunoth grew up in", "Brigost", "deeplift", baseline="padding", draws=5)
        >>> curves.areas()["insertion"] > curves.areas()["random insertion"]
        array([ True])

        method: by name, or what `run` found at the same place. points: how many shares of the cells are taken. draws: how
        many random orders. seed: of these. at, baseline, settings: as for `run`; what is taken away becomes the (first)
        baseline. Cells are tokens, or those of a picture, 14 along each side.
        """
        check_counts(2, points=points)
        check_counts(1, draws=draws)
        check_eval(self.model)
        own = _settings(seed, settings)
        check_settings("an attribution" if isinstance(method, Attribution) else _known(method), own, ["cells"])
        opening = Opening(self.model, self.tokenizer, inputs)
        if isinstance(method, Attribution) or method == "rollout":
            found = method if isinstance(method, Attribution) else self._run(opening, target, method, None, "zero", own)[0]
            place = opening.place(at)
            asked = [opening.asked(n, place, target, baseline, own) for n in range(len(opening))]
            _check_same(found, asked)
        else:
            found, asked = self._run(opening, target, method, at, baseline, own)
        scores = _fitting(found, asked)
        signed = found.method not in UNSIGNED
        several = [curves_of(one, scores[n], signed, points, draws) for n, one in enumerate(asked)]
        shares, every = together(several)
        words = tuple(one.question.target.words for one in asked)
        cells = max(int(one.cells(FINER).max()) + 1 for one in asked)
        own_order, others = every[:, 0], every[:, 1:]
        return Curves(found.method, words, cells, shares, own_order[:, 0], own_order[:, 1], others[:, :, 0], others[:, :, 1])

    def _run(
        self, opening: Opening, target: Any, method: Any, at: Key | None, baseline: Any, own: Settings
    ) -> tuple[Attribution, list[Asked]]:
        """An attribution, with what was asked of each example; gradients are taken in inference mode, too."""
        with torch.inference_mode(False):
            if method == "rollout":
                return self._rollout(opening, target, at, baseline, own)
            return self._one_by_one(opening, target, method, at, baseline, own)

    def _one_by_one(
        self, opening: Opening, target: Any, method: Any, at: Key | None, baseline: Any, own: Settings
    ) -> tuple[Attribution, list[Asked]]:
        baseline = taken(baseline)
        if isinstance(baseline, Tensor) and baseline.dim() and len(opening) == len(baseline) > 1:
            raise AnalyzerError(
                f"baseline has {len(baseline)} rows, and so many are the examples: each would be held against the mean over "
                "all. Expected one row of the shape of the value, baseline[:1], or one example at a time with its own."
            )
        place, asked, found = opening.place(at), [], []
        for example in bar(range(len(opening)), f"attributing, {method}", own.progress):
            asked.append(opening.asked(example, place, target, baseline, own))
            found.append(METHODS[_known(method)](asked[-1]))
        name = baseline if isinstance(baseline, str) and baseline in (*NAMED, "padding") else "given"
        return _result(opening, place, method, name, asked, found), asked

    def _rollout(
        self, opening: Opening, target: Any, at: Any, baseline: Any, own: Settings
    ) -> tuple[Attribution, list[Asked]]:
        if at is not None:
            raise AnalyzerError(f"at={at!r}: a rollout goes from the end of the stream to its beginning. Leave at= out.")
        asked, found = [], []
        for example in bar(range(len(opening)), "attributing, rollout", own.progress):
            run = opening.run(example)
            structure = fmr.locate(run)
            if not structure.layers or (end := structure.layers[-1].resid_post) is None:
                raise AnalyzerError(f"fmr.locate found no layers in {structure.model}, along which a rollout goes.")
            asked.append(opening.asked(example, Site(end.id), target, "zero", own))
            many = number_of(len(structure.attention), "attention")
            found.append(Found(rolled(structure, run, asked[-1].question), f"through {many}"))
        return _result(opening, asked[0].question.place, "rollout", "none", asked, found), asked


def _settings(seed: int, given: dict[str, Any]) -> Settings:
    known = [one.name for one in fields(Settings)]
    strange = [name for name in given if name not in known]
    if strange:
        raise AnalyzerError(f"There is no setting {', '.join(strange)}: expected some of {', '.join(known)}.")
    return Settings(**given, seed=seed)


def _known(method: Any) -> str:
    if not isinstance(method, str) or method not in (*METHODS, "rollout"):
        told = repr(method) if isinstance(method, str) else f"a {type(method).__name__}"
        raise AnalyzerError(f"method={told}: expected one of {', '.join(map(repr, (*METHODS, 'rollout')))}.")
    return str(method)


def _result(
    opening: Opening, place: Site, method: str, baseline: str, asked: Sequence[Asked], found: Sequence[Found]
) -> Attribution:
    questions = [one.question for one in asked]
    values = torch.cat([one.values.detach().to("cpu", questions[0].precision) for one in found])
    ends = [one.ends() for one in asked]
    notes = [note for one in found for note in one.notes]
    notes += [f"rows were run one by one: {one.why}" for one in questions if one.why]
    if method != "rollout" and (strange := strange_layout(place, questions[0].value, asked[0].kind)):
        notes.append(strange)
    if method != "rollout" and any(at == base for at, base in ends):
        notes.append("the target is the same at input and baseline, so that there is nothing to attribute")
    kind = asked[0].kind
    if method != "rollout" and (assumed := assumed_layout(place, questions[0].value, kind, questions[0].inputs)):
        notes.append(assumed)
    if method == "rollout":
        kind = "image" if values.dim() == 3 else "tokens"
    real = torch.stack([one.real.flatten() if kind == "tokens" else one.real.flatten()[:0] for one in asked])
    return Attribution(
        method=method,
        target=tuple(one.target.words for one in questions),
        place=repr(place),
        kind=kind,
        baseline=baseline,
        values=values,
        output=torch.stack([at for at, _ in ends]),
        base=torch.stack([base for _, base in ends]),
        tokens=tokens_of(opening.given, real) if kind == "tokens" else (),
        real=real,
        images=images_of(opening.given),
        how=found[0].how,
        notes=tuple(dict.fromkeys(notes)),
        rounding=questions[0].rounding,
    )


def _counted(found: Attribution) -> list[Tensor]:
    """The scores of each example, padding left out."""
    if found.kind != "tokens":
        return list(found.scores)
    return [scores[real] for scores, real in zip(found.scores, found.real, strict=True)]


def _correlations(scores: Sequence[Sequence[Tensor]]) -> Any:
    """The rank correlation of each of several scores with the first, the mean over examples."""
    first, *_ = scores
    return np.array([np.mean([rank_correlation(a, b) for a, b in zip(first, one, strict=True)]) for one in scores])


def _check_same(found: Attribution, asked: Sequence[Asked]) -> None:
    """Raise for an attribution of another target than is asked for, or to another place."""
    words, place = tuple(one.question.target.words for one in asked), repr(asked[0].question.place)
    if len(words) == len(found.target) and words != found.target:
        here = next(n for n, (own, other) in enumerate(zip(words, found.target, strict=True)) if own != other)
        raise AnalyzerError(
            f"method is an attribution of {found.target[here]}, and the target of example {here} is {words[here]}. Expected "
            "the same: target= as it was given to run."
        )
    if found.method != "rollout" and found.place != place:
        raise AnalyzerError(f"method is an attribution to {found.place}, and the place is {place}. Expected the same: at=.")


def _fitting(found: Attribution, asked: Sequence[Asked]) -> list[Tensor]:
    """The numbers of an attribution as they lie on the values of these examples, of which it must be."""
    values = [one.question.value for one in asked]
    numbers = found.scores if found.method in UNSIGNED else found.values
    laid = [as_value(given, value) for given, value in zip(numbers, values, strict=False)]
    known = [one for one in laid if one is not None]
    if len(found) != len(asked) or len(known) != len(asked):
        raise AnalyzerError(
            f"method is {found.method!r} with numbers of shape {list(found.values.shape)}, and the value at "
            f"{asked[0].question.place!r} is {[len(asked), *values[0].shape[1:]]}. Expected what run found for these inputs "
            "at this place."
        )
    return known
