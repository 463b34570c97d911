"""What tells values of two graphs apart before data does: how weights are called, the kinds and the sizes of joints."""

import re
from collections import Counter, defaultdict
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence

from fmr.graph.joints import Joint, Joints
from fmr.ids import TensorId

Same = Mapping[TensorId, TensorId]
"""Weights of one graph that are those of another, number by number, with their names there."""

_ENDS = ("input", "output")
_DIGITS = re.compile(r"\d+")


def liken(ours: Joints, theirs: Joints, same: Same) -> None:
    """Tell each joint of two graphs which weights they call alike and what it has in common with its like."""
    names = [[node.id for node in side.graph.nodes if node.op in ("param", "buffer")] for side in (ours, theirs)]
    proven = _proven(ours, theirs, same)
    used = {*proven, *proven.values()}
    known = {name: other for name, other in _trusted(*names).items() if name not in used and other not in used}
    ours.called = {name: name for name in (*known, *proven)}
    theirs.called = {other: name for name, other in (*known.items(), *proven.items())}
    ends = set.intersection(*({joint.node.id for joint in side.joints if joint.node.op in _ENDS} for side in (ours, theirs)))
    numbers: dict[Hashable, int] = {}
    for side in (ours, theirs):
        for joint in side.joints:
            read = side.weights(joint) if joint.weighs else frozenset()
            joint.named = tuple(sorted(side.called[name] for name in read if name in side.called))
            own = _own(joint, ends) if joint.node.op in _ENDS else ()
            like = joint.kind, own, joint.named, side.sizes(joint), side.share(joint), _is_squared(joint)
            joint.likeness = numbers.setdefault(like, len(numbers))


def _is_squared(joint: Joint) -> bool:
    """Whether a joint reads one value twice."""
    return len(joint.reads) > 1 and all(read is joint.reads[0] for read in joint.reads)


def _own(joint: Joint, both: Container[TensorId]) -> Hashable:
    """What an input or an output is known by: its name, where both have it, else its shape."""
    return joint.node.id if joint.node.id in both else joint.node.shape


def _proven(ours: Joints, theirs: Joints, same: Same) -> dict[str, str]:
    """The parameters under weights that are the same number by number, where each is made of one."""
    found: dict[str, str] = {}
    for name, other in same.items():
        one, two = ours.sources.get(name, frozenset()), theirs.sources.get(other, frozenset())
        if len(one) == len(two) == 1:
            found[next(iter(one))] = next(iter(two))
    return found


def _trusted(ours: Sequence[TensorId], theirs: Sequence[TensorId]) -> dict[str, str]:
    """The names that mean the same in two graphs, each with the one there: the lists in them have the same entries in both.

    A number in a list that is longer or shorter elsewhere may count other layers. Where a model lies in another one, all its
    names begin with the path to it there.
    """
    before, there = _wrapped(ours, theirs)
    first, second = ({_under(path, name): name for name in names} for path, names in ((before, ours), (there, theirs)))
    lists, others = _lists(first), _lists(second)
    known = (name for name in first.keys() & second.keys() if all(lists[path] == others[path] for path, _ in _entries(name)))
    return {first[name]: second[name] for name in known}


def _wrapped(ours: Sequence[TensorId], theirs: Sequence[TensorId]) -> tuple[str, str]:
    """The path that names of each graph begin with where those of the other do not: the one that makes most of them alike.

    Nothing where two paths do so equally well: which of two twins a model is cannot be told by names.
    """
    found: Counter[tuple[str, str]] = Counter()
    ends, others = _by_end(ours), _by_end(theirs)
    for end in ends.keys() & others.keys():
        for a in ends[end]:
            for b in others[end]:
                short, long = sorted((_path(a), _path(b)), key=len)
                if short == long or long.endswith("." + short):
                    more = long[: len(long) - len(short)]
                    found[("", more) if long == _path(b) else (more, "")] += 1
    best = found.most_common(2)
    return best[0][0] if best and (len(best) == 1 or best[0][1] > best[1][1]) else ("", "")


def _path(name: str) -> str:
    return name.partition(":")[2]


def _under(path: str, name: str) -> str:
    """A name as it is within a path; whole where it lies elsewhere."""
    kind, _, rest = name.partition(":")
    return f"{kind}:{rest[len(path) :]}" if path and rest.startswith(path) else f"{kind}:{path and '/'}{rest}"


def _by_end(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their last two parts."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[".".join(_path(name).split(".")[-2:])].append(name)
    return found


def _lists(names: Iterable[str]) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for path, entry in _entries(name):
            found[path].add(entry)
    return found


def _entries(name: str) -> Iterator[tuple[str, str]]:
    """The lists of modules that the name of a weight lies in, `h.0` or `layer1`, each with its entry there."""
    parts = name.split(".")
    for n, part in enumerate(parts):
        if any(map(str.isdigit, part)):
            yield ".".join([*parts[:n], _DIGITS.sub("#", part)]), part
