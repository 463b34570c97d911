"""Direct logit attribution: which part of the model wrote the answer's logit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fmr
from analyzers.lenses.backward import Backward, Part, followed
from analyzers.lenses.opening import (
    Reading,
    columns_of,
    layout_of,
    mask_of,
    place_of,
    read_by_head,
    readout_of,
    rows_of,
    spelling,
)
from analyzers.lenses.shares import LogitParts
from analyzers.prompts import Prompts, token_ids
from analyzers.protocol import AnalyzerError, Given
from fmr.runs.run import Run
from fmr.structure.frozen import Frozen
from fmr.structure.logits import Readout
from fmr.structure.parts import Structure
from fmr.structure.proof.certificate import tolerance_of
from fmr.sweeps.metrics import token_ids as one_each


class Answers(NamedTuple):
    """A right token for each example, and a wrong one or none."""

    right: Tensor
    wrong: Tensor | None

    def weights(self, logits: Tensor) -> Tensor:
        """How much of each logit, (examples, ...), is counted: 1 of the right one, -1 of the wrong one."""
        found = torch.zeros_like(logits).flatten(1)
        rows = torch.arange(len(found), device=found.device)
        found[rows, self.right] += 1
        if self.wrong is not None:
            found[rows, self.wrong] -= 1
        return found.view_as(logits)

    @property
    def pairs(self) -> Tensor:
        """(examples, 1 or 2)."""
        return torch.stack([self.right, *([self.wrong] if self.wrong is not None else [])], 1)


class LogitAttribution(Reading):
    """How much of a logit, or of the difference of two, each head, each memory and the embedding wrote directly.

    >>> attribution = analyzers.LogitAttribution(model, tokenizer).run(clean, right, wrong)
    >>> attribution.error < 1e-4
    True

    The stream is the sum of all that was written to it, x = embedding + heads + memories + biases, and with the scale s of
    the final norm held at what it is in the run, logits = U (x / s) are linear in it. The difference of a right and a wrong
    logit is then the sum over parts w of (U[right] - U[wrong]) w / s, in logits (nats). Norms on what a part writes are held
    as well. Where a soft cap follows, the logits before it are taken apart. What a part does through later ones is no part
    of its share: that is what patching measures.

    model: any module with a pre-norm stream and logits, in eval mode.

    Source: N. Elhage et al., "A mathematical framework for transformer circuits", 2021; K. Wang et al., "Interpretability in
    the wild", 2022.
    """

    def run(
        self,
        inputs: Given,
        right: Any,
        wrong: Any = None,
        *,
        position: int | None = None,
        memories: bool = False,
        seed: int = 0,
    ) -> LogitParts:
        """Take the logits of right tokens apart, or what they are above those of wrong ones.

        >>> LogitAttribution(model, tokenizer).run("Junel Dunoth grew up in", "Oskus").strongest(3)

        right, wrong: a token for each prompt, or one for all, as text (" Mary", with its blank) or as a number; a class as a
        number. position: of which real token of each prompt; None: the last, and where logits are of classes, what these are
        made of. memories: tell single memories, too. Beside each part stands its share in the logits of other prompts'
        answers; where all prompts have the same, in those of random tokens.
        """
        given, structure = self._opened(inputs)
        readout = readout_of(structure)
        with torch.no_grad():
            run = fmr.run(self.model, **given.inputs)
        states = rows_of(run[readout.end].detach(), len(given), structure.model, layout_of(structure))
        tokenizer = spelling(structure, self.tokenizer, right, wrong)
        logits, columns = _logits(structure, run, states, mask_of(given, states.shape[:2]), position)
        asked = _answers(right, wrong, logits.value, given, tokenizer)
        others, control = _others(asked, logits.value[0].numel(), seed, "tokens" if readout.of_words else "classes")
        weights = torch.stack([asked.weights(logits.value), others.weights(logits.value)])
        (directions,) = logits.back(weights).values()
        if columns is not None:
            directions = followed(directions, columns, run[readout.end])
        parts = list(Backward(structure, run, len(given)).parts(directions))
        parts = _by_layer(parts, (weights * logits.rest).flatten(2).sum(-1))
        values = torch.cat([_flat(part) for part in parts], 1)
        total = _told(run, readout, columns, weights[0], logits.value, states.shape[1])
        return LogitParts(
            kinds=tuple(part.kind for part in parts for _ in range(_flat(part).shape[1])),
            layers=np.array([part.layer for part in parts for _ in range(_flat(part).shape[1])]),
            places=_places(parts),
            values=values[0].cpu(),
            others=values[1].cpu(),
            total=total.cpu(),
            memories={str(p.layer): p.value[0].mT.cpu() for p in parts if memories and _by_memory(p)},
            whole={f"{part.kind} {part.layer}": part.whole for part in parts if part.whole},
            right=_named(asked.right, tokenizer),
            wrong=_named(asked.wrong, tokenizer) if asked.wrong is not None else (),
            tokens=given.tokens,
            control=control,
            capped=readout.capped,
            error=_closed(values[0], total, tolerance_of(*(run[name] for name in readout.way)), structure.model),
            position=position,
            seed=seed,
        )


def _logits(
    structure: Structure, run: Run, states: Tensor, mask: Tensor, position: int | None
) -> tuple[Frozen, Tensor | None]:
    """The logits as sums over the stream: of a column of each example, or, without one, of the stream as a whole."""
    readout = readout_of(structure)
    if readout.of_words or readout.columns(run) is None:
        columns = columns_of(mask, -1 if position is None else position).to(states.device)
        return structure.frozen(states[torch.arange(len(states)), columns]), columns
    if position is not None:
        place_of(mask, position, read_by_head(structure, run, mask))
    return readout.frozen_in(run), None


def _by_layer(parts: list[Part], last: Tensor) -> list[Part]:
    """The parts with one of biases a layer, and at the end those of the final norm and the unembedding."""
    last_layer = 1 + max(part.layer for part in parts)
    biases: dict[int, Tensor] = {}
    for part in (*parts, Part("bias", last_layer, last)):
        if part.kind == "bias":
            biases[part.layer] = biases.get(part.layer, 0) + part.value
    return [part for part in parts if part.kind != "bias"] + [Part("bias", n, one) for n, one in sorted(biases.items())]


def _by_memory(part: Part) -> bool:
    return part.kind == "mlp" and part.value.dim() == 3


def _flat(part: Part) -> Tensor:
    """The values of a part, (draws, rows, examples): a row for each head, one for all memories of a layer."""
    if part.value.dim() == 2:
        return part.value[:, None]
    return part.value.sum(-1)[:, None] if _by_memory(part) else part.value.mT


def _places(parts: Sequence[Part]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The number of each head in its layer, where attentions may be several; -1 of what is none."""
    found, seen = [], Counter[tuple[str, int]]()
    for part in parts:
        if not part.kind.endswith("head"):
            found.append(np.array([-1]))
            continue
        first = seen[part.kind, part.layer]
        seen[part.kind, part.layer] += part.value.shape[2]
        found.append(np.arange(first, seen[part.kind, part.layer]))
    return np.concatenate(found)


