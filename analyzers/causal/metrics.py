"""Metrics with answers as text, and their values example by example."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from analyzers.prompts import token_ids
from analyzers.protocol import AnalyzerError
from fmr.sweeps.metrics import LogitDiff, LogProb, Metric, Probability


def in_tokens(metric: Metric, tokenizer: Any) -> Metric:
    """A metric whose answers are token ids."""
    if isinstance(metric, LogitDiff):
        return replace(metric, right=token_ids(metric.right, tokenizer), wrong=token_ids(metric.wrong, tokenizer))
    if isinstance(metric, (LogProb, Probability)):
        return replace(metric, token=token_ids(metric.token, tokenizer))
    if not callable(metric):
        raise AnalyzerError(
            f"metric is {type(metric).__name__}, expected a function of the model's output, as logit_diff(right, wrong)."
        )
    return metric


def by_example(values: Any, examples: int) -> Tensor:
    """What a metric gave, (..., examples); one number for all of them is each one's."""
    found = torch.as_tensor(values).detach().double().cpu()
    if found.dim() and found.shape[-1] == examples:
        return found
    return (found[..., 0] if found.dim() and found.shape[-1] == 1 else found)[..., None].expand(*found.shape[:1], examples)
