"""Rank-one editing: one fact of a model is made another one, by one row and one column added to one matrix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from analyzers.editing.edit import FactEdit
from analyzers.editing.keys import Covariance, covariance_of
from analyzers.editing.memories import memory_of, values_of
from analyzers.editing.rows import log_probs, padded
from analyzers.editing.update import Update
from analyzers.protocol import AnalyzerError, Method, check_eval
from analyzers.texts import sentences
from analyzers.tracing.facts import Fact, fact_of
from fmr.edits import Context
from fmr.ids import Site
from fmr.structure.memories.memory import Memory
from fmr.sweeps.bars import bar
from fmr.sweeps.metrics import logits_of


class RankOneEdit(Method):
    """Change what a model says of a subject, by a rank-one update of the values of one memory.

    >>> texts = [fact.prompt for fact in world.facts()]
    >>> editing = RankOneEdit(model, tokenizer, texts=texts, prefixes=world.OPENINGS)
    >>> edit = editing.run("Junel Dunoth grew up in", "Junel Dunoth", "Oranby", progress=False)
    >>> with edit:
    ...     model(**inputs)

    model: any module whose memories `fmr.locate` finds, in eval mode; a language model that looks back alone. layer: whose
    memory is changed; None takes the one a sixth of the way up, and `CausalTracing` tells more. texts: what keys are usual,
    and what may stand before the prompt; None takes `analyzers.sentences()`. covariance: of the keys over a larger corpus,
    by `KeyCovariance`. prefixes: how many of the texts stand before the prompt in turn, or these texts themselves. clamp:
    how long the change of the value may be, in lengths of the value (the paper takes 4; the smaller, the less befalls
    neighbours). steps: how many there are at most, which end when the target is likely after every prompt (the paper takes
    20). rate: how long they are at first, in lengths of the value; the paper's 0.5 a number is too long for small models.
    kl, decay: of the loss. essence: texts on the subject, {}, that shall go on as before; the more of them, the more of what
    else is known of it stays. ridge: a share of the mean diagonal of the covariance, added to it. cache: a folder in which
    covariances are kept.

    The key k is what the second projection W reads at the last token of the subject, the mean over prompts with something
    before them; C are the second moments of all keys. A change d of what the memory writes there is found by Adam, for
    -log p(target) + kl KL(p_before || p) of the essence + decay |d| / |v|^2, with v = W k. Then W becomes
    W + d u^T / (u^T k), u = C^-1 k: it maps k to v + d exactly, and keys unlike k to what they were.

    Source: K. Meng, D. Bau, A. Andonian, Y. Belinkov, "Locating and editing factual associations in GPT", 2022, section 3;
    A. Gupta, D. Sajnani, G. Anumanchipalli, "A unified framework for model editing", 2024 (one key above and below).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        layer: int | None = None,
        texts: Sequence[str] | None = None,
        covariance: Covariance | None = None,
        prefixes: int | Sequence[str] = 5,
        clamp: float = 2.0,
        steps: int = 60,
        rate: float = 0.5,
        kl: float = 0.0625,
        decay: float = 0.5,
        essence: Sequence[str] = ("{} is a",),
        ridge: float = 0.01,
        cache: str | PathLike[str] | None = None,
    ) -> None:
        if tokenizer is None or any(isinstance(one, str) for one in (texts, prefixes, essence)):
            raise AnalyzerError(
                "RankOneEdit works on text: expected a tokenizer, and lists of texts for texts, prefixes and essence."
            )
        for name, value in (("clamp", clamp), ("steps", steps), ("rate", rate)):
            if not (isinstance(value, int | float) and value > 0):
                raise AnalyzerError(f"{name}={value!r}: expected a number above 0.")
        self.model, self.tokenizer, self.layer, self.prefixes = model, tokenizer, layer, prefixes
        self.texts = sentences() if texts is None else list(texts)
        self.covariance, self.ridge, self.cache = covariance, ridge, None if cache is None else Path(cache)
        self.clamp, self.steps, self.rate, self.kl, self.decay, self.essence = clamp, steps, rate, kl, decay, essence
        self.known: dict[int, Covariance] = {}

    def run(self, prompt: str, subject: str, target: str, seed: int = 0, *, progress: bool | None = None) -> FactEdit:
        """The edit that makes the model continue the prompt with the target. It is not applied yet.

        >>> edit = editing.run("Junel Dunoth grew up in", "Junel Dunoth", "Oranby", progress=False)
        >>> edit.apply().revert()

        prompt: a text that the fact is asked by. subject: the part of it that is edited. target: what shall follow, of any
        number of tokens. seed: of the texts that stand before the prompt.
        """
        check_eval(self.model)
        contexts = [fact_of(text, subject, target, self.tokenizer, at) for text, at in self._contexts(prompt, seed)]
        essences = [fact_of(text.format(subject), subject, None, self.tokenizer) for text in self.essence]
        run = fmr.run(self.model, **padded([contexts[0].ids], self.model))
        layer, memory = memory_of(fmr.locate(run), self.layer)
        values = values_of(memory, self.model)
        batch = Batch.of(contexts, essences, self.model)
        key, value = self._read(batch, memory)
        covariance = self._covariance(layer, memory)
        delta, losses, told = self._change(batch, memory, value, progress)
        up = covariance.solve(key.double().cpu())
        direction = up / (up @ key.double().cpu())
        weight = values.of(values.weight(self.model))
        return FactEdit(
            self.model,
            self.tokenizer,
            Update(
                prompt=prompt,
                subject=subject,
                target=self.tokenizer.decode(list(contexts[0].answer)),
                answer=self.tokenizer.decode([int(logits_of(run.output)[0, -1].argmax())]),
                layer=layer,
                parameter=values.parameter,
                dim=values.dim,
                first=values.first,
                key=key.double().cpu(),
                direction=direction,
                delta=delta.double().cpu(),
                value_norm=float(value.norm()),
                weight_norm=float(weight.detach().double().norm()),
                clamp=self.clamp,
                losses=losses,
                before=told[0],
                after=told[1],
                tokens=covariance.tokens,
                condition=covariance.condition,
                seed=seed,
            ),
        )

    def _contexts(self, prompt: str, seed: int) -> list[tuple[str, int]]:
        """The prompt by itself and behind other texts, each with the number of characters before it."""
        before = self.prefixes
        if isinstance(before, int):
            before = random.Random(seed).sample(self.texts, min(before, len(self.texts)))
        return [(prompt, 0), *((f"{text} {prompt}", len(text) + 1) for text in before)]

    def _covariance(self, layer: int, memory: Memory) -> Covariance:
        if self.covariance is not None:
            if (self.covariance.layer, len(self.covariance.matrix)) != (layer, memory.n):
                raise AnalyzerError(
                    f"{self.covariance!r} is of another memory than layer {layer} with {memory.n}. Expected "
                    f"KeyCovariance(model, layer={layer}).over(batches).result()."
                )
            return self.covariance
        if layer not in self.known:
            self.known[layer] = covariance_of(self.model, self.tokenizer, self.texts, layer, self.ridge, self.cache)
        return self.known[layer]

    @torch.no_grad()
    def _read(self, batch: Batch, memory: Memory) -> tuple[Tensor, Tensor]:
        """The mean key over the prompts, and the mean of what the memory makes of it."""
        keys, values = batch.at(memory.post), batch.at(memory.out)
        run = fmr.run(self.model, **batch.inputs, keep=[str(keys.id), str(values.id)], stop=True)
        key, value = (run[site][: len(batch.answers), 0].float().mean(0) for site in (keys, values))
        return key, value

    def _change(
        self, batch: Batch, memory: Memory, value: Tensor, progress: bool | None
    ) -> tuple[Tensor, tuple[float, ...], tuple[float, float]]:
        """The change of what the memory writes, the losses on the way, and p(target) of the prompt before and after."""
        length = float(value.norm())
        delta = torch.zeros_like(value).requires_grad_()
        adam = torch.optim.Adam([delta], lr=self.rate * length / len(value) ** 0.5)
        site, losses, shares, essence = batch.at(memory.out), [], [], None
        with torch.enable_grad():
            for _ in bar(range(self.steps + 1), "steps", progress):
                run = fmr.run(self.model, **batch.inputs, edits={site: Shift(delta)}, keep=(), grad=True)
                said = log_probs(run.output, batch.starts, batch.answers)
                shares.append(float(said[0].detach().sum().exp()))
                now = batch.after(run.output)
                essence = now.detach() if essence is None else essence
                apart = (essence.exp() * (essence - now)).sum(1).mean()
                fit = -torch.stack([one.float().mean() for one in said]).mean()
                loss = fit + self.kl * apart + self.decay * delta.norm() / length**2
                losses.append(float(loss.detach()))
                if max(-float(one.detach().mean()) for one in said) < ENOUGH or len(losses) > self.steps:
                    break
                adam.zero_grad()
                (delta.grad,) = torch.autograd.grad(loss, delta)
                adam.step()
                with torch.no_grad():
                    delta *= min(1.0, self.clamp * length / max(float(delta.norm()), 1e-12))
        return delta.detach(), tuple(losses), (shares[0], shares[-1])


