"""The way in: what holds tensors is opened alike as an input, as an argument and as an output; nothing else is touched."""

import collections
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributions, nn

import fmr
from fmr.nests import leaves, taken, taken_arguments, tree_map
from tests.small import Fn

A, B = torch.ones(1), torch.ones(2)


@dataclass
class Plain:
    x: Tensor
    size: int = 0


@dataclass(slots=True)
class Slotted:
    x: Tensor


class Slots:
    __slots__ = ("never", "x")

    def __init__(self, x: Tensor) -> None:
        self.x = x


class MoreSlots(Slots):
    __slots__ = ("__dict__", "y")

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.y, self.z = [x + 1], x + 2


class Called:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self) -> Tensor:
        return self.x


class Pair(NamedTuple):
    x: Tensor
    y: int


class Words(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("computes")

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("computes")


def nested(depth: int) -> Any:
    value: Any = A
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (A, [""]),
        (Plain(A), ["x"]),
        (Slotted(A), ["x"]),
        (Slots(A), ["x"]),
        (MoreSlots(A), ["z", "x", "y.0"]),
        (Called(A), ["x"]),
        (Pair(A, 3), ["0"]),
        (types.SimpleNamespace(keys=[A], size=2), ["keys.0"]),
        (collections.deque([None, A]), ["1"]),
        ({A}, ["0"]),
        (frozenset([A]), ["0"]),
        ({"a": A, 1: (B,)}, ["a", "1.0"]),
        ({"a": A}.values(), ["0"]),
        (collections.OrderedDict(a=A), ["a"]),
        (collections.defaultdict(list, a=[A]), ["a.0"]),
        (collections.UserDict(a=A), ["a"]),
        (collections.UserList([A]), ["0"]),
        (types.MappingProxyType({"a": A}), ["a"]),
        (Words(a=A), ["a"]),
        (distributions.Normal(A, A + 1), ["loc", "scale"]),
        (distributions.Independent(distributions.Normal(B, B), 1), ["base_dist.loc", "base_dist.scale"]),
        (nn.utils.rnn.pack_padded_sequence(torch.ones(2, 1), torch.tensor([2])), ["0", "1"]),
        (nested(12), [".".join("0" * 12)]),
        (nested(70), []),
        (nn.Linear(1, 1), []),
        (lambda: A, []),
        (Plain, []),
        (torch.Size([1, 2]), []),
        ("text", []),
        (iter([A]), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_holds_tensors_is_opened_by_place_key_and_attribute(value: Any, places: list[str]) -> None:
    assert [at for at, _ in leaves(value)] == places


class Hostile:
    """Whatever is asked of it raises."""

    def _refuse(self, *args: Any) -> Any:
        raise RuntimeError("asked")

    __bool__ = __len__ = __eq__ = __iter__ = __getattr__ = __contains__ = __hash__ = __getitem__ = _refuse  # type: ignore[assignment]

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("asked")

    @property
    def x(self) -> Tensor:
        raise RuntimeError("asked")


class Broken(Mapping[str, Tensor]):
    """A mapping that cannot say what it holds."""

    def __getitem__(self, key: str) -> Tensor:
        raise OSError("closed")

    def __iter__(self) -> Iterator[str]:
        raise OSError("closed")

    def __len__(self) -> int:
        raise OSError("closed")


def test_nothing_is_asked_of_an_object_not_even_whether_it_is_empty() -> None:
    hostile = Hostile()
    object.__setattr__(hostile, "held", A)
    assert [at for at, _ in leaves([hostile, Broken(), B])] == ["0.held", "2"]


def test_what_holds_itself_ends_and_an_object_met_twice_stands_at_its_first_place() -> None:
    loop = types.SimpleNamespace(x=A)
    loop.again, loop.list = loop, [loop]
    assert [at for at, _ in leaves((loop, loop))] == ["0.x"]
    shared = [A]
    assert [at for at, _ in leaves((shared, shared))] == ["0.0", "1.0"]


def test_what_was_taken_stays_as_it_was() -> None:
    grows, known = [A], {"a": A}
    nest = taken((grows, known))
    grows.append(B)
    known["b"] = B
    assert [at for at, _ in leaves(nest)] == ["0.0", "1.a"]


def test_flat_arguments_are_their_own_nest() -> None:
    args, kwargs = (A, 1, None), {"mask": B}
    assert taken_arguments(args, kwargs) == (args, kwargs)
    assert taken_arguments(([1, 2],), {"text": "a"}) == (None, {"text": "a"})


def test_a_nest_is_mapped_with_places_kept_and_objects_apart() -> None:
    nest = taken(((None, A), {"a": 1, "b": B}, Called(A), "text"))
    assert tree_map(lambda tensor: tensor.numel(), nest, lambda tensor: "inside") == (
        (None, 1),
        {"b": 2},
        {"x": "inside"},
        None,
    )
    assert tree_map(lambda tensor: None, nest) is None


# ---- the same for inputs, arguments and outputs of modules


def wrap(make: Callable[[Tensor], Any]) -> nn.Module:
    """A model that reads a tensor out of an object, hands one to a module, and gets one back from it."""
    inner = Fn(lambda self, b: make(next(iter(leaves(b)))[1] * 2))
    return Fn(lambda self, b: next(iter(leaves(self.inner(b))))[1] + 1, inner=inner)


@pytest.mark.parametrize(
    "make",
    [
        Slotted,
        Slots,
        Called,
        lambda x: [[[[[[[[x]]]]]]]],
        lambda x: {x},
        lambda x: collections.deque([x]),
        lambda x: distributions.Normal(x, 1.0),
        lambda x: types.SimpleNamespace(layers=[types.SimpleNamespace(keys=x)]),
    ],
)
@pytest.mark.parametrize("keep", ["all", "none"])
def test_inputs_arguments_and_outputs_in_objects_have_ids(make: Callable[[Tensor], Any], keep: str) -> None:
    given = make(torch.ones(2, 2))
    graph = fmr.run(wrap(make), given, keep=keep).graph
    graph.lint()
    names = [f"input:args.0.{place}" for place, _ in leaves(given)]
    assert graph.opaque == ()
    assert [node.id for node in graph.sources] == names
    call = graph.module("inner")
    assert [node.id for node in flat(call.input)] == names
    assert {node.scope for node in flat(call.output)} <= {"inner"}
    assert flat(call.output) != []


def flat(nest: Any) -> list[fmr.Node]:
    if isinstance(nest, fmr.Node):
        return [nest]
    return [node for item in (nest.values() if isinstance(nest, dict) else nest or ()) for node in flat(item)]


def test_a_cache_that_a_module_fills_is_what_it_was_when_each_call_began() -> None:
    def step(self: nn.Module, x: Tensor, cache: Any) -> Tensor:
        cache.keys.append(x.exp())
        return x * 2

    model = Fn(
        lambda self, x, cache: self.b(self.a(x, cache), cache),
        a=Fn(step), b=Fn(step),
    )  # fmt: skip
    graphs = [fmr.run(model, B, types.SimpleNamespace(keys=[A]), keep=keep).graph for keep in ("all", "none")]
    for graph in graphs:
        assert graph.scopes == graphs[0].scopes
        assert graph.module("a").scope.inputs == (("input:args.0", {"keys": ("input:args.1.keys.0",)}), None)
        assert graph.module("b").scope.inputs == (("a/mul#0", {"keys": ("input:args.1.keys.0", "a/exp#0")}), None)


def test_an_object_that_holds_more_than_was_given_makes_no_opaque_values_of_it() -> None:
    world = types.SimpleNamespace(x=None, rest=[torch.ones(n) for n in range(9)])

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        world.x = x * 2
        return self.cell(world)

    graph = fmr.run(Fn(forward, cell=Fn(lambda self, w: w.x.exp())), B).graph
    assert graph.opaque == ()
    assert graph.module("cell").scope.inputs == (({"x": "/mul#0"},), None)


def test_a_list_that_a_module_returned_may_grow_later() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        found = self.cell(x)
        found.append(found[0].exp())
        return found[1]

    for keep in ("all", "none"):
        graph = fmr.run(Fn(forward, cell=Fn(lambda self, x: [x * 2])), B, keep=keep).graph
        assert graph.module("cell").scope.output == ("cell/mul#0",)
        assert graph.opaque == ()


class Counted(Mapping[str, Tensor]):
    """A mapping that computes what it holds, and counts how often."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.reads = x, 0

    def __getitem__(self, key: str) -> Tensor:
        self.reads += 1
        return self.x

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_mapping_that_computes_is_asked_once_for_each_event(keep: str) -> None:
    given = Counted(A)
    run = fmr.run(Fn(lambda self, b: b.x * self.cell(b), cell=Fn(lambda self, b: b.x.exp())), given, keep=keep)
    assert given.reads == 2  # the root's call, the cell's call
    _ = run.graph, repr(run)
    assert given.reads == 2


# ---- foreign objects


class Ambiguous:
    """An object like an array or a table: its truth, its length and its comparison raise or are no truth."""

    def __bool__(self) -> bool:
        raise ValueError("The truth value is ambiguous")

    __len__ = __bool__

    def __eq__(self, other: object) -> Any:
        raise ValueError("compared")

    __hash__ = None  # type: ignore[assignment]


def foreign() -> list[Any]:
    numpy = pytest.importorskip("numpy")
    some = [numpy.ones(3), numpy.zeros(0), numpy.array([None, "a"], dtype=object), [numpy.ones(2)], {"a": numpy.ones(2)}]
    return [*some, Ambiguous(), [Ambiguous()], Hostile(), Broken(), iter([1]), object(), range(3)]


@pytest.mark.parametrize("keep", ["all", "none", "*mul*", ["/mul#0"], lambda node: True])
@pytest.mark.parametrize("place", range(12))
def test_foreign_objects_are_passed_over_as_arguments_and_as_results(place: int, keep: Any) -> None:
    thing = foreign()[place]

    def forward(self: nn.Module, x: Tensor, given: Any) -> Any:
        got = self.cell(x, given=given)
        assert got is thing
        x * 2
        return got

    run = fmr.run(Fn(forward, cell=Fn(lambda self, x, given: given)), A, thing, keep=keep)
    assert run.output is thing
    repr(run)
    if isinstance(keep, str):
        assert [str(node.id) for node in run.graph] == ["input:args.0", "/mul#0"]
        assert run.graph.module("cell").output is None


def test_tables_and_pictures_are_passed_over() -> None:
    pandas, image = pytest.importorskip("pandas"), pytest.importorskip("PIL.Image")
    for thing in (pandas.DataFrame({"a": [1]}), pandas.Series([1, 2]), image.new("L", (2, 2))):
        model = Fn(lambda self, x, given: (x * 2, given))
        assert fmr.run(model, A, thing).graph.module("").scope.output == ("/mul#0", None)
        assert fmr.census(model, A, thing).complete
