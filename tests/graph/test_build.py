"""From events to nodes: edges, arguments, versions of values, sources, opaque values and call sites."""

import contextlib
import gc
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.nests import Hole
from tests.small import Fn


def graph(function: Callable[..., Any], *args: Any, **attributes: Any) -> fmr.Graph:
    found = fmr.run(Fn(function, **attributes), *args).graph
    found.lint()
    return found


def edges(found: fmr.Graph) -> dict[str, list[tuple[str, str]]]:
    return {str(n.id): [(str(p), p.at) for p in n.parents] for n in found.nodes if not n.id.is_source}


X = torch.arange(12.0).view(3, 4)

# ---- edges and arguments


def test_tensors_are_parents_wherever_they_stand_in_the_call() -> None:
    found = graph(lambda self, x, m: torch.where(condition=m, input=x, other=torch.cat([x, x])[:3]), X, X > 2)
    assert edges(found) == {
        "/cat#0": [("input:args.0", "0.0"), ("input:args.0", "0.1")],
        "/getitem#0": [("/cat#0", "0")],
        "/where#0": [("input:args.1", "condition"), ("input:args.0", "input"), ("/getitem#0", "other")],
    }


def test_other_arguments_are_kept_by_position_and_name() -> None:
    found = graph(lambda self, x: x.transpose(0, 1).sum(dim=-1, keepdim=True)[None, ..., 0], X)
    assert dict(found["/transpose#0"].args) == {"1": 0, "2": 1}
    assert dict(found["/sum#0"].args) == {"dim": -1, "keepdim": True}
    assert dict(found["/getitem#0"].args) == {"1": (None, ..., 0)}


def test_tensors_among_indices_are_parents_and_the_rest_are_arguments() -> None:
    found = graph(lambda self, x, i: x[i, 1:], X, torch.tensor([2, 0]))
    assert edges(found)["/getitem#0"] == [("input:args.0", "0"), ("input:args.1", "1.0")]
    assert dict(found["/getitem#0"].args) == {"1": (Hole("1.0"), slice(1, None))}


def test_a_list_that_the_model_changes_later_is_kept_as_it_was_given() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        parts = [x, x + 1]
        joined = torch.cat(parts)
        parts.clear()
        return joined

    assert edges(graph(forward, X))["/cat#0"] == [("input:args.0", "0.0"), ("/add#0", "0.1")]


def test_several_outputs_are_nodes_of_one_op() -> None:
    found = graph(lambda self, x: self.rnn(x)[1][0] + x.max(0)[1][:1], X[:, None], rnn=nn.LSTM(4, 4))
    assert [str(n.id) for n in found.find("rnn/lstm#0*")] == ["rnn/lstm#0:0", "rnn/lstm#0:1", "rnn/lstm#0:2"]
    assert found["rnn/lstm#0:1"].parents == found["rnn/lstm#0:0"].parents
    assert edges(found)["/add#0"] == [("rnn/lstm#0:1", "0"), ("/getitem#0", "1")]
    assert edges(found)["/getitem#0"] == [("/max#0:1", "0")]


def test_what_is_made_from_nothing_has_no_parents() -> None:
    found = graph(lambda self, x: x + torch.zeros(4) + torch.arange(4) + torch.tensor([1.0, 2, 3, 4]), X)
    for name in ("/zeros#0", "/arange#0", "/tensor#0"):
        assert found[name].parents == ()


# ---- values and their versions


def test_an_in_place_op_makes_a_new_value_that_later_ops_read() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        y += 1
        y[0] = 5
        return y.relu()

    assert edges(graph(forward, X)) == {
        "/mul#0": [("input:args.0", "0")],
        "/add#0": [("/mul#0", "0")],
        "/setitem#0": [("/add#0", "0")],
        "/relu#0": [("/setitem#0", "0")],
    }


def test_a_write_through_a_view_gives_the_base_a_new_value_and_the_other_way_round() -> None:
    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        base = x * 1
        row, other = base[0], base[1]
        row.add_(1)
        total = base.sum()
        base.mul_(2)
        return total, row + other

    found = edges(graph(forward, X))
    assert found["/sum#0"] == [("/alias#0", "0")]
    assert found["/alias#0"] == [("/mul#0", "0"), ("/add#0", "1")]
    assert found["/add#1"] == [("/alias#1", "0"), ("/alias#2", "1")]
    assert found["/alias#1"] == [("/add#0", "0"), ("/mul#1", "1")]
    assert found["/alias#2"] == [("/getitem#1", "0"), ("/mul#1", "1")]


def test_a_write_beside_a_view_leaves_it_what_it_is() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        base = x * 1
        first, second = base[0], base[1]
        first.zero_()
        return second.relu()

    assert edges(graph(forward, X))["/relu#0"] == [("/getitem#1", "0")]


def test_a_write_to_an_input_is_seen_by_what_shares_its_memory() -> None:
    def forward(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2.0)
        return y + 1

    x = X.clone()
    found = graph(forward, x, x[0])
    assert edges(found)["/add#0"] == [("/alias#0", "0")]
    assert edges(found)["/alias#0"] == [("input:args.1", "0"), ("/mul#0", "1")]


