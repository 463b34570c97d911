"""Arguments of the wrong kind are one clear error, before the model runs."""

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.errors import IdError, StoreError, TrackError


class Net(nn.Module):
    """Methods that compute, and such as only make what computes later."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    async def later(self, x: Tensor) -> Tensor:
        return self(x)

    def some(self, x: Tensor) -> Iterator[Tensor]:
        yield self(x)

    async def both(self, x: Tensor) -> AsyncIterator[Tensor]:
        yield self(x)


X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": torch.tensor(1)}, "keep is tensor(1). Expected 'all', 'none', IDs, paths of modules"),
        ({"dtype": torch.int64}, "dtype=torch.int64 has no fractions, expected a type for floating-point values"),
        ({"to": 10**30}, f"to={10**30} names no device"),
        ({"method": ["later"]}, "method is list, expected the name of a method of Net"),
        ({"method": "later"}, "Net.later is a coroutine or a generator: its call only makes one, which runs later."),
        ({"method": "some"}, "Net.some is a coroutine or a generator"),
        ({"method": "both"}, "Net.both is a coroutine or a generator"),
    ],
)
def test_what_a_run_cannot_do_is_told_before_it_runs(given: dict[str, Any], words: str) -> None:
    with pytest.raises(TrackError, match=re.escape(words)):
        fmr.run(Net(), X, **given)
    with pytest.raises(TrackError, match=re.escape(words)), fmr.track(Net(), **given):
        pytest.fail("the block was opened")


@pytest.mark.parametrize("given", [None, 5, torch.ones(2), ["a"], object()])
def test_what_is_no_path_of_a_module_is_told_what_one_is(given: Any) -> None:
    graph = fmr.run(Net(), X).graph
    with pytest.raises(IdError, match=rf"graph.module got {type(given).__name__}, expected the path of a module call"):
        graph.module(given)


@pytest.mark.parametrize("given", [None, 5, b"x", torch.ones(2)])
def test_what_is_no_path_of_a_file_is_told_what_one_is(given: Any) -> None:
    run = fmr.run(Net(), X)
    for use in (fmr.load, run.save, run.graph.save, run.graph.save_svg, fmr.Graph.load):
        with pytest.raises(StoreError, match=r"is no path\. Expected the name of a file"):
            use(given)


@pytest.mark.parametrize("given", [None, 5, torch.ones(2), ["/softmax#0"]])
def test_a_site_of_what_is_no_id_is_refused(given: Any) -> None:
    with pytest.raises(IdError, match=rf"fmr.Site got {type(given).__name__}, expected an ID or the path of a module"):
        fmr.Site(given)


@pytest.mark.parametrize("given", ["a", 2.5, True, {}, [1.5], [[1], [2, 3]], torch.ones(2), 1j, [[[1]]], [[True]], 10**30])
def test_what_is_no_index_is_refused(given: Any) -> None:
    with pytest.raises(IdError, match=r"of a Site at '/softmax#0' is no index\. Expected a whole number, a slice, a list"):
        fmr.Site("/softmax#0", units=given)


@pytest.mark.parametrize("given", [0, -1, slice(1), [0, 1], [], [[0], [1]], range(2), torch.tensor([True, False, True])])
def test_what_is_an_index_is_taken(given: Any) -> None:
    part = fmr.run(Net(), X)[fmr.Site("/softmax#0", units=given)]
    assert part.shape[0] == 2
    assert bool(part.numel()) == (not isinstance(given, list) or bool(given))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([Net(), Net()])

    def forward(self, x: Tensor) -> Tensor:
        return self.h[1](self.h[0](x))


@pytest.mark.parametrize(
    ("glob", "words"),
    [
        ("*sotfmax#*", r"keep='\*sotfmax#\*' matched no value .* lists them\. Nearest that exist: .*softmax#0"),
        ("root.h.*/softmax#0", r"matched no value .* The root has no name in IDs and paths: 'h\.\*/softmax#0'"),
    ],
)
def test_a_glob_that_matches_nothing_offers_what_there_is(glob: str, words: str) -> None:
    with pytest.raises(IdError, match=words):
        fmr.run(Tower(), X, keep=glob)


@pytest.mark.parametrize("given", ["h.0/softmax#0", "h.1"])
def test_a_name_that_begins_with_the_root_is_told_that_it_has_none(given: str) -> None:
    run = fmr.run(Tower(), X)
    for ask in (run.__getitem__, run.graph.__getitem__):
        with pytest.raises(IdError, match=re.escape(f"The root has no name in IDs and paths: {given!r}.")):
            ask(f"root.{given}")
