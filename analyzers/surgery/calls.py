"""How the layers of a stream are called while they are operated on: each at its place, and what they keep state in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.protocol import AnalyzerError
from analyzers.surgery.numbers import Counter, number
from fmr.nests import leaves
from fmr.structure.proof.evaluate import own_work

_PLAIN = (Tensor, int, float, complex, str, type(None), torch.dtype, torch.device)

Placed = Mapping[str, nn.Module]
"""By path what was put there, in the order in which the places are called."""


class State:
    """What happens where layers are given something to keep state in: they get numbers of their places there, or a refusal.

    A layer keeps its own number until then, and gets another only where that changes no bit of what it computes.
    """

    def __init__(self, reason: str, asked: Sequence[tuple[nn.Module, int]], counted: Sequence[Counter]) -> None:
        self.reason, self.asked, self.counted = reason, asked, counted
        self.before: list[tuple[nn.Module, str, int]] = []
        self.done, self.lock = False, Lock()

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See to what a layer is given."""
        kept = None if self.done else next((one for one in (*args, *kwargs.values()) if not _is_plain(one)), None)
        if kept is None:
            return
        if self.reason:
            raise AnalyzerError(
                f"The layers are given a {type(kept).__name__} to keep state in, and {self.reason}: one layer would read "
                "what another left there. Expected a run without a cache: use_cache=False."
            )
        with self.lock:
            if not self.done:
                self._renumber(args, kwargs, type(kept).__name__)

    def _renumber(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], kept: str) -> None:
        given = tuple(one if _is_plain(one) else None for one in args)
        named = {name: one if _is_plain(one) else None for name, one in kwargs.items()}
        for module, to in self.asked:
            own = _answer(module, given, named)
            self.before += number(module, self.counted, to)
            if not _same(own, _answer(module, given, named)):
                self.back()
                raise AnalyzerError(
                    f"The layers are given a {kept} to keep state in by their numbers, and with another number a "
                    f"{type(module).__name__} computes something else. Expected a run without a cache: use_cache=False."
                )
        self.done = True

    def back(self) -> None:
        """Give the layers the numbers that they had."""
        while self.before:
            setattr(*self.before.pop())
        self.done = False


class Calls:
    """The order in which what was put into the places of a stream is called, which proves that the code runs it."""

    def __init__(self, expected: Sequence[str]) -> None:
        self.expected, self.proven = tuple(expected), False
        self.seen: dict[int, list[str]] = {}

    def enter(self, path: str) -> None:
        """What lies at a path is called."""
        if not self.proven:
            self.seen.setdefault(get_ident(), []).append(path)

    def start(self, *_: Any) -> None:
        """A call begins that holds the whole stream."""
        self.seen.pop(get_ident(), None)

    def end(self, module: nn.Module, *_: Any) -> None:
        """Such a call ends: raise where the places were not called as they lie, which they are in turn, once or more."""
        if self.proven or not self.expected:
            return
        seen, n = self.seen.pop(get_ident(), []), len(self.expected)
        if len(seen) % n or not seen or any(path != self.expected[at % n] for at, path in enumerate(seen)):
            raise AnalyzerError(
                f"The surgery takes no effect: {type(module).__name__} called {', '.join(seen) or 'nothing'} of what was "
                f"put into its modules, expected {', '.join(self.expected)}. Its code runs layers that it keeps elsewhere, "
                "as in a list of its own; expected code that runs the modules where they are registered."
            )
        self.proven = True


def watch(model: nn.Module, placed: Placed, new: Sequence[str], above: Sequence[str], state: State, undo: ExitStack) -> None:
    """Hear the calls of what lies in the places of a stream.

    new: the paths where something else lies than before. above: those of modules of which one call holds the whole stream.
    """
    calls = Calls(new)
    undo.callback(state.back)

    def entered(path: str) -> Callable[..., None]:
        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path in calls.expected:
                calls.enter(path)
            state(args, kwargs)

        return hear

    for path, module in placed.items():
        undo.callback(module.register_forward_pre_hook(entered(path), with_kwargs=True).remove)
    for path in above:
        undo.callback(model.get_submodule(path).register_forward_pre_hook(calls.start).remove)
        undo.callback(model.get_submodule(path).register_forward_hook(calls.end).remove)


def _answer(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What a layer computes without state."""
    try:
        with own_work(), torch.no_grad(), torch.random.fork_rng([]):
            return [tensor for _, tensor in leaves(module.forward(*args, **kwargs))]
    except Exception as error:  # whatever code raises that wants its state
        raise AnalyzerError(
            f"Whether a {type(module).__name__} computes with its number cannot be told: without state it raises "
            f"{type(error).__name__} ({str(error)[:80]}). Expected a run without a cache: use_cache=False."
        ) from error


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in zip(one, other, strict=True)
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return all(map(_is_plain, value.values())) if isinstance(value, dict) else isinstance(value, _PLAIN)
