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
from fmr.structure.prints import same_weights
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


class ScaledLater(Int8):
    """One whose output is scaled, and not its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale[:, 0]


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


def test_streams_that_share_points_are_told_apart() -> None:
    from transformers import MobileBertConfig, MobileBertModel

    sizes = {"hidden_size": 16, "embedding_size": 8, "intra_bottleneck_size": 8, "intermediate_size": 12}
    config = MobileBertConfig(num_hidden_layers=2, num_attention_heads=2, vocab_size=17, **sizes)
    torch.manual_seed(0)
    one = located(MobileBertModel(config).eval(), (torch.arange(6)[None],), {})
    assert len(one.streams) > 1
    assert [(a.points, b.points) for a, b in one.align(one).streams] == [(s.points, s.points) for s in one.streams]


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
    assert set(one.roles) == set(found.values)
    assert [(a.index, b.index) for a, b in found.attention] == [(n, n) for n in range(len(one.attention))]
    assert found.mlps == ()  # the weights of a quantised projection are hidden, so that nothing there is a memory
    assert all(two.roles.get(there, role) == role for (here, there) in found.values.items() for role in [one.roles[here]])


class Feed(nn.Module):
    """A feed-forward layer with a gate."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return made


class Stack(nn.Module):
    """Feed-forward layers on one stream, with a norm before each."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(6, 6), nn.ModuleList(layers)
        self.norms, self.last = nn.ModuleList([nn.LayerNorm(6) for _ in layers]), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        made: Tensor = self.last(x)
        return made


def feeds(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Feed() for _ in range(count)]


def of(model: nn.Module) -> Structure:
    return fmr.locate(fmr.run(model, torch.linspace(-1, 1, 24).reshape(1, 4, 6)))


def scopes(found: PartAlignment) -> dict[str, str]:
    return {repr(a): repr(b) for a, b in found.mlps}


def test_a_layer_that_was_removed_is_known_by_the_weights_of_the_others() -> None:
    layers = feeds(3)
    one, two = of(Stack(layers)), of(Stack([layers[0], layers[2]]))
    found = one.align(two)
    assert scopes(found) == {"layers.0": "layers.0", "layers.2": "layers.1"}
    assert "layers.1" in found.why
    assert scopes(two.align(one)) == {"layers.0": "layers.0", "layers.1": "layers.2"}
    graphs = fmr.locate(one.graph), fmr.locate(two.graph)
    assert scopes(graphs[0].align(graphs[1])) == {}


def test_layers_whose_weights_were_exchanged_are_not_matched_by_name() -> None:
    layers = feeds(2)
    found = of(Stack(layers)).align(of(Stack(layers[::-1])))
    assert scopes(found) == {}


def trained(model: nn.Module, by: float = 0.05) -> nn.Module:
    """A copy whose weights have gone a small way from where they were."""
    model, state = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * weight.std() * torch.randn(weight.shape, generator=state)
    return model


CHANGES = {
    "trained": trained,
    "rounded": lambda model: model.to(torch.bfloat16).float(),
    "quantised": lambda model: replaced(model, Int8, ("gate", "up", "down")),
    "scaled later": lambda model: replaced(model, ScaledLater, ("gate", "up", "down")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_are_known_in_a_copy_that_was_trained_on_or_rounded(change: Callable[[nn.Module], nn.Module]) -> None:
    layers = feeds(3)
    one = of(Stack(layers))

    def there(*order: int) -> dict[str, str]:
        return scopes(one.align(of(change(Stack([copy.deepcopy(layers[n]) for n in order])))))

    assert there(0, 2) == {"layers.0": "layers.0", "layers.2": "layers.1"}
    assert there(1, 0, 2) == {"layers.2": "layers.2"}  # and never 0 as 0, though that is its name
    assert there(0, 1, 2) == {f"layers.{n}": f"layers.{n}" for n in range(3)}


def test_weights_that_have_nothing_to_do_with_each_other_are_known_by_name_alone() -> None:
    one, two = of(Stack(feeds(3))), of(Stack([Feed() for _ in range(3)]))
    assert scopes(one.align(two)) == {f"layers.{n}": f"layers.{n}" for n in range(3)}
    assert same_weights(one.prints, two.prints) == {}


class Attending(nn.Module):
    """An attention and a feed-forward layer, each with a shortcut."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.feed = Feed(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        made: Tensor = x + self.feed(x)
        return made


def test_the_last_layer_of_one_model_is_known_where_others_follow_it() -> None:
    torch.manual_seed(0)
    layers = [Attending() for _ in range(3)]
    one, two = of(nn.Sequential(*layers, nn.Linear(6, 5))), of(nn.Sequential(*layers, Attending(), nn.Linear(6, 5)))
    whole(one.align(two), one)
    assert len(two.align(one).layers) == 3


