"""The methods by name: each a function of one question, from its baselines, and the settings that it goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from analyzers.inputs.gradients import Found, gradient_shap, input_gradient, integrated, saliency
from analyzers.inputs.opening import Asked, Settings
from analyzers.inputs.perturbed import kernel_shap, lime, occlusion
from analyzers.inputs.rescale import deeplift
from analyzers.inputs.reveal import BothParts
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of

Way = Callable[[Asked], Found]


def _over_bases(asked: Asked, one: Callable[[Tensor], Found]) -> Found:
    """The mean of what is found from each baseline."""
    found = [one(base[None]) for base in asked.bases]
    values = torch.stack([each.values for each in found]).mean(0)
    many = f", mean over {number_of(len(found), 'baseline')}" if len(found) > 1 else ""
    return Found(values, found[0].how + many, tuple(dict.fromkeys(note for each in found for note in each.notes)))


def _ig(asked: Asked) -> Found:
    asked.question.check_gradient()
    own, (at, base) = asked.own, asked.ends()
    enough = own.within * abs(float(at - base))
    return _over_bases(asked, lambda base: integrated(asked.question, base, own.steps, own.most, enough, own.rows))


def _gradient_shap(asked: Asked) -> Found:
    asked.question.check_gradient()
    return gradient_shap(asked.question, asked.bases, asked.own.samples, asked.own.seed, asked.own.rows)


def _occlusion(asked: Asked) -> Found:
    cells = asked.cells()
    return _over_bases(asked, lambda base: occlusion(asked.question, base, cells, asked.own.rows))


def _lime(asked: Asked) -> Found:
    own, cells = asked.own, asked.cells()
    return _over_bases(asked, lambda base: lime(asked.question, base, cells, own.samples, own.seed, own.rows))


def _kernel_shap(asked: Asked) -> Found:
    own, cells = asked.own, asked.cells()
    return _over_bases(asked, lambda base: kernel_shap(asked.question, base, cells, own.samples, own.seed, own.rows))


METHODS: Mapping[str, Way] = {
    "ig": _ig,
    "gradient-shap": _gradient_shap,
    "saliency": lambda asked: saliency(asked.question),
    "input-x-gradient": lambda asked: input_gradient(asked.question),
    "deeplift": lambda asked: _over_bases(asked, lambda base: deeplift(asked.question, base)),
    "deeplift-reveal-cancel": lambda asked: _over_bases(asked, lambda base: deeplift(asked.question, base, BothParts)),
    "occlusion": _occlusion,
    "lime": _lime,
    "kernel-shap": _kernel_shap,
}

OWN: Mapping[str, Sequence[str]] = {
    "ig": ("steps", "most", "within"),
    "gradient-shap": ("samples",),
    "occlusion": ("cells",),
    "lime": ("samples", "cells"),
    "kernel-shap": ("samples", "cells"),
}
"""The settings that some methods alone go by."""

SHARED = ("rows", "seed", "progress")
"""Settings that change nothing where there is nothing to run, to draw or to show."""


FROM_NONE = ("saliency", "input-x-gradient", "rollout")
"""Methods that go from no baseline of the user's."""


def check_baseline(method: str, baseline: object) -> None:
    """Raise for a baseline that was given to a method which goes from none."""
    if method in FROM_NONE and not (isinstance(baseline, str) and baseline == "zero"):
        what = "multiplies attention patterns" if method == "rollout" else "is the gradient at the input"
        raise AnalyzerError(f"{method!r} {what} and goes from no baseline. Leave baseline= out.")


def check_settings(method: str, own: Settings, more: Sequence[str] = ()) -> None:
    """Raise for a setting that was given and that a method does not go by; `more` are those that are read besides."""
    known = (*OWN.get(method, ()), *more, *SHARED)
    given = [one.name for one in fields(own) if _differs(getattr(own, one.name), one.default)]
    if strange := [name for name in given if name not in known]:
        raise AnalyzerError(f"{method!r} has no setting {', '.join(strange)}: expected some of {', '.join(known)}.")


def _differs(given: object, default: object) -> bool:
    return given is not None if default is None else given != default
