"""What settings of images, objectives and transformations may be: numbers, sites, and names that say the same each time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from analyzers.protocol import AnalyzerError, check_counts
from fmr.nodes import Key, is_key, no_key

SEEDS = 2**63 - 1024
"""Seeds are below this number."""


def check_number(name: str, value: Any, least: float = -math.inf, above: float = -math.inf) -> None:
    """Raise for what is no finite number, less than `least`, or not above `above`."""
    plain = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if plain and math.isfinite(value) and value >= least and value > above:
        return
    bounds = f" from {least:g} on" if math.isfinite(least) else f" above {above:g}" if math.isfinite(above) else ""
    raise AnalyzerError(f"{name}={value!r}: expected a finite number{bounds}.")


def check_choice(name: str, value: Any, *choices: int) -> None:
    """Raise for what is none of a few whole numbers."""
    if isinstance(value, bool) or value not in choices:
        raise AnalyzerError(f"{name}={value!r}: expected {' or '.join(map(str, choices))}.")


def check_switch(name: str, value: Any, *others: object) -> None:
    """Raise for what is neither True nor False, nor one of a few others."""
    if not isinstance(value, bool) and not any(value is one for one in others):
        raise AnalyzerError(f"{name}={value!r}: expected {' or '.join(map(str, (True, False, *others)))}.")


def check_seed(seed: Any) -> None:
    """Raise for what is no seed of random numbers."""
    check_counts(0, seed=seed)
    if seed >= SEEDS:
        raise AnalyzerError(f"seed={seed}: expected a whole number below 2**63 - 1024.")


def check_steps(steps: Any, seed: Any, progress: Any) -> None:
    """Raise for what is no number of steps, no seed, or neither shows a bar nor hides it."""
    check_counts(1, steps=steps)
    check_seed(seed)
    check_switch("progress", progress, None)


def check_site(site: Any) -> Key:
    """A site as it was given, or an error for what names none, or several."""
    if not is_key(site):
        raise AnalyzerError(f"{no_key(site)}")
    name = str(site) if isinstance(site, str) else ""
    if any(sign in name for sign in "*?"):
        raise AnalyzerError(
            f"{name!r} is a pattern, and one site is read. Expected an ID, the path of a module or a role; "
            "run.graph.find(pattern) lists what there is."
        )
    return site


def name_of(function: Any) -> str:
    """A function or an object in words that are the same in another process."""
    told = repr(function)
    if " at 0x" not in told:
        return told
    return str(getattr(function, "__name__", type(function).__name__))
