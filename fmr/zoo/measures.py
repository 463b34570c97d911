"""How well a model of the zoo does what its card says: accuracies on fresh, seeded data.

>>> from fmr import zoo
>>> model, tokenizer = zoo.load("facts")
>>> zoo.measure("facts", model, tokenizer, seed=1).keys()
dict_keys(['facts', 'paraphrases', 'induction', 'ioi'])
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmr.errors import ZooError, nearest
from fmr.zoo.tasks import digits, equality, features, sequences, toys
from fmr.zoo.world import facts, ioi, repeats

ROWS = 256
LENGTHS = (6, 12, 20)
"""Of the random sequences that induction is measured on: words before the repetition."""


def measure(name: str, model: nn.Module, tokenizer: Any = None, seed: int = 0) -> dict[str, float]:
    """The accuracies that a card reports, measured anew.

    name: a model that was trained here. model, tokenizer: as `load` gives them. seed: of the data, where it is drawn; a
    fact is a fact, whatever the seed.
    """
    if name not in MEASURES:
        raise ZooError(f"The zoo has no measure for {name!r}. It has: {', '.join(MEASURES)}.{nearest(name, MEASURES)}")
    with torch.no_grad():
        return {key: round(value, 4) for key, value in MEASURES[name](model, tokenizer, seed).items()}


def correct(model: nn.Module, tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """For each (prompt, answer), whether the model's first choice after the prompt is the answer.

    >>> zoo.correct(model, tokenizer, [(fact.prompt, fact.answer) for fact in world.facts()[:3]])
    [True, True, True]
    """
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in asked]
    answers = [tokenizer.convert_tokens_to_ids(answer) for _, answer in asked]
    by_length: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        by_length[len(prompt)].append(row)
    right = [False] * len(asked)
    for rows in by_length.values():
        for start in range(0, len(rows), ROWS):
            here = rows[start : start + ROWS]
            chosen = model(torch.tensor([prompts[row] for row in here])).logits[:, -1].argmax(-1)
            for row, choice in zip(here, chosen.tolist(), strict=True):
                right[row] = choice == answers[row]
    return right


def _language(model: nn.Module, tokenizer: Any, seed: int) -> dict[str, float]:
    def share(asked: Sequence[tuple[str, str]]) -> float:
        right = correct(model, tokenizer, asked)
        return sum(right) / len(right)

    return {
        "facts": share([(fact.prompt, fact.answer) for fact in facts()]),
        "paraphrases": share([(fact.prompt, fact.answer) for fact in facts(taught=False)]),
        "induction": sum(_induction(model, tokenizer, length, seed) for length in LENGTHS) / len(LENGTHS),
        "ioi": share([(gift.prompt, gift.answer) for gift in ioi(500, seed)]),
    }


def _induction(model: nn.Module, tokenizer: Any, length: int, seed: int) -> float:
    """Of the words of the second time, without the first of them, how many are the model's first choice."""
    ids = tokenizer(repeats(100, length, seed), return_tensors="pt")["input_ids"]
    first = ids.shape[1] - length + 1
    return _accuracy(model(ids).logits[:, first - 1 : -1], ids[:, first:])


def _equality(model: nn.Module, tokenizer: Any, seed: int) -> dict[str, float]:
    task = equality(4000, seed)
    return {"accuracy": _accuracy(model(task.inputs), task.labels)}


def _digits(model: nn.Module, tokenizer: Any, seed: int) -> dict[str, float]:
    task = digits()
    return {split: _accuracy(model(of.inputs), of.labels) for split, of in zip(task._fields, task, strict=True)}


def _sequences(model: nn.Module, tokenizer: Any, seed: int) -> dict[str, float]:
    task = sequences(4000, seed)
    return {"accuracy": _accuracy(model(task.inputs), task.labels)}


def _superposed(name: str) -> Callable[[nn.Module, Any, int], dict[str, float]]:
    """Of toy models, how much of the weighted squares of their inputs they give back, where features are always there and
    where they are rarest."""

    def measured(model: nn.Module, tokenizer: Any, seed: int) -> dict[str, float]:
        given = toys(name)
        inputs = features(given, 4_000_000 // given.importance.numel(), seed)
        missed, whole = ((one.square() * given.importance).sum((0, 2)) for one in (inputs - model(inputs), inputs))
        order = given.shares.argsort(descending=True, stable=True)
        back = 1 - (missed / whole)[order]
        ends = len(back) // len(given.shares.unique())
        return {"always there": float(back[:ends].mean()), "rarest": float(back[-ends:].mean())}

    return measured


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean())


MEASURES: dict[str, Callable[[nn.Module, Any, int], dict[str, float]]] = {
    "facts": _language,
    "equality-mlp": _equality,
    "digits-mlp": _digits,
    "digits-cnn": _digits,
    "gru": _sequences,
    **{name: _superposed(name) for name in ("superposition", "superposition-geometry", "superposition-phases")},
}
