"""A probe: whether a small classifier reads a variable off the values at a site, beside labels that mean nothing."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn

from analyzers.probes.fits import Fit, fitted
from analyzers.probes.probed import Probed
from analyzers.probes.reading import named, opened, read, states
from analyzers.probes.rows import Hashes, Ints, Rows, Sample, shares
from analyzers.protocol import Analyzer, AnalyzerError, Batch, check_counts, check_eval, check_other
from analyzers.sites import found_in, read_at
from fmr.errors import number_of, whole_number
from fmr.ids import Site

KINDS = ("linear", "mlp")


class Probe(Analyzer[Probed]):
    """Tell labels from the values at sites, and from the same values labels that mean nothing.

    >>> batch = {**inputs, "labels": torch.tensor([0])}
    >>> analyzers.Probe(model, kind="mlp").update(batch)
    Probe(GPT2LMHeadModel, kind='mlp'): 1 example counted

    Labels travel with the batch under a key that the model does not see: whole numbers, one for each example, (examples,),
    or one for each token, (examples, positions); -100 is none. A batch may hold texts in place of tensors:
    {"text": [...], "labels": [...]}.

    sites: one, several, or by name; None takes the stream after each layer. kind: "linear" (logistic regression) or "mlp"
    (one hidden layer of `width` units, trained for `epochs`). position: the token that a label of an example is read at,
    unless a site selects one. types: a key of the batch with the type of each labelled thing; without it the type of a token
    is the token, that of an example its whole input. held_out: the share of examples for testing. ridge: the price of
    squared weights, as one over scikit-learn's C. most: how many labelled vectors are kept for each site, in memory.

    Accuracy is that on held-out examples; an example is on one side of the split by its content, and so are its equals.
    The control task gives each type a random label, by the shares that labels have: a probe that tells it as well has
    learned types by heart, and selectivity is accuracy less control. Whole inputs are on one side only, so that their
    control cannot be told on the other: how much of it is learned by heart is said beside it.

    A vector is kept or not by its content alone: the result is that of all vectors up to `most`, and beyond that of a random
    part of them, whatever the order of batches and shards. All is fitted by `result()`, from `seed`.

    Source: J. Hewitt, P. Liang, "Designing and Interpreting Probes with Control Tasks", 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        sites: Any = None,
        kind: str = "linear",
        *,
        labels: str = "labels",
        types: str | None = None,
        position: int = -1,
        held_out: float = 0.25,
        ridge: float = 1.0,
        width: int = 64,
        epochs: int = 30,
        most: int = 10_000,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise AnalyzerError(f"kind={kind!r}: expected {' or '.join(map(repr, KINDS))}.")
        check_counts(1, width=width, epochs=epochs, most=most)
        check_counts(0, seed=seed)
        for name, value, end in (("held_out", held_out, 1.0), ("ridge", ridge, float("inf"))):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < end:
                told = "a share between 0 and 1, such as 0.25" if end == 1 else "a number above 0, such as 1.0"
                raise AnalyzerError(f"{name}={value!r}: expected {told}.")
        if whole_number(position) is None:
            raise AnalyzerError(f"position={position!r}: expected the number of a token, such as 0 or -1.")
        self.model, self.tokenizer, self.kind, self.labels, self.types = model, tokenizer, kind, labels, types
        self.position, self.width, self.epochs, self.seed = map(operator.index, (position, width, epochs, seed))
        self.held_out, self.ridge = float(held_out), float(ridge)
        self.sites: dict[str, Site] = {} if sites is None else named(sites)
        self._all_layers = sites is None
        self.by_token: bool | None = None
        self.sample = Sample(operator.index(most))

    def update(self, batch: Batch) -> Probe:
        """Count the labelled vectors of one batch.

        >>> analyzers.Probe(model).update({**inputs, "labels": [[0, 1, 0, 1, 0, -100]]}).counted
        '5 tokens'
        """
        check_eval(self.model)
        given, labels, types = opened(batch, self.labels, self.types, self.model, self.tokenizer)
        by_token = labels.dim() == 2
        if self.by_token not in (None, by_token):
            raise AnalyzerError(f"The labels are {_PER[by_token]}, those of earlier batches {_PER[not by_token]}. {_ONE}")
        with torch.no_grad():
            if not self.sites:
                (found,), run = found_in(self.model, given.inputs, lambda structure: (structure,))
                self.sites = states(found, run)
            run = read_at(self.model, given.inputs, list(self.sites.values()))
            rows = read(run, given, self.sites, labels, types, self.position)
        for name, value in rows.vectors.items() if self.sample.parts else ():
            if (width := self.sample.parts[0].vectors[name].shape[1]) != value.shape[1]:
                raise AnalyzerError(
                    f"{name!r} holds {value.shape[1]} numbers, and {width} in earlier batches. Expected as many in each."
                )
        self.by_token = by_token
        self.sample.add(rows)
        return self

    @property
    def counted(self) -> str:
        """How many labelled tokens or examples were counted."""
        return number_of(self.sample.seen, "token" if self.by_token else "example") if self.sample.seen else ""

    def merge(self, other: Probe) -> Probe:
        """Add what another probe of the same settings counted on other data, and return this one.

        >>> one, two = (analyzers.Probe(model).update({**inputs, "labels": [label]}) for label in (0, 1))
        >>> one.merge(two).counted
        '2 examples'
        """
        check_other(self, other)
        for name, ours in self._settings().items():
            if (theirs := other._settings()[name]) != ours:
                raise AnalyzerError(f"merge of {name}={ours!r} with {theirs!r}: expected one value. {_ONE}")
        if other.by_token is None:
            return self
        if self.by_token not in (None, other.by_token):
            raise AnalyzerError(
                f"merge of labels {_PER[bool(self.by_token)]} with labels {_PER[other.by_token]}: expected one kind. {_ONE}"
            )
        if self.sites and self.sites != other.sites:
            raise AnalyzerError(f"merge of sites {', '.join(self.sites)} with {', '.join(other.sites)}. {_ONE}")
        parts = [one.parts[0].vectors if one.parts else {} for one in (self.sample, other.sample)]
        for name in parts[0].keys() & parts[1].keys():
            ours, theirs = (part[name].shape[1] for part in parts)
            if ours != theirs:
                raise AnalyzerError(f"merge of {name!r} with {ours} numbers and with {theirs}: expected as many. {_ONE}")
        self.sites, self.by_token = other.sites, other.by_token
        self.sample.merge(other.sample)
        return self

    def result(self) -> Probed:
        """Fit the probes to what was counted so far, and test them.

        >>> analyzers.Probe(model).over(parities, progress=False).result().table()
        """
        if not self.sample.seen:
            raise AnalyzerError("Nothing has been counted yet. Call update(batch) or over(batches) before result().")
        rows = self.sample.rows()
        _check_classes(rows, "counted")
        test = rows.held_out(self.held_out, self.seed)
        train, tested = rows.take(np.flatnonzero(~test)), rows.take(np.flatnonzero(test))
        if not len(tested):
            raise AnalyzerError(
                f"None of {number_of(len(np.unique(rows.examples)), 'example')} is held out at held_out={self.held_out}. "
                "Expected more examples, or a larger share."
            )
        _check_classes(train, "left to fit to")
        known, counts = np.unique(train.labels, return_counts=True)
        control = _drawn(rows.types, known, counts, self.seed)
        fits: dict[str, dict[str, torch.Tensor]] = {}
        told: list[tuple[float, float]] = []
        for name in self.sites:
            fit = self._fit(train.vectors[name], train.labels)
            null = self._fit(train.vectors[name], control[~test])
            told += [
                (fit.accuracy(side.vectors[name], side.labels), null.accuracy(side.vectors[name], drawn))
                for side, drawn in ((tested, control[test]), (train, control[~test]))
            ]
            fits[name] = fit.tensors()
        (accuracy, on_train), (controlled, by_heart) = np.array(told).reshape(-1, 2, 2).T
        return Probed(
            sites=tuple(map(repr, self.sites.values())),
            accuracy=accuracy,
            control=controlled,
            on_train=on_train,
            by_heart=by_heart,
            majority=float((tested.labels == known[counts.argmax()]).mean()),
            classes=tuple(known.tolist()),
            train=len(train),
            test=len(tested),
            types=len(np.unique(rows.types)),
            seen=self.sample.seen,
            by_token=bool(self.by_token),
            whole_inputs=not self.by_token and self.types is None,
            layers=tuple(range(len(fits))) if self._all_layers else (),
            fits=fits,
            **{name: value for name, value in self._settings().items() if name in _TOLD},
        )

    def _fit(self, values: torch.Tensor, labels: Ints) -> Fit:
        return fitted(values, labels, self.kind, width=self.width, ridge=self.ridge, epochs=self.epochs, seed=self.seed)

    def _settings(self) -> dict[str, Any]:
        names = ("kind", "labels", "types", "position", "held_out", "ridge", "width", "epochs", "seed")
        return {name: getattr(self, name) for name in names} | {"most": self.sample.most}


_PER = {True: "one for each token", False: "one for each example"}
_ONE = "Use one Probe per model and setting, and merge only those that agree."
_TOLD = ("kind", "held_out", "ridge", "width", "epochs", "seed")


def _drawn(types: Hashes, known: Ints, counts: Ints, seed: int) -> Ints:
    """A random label for each type, by the shares that labels have."""
    edges = counts[:-1].cumsum() / counts.sum()
    found: Ints = known[np.searchsorted(edges, shares(types, 2 * seed + 4), side="right")]
    return found


def _check_classes(rows: Rows, how: str) -> None:
    classes = np.unique(rows.labels)
    if len(classes) < 2:
        one = f"all {len(rows)} labels {how} are {classes[0]}" if len(rows) else f"no label is {how}"
        raise AnalyzerError(
            f"There is nothing to tell apart: {one}. Expected two classes or more, of several examples each."
        )
    if len(rows) <= len(classes):
        raise AnalyzerError(
            f"{len(rows)} labels {how} are of {len(classes)} classes. Expected several of each: more data, or fewer classes."
        )
