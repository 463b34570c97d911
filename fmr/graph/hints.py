"""What an error says of a name that nothing has, where it is another spelling of one that exists."""

import re
from collections.abc import Callable, Iterable

from fmr.ids import SOURCES, TensorId, spelled
from fmr.ops.fused import DECOMPOSITIONS


def used_name(name: str, same: Iterable[tuple[str, ...]], known: Iterable[str]) -> str:
    """What an error says of an ID or a path whose module or tensor goes by another of its registered names, else nothing.

    `same` has the names of each module and tensor that has several, `known` the IDs and paths that exist.
    """
    names = set(known)
    for group in same:
        for other in group:
            for one in group:
                renamed = one + name.removeprefix(other)
                if one != other and (name == other or name.startswith((f"{other}/", f"{other}@"))) and renamed in names:
                    return f" {other!r} is registered as {one!r}, too, and goes by that name: {renamed!r}."
    return spelled_otherwise(name, names) or inside_kernel(TensorId(name), names)


_ARITHMETIC = {"lerp", "addcmul", "einsum"}
"""Fused ops that are a few products and sums, and stand for no other way to write a module."""


def inside_kernel(name: TensorId, known: Iterable[str]) -> str:
    """What an error says of an op that a module call has not, where that runs a kernel of several ops; else nothing.

    So it is of a pattern that was located in a model that runs without such kernels.
    """
    if name.is_source or name.is_path:
        return ""
    ids = [TensorId(one) for one in known if one.startswith(f"{name.scope}/")]
    here = [one for one in ids if one.scope == name.scope and not one.is_path]
    op = name.rpartition("/")[2].partition("#")[0]
    ops = {one: one.parts.op for one in here}
    kernel = next((one for one, own in ops.items() if own in DECOMPOSITIONS.keys() - _ARITHMETIC), None)
    if kernel is None or op in ops.values():
        return ""
    return (
        f" {name.scope!r} runs a kernel here, {kernel}, and what happens inside that has IDs of its own. Locate it in a run "
        f"of this model, fmr.locate(run), or find it: run.graph.find('{name.scope}/*softmax#*')."
    )


def spelled_otherwise(name: str, known: Iterable[str]) -> str:
    """What an error says of an ID or a path with registered names as they are and not as they stand in IDs, else nothing."""
    known = set(known)
    if short := below_root(name, known.__contains__):
        return short
    kind = next((source for source in SOURCES if name.startswith(source)), "")
    head, slash, op = name.rpartition("/")
    places = [(kind, name.removeprefix(kind), "")] + [("", head, f"/{op}")] * bool(slash)
    right = [f"{kind}{'.'.join(map(_spelled_call, place.split('.')))}{op}" for kind, place, op in places]
    found = next((one for one in right if one != name and one in known), None)
    return f" In IDs and paths it is written {found!r}: signs that have a meaning there are encoded." if found else ""


def below_root(name: str, is_known: Callable[[str], bool]) -> str:
    """What an error says of a name that begins with the root, which has no name in IDs; else nothing."""
    short = name.removeprefix("root.").removeprefix("root")
    return f" The root has no name in IDs and paths: {short!r}." if short != name and is_known(short) else ""


def _spelled_call(part: str) -> str:
    """A registered name with the mark of a repetition, which stays."""
    name, mark = re.fullmatch(r"(.*?)(@\d+)?", part, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    return spelled(name) + mark
