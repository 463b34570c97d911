"""Walks over whatever is reached from something, and functions that answer once for each graph."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from fmr.graph.graph import Graph

Answer = TypeVar("Answer")

Given = ParamSpec("Given")

Point = TypeVar("Point", bound=Hashable)


def walk(starts: Iterable[Point], onward: Callable[[Point], Iterable[Point]]) -> Iterator[Point]:
    """Some points and all that is reached from them, nearest first, each once."""
    waiting = list(dict.fromkeys(starts))
    seen = set(waiting)
    for here in waiting:
        yield here
        for one in onward(here):
            if one not in seen:
                seen.add(one)
                waiting.append(one)


def cached_per_graph(
    function: Callable[Concatenate[Graph, Given], Answer],
) -> Callable[Concatenate[Graph, Given], Answer]:
    """The same function, which answers once for each graph, as long as that lives, and what else is given: graphs do not
    change."""
    known: WeakKeyDictionary[Graph, dict[object, Answer]] = WeakKeyDictionary()

    @wraps(function)
    def answer(graph: Graph, /, *args: Given.args, **kwargs: Given.kwargs) -> Answer:
        own = known.setdefault(graph, {})
        if args not in own:
            own[args] = function(graph, *args, **kwargs)
        return own[args]

    return answer