class Separate(nn.Module):
    """A linear layer whose weights stand on the left, and whose bias is added later."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return ((self.weight @ x.mT) + self.bias[:, None]).mT


def test_a_bias_in_a_step_of_its_own_is_that_of_the_projection() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attending(), Attending(), nn.Linear(6, 5))
    one, two = of(model), of(replaced(model, Separate, ("q", "v")))
    found = one.align(two)
    whole(found, one)
    assert found.graph.matched["0.q/linear#0"] == "0.q/add#0"
    assert found.graph.matched["param:0.q.bias"] == "param:0.q.bias"
    assert two.align(one).graph.matched["0.q/add#0"] == "0.q/linear#0"


class Normed(nn.Module):
    """A norm written in one of three ways."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.weight, self.way = nn.Parameter(torch.linspace(0.5, 1.5, 6)), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return F.rms_norm(x, (6,), self.weight, 1e-6)
        if self.way == 1:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weight


def test_norms_are_the_same_whichever_way_they_are_written() -> None:
    def model(way: int) -> Structure:
        torch.manual_seed(0)
        return of(nn.Sequential(Attending(), Normed(way), nn.Linear(6, 5)))

    found = model(1).align(model(2))
    assert found.graph.matched.get(fmr.TensorId("1/mul#0")) != "1/mul#0"  # a value by its norm, and one by itself
    whole(found, model(1))
    assert model(1).align(model(0)).values[fmr.TensorId("1/mul#1")] == "1/rms_norm#0"


class Chosen(nn.Module):
    """Experts in two tensors: each called with its tokens, by a number that data tells, or all of them with all tokens."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(count, 6, 12)), nn.Parameter(torch.randn(count, 12, 6))
        self.one_by_one = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.one_by_one:
            return torch.bmm(torch.bmm(x.expand(3, -1, -1), self.up).relu(), self.down).sum(0, keepdim=True)
        made = torch.zeros_like(x)
        for number in (x.new_ones(3).cumsum(0) - 1).long():
            made = made + (x @ self.up[number]).relu() @ self.down[number]
        return made


def test_calls_of_one_expert_each_lie_within_the_call_of_all() -> None:
    torch.manual_seed(0)
    model = Stack([Chosen()])
    apart = copy.deepcopy(model)
    apart.layers[0].one_by_one = True  # type: ignore[union-attr]
    one, two = of(apart), of(model)
    assert (len(one.mlps), len(two.mlps)) == (3, 1)
    found = one.align(two)
    assert [(a.memory.down, b.memory) for a, b in found.mlps] == [(memory.down, two.mlps[0]) for memory in one.mlps]
    assert {found.within[memory.post.id] for memory in one.mlps} == {two.mlps[0].post.id}
    assert len(found.layers) == 1
    back = two.align(one)
    assert len(back.mlps) == 3
    assert not back.within
    assert back.why[two.mlps[0].post.id] == "it holds experts that are 3 memories there"


def test_a_deeper_model_shares_no_layers() -> None:
    assert scopes(of(Stack(feeds(2))).align(of(Stack([Feed(), Feed(), Feed()])))) == {}


class Experts(nn.Module):
    """Experts that every token is sent to, as a list of layers or as two tensors."""

    def __init__(self, experts: list[Feed], together: bool) -> None:
        super().__init__()
        self.together = together
        if together:
            both = [torch.cat([one.gate.weight, one.up.weight]) for one in experts]
            self.gate_up = nn.Parameter(torch.stack(both).detach())
            self.down = nn.Parameter(torch.stack([one.down.weight for one in experts]).detach())
        else:
            self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        if not self.together:
            return torch.stack([expert(x) for expert in self.experts]).sum(0)
        gate, up = torch.bmm(x.expand(len(self.down), *x.shape[1:]), self.gate_up.mT).chunk(2, -1)
        return torch.bmm(F.silu(gate) * up, self.down.mT).sum(0, keepdim=True)


def test_experts_in_a_list_and_in_one_tensor_are_the_same_memories() -> None:
    experts = [Feed() for _ in range(3)]
    one, two = (of(Stack([Experts(experts, together)])) for together in (False, True))
    found = one.align(two)
    assert scopes(found) == {f"layers.0.experts.{n}": f"layers.0, expert {n}" for n in range(3)}
    assert scopes(two.align(one)) == {f"layers.0, expert {n}": f"layers.0.experts.{n}" for n in range(3)}
    assert found.within[one.mlps[1].post.id] == two.mlps[0].post.id
    assert len(found.layers) == 1
    alone = fmr.locate(one.graph).align(fmr.locate(two.graph))
    assert alone.mlps == ()
    assert "layers.0.experts.1" in alone.why


def test_what_is_no_structure_is_refused() -> None:
    one = of(Stack(feeds(1)))
    with pytest.raises(fmr.StructureError, match=r"cannot be compared with Graph: expected fmr.locate\(other\)"):
        one.align(one.graph)  # type: ignore[arg-type]
