"""Vectors of the same tokens at many sites, of one model or of several, and how alike these are."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyzers.compare.measures import MEASURES
from analyzers.compare.similarities import Similarities
from analyzers.probes.reading import named, real_of, states, vectors
from analyzers.probes.rows import Rows, Sample, digests
from analyzers.prompts import Prompts, prompts
from analyzers.protocol import (
    Analyzer,
    AnalyzerError,
    Batch,
    check_counts,
    check_eval,
    check_other,
    later_tokens,
    nothing_counted,
)
from analyzers.sites import found_in, read_at
from fmr.edits.places import kept
from fmr.errors import number_of, whole_number
from fmr.ids import Site
from fmr.sweeps.bars import hidden

LEAST = 8
"""How many rows say anything."""


class Similarity(Analyzer[Similarities]):
    """How alike what sites hold is, of one model, of several, or of one at several moments of its training.

    >>> analyzers.Similarity(model).over(batches, progress=False).result()
    Similarities of 4 sites over ... rows
      cka         0... to 0...; rows in another order ... to ...
    ...
    >>> analyzers.Similarity({"0": model, "500": model}, sites=["transformer.h.1"]).update(inputs).counted
    '6 rows'

    model: a module, or several by name; names that are numbers, as the steps of a training, are drawn as an axis. sites:
    one, several or by name, of all models; or a mapping from the names of the models to the sites of each. None takes the
    stream after each layer. tokenizer: for texts, or one for each model by name. position: None takes each token, and -1 the
    last of each example, which is what models whose tokenizers differ have in common. measures: any of

    - "cka": linear centred kernel alignment, unbiased: the correlation of the products of pairs of rows;
    - "rsa": the rank correlation of the distances (one less the correlation) of pairs of rows;
    - "procrustes": the sum of products that is left when one set is turned onto the other;
    - "svcca": the mean of the canonical correlations of the directions that hold 99 % of the variance.

    Each is 1 where vectors differ by a turn and a scale alone. Beside each stands its null, the same with the rows of one
    set in another order: it is near 0 for cka and rsa, and far from it for the others where rows are few.
    skip: how many tokens at the start of each example are left out, where each token is a row. most: how many rows are kept,
    chosen by content, in memory for every site; pairs of them take most x most numbers.

    Sources: S. Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019; T. Nguyen et al., "Do Wide
    and Deep Networks Learn the Same Things?", 2021 (unbiased); N. Kriegeskorte et al., "Representational similarity
    analysis", 2008; F. Ding et al., "Grounding Representation Similarity with Statistical Testing", 2021; M. Raghu et al.,
    "SVCCA", 2017.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[Any, nn.Module],
        tokenizer: Any = None,
        sites: Any = None,
        *,
        measures: str | Sequence[str] = tuple(MEASURES),
        position: int | None = None,
        skip: int = 0,
        most: int = 1000,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module) and not model:
            raise AnalyzerError("Similarity got no model, expected a torch.nn.Module or several by name.")
        self.models: dict[str, nn.Module] = {"": model} if isinstance(model, nn.Module) else _by_name(model)
        self.tokenizers = _each(tokenizer, self.models, tokenizer)
        self.measures = (measures,) if isinstance(measures, str) else tuple(measures)
        if not self.measures or not {*self.measures} <= MEASURES.keys():
            raise AnalyzerError(f"measures={measures!r}: expected some of {', '.join(map(repr, MEASURES))}.")
        if position is not None and whole_number(position) is None:
            raise AnalyzerError(f"position={position!r}: expected the number of a token, such as -1, or None for each.")
        check_counts(LEAST, most=most)
        check_counts(0, seed=seed, skip=skip)
        if skip and position is not None:
            raise AnalyzerError(f"skip={skip} with position={position}: expected one of them, as each example is one row.")
        self.position, self.skip = position, operator.index(skip)
        self.most, self.seed = operator.index(most), operator.index(seed)
        given = {name: named(one) for name, one in _each(sites, self.models, sites).items() if one is not None}
        self.sites: dict[str, dict[str, Site]] = given
        self.asked = dict(given)
        self.sample = Sample(self.most)

    def update(self, batch: Batch) -> Similarity:
        """Count the vectors of one batch, in every model.

        >>> analyzers.Similarity(model).update(inputs).counted
        '6 rows'
        """
        values: dict[str, Tensor] = {}
        first: Prompts | None = None
        for name, model in self.models.items():
            check_eval(model)
            given = prompts(batch, model, self.tokenizers[name])
            values |= self._read(name, model, given)
            first = first or given
        assert first is not None
        self.sample.add(_rows(values, first, self.skip))
        return self

    def _read(self, name: str, model: nn.Module, given: Prompts) -> dict[str, Tensor]:
        """What the sites of one model hold, (examples, positions, width) or (examples, width)."""
        with torch.no_grad():
            if name not in self.sites:
                (found,), run = found_in(model, given.inputs, lambda structure: (structure,))
                self.sites[name] = states(found, run)
            sites = self.sites[name]
            run = read_at(model, given.inputs, list(sites.values()))
            read = {}
            for called, site in sites.items():
                by_token = self.position is None and "positions" in kept(site, run[Site(site.id)])
                read[full(name, called)] = vectors(run, site, self.position or 0, by_token, len(given))
        return read

    @property
    def counted(self) -> str:
        """How many rows were counted."""
        return number_of(self.sample.seen, "row") if self.sample.seen else ""

    def merge(self, other: Similarity) -> Similarity:
        """Add what another one of the same models and settings counted on other data, and return this one.

        >>> one, two = (analyzers.Similarity(model).update(inputs) for _ in range(2))
        >>> one.merge(two).counted
        '12 rows'
        """
        check_other(self, other)
        for told, ours, theirs in zip(("settings", "sites"), self._about(), other._about(), strict=True):
            found = told == "sites" and self.asked == other.asked and not (ours and theirs)  # by one of them alone so far
            if ours != theirs and not found:
                raise AnalyzerError(f"merge of two with other {told}: {ours} and {theirs}. Expected the same.")
        self.sites = self.sites or other.sites
        if other.sample.seen:
            self.sample.merge(other.sample)
        return self

    def _about(self) -> tuple[Any, ...]:
        settings = {name: getattr(self, name) for name in ("measures", "position", "skip", "most", "seed")}
        return settings, self.sites

    def result(self, *, progress: bool | None = None) -> Similarities:
        """Compare all pairs of sites on the rows that were counted so far.

        >>> analyzers.Similarity(model, measures="cka").over(batches, progress=False).result()
        Similarities of 4 sites ...
          cka ...

        progress: show a bar; None shows it on a terminal only.
        """
        rows = self.sample.rows() if self.sample.seen else None
        if rows is None:
            raise AnalyzerError(nothing_counted(self.skip))
        if len(rows) < LEAST:
            raise AnalyzerError(
                f"{number_of(len(rows), 'row')} counted so far, expected {LEAST} or more. Call over(batches) "
                "before result()."
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        names, many = tuple(rows.vectors), len(rows.vectors)
        values = {kind: np.full((2, many, many), np.nan) for kind in self.measures}
        bar = tqdm(total=len(self.measures) * many * (many + 1) // 2, desc="pairs", disable=hidden(progress))
        for kind in self.measures:
            form, moved, alike = MEASURES[kind]
            forms = [form(rows.vectors[name].cpu()) for name in names]
            for j in range(many):
                other = moved(forms[j], order)
                for i in range(j + 1):
                    values[kind][0, [i, j], [j, i]] = alike(forms[i], forms[j])
                    values[kind][1, [i, j], [j, i]] = alike(forms[i], other)
                    bar.update()
        bar.close()
        return Similarities(
            names=names,
            models=tuple(self.models),
            owners=tuple(owner for owner, sites in self.sites.items() for _ in sites),
            values={kind: both[0] for kind, both in values.items()},
            nulls={kind: both[1] for kind, both in values.items()},
            widths=tuple(rows.vectors[name].shape[1] for name in names),
            rows=len(rows),
            seen=self.sample.seen,
            seed=self.seed,
            skip=self.skip,
        )


def full(model: str, site: str) -> str:
    """The name of a site among those of several models."""
    return f"{model}: {site}" if model else site


def _by_name(models: Mapping[Any, nn.Module]) -> dict[str, nn.Module]:
    found = {str(name): model for name, model in models.items()}
    if len(found) < len(models) or "" in found:
        raise AnalyzerError(f"The models are called {', '.join(map(repr, models))}: expected a name of its own for each.")
    return found


def _each(given: Any, models: Mapping[str, nn.Module], plain: Any) -> dict[str, Any]:
    """What is given for all models, or for each by its name."""
    named_all = isinstance(given, Mapping) and "" not in models and {str(name) for name in given} == {*models}
    return {str(name): one for name, one in given.items()} if named_all else dict.fromkeys(models, plain)


def _rows(values: Mapping[str, Tensor], given: Prompts, skip: int) -> Rows:
    """Vectors of one batch as rows, a row a token or an example."""
    shapes = {name: tuple(value.shape[:-1]) for name, value in values.items()}
    if len({*shapes.values()}) > 1:
        one, other = next((a, b) for a in shapes for b in shapes if shapes[a] != shapes[b])
        raise AnalyzerError(
            f"{one!r} has vectors for {shapes[one]} and {other!r} for {shapes[other]} of (examples, positions). Expected "
            "the same tokens at both; position=-1 takes the last of each example."
        )
    shape = next(iter(shapes.values()))
    if skip and len(shape) < 2:
        raise AnalyzerError(f"skip={skip} of {next(iter(shapes))!r}, which has one vector an example: expected positions.")
    real = real_of(given, shape)
    chosen = later_tokens(real, skip) if len(shape) == 2 else torch.ones(len(given), dtype=torch.bool)
    places = (real.long().cumsum(1) - 1)[chosen] if len(shape) == 2 else torch.zeros(len(given), dtype=torch.long)
    content = digests(given.inputs, real)[chosen.nonzero()[:, 0].numpy()]
    taken = {name: value[chosen.to(value.device)] for name, value in values.items()}
    return Rows(content, content, places.numpy(), np.zeros(len(places), np.int64), taken)
