"""What is said where a block saw no pass, or a pass not what was asked for."""

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

from torch import nn

from fmr.errors import nearest
from fmr.graph.graph import Graph
from fmr.graph.hints import below_root, spelled_otherwise, used_name
from fmr.ids import ALIAS, OPAQUE, TensorId, outer_op
from fmr.runs.passes import last_graph
from fmr.runs.run import Run
from fmr.watching.mode import RootWatcher
from fmr.watching.plan import Reader, ops_of
from fmr.watching.scopes import Names, walk


def unreached(name: TensorId, model: nn.Module | None, watcher: RootWatcher, run: Run) -> str:
    """The message for an ID or a path that was asked for and that no pass reached."""
    same = Names(model).same if model is not None else ()  # which refuses a model with a compiled part
    graph = last_graph.get(model) if model is not None else None
    where = _uncalled(name, model) if name.is_path else ""
    if isinstance(watcher, Reader) and not name.is_path:
        where = _departure(name, graph, watcher.ran)
    known = [*(graph.calls if graph else ()), *(path for path, _ in (walk(model) if model is not None else ()))]
    values = [n for one in run.passes for n in one.values] + (list(graph.ids()) if graph else [])
    sources = [group[0] for group in same if name.is_source]
    if isinstance(watcher, Reader) and not name.is_path and not name.is_source:
        values = _that_ran(name, values, watcher.ran)
    known = [*known, *values] if name.is_path else [*values, *known]
    used = "" if name.is_path else used_name(name, same, [*known, *sources])
    return f"No pass reached {str(name)!r}.{where}{used or nearest(name, (n for n in dict.fromkeys(known) if n != name))}"


def unmatched(glob: str, watcher: RootWatcher, run: Run) -> str:
    """The message for a glob that matched nothing, with the nearest of what there was."""
    graphs = [] if isinstance(watcher, Reader) else [one.graph for one in run.passes]
    known = list(dict.fromkeys(name for graph in graphs for name in (*map(str, graph.ids()), *filter(None, graph.calls))))
    text = glob.translate(dict.fromkeys(map(ord, "*?[]"))) or glob
    close = below_root(glob, lambda short: any(fnmatchcase(name, short) for name in known)) or nearest(text, known)
    return (
        f"keep={glob!r} matched no value of the run. Expected a glob over IDs such as '*attn*/softmax#*' or over the paths "
        f"of modules; fmr.run(model, *inputs, keep='none').graph lists them.{close}"
    )


def _that_ran(name: TensorId, known: list[TensorId], ran: Mapping[str, Any]) -> list[TensorId]:
    """Of the IDs of a recorded graph those that this run had in the module call of an ID; all where it was not watched."""
    scope = outer_op(name).scope
    counts = Counter(ops_of(ran.get(scope, [])))

    def did_run(one: TensorId) -> bool:
        outer = outer_op(one)
        own = not (one.is_source or one.is_path) and outer.scope == scope
        return own and outer.parts.k < counts[outer.parts.op]

    return [one for one in known if did_run(one)] if scope in ran else known


def nothing_ran(model: nn.Module | None, watcher: RootWatcher, method: str | None) -> str:
    """The message for a block without a pass."""
    if watcher.foreign.count:
        return (
            f"fmr saw {watcher.foreign.count} module calls on other threads or in other tasks (first: "
            f"{watcher.foreign.first}) and none on the thread and in the task that opened the block. A block sees its own "
            f"only: open fmr.track where the model is called."
        )
    if method is not None:
        return (
            f"The method {method!r} of the tracked {type(model).__name__} was never called inside the block. Expected a "
            f"call such as model.{method}(...) there; without method= the calls of the model itself are the passes."
        )
    if model is not None and watcher.missed.count:
        kind = type(model).__name__
        other = f"another {kind}" if watcher.missed.first == kind else watcher.missed.first
        return (
            f"The tracked {kind} was never called inside the block; {other} was. "
            f"Call the tracked module itself, or track the module that you call."
        )
    what = f"The tracked {type(model).__name__} was never" if model is not None else "No module was"
    expected = "Expected a call such as model(**inputs) there. model.forward(**inputs) is none."
    return f"{what} called inside the block. {expected}"


def _uncalled(name: TensorId, model: nn.Module | None) -> str:
    """Why a module had no call of this path, as far as the model's registration shows."""
    registered = list(walk(model)) if model is not None else []
    paths = [path for path, _ in name.readings]
    module = next((module for path, module in registered if path in paths), None)
    others = [path for path, one in registered if one is module and path not in paths]
    if module is None:
        return spelled_otherwise(name, (path for path, _ in registered)) or (
            " No module of that path is registered and none was called. Expected a path as in model.named_modules(), or an "
            "ID such as 'h.0.attn/softmax#0', with an empty scope for the root: '/add#0'."
        )
    if others:
        return f" The module is registered as {', '.join(map(repr, others[:3]))} too, and its calls may go by that name."
    return (
        " Its module was not called: if it was run by .forward(x), that is no call, only module(x) is. Where torch took a "
        "fused way around it without gradients, torch.backends.mha.set_fastpath_enabled(False) takes the plain one."
    )


def _departure(name: TensorId, graph: Graph | None, ran: Mapping[str, Any]) -> str:
    """Where this run left the recorded graph, as far as the watched module call shows."""
    scope = outer_op(name).scope
    if name.is_source:
        return " The pass had no such source."
    if scope not in ran:
        return f" The module call {scope!r} did not take place."
    now = _numbered(ops_of(ran[scope]))
    then = _recorded(graph, scope) if graph is not None else []
    for k, (before, after) in enumerate(zip_longest(then, now)):
        if then and before != after:
            place = f"after {now[k - 1]}" if k else "at its first op"
            return (
                f" In {scope!r} this run left the recorded graph {place}: "
                f"recorded {before or 'nothing more'}, now {after or 'nothing more'}."
            )
    return f" {scope!r} ran {', '.join(now[-6:]) or 'no op'} and nothing of that name."


def _numbered(ops: list[str]) -> list[str]:
    """The ops of a module call in order, each with its running number."""
    counts: Counter[str] = Counter()
    names = []
    for op in ops:
        names.append(f"{op}#{counts[op]}")
        counts[op] += 1
    return names


def _recorded(graph: Graph, scope: str) -> list[str]:
    """The same for a module call of a recorded graph."""
    parts = [n.id.parts for n in graph.nodes if n.scope == scope and not n.id.is_source and n.op not in (OPAQUE, ALIAS)]
    return list(dict.fromkeys(f"{part.op}#{part.k}" for part in parts))
