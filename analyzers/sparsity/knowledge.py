"""Knowledge probes: true completions of prompts against false ones, by log-probability."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyzers.editing.rows import padded
from analyzers.protocol import AnalyzerError, Method, check_eval
from analyzers.sparsity.known import Knowledge
from analyzers.tracing.facts import fact_of
from fmr.errors import whole_number
from fmr.sweeps.bars import hidden
from fmr.sweeps.metrics import logits_of

_ROWS = 32
"""How many texts go at once."""


class _Asked(NamedTuple):
    """A prompt with its true completion, false ones (None for those of other facts), and what it is about."""

    prompt: str
    answer: str
    false: tuple[str, ...] | None
    relation: str


class KnowledgeProbe(Method):
    """Whether a model gives true completions more probability than false ones, and is as often right as it is sure.

    >>> probe = analyzers.KnowledgeProbe(model, tokenizer)
    >>> probe.run([("Junel Dunoth grew up in", "Brigost", "Oranby"), ("Oskus Stridling speaks", "Runic", ["Lomish"])],
    ...           progress=False).right
    array([1., ...])

    model: any module with logits of the next token that looks back alone, in eval mode. The probability of a completion is
    that of all its tokens, one after the other, among the completions that were given. The null asks each prompt for the
    completions of another fact of its relation but its own true one: what is true there is false here, so that accuracy is
    that of chance, and a model that is sure is wrong.

    Source: F. Petroni et al., "Language models as knowledge bases?", 2019.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def run(
        self, facts: Sequence[Any], false: int | None = None, *, seed: int = 0, progress: bool | None = None
    ) -> Knowledge:
        """Ask for each fact.

        >>> analyzers.KnowledgeProbe(model, tokenizer).run(world.facts()[:96:3], false=3, progress=False).options
        array([4, 4, ...])

        facts: prompt, true completion and false ones, one or several, as tuples; or what has a `prompt`, an `answer` and a
        `relation` by name, whose false completions are the answers of other facts of the relation. false: how many of those
        are drawn, None for all. seed: of the draw and the null. progress: show a bar; None shows it on a terminal only.
        """
        check_eval(self.model)
        if self.tokenizer is None:
            raise AnalyzerError("tokenizer=None: facts are text. Expected KnowledgeProbe(model, tokenizer).")
        if false is not None and (whole_number(false) is None or false < 1):
            raise AnalyzerError(f"false={false!r}: expected how many false completions are drawn, 1 or more, or None.")
        draw, asked = random.Random(f"knowledge {seed}"), [_asked(one) for one in facts]
        if len(asked) < 2:
            raise AnalyzerError(
                f"There are {len(asked)} facts: expected two or more, so that their objects can be exchanged."
            )
        options = [_options(one, asked, false, draw) for one in asked]
        other = _exchanged(asked, draw)
        rows = [[one.prompt, *several] for one, several in zip(asked, options, strict=True)]
        rows += [[one.prompt, *_untrue(options[at], one)] for one, at in zip(asked, other, strict=True)]
        told = self._log_probs(rows, progress)
        found, null = _measured(told[: len(asked)]), _measured(told[len(asked) :])
        said = [several[int(one.argmax())] for several, one in zip(options, told, strict=False)]
        return Knowledge(
            model=type(self.model).__name__,
            prompts=tuple(one.prompt for one in asked),
            answers=tuple(one.answer for one in asked),
            said=tuple(said),
            relations=tuple(one.relation for one in asked),
            options=np.array([len(several) for several in options]),
            **found,
            **{f"{name}_null": value for name, value in null.items() if name != "p_true"},
            seed=seed,
        )

    @torch.no_grad()
    def _log_probs(self, rows: list[list[str]], progress: bool | None) -> list[Tensor]:
        """For each prompt the log-probability of each of its completions; what is read at one text is read once."""
        cells = [
            [
                (tuple(fact.ids.tolist()), fact.answer)
                for fact in (fact_of(row[0], [0], one, self.tokenizer) for one in row[1:])
            ]
            for row in rows
        ]
        texts = dict.fromkeys(ids + answer[:-1] for row in cells for ids, answer in row)
        _check_looks_back(self.model, max(texts, key=len))
        wanted: dict[tuple[int, ...], set[tuple[int, tuple[int, ...]]]] = {text: set() for text in texts}
        for ids, answer in (cell for row in cells for cell in row):
            wanted[ids + answer[:-1]].add((len(ids), answer))
        known: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        every = sorted(texts, key=len)
        starts = range(0, len(every), _ROWS)
        for start in tqdm(starts, desc="KnowledgeProbe", unit="batch", disable=hidden(progress)):
            some = every[start : start + _ROWS]
            logits = logits_of(self.model(**padded([torch.tensor(text) for text in some], self.model)))
            for row, text in zip(logits, some, strict=True):
                for first, answer in wanted[text]:
                    said = row[first - 1 : first - 1 + len(answer)].double().log_softmax(-1)
                    chosen = torch.tensor(answer, device=said.device)[:, None]
                    known[text[:first], answer] = said.gather(1, chosen).sum().cpu()
        return [torch.stack([known[cell] for cell in row]) for row in cells]


