"""Small models of every kind of error that was found, each of which says what is true of it, in the sizes that mislead."""

from types import ModuleType

import pytest

from tests.structure.kinds import (
    attacks,
    base,
    claimed,
    constants,
    crashes,
    decoding,
    ends,
    hidden,
    new,
    no_memories,
    opaque,
    reasons,
    streams,
    triples,
)
from tests.structure.kinds.truth import SIZES, Model, faults, ran

FILES = (
    attacks,
    base,
    claimed,
    constants,
    crashes,
    decoding,
    ends,
    hidden,
    new,
    no_memories,
    opaque,
    reasons,
    streams,
    triples,
)


def kinds(file: ModuleType) -> list[type[Model]]:
    """The models of a file; those that only others are made of say so by `case`."""
    own = (kind for name, kind in vars(file).items() if isinstance(kind, type) and not name.startswith("_"))
    return [one for one in own if issubclass(one, Model) and one.__module__ == file.__name__ and "case" not in vars(one)]


MODELS = {f"{file.__name__.rpartition('.')[2]} {kind.__name__}": kind for file in FILES for kind in kinds(file)}


def sizes(number: int, kind: type[Model]) -> list[str]:
    """The usual size, and another in turn: every model in each of them takes minutes."""
    known = [size for size in SIZES if size not in kind.skip]
    return list(dict.fromkeys((known[0], known[number % len(known)])))


CASES = [
    pytest.param(name, size, marks=pytest.mark.long if place else ())
    for number, (name, kind) in enumerate(MODELS.items())
    for place, size in enumerate(sizes(number, kind))
]


def test_there_are_models_of_every_kind() -> None:
    assert len(MODELS) > 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "size"), CASES)
def test_a_model_is_what_it_says_of_itself(name: str, size: str) -> None:
    run, truth = ran(MODELS[name], SIZES[size])
    assert faults(run, truth) == []
