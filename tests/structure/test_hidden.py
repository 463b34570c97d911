"""What torch does not show: it is followed where it reads one value, and rejected where it hides a part."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.errors import StructureError
from fmr.structure.normal.hidden import is_hidden


class Outside(nn.Module):
    """A projection that leaves torch."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() @ self.layer.weight.detach().numpy().T)


@torch.library.custom_op("fmr_tests::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


class Custom(Outside):
    """A projection that is an op of somebody else's."""

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.layer.weight)


class Layer(nn.Module):
    """An attention and a memory that write to a stream; the keys may come from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(6))

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (layer(z).unflatten(-1, (4, 4)).transpose(1, 2) for layer, z in ((self.q, x), (self.k, y), (self.v, y)))
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = x + self.attend(x, x if y is None else y)
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer = nn.Linear(16, 16), layer

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.layer(self.embed(x), y)


def with_hidden(kind: type[Outside], names: Sequence[str], layer: Callable[[], nn.Module] = Layer) -> Net:
    torch.manual_seed(0)
    net = Net(layer())
    for name in names:
        setattr(net.layer, name, kind(getattr(net.layer, name)))
    return net.eval()


X, Y = torch.randn(2, 5, 16), torch.randn(2, 3, 16)


@pytest.mark.parametrize("kind", [Outside, Custom])
@pytest.mark.parametrize("names", ["q", "k", "v", "o", "qk", "qkv", "qkvo"])
@pytest.mark.parametrize("inputs", [(X,), (X, Y)], ids=["self", "cross"])
def test_the_kind_is_told_through_hidden_projections(kind: Any, names: str, inputs: tuple[Tensor, ...]) -> None:
    run = fmr.run(with_hidden(kind, names), *inputs)
    (block,) = fmr.locate(run).attention
    assert (block.kind, block.n_heads) == ("self" if len(inputs) == 1 else "cross", 4)
    assert block.certified


@pytest.mark.parametrize("kind", [Outside, Custom])
@pytest.mark.parametrize(
    ("names", "where", "which"), [(["up"], "down", "layer.up/"), (["down"], "down", "it"), (["up", "down"], "down", "it")]
)
def test_a_memory_behind_a_hidden_projection_is_rejected(kind: Any, names: list[str], where: str, which: str) -> None:
    structure = fmr.locate(fmr.run(with_hidden(kind, names), X))
    assert not structure.mlps
    (reason,) = structure.rejected
    assert str(reason.id).startswith(f"layer.{where}/")
    assert reason.what == "memory"
    assert reason.reason.startswith(which)
    assert reason.reason.endswith("is computed by code that is hidden from torch, weights and all")


class Bent(Layer):
    """An activation that leaves torch."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = x + self.attend(x, x)
        return x + self.down(torch.from_numpy(self.up(x).detach().numpy().clip(0)))


def test_a_memory_whose_activation_is_hidden_is_rejected() -> None:
    structure = fmr.locate(fmr.run(with_hidden(Outside, [], Bent), X))
    (reason,) = structure.rejected
    assert str(reason.id) == "layer.down/linear#0"
    assert reason.reason == "layer/opaque#0 is computed by code that is hidden from torch"


class Mapped(Layer):
    """A softmax inside a function that is mapped over examples, or one that was scripted, of scores that are scaled."""

    softmax: Any = staticmethod(torch.vmap(lambda scores: scores.softmax(-1)))

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (layer(z).unflatten(-1, (4, 4)).transpose(1, 2) for layer, z in ((self.q, x), (self.k, y), (self.v, y)))
        return self.o((self.softmax(q @ k.mT / 2) @ v).transpose(1, 2).flatten(2))