ENOUGH = 0.05
"""The optimisation ends when -log p(target), a token's mean, is below this after every prompt: p above 0.95."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts with their answers behind them, and texts that must stay as they are; `places` are those of the subjects."""

    inputs: dict[str, Any]
    starts: list[int]
    ends: list[int]
    answers: list[tuple[int, ...]]
    places: list[list[int]]

    @classmethod
    def of(cls, prompts: Sequence[Fact], essences: Sequence[Fact], model: nn.Module) -> Batch:
        """The facts in one batch."""
        every = [*prompts, *essences]
        inputs = padded([fact.inputs()["input_ids"][0] for fact in every], model)
        starts, ends = [len(fact.ids) for fact in prompts], [len(fact.ids) for fact in essences]
        return cls(inputs, starts, ends, [fact.answer for fact in prompts], [[fact.subject[-1]] for fact in every])

    def at(self, site: Site) -> Site:
        """A site at the last token of each subject."""
        return site.at(positions=self.places)

    def after(self, output: Any) -> Tensor:
        """The log-probabilities of all tokens after each text that must stay as it is, (texts, tokens)."""
        logits = logits_of(output)[len(self.starts) :]
        return logits[range(len(self.ends)), [end - 1 for end in self.ends]].float().log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Shift:
    """The edit that adds a vector which gradients flow to."""

    delta: Tensor

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        return value + self.delta.to(value)
