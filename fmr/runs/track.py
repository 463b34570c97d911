"""Opening a tracked block, and calling a model in one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
from torch import nn

from fmr.edits.editor import Asked, Editor
from fmr.errors import TrackError, whole_number
from fmr.runs.editing import editor_of
from fmr.runs.given import check_given
from fmr.runs.keep import Keep
from fmr.runs.roots import called, entered, unbound
from fmr.runs.run import Run
from fmr.runs.tracker import Tracker


@contextmanager
def track(
    model: nn.Module | None = None,
    *,
    method: str | None = None,
    keep: Keep = "all",
    to: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    grad: bool = False,
    stop: bool = False,
    edits: Asked | None = None,
    optional: bool = False,
    every: int = 1,
) -> Iterator[Run]:
    """Record every tensor operation of a model while it runs inside the block.

    >>> with fmr.track(model) as run:
    ...     model(**inputs)
    >>> run["transformer.h.0.attn/softmax#0"].shape
    torch.Size([1, 4, 6, 6])

    model: the root of the IDs; without it each outermost module call in the block is a root. Each call of it is a pass, and
        so is each call of a module that it registers made outside such a call, under the same IDs.
    method: the name of a method of the model; then its calls are the passes, and no others.
    keep: "all" values, "none" (the graph alone), IDs, paths of modules for what their calls return ("h.3.mlp"), nodes,
        sites, globs over IDs and paths ("*attn*/softmax#*", "h.*.mlp"), or a predicate on nodes. A set of IDs and paths
        costs about what hooks cost: only the module calls that hold them are watched, and no graph is made.
    to, dtype: where and in which type to keep values, as "cpu" and torch.float32. grad: keep the autograd history and
    gradients, for `run.grad[id]` after `backward()`. stop: end the forward after the last of the kept IDs; what follows
    the model's call in the block is then not run.
    edits: what to change while the model runs, by site (an ID, a node, a `Site`, the path of a module): one of `fmr.edits`,
    `f(value, context)`, or several in order. What is kept of a site is what the model went on with; a module's path is
    edited when its call returns, after the user's own hooks. A tensor that a module keeps by name, as `self.last = hidden`,
    is not left there: the attributes are as before after the block. An edit that no pass comes to is an `EditError`, but for
    optional=True. keep=() keeps what is edited alone.
    every: see the first call of the model and each so-many-th after it, as in a training loop; the others run unwatched.
    The number of a pass, `run.passes[2].number`, is that of its call.

    The misuse to know: values are references. What is overwritten inside the block is saved first; after the block it
    is not. An error that leaves the block carries what was recorded, `error.run`, and where it was raised,
    `error.run.failed`.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TrackError(
            f"fmr.track got {type(model).__name__}, expected a torch.nn.Module. Pass the module itself, or no model to "
            f"track whatever module runs inside the block."
        )
    if method is not None and model is None:
        raise TrackError(f"fmr.track got method={method!r} and no model. Expected the model whose method it is.")
    _check_every(every, stop, edits)
    tracker = Tracker(keep, model, to, dtype, grad, stop, _editor(edits, model), optional, operator.index(every))
    watcher = tracker.watcher(model)
    with tracker.watch(model, watcher, method) as watchers:
        if model is None or method is None:
            yield tracker.run
        else:
            with entered(model, method, watchers):
                yield tracker.run


def run(
    model: Callable[..., Any],
    *args: Any,
    method: str | None = None,
    keep: Keep = "all",
    to: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    grad: bool = False,
    stop: bool = False,
    edits: Asked | None = None,
    optional: bool = False,
    **kwargs: Any,
) -> Run:
    """Call the model once under `fmr.track` and return the run; without grad=True no autograd history is made.

    >>> fmr.run(model, input_ids, keep="*softmax#*").graph
    Graph of GPT2LMHeadModel: 228 ops in 55 module calls, reading 1 input, 52 params
    ...
    >>> fmr.run(model, input_ids, edits={"transformer.h.1.mlp": fmr.edits.Zero()}).receipts
    Site('transformer.h.1.mlp'): Receipt: fired 1 time, changed ... elements by ... (L2 norm)

    In the model's place may stand a function that calls modules: its call is the pass, with inputs by its signature, and
    modules are called as the function calls them (its arguments, its closure, the attributes of its object, globals).
    The named arguments are those of `fmr.track`; all others go to the model.
    """
    given, (model, args, kwargs) = kwargs, unbound(model, args, kwargs)
    root, function = called(model, method, args, kwargs)
    check_given(function or root, args, given)
    tracker = Tracker(keep, root, to, dtype, grad, stop, _editor(edits, root), optional)
    watcher = tracker.watcher(root)
    before = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(before and grad)
        with tracker.watch(root, watcher, None) as watchers:
            call = root if function is None else reduce(lambda inner, one: partial(one.enter, inner), watchers, function)
            call(*args, **kwargs)
    finally:
        torch._C._set_grad_enabled(before)
    return tracker.run


def _check_every(every: int, stop: bool, edits: Asked | None) -> None:
    if (whole_number(every) or 0) < 1:
        raise TrackError(f"every={every!r}: expected a whole number from 1 on: each so-many-th call of the model is seen.")
    if every > 1 and (stop or edits is not None):
        name = "stop=True" if stop else "edits="
        raise TrackError(
            f"every={every} with {name}: other calls of the model would run to their end, unedited. Expected one of both."
        )


def _editor(edits: Asked | None, model: nn.Module | None) -> Editor | None:
    return None if edits is None else editor_of(edits, model, run)
