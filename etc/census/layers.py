"""The located layers beside the repeated modules of a model: one layer for each entry of a list of modules.

An entry counts where an attention or a memory that is located in it stands in a layer; whether all are located, and stand in
layers, is measured by itself. Where entries write to two streams, each stream has its layer. An entry that holds half layers
in a list of its own, several of each kind, is not believed to be a layer. Not to be believed besides: that a convolution
stack without such lists is one layer, as the blocks of vocoders are.
"""

import re
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from typing import Any

from compare import in_order
from torch import nn


def lists_of(model: nn.Module) -> set[str]:
    """The paths of the lists of modules of a model: also of what is run one after another, where it is all of one class."""
    return {name for name, one in model.named_modules() if isinstance(one, nn.ModuleList) or _is_stack(one)}


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len({type(one) for one in module}) == 1


def of_entries(found: Any, lists: Container[str], calls: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each entry, and whether its parts stand in one layer without others, after those of the entries called before it.

    Where several streams go through several entries of a list, it is one layer in each of these.
    """
    parts = (*found.attention, *found.mlps)
    held = _held(parts, lists)
    owners = {id(part): _owner(list(_entries(part.scope, lists)), held) for part in parts}
    layers = [{owners[id(part)] for part in (*layer.attentions, *layer.mlps)} for layer in found.layers]
    writes = {write.before: n for n, stream in enumerate(found.streams) for write in stream.writes}
    streams = [writes[layer.resid_pre.id] for layer in found.layers]
    own = {entry: [n for n, one in enumerate(layers) if entry in one] for one in layers for entry in one}
    by_list: dict[str, list[str]] = defaultdict(list)
    for entry in sorted(filter(None, own), key=lambda entry: calls.index(entry) if entry in calls else 0):
        by_list[_list_of(entry)].append(entry)
    for entries in by_list.values():
        through = [{streams[n] for n in own[entry]} for entry in entries]
        rising = in_order([own[entry][0] for entry in entries])
        for entry, here, late in zip(entries, through, rising, strict=True):
            shared = sum(sum(stream in one for one in through) > 1 for stream in here)
            alone = all(layers[n] == {entry} for n in own[entry])
            yield entry, late and alone and len(own[entry]) == max(1, shared)


def _held(parts: Sequence[Any], lists: Container[str]) -> dict[str, list[type]]:
    """The kinds of parts that each entry of a list holds."""
    held: dict[str, list[type]] = defaultdict(list)
    for part in parts:
        for entry in _entries(part.scope, lists):
            held[entry].append(type(part))
    return held


def _owner(around: list[str], held: dict[str, list[type]]) -> str:
    """The innermost of the entries around a part that holds all kinds of parts that the outermost does; none is ""."""
    if not around or _of_halves(around, held):
        return ""
    return _joined([entry for entry in around if set(held[entry]) == set(held[around[0]])][-1], held)


def _of_halves(around: list[str], held: dict[str, list[type]]) -> bool:
    """Whether the second entry around a part is in a list of entries of one kind each, several of each."""
    beside = [tuple(held[entry]) for entry in held if len(around) > 1 and _list_of(entry) == _list_of(around[1])]
    return len(set(beside)) == 2 and all(len(kinds) == 1 and beside.count(kinds) > 1 for kinds in beside)


def _joined(entry: str, held: dict[str, list[type]]) -> str:
    """An entry of one kind as one with that of the other kind, of the same number in a list beside its own."""
    path, _, number = entry.rpartition(".")
    beside = (other for other in held if other.endswith(f".{number}") and _list_of(_list_of(other)) == _list_of(path))
    kinds = {entry: set(held[entry]), **{other: set(held[other]) for other in beside}}
    alone = {other for other, known in kinds.items() if len(known) == len(kinds[entry]) == 1 and known != kinds[entry]}
    return min({entry, *alone})


def _entries(scope: str, lists: Container[str]) -> Iterator[str]:
    """The entries of lists around a module call, outermost first."""
    parts = scope.split(".")
    for n in range(len(parts)):
        if re.sub(r"@\d+", "", ".".join(parts[:n])) in lists:
            yield ".".join(parts[: n + 1])


def _list_of(entry: str) -> str:
    return entry.rpartition(".")[0]
