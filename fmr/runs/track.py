"""Opening a tracked block: what to keep decides who watches."""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack

from fmr.errors import IdError, TrackError, nearest
from fmr.graph.build import Builder
from fmr.graph.expand import all_inside
from fmr.graph.graph import Graph
from fmr.graph.paths import nothing_at
from fmr.ids import ALIAS, OPAQUE, TensorId, outer_op
from fmr.nests import Nest, ids_in, item_at, leaves, map_at, outputs, tree_map
from fmr.nodes import Node, scope_of, source_node
from fmr.ops.fused import is_fused
from fmr.ops.names import Op
from fmr.runs.keep import Keep, Wanted, check_place, nothing, parse
from fmr.runs.run import Pass, Run, graph_of, last_graph
from fmr.watching.calls import unwatched, watching
from fmr.watching.guard import Guard
from fmr.watching.inside import value_inside
from fmr.watching.plan import Reader, Stop, ops_of
from fmr.watching.recorder import Recorder
from fmr.watching.scopes import Names, walk
from fmr.watching.storage import storage_key
from fmr.watching.tape import EXIT, RAISED, Event, Slot, Tape

Emit = Callable[[Event], None]


@contextmanager
def track(
    model: nn.Module | None = None,
    *,
    keep: Keep = "all",
    to: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    grad: bool = False,
    stop: bool = False,
) -> Iterator[Run]:
    """Record every tensor operation of a model while it runs inside the block.

    >>> with fmr.track(model) as run:
    ...     model(**inputs)
    >>> run["transformer.h.0.attn/softmax#0"].shape
    torch.Size([1, 4, 6, 6])

    model: the root of the IDs; without it each outermost module call in the block is a root. Each call of it is a pass.
    keep: "all" values, "none" (the graph alone), IDs, paths of modules for what their calls return ("h.3.mlp"), nodes,
        sites, globs over IDs and paths ("*attn*/softmax#*", "h.*.mlp"), or a predicate on nodes. A set of IDs and paths
        costs about what hooks cost: only the module calls that hold them are watched, and no graph is made.
    to, dtype: where and in which type to keep values, as "cpu" and torch.float32. grad: keep the autograd history and
    gradients, for `run.grad[id]` after `backward()`. stop: end the forward after the last of the kept IDs; what follows
    the model's call in the block is then not run.

    The misuse to know: values are references. What is overwritten inside the block is saved first; after the block it
    is not.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TrackError(
            f"fmr.track got {type(model).__name__}, expected a torch.nn.Module. Pass the module itself, or no model to "
            f"track whatever module runs inside the block."
        )
    check_place(to, dtype)
    wanted = parse(keep, model)
    if stop and (wanted.plan is None or wanted.globs):
        raise TrackError(f"stop=True with keep={keep!r}: expected a set of IDs, after the last of which to stop.")
    run = Run()
    tracker = _Tracker(run, wanted, to, dtype, grad, stop)
    watcher = tracker.watcher(model)
    try:
        with watching(watcher), watcher if isinstance(watcher, Recorder) else nullcontext():
            yield run
    except Stop as stopped:
        if stopped.args[0] is not watcher:
            raise
        stopped.__traceback__ = None  # whose frames hold values
    finally:
        if isinstance(watcher, Recorder):
            watcher.guard.close()
    if not run.passes:
        raise TrackError(_nothing_ran(model, watcher))
    tracker.check_reached(model, watcher)


def run(
    model: nn.Module,
    *args: Any,
    keep: Keep = "all",
    to: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    grad: bool = False,
    stop: bool = False,
    **kwargs: Any,
) -> Run:
    """Call the model once under `fmr.track` and return the run; without grad=True no autograd history is made.

    >>> fmr.run(model, input_ids, keep="*softmax#*").graph
    Graph of GPT2LMHeadModel: 228 ops in 55 module calls, reading 1 input, 52 params
    ...

    The named arguments are those of `fmr.track`; all others go to the model.
    """
    with track(model, keep=keep, to=to, dtype=dtype, grad=grad, stop=stop) as result:
        with nullcontext() if grad else torch.no_grad():
            model(*args, **kwargs)
    return result


class _Tracker:
    """Fills the passes of a run from what a watcher sees."""

    def __init__(self, run: Run, wanted: Wanted, to: Any, dtype: Any, grad: bool, stop: bool) -> None:
        self.run, self.to, self.dtype, self.grad = run, to, dtype, grad
        self.keep = wanted
        self.ids, self.globs, self.wanted, self.plan = wanted.ids, wanted.globs, wanted.predicate, wanted.plan
        self.stop, self.guard = stop, Guard()
        self.lacking: dict[TensorId, str] = {}

    def watcher(self, model: nn.Module | None) -> Recorder | Reader:
        if self.plan is not None:
            return Reader(model, self.plan, self._new_pass, self._deliver, self._end_plan, self.stop)
        if self.wanted is None and self.to is None and self.dtype is None:
            return Recorder(model, self._begin_tape, self._end, self.guard)
        return Recorder(model, self._begin_stream, self._end, self.guard)

    def _new_pass(self, here: Pass | None = None) -> Pass:
        here = here or Pass(self.grad)
        self.run.passes.append(here)
        return here

    def _end(self, tape: Tape) -> None:
        self.run.passes[-1].output = tape.output

    # ---- every value as it is: the tape is the record, and the graph is made when it is asked for

    def _begin_tape(self, tape: Tape) -> Emit:
        here = self._new_pass(Pass.of_tape(tape, self.guard, self.grad))
        self.guard.add_tape(tape)
        self.guard.history = self.grad
        if not self.grad:
            return tape.events.append
        for name, tensor in tape.sources():
            _hook(tensor, here, Slot(tape.number, name=name))

        def emit(event: Event) -> None:
            if isinstance(event[0], Op):
                place = tape.number, len(tape.events)
                for index, tensor in outputs(event[3]):
                    _hook(tensor, here, Slot(*place, index))
            tape.events.append(event)

        return emit

    # ---- some values, or all of them elsewhere: each event becomes nodes at once

    def _begin_stream(self, tape: Tape) -> Emit:
        with torch._C.DisableTorchFunction():
            here, builder, done = self._new_pass(), Builder(tape), 0
            known: dict[str, Node] = {}
            for name, tensor in tape.sources():
                if self.wanted is None or self.wanted(source_node(name, tensor)):
                    self.guard.keep(tensor, Slot(tape.number, name=name))

        def keep_new() -> None:
            nonlocal done
            for place in range(done, len(builder.nodes)):
                node, value = builder.nodes[place], builder.values[place]
                if value is not None and (self.wanted is None or self.wanted(node)):
                    self._keep(here, node.id, self.guard.saved.get(builder.slots[place], value), tape)
                builder.values[place] = None
            done = len(builder.nodes)

        def emit(event: Event) -> None:
            with torch._C.DisableTorchFunction():
                call = builder.calls[-1].path
                builder.feed(event)
                keep_new()
                if event[0] is EXIT and event[1] is not RAISED and self.wanted is not None:
                    self._keep_returned(here, builder, call, event[1], tape)
            if isinstance(event[0], Op) and self.wanted not in (None, nothing) and is_fused(builder.nodes[-1]):
                known.update((node.id, node) for node in builder.nodes[len(known) :])
                self._keep_inner(here, builder.nodes[-1], known, event)
            if not builder.calls:
                self.guard.reading = None
                here.end(graph_of(builder, tape.root), self.guard.saved)

        self.guard.reading, self.guard.history = builder.reading, self.grad
        return emit

    def _keep(self, here: Pass, name: TensorId, value: Tensor, tape: Tape) -> None:
        kept = self._cast(value)
        slot = Slot(tape.number, name=name, cast=kept is not value)
        here.keep(name, kept, slot)
        if self.grad:
            _hook(value, here, slot)
        if kept is value and not name.is_source:
            self.guard.keep(value, slot)

    def _keep_returned(self, here: Pass, builder: Builder, path: str, out: Any, tape: Tape) -> None:
        """Keep what a module call returned, if that is wanted, under the IDs of its values."""
        wanted = self.keep.of_call(path)
        if wanted:
            names = next(scope.output for scope in reversed(builder.scopes) if scope.path == path)
            tensors = tree_map(lambda tensor: tensor, out)
            for at in wanted:
                values = leaves(item_at(tensors, at))
                for name, (_, value) in zip(ids_in(item_at(names, at)), values, strict=True):
                    if name not in here.values:
                        self._keep(here, name, value, tape)

    def _keep_inner(self, here: Pass, node: Node, known: dict[str, Node], event: Event) -> None:
        """Compute the wanted values inside a fused op while its arguments are at hand."""
        assert self.wanted is not None
        for inner in all_inside(node, ChainMap({}, known)):
            if self.wanted(inner):
                value = value_inside(inner.id, node.op, scope_of(node), event[1], event[2] or {})
                if value is not None:
                    here.keep(inner.id, self._cast(value))

    # ---- a few IDs: only what the plan delivers

    def _deliver(self, name: TensorId, value: Nest, shared: bool, at: str | None) -> None:
        """Take a planned value, or the tensors that a module call returned, each under the call's path and its position."""
        if at is None:
            self._take(name, value, shared)
            return
        with unwatched() if _len_torch_function_stack() else nullcontext():
            if value.__class__ is Tensor and not at:
                self._take(name, value, True)
                return
            path = name.removesuffix(f":{at}") if at else str(name)
            part = item_at(tree_map(lambda tensor: tensor, value), at)
            self.run.passes[-1].returned[name] = map_at(lambda place, tensor: self._part(path, at, place, tensor), part)
            if part is None:
                self.lacking[name] = nothing_at(path, at, tree_map(lambda tensor: tensor, value))

    def _part(self, path: str, at: str, place: str, tensor: Tensor) -> TensorId:
        """Take one tensor that a module call returned."""
        within = ".".join(part for part in (at, place) if part)
        name = TensorId(f"{path}:{within}" if within else path)
        self._take(name, tensor, True)
        return name

    def _take(self, name: TensorId, value: Tensor, shared: bool) -> None:
        here = self.run.passes[-1]
        if self.grad and shared:
            _hook(value, here, Slot(-1, name=name))
        with unwatched() if _len_torch_function_stack() else nullcontext():
            kept = value if self.grad else value.detach()
            if self.to is not None or self.dtype is not None:
                kept = self._cast(kept)
            alone = not shared or storage_key(kept) != storage_key(value)
            here.keep(name, kept if alone else kept.clone(), Slot(-1, name=name))

    def _end_plan(self, out: Any) -> None:
        self.run.passes[-1].output = out

    def _cast(self, value: Tensor) -> Tensor:
        if self.to is None and self.dtype is None:
            return value
        dtype = self.dtype if value.is_floating_point() else None
        return value.to(device=self.to, dtype=dtype)

    # ---- what was asked for and never came

    def check_reached(self, model: nn.Module | None, watcher: Recorder | Reader) -> None:
        """Raise if a kept ID or glob was met in no pass."""
        for name in self.ids:
            if not any(name in one.values or one.reached(name) for one in self.run.passes):
                raise IdError(self.lacking.get(name) or self._unreached(name, model, watcher))
        for pattern in self.globs:
            if not any(fnmatchcase(name, pattern) for one in self.run.passes for name in one.names()):
                raise IdError(
                    f"keep={pattern!r} matched no value of the run. Expected a glob over IDs such as '*attn*/softmax#*' or "
                    f"over the paths of modules; fmr.run(model, *inputs, keep='none').graph lists them."
                )

    def _unreached(self, name: TensorId, model: nn.Module | None, watcher: Recorder | Reader) -> str:
        if model is not None:
            Names(model)  # which refuses a model with a compiled part
        graph = last_graph.get(model) if model is not None else None
        where = _uncalled(name, model) if name.is_path else ""
        if isinstance(watcher, Reader) and not name.is_path:
            where = _departure(name, graph, watcher.ran)
        known = [*(graph.calls if graph else ()), *(path for path, _ in (walk(model) if model is not None else ()))]
        values = [n for one in self.run.passes for n in one.values] + (list(graph.ids()) if graph else [])
        known = [*known, *values] if name.is_path else [*values, *known]
        return f"No pass reached {str(name)!r}.{where}{nearest(name, (n for n in dict.fromkeys(known) if n != name))}"


