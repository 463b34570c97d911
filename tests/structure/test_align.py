"""Which part is which: adapters, kernels, other numbers, renamed modules, experts; and what must not be said."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.structure.align import PartAlignment
from fmr.structure.parts import Structure
from tests.models import build


class Lora(nn.Module):
    """A layer with an update of low rank beside it."""

    def __init__(self, layer: nn.Module, width: int, out: int, rank: int = 2) -> None:
        super().__init__()
        self.base_layer, self.scale = layer, 0.5
        self.lora_a, self.lora_b = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.base_layer(x) + self.lora_b(self.lora_a(x)) * self.scale
        return made


class Int8(nn.Module):
    """A linear layer of whole numbers with a scale for each output."""

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module], only: tuple[str, ...] = ()) -> nn.Module:
    """A copy with linear layers replaced, all or those of a name."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and (not only or name.rpartition(".")[2] in only):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], make(layer))
    return model.eval()


def located(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Structure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return fmr.locate(fmr.run(model, *args, **kwargs))


def adapted(layer: nn.Linear) -> nn.Module:
    return Lora(layer, layer.in_features, layer.out_features)


def whole(found: PartAlignment, first: Structure) -> None:
    """Assert that every part and every value has its like, in order."""
    assert [(a.index, b.index) for a, b in found.attention] == [(n, n) for n in range(len(first.attention))]
    assert len(found.mlps) == len(first.mlps)
    assert len(found.layers) == len(first.layers)
    assert set(found.values) == set(first.roles)
    assert not found.why


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "whisper"])
def test_a_structure_is_aligned_with_itself(name: str) -> None:
    model, args, kwargs = build(name)
    one = located(model, args, kwargs)
    found = one.align(one)
    whole(found, one)
    assert found.values == {name: name for name in one.roles}


def test_kernels_have_the_same_parts() -> None:
    one, two = (located(*build(name)) for name in ("gpt2_eager", "gpt2"))
    found = one.align(two)
    whole(found, one)
    assert [two.roles[name] for name in found.values.values()] == [one.roles[name] for name in found.values]


@pytest.mark.parametrize("only", [("q_proj", "v_proj"), ()])
def test_adapters_leave_the_parts_what_they_are(only: tuple[str, ...]) -> None:
    model, args, kwargs = build("llama")
    one, two = located(model, args, kwargs), located(replaced(model, adapted, only), args, kwargs)
    found = one.align(two)
    assert [(a.index, b.index) for a, b in found.attention] == [(n, n) for n in range(len(one.attention))]
    assert all(two.roles.get(there) == one.roles[here] for here, there in found.values.items())
    assert {name for name, role in one.roles.items() if role in ("pattern", "z", "resid")} <= set(found.values)


def test_copies_in_other_numbers_have_the_same_parts() -> None:
    model, args, kwargs = build("llama")
    one, two = located(model, args, kwargs), located(copy.deepcopy(model).to(torch.bfloat16), args, kwargs)
    whole(one.align(two), one)
    whole(one.align(located(replaced(model, Int8), args, kwargs)), one)


def test_a_quantised_copy_has_the_same_attention() -> None:
    model, args, kwargs = build("bert")
    one = located(model, args, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
        two = located(quantised, args, kwargs)
    found = one.align(two)
    matched = {role for name, role in one.roles.items() if name in one.graph.align(two.graph).matched}
    assert matched == set(one.roles.values())
    assert all(two.roles.get(there) == one.roles[here] for here, there in found.values.items())
