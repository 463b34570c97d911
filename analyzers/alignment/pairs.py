"""How counterfactual data are made: pairs of inputs drawn in balance, run, labelled, and written as a network takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from analyzers.alignment.counterfactuals import Counterfactuals
from analyzers.alignment.tables import array, kept
from analyzers.alignment.variables import Column, Columns, plain
from analyzers.circuits.choice import Bools
from analyzers.numbers.embed import Ints
from analyzers.protocol import AnalyzerError, check_counts
from fmr.errors import whole_number

if TYPE_CHECKING:
    from analyzers.alignment.causal_model import CausalModel

FIRM = 50
"""So many times a base with the wanted output is drawn before one with any other is taken as well."""

Encode = Callable[[dict[str, Any]], Any]
Drawn = dict[tuple[str, str], Column]
"""By run (base, or the variable that a source is for) and input; under "output" that without and with the interchange."""


def counterfactuals(
    model: CausalModel,
    n: int,
    variables: Sequence[str] | None,
    *,
    seed: int,
    balanced: bool,
    changed: float,
    subsets: Sequence[Sequence[str]] | None,
    encode: Encode | None,
    label: Callable[[Any], int] | None,
    labels: int | None,
) -> Counterfactuals:
    """Pairs of inputs with the output of an interchange; `CausalModel.counterfactuals` says what the arguments are."""
    check_counts(1, n=n, **({} if labels is None else {"labels": labels}))
    check_counts(0, seed=seed)
    if isinstance(changed, bool) or not isinstance(changed, (int, float)) or not 0 <= changed <= 1:
        raise AnalyzerError(f"changed={changed!r}: expected a share from 0 to 1, as 0.5.")
    names, rng = _interchangeable(model, variables), np.random.default_rng(seed)
    which = _which(names, subsets, n, rng)
    labelled = _labelled(model, label, labels)
    drawn = _pairs(model, names, which, rng, labelled, changed if balanced else None)
    told: dict[str, dict[str, list[Any]]] = {}
    for (of, name), column in drawn.items():
        told.setdefault(of, {})[name] = model.variables[model.output if of == "output" else name].told(column)
    encoded = {of: _encoded(model, told[of], encode) for of in ("base", *names)}
    before, after = (torch.from_numpy(labelled(drawn["output", name])) for name in ("base", "interchanged"))
    return Counterfactuals(names, encoded.pop("base"), encoded, before, after, torch.from_numpy(which), told)


def _pairs(
    model: CausalModel,
    names: Sequence[str],
    which: Bools,
    rng: np.random.Generator,
    labelled: Callable[[Column], Ints],
    changed: float | None,
) -> Drawn:
    """Bases, sources, outputs; the interchange changes the label in a share of the rows, None leaves that to chance."""
    mechanism, output, n = model.mechanism, model.output, len(which)

    def drawn(rows: Ints, base: Ints | None, sources: Ints) -> Drawn:
        """Runs of bases with these outputs, and of sources with any of those; without a wish where they are None."""

        def run(wanted: Ints | None) -> Columns:
            wishes = {} if wanted is None else {output: wanted}
            return mechanism.settings(mechanism.draw(len(rows), wishes, rng))

        runs = {"base": run(base)}
        runs |= {name: run(None if base is None else rng.choice(sources, len(rows))) for name in names}
        held = {name: (runs[name][name], which[rows, place]) for place, name in enumerate(names)}
        after = mechanism.settings(runs["base"], held)[output]
        found = {(of, name): columns[name] for of, columns in runs.items() for name in model.inputs}
        return found | {("output", "base"): runs["base"][output], ("output", "interchanged"): after}

    if changed is None:
        return drawn(np.arange(n), None, np.empty(0, np.int64))
    reached, tries = mechanism.reached(output, rng), count()
    bases, wanted = rng.permutation(np.resize(reached, n)), rng.permutation(np.arange(n) < round(changed * n))

    def attempt(rows: Ints) -> tuple[Drawn, Bools]:
        base = bases[rows] if next(tries) < FIRM else rng.choice(reached, len(rows))
        found = drawn(rows, base, reached)
        differs = labelled(found["output", "base"]) != labelled(found["output", "interchanged"])
        return found, differs == wanted[rows]

    return kept(
        n,
        attempt,
        f"Pairs are wanted of which {changed:.0%} have a label that the interchange of {', '.join(names)} changes, and the "
        "others one that it does not. balanced=False leaves it to chance, changed= takes another share",
    )


def _interchangeable(model: CausalModel, given: Sequence[str] | None) -> tuple[str, ...]:
    """The variables to interchange: named, there, each once, and with a way to the output."""
    names = tuple(name for name in model.computed if name != model.output) if given is None else given
    if isinstance(names, str) or not isinstance(names, Sequence) or not names or len(set(names)) < len(names):
        inner = " There is no inner variable to take by default." if given is None else ""
        raise AnalyzerError(f"variables={given!r}: expected names of variables, each once, as ['wx'].{inner}")
    ways = {model.output}
    for name in reversed(model.computed):
        ways |= {*model.variables[name].parents} if name in ways else set()
    for name in names:
        model.values(name)
        if name not in ways:
            raise AnalyzerError(
                f"{name!r} has no way to the output {model.output!r}, so that interchanges of it show nothing. Expected "
                f"some of {', '.join(one for one in model.variables if one in ways)}."
            )
    return tuple(names)


def _which(names: Sequence[str], subsets: Sequence[Sequence[str]] | None, n: int, rng: np.random.Generator) -> Bools:
    """Which variables are interchanged in each row, (n, variables)."""
    if subsets is None:
        chosen = rng.integers(1, 1 << len(names), size=n)
        found: Bools = (chosen[:, None] >> np.arange(len(names)) & 1).astype(bool)
        return found
    sets = [[one] if isinstance(one, str) else list(one) for one in subsets]
    if not sets or not all(one and set(one) <= {*names} for one in sets):
        raise AnalyzerError(f"subsets={subsets!r}: expected lists of some of {', '.join(names)}, none of them empty.")
    rows: Bools = np.array([[name in one for name in names] for one in sets])[rng.integers(len(sets), size=n)]
    return rows


def _labelled(model: CausalModel, label: Callable[[Any], int] | None, labels: int | None) -> Callable[[Column], Ints]:
    """Of a column of outputs the labels, checked."""
    output = model.variables[model.output]
    if label is None and output.numbers is None:
        raise AnalyzerError(
            f"The values of the output {output.name!r} are not known, so that they have no numbers. Expected "
            f"values={{{output.name!r}: [...]}}, or label=, a function from a value to the number of its class."
        )

    def number(value: Any) -> int:
        assert output.numbers is not None or label is not None
        given = plain(label(value)) if label is not None else output.numbers[value]  # type: ignore[index]
        found = int(given) if isinstance(given, bool) else whole_number(given)
        if found is None or found < 0 or (labels is not None and found >= labels):
            among = f"0 to {labels - 1}, a class of the network" if labels is not None else "a whole number from 0 on"
            raise AnalyzerError(
                f"The label of {output.name}={value!r} is {given!r}: expected {among}. Say which it is: "
                f"label=lambda {output.name}: ..."
            )
        return found

    def labelled(column: Column) -> Ints:
        if output.numbers is None:
            return np.array([number(value) for value in output.told(column)], np.int64)
        distinct, back = np.unique(column, return_inverse=True)
        found: Ints = np.array([number(value) for value in output.told(distinct)], np.int64)[back]
        return found

    return labelled


def _encoded(model: CausalModel, inputs: dict[str, list[Any]], encode: Encode | None) -> Any:
    """Columns of inputs as the network takes them."""
    n = len(next(iter(inputs.values())))
    if encode is None:
        for name, column in inputs.items():
            if not isinstance(plain(column[0]), (int, float)):
                raise AnalyzerError(
                    f"{name}={column[0]!r} is no number. Expected encode=, a function from a setting of the inputs to what "
                    f"the network takes: lambda inputs: vectors[inputs[{name!r}]]."
                )
        return torch.tensor(list(zip(*inputs.values(), strict=True)), dtype=torch.float32)
    if model.columns is None:
        return _stacked([encode(dict(zip(inputs, row, strict=True))) for row in zip(*inputs.values(), strict=True)])
    found = encode({name: array(column, model.columns) for name, column in inputs.items()})
    for one in found.values() if isinstance(found, Mapping) else [found]:
        if len(one) != n:
            raise AnalyzerError(f"encode returned {len(one)} rows for {n} settings: expected one for each, (settings, ...).")
    return _tensors(found)


def _tensors(found: Any) -> Any:
    return (
        {name: torch.as_tensor(one) for name, one in found.items()} if isinstance(found, Mapping) else torch.as_tensor(found)
    )


def _stacked(found: list[Any]) -> Any:
    """What was returned setting by setting, as one: tensors with a dimension of settings before their own."""
    if all(isinstance(one, str) for one in found):
        return found
    if all(isinstance(one, Mapping) and one.keys() == found[0].keys() for one in found):
        return {name: _stacked([one[name] for one in found]) for name in found[0]}
    try:
        tensors = [torch.as_tensor(one) for one in found]
    except (TypeError, ValueError, RuntimeError):
        kinds = sorted({type(one).__name__ for one in found})
        raise AnalyzerError(
            f"encode returned {' and '.join(kinds)}. Expected tensors, numbers or lists of them, texts, or mappings of "
            "these with the same names, for each setting."
        ) from None
    odd = next((one for one in tensors if one.shape != tensors[0].shape), None)
    if odd is not None:
        raise AnalyzerError(
            f"encode returned shapes {tuple(tensors[0].shape)} and {tuple(odd.shape)}: expected one shape for all settings, "
            "without a dimension of examples. Pad what is shorter."
        )
    return torch.stack(tensors)