@torch.jit.script
def scripted(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


class Scripted(Mapped):
    softmax = staticmethod(scripted)


@pytest.mark.parametrize("kind", [Mapped, Scripted])
def test_a_softmax_that_is_hidden_is_told(kind: type[Layer]) -> None:
    structure = fmr.locate(fmr.run(with_hidden(Outside, [], kind), X))
    assert not structure.attention
    told = [one for one in structure.rejected if one.what == "attention"]
    assert [str(one.id) for one in told] == ["layer/opaque#0"]
    assert told[0].reason.startswith("what it makes of the values that are projected for it is hidden from torch")


class AsItIs(Outside):
    """One that is handed the memory of the very value that others read."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() @ self.layer.weight.numpy().T).clone()


@pytest.mark.parametrize("kind", [Outside, AsItIs, Custom])
@pytest.mark.parametrize("names", [["o"], ["q", "k", "v"], ["up"], ["down"], ["q", "k", "v", "o", "up", "down"]])
def test_what_hidden_code_makes_of_a_stream_is_written_to_it(kind: Any, names: list[str]) -> None:
    with torch.no_grad():
        structure = fmr.locate(fmr.run(with_hidden(kind, names), X))
    (stream,) = structure.streams
    assert [write.before for write in stream.writes] == ["embed/linear#0", "layer/add#0"]
    assert stream.points == ("embed/linear#0", "layer/add#0", "layer/add#1")


class Root(nn.Module):
    """A layer that leaves torch in the model's own forward, with the memory of what is read on."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.numpy() * 2)


def test_a_sum_of_which_it_cannot_be_told_whether_it_writes_is_rejected() -> None:
    structure = fmr.locate(fmr.run(Root(), X))
    assert not structure.streams
    assert [repr(one) for one in structure.rejected] == [
        "/add#0 is no residual stream: what it adds is made by code that is hidden from torch (/opaque#0), "
        "and of what cannot be told"
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantised_model_keeps_its_attentions_and_its_stream() -> None:
    layers = [Layer().eval() for _ in range(2)]
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(*layers), {nn.Linear}, dtype=torch.qint8)
    structure = fmr.locate(fmr.run(model, X))
    assert [block.kind for block in structure.attention] == ["self", "self"]
    assert len(structure.residual.writes) == 4
    assert len(structure.layers) == 2
    assert [one.what for one in structure.rejected] == ["memory", "memory"]


class Whole(Layer):
    """The queries, keys and values are mixed outside torch."""

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            layer(z).unflatten(-1, (4, 4)).transpose(1, 2).detach().numpy()
            for layer, z in zip((self.q, self.k, self.v), (x, y, y), strict=True)
        )
        return self.o(torch.from_numpy(q @ (k.swapaxes(-1, -2) @ v)).transpose(1, 2).flatten(2))


