"""Edits mean exactly what they say in every kind of model: known answers, and what other tools get wrong."""

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import fmr
from fmr import Site, edits
from tests.models import ZOO, Built, tokens
from tests.small import Fn


def _wide(config: Any, model: Any) -> Built:
    """A decoder whose heads together are twice as wide as its states."""
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 24}
    special = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return model(config(**shape, **special, num_key_value_heads=2)), (), {"input_ids": tokens(2, 6), "use_cache": False}


OWN = {"qwen3": lambda: _wide(Qwen3Config, Qwen3ForCausalLM), "gemma": lambda: _wide(GemmaConfig, GemmaForCausalLM)}
DECODERS = {
    "gpt2": "transformer.h", "gpt2_eager": "transformer.h", "llama": "model.layers", "mixtral": "model.layers",
    "qwen3": "model.layers", "gemma": "model.layers", "mamba": "backbone.layers",
}  # fmt: skip
"""Causal language models, with the path of their blocks."""
ATTENTIVE = ["gpt2", "gpt2_eager", "llama", "mixtral", "qwen3", "gemma", "bert", "t5", "whisper", "vit", "transformer"]
OTHERS = ["mamba", "gru", "lstm", "lstm_packed", "cnn", "shared", "parts", "chain", "functional"]


class Made(NamedTuple):
    """A model with what it is called with, a recorded run and its structure."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run: fmr.Run
    structure: Any

    def again(self, **more: Any) -> fmr.Run:
        return fmr.run(self.model, *self.args, **{"keep": (), **self.kwargs, **more})


@lru_cache(maxsize=32)
def made(name: str) -> Made:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model, args, kwargs = (OWN | ZOO)[name]()
    kwargs.pop("attention_mask", None)
    run = fmr.run(model.eval(), *args, **kwargs)
    return Made(model, args, kwargs, run, fmr.locate(run))


def outputs(run: fmr.Run) -> list[Tensor]:
    return [tensor for _, tensor in fmr.nests.leaves(fmr.nests.taken(run.output))]


def same(a: fmr.Run, b: fmr.Run) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(outputs(a), outputs(b), strict=True))


def logits(run: fmr.Run) -> Tensor:
    return run.output.logits  # type: ignore[no-any-return]


# ---- the same value


def roles(one: Made) -> list[Site]:
    """Sites of the last attention, memory and layer."""
    block, memory, layer = one.structure.attention[-1], one.structure.mlps[-1], one.structure.layers[-1]
    found = [block.q, block.k, block.v, block.pattern, block.z, block.out, memory.post, memory.out, layer.resid_post]
    return [site for site in found if site is not None]


def has(site: Site, value: Tensor) -> bool:
    """Whether a value has the axes of a site, and as many places along them."""
    try:
        return site.of(value) is not None
    except fmr.IdError:
        return False


@pytest.mark.parametrize("name", ATTENTIVE)
def test_an_interchange_with_the_same_input_changes_no_bit(name: str) -> None:
    one = made(name)
    for site in roles(one):
        for chosen in ({}, {"heads": 1}, {"positions": 2}, {"units": [0, 2]}):
            here = site.at(**chosen)
            if not has(here, one.run[site.id]):
                continue
            run = one.again(edits={here: edits.Interchange(one.run)})
            assert same(run, one.run), here
            assert (run.receipts[here].fired, run.receipts[here].changed) == (1, 0)


@pytest.mark.parametrize("name", OTHERS)
def test_an_interchange_with_the_same_input_changes_no_bit_of_other_models(name: str) -> None:
    one = made(name)
    ids = [n.id for n in one.run.graph.nodes if n.op not in ("alias", "opaque", "input") and n.id != "buffer:links"]
    for name_ in ids[:: max(1, len(ids) // 12)]:
        whole = Site(name_)
        sites = (whole, whole.at(positions=1), whole.at(units=[0, 1]))
        for site in (site for site in sites if has(site, one.run[name_])):
            assert same(one.again(edits={site: edits.Interchange(one.run)}), one.run), site


# ---- nothing else is touched


@pytest.mark.parametrize("name", DECODERS)
def test_an_edit_at_a_position_reaches_no_earlier_one_and_nothing_beside_its_site(name: str) -> None:
    one, path = made(name), DECODERS[name]
    site = Site(f"{path}.0", positions=3, examples=1, units=slice(4, 9))
    run = fmr.run(one.model, *one.args, keep=[f"{path}.0"], edits={site: edits.Add(2.0)}, **one.kwargs)
    moved = run[f"{path}.0"] != one.run[f"{path}.0"]
    assert moved.nonzero().tolist() == [[1, 3, unit] for unit in range(4, 9)]
    assert run.receipts[site].changed == 5
    assert run.receipts[site].norm == pytest.approx(2 * 5**0.5, rel=1e-3)
    changed = (logits(run) - logits(one.run)).abs().amax(-1)
    assert changed[0].max() < 1e-6  # how many tokens an expert gets decides how its product rounds
    assert changed[1, :3].max() < 1e-6
    assert changed[1, 3:].min() > 1e-5


@pytest.mark.parametrize("name", DECODERS)
def test_the_last_block_or_the_embedding_of_another_input_gives_its_logits(name: str) -> None:
    one, path = made(name), DECODERS[name]
    source = fmr.run(one.model, one.kwargs["input_ids"].flip(1), use_cache=False)
    for site in (f"{path}.1", one.structure.embedding if one.structure.embedding is not None else f"{path}.0"):
        assert torch.equal(logits(one.again(edits={site: edits.Interchange(source)})), logits(source)), site


@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_with_positions_and_units_of_its_own_is_each_example_alone(name: str) -> None:
    one, path = made(name), DECODERS[name]
    ids = one.kwargs["input_ids"]
    positions, units = ([1], [4]), ([0, 1, 2], [5, 6, 7])
    site = Site(f"{path}.0")
    whole = one.again(edits={site.at(positions=list(positions), units=list(units)): edits.Add(3.0)})
    assert whole.receipts[next(iter(whole.receipts))].changed == 2 * 3
    for n in range(2):
        here = site.at(positions=positions[n], units=units[n])
        alone = fmr.run(one.model, ids[n : n + 1], use_cache=False, keep=(), edits={here: edits.Add(3.0)})
        torch.testing.assert_close(logits(whole)[n], logits(alone)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt2_eager", "llama", "qwen3", "gemma", "mixtral"])
def test_a_batch_with_heads_of_its_own_is_each_example_alone(name: str) -> None:
    one = made(name)
    z = one.structure.attention[0].z
    whole = one.again(edits={z.at(heads=[[0], [1]]): edits.Zero()})
    for n in range(2):
        ids = one.kwargs["input_ids"][n : n + 1]
        alone = fmr.run(one.model, ids, use_cache=False, keep=(), edits={z.at(heads=n): edits.Zero()})
        torch.testing.assert_close(logits(whole)[n], logits(alone)[0], rtol=1e-4, atol=1e-5)


# ---- what a hook would do


@pytest.mark.parametrize("name", [*ATTENTIVE, "mamba", "cnn"])
def test_every_edit_of_a_modules_output_is_what_a_hook_would_do(name: str) -> None:
    one = made(name)
    known = dict(one.model.named_modules())
    calls = [c.path for c in one.run.graph.scopes if c.path in known and c.path and isinstance(c.output, str)]
    changes = [
        (edits.Zero(), lambda out: out * 0), (edits.Add(2.0), lambda out: out + 2),
        (edits.Subtract(0.5), lambda out: out - 0.5), (edits.Scale(0.5), lambda out: out * 0.5),
        (edits.Replace(0.25), lambda out: torch.full_like(out, 0.25)), (edits.Clamp(0.0), lambda out: out.clamp(min=0)),
        (lambda value, context: value.flip(-1), lambda out: out.flip(-1)),
    ]  # fmt: skip
    for path, (edit, change) in zip(calls[-1 :: -max(1, len(calls) // 6)], changes, strict=False):
        handle = one.model.get_submodule(path).register_forward_hook(lambda m, a, out, change=change: change(out))
        with torch.no_grad():
            expected = [t for _, t in fmr.nests.leaves(one.model(*one.args, **one.kwargs))]
        handle.remove()
        for value, truth in zip(outputs(one.again(edits={path: edit})), expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)  # a hook makes fused layers leave their kernels


@pytest.mark.parametrize("name", DECODERS)
def test_what_only_looks_changes_nothing_and_subtract_undoes_add(name: str) -> None:
    one, site, seen = made(name), Site(f"{DECODERS[name]}.0", positions=[0, 2]), []
    looked = one.again(edits={site: lambda value, context: seen.append(value.clone()) or value})
    assert same(looked, one.run)
    assert torch.equal(seen[0], one.run[site])
    undone = one.again(edits={site: [edits.Add(4.0), edits.Subtract(4.0)]})
    torch.testing.assert_close(logits(undone), logits(one.run), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_the_same_call_gives_the_same_result_whatever_ran_in_between(name: str) -> None:
    one, path = made(name), DECODERS[name]

    def call() -> Tensor:
        return logits(one.again(edits={Site(f"{path}.0", positions=[[1], [4]]): edits.Scale(0.0)}))

    first = call()
    one.again(edits={Site(f"{path}.0", positions=2): edits.Zero(), f"{path}.1": edits.Noise(1.0)})  # an integer position
    assert torch.equal(call(), first)
    assert same(one.again(keep="none"), one.run)


@pytest.mark.parametrize(("positions", "columns"), [([0], [0]), ([0, 1], [0, 1]), ([0, 1, 2], [0, 1, 2]), (2, [2])])
def test_a_list_of_positions_is_that_many_positions(positions: Any, columns: list[int]) -> None:
    one = made("gpt2")
    site = Site("transformer.h.0", positions=positions)
    run = fmr.run(one.model, keep=["transformer.h.0"], edits={site: edits.Add(1.0)}, **one.kwargs)
    moved = (run["transformer.h.0"] != one.run["transformer.h.0"]).any(-1)
    assert moved[0].nonzero()[:, 0].tolist() == columns == moved[1].nonzero()[:, 0].tolist()


# ---- heads as they are


@pytest.mark.parametrize("name", ATTENTIVE)
def test_a_head_is_as_wide_as_it_is_and_all_heads_are_the_whole(name: str) -> None:
    one = made(name)
    block = one.structure.attention[0]
    z = one.run[block.z]
    for head in range(block.n_heads):
        receipt = one.again(edits={block.z.at(heads=head): edits.Add(1.0)}).receipts[block.z.at(heads=head)]
        rows, columns = (z.shape[block.z.axes(z).index(axis)] for axis in ("examples", "positions"))
        assert receipt.changed == z.numel() // block.n_heads == rows * columns * block.head_dim
    heads = one.again(edits={block.z.at(heads=head): edits.Zero() for head in range(block.n_heads)})
    assert same(heads, one.again(edits={block.z: edits.Zero()}))
    assert not same(heads, one.run)


@pytest.mark.parametrize("name", ["gpt2", "gpt2_eager", "llama", "qwen3", "whisper"])
def test_an_edited_pattern_has_its_effect(name: str) -> None:
    one = made(name)
    block = one.structure.attention[0]
    here = block.pattern.at(heads=0)
    run = fmr.run(one.model, *one.args, keep=[block.pattern, block.z], edits={here: edits.Zero()}, **one.kwargs)
    assert not run[here].any()
    assert not run[block.z.at(heads=0)].any()
    assert torch.equal(run[block.z.at(heads=1)], one.run[block.z.at(heads=1)])
    assert not same(run, one.run)


# ---- time and space


def _cells(module: nn.Module, x: Tensor) -> Tensor:
    state, states = torch.zeros(x.shape[0], 8), []
    for step in range(x.shape[1]):
        state = module.cell(x[:, step], state)
        states.append(state)
    return torch.stack(states, 1)


def test_an_edit_of_one_time_step_leaves_the_steps_before_it_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    loop = Fn(_cells, cell=nn.GRUCell(4, 8)).eval()
    plain = fmr.run(loop, x)
    run = fmr.run(loop, x, edits={"cell@3": edits.Zero()})
    assert torch.equal(run.output[:, :3], plain.output[:, :3])
    assert not run.output[:, 3].any()
    with torch.no_grad():
        assert torch.equal(run.output[:, 4], loop.cell(x[:, 4], torch.zeros(2, 8)))
    for kind, site in ((nn.GRU, "/gru#0:0"), (nn.LSTM, "/lstm#0:0")):
        fused = kind(4, 8, batch_first=True).eval()
        plain = fmr.run(fused, x)
        run = fmr.run(fused, x, edits={Site(site, positions=3): edits.Zero()})
        assert ((run.output[0] != plain.output[0]).any(-1).nonzero()[:, 1] == 3).all()
        assert not run.output[0][:, 3].any()


def test_a_patch_of_an_image_is_interchanged_alone() -> None:
    one = made("cnn")
    other = fmr.run(one.model, one.args[0].flip(0))
    patch = Site("0/conv2d#0", heads=[1, 2], positions=slice(2, 4), units=slice(3, 6))
    run = fmr.run(one.model, *one.args, edits={patch: edits.Interchange(other)})
    expected = one.run["0/conv2d#0"].clone()
    expected[:, 1:3, 2:4, 3:6] = other["0/conv2d#0"][:, 1:3, 2:4, 3:6]
    assert torch.equal(run["0/conv2d#0"], expected)


# ---- what belongs to the user


@pytest.mark.parametrize("name", ["gpt2_eager", "llama"])
def test_hooks_of_the_user_fire_and_stay_and_hidden_states_are_returned(name: str) -> None:
    one, path, fired = made(name), DECODERS[name], []
    hook = one.model.get_submodule(f"{path}.1").register_forward_hook(lambda *_: fired.append(1))
    early = one.model.get_submodule(f"{path}.0").register_forward_pre_hook(lambda *_: fired.append(2))
    run = one.again(edits={one.structure.layers[0].resid_post: edits.Scale(2.0)}, output_hidden_states=True)
    assert fired == [2, 1]
    assert len(run.output.hidden_states) == 3
    torch.testing.assert_close(run.output.hidden_states[1], one.run[f"{path}.0"] * 2)
    with torch.no_grad():
        assert len(one.model(**one.kwargs, output_hidden_states=True).hidden_states) == 3
    assert fired == [2, 1, 2, 1]
    hook.remove(), early.remove()
