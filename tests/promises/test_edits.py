"""Edits by ID: one that changes nothing changes no bit, the model stays untouched, what is read is what it went on with."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fmr
from fmr import edits
from fmr.errors import EditError
from tests.models import ZOO, build
from tests.residue import torch_state

KEEPS: list[Any] = ["all", "none", "*", ()]
HIDDEN = ("inner_backward",)
"""Models whose forward runs a backward, of whose output nothing can be compared."""


def bits(value: Any) -> list[Tensor]:
    """The tensors of an output."""
    return [tensor for _, tensor in fmr.nests.leaves(fmr.nests.taken(value))]


def alike(a: Any, b: Any) -> bool:
    pairs = list(zip(bits(a), bits(b), strict=True))
    return all(x.is_nested or torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)


def editable(graph: fmr.Graph, most: int = 24) -> list[str]:
    """Some of the values that can be edited, evenly over the graph."""
    hidden = ("alias", "opaque", "input")
    ids = [n.id for n in graph.nodes if n.op not in hidden and -1 not in n.shape and n.id != "buffer:links"]
    return [str(name) for name in ids[:: max(1, len(ids) // most)]]


@pytest.mark.parametrize("name", [name for name in ZOO if name not in HIDDEN])
def test_an_edit_that_copies_a_value_changes_no_bit(name: str) -> None:
    model, args, kwargs = ZOO[name]()
    model.eval()

    def twin() -> nn.Module:  # some write into their buffers
        return model if name == "scripted" else copy.deepcopy(model)

    plain = fmr.run(twin(), *args, **kwargs)
    before, around = copy.deepcopy(model.state_dict()), torch_state()
    for value in editable(plain.graph):
        for keep in ((), "none"):
            if name == "in_place" and plain.graph[value].op in ("getitem", "view", "t", "narrow"):  # which it writes into
                continue
            run = fmr.run(twin(), *args, keep=keep, edits={value: lambda v, c: v.clone()}, **kwargs)
            assert alike(run.output, plain.output), (value, keep)
            assert run.receipts[value].changed == 0
    state = {name: value for name, value in model.state_dict().items() if value.layout == torch.strided}
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert torch_state() == around


def decoder(attention: str = "sdpa") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**shape, attn_implementation=attention)).eval(), torch.randint(2, 32, (2, 6))


def hooked(model: nn.Module, path: str, change: Any, *args: Any) -> Tensor:
    """The logits with a plain forward hook on a module."""
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: change(out))
    try:
        with torch.no_grad():
            return model(*args).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_edit_is_what_a_hook_would_do(attention: str, keep: Any) -> None:
    model, ids = decoder(attention)
    expected = hooked(model, "transformer.h.0.mlp", lambda out: out * 0.5, ids)
    run = fmr.run(model, ids, keep=keep, edits={"transformer.h.0.mlp": edits.Scale(0.5)})
    assert torch.equal(run.output.logits, expected)
    expected = hooked(model, "transformer.h.0.mlp.c_fc", lambda out: torch.cat([out[..., :3] + 1, out[..., 3:]], -1), ids)
    run = fmr.run(model, ids, keep=keep, edits={fmr.Site("transformer.h.0.mlp.c_fc", units=slice(3)): edits.Add(1.0)})
    assert torch.equal(run.output.logits, expected)


@pytest.mark.parametrize("keep", ["all", "*", "plan"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_is_read_of_an_edited_site_is_what_the_model_went_on_with(attention: str, keep: Any) -> None:
    model, ids = decoder(attention)
    block = fmr.locate(fmr.run(model, ids)).attention[1]
    site = block.pattern.at(heads=2)
    wanted = [block.pattern, block.z] if keep == "plan" else keep
    run = fmr.run(model, ids, keep=wanted, edits={site: edits.Zero()})
    plain = fmr.run(model, ids)
    assert not run[site].any()
    assert not run[block.z.at(heads=2)].any()
    others = [0, 1, 3]
    assert torch.equal(run[block.z.at(heads=others)], plain[block.z.at(heads=others)])  # the kernel's bits stay
    assert not torch.equal(run.output.logits, plain.output.logits)


def test_a_recorded_run_says_where_a_value_was_replaced(tmp_path: Any) -> None:
    model, ids = decoder()
    run = fmr.run(model, ids, edits={"transformer.h.0.mlp": edits.Zero()})
    assert [str(name) for name in run.graph.edited] == [str(run.graph.module("transformer.h.0.mlp").output.id)]
    assert "edited  transformer.h.0.mlp" in repr(run.graph)
    run.graph.save(tmp_path / "g.json")
    assert fmr.Graph.load(tmp_path / "g.json").edited == run.graph.edited
    assert fmr.run(model, ids).graph.fingerprint == run.graph.fingerprint
    run.graph.lint()


class Table(nn.Module):
    """Hands out its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self) -> Tensor:
        return self.weight


