"""A recorded pass run again from its graph has the bits of the model under the same edits, or is refused by name."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from fmr.errors import EditError, ReplayError
from tests.models import ZOO
from tests.promises.test_edits import alike, decoder, editable
from tests.small import Fn

HARD = {"inner_backward"}


@pytest.mark.parametrize("name", [name for name in ZOO if name not in HARD])
def test_every_op_of_a_recording_makes_the_same_bits_again(name: str) -> None:
    model, args, kwargs = ZOO[name]()
    verdict = fmr.run(model.eval(), *args, **kwargs).verify()
    assert verdict.differ == ()
    assert verdict.same > 0
    assert len(verdict.refused) <= (3 if name in ("encoder_padded", "parts", "vmapped", "func_grad", "scripted") else 0)


def test_a_recording_that_is_not_what_the_ops_made_is_found_out() -> None:
    model, ids = decoder()
    run = fmr.run(model, ids)
    name = run.graph.find("*mlp.c_fc*")[-1].id
    run.last.values[name] = run[name] + 1e-6
    verdict = run.verify()
    assert name in verdict.differ
    assert not verdict
    assert f"differs  {name}" in repr(verdict)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in HARD])
def test_a_replay_under_an_edit_is_the_model_under_it(name: str) -> None:
    model, args, kwargs = ZOO[name]()
    model.eval()
    run = fmr.run(model if name == "scripted" else copy.deepcopy(model), *args, **kwargs)
    done = 0
    for value in editable(run.graph, most=12):
        if not run.graph[value].dtype.is_floating_point:
            continue
        asked = {value: edits.Scale(0.75)}
        try:
            again = fmr.replay(run, edits=asked)
        except (ReplayError, EditError, RuntimeError):
            continue
        try:
            twin = model if name == "scripted" else copy.deepcopy(model)  # some write into their buffers
            expected = fmr.run(twin, *args, keep=(), edits=asked, **kwargs)
        except EditError:
            continue
        assert alike(again.output, expected.output), value
        done += 1
    assert done > 0 or name in ("vmapped", "func_grad", "encoder_padded")


def test_a_replay_can_be_read_like_a_run_and_says_what_it_did_not_compute() -> None:
    model, ids = decoder()
    run = fmr.run(model, ids)
    site = fmr.Site("transformer.h.0", positions=1)
    again = fmr.replay(run, edits={site: edits.Zero()}, want="transformer.h.1.ln_1")
    assert not again[site].any()
    assert again.receipts[site].changed == 2 * 16
    expected = fmr.run(model, ids, edits={site: edits.Zero()})
    assert torch.equal(again["transformer.h.1.ln_1"], expected["transformer.h.1.ln_1"])
    with pytest.raises(fmr.IdError, match=r"was not computed in this replay. Name it: want=\['lm_head/linear#0'\]"):
        again["lm_head/linear#0"]
    with pytest.raises(ReplayError, match="This run was recorded with edits"):
        fmr.replay(again, edits={site: edits.Zero()})


def test_what_is_frozen_keeps_its_value() -> None:
    model, ids = decoder("eager")
    run = fmr.run(model, ids)
    blocks = fmr.locate(run).attention
    frozen = fmr.replay(run, edits={"transformer.h.0": edits.Scale(2.0)}, freeze=[b.z for b in blocks])
    loose = fmr.replay(run, edits={"transformer.h.0": edits.Scale(2.0)})
    assert torch.equal(frozen[blocks[1].z], run[blocks[1].z])
    assert not torch.equal(loose[blocks[1].z], run[blocks[1].z])
    part = blocks[1].z.at(heads=[0, 2])
    some = fmr.replay(run, edits={"transformer.h.0": edits.Scale(2.0)}, freeze=[part])
    assert torch.equal(some[part], run[part])
    assert torch.equal(some[blocks[1].z.at(heads=1)], loose[blocks[1].z.at(heads=1)])


def test_inner_values_of_kernels_are_edited_and_other_heads_keep_their_bits() -> None:
    model, ids = decoder("sdpa")
    run = fmr.run(model, ids)
    block = fmr.locate(run).attention[0]
    asked = {block.pattern.at(heads=1): edits.Zero()}
    again, expected = fmr.replay(run, edits=asked), fmr.run(model, ids, edits=asked)
    assert torch.equal(again.output.logits, expected.output.logits)
    others = block.z.at(heads=[0, 2, 3])
    assert torch.equal(again[others], run[others])


# ---- edges


class Sum(nn.Module):
    """Two writers and two readers of one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = self.a(x) + x
        return total.tanh(), total.exp() + self.b(total)


