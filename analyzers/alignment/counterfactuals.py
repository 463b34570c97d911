"""Counterfactual data: pairs of inputs, and what an algorithm says where a variable has its value from the other run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from analyzers.protocol import AnalyzerError
from fmr.errors import number_of, whole_number

if TYPE_CHECKING:
    from pandas import DataFrame

MOST_LABELS = 6
"""How many labels are printed with their shares."""


@dataclass(frozen=True, eq=False)
class Counterfactuals(Dataset[dict[str, Any]]):
    """Examples of interchanges, with the labels that a network must give if it computes the variables.

    >>> model = CausalModel(dict.fromkeys("ab", range(10)), {"wx": lambda a, b: a == b, "out": lambda wx: not wx})
    >>> sorted(model.counterfactuals(100, ["wx"])[0])
    ['base', 'base_label', 'interchanged', 'label', 'sources']

    variables: those that are interchanged. base: what the network takes, (examples, ...), a mapping of these or texts;
    sources: the same for each variable. base_labels: (examples,), for the base as it is; labels: (examples,), with the
    variables interchanged. interchanged: (examples, variables), which are. settings: of base and sources the inputs, and of
    `labels` and `base_labels` the values of the output, as columns.

    data[3] is one example; data[10:20] and data[tensor] are batches, as a DataLoader makes them.
    """

    variables: tuple[str, ...]
    base: Any = field(repr=False)
    sources: Mapping[str, Any] = field(repr=False)
    base_labels: Tensor
    labels: Tensor
    interchanged: Tensor
    settings: Mapping[str, Mapping[str, list[Any]]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: Any) -> dict[str, Any]:
        if isinstance(at, (slice, list, Tensor, np.ndarray)):
            rows = torch.arange(len(self))[at]
        elif (number := whole_number(at)) is None or not -len(self) <= number < len(self):
            raise IndexError(
                f"Example {at!r} of {len(self)}: expected 0 to {len(self) - 1}, or several as a slice or tensor."
            )
        else:
            rows = torch.tensor(number)
        return {
            "base": _rows(self.base, rows),
            "sources": _rows(self.sources, rows),
            "base_label": self.base_labels[rows],
            "label": self.labels[rows],
            "interchanged": self.interchanged[rows],
        }

    @property
    def changed(self) -> Tensor:
        """In which examples the interchange changes the label, (examples,): a network that ignores it is wrong there."""
        return self.labels != self.base_labels

    def split(self, fraction: float = 0.8) -> tuple[Counterfactuals, Counterfactuals]:
        """The first examples and the rest, none of which is in both: equal ones stay on one side.

        >>> model = CausalModel(dict.fromkeys("ab", range(10)), {"wx": lambda a, b: a == b, "out": lambda wx: not wx})
        >>> train, test = model.counterfactuals(1000, ["wx"]).split(0.8)
        >>> len(train) + len(test)
        1000

        fraction: the share of the first, as near as that allows; an AnalyzerError where one side would be empty.
        """
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise AnalyzerError(f"fraction={fraction!r}: expected a share between 0 and 1, as 0.8.")
        keys = self._keys()
        sizes: dict[Any, int] = {}
        for key in keys:
            sizes[key] = sizes.get(key, 0) + 1
        if len(sizes) < 2:
            raise AnalyzerError(
                f"Data of {number_of(len(self), 'example')} has no part to hold out: all are the same. Expected at least "
                "two that differ, as of counterfactuals(n) with a larger n."
            )
        ends = np.cumsum(list(sizes.values()))[:-1]
        first = set(list(sizes)[: 1 + int(np.abs(ends - fraction * len(self)).argmin())])
        early = torch.tensor([key in first for key in keys])
        return self._part(early.nonzero()[:, 0]), self._part((~early).nonzero()[:, 0])

    def shared(self, other: Counterfactuals) -> int:
        """How many of these examples are among others; of values that have no hash none is known to be.

        >>> model = CausalModel(dict.fromkeys("ab", range(10)), {"wx": lambda a, b: a == b, "out": lambda wx: not wx})
        >>> train, test = model.counterfactuals(1000, ["wx"]).split(0.8)
        >>> test.shared(train), test.shared(test)
        (0, ...)
        """
        known = {key for key in other._keys() if not isinstance(key, int)}
        return sum(key in known for key in self._keys())

    def table(self) -> DataFrame:
        """One row an example: the inputs of base and sources, what is interchanged, and the output without and with it.

        >>> model = CausalModel(dict.fromkeys("ab", range(10)), {"wx": lambda a, b: a == b, "out": lambda wx: not wx})
        >>> model.counterfactuals(100, ["wx"]).table().query("changed").interchanged.unique()
        array(['wx'], dtype=object)
        """
        import pandas as pd

        told = {f"{of} {name}": column for of, part in self.settings.items() for name, column in part.items()}
        names = [", ".join(compress(self.variables, row)) for row in self.interchanged.tolist()]
        ends = {"base_label": self.base_labels.numpy(), "label": self.labels.numpy(), "changed": self.changed.numpy()}
        return pd.DataFrame({**told, "interchanged": pd.Series(names, dtype=object), **ends})

    def _keys(self) -> list[Any]:
        """What makes examples equal: the inputs of the base, and those of each source that is used."""
        base, *sources = (zip(*self.settings[of].values(), strict=True) for of in ("base", *self.variables))
        used = [
            [values if taken else None for values, taken in zip(source, column, strict=True)]
            for source, column in zip(sources, self.interchanged.T.tolist(), strict=True)
        ]
        rows = list(zip(base, *used, strict=True))
        try:
            hash(rows[0])
        except TypeError:  # values that are drawn and have no hash are each one's own
            return list(range(len(rows)))
        return rows

    def _part(self, rows: Tensor) -> Counterfactuals:
        return Counterfactuals(
            self.variables, **{one.name: _rows(getattr(self, one.name), rows) for one in fields(self)[1:]}
        )

    def __repr__(self) -> str:
        shares = [
            f"{label} in {100 * float((self.base_labels == label).float().mean()):.1f} %"
            for label in self.base_labels.unique().tolist()
        ]
        together = self.interchanged.float().mean(0)
        which = [f"{name} in {100 * float(share):.0f} %" for name, share in zip(self.variables, together, strict=True)]
        told = " and ".join(self.variables if bool((together == 1).all()) else which)
        return (
            f"Counterfactuals: {number_of(len(self), 'example')}, {told} interchanged\n"
            f"  the label changes in {100 * float(self.changed.float().mean()):.1f} %; of the base it is "
            f"{', '.join(shares[:MOST_LABELS])}{' ...' * (len(shares) > MOST_LABELS)}"
        )


def _rows(held: Any, rows: Tensor) -> Any:
    """These rows of tensors and columns, and of mappings of them."""
    if isinstance(held, Tensor):
        return held[rows]
    if isinstance(held, Mapping):
        return {name: _rows(one, rows) for name, one in held.items()}
    return [held[row] for row in rows.tolist()] if rows.dim() else held[int(rows)]