def _closed(values: Tensor, total: Tensor, tolerance: float, model: str) -> float:
    """How far parts add up from what the model says; `AnalyzerError` where that is more than rounding."""
    error, allowed = float((values.sum(0) - total).abs().max()), tolerance * float(values.abs().sum(0).max())
    if error > allowed:
        raise AnalyzerError(
            f"The parts of the logits of {model} add up to {error:.2g} more or less than what the model says, more than "
            f"rounding ({allowed:.2g}): something writes to its stream that fmr.locate did not find."
        )
    return error


def _answers(right: Any, wrong: Any, logits: Tensor, given: Prompts, tokenizer: Any) -> Answers:
    flat = logits.flatten(1)
    found = [one_each(token_ids(one, tokenizer, given), flat) if one is not None else None for one in (right, wrong)]
    if found[0] is None:
        raise AnalyzerError("right=None: expected a token, or one for each prompt, as right=' Mary'.")
    return Answers(found[0].to(flat.device), found[1].to(flat.device) if found[1] is not None else None)


def _others(asked: Answers, vocabulary: int, seed: int, what: str) -> tuple[Answers, str]:
    """The answers of another example for each, drawn among those that differ; random tokens where there is none."""
    draw, pairs = torch.Generator().manual_seed(seed), asked.pairs.cpu()
    differ = (pairs[:, None] != pairs[None]).all(-1)
    if bool(differ.any(1).all()):
        chosen = pairs[torch.multinomial(differ.double(), 1, generator=draw)[:, 0]]
        control = "answers of other prompts"
    else:
        chosen = torch.stack([torch.randperm(vocabulary, generator=draw)[: pairs.shape[1]] for _ in pairs])
        control = f"random {what}"
    found = chosen.to(asked.right.device).unbind(1)
    return Answers(found[0], found[1] if len(found) > 1 else None), control


def _told(run: Run, readout: Readout, columns: Tensor | None, weights: Tensor, logits: Tensor, positions: int) -> Tensor:
    """The weighed logits as the model itself computed them, before a soft cap; recomputed where it did not at this place."""
    assert readout.linear is not None
    own, examples = run[readout.linear].detach().double(), torch.arange(len(logits))
    if columns is None:
        return (weights * own.view_as(logits)).flatten(1).sum(-1)
    fits = own.dim() == logits.dim() + 1 and own.shape[:1] + own.shape[2:] == logits.shape
    if fits and own.shape[1] == positions:
        logits = own[examples, columns]
    return (weights * logits).flatten(1).sum(-1)


def _named(tokens: Tensor, tokenizer: Any) -> tuple[str, ...]:
    return tuple(str(one) if tokenizer is None else str(tokenizer.decode([one])) for one in tokens.tolist())
