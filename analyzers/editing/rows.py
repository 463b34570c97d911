"""Prompts of unequal length as one batch, and what a model says after each."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.protocol import device_of
from fmr.sweeps.metrics import logits_of


def padded(rows: Sequence[Tensor], model: nn.Module) -> dict[str, Any]:
    """Rows of token ids as inputs of a model: padded on the right, where a model that looks back alone never sees it.

    >>> padded([torch.tensor([1, 2]), torch.tensor([3])], model)["attention_mask"]
    tensor([[1, 1],
            [1, 0]])
    """
    device = device_of(model)
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([row, row.new_zeros(length - len(row))]) for row in rows]).to(device)
    inputs = {"input_ids": ids}
    if "attention_mask" in inspect.signature(type(model).forward).parameters:
        lengths = torch.tensor([len(row) for row in rows], device=device)
        inputs["attention_mask"] = (torch.arange(length, device=device) < lengths[:, None]).long()
    return inputs


def log_probs(output: Any, starts: Sequence[int], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of each row, the log-probability of each token of its answer, of which the first is at a start."""
    said = logits_of(output).log_softmax(-1)
    found = []
    for row, (start, answer) in enumerate(zip(starts, answers, strict=True)):
        read = said[row, start - 1 : start - 1 + len(answer)]
        found.append(read.gather(1, torch.tensor(answer, device=read.device)[:, None])[:, 0])
    return found


@torch.no_grad()
def written(model: nn.Module, rows: Sequence[Tensor], length: int, seed: int, among: int = 5) -> list[list[int]]:
    """What a model writes after each row: so many tokens, each drawn from its first few choices.

    >>> len(written(model, [torch.tensor([1, 2, 3])], 4, seed=0)[0])
    4
    """
    draw = torch.Generator().manual_seed(seed)
    texts = [row.clone() for row in rows]
    for _ in range(length):
        logits = logits_of(model(**padded(texts, model)))
        last = torch.stack([logits[n, len(text) - 1] for n, text in enumerate(texts)]).float().cpu()
        best = last.topk(among)
        chosen = best.indices.gather(1, torch.multinomial(best.values.softmax(-1), 1, generator=draw))
        texts = [torch.cat([text, one.to(text)]) for text, one in zip(texts, chosen, strict=True)]
    return [text[len(row) :].tolist() for text, row in zip(texts, rows, strict=True)]


def entropy(tokens: Sequence[int]) -> float:
    """How varied a text is: the entropy of its pairs and triples of tokens in bits, the mean with weights 2/3 and 4/3.

    >>> entropy([7, 7, 7, 7]), round(entropy([1, 2, 3, 4]), 2)
    (0.0, 1.19)

    Source: K. Meng et al., "Locating and editing factual associations in GPT", 2022, section 3.4 (fluency).
    """
    found = []
    for many, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = torch.tensor([tokens[at : at + many] for at in range(len(tokens) - many + 1)])
        _, counts = grams.unique(dim=0, return_counts=True)
        shares = counts / counts.sum()
        found.append(-weight * float((shares * shares.log2()).sum()))
    return sum(found) / 2
