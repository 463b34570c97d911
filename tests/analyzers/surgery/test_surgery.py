"""Surgery is the model that one would make by hand, to the bit, and leaves nothing behind."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import analyzers
import fmr
from analyzers.surgery.numbers import numbers
from fmr.structure.parts import Structure
from tests.analyzers.surgery.models import Kept, Looped, Numbered, Scaled, Shared, Shares, Telling, TiedOut, Unrolled, made
from tests.models import TOKENS, build

TOKEN_IDS = torch.arange(10).reshape(2, 5)


def parallel() -> tuple[nn.Module, dict[str, Any]]:
    """A model whose attention and memory write at once."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(use_parallel_residual=True, **sizes, **TOKENS)).eval()
    return model, {"input_ids": torch.arange(3, 9)[None], "use_cache": False}


def loaded(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "parallel":
        return parallel()
    model, _, inputs = build(name)
    return model, inputs


def located(model: nn.Module, *args: Any, **inputs: Any) -> Structure:
    return fmr.locate(fmr.run(model, *args, **inputs))


def by_hand(model: nn.Module, path: str, order: Sequence[int]) -> nn.Module:
    """A copy of a model with other entries in its list of layers."""
    copied = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    layers = list(copied.get_submodule(path))
    setattr(copied.get_submodule(parent), name, nn.ModuleList(copy.deepcopy(layers[n]) for n in order))
    return copied


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def state(model: nn.Module) -> tuple[Any, ...]:
    """All that surgery could leave behind: modules with their attributes, hooks and weights."""
    plain = (int, str, bool, float)
    modules = [
        (name, id(one), {key: held for key, held in vars(one).items() if type(held) in plain}, len(one._forward_pre_hooks))
        for name, one in model.named_modules()
    ]
    weights = [(name, id(one), one.detach().numpy().tobytes()) for name, one in model.state_dict(keep_vars=True).items()]
    return modules, weights


OPERATIONS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "delete": (lambda surgery: surgery.delete(0), [1]),
    "repeat": (lambda surgery: surgery.repeat(0), [0, 0, 1]),
    "reorder": (lambda surgery: surgery.reorder([1, 0]), [1, 0]),
    "replace": (lambda surgery: surgery.replace(1, by=0), [0, 0]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("name", "path"),
    [("gpt2", "transformer.h"), ("llama", "model.layers"), ("bert", "encoder.layer"), ("parallel", "gpt_neox.layers")],
)
def test_an_operated_model_is_the_one_made_by_hand(name: str, path: str, operation: str) -> None:
    model, inputs = loaded(name)
    inputs = {**inputs, "use_cache": False} if name != "bert" else inputs
    structure, before = located(model, **inputs), state(model)
    operate, order = OPERATIONS[operation]
    order = [*order, *range(2, len(structure.layers))] if operation != "reorder" else order
    copied = by_hand(model, path, order)
    for holder in (copied.config, copied.config.get_text_config()):
        holder.num_hidden_layers = len(order)
    surgery = operate(analyzers.Surgery(model, structure))
    with surgery:
        operated = first(model(**inputs))
        assert surgery.flow(**inputs) == tuple(order)
    assert torch.equal(operated, first(copied(**inputs)))
    assert not torch.equal(operated, first(model(**inputs)))
    assert state(model) == before


def test_layers_that_are_called_one_by_one_are_operated_on_alike() -> None:
    looped, unrolled = made(Looped), made(Unrolled)
    for name, block in zip("abc", looped.blocks, strict=True):
        unrolled.get_submodule(name).load_state_dict(block.state_dict())
    for part in ("embed", "norm", "head"):
        unrolled.get_submodule(part).load_state_dict(looped.get_submodule(part).state_dict())
    for operate in (
        lambda s: s.delete(1),
        lambda s: s.repeat(2, 3),
        lambda s: s.reorder([2, 0, 1]),
        lambda s: s.delete(0, 2),
    ):
        found = []
        for model in (looped, unrolled):
            with operate(analyzers.Surgery(model, located(model, TOKEN_IDS))) as surgery:
                found.append((model(TOKEN_IDS), surgery.flow(TOKEN_IDS)))
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]


