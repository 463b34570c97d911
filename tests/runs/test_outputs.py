"""What a model returned is kept without its history, as the kind of object that it is, and the model's own is left alone."""

import weakref
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.models import build
from tests.small import Fn


class Pair(namedtuple("Pair", "one other")):
    def __new__(cls, *args: Any) -> NoReturn:
        raise AssertionError("code of the user's class ran")


@dataclass(frozen=True)
class Frozen:
    one: Tensor
    rest: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        counted.append(self)


@dataclass(slots=True)
class Slots:
    one: Tensor
    name: str = "slots"


class Cache:
    """Tensors among its attributes, as a cache of keys and values."""

    def __init__(self, one: Tensor) -> None:
        self.layers = [{"one": one}]


class Closes:
    def __init__(self, one: Tensor) -> None:
        self.one = one

    def __del__(self) -> None:
        counted.append(self)


counted: list[Any] = []
FACTORIES: dict[str, Any] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 1, None),
    "list": lambda x: [x, [x]],
    "named tuple": lambda x: tuple.__new__(Pair, (x, 2)),
    "torch.max": lambda x: torch.max(x, 1),
    "dict": lambda x: {"x": x, 3: "three"},
    "OrderedDict": lambda x: OrderedDict(b=x, a=x),
    "defaultdict": lambda x: defaultdict(list, a=[x]),
    "frozen dataclass": lambda x: Frozen(x, [x]),
    "dataclass with slots": Slots,
    "object": Cache,
}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    own = vars(value).values() if hasattr(value, "__dict__") else [value.one] if isinstance(value, Slots) else ()
    return [tensor for item in (*items, *own) for tensor in tensors(item)]


@pytest.mark.parametrize("keep", ["all", "none", "*", ["/mul#0"]])
@pytest.mark.parametrize("kind", FACTORIES)
def test_an_output_is_kept_as_its_kind_and_without_history(kind: str, keep: Any) -> None:
    model, x = Fn(lambda self, x: FACTORIES[kind](x * 2)), torch.randn(2, 3, requires_grad=True)
    with fmr.track(model, keep=keep) as run:
        out = model(x)
    counted.clear()
    assert type(run.output) is type(out)
    assert counted == []
    assert [t.grad_fn is not None for t in tensors(out)] == [t.is_floating_point() for t in tensors(out)]
    assert all(t.grad_fn is None for t in tensors(run.output))
    for kept, own in zip(tensors(run.output), tensors(out), strict=True):
        assert torch.equal(kept, own)
        assert kept.data_ptr() == own.data_ptr()
    if isinstance(out, dict):
        assert list(run.output) == list(out)
    with fmr.track(model, keep=keep, grad=True) as run:
        out = model(x)
    assert run.output is out


def test_an_output_of_a_library_keeps_its_class_its_attributes_and_its_cache() -> None:
    model, args, kwargs = build("gpt2")
    with fmr.track(model, keep="none") as run:
        out = model(*args, **{**kwargs, "use_cache": True})
    assert out.logits.requires_grad
    assert type(run.output) is type(out)
    assert torch.equal(run.output.logits, out.logits)
    assert run.output["logits"] is run.output.logits
    assert not run.output.logits.requires_grad
    assert type(run.output.past_key_values) is type(out.past_key_values)
    assert not any(t.requires_grad for layer in run.output.past_key_values.layers for t in (layer.keys, layer.values))
    assert all(t.requires_grad for layer in out.past_key_values.layers for t in (layer.keys, layer.values))


def test_what_has_no_history_or_would_be_closed_twice_is_the_object_itself() -> None:
    for make, grad in ((Cache, False), (Closes, True)):
        model = Fn(lambda self, x, make=make: make(x * 2))
        with fmr.track(model, keep="none") as run:
            out = model(torch.ones(2, requires_grad=grad))
        assert run.output is out


@pytest.mark.parametrize("keep", ["none", "2/linear*", ["2/linear#0"]])
def test_the_values_that_an_output_was_made_of_die_with_the_pass(keep: Any) -> None:
    x = torch.randn(3, 4)
    made: list[weakref.ref[Tensor]] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))
    model[1].register_forward_hook(lambda module, args, out: made.append(weakref.ref(out)))
    with fmr.track(model, keep=keep) as run:
        model(x)
        model(x)
    assert [ref() for ref in made] == [None, None]
    assert run.passes[0].output.shape == (3, 2)