class Tabled(nn.Module):
    """Reads a weight as it is and as a module returned it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table() + self.table.weight


def test_an_edited_weight_that_a_module_handed_out_is_a_value_beside_the_weight() -> None:
    model, x = Tabled(), torch.randn(2, 4)
    run = fmr.run(model, x, edits={"table": edits.Scale(3.0)})
    torch.testing.assert_close(run.output, x * 3 + 1)
    assert list(run.graph.edited) == ["/opaque#0"]
    assert [str(one) for one in run.graph["/mul#0"].parents] == ["input:x", "/opaque#0"]
    assert [str(one) for one in run.graph["/add#0"].parents] == ["/mul#0", "param:table.weight"]
    assert not run.verify().differ
    assert torch.equal(run["table"], torch.full((4,), 3.0))
    assert torch.equal(run["param:table.weight"], torch.ones(4))


class Handed(nn.Module):
    """Modules and ops that hand on what they are given, beside others that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.same, self.b = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        k = self.same(h)
        return self.b(k) + h + k.to(k.dtype) * h


@pytest.mark.parametrize(
    ("site", "edited", "reads"),
    [
        ("same", "/opaque#0", ["/opaque#0", "a/linear#0"]),
        ("a", "a/linear#0", ["a/linear#0", "a/linear#0"]),
        ("/to#0", "/to#0", ["a/linear#0", "a/linear#0"]),
    ],
)
def test_what_was_handed_on_and_edited_is_a_value_beside_the_one_that_was_given(
    site: str, edited: str, reads: list[str]
) -> None:
    model, x = Handed(), torch.randn(2, 4)
    run = fmr.run(model, x, edits={site: edits.Scale(0.5)})
    graph = run.graph
    assert list(graph.edited) == [edited]
    assert [str(graph[name].parents[0]) for name in ("b/linear#0", "/add#0")][:1] == reads[:1]
    assert str(graph["/add#0"].parents[1]) == reads[1]
    assert set(run.verify().differ) <= {edited}
    before = run["a/linear#0"] if site != "a" else model.a(x)
    torch.testing.assert_close(run[site], before * 0.5)
    assert graph.module("same").output.id == ("/opaque#0" if site == "same" else "a/linear#0")