def test_every_layer_left_out_leaves_the_ends() -> None:
    model = made(Looped)
    with analyzers.Surgery(model, located(model, TOKEN_IDS)).delete(0, 1, 2) as surgery:
        assert torch.equal(model(TOKEN_IDS), model.head(model.norm(model.embed(TOKEN_IDS))))
        assert surgery.flow(TOKEN_IDS) == ()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_generation_with_a_cache_is_that_of_the_model_made_by_hand(name: str) -> None:
    model, inputs = loaded(name)
    prompt = inputs["input_ids"][:1]
    told = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    surgery = analyzers.Surgery(model, located(model, **inputs))
    for operated in (surgery.delete(0), surgery.reorder([1, 0]), surgery.replace(0, by=1)):
        with operated:
            assert torch.equal(model.generate(prompt, **told), model.generate(prompt, use_cache=False, **told))
    with surgery.repeat(1), pytest.raises(analyzers.AnalyzerError, match="3 layers run where the model has places for 2"):
        model.generate(prompt, **told)
    with surgery.repeat(1):
        assert model.generate(prompt, use_cache=False, **told).shape == (1, 12)


def test_a_layer_that_computes_with_its_number_keeps_it() -> None:
    model = made(Numbered)
    surgery = analyzers.Surgery(model, located(model, TOKEN_IDS))
    for operated, order in (
        (surgery.delete(0), [1, 2]),
        (surgery.repeat(1), [0, 1, 1, 2]),
        (surgery.replace(2, by=0), [0, 1, 0]),
    ):
        x = model.embed(TOKEN_IDS)
        for n in order:
            x = model.blocks[n](x)
        with operated:
            assert torch.equal(model(TOKEN_IDS), model.head(model.norm(x)))
        assert [block.number for block in operated.export(TOKEN_IDS).blocks] == order


def test_a_cache_is_refused_where_a_number_counts() -> None:
    model = made(Numbered)
    surgery, before = analyzers.Surgery(model, located(model, TOKEN_IDS)), state(model)
    message = (
        r"given a object to keep state in by their numbers, and with another number a _Counting computes something else"
    )
    with surgery.delete(0), pytest.raises(analyzers.AnalyzerError, match=message):
        model(TOKEN_IDS, object())
    with surgery.delete(2):
        assert torch.equal(model(TOKEN_IDS, object()), model(TOKEN_IDS))
    assert state(model) == before


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_settings_of_an_export_follow(name: str, tmp_path: Path) -> None:
    model, inputs = loaded(name)
    prompt = {"input_ids": inputs["input_ids"][:1]}
    surgery = analyzers.Surgery(model, located(model, **prompt))
    for operated, many in ((surgery.delete(0), 1), (surgery.repeat(1), 3)):
        exported = operated.export(**prompt)
        assert exported.config.num_hidden_layers == many
        assert exported.config.num_attention_heads == model.config.num_attention_heads
        exported.save_pretrained(tmp_path / name)
        again = type(model).from_pretrained(tmp_path / name).eval()
        assert torch.equal(again(**prompt).logits, exported(**prompt).logits)
    assert model.config.num_hidden_layers == 2


def test_nothing_is_left_behind_by_an_error() -> None:
    model = made(Looped)
    before, surgery = state(model), analyzers.Surgery(model, located(model, TOKEN_IDS)).delete(1).delete(0, heads=1)
    with pytest.raises(ZeroDivisionError), surgery:
        raise ZeroDivisionError
    assert state(model) == before
    with surgery, pytest.raises(analyzers.AnalyzerError, match="under way already"):
        surgery.__enter__()
    other = analyzers.Surgery(model, surgery.structure).delete(1)
    with surgery, pytest.raises(analyzers.AnalyzerError, match="being operated on already"):
        other.__enter__()
    assert state(model) == before


def test_gradients_reach_a_layer_that_runs_twice() -> None:
    model = made(Looped)
    with analyzers.Surgery(model, located(model, TOKEN_IDS)).delete(0).repeat(1):
        model(TOKEN_IDS).sum().backward()
    assert model.blocks[1].up.weight.grad is not None
    assert model.blocks[0].up.weight.grad is None