def test_a_parameter_met_first_after_its_memory_was_written_is_a_changed_value() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        self.flat.mul_(2.0)
        return x + self.part

    model = Fn(forward)
    model.flat = nn.Parameter(torch.ones(8))
    model.part = nn.Parameter(model.flat.data[:4])
    run = fmr.run(model, X)
    assert edges(run.graph)["/add#0"] == [("input:args.0", "0"), ("/alias#0", "1")]
    assert edges(run.graph)["/alias#0"] == [("param:part", "0"), ("/mul#0", "1")]
    assert run["param:part"].tolist() == [1.0] * 4
    assert run["/alias#0"].tolist() == [2.0] * 4


def test_no_value_is_taken_for_another_that_had_its_address() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for _ in range(50):
            x = (x + 1) * torch.ones(4)
            gc.collect(0)
        return x

    with fmr.track(model := Fn(forward), keep="none") as run, torch.no_grad():
        model(X)
    found = edges(run.graph)
    for k in range(1, 50):
        assert found[f"/add#{k}"] == [(f"/mul#{k - 1}", "0")]
        assert found[f"/mul#{k}"] == [(f"/add#{k}", "0"), (f"/ones#{k}", "1")]


# ---- sources and opaque values


def test_only_sources_that_are_read_become_nodes_but_all_inputs_do() -> None:
    found = graph(lambda self, x, y, z: self.used(x), X, X + 1, {"a": [X + 2]}, used=nn.Linear(4, 1), unused=nn.Linear(4, 1))
    assert [str(n.id) for n in found.sources] == [
        "input:args.0", "input:args.1", "input:args.2.a.0", "param:used.weight", "param:used.bias",
    ]  # fmt: skip


def test_a_tensor_that_was_made_outside_is_opaque_in_the_call_that_reads_it() -> None:
    outside = torch.ones(4)
    found = graph(lambda self, x: self.inner(x), X, inner=Fn(lambda self, x: x + outside))
    assert edges(found) == {"inner/opaque#0": [], "inner/add#0": [("input:args.0", "0"), ("inner/opaque#0", "1")]}
    assert [str(n.id) for n in found.opaque] == ["inner/opaque#0"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_code_is_an_opaque_value_of_its_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Tanh())
    found = fmr.run(model, X).graph
    found.lint()
    (hidden,) = found.opaque
    assert found["2/tanh#0"].parents == (hidden.id,)
    assert found["0/linear#0"] in found.ancestors(hidden)


def test_a_functorch_transform_is_one_opaque_value_that_reads_its_arguments() -> None:
    found = graph(lambda self, x: torch.func.vmap(lambda row: row.sin() * 2)(x + 1).relu(), X)
    assert edges(found) == {
        "/add#0": [("input:args.0", "0")],
        "/opaque#0": [("/add#0", "0")],
        "/relu#0": [("/opaque#0", "0")],
    }


def test_an_op_that_raises_leaves_no_node() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        with contextlib.suppress(RuntimeError):
            x.view(7, 7)
        return x.relu()

    assert list(edges(graph(forward, X))) == ["/relu#0"]


def test_a_module_that_raises_and_is_caught_leaves_its_ops_and_no_output() -> None:
    def fails(self: nn.Module, x: Tensor) -> Tensor:
        x.tanh()
        raise ValueError

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        try:
            return self.part(x)
        except ValueError:
            return x.relu()

    found = graph(forward, X, part=Fn(fails))
    assert list(edges(found)) == ["part/tanh#0", "/relu#0"]
    assert found.module("part").output is None
    assert found.module("").output.id == "/relu#0"


# ---- call sites


def here(offset: int) -> str:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return f"tests/graph/test_build.py:{frame.f_back.f_lineno + offset}"


LINES: dict[str, str] = {}


def marked(self: nn.Module, x: Tensor) -> Tensor:
    LINES["mul"], y = here(0), x * 2
    LINES["softmax"], y = here(0), torch.nn.functional.softmax(y, -1)
    LINES["linear"], y = here(0), self.line(y)
    LINES["sum"] = here(1)
    return y.sum(
        dim=-1,
    )


def test_each_op_knows_the_line_of_the_users_code() -> None:
    found = graph(marked, X, line=nn.Linear(4, 4))
    for name, node in {"mul": "/mul#0", "softmax": "/softmax#0", "linear": "line/linear#0", "sum": "/sum#0"}.items():
        assert found[node].where.endswith(LINES[name])
    assert found["input:args.0"].where == ""


def test_a_call_site_of_a_library_is_written_as_it_is_imported() -> None:
    from tests.models import build

    model, args, kwargs = build("gpt2")
    where = fmr.run(model, *args, keep="none", **kwargs).graph["transformer.h.0.attn/scaled_dot_product_attention#0"].where
    assert where.startswith("transformers/")
    assert where.rpartition(":")[2].isdigit()
