"""Which rule of `fmr.locate` decides what: `python etc/census/rules.py [--quick]`.

Each function of `fmr.structure` is switched off, one at a time: it answers with what its annotation calls empty, and what is
located is found again in the runs of many models. A rule that changes the answer for none is dead, or no model tests it.
"""

import argparse
import importlib
import inspect
import multiprocessing
import pathlib
import pkgutil
import signal
import sys
import time
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # what is measured is the checkout in which this file stands
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import torch

import fmr
import fmr.structure

PROCESSES = 2
SECONDS = 60
"""How long one search may take: one that a missing rule sends round in a circle has another answer."""

ANSWERS = ("fmr.structure.parts",)
"""How an answer is given and printed: no rules."""

CLASSES = {"none": 0, "1": 1, "2-3": 3, "4-20": 20, "> 20": sys.maxsize}
"""For how many models a rule changes the answer, each with the largest number of its class."""

ROLES = "q k v scores pattern z".split()
SIZES = "out n_heads n_kv_heads head_dim kind scope".split()
MEMORY = "pre post out w_in w_gate w_out n scope".split()
"""What is told of an attention, of each of its values and of the whole, and of a memory."""

EMPTY: dict[Any, Callable[..., Any]] = {
    None: lambda *args, **kwargs: None,
    bool: lambda *args, **kwargs: False,
    str: lambda *args, **kwargs: "",
    tuple: lambda *args, **kwargs: (),
    list: lambda *args, **kwargs: [],
    set: lambda *args, **kwargs: set(),
    frozenset: lambda *args, **kwargs: frozenset(),
    dict: lambda *args, **kwargs: {},
    iter: lambda *args, **kwargs: iter(()),
}
"""What takes the place of a function, by what it returns."""


class Rule(NamedTuple):
    """A function that can be switched off: its name, how long it is, and what answers in its place."""

    name: str
    lines: int
    function: types.FunctionType
    empty: Callable[..., Any]


class Seen(NamedTuple):
    """What one model told: which rules answer anything at all, and which change the answer; or why it tells nothing."""

    kind: str
    name: str
    answering: frozenset[str] = frozenset()
    deciding: frozenset[str] = frozenset()
    error: str = ""


class OverlongError(Exception):
    """A search that does not end."""


@cache
def modules() -> list[types.ModuleType]:
    """Every file of `fmr.structure` that has rules."""
    names = [found.name for found in pkgutil.walk_packages(fmr.structure.__path__, "fmr.structure.")]
    return [importlib.import_module(name) for name in names if name not in ANSWERS]


@cache
def rules() -> list[Rule]:
    """The functions and methods of these files that have an empty answer."""
    found = []
    for module in modules():
        own = [one for one in vars(module).values() if getattr(one, "__module__", "") == module.__name__]
        methods = [one for cls in own if isinstance(cls, type) for one in vars(cls).values() if not is_special(one)]
        for one in dict.fromkeys(inspect.unwrap(one) for one in (*own, *methods) if isinstance(one, types.FunctionType)):
            empty = EMPTY.get(emptied(one.__annotations__.get("return", Any)))
            if empty is not None and one.__module__ == module.__name__ and not one.__code__.co_freevars:
                name = f"{module.__name__.removeprefix('fmr.structure.')}.{one.__qualname__}"
                found.append(Rule(name, len(inspect.getsourcelines(one)[0]), one, empty))
    return found


def is_special(method: Any) -> bool:
    return getattr(method, "__name__", "__").startswith("__")