@pytest.mark.parametrize("name", ["gpt2_eager", "llama", "t5", "whisper", "transformer", "cnn", "shared", "parts"])
def test_every_value_beside_an_edit_is_what_its_op_makes_of_its_parents(name: str) -> None:
    model, args, kwargs = build(name)
    graph = fmr.run(model, *args, keep="none", **kwargs).graph
    known = [node.id for node in graph.nodes if node.op not in ("alias", "opaque") and not node.id.is_source]
    paths = [path for path, call in graph.calls.items() if path and isinstance(call.output, str)]
    for site in (*known[3 :: len(known) // 6], *paths[1 :: len(paths) // 4 + 1]):
        run = fmr.run(model, *args, edits={site: lambda value, context: (value * 0.5).to(value.dtype)}, **kwargs)
        assert set(run.verify().differ) <= set(run.graph.edited), site
        run.graph.lint()


class Writes(nn.Module):
    """In-place ops, a view that is written, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        also = h
        h += 1
        h.relu_()
        a, b = h.chunk(2, -1)
        return torch.cat([a * 2, b], -1) + also


@pytest.mark.parametrize("keep", KEEPS)
def test_an_edited_write_is_seen_through_every_name_of_the_tensor(keep: Any) -> None:
    model, x = Writes().eval(), torch.randn(3, 4)
    with torch.no_grad():
        h = (model.linear(x) + 1) * 10
        h = h.relu()
        expected = torch.cat([h[:, :2] * 2, h[:, 2:]], -1) + h
    run = fmr.run(model, x, keep=keep, edits={"/add#0": edits.Scale(10.0)})
    assert torch.equal(run.output, expected)


@pytest.mark.parametrize("keep", KEEPS)
def test_one_output_of_several_is_edited_alone(keep: Any) -> None:
    model, x = Writes().eval(), torch.randn(3, 4)
    with torch.no_grad():
        h = (model.linear(x) + 1).relu()
    run = fmr.run(model, x, keep=keep, edits={"/chunk#0:1": edits.Replace(7.0)})
    assert torch.equal(run.output, torch.cat([h[:, :2] * 2, torch.full((3, 2), 7.0)], -1) + h)


class LostWrite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 1
        tail = h[:, 2:]
        tail += 1
        return h


def test_an_edited_view_that_is_written_later_is_refused() -> None:
    with pytest.raises(
        EditError,
        match=r"'/getitem#0' shares its memory with other values.*Edit what the write made",
    ):
        fmr.run(LostWrite(), torch.zeros(1, 4), edits={"/getitem#0": edits.Add(10.0)})
    run = fmr.run(LostWrite(), torch.zeros(1, 4), edits={"/add#0": edits.Add(10.0)})
    assert run.output.tolist() == [[0, 0, 11, 11]]


def test_parameters_buffers_and_inputs_are_edited_for_the_run_alone() -> None:
    model, ids = decoder()
    before, given = copy.deepcopy(model.state_dict()), ids.clone()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer.wte.weight.mul_(2)  # tied to the unembedding
        expected = twin(ids).logits
    run = fmr.run(model, ids, edits={"param:transformer.wte.weight": edits.Scale(2.0)})
    assert torch.equal(run.output.logits, expected)
    run = fmr.run(model, ids, edits={"input:input_ids": edits.Replace(3)})
    with torch.no_grad():
        assert torch.equal(run.output.logits, model(torch.full_like(ids, 3)).logits)
    assert torch.equal(ids, given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    norm = nn.BatchNorm1d(3).eval()
    run = fmr.run(norm, torch.ones(2, 3), edits={"buffer:running_mean": edits.Replace(1.0)})
    assert not run.output.any()
    assert not norm.running_mean.any()


@pytest.mark.parametrize("keep", KEEPS)
def test_an_error_in_an_edit_leaves_nothing_behind(keep: Any) -> None:
    model, ids = decoder()
    before, places = torch_state(), dict(model.transformer.wte._parameters)

    def fails(value: Tensor, context: object) -> Tensor:
        raise ZeroDivisionError

    for site in ("param:transformer.wte.weight", "transformer.h.1.mlp", "transformer.h.0.ln_1/layer_norm#0"):
        with pytest.raises(ZeroDivisionError):
            fmr.run(model, ids, keep=keep, edits={"param:transformer.wpe.weight": edits.Scale(1.0), site: fails})
        assert torch_state() == before
        assert dict(model.transformer.wte._parameters) == places
    with torch.no_grad():
        fmr.run(model, ids)


# ---- sources


def test_an_interchange_takes_what_another_run_holds() -> None:
    model, ids = decoder()
    other = torch.randint(2, 32, (2, 6))
    source = fmr.run(model, other)
    for given in (source, {"input_ids": other}, other, (other,)):
        run = fmr.run(model, ids, edits={"transformer.wte": edits.Interchange(given)})
        assert torch.equal(run.output.logits, source.output.logits)
    run = fmr.run(model, ids, edits={"transformer.h.1": edits.Interchange(source)})
    assert torch.equal(run.output.logits, source.output.logits)
    same = fmr.run(model, ids, edits={"transformer.h.0.mlp": edits.Interchange(fmr.run(model, ids))})
    assert torch.equal(same.output.logits, fmr.run(model, ids).output.logits)


def test_an_interchange_from_a_saved_run_and_from_another_site(tmp_path: Any) -> None:
    model, ids = decoder()
    source = fmr.run(model, ids.flip(1))
    source.save(tmp_path / "source.fmr")
    here, there = fmr.Site("transformer.h.0", positions=[[1], [2]]), fmr.Site("transformer.h.1", positions=[[3], [0]])
    run = fmr.run(model, ids, edits={here: edits.Interchange(fmr.load(tmp_path / "source.fmr"), at=there)})
    want = torch.stack([source["transformer.h.1"][0, 3], source["transformer.h.1"][1, 0]])
    assert torch.equal(run[here][:, 0], want)


def test_serial_sources_are_runs_with_edits_of_their_own() -> None:
    model, ids = decoder()
    first, second = fmr.run(model, ids.flip(0)), ids.flip(1)
    middle = fmr.run(model, second, edits={"transformer.h.0.mlp": edits.Interchange(first)})
    run = fmr.run(model, ids, edits={"transformer.h.1": edits.Interchange(middle)})
    assert torch.equal(run.output.logits, middle.output.logits)


def test_a_batch_with_positions_of_its_own_is_each_example_alone() -> None:
    model, ids = decoder()
    other = fmr.run(model, ids.flip(1))
    site = fmr.Site("transformer.h.0", positions=[[1], [4]])
    run = fmr.run(model, ids, edits={site: edits.Interchange(other)})
    for example, position in enumerate((1, 4)):
        row = ids[example : example + 1]
        there = fmr.Site("transformer.h.0", positions=position)
        alone = fmr.run(model, row, edits={there: edits.Interchange(fmr.run(model, row.flip(1)))})
        torch.testing.assert_close(run.output.logits[example], alone.output.logits[0])


def padded(side: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, intermediate_size=24, vocab_size=32, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 32, (1, 5))
    fill, mask = torch.full((1, 3), 2), torch.cat([torch.zeros(1, 3), torch.ones(1, 5)], 1).long()
    long = torch.randint(3, 32, (1, 8))
    row = torch.cat([fill, ids], 1) if side == "left" else torch.cat([ids, fill], 1)
    mask = mask if side == "left" else mask.flip(1)
    inputs = {"input_ids": torch.cat([row, long]), "attention_mask": torch.cat([mask, torch.ones_like(mask)])}
    if side == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model, inputs, ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_under_padding_are_those_of_the_unpadded_example(side: str) -> None:
    model, inputs, ids = padded(side)
    for position in (1, -1):
        site = fmr.Site("model.layers.0", positions=position)
        run = fmr.run(model, edits={site: edits.Scale(3.0)}, **inputs)
        alone = fmr.run(model, input_ids=ids, edits={site: edits.Scale(3.0)})
        real = inputs["attention_mask"][0].bool()
        torch.testing.assert_close(run.output.logits[0][real], alone.output.logits[0], rtol=1e-4, atol=1e-5)
        assert run.receipts[site].changed == 2 * 16


# ---- generation


@pytest.mark.parametrize("cache", [True, False])
def test_generation_under_an_edit_that_changes_nothing_is_the_same(cache: bool) -> None:
    model, ids = decoder()
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache, pad_token_id=0)
    with fmr.track(model, keep=(), edits={"transformer.h.1": lambda v, c: v.clone()}) as run:
        edited = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache, pad_token_id=0)
    assert torch.equal(plain, edited)
    assert run.receipts["transformer.h.1"].fired == 4


def test_absolute_positions_mean_the_same_tokens_with_a_cache_and_without() -> None:
    model, ids = decoder()
    told = {}
    for cache in (True, False):
        edited = {fmr.Site("transformer.h.0", positions=position): edits.Scale(4.0) for position in (2, 7)}
        with fmr.track(model, keep=(), edits=edited):
            told[cache] = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache, pad_token_id=0)
    assert torch.equal(told[True], told[False])


def test_an_edit_of_one_step_is_made_there_alone() -> None:
    model, ids = decoder()
    for passes, fired in ((0, 1), (2, 1), ([1, 3], 2), (slice(1, None), 3)):
        with fmr.track(model, keep=(), edits={fmr.Site("transformer.h.0", passes=passes): edits.Zero()}) as run:
            model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert next(iter(run.receipts.values())).fired == fired


# ---- gradients


def test_edits_are_differentiable_inside_kernels_too() -> None:
    model, ids = decoder("sdpa")
    pattern = fmr.locate(fmr.run(model, ids)).attention[0].pattern
    eager, _ = decoder("eager")
    eager.load_state_dict(model.state_dict())
    gradients = []
    for one in (model, eager):
        factor = torch.ones((), requires_grad=True)
        name = fmr.locate(fmr.run(one, ids)).attention[0].pattern.at(heads=1)
        run = fmr.run(one, ids, keep=(), grad=True, edits={name: edits.Scale(factor)})
        run.output.logits.sum().backward()
        gradients.append(factor.grad)
    assert "scaled_dot_product_attention#0/" in pattern.id
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_the_gradient_that_comes_back_can_be_edited() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(2, 3)
    with fmr.track(model, keep=(), grad=True, edits={"1": edits.OnGradient(edits.Zero())}) as run:
        model(x).sum().backward()
    assert not model[0].weight.grad.any()
    assert model[2].weight.grad.any()
    assert run.receipts["1"].fired == 1
    with pytest.raises(EditError, match="No gradient flows back through"):
        fmr.run(model, x, keep=(), edits={"1": edits.OnGradient(edits.Zero())})


# ---- what cannot be


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"transformer.h.9": edits.Zero()}, "never fired. No pass reached .transformer.h.9"),
        ({"transformer.h.0/split#9": edits.Zero()}, "never fired"),
        ({fmr.Site("transformer.h.0", passes=4): edits.Zero()}, "never fired: the run had 1 pass, none of them 4"),
        (
            {"transformer.h.0.attn": edits.Zero()},
            r"returned 2 tensors, expected one. Name one of them: 'transformer.h.0.attn:0'",
        ),
        ({"transformer.h.*": edits.Zero()}, "cannot be edited: expected the ID of an op"),
        ({"transformer.h.0": edits.Interchange(3)}, "The source|int"),
    ],
)
def test_an_edit_that_cannot_be_made_is_one_clear_error(asked: Any, message: str) -> None:
    model, ids = decoder("eager")
    with pytest.raises(EditError, match=message):
        fmr.run(model, ids, keep=(), edits=asked)


def test_an_optional_edit_need_not_fire() -> None:
    model, ids = decoder()
    run = fmr.run(model, ids, keep=(), edits={"transformer.h.9": edits.Zero()}, optional=True)
    assert run.receipts["transformer.h.9"].fired == 0


def test_skip_hands_on_what_a_module_was_given() -> None:
    model, ids = decoder()
    run = fmr.run(model, ids, edits={"transformer.h.0": edits.Skip()})
    assert torch.equal(run["transformer.h.0"], run["transformer.drop"])


def test_a_gradient_that_comes_back_between_two_passes_leaves_their_numbers_alone() -> None:
    model, numbers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), []

    def note(value: Tensor, context: edits.Context) -> Tensor:
        numbers.append(context.number)
        return value

    asked = {"0/linear#0": edits.OnGradient(edits.Scale(1.0)), fmr.Site("0/linear#0", passes=2): note}
    with fmr.track(model, grad=True, keep=(), edits=asked):
        first, _ = model(torch.randn(2, 3)), model(torch.randn(2, 3))
        first.sum().backward()
        model(torch.randn(2, 3))
    assert numbers == [2]
