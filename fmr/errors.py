"""Every error of fmr: what happened with the value, what was expected, what to do."""

import operator
from collections.abc import Iterable
from difflib import get_close_matches


class FmrError(Exception):
    """Root of all errors that fmr raises on purpose."""


class TrackError(FmrError):
    """Tracking was asked for where it cannot see: nothing ran, compiled code, another thread."""


class IdError(FmrError, KeyError):
    """An ID that a graph or a run does not have."""

    __str__ = Exception.__str__  # KeyError would print the message as a quoted string


class RandomError(IdError):
    """A value that depends on random numbers which a kernel keeps to itself."""


class GraphError(FmrError):
    """A graph that breaks one of its own invariants."""


class EditError(FmrError):
    """An edit that does not fit the value, never fired, or cannot be made where it was asked for."""


class ReplayError(FmrError):
    """A part of a recorded run that cannot be run again."""


class StoreError(FmrError):
    """A file that is truncated, damaged, foreign or newer than this version of fmr."""


class ZooError(FmrError):
    """A model of the zoo that does not exist, is damaged, or needs a package that is missing."""


class DrawError(FmrError):
    """A picture that cannot be drawn here."""


class StructureError(FmrError):
    """A question about structure that the graph cannot answer."""


def whole_number(given: object) -> int | None:
    """A number as an int where it is a whole one, of NumPy or torch too; None for anything else, truth values included."""
    try:
        return None if isinstance(given, bool) else operator.index(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def number_of(n: int, one: str, several: str = "") -> str:
    """A number with what it counts, in the singular or the plural.

    >>> number_of(1, "layer"), number_of(3, "layer"), number_of(0, "memory", "memories")
    ('1 layer', '3 layers', '0 memories')
    """
    return f"{n} {one if n == 1 else several or one + 's'}"


_NEAREST = 3
"""How many names an error offers."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The closing sentence of an unknown-name error: the closest names that exist.

    First the same op below the same place (`attn/softmax#0` may lie inside a fused op), then what is spelled alike.
    """
    names = list(known)
    place, slash, last = name.rpartition("/")
    below = [one for one in names if slash and one.startswith(f"{place}/") and one.endswith(f"/{last}")]
    close = list(dict.fromkeys([*below, *get_close_matches(name, names, n=_NEAREST, cutoff=0.5)]))[:_NEAREST]
    return f" Nearest that exist: {', '.join(close)}." if close else ""