def test_an_edge_is_what_one_reader_sees_of_one_writer() -> None:
    model, x = Sum(), torch.randn(2, 3)
    run = fmr.run(model, x)
    again = fmr.replay(run, edits={fmr.Edge("a/linear#0", "/tanh#0"): edits.Zero()})
    assert torch.equal(again.output[0], x.tanh())
    assert torch.equal(again.output[1], run.output[1])
    readers = ["/tanh#0", "/exp#0", "b/linear#0"]
    every = fmr.replay(run, edits={fmr.Edge("a/linear#0", reader): edits.Scale(0.5) for reader in readers})
    node = fmr.replay(run, edits={"a/linear#0": edits.Scale(0.5)})
    assert all(torch.equal(a, b) for a, b in zip(every.output, node.output, strict=True))
    with pytest.raises(ReplayError, match="b does not read /exp#0: nothing leads from there to it"):
        fmr.replay(run, edits={fmr.Edge("/exp#0", "b"): edits.Zero()})
    with pytest.raises(ReplayError, match=r"a does not read /exp#0: it runs before. Expected a reader that runs after"):
        fmr.replay(run, edits={fmr.Edge("/exp#0", "a"): edits.Zero()})


def test_a_module_call_is_a_writer_by_its_path() -> None:
    run = fmr.run(Sum(), torch.randn(2, 3))
    by_path, by_id = (fmr.replay(run, {fmr.Edge(name, "/tanh#0"): edits.Scale(0.5)}) for name in ("a", "a/linear#0"))
    assert all(torch.equal(a, b) for a, b in zip(by_path.output, by_id.output, strict=True))
    assert by_path.receipts["a"].fired == 1
    assert not torch.equal(by_path.output[0], run.output[0])


class Norm(nn.Module):
    """A norm written out, which reads its input twice."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        return (wide * wide.pow(2).mean(-1, keepdim=True).rsqrt()).to(x.dtype)


class Block(nn.Module):
    """Two writers on a stream, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.end = nn.Linear(4, 4), nn.Linear(4, 4), Norm(), Norm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(self.norm(x)).tanh()
        return self.end(x)


def test_a_module_call_reads_an_edge_with_all_its_ops() -> None:
    model, x = Block(), torch.randn(2, 4)
    run = fmr.run(model, x)
    first, second = run["first/linear#0"], run["/tanh#0"]
    direct = fmr.replay(run, edits={fmr.Edge("first/linear#0", "end"): edits.Zero()})
    assert torch.equal(direct.output, model.end((x + torch.zeros_like(first)) + second))
    through = fmr.replay(run, edits={fmr.Edge("first/linear#0", "norm"): edits.Zero()})
    assert torch.equal(through.output, model.end((x + first) + model.second(model.norm(x)).tanh()))
    both = fmr.replay(run, edits={fmr.Edge("first/linear#0", reader): edits.Zero() for reader in ("norm", "end")})
    assert torch.equal(both.output, fmr.replay(run, edits={"first/linear#0": edits.Zero()}).output)
    assert both.receipts["first/linear#0"].fired == 1
    with pytest.raises(ReplayError, match=r"end/rsqrt#0 does not read .* reads it first: 'end'"):
        fmr.replay(run, edits={fmr.Edge("first/linear#0", "end/rsqrt#0"): edits.Zero()})


# ---- refusals


