"""One op run again: the arguments as they were given, the same function, the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fmr
from fmr import StructureError
from fmr.disk.files import printed
from fmr.graph.execute import call_of, execute
from fmr.ids import Parent, TensorId
from fmr.nests import Hole, exact
from fmr.nodes import Node
from tests.models import build
from tests.small import Fn

X = torch.arange(24.0).reshape(2, 3, 4).sin()
MASK = X > 0.5
GRU = torch.nn.GRU(4, 3)
IDS = torch.tensor([1, 0, 1])


def recorded(function: Callable[..., Any], *inputs: Any) -> fmr.Run:
    return fmr.run(Fn(lambda self, *given: function(*given)), *inputs)


def same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and bool(
        torch.equal(a, b) or torch.equal(a.isnan(), b.isnan() & (a != a))
    )


def again(run: fmr.Run, path: Path) -> int:
    """Run every op of a run again, and of the same run loaded from a file; the number of ops."""
    run.save(path / "run.fmr", params=True)
    back, done = fmr.load(path / "run.fmr"), 0
    for now in (run, back):
        for node in now.graph.nodes:
            if not node.id.is_source and node.op not in ("alias", "opaque", "empty"):  # nobody filled what is empty
                made = execute(node, {parent.id: now[parent] for parent in node.parents})
                assert same(made, run[node]), (node.id, node.function, node.args)
                done += 1
    return done


CALLS: dict[str, Callable[..., Any]] = {
    "a list of places": lambda x: x[[0, 1]],
    "a tuple of places": lambda x: x[0, 1],
    "a list in a tuple": lambda x: x[:, [0, 2], None],
    "a list of lists": lambda x: x[[[0, 1], [1, 0]]],
    "a mask and lists": lambda x: x[0][MASK[0], None],
    "a tensor and a list": lambda x: x[IDS[:2], [0, 1]],
    "a list with tensors": lambda x: x[[IDS[0], IDS[1]]],
    "bounds that are tensors": lambda x: x[:, IDS[1] : IDS[0] + 1],
    "an array of places": lambda x: x[np.array([1, 0])],
    "an array that masks": lambda x: x[np.array([True, False])],
    "an array in a tuple": lambda x: x[:, np.array([1, 0])],
    "numbers of numpy": lambda x: x * np.float32(0.3) + np.float64(0.1) - np.float16(0.7),
    "places of numpy": lambda x: x[np.int64(1)][[np.int64(0)]].sum(np.int64(0)),
    "a number of numpy on the left": lambda x: np.float32(0.3) * x,
    "infinite and complex": lambda x: x.masked_fill(MASK, float("-inf")) * 2j,
    "more than 64": lambda x: x[[0, 1] * 50],
    "more than 64 in a tuple": lambda x: x.reshape(-1).split([1] * 24)[5] + torch.tensor(tuple(range(100)))[7],
    "more than 256 tensors": lambda x: torch.cat([*x.reshape(-1).split(1)] * 12),
    "tensors in a list": lambda x: torch.cat([x, x + 1], dim=1),
    "tensors in a tuple": lambda x: torch.stack((x, x), -1),
    "outputs in a list": lambda x: torch.stack([*x.max(1)][:1]),
    "outputs as they are": lambda x: torch.cat(x.unbind()),
    "methods in Python": lambda x: x.unflatten(-1, (2, -1)).flatten(1).split([3, 9], 1)[0],
    "ellipsis and none": lambda x: x[..., None, 1:],
    "dicts by name": lambda x: F.pad(input=x, pad=[1, 2], mode="constant", value=np.float32(2)),
    "types by name": lambda x: x.softmax(-1, dtype=torch.float64).to(torch.bfloat16).float().type(torch.half).to(x),
    "types by place": lambda x: F.softmax(x, -1, 3, torch.float64).sum(-1, True, dtype=torch.float32).double().int().bool(),
    "reflected": lambda x: 2 - x + 3 / (1 + x * x) - 2**x + 7 % (x + 2) + 5 // (x + 2),
    "powers": lambda x: (x**2 + x.pow(2) + torch.pow(2, x)).pow_(2).__ipow__(3),
    "reflected bits": lambda x: (5 & x.int()) | (3 ^ x.int()) << (1 << MASK.int()),
    "norms of three homes": lambda x: x.norm() + torch.norm(x, 1) + torch.linalg.norm(x[0], 2) + torch.linalg.vector_norm(x),
    "diagonals of two homes": lambda x: torch.linalg.diagonal(x)[0, 0] + x.diagonal()[0, 0],
    "decompositions of two homes": lambda x: [*torch.linalg.svd(x), *torch.linalg.qr(x)][2],
    "layer norms of two homes": lambda x: F.layer_norm(x, (4,)) + torch.layer_norm(x, (4,), None, None, 1e-5, False),
    "embeddings of two homes": lambda x: F.embedding(IDS, x[0]) + torch.embedding(x[0], IDS),
    "where of two homes": lambda x: torch.where(MASK, x, 0.0) + x.where(MASK, x + 1) + MASK.where(MASK, MASK),
    "softmax that is safe": lambda x: torch._safe_softmax(x.masked_fill(X == X, float("-inf")), -1),
    "fourier": lambda x: torch.fft.ifft(torch.fft.rfft(x, norm="ortho")).real + x.mT.T.mT.sum(),
    "special": lambda x: torch.special.expit(x) + torch.special.xlogy(x.abs(), 2.0),
    "registered": lambda x: torch.ops.aten.add.Tensor(x, x) + torch.ops.aten.relu(x),
    "einsum": lambda x: torch.einsum("abc,dbc,dbe->aec", x, x, x[..., :2]),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([1, 2], [1, 2])),
    "fused": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=~MASK[:, :, :3], scale=np.float32(0.5)),
    "convolution": lambda x: F.conv1d(x, torch.ones(2, 3, 3), padding=1) + F.max_pool1d(x, 3, 1, 1)[:, :2],
    "pooling with places": lambda x: F.max_pool2d(x, 2, return_indices=True)[0] + F.adaptive_avg_pool2d(x, (1, 2)),
    "scaled": lambda x: F.interpolate(x[None], size=[6, 8], mode="bilinear") + F.unfold(x[:, None], (2, 2))[0, 0, 0],
    "made of nothing": lambda x: x + torch.zeros(4) + torch.arange(4) + torch.tensor([[1.0], [2.0], [3]]) + x.new_ones(4),
    "made of an array": lambda x: x + torch.tensor(np.arange(4.0)) + torch.from_numpy(np.ones(4)) + torch.as_tensor([1] * 4),
    "in place": lambda x: x.clone().add_(1).mul_(2).relu_().clamp_(max=1.0),
    "in place by an argument": lambda x: F.relu(F.dropout(x.clone(), 0.5, False, True), inplace=True),
    "twice the same in place": lambda x: (y := x.clone()).mul_(y),
    "statistics": lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True),
    "data": lambda x: x.data + x.real,
    "functions in place": lambda x: torch.relu_(F.hardtanh_(x.clone())),
    "several outputs": lambda x: x.topk(2, -1)[0] + torch.aminmax(x, dim=-1, keepdim=True)[0] + x.sort()[1][..., :2],
    "a recurrent net": lambda x: GRU(x)[0],
    "bags and losses": lambda x: F.cross_entropy(x[0], IDS, label_smoothing=0.1) + F.embedding_bag(IDS[None], x[0])[0].sum(),
    "meshes": lambda x: torch.meshgrid(x[0, 0], x[0, 1], indexing="ij")[1] + torch.broadcast_tensors(x, x[0])[1][0, 0],
    "drawn from no chance": lambda x: F.dropout(x, 0.0) + torch.dropout(x, 0.5, False) + F.gelu(x, approximate="tanh"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
def test_an_op_run_again_gives_the_same_bits_also_from_a_file(function: Callable[..., Any], tmp_path: Path) -> None:
    assert again(recorded(function, X), tmp_path) >= 2


def test_what_is_written_to_by_an_argument_or_by_place_is_made_again(tmp_path: Path) -> None:
    def forward(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, [0, 2]] = 5.0
        y[MASK] = x[MASK] * 2
        y[0, IDS[0]] = x[1, 0]
        y[1:] -= np.float32(0.25)
        out = torch.empty(2, 3, 4, dtype=torch.float64)
        torch.add(x, 1, out=out)
        torch._foreach_add_([y, out], 1.0)
        return y + out.copy_(x)

    x = X.clone()
    assert again(recorded(forward, x), tmp_path) > 20
    assert torch.equal(x, X)


# ---- any index, any nest

SIZES = (3, 4, 2)


def _places(size: int) -> st.SearchStrategy[Any]:
    return st.lists(st.integers(-size, size - 1), min_size=2, max_size=2)


def _one_index(size: int) -> st.SearchStrategy[Any]:
    bound = st.none() | st.integers(0, size) | st.integers(0, size).map(torch.tensor) | st.integers(0, size).map(np.int64)
    return st.one_of(
        st.integers(-size, size - 1),
        st.integers(0, size - 1).map(np.int32),
        st.integers(0, size - 1).map(torch.tensor),
        st.builds(slice, bound, bound, st.none() | st.integers(1, 2)),
        _places(size),
        _places(size).map(tuple),
        _places(size).map(torch.tensor),
        _places(size).map(np.array),
        _places(size).map(lambda places: [torch.tensor(places[0]), places[1]]),
    )


INDICES = st.one_of(
    _one_index(SIZES[0]),
    st.tuples(*(_one_index(size) for size in SIZES)),
    st.tuples(_one_index(3), st.none(), _one_index(4), st.just(...)),
    st.tuples(st.just(...), _one_index(2)),
    st.lists(_places(3), min_size=2, max_size=2),
)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(INDICES)
def test_any_index_is_made_again(index: Any) -> None:
    value = torch.arange(24.0).reshape(SIZES)
    try:
        value[index]
    except (IndexError, TypeError):  # torch refuses it
        return
    graph = recorded(lambda x: x[index], value).graph
    for now in (graph, fmr.Graph.from_dict(graph.to_dict())):
        node = now["/getitem#0"]
        tensors = {parent.id: value if parent.at == "0" else _at(index, parent.at) for parent in node.parents}
        assert len(node.parents) == 1 + len(_tensors_in(index))
        assert same(execute(node, tensors), value[index])


def _tensors_in(index: Any) -> list[Tensor]:
    if isinstance(index, Tensor):
        return [index]
    inside = (
        [index.start, index.stop, index.step]
        if isinstance(index, slice)
        else index
        if isinstance(index, (list, tuple))
        else []
    )
    return [found for item in inside for found in _tensors_in(item)]


def _at(index: Any, at: str) -> Tensor:
    for step in at.split(".")[1:]:
        index = index[int(step)] if step.isdigit() else getattr(index, step)
    assert isinstance(index, Tensor)
    return index


# ---- arguments as they were given


def test_each_kind_of_nest_is_what_it_was() -> None:
    seen: list[Any] = []

    def forward(x: Tensor) -> Tensor:
        _ = x[[0, 1]], x[0, 1], x[:, [0]], x[(0,)]
        torch.cat([x, x])
        torch.cat((x, x))
        x[IDS[0] : IDS[1], [1], None]
        return x

    graph = recorded(forward, X).graph
    seen = [dict(node.args) for node in graph.nodes if node.op in ("getitem", "cat")]
    inner = slice(Hole("1.0.start"), Hole("1.0.stop"), None)
    assert [args.get("1", args.get("0")) for args in seen if "1" not in args or args["1"].__class__ is not int] == [
        [0, 1],
        (0, 1),
        (slice(None), [0]),
        (0,),
        [Hole("0.0"), Hole("0.1")],
        (Hole("0.0"), Hole("0.1")),
        (inner, [1], None),
    ]
    reads = {parent.at: str(parent) for parent in graph["/getitem#6"].parents}
    assert reads == {"0": "input:args.0", "1.0.start": "/getitem#4", "1.0.stop": "/getitem#5"}


def test_a_nest_that_the_model_changes_later_is_kept_as_it_was_given() -> None:
    def forward(x: Tensor) -> Tensor:
        places, array, bounds = [0, 1], np.array([0, 1]), {"pad": [1, 1]}
        out = x[places] + x[:, places][:2, :, :] + x[array] + F.pad(x, **bounds)[:, :1, :1]
        places.append(1)
        array[0], bounds["pad"][0] = 1, 5
        return out

    graph = recorded(forward, X[:, :2]).graph
    assert graph["/getitem#0"].args["1"] == [0, 1]
    assert graph["/getitem#1"].args["1"] == (slice(None), [0, 1])
    assert graph["/getitem#3"].args["1"].tolist() == [0, 1]
    assert graph["/pad#0"].args["1"] == [1, 1]


def test_the_function_that_was_called_is_known_by_its_name() -> None:
    graph = recorded(lambda x: F.layer_norm(torch.linalg.norm(x, 2, -1).add_(1.0), (3,)).T + 1, X).graph
    assert [(node.op, node.function) for node in graph.nodes[1:]] == [
        ("norm", "linalg.linalg_norm"),
        ("add", "Tensor.add_"),
        ("layer_norm", "F.layer_norm"),
        ("T", ""),
        ("add", "Tensor.add"),
    ]


def test_a_call_is_restored_with_its_nests() -> None:
    graph = recorded(lambda x: torch.cat([x, x[IDS]], dim=0), torch.ones(2, 3)).graph
    node = graph["/cat#0"]
    args, kwargs = call_of(node, {parent.id: parent.at for parent in node.parents})  # type: ignore[misc]
    assert (args, kwargs) == ((["0.0", "0.1"],), {"dim": 0})


def test_fused_ops_with_their_tensors_in_a_list_are_opened() -> None:
    run = recorded(lambda x: torch.einsum("ab,bc,cd->ad", [x, x, x]), torch.rand(3, 3))
    assert [node.op for node in run.graph.inner("/einsum#0")] == ["einsum", "einsum"]


def test_a_value_inside_a_call_with_a_list_or_an_out_is_computed_also_while_the_model_runs() -> None:
    x = torch.rand(3, 3)

    def forward(x: Tensor) -> Tensor:
        torch.lerp(x, x + 1, 0.5, out=torch.empty(3, 3))
        return torch.einsum("ab,bc,cd->ad", [x, x, x])

    model = Fn(lambda self, x: forward(x))
    whole, some = fmr.run(model, x), fmr.run(model, x, keep="*#0/*")
    assert set(some.last.kept) == {
        "/einsum#0/einsum#0",
        "/einsum#0/einsum#1",
        *(f"/lerp#0/{op}#0" for op in ("sub", "mul", "add")),
    }
    assert all(same(some[name], whole[name]) for name in some.last.kept)
    assert same(some["/einsum#0/einsum#0"], x @ x)


def test_what_is_made_inside_a_fused_op_is_made_on_the_device_of_its_op() -> None:
    run = recorded(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), X)
    name = "/scaled_dot_product_attention#0/ones#0"
    assert same(execute(run.graph[name], {}), run[name])


def test_long_arrays_that_differ_in_the_middle_are_told_apart() -> None:
    places, others = np.zeros(5000, "i8"), np.zeros(5000, "i8")
    others[2500] = 1
    first, second = recorded(lambda x: x[places] + x[others], X).graph.nodes[1:3]
    assert repr(first.args) == repr(second.args)
    assert exact(first.args) != exact(second.args)
    assert exact(first.args) == exact({**first.args})


def test_what_is_printed_of_an_argument_shows_its_kind_and_is_short() -> None:
    graph = recorded(lambda x: torch.cat([x, x[IDS[0] :, [1, 2]][:, :1].expand(2, 3, 4)]) + x[[0] * 10**5].sum(), X).graph
    assert [printed(graph[name].args[at]) for name, at in (("/cat#0", "0"), ("/getitem#1", "1"))] == [
        "[<0.0>, <0.1>]",
        "(slice(<1.0.start>, None, None), [1, 2])",
    ]
    assert len(printed(graph["/getitem#3"].args["1"])) < 210


# ---- what is not run


def test_a_function_that_is_not_torchs_is_an_error() -> None:
    def node(op: str, function: str, **args: Any) -> Node:
        return Node(fmr.TensorId(f"/{op}#0"), op, "", (), (), torch.float32, torch.device("cpu"), args, "", function)

    for function in (
        "torch.load",
        "torch.save",
        "torch.hub",
        "torch.from_file",
        "ops.aten.from_file",
        "os.system",
        "Tensor.__class__",
    ):
        with pytest.raises(
            StructureError, match=rf"/op#0 cannot be computed again: torch has no function '{function}'.*Expected an op"
        ):
            execute(node("op", function), {})
    with pytest.raises(StructureError, match="its function is not one of torch's"):
        execute(node("op", ""), {})


def test_an_op_that_returns_no_tensor_is_an_error() -> None:
    given, cpu = (Parent("input:x", "0"),), torch.device("cpu")
    node = Node(fmr.TensorId("/max#0:2"), "max", "", given, (), torch.float32, cpu, {}, "", "Tensor.max")
    with pytest.raises(StructureError, match=r"/max#0:2 cannot be computed again: Tensor\.max returned no such tensor"):
        execute(node, {fmr.TensorId("input:x"): X})


def test_a_gradient_that_a_function_took_is_refused_by_name() -> None:
    model, args, kwargs = build("inner_backward")
    refused = fmr.run(model, *args, **kwargs).verify().refused
    assert list(refused) == ["/grad#0:0"]
    assert "cannot be computed again" in refused[TensorId("/grad#0:0")]
