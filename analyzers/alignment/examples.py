"""Counterfactual data as a network takes them: rows of the base and of the sources, in one batch each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.alignment.counterfactuals import Counterfactuals
from analyzers.prompts import prompts
from analyzers.protocol import AnalyzerError, device_of
from fmr.ids import Site

Inputs = Mapping[str, Tensor]
"""What a model is called with, by name; a tensor alone has the empty one."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of interchanges: inputs of the base, of each variable's sources, and what is interchanged in which row."""

    base: Inputs
    sources: Mapping[str, Inputs]
    interchanged: Mapping[str, Tensor]
    labels: Tensor
    base_labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: Tensor) -> Examples:
        """Some of the rows."""
        return Examples(
            taken(self.base, rows),
            {name: taken(one, rows) for name, one in self.sources.items()},
            {name: one[rows] for name, one in self.interchanged.items()},
            self.labels[rows],
            self.base_labels[rows],
        )

    def batches(self, size: int) -> list[Examples]:
        """All rows in their order, so many at once."""
        return [self.rows(rows) for rows in torch.arange(len(self)).split(size)]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, in one order."""
        inputs = (self.base, *self.sources.values(), self.interchanged)
        return (*(value for one in inputs for value in one.values()), self.labels, self.base_labels)

    @property
    def several(self) -> tuple[Inputs, dict[str, Tensor]]:
        """The inputs of all sources that are used, in one batch, and by variable where those of each row are in it."""
        parts, places, before = [], {}, 0
        for name, which in self.interchanged.items():
            rows = which.nonzero()[:, 0]
            parts.append(taken(self.sources[name], rows))
            places[name] = torch.arange(before, before + len(rows))
            before += len(rows)
        return {key: torch.cat([part[key] for part in parts]) for key in self.base}, places


def examples_of(data: Counterfactuals, variables: Sequence[str], model: nn.Module, tokenizer: Any) -> Examples:
    """Counterfactual data on the model's device, texts as tokens: of base and sources in one batch, padded alike."""
    unknown = [name for name in data.variables if name not in variables]
    if unknown:
        raise AnalyzerError(
            f"The data interchange {unknown[0]!r}, and the subspaces are those of {', '.join(variables)}. Expected a "
            f"subspace for each variable: {{{unknown[0]!r}: rotation[:4], ...}}."
        )
    names = ("", *data.variables)
    given = [data.base, *(data.sources[name] for name in data.variables)]
    if isinstance(data.base, list):
        if tokenizer is None:
            raise AnalyzerError(
                f"The data are texts, as {data.base[0]!r}, and there is no tokenizer. Pass one: tokenizer=, or let encode= "
                "return token ids."
            )
        flat = prompts([text for texts in given for text in texts], model, tokenizer).inputs
        named: list[Inputs] = [taken(flat, torch.arange(len(data)) + len(data) * part) for part in range(len(given))]
    else:
        device = device_of(model)
        maps = [one if isinstance(one, Mapping) else {"": one} for one in given]
        for key, value in ((key, value) for one in maps for key, value in one.items()):
            if not isinstance(value, Tensor):
                raise AnalyzerError(
                    f"encode= returns {key or 'inputs'!r} as a {type(value).__name__}. Expected tensors by name, as a "
                    "tokenizer returns them, or one text for each setting and nothing else."
                )
        named = [{key: value.to(device) for key, value in one.items()} for one in maps]
    by_name = dict(zip(names, named, strict=True))
    for name in data.variables:
        _check_shapes(by_name[""], by_name[name], name)
    which = dict(zip(data.variables, data.interchanged.T, strict=True))
    return Examples(by_name.pop(""), by_name, which, data.labels, data.base_labels)


def check_data(*several: Any) -> None:
    """Raise for what are no counterfactual data."""
    for data in several:
        if data is not None and not isinstance(data, Counterfactuals):
            raise AnalyzerError(
                f"The data are a {type(data).__name__}, expected Counterfactuals: causal_model.counterfactuals(1000, ['x'])."
            )


def check_lengths(data: Examples, site: Site) -> None:
    """Raise for a source that has fewer or more tokens than its base, where a site means all of them."""
    if isinstance(site.positions, (int, list)) or "attention_mask" not in data.base:
        return
    lengths = (data.base["attention_mask"] != 0).sum(1)
    for name, source in data.sources.items():
        own = (source["attention_mask"] != 0).sum(1)
        odd = (data.interchanged[name].to(own.device) & (own != lengths)).nonzero()[:, 0].tolist()
        if odd:
            raise AnalyzerError(
                f"Example {odd[0]} has {int(lengths[odd[0]])} tokens, and its source for {name!r} {int(own[odd[0]])}, so "
                f"that the positions of {site!r} do not correspond. Expected as many, or a site of single ones: "
                "site.at(positions=-1)."
            )


def _check_shapes(base: Inputs, source: Inputs, name: str) -> None:
    shapes = [{key: tuple(one.shape[1:]) for key, one in inputs.items()} for inputs in (base, source)]
    if shapes[0] != shapes[1]:
        told = [", ".join(f"{key} {shape}".strip() for key, shape in one.items()) for one in shapes]
        raise AnalyzerError(
            f"An example of the base has the shape {told[0]}, and of the sources for {name!r} {told[1]}. Expected the same: "
            "encode= returns one shape for all settings; pad what is shorter."
        )


def taken(inputs: Inputs, rows: Tensor) -> dict[str, Tensor]:
    """Some rows of inputs."""
    return {name: value[rows.to(value.device)] for name, value in inputs.items()}


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Inputs as arguments of a call, by place and by name."""
    return tuple(value for name, value in inputs.items() if not name), {k: v for k, v in inputs.items() if k}
