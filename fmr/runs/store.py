"""Runs on disk: one file, or a folder with the graphs as JSON beside the values. No pickle; loading executes nothing.

A set of elements is written once. IDs that show the same elements, as they are, reshaped, transposed or expanded, share
one entry with strides of their own. Loading reads no value: `run[id]` reads that one, and verifies its checksum.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmr.disk.files import (
    decode,
    digest,
    encode,
    is_folder,
    named,
    read_whole,
    replacing,
    seal,
    understood,
    unseal,
    write_whole,
)
from fmr.disk.tensors import Entry, TensorFile, bytes_of, in_order, write_tensors
from fmr.edits.frames import Columns, Frame
from fmr.errors import IdError, StoreError
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nests import map_ids
from fmr.runs.passes import Pass
from fmr.runs.run import Passes, Run
from fmr.watching.calls import unwatched
from fmr.watching.storage import storage_key

_GRAPH = "graph.json"
_OF_MODEL = ("param:", "buffer:")
_OURS = re.compile(r"values-[0-9a-f]{32}\.safetensors|\.(values-[0-9a-f]{32}\.safetensors|graph\.json)\.[0-9a-f]{8}\.tmp")


def load(path: str | os.PathLike[str]) -> Run:
    """Open a run that `run.save` wrote.

    >>> run.save("facts.fmr")
    >>> run = fmr.load("facts.fmr")
    >>> run["transformer.h.0.attn/softmax#0"].shape
    torch.Size([1, 4, 6, 6])

    Only what is asked for is read: `run.graph` no value, `run[id]` that one, as a new tensor in main memory. The file
    stays open as long as the run lives. `run.output` is None: what the model returned is not saved.
    A file that is missing, damaged, foreign or newer is a `StoreError`, here or when the damaged value is read.
    """
    where = named(path)
    run = Run()
    with unwatched(), understood(str(where)):
        body, file = _open_folder(where) if is_folder(where) else _open_file(where)
        run.passes = Passes(_restored(number, row, file, str(where)) for number, row in enumerate(body["passes"]))
    return run


def save_run(run: Run, path: str | os.PathLike[str], params: bool) -> None:
    """Write every pass of a run: its graph, its kept values and its gradients, whole or not at all."""
    _ = run.last  # a run of nothing is an error
    where = named(path)
    with unwatched():
        content = _Content(params)
        passes = [content.add(number, one) for number, one in enumerate(run.passes)]
        entries = in_order(content.reads)
        contents = (bytes_of(_elements(content.reads[entry]())) for entry in entries)
        body = {"passes": passes, "entries": entries}
        if where.suffix and not is_folder(where):
            _write_file(where, body, entries, contents)
        else:
            _write_folder(where, body, entries, contents)


# ---- the elements that a tensor shows


def _order(value: Tensor) -> list[int]:
    """The dimensions that move through memory, the outermost first; expanded ones do not move."""
    stride = value.stride()
    moving = [d for d in range(value.dim()) if stride[d] != 0 or value.size(d) == 0]
    return sorted(moving, key=lambda d: -stride[d])


def _elements(value: Tensor) -> Tensor:
    """Each element that a tensor shows, once, in the order of memory, contiguous in main memory."""
    order = _order(value)
    still = [d for d in range(value.dim()) if d not in order]
    elements = value.detach().as_subclass(Tensor).permute((*order, *still))
    for _ in still:
        elements = elements.select(-1, 0)
    return elements.resolve_conj().resolve_neg().cpu().contiguous()


def _stride(value: Tensor) -> list[int]:
    """The strides that show the value over its `_elements`."""
    stride, step = [0] * value.dim(), 1
    for d in reversed(_order(value)):
        stride[d] = step
        step *= max(value.size(d), 1)
    return stride


def _identity(value: Tensor) -> Hashable:
    """Equal for two living tensors that show the same elements in the same order of memory."""
    blocks: list[tuple[int, int]] = []
    strides = value.stride()
    for d in _order(value):
        size, stride = value.size(d), strides[d]
        if blocks and blocks[-1][1] == size * stride:
            blocks[-1] = blocks[-1][0] * size, stride
        elif size != 1:
            blocks.append((size, stride))
    place = storage_key(value), value.storage_offset(), value.dtype, value.is_conj(), value.is_neg()
    return (*place, tuple(blocks))


def _refuse(name: str, value: Tensor) -> None:
    """Raise for a value that has no plain elements."""
    ordinary = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
    plain = value.layout == torch.strided and not value.is_nested and not value.is_quantized and value.device.type != "meta"
    if not (ordinary and plain):
        kind = f"{'nested ' * value.is_nested}{type(value).__name__}, layout {value.layout}, device {value.device}"
        raise StoreError(
            f"{name!r} cannot be saved: dtype {value.dtype}, {kind}. Expected dense tensors with data. Track with a keep= "
            f"that leaves it out, or save the graph alone: run.graph.save(path)."
        )


# ---- writing


class _Content:
    """What a run holds, as entries to write: `reads` gives the tensor that shows an entry's elements."""

    def __init__(self, params: bool) -> None:
        self.params = params
        self.reads: dict[Entry, Callable[[], Tensor]] = {}
        self._known: dict[Hashable, str] = {}
        self._alive: list[Tensor] = []

    def add(self, number: int, one: Pass) -> dict[str, Any]:
        """One pass in plain types; its tensors become entries."""
        kept = [name for name in one.kept if self.params or not name.startswith(_OF_MODEL)]
        values = {name: partial(one.__getitem__, name) for name in kept}
        grads = {name: partial(one.grad.__getitem__, name) for name in kept if one.history and _has_gradient(one, name)}
        return {
            "graph": None if one._graph is None else one._graph.to_dict(),
            "history": one.history,
            "cast": one.cast,
            "values": {name: self._view(f"{number}:{name}", one.values, name, read) for name, read in values.items()},
            "grads": {
                name: self._view(f"{number}:grad:{name}", one.stored_grads, name, read) for name, read in grads.items()
            },
            "lost": [name for name, slot in one.slots.items() if slot is None and name not in one.values],
            "returned": {name: encode(nest) for name, nest in one.returned.items()},
            "places": dict(one.places),
            "number": one.number,
            "columns": [[n, frame.past, _listed(frame.mask), *frame[2:]] for n, frame in one.frames()],
            "unheard": getattr(one.columns, "is_open", False),
            "unsaved": [*one.unsaved, *(name for name in one.kept if name not in kept)],
        }

    def _view(self, entry: str, owner: Any, name: TensorId, read: Callable[[], Tensor]) -> list[Any]:
        """The entry, shape and strides of a value; an entry is made where its elements are not yet known."""
        value = read()
        _refuse(name, value)
        # the values of a loaded run are new tensors at each reading, so that their place in memory says nothing;
        # that of all others does while they live
        if isinstance(owner, Stored):
            identity = owner.identity(name)
        else:
            identity = _identity(value)
            self._alive.append(value)
        if identity not in self._known:
            elements = _elements(value)
            kind = str(value.dtype).removeprefix("torch.")
            self.reads[Entry(entry, kind, tuple(elements.shape), digest(bytes_of(elements)))] = read
            self._known[identity] = entry
        return [self._known[identity], list(value.shape), _stride(value)]


