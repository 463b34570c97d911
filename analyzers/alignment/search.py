"""Where, and in which directions, a network holds the variables of an algorithm: distributed alignment search."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import fmr
from analyzers.alignment.alignment import Alignment
from analyzers.alignment.causal_model import CausalModel
from analyzers.alignment.controls import controls as controls_of
from analyzers.alignment.controls import mean
from analyzers.alignment.counterfactuals import Counterfactuals
from analyzers.alignment.examples import Examples, check_data
from analyzers.alignment.interchange import Network, Scores
from analyzers.alignment.opening import Sites, check_causal, opened, share_of, site_of, sites_of
from analyzers.alignment.parts import parameters, sizes, spaces_of
from analyzers.alignment.training import Settings, State, frozen
from analyzers.alignment.trial import Accuracy, Trial, accuracy
from analyzers.protocol import AnalyzerError, Method
from fmr.disk.files import new_folder
from fmr.ids import Site
from fmr.nodes import Key
from fmr.subspaces import Subspace
from fmr.sweeps.bars import hidden

Fit = Callable[[Trial, str], tuple[Trial, State]]
"""Trains a trial of a name."""

VALIDATION = 0.9
"""This share of the training examples is trained on; by the rest the best epoch and the best site are chosen."""


class AlignmentSearch(Method):
    """Train a subspace at a site so that the network, where that is interchanged, says what a causal model says.

    >>> rotation = subspaces.Rotation(8)
    >>> search = AlignmentSearch(network, equality, "first", {"wx": rotation[:4], "yz": rotation[4:]})
    >>> alignment = search.run(equality.counterfactuals(200), epochs=2, progress=False)

    model: any module in eval mode; its weights are left as they are. causal_model: the algorithm. site: where its variables
    are looked for, or several sites: a list, or a mapping from names, where pairs (row, column) make a heat map. subspace:
    one of fmr.subspaces, or by variable one each, that share nothing: those that are learned are trained, at each site from
    where they are now. tokenizer: for data that are texts. logits: makes of what the model returns the scores of the labels,
    (examples, labels); left out, it is the output itself or its `logits`, of a language model those at the last token, where
    labels are token ids.

    A `Rotation` is distributed alignment search, a `Boundless` finds how many directions it takes, a `Mask` which units;
    `Units` and other fixed subspaces are a hypothesis that is only tested. Sources: A. Geiger et al., "Finding alignments
    between interpretable causal variables and distributed neural representations", 2024 (arXiv:2303.02536); Z. Wu et al.,
    "Interpretability at scale", 2023 (arXiv:2305.08809).
    """

    def __init__(
        self,
        model: nn.Module,
        causal_model: CausalModel,
        site: Sites,
        subspace: Subspace | Mapping[str, Subspace],
        *,
        tokenizer: Any = None,
        logits: Scores | None = None,
    ) -> None:
        self.model, self.causal_model, self.tokenizer = model, causal_model, tokenizer
        check_causal(causal_model)
        self.sites, self.spaces = sites_of(site), spaces_of(subspace)
        for name in self.spaces:
            if name:
                causal_model.values(name)
        self.network = Network(model, logits)

    def run(
        self,
        data: Counterfactuals,
        test: Counterfactuals | None = None,
        *,
        other: Key | None = None,
        controls: bool = True,
        held_out: float = 0.2,
        epochs: int = 10,
        batch: int = 64,
        lr: float = 5e-3,
        patience: int | None = None,
        price: float = 0.5,
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> Alignment:
        """Train at each site, and measure on examples that were not trained on.

        >>> AlignmentSearch(network, equality, "first", subspaces.Rotation(8, 4)).run(
        ...     equality.counterfactuals(200, ["wx"]), epochs=2, progress=False
        ... )
        Alignment of wx: interchange accuracy ... at Site('first')
        ...

        data: of `causal_model.counterfactuals`, on the inputs of the network. test: the held-out ones; by default a share of
        `held_out` of the data, apart from all others. other: a site for a control, where one is looked at; of several it is
        the mean of the rest. controls: whether to train and test them at the best site. patience: after so many epochs
        without a lower loss on a tenth of the training data, which is held apart, training stops; what is kept is the best
        epoch, or where something is soft while it is trained, the last. price: of all directions or units of a
        `Boundless` or a `Mask`, beside the cross-entropy. lr: of Adam at the start; it falls to 0, by as much in each of all
        steps of `epochs`. seed: of the order of examples and of the controls. checkpoint: a
        folder that is written to while this runs; the same call goes on from it, to the same numbers. progress: show a bar;
        None shows it on a terminal only.
        """
        check_data(data, test)
        settings = Settings(epochs, batch, lr, patience, price, seed)
        if not parameters(self.spaces):
            return self.evaluate(data if test is None else test, other=other, controls=controls, batch=batch, seed=seed)
        if test is None:
            data, test = data.split(1 - share_of(held_out))
        folder = None if checkpoint is None else new_folder(checkpoint)
        train, validation = data.split(VALIDATION)
        steps = -(-len(train) // batch) * epochs
        jobs = len(self.sites) + controls * (2 + (other is not None and len(self.sites) == 1))
        with tqdm(total=steps * jobs, desc="alignment", unit="step", disable=hidden(progress)) as bar:

            def fit(trial: Trial, name: str) -> tuple[Trial, State]:
                file = None if folder is None else folder / f"{name}.safetensors"
                return trial.fitted(file, bar.update, name)

            return self._result(train, validation, test, settings, fit, other, controls)

    def evaluate(
        self,
        data: Counterfactuals,
        *,
        other: Key | None = None,
        controls: bool = True,
        batch: int = 64,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Alignment:
        """Measure the subspaces as they are, on all of some data: a hypothesis that was not learned, or was elsewhere.

        >>> halves = {"wx": subspaces.Units(8, range(4)), "yz": subspaces.Units(8, range(4, 8))}
        >>> AlignmentSearch(network, equality, "first", halves).evaluate(equality.counterfactuals(200)).iia
        array([1.])

        The arguments are those of `run`. Of several sites the best is chosen by the same data: that one's accuracy is the
        largest of several.
        """
        check_data(data)
        settings = Settings(1, batch, seed=seed)
        return self._result(data, data, data, settings, lambda trial, name: (trial, State()), other, controls)

    def _result(
        self,
        train: Counterfactuals,
        validation: Counterfactuals,
        test: Counterfactuals,
        settings: Settings,
        fit: Fit,
        other: Key | None,
        controls: bool,
    ) -> Alignment:
        """Every site, then the controls at the best."""
        sites = [site for *_, site in self.sites]
        elsewhere = _elsewhere(other, sites)
        with frozen(self.model):
            parts, spaces = opened(
                self.network, (train, validation, test), self.spaces, [*sites, *elsewhere], self.tokenizer
            )
            plain = [accuracy(self._plain, parts[2], settings, base) for base in (False, True)]
            starts = [Trial(self.network, site, spaces, parts[0], parts[1], settings) for site in sites]
            fitted = [fit(trial, f"site {number}") for number, trial in enumerate(starts)]
            chosen = [trial.accuracy(parts[1]) for trial, _ in fitted]
            best = max(range(len(fitted)), key=lambda number: (chosen[number].all, -chosen[number].loss))
            found = [trial.accuracy(parts[2]) for trial, _ in fitted]
            beside: dict[str, Accuracy] = {}
            if controls:
                one = next(iter(elsewhere), None) if len(fitted) == 1 else None
                beside = dict(controls_of(starts[best], fitted[best][0], parts[2], one, fit))
                if len(found) > 1:
                    rest = [one for number, one in enumerate(found) if number != best]
                    beside["another site"] = mean(rest)
        trial, state = fitted[best]
        return Alignment(
            variables=train.variables,
            rows=tuple(row for row, *_ in self.sites),
            columns=tuple(column for _, column, _ in self.sites),
            sites=tuple(map(repr, sites)),
            iia=np.array([one.all for one in found]),
            changed=np.array([one.changed for one in found]),
            validation=np.array([one.all for one in chosen]),
            best=best,
            controls={name: one.all for name, one in beside.items()},
            controls_changed={name: one.changed for name, one in beside.items()},
            ignored=plain[0].all,
            ignored_changed=plain[0].changed,
            task=plain[1].all,
            losses=np.array(list(zip(state.losses, state.validation, strict=True))).reshape(-1, 2),
            sizes=sizes(trial.spaces),
            examples={
                "train": len(train),
                "validation": len(validation),
                "test": len(test),
                "trained on": test.shared(train) if len(state.losses) else 0,
            },
            settings={name: value for name, value in asdict(settings).items() if name != "seed"},
            seed=settings.seed,
            intervention=_intervention(trial),
        )

    def _plain(self, batch: Examples) -> torch.Tensor:
        return self.network.plain(batch.base)


def _elsewhere(other: Key | None, sites: list[Site]) -> list[Site]:
    """The site for a control, if there is one; it is none of those where variables are looked for."""
    found = [] if other is None else [site_of(other)]
    if any(one in sites for one in found):
        raise AnalyzerError(f"other={other!r} is where the variables are looked for. Expected another site, for a control.")
    return found


def _intervention(trial: Trial) -> fmr.Intervention:
    """What was found as an intervention, with the variables for the names of its sources."""
    return fmr.Intervention(
        {trial.site: [fmr.edits.Interchange(name, within=space) for name, space in trial.spaces.items()]}
    )
