"""What a tracked block leaves: passes, and what is asked of the last of them."""

from __future__ import annotations

import os
from typing import Any, SupportsIndex, overload

from torch import Tensor

from fmr.edits.editor import Editor, Receipts
from fmr.errors import IdError, TrackError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nests import Nest
from fmr.nodes import Key, Node, id_of
from fmr.pictures.notebook import preformatted
from fmr.runs.failures import Failure
from fmr.runs.gradients import Gradients
from fmr.runs.passes import Pass
from fmr.runs.verify import Verdict, verify


class Passes(list[Pass]):
    """The passes of a run in order, by number."""

    @overload
    def __getitem__(self, number: SupportsIndex) -> Pass: ...

    @overload
    def __getitem__(self, number: slice) -> list[Pass]: ...

    def __getitem__(self, number: Any) -> Any:
        try:
            return super().__getitem__(number)
        except (IndexError, TypeError):
            many = f"{len(self)} pass{'es' * (len(self) != 1)}"
            expected = f"a number below {len(self)}" if self else "a call of the model before"
            raise IdError(f"passes[{number!r}] of a run of {many}: expected {expected}.") from None


class Run:
    """One tracked execution: `run[id]` is a value, `run.graph` the graph, `run.passes` one entry for each model call.

    >>> run = fmr.run(model, input_ids)
    >>> run["transformer.h.0.attn/softmax#0"].shape
    torch.Size([1, 4, 6, 6])

    Of several passes `run.graph`, `run.output` and `run.grad` are those of the last, and `run[id]` is the value in the last
    that has the ID. Values are references: they live as long as the run, and the memory of keep="all" is that of the
    storages.
    """

    def __init__(self) -> None:
        self.passes = Passes()
        self.editors: list[Editor] = []

    @property
    def last(self) -> Pass:
        """The last pass."""
        if not self.passes:
            raise TrackError("Nothing has run yet: call the model inside the block before reading from the run.")
        return self.passes[-1]

    @overload
    def __getitem__(self, key: TensorId | Node | Site) -> Tensor: ...

    @overload
    def __getitem__(self, key: Key) -> Any: ...

    def __getitem__(self, key: Key) -> Any:
        """The value of an ID, a node, a site or the path of a module in the last pass that has it."""
        last = self.last
        try:
            return last[key]
        except IdError:
            holder = next((one for one in reversed(self.passes[:-1]) if key in one), None)
            if holder is None or id_of(key) in last:  # it is there, but the selection is none of it
                raise
            return holder[key]

    def __contains__(self, key: Key) -> bool:
        return any(key in one for one in reversed(self.passes))

    @property
    def graph(self) -> Graph:
        """The graph of the last pass."""
        return self.last.graph

    @property
    def failed(self) -> Failure | None:
        """Which module call of the last pass raised, if one did; the error has this run as `error.run`."""
        return self.last.failed

    @property
    def output(self) -> Nest:
        """What the model returned in the last pass; without grad=True its tensors are cut off from the autograd history."""
        return self.last.output

    def verify(self) -> Verdict:
        """Run every op of the last pass again on what it read: the strongest check of a recording.

        >>> bool(run.verify())
        True

        It needs a run with every value (keep="all"). Ops that drew random numbers are named as not made again.
        """
        return verify(self.graph, self.last.as_read, self.last.casts)

    @property
    def receipts(self) -> Receipts:
        """What each edit did: how often it fired, how many elements it changed, and by how much.

        >>> fmr.run(model, input_ids, edits={site: edits.Zero()}).receipts[site]
        Receipt: fired 1 time, changed 768 elements by ... (L2 norm)
        """
        return Receipts.of(self.editors)

    @property
    def grad(self) -> Gradients:
        """The gradients of the last pass, by ID."""
        return self.last.grad

    def save(self, path: str | os.PathLike[str], *, params: bool = False) -> None:
        """Write every pass to one file, or to a folder where the path has no suffix or is one; `fmr.load` reads it.

        >>> run.save("facts.fmr")
        >>> fmr.load("facts.fmr")["transformer.h.0.attn/softmax#0"].shape
        torch.Size([1, 4, 6, 6])

        params: store parameters and buffers too; they belong to the model, which has its own files. Graphs, kept values
        and gradients are saved, `run.output` is not. A killed writer leaves the earlier save whole; one that is saved over
        keeps its permissions, and a link stays one. A value that has no plain elements (sparse, nested, meta) is a
        `StoreError` before anything is written.
        """
        from fmr.runs.store import save_run

        save_run(self, path, params)

    def __repr__(self) -> str:
        if not self.passes:
            return "Run: nothing has run yet"
        if len(self.passes) == 1:
            return f"Run of one pass: {self.passes[0]!r}"
        return f"Run of {len(self.passes)} passes\n  " + "\n  ".join(
            f"[{n}] {one!r}" for n, one in enumerate(self.passes[:8])
        )

    _repr_html_ = preformatted