class Hands(nn.Module):
    """A tensor under two names."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        same = h.to(torch.float32)
        return same.exp() + h


def test_a_value_that_an_op_handed_on_is_refused_and_its_origin_named() -> None:
    run = fmr.run(Hands(), torch.randn(2))
    with pytest.raises(ReplayError, match=r"'/to#0' is the very tensor that an op was given, /mul#0.*Edit /mul#0 instead"):
        fmr.replay(run, edits={"/to#0": edits.Zero()})
    assert fmr.replay(run, edits={"/mul#0": edits.Zero()}).output.tolist() == [1, 1]


def test_random_numbers_and_hidden_code_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    run = fmr.run(model, torch.randn(3, 4))
    with pytest.raises(ReplayError, match="1/dropout#0 drew random numbers"):
        fmr.replay(run, edits={"0": edits.Scale(2.0)})
    fmr.replay(run, edits={"1": edits.Scale(2.0)})
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    run = fmr.run(nn.Sequential(nn.Linear(4, 4), scripted), torch.randn(3, 4))
    with pytest.raises(ReplayError, match="what makes it could not be seen"):
        fmr.replay(run, edits={"0": edits.Scale(2.0)})


def test_an_edit_that_writes_leaves_the_recording_as_it_was() -> None:
    run = fmr.run(Fn(lambda self, x: x * 2 + 1), torch.ones(2, 3))
    with pytest.raises(EditError, match="wrote into the value that it was given"):
        fmr.replay(run, edits={"/mul#0": lambda value, context: value.mul_(2)})
    assert torch.equal(run["/mul#0"], torch.full((2, 3), 2.0))


def test_a_run_without_values_and_an_edit_that_lies_nowhere_are_refused() -> None:
    model, ids = decoder()
    with pytest.raises(fmr.IdError):
        fmr.replay(fmr.run(model, ids, keep="none"), edits={"transformer.h.0": edits.Zero()})
    with pytest.raises(fmr.FmrError):
        fmr.replay(fmr.run(model, ids), edits={"transformer.h.7": edits.Zero()})


def test_a_replay_of_a_loaded_run_gives_its_values(tmp_path: Any) -> None:
    model, ids = decoder()
    run = fmr.run(model, ids)
    run.save(tmp_path / "run.fmr", params=True)
    back = fmr.load(tmp_path / "run.fmr")
    asked, want = {"transformer.h.0.mlp": edits.Zero()}, "lm_head/linear#0"
    a, b = (fmr.replay(one, edits=asked, want=want)[want] for one in (run, back))
    torch.testing.assert_close(a, b)


class Returns(nn.Module):
    """What an op hands on is read once, and its origin is returned besides."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 2
        return h.to(torch.float32).exp(), h


def test_a_value_that_was_handed_on_and_is_returned_by_its_first_name_is_refused() -> None:
    run = fmr.run(Returns(), torch.randn(2))
    with pytest.raises(ReplayError, match="'/to#0' is the very tensor that an op was given"):
        fmr.replay(run, {"/to#0": edits.Zero()})


# ---- what the model's Python asks of values