def emptied(hint: Any) -> Any:
    """The key in EMPTY of what a type calls empty; one that is in no table where it has nothing empty."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and type(None) in inner:
        return None
    if origin is tuple and Ellipsis not in inner:
        return Any
    name = getattr(origin, "__name__", "")
    alike = {"Iterator": iter, "Iterable": iter, "Sequence": tuple, "Mapping": dict, "Collection": frozenset}
    return alike.get(name, origin or hint)


@contextmanager
def switched_off(rule: Rule) -> Iterator[None]:
    """Let a function answer with nothing wherever it is named, in tables too: its code is exchanged."""
    code = rule.function.__code__
    rule.function.__code__ = rule.empty.__code__
    try:
        yield
    finally:
        rule.function.__code__ = code


def forget() -> None:
    """Empty what functions remember of graphs."""
    for known in remembered():
        known.clear()


@cache
def remembered() -> list[MutableMapping[Any, Any]]:
    """The mappings in which functions keep what they were asked."""
    every = [one for module in modules() for one in vars(module).values() if inspect.isfunction(one)]
    every = [one for one in every if hasattr(one, "__wrapped__")]
    kept = [known for one in every for known in inspect.getclosurevars(one).nonlocals.values()]
    return [known for known in kept if isinstance(known, MutableMapping)]


def answer(run: fmr.Run) -> str:
    """What is located in words, without the numbers of certificates; an error is an answer too."""
    forget()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return repr(told(fmr.locate(run)))
    except Exception as error:
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def told(found: Any) -> list[Any]:
    """A structure part by part."""
    attention = [[getattr(block, what) for what in (*ROLES, *SIZES)] for block in found.attention]
    layouts = [[getattr(block, role).layout for role in ROLES] for block in found.attention]
    memories = [[getattr(block, what) for what in MEMORY] for block in found.mlps]
    streams = [(one.points, one.writes, one.writers) for one in found.streams]
    parts = [([a.pattern for a in one.attentions], [m.post for m in one.mlps]) for one in found.layers]
    resid = [(one.resid_pre, one.resid_mid, one.resid_post) for one in found.layers]
    ends = found.embedding, found.unembedding, found.final_norm
    return [attention, layouts, memories, streams, parts, resid, ends, found.rejected]


@contextmanager
def answering(every: Sequence[Rule]) -> Iterator[set[str]]:
    """The names of those that answer with anything, while they are watched."""
    names, heard = {rule.function.__code__: rule.name for rule in every}, set()

    def hear(frame: types.FrameType, event: str, value: Any) -> None:
        if event == "return" and frame.f_code in names and not is_empty(value):
            heard.add(names[frame.f_code])

    sys.setprofile(hear)
    try:
        yield heard
    finally:
        sys.setprofile(None)


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, str, tuple, list, set, frozenset, dict)) and not value)


def of_case(name: str) -> fmr.Run:
    """The run of an idiom case, a model that the tests know."""
    from tests.structure.test_idioms import CASES, SIZES, ran

    return ran(CASES[name], *SIZES[0])[0]


def of_type(name: str) -> fmr.Run:
    """The run of a tiny model of the census."""
    import tinymodels

    model, inputs = tinymodels.build(name)
    with fmr.track(model) as run:
        tinymodels.run(model, inputs)
    return run


RUNS = {"cases": of_case, "types": of_type}
"""The kinds of models, and how one is run."""


def names(quick: bool) -> list[tuple[str, str]]:
    """Every model by its kind."""
    from tests.structure.test_idioms import CASES

    cases = [("cases", name) for name in CASES]
    if quick:
        return cases
    import measure

    return [*(("types", name) for name in measure.QUICK), *cases]


def seen(model: tuple[str, str]) -> Seen:
    """Run one model once, and locate in that run once for each rule that answers anything there."""
    kind, name = model
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, overlong)
    every = rules()
    try:
        run = RUNS[kind](name)
    except Exception as error:
        return Seen(kind, name, error=f"{type(error).__name__}: {error}")
    with answering(every) as heard:
        whole = answer(run)
    deciding = set()
    for rule in every:
        if rule.name in heard:
            with switched_off(rule):
                if answer(run) != whole:
                    deciding.add(rule.name)
    return Seen(kind, name, frozenset(heard), frozenset(deciding))


def overlong(number: int, frame: types.FrameType | None) -> None:
    raise OverlongError(f"A search took more than {SECONDS} s.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the idiom cases of the tests alone")
    quick, began = parser.parse_args().quick, time.perf_counter()
    told = []
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for one in pool.imap_unordered(seen, names(quick)):
            told.append(one)
            if sys.stderr.isatty():
                print(f"\r{len(told)} models, {time.perf_counter() - began:.0f} s ", end="", file=sys.stderr)
    report(rules(), told)
    return int(any(one.error for one in told))


def report(every: Sequence[Rule], told: Sequence[Seen]) -> None:
    """A line for each rule, the one that decides most first, and how many decide how much."""
    decided = {kind: Counter(name for one in told if one.kind == kind for name in one.deciding) for kind in RUNS}
    answered = Counter(name for one in told for name in one.answering)
    number = {rule.name: sum(known[rule.name] for known in decided.values()) for rule in every}
    width = max(len(rule.name) for rule in every)
    print(f"{'rule':{width}s} lines  cases  types  answers in")
    for rule in sorted(every, key=lambda rule: (-number[rule.name], rule.name)):
        cases, types = (known[rule.name] for known in decided.values())
        print(f"{rule.name:{width}s} {rule.lines:5d} {cases:6d} {types:6d} {answered[rule.name]:11d}")
    print(f"\nthe answer changes for   rules  lines   (of {sum(not one.error for one in told)} models)")
    for name, alike in classes(every, number).items():
        print(f"{name:22s} {len(alike):7d} {sum(rule.lines for rule in alike):6d}")
    for one in told:
        if one.error:
            print(f"error in {one.name}: {one.error}")


def classes(every: Sequence[Rule], number: Mapping[str, int]) -> dict[str, list[Rule]]:
    """The rules of each class."""
    found: dict[str, list[Rule]] = {name: [] for name in CLASSES}
    for rule in every:
        found[next(name for name, most in CLASSES.items() if number[rule.name] <= most)].append(rule)
    return found


if __name__ == "__main__":
    sys.exit(main())