def _check_looks_back(model: nn.Module, text: tuple[int, ...]) -> None:
    """Raise for a model whose logits change with a later token: behind a completion stands padding, or another one."""
    ids = torch.tensor(text)
    other = ids.clone()
    other[-1] = ids[0] if ids[-1] != ids[0] else ids[0] + 1
    one, changed = logits_of(model(**padded([ids, other], model)))[:, :-1].double()
    if not torch.allclose(one, changed, rtol=1e-3, atol=1e-3 * float(one.abs().max()) if one.numel() else 0.0):
        raise AnalyzerError(
            f"{type(model).__name__} looks ahead: its logits change with a later token. Expected a model that predicts the "
            "next token from those before it."
        )


def _measured(told: Sequence[Tensor]) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """What log-probabilities tell of each fact, whose true completion comes first."""
    shares = [one.softmax(0) for one in told]
    return {
        "gap": np.array([float(one[0] - one[1:].max()) for one in told]),
        "p_true": np.array([float(one[0]) for one in shares]),
        "sure": np.array([float(one.max()) for one in shares]),
        "right": np.array([float(one.argmax() == 0) for one in told]),
        "distance": np.array([float((one[0] - 1).square() + one[1:].square().sum()) for one in shares]),
    }


def _asked(given: Any) -> _Asked:
    named = given._asdict() if hasattr(given, "_asdict") else given
    if isinstance(named, Mapping) and {"prompt", "answer"} <= named.keys():
        return _Asked(str(named["prompt"]), str(named["answer"]), None, str(named.get("relation", "")))
    if isinstance(given, tuple) and len(given) == 3 and all(isinstance(one, str) for one in given[:2]):
        false = (given[2],) if isinstance(given[2], str) else tuple(given[2])
        if false and all(isinstance(one, str) and one != given[1] for one in false):
            return _Asked(given[0], given[1], false, "")
    raise AnalyzerError(
        f"A fact is {str(given)[:80]!r}, expected prompt, true completion and false ones as a tuple, or `prompt`, "
        "`answer` and `relation` by name."
    )


def _options(one: _Asked, asked: Sequence[_Asked], false: int | None, draw: random.Random) -> tuple[str, ...]:
    """The completions of a fact, the true one first."""
    if one.false is not None:
        return (one.answer, *one.false)
    others = [other.answer for other in asked if other.relation == one.relation and other.answer != one.answer]
    known = sorted(set(others) - {other.answer for other in asked if other.prompt == one.prompt})
    if not known:
        raise AnalyzerError(f"{one.prompt!r} has no false completion: no other fact of its relation has another answer.")
    return (one.answer, *(known if false is None else draw.sample(known, min(false, len(known)))))


def _untrue(options: tuple[str, ...], one: _Asked) -> tuple[str, ...]:
    """The completions of another fact without the one that is true here; with it where that leaves no choice."""
    kept = tuple(option for option in options if option != one.answer)
    return kept if len(kept) > 1 else options


def _exchanged(asked: Sequence[_Asked], draw: random.Random) -> list[int]:
    """For each fact another one of its relation with another answer, at random; any other where there is none."""
    found = []
    for n, one in enumerate(asked):
        alike = [m for m, other in enumerate(asked) if other.relation == one.relation and other.answer != one.answer]
        found.append(draw.choice(alike or [m for m in range(len(asked)) if m != n]))
    return found