@pytest.mark.parametrize(
    ("kind", "operate", "message"),
    [
        (Looped, lambda s: s.delete(3), "Layer 3: Looped has layers 0 to 2"),
        (Looped, lambda s: s.delete(), r"delete got \[\] and heads=None: expected what to leave out"),
        (Looped, lambda s: s.delete(0, heads=[]), r"delete got \[0\] and heads=\[\]: expected what to leave out"),
        (Looped, lambda s: s.repeat(0, 0), "times=0: expected how often"),
        (Looped, lambda s: s.reorder([]), r"order=\[\]: expected numbers of layers"),
        (Looped, lambda s: s.delete(0, 1, heads=[0]), "2 layers: expected the heads of one layer"),
        (Looped, lambda s: s.delete(0, heads=2), "Head 2 of layer 0: expected 0 to 1"),
        (Looped, lambda s: s.reorder([0, 0], layer=1), "expected each of heads 0 to 1 of layer 1 once"),
        (Looped, lambda s: s.delete(0, heads=1).delete(0, heads=1), "Head 1 of layer 0 is changed already"),
        (Shared, lambda s: s.delete(0), "Layer 0 cannot be operated on: blocks.0 is called for several layers"),
        (Telling, lambda s: s.delete(1).__enter__(), "Layer 1 makes more than the stream, which layer 2 read"),
        (
            Shares,
            lambda s: s.reorder([1, 0, 2]).flow(TOKEN_IDS),
            "Layer 1 is given other values beside the stream than layer 0",
        ),
        (Kept, lambda s: s.delete(1).flow(TOKEN_IDS), "takes no effect: Kept called nothing .* expected blocks.1"),
        (Kept, lambda s: s.reorder([2, 1, 0]).export(TOKEN_IDS), r"takes no effect: Kept called blocks\.2, blocks\.0 of"),
        (Kept, lambda s: s.repeat(1).export(TOKEN_IDS), "takes no effect: Kept called nothing"),
        (Kept, lambda s: s.replace(1, by=2).export(TOKEN_IDS), "takes no effect: Kept called nothing"),
        (Scaled, lambda s: s.delete(1).flow(TOKEN_IDS), "expected .* of layer 0: the code does not run the layers"),
        (TiedOut, lambda s: s.delete(1, heads=0), "The heads of layer 1 .* lie in 'blocks.0.out.weight', which"),
        (Looped, lambda s: s.replace(1, by=2, heads=[0]), r"heads=\[0\]: expected by head of layer 1 the head of layer 2"),
        (Looped, lambda s: s.delete(1, heads=[0, 0]), r"heads=\[0, 0\] of layer 1: expected each head once"),
        (Looped, lambda s: s.delete(1, 1), r"delete got layers \[1, 1\]: expected each once"),
        (Looped, lambda s: s.delete(1).delete(1), "Layer 1 does not run any more: without layer 1"),
        (Looped, lambda s: s.delete(1).repeat(1), "Layer 1 does not run any more"),
        (Looped, lambda s: s.delete(1).reorder([1, 0, 2]), "Layer 1 does not run any more"),
        (Looped, lambda s: s.delete(1).delete(1, heads=0), "Layer 1 does not run any more"),
    ],
)
def test_what_cannot_be_operated_on_is_refused(kind: type[nn.Module], operate: Callable[[Any], Any], message: str) -> None:
    model = made(kind)
    surgery = analyzers.Surgery(model, located(model, TOKEN_IDS))
    with pytest.raises(analyzers.AnalyzerError, match=message):
        operate(surgery)


def test_surgery_wants_a_structure() -> None:
    with pytest.raises(analyzers.AnalyzerError, match=r"Surgery got Tensor as its structure, expected fmr.locate"):
        analyzers.Surgery(made(Looped), TOKEN_IDS)  # type: ignore[arg-type]


def test_a_structure_of_another_model_is_refused() -> None:
    structure = located(made(Looped), TOKEN_IDS)
    with pytest.raises(analyzers.AnalyzerError, match=r"Unrolled has no module 'blocks\.0', which is a layer"):
        analyzers.Surgery(made(Unrolled), structure)


def test_numbers_are_kept_where_they_can_be() -> None:
    assert numbers([2, 0, 1], 3) == [2, 0, 1]
    assert numbers([1, 1], 2) == [1, 0]
    assert numbers([], 3) == []


def test_a_norm_behind_the_last_layer_is_none_of_it() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        model = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(16), enable_nested_tensor=False).eval()
        x = torch.randn(2, 5, 16)
    with analyzers.Surgery(model, located(model, x)).delete(2) as surgery:
        operated = model(x)
        assert surgery.flow(x) == (0, 1)
    assert torch.equal(operated, by_hand(model, "layers", [0, 1])(x))


def test_layers_that_hand_on_more_than_the_stream_are_left_as_they_are() -> None:
    model, _, inputs = build("t5")
    surgery = analyzers.Surgery(model, located(model, **inputs))
    with pytest.raises(analyzers.AnalyzerError, match="Layer 0 makes more than the stream, which layer 1 read"):
        surgery.delete(0).flow(**inputs)
    with pytest.raises(analyzers.AnalyzerError, match="Layers 1 and 2 write to different streams"):
        surgery.replace(1, by=2)


