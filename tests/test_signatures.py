"""Signatures of public names read as they are written: by the names of types, not by what those stand for."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import analyzers
import fmr
import fmr.sweeps

HOUSES = (fmr, fmr.edits, fmr.sweeps, fmr.zoo, analyzers, analyzers.images)


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public class and function, and the methods of the former."""
    for house in HOUSES:
        for name in house.__all__:
            one = getattr(house, name)
            if inspect.isclass(one) or inspect.isfunction(one):
                yield f"{house.__name__}.{name}", one
            for method, found in inspect.getmembers(one, inspect.isfunction) if inspect.isclass(one) else ():
                if not method.startswith("_"):
                    yield f"{house.__name__}.{name}.{method}", found


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.__name__)
def test_no_type_is_spelled_out(house: Any) -> None:
    spelled = ("fmr.nodes.OfCall", "numpy.dtype", "collections.abc.Callable[[torch.Tensor", "list[list[int]]")
    found = {}
    for name, one in public():
        if name.startswith(house.__name__ + "."):
            try:
                shown = str(inspect.signature(one))
            except ValueError:
                continue
            if any(part in shown for part in spelled):
                found[name] = shown
    assert found == {}