def _hook(value: Tensor, here: Pass, slot: Slot) -> None:
    """Store the gradient of a value when backward reaches it; that of a parameter or another leaf is its own `.grad`."""
    if value.is_leaf:
        here.leaves[slot] = value
    elif value.requires_grad:
        grads = here.grads

        def add(grad: Tensor) -> None:
            grads[slot] = grads[slot] + grad if slot in grads else grad

        value.register_hook(add)


def _nothing_ran(model: nn.Module | None, watcher: Recorder | Reader) -> str:
    if watcher.foreign:
        return (
            f"fmr saw {len(watcher.foreign)} module calls on other threads (first: {type(watcher.foreign[0]).__name__}) and "
            f"none on the thread that opened the block. A TorchFunctionMode sees its own thread only: open fmr.track in "
            f"the thread that calls the model."
        )
    if model is not None and watcher.missed:
        met, kind = watcher.missed[0], type(model).__name__
        path = next((path for path, module in walk(model) if module is met), None)
        if path is not None:
            return (
                f"The tracked {kind} was never called inside the block; its module {path!r} was. Call the model itself, "
                f"model(**inputs): model.forward(**inputs) is no call. Or track the module that you call."
            )
        other = f"another {kind}" if type(met) is type(model) else type(met).__name__
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
        return (
            " No module of that path is registered and none was called. Expected a path as in model.named_modules(), or an "
            "ID such as 'h.0.attn/softmax#0', with an empty scope for the root: '/add#0'."
        )
    if others:
        return f" The module is registered as {', '.join(map(repr, others[:3]))} too, and its calls may go by that name."
    return " Its module was not called: if it was run by .forward(x), that is no call, only module(x) is."


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