@pytest.mark.parametrize("cached", [False, True])
def test_what_layers_hand_on_as_they_were_given_it_goes_on(cached: bool) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(**sizes, **TOKENS)).eval()
    ids = torch.arange(3, 17).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5], "attention_mask": mask}
    surgery = analyzers.Surgery(model, located(model, **inputs, use_cache=cached))

    def check(operated: Any, path: str, order: list[int]) -> None:
        copied = by_hand(model, path, order)
        with operated:
            assert torch.equal(model(**inputs, use_cache=False).logits, copied(**inputs, use_cache=False).logits)
        operated.export(**inputs, use_cache=False)

    check(surgery.delete(1), "encoder.block", [0, 2])
    check(surgery.reorder([0, 2, 1]), "encoder.block", [0, 2, 1])
    check(surgery.delete(4), "decoder.block", [0, 2])
    check(surgery.repeat(5), "decoder.block", [0, 1, 2, 2])
    for refused in (surgery.delete(0), surgery.replace(1, by=0), surgery.reorder([4, 3, 5])):
        with pytest.raises(analyzers.AnalyzerError, match="makes more than the stream, which layer"), refused:
            pass


def test_a_run_inside_reads_the_same_sites() -> None:
    model = made(Looped)
    structure = located(model, TOKEN_IDS)
    copied, site = by_hand(model, "blocks", [0, 2]), structure.layers[2].resid_post
    with analyzers.Surgery(model, structure).delete(1):
        value = fmr.run(model, TOKEN_IDS, keep=[site])[site]
    assert torch.equal(value, fmr.run(copied, TOKEN_IDS, keep="all")["blocks.1"])


# ---- heads


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "whisper", "hand"])
def test_a_head_that_is_left_out_writes_nothing(name: str) -> None:
    model, args, inputs = (made(Looped), (TOKEN_IDS,), {}) if name == "hand" else build(name)
    structure, before = located(model, *args, **inputs), state(model)
    site = structure.attention[1].z.at(heads=1)
    with analyzers.Surgery(model, structure).delete(1, heads=1):
        operated = first(model(*args, **inputs))
    assert torch.equal(operated, first(fmr.run(model, *args, edits={site: fmr.edits.Zero()}, **inputs).output))
    assert state(model) == before


def test_heads_behind_a_norm_can_be_left_out_alone() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        sizes = {
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        model = Qwen3ForCausalLM(Qwen3Config(intermediate_size=24, **sizes, **TOKENS)).eval()
    inputs = {"input_ids": torch.arange(3, 9)[None], "use_cache": False}
    structure = located(model, **inputs)
    surgery, site = analyzers.Surgery(model, structure), structure.attention[1].z.at(heads=1)
    with surgery.delete(1, heads=1):
        operated = model(**inputs).logits
    assert torch.equal(operated, fmr.run(model, edits={site: fmr.edits.Zero()}, **inputs).output.logits)
    with pytest.raises(analyzers.AnalyzerError, match="a gain of its own between its projections and its heads"):
        surgery.reorder([2, 3, 0, 1], layer=1)


def test_heads_in_another_order_are_the_same_layer() -> None:
    model = made(Looped)
    with analyzers.Surgery(model, located(model, TOKEN_IDS)).reorder([1, 0], layer=1):
        assert torch.allclose(operated := model(TOKEN_IDS), made(Looped)(TOKEN_IDS), atol=1e-6)
        assert not torch.equal(model.blocks[1].qkv.weight, made(Looped).blocks[1].qkv.weight)
    assert operated.isfinite().all()


class Biased(nn.Module):
    """A layer of two heads with a bias of its scores: by head, or one for both, as a mask is laid out in many ways."""

    def __init__(self, bias: str) -> None:
        super().__init__()
        self.bias = bias
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = (x.new_ones(n, 1, 1, t) * torch.arange(t) - 3).expand(n, 2, t, t)
        steps = torch.arange(t) - torch.arange(t)[:, None]
        if self.bias == "folded":
            scores = torch.baddbmm(mask.reshape(2 * n, t, t), q.reshape(2 * n, t, 8), k.reshape(2 * n, t, 8).mT)
            scores = scores.view(n, 2, t, t)
        else:
            scores = q @ k.mT + (mask if self.bias == "shared" else 0)
        if self.bias == "linear":
            scores = scores + self.table[:, None, None] * steps
        if self.bias == "scale":
            scores = scores * self.table[:, None, None]
        y = scores.softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(n, t, 16))