def _listed(mask: Tensor | None) -> Any:
    return None if mask is None else mask.tolist()


def _has_gradient(one: Pass, name: TensorId) -> bool:
    with suppress(IdError):
        return one.grad[name] is not None
    return False


def _write_file(path: Path, body: dict[str, Any], entries: list[Entry], contents: Iterator[memoryview]) -> None:
    """All in one safetensors file, the sealed JSON as its last tensor: a header of the format ends at 100 MB."""
    sealed = seal("run", body)
    with replacing(path) as file:
        write_tensors(file, [*entries, _graph_entry(len(sealed))], _then(contents, sealed))


def _graph_entry(length: int) -> Entry:
    return Entry(_GRAPH, "uint8", (length,), "")


def _then(contents: Iterator[memoryview], last: bytes) -> Iterator[bytes | memoryview]:
    yield from contents
    yield last


def _write_folder(folder: Path, body: dict[str, Any], entries: list[Entry], contents: Iterator[memoryview]) -> None:
    """The values under a name of their own, then the graphs, which name them; then what no graph names is removed."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        why = f"{folder} cannot be made a folder ({error.strerror})."
        raise StoreError(f"{why} Expected an existing folder, or a new name in one.") from None
    values = f"values-{digest(seal('entries', {'entries': entries}))}.safetensors"
    with _alone(folder):
        with replacing(folder / values, like=folder / _GRAPH) as file:
            write_tensors(file, entries, contents)
        write_whole(folder / _GRAPH, seal("run", {**body, "file": values}))
        for stale in folder.iterdir():
            if _OURS.fullmatch(stale.name) and stale.name != values:
                with suppress(OSError):
                    stale.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time save into a folder, where the system has locks; a killed one holds none."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# ---- reading


class Strided(NamedTuple):
    """How an ID shows an entry: shape and strides over its elements."""

    entry: Entry
    shape: list[int]
    stride: list[int]


class Stored(Mapping[TensorId, Tensor]):
    """Tensors by ID in an open file, each read when it is asked for."""

    def __init__(self, file: TensorFile, views: dict[TensorId, Strided]) -> None:
        self._file, self._views = file, views

    def __getitem__(self, name: TensorId) -> Tensor:
        entry, shape, stride = self._views[name]
        with unwatched(), understood(str(self._file.path)):
            return self._file.elements(entry).as_strided(shape, stride)

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def __iter__(self) -> Iterator[TensorId]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def identity(self, name: TensorId) -> Hashable:
        """Equal for two IDs that show the same elements."""
        return id(self._file), self._views[name].entry.name

    @property
    def nbytes(self) -> int:
        """The bytes of all entries."""
        return sum(entry.nbytes for entry in {view.entry for view in self._views.values()})


def _open_file(path: Path) -> tuple[dict[str, Any], TensorFile]:
    file = TensorFile(path, "a run that run.save(path) wrote")
    sealed = file.text(_GRAPH)
    body = unseal("run", sealed, str(path))
    _expect(file, body, [_graph_entry(len(sealed))])
    return body, file


def _open_folder(folder: Path) -> tuple[dict[str, Any], TensorFile]:
    """Both files of a folder; a save that comes between the reading of the first and the second is followed."""
    sealed = b""
    while True:
        before, sealed = sealed, read_whole(folder / _GRAPH, f"the {_GRAPH} of a run that run.save(path) wrote")
        body = unseal("run", sealed, str(folder / _GRAPH))
        try:
            with understood(str(folder / _GRAPH)):
                file = TensorFile(folder / Path(body["file"]).name, f"the values that {_GRAPH} names")
            _expect(file, body, [])
            return body, file
        except StoreError:
            if sealed == before:
                raise


def _expect(file: TensorFile, body: dict[str, Any], last: list[Entry]) -> None:
    with understood(str(file.path)):
        entries = [Entry(name, dtype, tuple(shape), mark) for name, dtype, shape, mark in body["entries"]]
    file.expect([*entries, *last])


def _restored(number: int, row: dict[str, Any], file: TensorFile, source: str) -> Pass:
    """A pass whose values stay in the file until they are asked for; its graph is made on first use."""

    def stored(views: dict[str, list[Any]]) -> Stored:
        return Stored(file, {TensorId(name): Strided(file.entries[at[0]], at[1], at[2]) for name, at in views.items()})

    def graph() -> Graph:
        return Graph.from_dict(row["graph"], source)

    why = f"belongs to the model and {source} was saved without it. Save with run.save(path, params=True)."
    unsaved = {TensorId(name): f"{name!r} {why}" for name in row["unsaved"]}
    lost = [TensorId(name) for name in row["lost"]]
    made = graph if row["graph"] is not None else None
    given = {TensorId(name): map_ids(TensorId, decode(nest)) for name, nest in row.get("returned", {}).items()}
    one = Pass.of_file(row["history"], stored(row["values"]), stored(row["grads"]), lost, unsaved, given, made)
    if "columns" in row:
        known = [
            (n, Frame(past, None if mask is None else torch.tensor(mask), *more)) for n, past, mask, *more in row["columns"]
        ]
        one.columns = Columns.of_file(known, bool(row.get("unheard")))
    one.number, one.cast = row.get("number", number), str(row.get("cast", ""))
    one.places = {TensorId(name): str(where) for name, where in row.get("places", {}).items()}
    return one
