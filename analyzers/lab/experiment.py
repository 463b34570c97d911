"""A function whose every call is kept: its code, arguments, seed and result."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn

from analyzers.lab.bench import Bench
from analyzers.lab.code import Code, canonical, check_function, code_of
from analyzers.lab.errors import LabError
from analyzers.lab.identity import Moment
from analyzers.lab.ledger import Attempt, as_json, now
from analyzers.lab.measure import Meter, checked_seed, environment, seeded
from analyzers.lab.tools import code_of_tool
from analyzers.lab.values import Packed, pack, renamed
from analyzers.lab.version import Version
from fmr.disk.files import digest

R = TypeVar("R")


class Call(NamedTuple):
    """One call as it will be made: its arguments, the same as they are kept, the names that the lab fills in, the seed."""

    arguments: dict[str, Any]
    packed: Packed
    lent: list[str]
    seed: int

    def called(self, words: Mapping[str, str]) -> Call:
        """The same with other words for models."""
        return self._replace(packed=self.packed._replace(told=renamed(self.packed.told, words)))


class Experiment(Generic[R]):
    """A function of which a lab keeps every call.

    >>> @lab.experiment
    ... def tripled(x):
    ...     return {"triple": 3 * x}
    >>> tripled(7)
    {'triple': 21}
    >>> tripled.record(7)
    tripled ...  tripled(x=7) seed 0 -> {'triple': 21}

    `seed=` may be given with any call. Parameters without a default that are called `model`, `tokenizer` or like a tool of
    the lab are given by the lab; whoever gives them does so by keyword.
    """

    def __init__(self, lab: Bench, function: Callable[..., R], name: str | None = None, seed: int | None = None) -> None:
        self.name = check_function(function, name)
        self.lab, self.function, self.signature = lab, function, inspect.signature(function)
        self.seed = checked_seed(_own_seed(self.signature) if seed is None else seed)
        self._source = code_of(function).source  # as it is now: a file may be edited while it runs
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        return self._run(args, kwargs)[0]

    def record(self, *args: Any, **kwargs: Any) -> Version:
        """Run it, and return the version that was kept instead of the result."""
        _, version = self._run(args, kwargs)
        return self.lab.version(version)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[R, str]:
        call = self._call(args, kwargs)
        code = code_of(self.function, self._moment)
        code = code._replace(source=self._source, uses=code.uses | self._tools(call))
        own = None if self.lab.model is None else self._moment(self.lab.model)
        with Attempt(self.lab.ledger, self.name, _given(call, own)) as attempt:
            with seeded(call.seed), Meter() as meter:
                value = self._called(call.arguments | {name: self.lab.given(name) for name in call.lent})
            try:
                words = _compared([*call.packed.models, *code.models, *filter(None, [own])])
                call, code = call.called(words), code.called(words)
                took = {"seconds": meter.seconds, "memory": meter.memory}
                version = self._keep(attempt, value, call, code, {**_given(call, own), **took})
            except LabError as error:
                error.result = value
                raise
        return value, version

    def _moment(self, model: nn.Module) -> Moment:
        """A model as it is now, less what runs of this experiment change of it."""
        return Moment(model, self.name)

    def _tools(self, call: Call) -> dict[str, str]:
        return {f"tool {name}": code_of_tool(self.lab.tools[name]) for name in call.lent if name in self.lab.tools}

    def _called(self, arguments: dict[str, Any]) -> R:
        """The function's own call, each argument in its place."""
        bound = inspect.BoundArguments(self.signature, OrderedDict((n, arguments[n]) for n in self.signature.parameters))
        return self.function(*bound.args, **bound.kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The arguments as the function takes them: those given, the lab's own, and defaults."""
        names = self.signature.parameters
        by_lab = [name for name, one in names.items() if name in self.lab.names and one.default is one.empty]
        own = {name: value for name, value in kwargs.items() if name not in by_lab and (name != "seed" or "seed" in names)}
        given = {name: kwargs[name] for name in by_lab if name in kwargs}
        rest = self.signature.replace(parameters=[one for name, one in names.items() if name not in by_lab])
        try:
            bound = rest.bind_partial(*args, **own)
            if "seed" in names:
                bound.arguments.setdefault("seed", self.seed)
            bound = rest.bind(*bound.args, **bound.kwargs)
        except TypeError as error:
            raise LabError(
                f"{self.name} cannot be called so ({error}). Expected {self.name}{rest}"
                + (f"; the lab gives {', '.join(by_lab)}." if by_lab else ".")
            ) from None
        bound.apply_defaults()
        seed = checked_seed(bound.arguments["seed"] if "seed" in names else kwargs.get("seed", self.seed))
        every = {**bound.arguments, **given}
        return Call(
            every,
            pack(every, "arguments", lambda one: code_of(one).text, self._moment),
            [name for name in by_lab if name not in given],
            seed,
        )

    def _keep(self, attempt: Attempt, value: Any, call: Call, code: Code, given: dict[str, Any]) -> str:
        result = pack(value, "result")
        files, model = call.packed.files | result.files, json.loads(given["model"])
        content = {
            "name": self.name,
            "source": code.source,
            "uses": code.uses,
            "arguments": call.packed.told,
            "seed": call.seed,
            "model": [model.get("fingerprint"), model.get("settings")],
            "result": _bare(result.told),
        }
        version = hashlib.sha256(canonical(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        row = {
            **given,
            "version": version,
            "name": self.name,
            "made": now(),
            "source": code.source,
            "uses": as_json(code.uses),
            "result": as_json(result.told),
            "files": as_json({name: digest(data) for name, data in files.items()}),
        }
        attempt.finish(row, files)
        return version

    def __repr__(self) -> str:
        return f"Experiment({self.name}{self.signature}, seed={self.seed}) of {self.lab.folder}"


def _given(call: Call, own: Moment | None) -> dict[str, Any]:
    """What went into a call, as columns of the database."""
    return {
        "arguments": as_json(call.packed.told),
        "seed": call.seed,
        "model": as_json({} if own is None else own.told),
        "environment": as_json(environment()),
    }


def _compared(models: Sequence[Moment]) -> dict[str, str]:
    """By the word of each model that was run and changed by that, the one in which this change tells no more."""
    words = [one.word for one in models]
    for one in models:
        one.compare()
    return {word: one.word for word, one in zip(words, models, strict=True) if one.word != word}


def _own_seed(signature: inspect.Signature) -> Any:
    """The seed that a function has as the default of its own; 0 where it has none."""
    own = signature.parameters.get("seed")
    return 0 if own is None or own.default in (None, own.empty) else own.default


def _bare(told: Any) -> Any:
    """JSON without what results print, which another version of the library may word otherwise."""
    if isinstance(told, list):
        return [_bare(item) for item in told]
    if isinstance(told, dict):
        return {key: _bare(item) for key, item in told.items() if key != "says"}
    return told
