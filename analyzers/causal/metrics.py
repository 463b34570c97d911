"""Metrics with answers as text, and their values example by example."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from analyzers.prompts import Prompts, token_ids
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of
from fmr.runs.run import Run
from fmr.sweeps.metrics import LogitDiff, LogProb, Metric, Probability, measured, placed, why_no_metric
from fmr.sweeps.task import EDITS

_EXPECTED = "expected a function of the model's output, as logit_diff(right, wrong)."


def in_tokens(metric: Metric, tokenizer: Any, given: Prompts) -> Metric:
    """A metric whose answers, behind some prompts, are token ids."""
    if isinstance(metric, LogitDiff):
        right, wrong = (token_ids(one, tokenizer, given) for one in (metric.right, metric.wrong))
        return replace(metric, right=right, wrong=wrong)
    if isinstance(metric, (LogProb, Probability)):
        return replace(metric, token=token_ids(metric.token, tokenizer, given))
    reason = f"metric is {type(metric).__name__}, {_EXPECTED}" if isinstance(metric, EDITS) else why_no_metric(metric)
    if reason is not None:
        raise AnalyzerError(reason)
    return metric


def by_pair(metric: Metric, run: Run, pairs: int) -> Tensor:
    """The metric of a run, one number for each pair."""
    found = measured(placed(metric, run.output, run.last.frames()), run.output, pairs)
    if found.numel() != pairs:
        raise AnalyzerError(
            f"The metric returned one number for {number_of(pairs, 'pair')}, expected one for each, as "
            f"output.logits[:, -1, 3]. Leave "
            f"out the mean: effects are means over pairs already."
        )
    return found.reshape(pairs)


def numbers(values: Tensor, *shape: int) -> Tensor:
    """What a metric gave as plain numbers."""
    return values.detach().double().cpu().reshape(*shape)