@pytest.mark.parametrize("bias", ["shared", "folded", "linear", "scale"])
def test_heads_that_more_than_weights_tells_apart_stay_in_their_order(bias: str) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model, x = nn.Sequential(Biased(bias), Biased(bias)).eval(), torch.randn(2, 5, 16)
    surgery = analyzers.Surgery(model, located(model, x))
    before = model(x)
    if bias in ("shared", "folded"):
        with surgery.reorder([1, 0], layer=1):
            assert torch.allclose(model(x), before, atol=1e-5)
    else:
        with pytest.raises(analyzers.AnalyzerError, match="which may be another for each head and does not move with"):
            surgery.reorder([1, 0], layer=1)
    with surgery.delete(1, heads=0):
        assert not torch.allclose(model(x), before, atol=1e-3)


def test_a_head_with_the_weights_of_another_is_that_head() -> None:
    model, copied = made(Looped), made(Looped)
    with torch.no_grad():
        for part in range(3):
            for tensors in zip(*((b.qkv.weight, b.qkv.bias) for b in (copied.blocks[2], copied.blocks[0])), strict=True):
                tensors[0][16 * part : 16 * part + 8] = tensors[1][16 * part + 8 : 16 * part + 16]
        copied.blocks[2].out.weight[:, :8] = copied.blocks[0].out.weight[:, 8:]
    with analyzers.Surgery(model, located(model, TOKEN_IDS)).replace(2, by=0, heads={0: 1}):
        assert torch.equal(model(TOKEN_IDS), copied(TOKEN_IDS))


def test_heads_that_share_keys_are_replaced_together() -> None:
    model, _, inputs = build("llama")
    surgery = analyzers.Surgery(model, located(model, **inputs))
    with pytest.raises(analyzers.AnalyzerError, match="Heads that share keys and values would need different ones"):
        surgery.replace(1, by=0, heads={0: 0})
    plain = model(**inputs).logits
    with surgery.reorder([2, 3, 0, 1], layer=0):
        assert torch.allclose(model(**inputs).logits, plain, atol=1e-6)
    with surgery.replace(1, by=0, heads={0: 2, 1: 3}):
        assert not torch.allclose(model(**inputs).logits, plain, atol=1e-4)


# ---- export


@pytest.mark.parametrize(("name", "path"), [("gpt2", "transformer.h"), ("llama", "model.layers"), ("bert", "encoder.layer")])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_export_is_a_plain_module_that_answers_as_the_operated_model(name: str, path: str, operation: str) -> None:
    model, inputs = loaded(name)
    inputs = {key: value for key, value in inputs.items() if key != "use_cache"}
    operate, order = OPERATIONS[operation]
    surgery, before = operate(analyzers.Surgery(model, located(model, **inputs))).delete(order[0], heads=0), state(model)
    exported = surgery.export(**inputs)
    assert state(model) == before
    with surgery:
        operated = first(model(**inputs, **({"use_cache": False} if name != "bert" else {})))
    assert torch.equal(first(exported(**inputs)), operated)
    assert len(exported.get_submodule(path)) == len(order)
    assert not any(type(module).__module__.startswith(("analyzers", "fmr")) for module in exported.modules())
    again = copy.deepcopy(exported)
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    again.load_state_dict(exported.state_dict())
    assert torch.equal(first(again(**inputs)), operated)


def test_an_export_generates_with_a_cache_where_a_layer_runs_twice() -> None:
    model, inputs = loaded("llama")
    prompt = {"input_ids": inputs["input_ids"][:1]}
    exported = analyzers.Surgery(model, located(model, **prompt)).repeat(1).export(**prompt)
    told = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    assert torch.equal(exported.generate(**prompt, **told), exported.generate(**prompt, use_cache=False, **told))


def test_an_export_of_layers_by_name_has_plain_modules_in_their_places() -> None:
    model = made(Unrolled)
    exported = analyzers.Surgery(model, located(model, TOKEN_IDS)).delete(0).repeat(2).export(TOKEN_IDS)
    assert isinstance(exported.a, nn.Identity)
    assert isinstance(exported.c, nn.Sequential)
    assert exported.c[0].up.weight.data_ptr() != exported.c[1].up.weight.data_ptr()


def test_an_export_that_code_does_not_follow_is_refused() -> None:
    class Counting(Looped):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for n in (0, 1, 2):
                x = self.blocks[n](x)
            return self.head(self.norm(x))

    model = made(Counting)
    with pytest.raises(analyzers.AnalyzerError, match=r"No plain module answers .*: it raises IndexError"):
        analyzers.Surgery(model, located(model, TOKEN_IDS)).delete(0).export(TOKEN_IDS)
