"""What an edit did: the fact, other words for it, other subjects, how the model writes; beside the model before it and a
random change of the same length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.editing.rows import entropy, log_probs, padded, written
from analyzers.editing.update import Update
from analyzers.numbers.embed import Floats, Ints
from analyzers.results import Stored
from analyzers.tracing.facts import fact_of
from fmr.errors import number_of
from fmr.sweeps.metrics import logits_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

STATES = ("before", "edited", "random")
KINDS = ("efficacy", "paraphrase", "neighbourhood")


@dataclass(frozen=True, eq=False)
class EditScores(Stored):
    """The scores of an edit, each in three states of the model: before, edited, and with a random change of the same length.

    >>> scores.rates["before"]["efficacy"], scores.rates["edited"]["efficacy"]
    (0.0, 1.0)
    >>> scores.table()

    prompts and kinds: what was asked; answers: what should follow, the target for the fact and its paraphrases, the old
    answer for neighbours. right: (states, prompts), whether that is the model's first choice. target and old: (states,
    prompts), the probabilities of the target and of the old answer. fluency: by state, the entropy of what it writes, in
    bits; NaN where it wrote nothing.
    """

    edit: str
    prompts: tuple[str, ...]
    kinds: tuple[str, ...]
    answers: tuple[str, ...]
    right: Ints = field(repr=False)
    target: Floats = field(repr=False)
    old: Floats = field(repr=False)
    fluency: Floats
    seed: int

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """By state, the share of prompts with the right first choice, kind by kind, and the fluency."""
        return self._rates(self.right)

    @property
    def compared(self) -> dict[str, dict[str, float]]:
        """The same as in the paper: the share of prompts of which the right answer is likelier than the other one."""
        towards = np.array([kind != "neighbourhood" for kind in self.kinds])
        return self._rates(((self.target > self.old) == towards).astype(np.int64))

    def _rates(self, right: Ints) -> dict[str, dict[str, float]]:
        found = {}
        for number, state in enumerate(STATES):
            own = {kind: [n for n, one in enumerate(self.kinds) if one == kind] for kind in KINDS}
            found[state] = {kind: float(right[number, places].mean()) for kind, places in own.items() if places}
            found[state]["fluency"] = float(self.fluency[number])
        return found

    def table(self) -> DataFrame:
        """One row a prompt and state: its kind, what should follow, whether it does, and both probabilities.

        >>> scores.table().query("state == 'edited'")
        """
        import pandas as pd

        many = len(self.prompts)
        return pd.DataFrame(
            {
                "state": np.repeat(STATES, many),
                "kind": self.kinds * 3,
                "prompt": self.prompts * 3,
                "answer": self.answers * 3,
                "right": self.right.ravel().astype(bool),
                "p_target": self.target.ravel(),
                "p_old": self.old.ravel(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the shares of right first choices, three bars a score; returns the figure.

        >>> scores.plot().savefig("scores.png")
        """
        import matplotlib.pyplot as plt

        from fmr.pictures.heatmap import returned

        given, ax = ax is not None, ax or plt.subplots(figsize=(5, 2.6), layout="constrained")[1]
        kinds = [kind for kind in KINDS if kind in self.kinds]
        for number, (state, colour) in enumerate(zip(STATES, ("#BBBBBB", "#2166AC", "#E0A030"), strict=True)):
            heights = [self.rates[state][kind] for kind in kinds]
            ax.bar(np.arange(len(kinds)) + 0.27 * (number - 1), heights, 0.25, color=colour, label=state)
        ax.set_xticks(range(len(kinds)), kinds)
        ax.set(ylim=(0, 1.05), ylabel="first choice is right")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure = cast("Figure", ax.figure)
        return figure if given else returned(figure)

    def __repr__(self) -> str:
        lines = [f"EditScores of {self.edit}, {number_of(len(self.prompts), 'prompt')}, first choices (seed {self.seed})"]
        for state, rates in self.rates.items():
            told = ", ".join(f"{name} {value:.2f}" for name, value in rates.items() if value == value)
            name = "random change of that length" if state == "random" else state
            lines.append(f"  {name}: {told}")
        return "\n".join(lines)


def scores_of(
    model: nn.Module,
    tokenizer: Any,
    update: Update,
    paraphrases: Sequence[str],
    neighbours: Sequence[str | tuple[str, str]],
    words: int,
    seed: int,
) -> EditScores:
    """Ask all prompts in all three states of the model; the weight is what it was afterwards."""
    weight = update.values.weight(model)
    asked = [(update.prompt, "efficacy", update.answer), *((text, "paraphrase", update.answer) for text in paraphrases)]
    for one in neighbours:
        prompt, answer = one if isinstance(one, tuple) else (one, None)
        asked.append((prompt, "neighbourhood", answer or _first(model, tokenizer, prompt)))
    chance = torch.randn(len(update.delta), generator=torch.Generator().manual_seed(seed)).double()
    chance *= update.delta.norm() / chance.norm()
    rows = [prompt for prompt, kind, _ in asked if kind != "neighbourhood"]
    found, fluency = [], []
    for made in (weight.detach().clone(), update.of(weight), update.of(weight, chance)):
        with holding(weight, made):
            found.append(_asked(model, tokenizer, update.target, asked))
            fluency.append(_fluency(model, tokenizer, rows, words, seed) if words else float("nan"))
    right, target, old = (np.array(values) for values in zip(*found, strict=True))
    return EditScores(
        edit=f"{update.prompt!r} -> {update.target!r}",
        prompts=tuple(prompt for prompt, _, _ in asked),
        kinds=tuple(kind for _, kind, _ in asked),
        answers=tuple(answer if kind == "neighbourhood" else update.target for _, kind, answer in asked),
        right=right,
        target=target,
        old=old,
        fluency=np.array(fluency),
        seed=seed,
    )


@contextmanager
def holding(weight: nn.Parameter, value: Tensor) -> Iterator[None]:
    """Hold a value in a parameter for the block."""
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(value)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@torch.no_grad()
def _first(model: nn.Module, tokenizer: Any, prompt: str) -> str:
    """What the model says first after a prompt."""
    fact = fact_of(prompt, range(1), None, tokenizer)
    text: str = tokenizer.decode([int(logits_of(model(**padded([fact.ids], model)))[0, len(fact.ids) - 1].argmax())])
    return text


@torch.no_grad()
def _asked(
    model: nn.Module, tokenizer: Any, target: str, asked: Sequence[tuple[str, str, str]]
) -> tuple[list[int], list[float], list[float]]:
    """Of each prompt whether the first choice is right, and the probabilities of the target and of the old answer."""
    facts = [fact_of(prompt, range(1), answer, tokenizer) for prompt, _, old in asked for answer in (target, old)]
    output = model(**padded([fact.inputs()["input_ids"][0] for fact in facts], model))
    starts, answers = [len(fact.ids) for fact in facts], [fact.answer for fact in facts]
    shares = [float(one.double().sum().exp()) for one in log_probs(output, starts, answers)]
    choices = [int(logits_of(output)[row, start - 1].argmax()) for row, start in enumerate(starts)]
    wanted = [facts[2 * n + (kind == "neighbourhood")].answer[0] for n, (_, kind, _) in enumerate(asked)]
    return [int(a == b) for a, b in zip(choices[::2], wanted, strict=True)], shares[::2], shares[1::2]


def _fluency(model: nn.Module, tokenizer: Any, prompts: Sequence[str], words: int, seed: int) -> float:
    rows = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return float(np.mean([entropy(text) for text in written(model, rows, words, seed)]))
