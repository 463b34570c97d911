"""Causal models for tests, and what they say by going through them one setting at a time."""

from collections.abc import Mapping
from typing import Any

from analyzers import CausalModel


def equality(values: Any = range(5), **settings: Any) -> CausalModel:
    """Whether the first two of four agree as the last two do."""
    functions = {"wx": lambda a, b: a == b, "yz": lambda c, d: c == d, "out": lambda wx, yz: wx == yz}
    return CausalModel(dict.fromkeys("abcd", values), functions, **settings)


def sums() -> CausalModel:
    """Sums of three digits, of which two are added first; an input leads to the output along two ways."""
    functions = {"left": lambda a, b: a + b, "right": lambda b, c: b * c, "out": lambda left, right: (left + right) % 7}
    return CausalModel(dict.fromkeys("abc", range(6)), functions)


def by_hand(model: CausalModel, inputs: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all variables, from the functions alone."""
    found: dict[str, Any] = {}
    for name, one in model.variables.items():
        given = [found[parent] for parent in one.parents]
        found[name] = fixed[name] if name in fixed else one.function(*given) if one.function else inputs[name]
    return found