class Between(Whole):
    """The mixing is a module of its own, with three inputs."""

    class Mix(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.from_numpy((q @ (k.mT @ v)).detach().numpy() * 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.mix = self.Mix()

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (layer(z).unflatten(-1, (4, 4)).transpose(1, 2) for layer, z in ((self.q, x), (self.k, y), (self.v, y)))
        return self.o(self.mix(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("layer", [Whole, Between])
def test_an_attention_that_is_hidden_as_a_whole_is_rejected(layer: type[Layer]) -> None:
    structure = fmr.locate(fmr.run(with_hidden(Outside, [], layer), X))
    assert not structure.attention
    (reason,) = (one.reason for one in structure.rejected if one.what == "attention" and "hidden" in one.reason)
    assert reason.startswith("what it makes of the values that are projected for it is hidden from torch")


class Rotated(Layer):
    """Queries and keys are made of two values each outside torch."""

    class Turn(nn.Module):
        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return torch.from_numpy((x * by).detach().numpy() * 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.turn = self.Turn()

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (layer(z).unflatten(-1, (4, 4)).transpose(1, 2) for layer, z in ((self.q, x), (self.k, y), (self.v, y)))
        q = self.turn(q, x.mean())
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_an_attention_whose_kind_cannot_be_told_is_rejected() -> None:
    structure = fmr.locate(fmr.run(with_hidden(Outside, [], Rotated), X))
    assert not structure.attention
    reason = next(one.reason for one in structure.rejected if one.what == "attention")
    assert "its queries or keys are made by code that is hidden from torch (layer.turn/opaque#0)" in reason


class Of(nn.Module):
    """A module that calls one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


DOCUMENTED: dict[str, Callable[[Tensor], Tensor]] = {
    "what C calls otherwise": nn.functional.logsigmoid,
    "of another package": lambda x: nn.utils.rnn.pad_sequence([x[0], x[1]]),
    "in place": lambda x: x.clone().zero_(),
    "random in place": lambda x: x.clone().exponential_(),
    "a transform": torch.fft.fft,
    "of linear algebra": torch.linalg.svdvals,
}


@pytest.mark.parametrize("which", DOCUMENTED)
def test_what_torch_documents_is_not_hidden_whatever_it_is_called_inside(which: str) -> None:
    assert not [node.id for node in fmr.run(Of(DOCUMENTED[which]), X).graph if is_hidden(node)]


def test_what_runs_code_of_python_on_each_number_is_hidden() -> None:
    assert is_hidden(fmr.run(Of(lambda x: x.clone().apply_(abs)), X).graph["/apply#0"])
    assert is_hidden(fmr.run(Of(lambda x: project(x, x)), X[0]).graph["/project#0"])


# ---- weights of a class of their own, values without numbers


class Checked(Tensor):
    """A weight that is read by `linear` alone and is strict about everything else."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Checked":
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            x, weight, *rest = args
            assert isinstance(weight, Checked)
            assert x.dtype == weight.dtype
            return nn.functional.linear(x, weight.held, *rest, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].held)
        raise AssertionError


class Written(Checked):
    """One that says what it stands for."""

    def dequantize(self) -> Tensor:
        return self.held


def with_weights(kind: type[Checked]) -> Net:
    net = with_hidden(Outside, [])
    for layer in net.layer.children():
        layer.weight = nn.Parameter(kind(layer.weight.detach()), requires_grad=False)
    return net


def test_whatever_a_weight_raises_is_a_reason_and_no_error() -> None:
    structure = fmr.locate(fmr.run(with_weights(Checked), X))
    assert [bool(one.certified) for one in structure.attention] == [True]  # whose output is made by the layer as it is
    assert not structure.mlps
    assert {one.reason for one in structure.rejected} == {"it cannot be recomputed: AssertionError"}


def test_a_weight_that_says_what_it_stands_for_is_recomputed_with_that() -> None:
    structure = fmr.locate(fmr.run(with_weights(Written), X))
    assert [bool(part.certified) for part in (*structure.attention, *structure.mlps)] == [True, True]


def test_a_run_without_numbers_is_located_as_its_graph_is() -> None:
    run = fmr.run(with_hidden(Outside, []).to("meta"), X.to("meta"))
    structure = fmr.locate(run)
    assert [part.certified for part in (*structure.attention, *structure.mlps)] == [None, None]
    assert not structure.rejected
    assert structure.unproven == "the run was on the meta device, where values have no numbers"
    assert repr(structure).splitlines()[1] == f"  not certified {structure.unproven}"
    with pytest.raises(StructureError, match="Nothing can be recomputed: the run was on the meta device"):
        structure.attention[0].check(run)


def test_locate_computes_by_itself_under_a_default_device_and_a_fake_mode() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    net = with_hidden(Outside, [])
    run = fmr.run(net, X)
    with torch.device("meta"):
        (block,) = fmr.locate(run).attention
        assert block.certified
        assert block.check(run).ok
    with FakeTensorMode() as mode:
        assert fmr.locate(run).attention[0].certified
        fake = fmr.run(with_hidden(Outside, []), torch.randn(2, 5, 16))
        assert len(fmr.locate(fake.graph).attention) == 1
        assert fmr.locate(fake).unproven == "the run was in fake tensor mode, where values have no numbers"
    assert mode is not None
    assert fmr.locate(fake).attention[0].certified is None
