"""Which value is which when modules are renamed, exchanged, removed, repeated: proven or left alone."""

import copy

import torch
from torch import Tensor, nn

import fmr
from fmr.graph.align import Alignment


class Layer(nn.Module):
    """Self-attention of one head and a feed-forward layer; `swapped` reads the keys' weights for queries."""

    def __init__(self, width: int = 6, swapped: bool = False) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.swapped = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), swapped

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k = (self.k(y), self.q(y)) if self.swapped else (self.q(y), self.k(y))
        x = x + self.o((q @ k.transpose(-1, -2)).softmax(-1) @ self.v(y))
        return x + self.down(self.up(self.norm2(x)).relu())


class Model(nn.Module):
    """An embedding, layers that may be called in another order, and an unembedding."""

    def __init__(self, layers: list[nn.Module], order: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, 6), nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11)
        self.order = order or tuple(range(len(layers)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for n in self.order:
            x = self.layers[n](x)
        return self.head(self.norm(x))


class Renamed(nn.Module):
    """The same layers under other names."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.tokens, self.blocks = model.embed, nn.ModuleDict({f"block_{n}": one for n, one in enumerate(model.layers)})
        self.last, self.out = model.norm, model.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks.values():
            x = block(x)
        return self.out(self.last(x))


IDS = torch.arange(5)[None]


def graph(model: nn.Module) -> fmr.Graph:
    return fmr.run(model, IDS, keep="none").graph


def layers(count: int) -> list[nn.Module]:
    return [Layer() for _ in range(count)]


def of_layers(found: Alignment) -> dict[str, str]:
    """What is said of values and weights in layers."""
    return {a: b for a, b in found.matched.items() if "layers." in a}


def test_renamed_modules_are_the_same_by_their_place() -> None:
    model = Model(layers(3))
    one, two = graph(model), graph(Renamed(model))
    found = one.align(two)
    assert not found.removed
    assert not found.inserted
    assert {a.replace("layers.", "blocks.block_") for a in of_layers(found)} == set(of_layers(found).values())


def test_layers_that_are_called_in_another_order_are_not_the_same() -> None:
    found = graph(Model(layers(2))).align(graph(Model(layers(2), order=(1, 0))))
    values = {name for name in of_layers(found) if "#" in name}
    assert values == set()
    assert found.matched["head/linear#0"] == "head/linear#0"
    assert "it there, against the order here" in found.why[fmr.TensorId("layers.0.norm/layer_norm#0")]


def test_queries_and_keys_that_are_exchanged_are_not_the_same() -> None:
    found = graph(Model([Layer()])).align(graph(Model([Layer(swapped=True)])))
    assert not {"layers.0.q/linear#0", "layers.0.k/linear#0", "layers.0/matmul#0", "layers.0/softmax#0"} & set(found.matched)
    assert found.matched["layers.0.v/linear#0"] == "layers.0.v/linear#0"
    assert found.matched["layers.0.o/linear#0"] == "layers.0.o/linear#0"


def test_which_of_equal_layers_was_removed_is_not_known() -> None:
    whole = Model(layers(3))
    less = Model([whole.layers[0], whole.layers[2]])
    found = graph(whole).align(graph(less))
    assert of_layers(found) == {}
    assert found.matched["norm/layer_norm#0"] == "norm/layer_norm#0"
    renamed = graph(whole).align(graph(Renamed(less)))
    assert of_layers(renamed) == {}
    assert renamed.matched["head/linear#0"] == "out/linear#0"


class Towers(nn.Module):
    """Two equal towers on one input, whose results are added."""

    def __init__(self, names: tuple[str, str] = ("left", "right")) -> None:
        super().__init__()
        self.towers = names
        for name in names:
            setattr(self, name, nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
        self.read = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = (getattr(self, name)(x) for name in self.towers)
        return self.read(one + two)


def test_twin_towers_are_told_apart_by_name_or_not_at_all() -> None:
    x = torch.ones(2, 6)
    one, same, other = (
        fmr.run(Towers(names), x, keep="none").graph for names in (("left", "right"), ("right", "left"), ("a", "b"))
    )
    assert one.align(same).matched["left.0/linear#0"] == "left.0/linear#0"
    found = one.align(other)
    assert not [name for name in found.matched if "left" in name or "right" in name]
    assert "nothing that is sure tells which" in found.why[fmr.TensorId("left.0/linear#0")]
    assert found.matched["read/linear#0"] == "read/linear#0"


def test_another_activation_is_not_the_same() -> None:
    one = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    two = copy.deepcopy(one)
    two[1] = nn.SiLU()
    x = torch.ones(2, 6)
    found = fmr.run(one, x, keep="none").graph.align(fmr.run(two, x, keep="none").graph)
    assert "1/gelu#0" not in found.matched
    assert found.matched["2/linear#0"] == "2/linear#0"


def test_values_inside_kernels_are_the_same_in_both() -> None:
    class Fused(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            mixed = nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), scale=1.0)
            x = x + self.o(mixed)
            return x + self.down(self.up(self.norm2(x)).relu())

    plain, fused = graph(Model([Layer()])), graph(Model([Fused()]))
    inside = "layers.0/scaled_dot_product_attention#0"
    assert plain.align(fused).matched["layers.0/softmax#0"] == f"{inside}/softmax#0"
    assert fused.align(plain).matched[f"{inside}/softmax#0"] == "layers.0/softmax#0"
    assert fused.align(fused).matched[f"{inside}/softmax#0"] == f"{inside}/softmax#0"


class Scaled(nn.Module):
    """An exponential of a scaled value."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.layer = scale, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x * self.scale).exp())


def test_what_is_scaled_otherwise_before_it_is_bent_is_not_the_same() -> None:
    one, two = (fmr.run(Scaled(scale), torch.ones(2, 6), keep="none").graph for scale in (2.0, 3.0))
    found = one.align(two)
    assert "/exp#0" not in found.matched
    assert "scaled otherwise" in found.why[fmr.TensorId("/exp#0")]
    assert found.matched["layer/linear#0"] == "layer/linear#0"


def test_a_model_inside_another_one_keeps_its_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args: Tensor) -> Tensor:
            made: Tensor = self.inner(*args)
            return made

    model = Model(layers(2))
    found = graph(model).align(graph(Wrapper(model)))
    assert not found.removed
    assert found.matched["param:layers.0.q.weight"] == "param:inner.layers.0.q.weight"
    assert found.matched["input:ids"] == "input:args.0"


def test_layers_that_share_their_weights_are_matched_in_order_where_there_are_as_many() -> None:
    shared = [Layer()]
    three, same, two = (graph(Model(shared, order=(0,) * n)) for n in (3, 3, 2))
    assert not three.align(same).removed
    assert all(a.scope == b.scope for a, b in three.align(same).matched.items())
    found = three.align(two)
    assert "layers.0@2.q/linear#0" not in found.matched


def test_an_update_as_wide_as_its_layer_could_be_the_layer() -> None:
    class Updated(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.base, self.a, self.b = layer, nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    base = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    wide = nn.Sequential(Updated(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3))
    one, two = (fmr.run(model, torch.ones(2, 6), keep="none").graph for model in (base, wide))
    found = one.align(two)
    assert "0/linear#0" not in found.matched
    assert found.matched["2/linear#0"] == "2/linear#0"
