"""What a dictionary keeps of what a model does: its loss with reconstructions in place of values, between two ablations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers.dictionaries.autoencoder import SparseAutoencoder
from analyzers.dictionaries.axes import spliced
from analyzers.dictionaries.coding import Components, Tally
from analyzers.dictionaries.dictionary import RANDOM, Dictionary
from analyzers.dictionaries.scores import ABLATED, CLEAN, OWN, DictionaryScored
from analyzers.dictionaries.standing import Standing, left_out, opened
from analyzers.lenses.opening import mask_of
from analyzers.probes.reading import vectors
from analyzers.prompts import Prompts, prompts
from analyzers.protocol import (
    Analyzer,
    AnalyzerError,
    Given,
    check_eval,
    check_other,
    device_of,
    later_tokens,
    nothing_counted,
    real_tokens,
)
from fmr.edits import Context
from fmr.errors import number_of
from fmr.nodes import Key
from fmr.sweeps.metrics import logits_by_position
from fmr.weights import fingerprint

Coder = SparseAutoencoder | Components


class DictionaryScores(Analyzer[DictionaryScored]):
    """Measure a dictionary on a model: what it explains at its site, and what of the loss it recovers when spliced in.

    >>> scores = analyzers.DictionaryScores(model, tokenizer, dictionary, site).over(batches, progress=False)
    >>> scores.result()
    DictionaryScored at transformer.h.1...: 12 examples, ...

    model: a language model in eval mode. dictionary: a `Dictionary`, or a `SparseAutoencoder`. site: where it stands. mean:
    of values there, for mean ablation; None takes that of a `Dictionary`'s training. controls: whether the untrained
    autoencoder, the one trained on Gaussian values and principal components are spliced in, too. skip: how many tokens at
    the start of each text are left out, None for as many as in a `Dictionary`'s training: they keep their values, and
    neither these nor what is predicted there counts.

    The loss is the cross-entropy of the next token, in nats. What a splice recovers is (ablated - spliced) / (ablated -
    clean), beside zero ablation and beside mean ablation, with the 95 % interval of the bootstrap over examples.

    Source: T. Bricken et al., "Towards Monosemanticity", 2023.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        dictionary: Dictionary | SparseAutoencoder,
        site: Key,
        *,
        mean: Tensor | None = None,
        controls: bool = True,
        skip: int | None = None,
    ) -> None:
        self.standing, self.skip = Standing(dictionary, site, every=True), left_out(dictionary, skip)
        self.autoencoder, known = opened(dictionary, model)
        given = known if mean is None else mean
        if not isinstance(given, Tensor) or given.shape != (self.autoencoder.width,):
            told = tuple(given.shape) if isinstance(given, Tensor) else given
            raise AnalyzerError(
                f"mean={told!r}: expected the mean of values at the site, a tensor of {self.autoencoder.width} numbers; an "
                "autoencoder alone does not know it."
            )
        self.model, self.tokenizer, self.site = model, tokenizer, self.standing.site
        self.mean = given.detach().float().cpu()
        rivals = rivals_of(dictionary, self.mean) if controls else {}
        self.coders: dict[str, Coder] = {OWN: self.autoencoder}
        self.coders |= {name: one.to(device_of(model)) for name, one in rivals.items()}
        self.tallies = {name: Tally.of(self.mean, one.size) for name, one in self.coders.items()}
        self.losses: dict[str, list[Tensor]] = {name: [] for name in (CLEAN, *self.coders, *ABLATED)}
        self.targets: list[Tensor] = []

    def update(self, batch: Given) -> DictionaryScores:
        """Count a batch: texts, token ids or named arguments.

        >>> analyzers.DictionaryScores(model, tokenizer, dictionary, site).update(texts[:2]).counted
        '2 examples'
        """
        check_eval(self.model)
        given = prompts(batch, self.model, self.tokenizer)
        self.standing.check(self.model, given.inputs)
        with torch.no_grad():
            run = fmr.run(self.model, keep=[self.site], **given.inputs)
            values = vectors(run, self.site, -1, True, len(given))
            real = mask_of(given, values.shape[:2], real_tokens)
            counted = later_tokens(real, self.skip)
            targets, valid = _targets(given, real, counted)
            self._count(values[counted.to(values.device)])
            site = self.site.at(positions=slice(self.skip, None)) if self.skip else self.site
            for name, edit in self._edits().items():
                output = (
                    run.output
                    if edit is None
                    else fmr.run(self.model, keep=(), edits={site: edit}, optional=True, **given.inputs).output
                )
                self.losses[name].append(_loss(output, targets, valid))
        self.targets.append(valid.sum(1))
        return self

    def _count(self, rows: Tensor) -> None:
        """Count the values of a batch, (rows, width)."""
        for name, one in self.coders.items():
            latents = one.encode(rows)
            self.tallies[name].add(rows, one.decode(latents), latents)

    def _edits(self) -> Mapping[str, Any]:
        """What is measured by name, and the edit that is made for it."""

        def splice(made: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Context], Tensor]:
            return lambda value, context: spliced(made, value, context.axes)

        mean = self.mean
        ablations = (torch.zeros_like, lambda value: mean.to(value).expand_as(value).clone())
        made = {name: splice(one) for name, one in (*self.coders.items(), *zip(ABLATED, ablations, strict=True))}
        return {CLEAN: None, **made}

    @property
    def counted(self) -> str:
        """How many examples were counted."""
        return number_of(sum(map(len, self.targets)), "example") if self.targets else ""

    def merge(self, other: DictionaryScores) -> DictionaryScores:
        """Add what another one counted of the same model and dictionary on other texts, and return this one.

        >>> one, two = (analyzers.DictionaryScores(model, None, dictionary, site).update(batch) for batch in batches[:2])
        >>> one.merge(two).counted
        '8 examples'
        """
        check_other(self, other)
        ours, theirs = ((one.site, one.skip, [*one.coders]) for one in (self, other))
        same = ours == theirs and torch.equal(self.mean, other.mean)
        if not same or not all(alike(one, other.coders[name]) for name, one in self.coders.items()):
            raise AnalyzerError(
                f"merge of scores of {self.autoencoder} at {self.site.id} with those of {other.autoencoder} at "
                f"{other.site.id}: expected one dictionary, one site, one mean and one skip."
            )
        for name, tally in self.tallies.items():
            tally.merge(other.tallies[name])
        for name, losses in self.losses.items():
            losses += other.losses[name]
        self.targets += other.targets
        return self

    def result(self) -> DictionaryScored:
        """The numbers so far.

        >>> analyzers.DictionaryScores(model, tokenizer, dictionary, site).update(texts[:2]).result().table()
        """
        if not any(one.any() for one in self.targets):
            raise AnalyzerError(nothing_counted(self.skip))
        on = {name: float(one.size) if isinstance(one, Components) else self.tallies[name].l0
              for name, one in self.coders.items()}  # fmt: skip
        return DictionaryScored(
            site=str(self.site.id),
            settings=self.autoencoder.settings,
            l0=on,
            explained={name: one.explained for name, one in self.tallies.items()},
            density=self.tallies[OWN].density.numpy(),
            losses={name: np.asarray(torch.cat(one)) for name, one in self.losses.items()},
            targets=torch.cat(self.targets).double().numpy(),
            rows=self.tallies[OWN].count,
            skip=self.skip,
        )


