"""What tells values of two graphs apart before data does: how weights are called, the kinds and the sizes of joints."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from fmr.graph.joints import Joints
from fmr.ids import TensorId

Same = Mapping[TensorId, TensorId]
"""Weights of one graph that are those of another, number by number, with their names there."""


def liken(ours: Joints, theirs: Joints, same: Same) -> None:
    """Tell each joint of two graphs which weights they call alike and what it has in common with its like."""
    names = [[node.id for node in side.graph.nodes if node.op in ("param", "buffer")] for side in (ours, theirs)]
    proven = _proven(ours, theirs, same)
    used = {*proven, *proven.values()}
    known = {name: name for name in _trusted(*names) if name not in used}
    ours.called = known | {name: name for name in proven}
    theirs.called = known | {other: name for name, other in proven.items()}
    for side in (ours, theirs):
        for joint in side.joints:
            read = side.weights(joint) if joint.weighs else frozenset()
            joint.named = tuple(sorted(side.called[name] for name in read if name in side.called))
            own = joint.node.id if joint.node.op in ("input", "output") else ""
            joint.likeness = joint.kind, own, joint.named, side.sizes(joint), side.share(joint)


def _proven(ours: Joints, theirs: Joints, same: Same) -> dict[str, str]:
    """The parameters under weights that are the same number by number, where each is made of one."""
    found: dict[str, str] = {}
    for name, other in same.items():
        one, two = ours.sources.get(name, frozenset()), theirs.sources.get(other, frozenset())
        if len(one) == len(two) == 1:
            found[next(iter(one))] = next(iter(two))
    return found


def _trusted(ours: Iterable[TensorId], theirs: Iterable[TensorId]) -> set[str]:
    """The names that mean the same in two graphs: both have them, and all lists of modules in them have the same entries.

    A number in a list that is longer or shorter elsewhere may count other layers.
    """
    first, second = set(ours), set(theirs)
    lists, others = _lists(first), _lists(second)
    return {str(name) for name in first & second if all(lists[path] == others[path] for path, _ in _entries(name))}


def _lists(names: Iterable[TensorId]) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for path, entry in _entries(name):
            found[path].add(entry)
    return found


def _entries(name: str) -> Iterator[tuple[str, str]]:
    """The lists of modules that the name of a weight lies in, each with the number of its entry there."""
    parts = name.split(".")
    for n, part in enumerate(parts):
        if part.isdigit():
            yield ".".join(parts[:n]), part