class Asks(nn.Module):
    """Python goes by numbers in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        if self.way == "item":
            return y / y.abs().max().item()
        if self.way == "bool":
            return y + 1 if y.sum() > 0 else y - 1
        if self.way == "float":
            return y * float(y.mean())
        if self.way == "int":
            return y[: int(y.abs().max().clamp(1, 20) / 5)] * 3
        if self.way == "tolist":
            return y * sum(y.flatten().tolist())
        if self.way == "numpy":
            return y * float(y.numpy().sum())
        if self.way == "equal":
            return y + 1 if torch.equal(y, x * 2) else y - 1
        while y.norm() > 1:
            y = y / 2
        return y


@pytest.mark.parametrize("way", ["item", "bool", "float", "int", "tolist", "numpy", "equal", "while"])
def test_a_number_that_the_models_python_was_told_may_not_change(way: str) -> None:
    run = fmr.run(Asks(way), torch.tensor([[0.5, 1.0], [0.25, 2.0]]))
    with pytest.raises(ReplayError, match=r"changes under these edits, and the model's Python asked.*test_replay.py:\d+"):
        fmr.replay(run, edits={"/mul#0": edits.Scale(-3.0)})
    assert torch.equal(fmr.replay(run, edits={"/mul#0": edits.Scale(1.0)}).output, run.output)
    before = fmr.replay(run, edits={"input:x": edits.Scale(-3.0)}, want="/mul#0")
    assert torch.equal(before["/mul#0"], run["/mul#0"] * -3)


def test_what_was_asked_is_in_the_graph_and_its_file(tmp_path: Any) -> None:
    run = fmr.run(Asks("item"), torch.ones(2, 2))
    assert list(run.graph.asked) == ["/max#0"]
    run.graph.save(tmp_path / "graph.json")
    run.save(tmp_path / "run.fmr")
    assert fmr.Graph.load(tmp_path / "graph.json").asked == run.graph.asked
    assert fmr.load(tmp_path / "run.fmr").graph.asked == run.graph.asked
    held = fmr.replay(run, edits={"/mul#0": edits.Scale(2.0)}, freeze=["/max#0"])
    assert torch.equal(held.output, run.output * 2)


# ---- passes, outputs, types


def test_a_replay_is_of_the_pass_with_its_number(tmp_path: Any) -> None:
    model = nn.Linear(2, 2)
    runs = []
    for shift in (0.0, 10.0):
        with fmr.track(model) as run:
            model(torch.ones(1, 2) + shift)
            model(torch.ones(1, 2) * 5 + shift)
        runs.append(run)
    first, second = runs
    first.save(tmp_path / "run.fmr", params=True)
    for one in (first, fmr.load(tmp_path / "run.fmr")):
        again = fmr.replay(one.passes[1], {"input:input": edits.Interchange(second)}, want="/linear#0")
        torch.testing.assert_close(again["/linear#0"], second.passes[1]["/linear#0"])
        with pytest.raises(EditError, match="never fired"):
            fmr.replay(one.passes[1], {fmr.Site("/linear#0", passes=0): edits.Zero()}, want="/linear#0")


def test_an_output_that_was_not_computed_is_none() -> None:
    run = fmr.run(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2))
    assert fmr.replay(run, {"0": edits.Zero()}, want="0").output is None
    assert fmr.replay(run, {"0": edits.Zero()}).output is not None


def test_a_run_kept_in_another_type_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2)
    with pytest.raises(ReplayError, match=r"kept with to=None, dtype=torch.float64, .*: record it without to= and dtype="):
        fmr.replay(fmr.run(model, x, dtype=torch.float64), {"0": edits.Zero()})
    with pytest.raises(ReplayError, match=r"kept with to='meta'"):
        fmr.replay(fmr.run(model, x, to="meta"), {"0": edits.Zero()})


def test_edits_of_what_is_frozen_come_after_it() -> None:
    run = fmr.run(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2))
    name = "1/linear#0"
    for key in (name, fmr.Site(name, units=slice(None))):
        for edited in (name, fmr.Site(name, units=slice(None))):
            again = fmr.replay(run, {"0": edits.Scale(5.0), edited: edits.Scale(2.0)}, freeze=[key])
            assert torch.equal(again.output, run.output * 2)


def test_a_nan_that_was_filled_in_is_found_out() -> None:
    run = fmr.run(nn.Sequential(nn.ReLU(), nn.ReLU()), torch.tensor([1.0, float("nan"), float("inf")]))
    assert run.verify()
    run.last.values["1/relu#0"] = torch.tensor([1.0, 0.0, float("inf")])
    assert run.verify().differ == ("1/relu#0",)


class Product(nn.Module):
    """A product whose operands both come from one writer."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        return (h @ h.transpose(-1, -2)).softmax(-1)


def test_an_edge_does_not_go_through_a_product_of_two_values_of_its_writer() -> None:
    run = fmr.run(Product(), torch.randn(2, 2))
    with pytest.raises(ReplayError, match=r"/softmax#0 does not read /mul#0: .* /matmul#0 the last. Expected what reads it"):
        fmr.replay(run, {fmr.Edge("/mul#0", "/softmax#0"): edits.Zero()})


class Parts(nn.Module):
    """A part of a split that is written in place."""

    def forward(self, x: Tensor) -> Tensor:
        c = x * 2
        a, b = torch.split(c, [3, 5], -1)
        a.sigmoid_()
        return c * b.sum()


def test_a_part_of_a_split_that_was_written_is_replayed_or_refused_by_name() -> None:
    run = fmr.run(Parts(), torch.randn(2, 8))
    with pytest.raises(ReplayError, match=r"/alias#0 was overwritten in place on the way"):
        fmr.replay(run, {"/split#0:1": edits.Zero()})