def alike(one: Coder, other: Coder) -> bool:
    """Whether two dictionaries are the same: of one kind, with the same settings and the same numbers."""
    if isinstance(one, SparseAutoencoder) and isinstance(other, SparseAutoencoder):
        return one.settings == other.settings and fingerprint(one) == fingerprint(other)
    return type(one) is type(other) and one.size == other.size


def rivals_of(dictionary: Dictionary | SparseAutoencoder, mean: Tensor) -> dict[str, Coder]:
    """What stands beside a dictionary; beside an autoencoder alone, one that was not trained."""
    if isinstance(dictionary, Dictionary):
        return dictionary.rivals()
    start = SparseAutoencoder(**dictionary.settings)
    with torch.no_grad():
        start.bias.copy_(mean)
    return {RANDOM: start.requires_grad_(False)}


def _targets(given: Prompts, real: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The token after each but the last column, and whether it is real behind one that counts, (examples, positions - 1)."""
    ids = given.ids
    if not isinstance(ids, Tensor) or ids.shape != real.shape:
        told = tuple(ids.shape) if isinstance(ids, Tensor) else "none"
        raise AnalyzerError(
            f"The token ids are {told} for values of {tuple(real.shape)} examples and positions. Expected token ids with a "
            "next token for each value: a loss needs what comes next."
        )
    return ids[:, 1:].cpu(), real[:, 1:] & counted[:, :-1]


def _loss(output: Any, targets: Tensor, valid: Tensor) -> Tensor:
    """The sum of the cross-entropy over the tokens of each example, (examples,)."""
    logits = logits_by_position(output)[:, :-1]
    each = nn.functional.cross_entropy(logits.double().transpose(1, 2), targets.to(logits.device), reduction="none")
    return (each.cpu() * valid).sum(1)
