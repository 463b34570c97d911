"""The inside of fused ops: read by ID, equal to the written-out computation, and without a trace where nobody asks."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from tests.models import build, padding
from tests.small import Fn

PATTERN = "*scaled_dot_product_attention#0/softmax#0"


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def with_attention(name: str, implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a family with the same weights under either implementation of its attention."""
    model, _, kwargs = build(name)
    model.set_attn_implementation(implementation)
    return model, {"input_ids": kwargs["input_ids"]}


def patterns(run: fmr.Run, glob: str) -> list[Tensor]:
    return [run[node.id] for node in run.graph.find(glob)]


def masks() -> dict[str, dict[str, Tensor]]:
    causal = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)[None, None].expand(2, 1, 6, 6)
    return {"none": {}, "padding": {"attention_mask": padding()}, "explicit": {"attention_mask": causal}}


@pytest.mark.parametrize("mask", ["none", "padding", "explicit"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_pattern_inside_is_that_of_the_eager_model(name: str, mask: str) -> None:
    fused, given = with_attention(name, "sdpa")
    eager, _ = with_attention(name, "eager")
    inside = patterns(fmr.run(fused, **given, **masks()[mask]), PATTERN)
    outside = patterns(fmr.run(eager, **given, **masks()[mask]), "*/softmax#*")
    assert len(inside) == len(outside) == 2
    for a, b in zip(inside, outside, strict=True):
        close(a, b)
        close(a.sum(-1), torch.ones_like(a.sum(-1)))


# ---- scaled_dot_product_attention, by hand


def qkv(heads: int = 2, kv_heads: int = 2, queries: int = 3, keys: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    maker = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 5)]
    q, k, v = (torch.randn(shape, generator=maker) for shape in shapes)
    return q, k, v


def attend(**options: Any) -> nn.Module:
    return Fn(lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, **options))


SEEN = torch.tensor([[True, True, False, True], [True, False, False, False], [True] * 4])
NOWHERE = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
BIAS = torch.linspace(-1, 1, 12).view(3, 4).masked_fill(~SEEN, float("-inf"))

CASES: dict[str, tuple[dict[str, Any], Tensor | None]] = {
    "plain": ({}, None),
    "bool mask": ({"attn_mask": SEEN}, SEEN),
    "float mask": ({"attn_mask": BIAS}, SEEN),
    "causal": ({"is_causal": True}, torch.ones(3, 4).tril().bool()),
    "scale": ({"scale": 0.7}, None),
    "scale and mask": ({"attn_mask": SEEN, "scale": 0.1}, SEEN),
    "fully masked row": ({"attn_mask": NOWHERE}, NOWHERE),
    "per example": ({"attn_mask": torch.stack([SEEN, NOWHERE])[:, None]}, torch.stack([SEEN, NOWHERE])[:, None]),
}


def by_hand(q: Tensor, k: Tensor, options: dict[str, Any], seen: Tensor | None) -> Tensor:
    """The pattern, with the exponentials written out."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * options.get("scale", 8**-0.5)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.masked_fill(mask == float("-inf"), 0.0)
    weights = scores.exp() if seen is None else scores.exp() * seen
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)


@pytest.mark.parametrize("case", CASES)
def test_pattern_and_z_equal_a_hand_computation(case: str) -> None:
    options, seen = CASES[case]
    q, k, v = qkv()
    run = fmr.run(attend(**options), q, k, v)
    pattern = run["/scaled_dot_product_attention#0/softmax#0"]
    close(pattern, by_hand(q, k, options, seen))
    if seen is not None:
        assert (pattern[~seen.expand_as(pattern)] == 0).all()
    total = torch.ones(2, 2, 3) if seen is None else seen.any(-1).expand(2, 2, 3).float()
    close(pattern.sum(-1), total)
    z = run["/scaled_dot_product_attention#0/matmul#1"]
    close(z, run["/scaled_dot_product_attention#0"], 1e-5)
    close(pattern @ v, z)


def test_grouped_queries_share_their_keys() -> None:
    q, k, v = qkv(heads=4, kv_heads=2)
    run = fmr.run(attend(enable_gqa=True), q, k, v)
    close(run["/scaled_dot_product_attention#0/softmax#0"], by_hand(q, k.repeat_interleave(2, 1), {}, None))
    close(run["/scaled_dot_product_attention#0/matmul#1"], run["/scaled_dot_product_attention#0"], 1e-5)


@pytest.mark.parametrize("given", ["positional", "named"])
def test_the_spelling_of_the_arguments_does_not_matter(given: str) -> None:
    q, k, v = qkv()
    positional = Fn(lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, SEEN, 0.0, False))
    named = Fn(lambda self, q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=SEEN))
    run = fmr.run({"positional": positional, "named": named}[given], q, k, v)
    close(run["/scaled_dot_product_attention#0/softmax#0"], by_hand(q, k, {}, SEEN))


def test_asking_changes_neither_graph_nor_ids_nor_output_nor_random_state() -> None:
    model, given = with_attention("gpt2", "sdpa")
    expected = model(**given).logits
    torch.manual_seed(3)
    state = torch.get_rng_state()
    run = fmr.run(model, **given)
    before, nodes = run.graph.fingerprint, run.graph.nodes
    names = [node.id for node in run.graph.find("*/scaled_dot_product_attention#0/*")]
    assert len(names) > 10
    for name in names:
        assert run[name].shape == run.graph[name].shape
        assert run[name].dtype == run.graph[name].dtype
    assert run.graph.fingerprint == before
    assert run.graph.nodes == nodes
    assert not set(names) & {node.id for node in run.graph.nodes}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run.output.logits, expected)
    assert fmr.run(model, **given).graph.fingerprint == before
    run.graph.lint()


def test_parents_inside_lead_to_what_the_op_read() -> None:
    run = fmr.run(attend(attn_mask=SEEN), *qkv())
    inside = run.graph.inner("/scaled_dot_product_attention#0")
    local = {node.id for node in inside}
    for node in inside:
        for parent in node.parents:
            assert parent in local or parent in {p.id for p in run.graph["/scaled_dot_product_attention#0"].parents}
    assert run.graph["/scaled_dot_product_attention#0/matmul#0"].parents[0] == "input:args.0"
    assert run.graph["/scaled_dot_product_attention#0/matmul#1"].parents[1] == "input:args.2"


# ---- nn.MultiheadAttention


def heads_by_hand(
    module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pattern (batch, heads, queries, keys) and output of a batch-first module, head by head, from its weights."""
    if module.in_proj_weight is not None:
        wq, wk, wv = module.in_proj_weight.chunk(3)
    else:
        wq, wk, wv = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    bq, bk, bv = module.in_proj_bias.chunk(3)
    q, k, v = q @ wq.T + bq, k @ wk.T + bk, v @ wv.T + bv
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.expand(k.size(0), 1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(v.size(0), 1, -1)], 1)
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.size(-1) ** 0.5
    if seen is not None:
        extra = scores.size(-1) - seen.size(-1)
        scores = scores.masked_fill(~F.pad(seen, (0, extra), value=True), float("-inf"))
    pattern = scores.softmax(-1)
    z = torch.einsum("bhqk,bhkd->bhqd", pattern, v).transpose(1, 2).flatten(2)
    return pattern, z @ module.out_proj.weight.T + module.out_proj.bias


def multihead(train: bool, **options: Any) -> nn.MultiheadAttention:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        module = nn.MultiheadAttention(8, 2, batch_first=True, **options).train(train)
        for bias in (module.in_proj_bias, module.out_proj.bias):
            nn.init.normal_(bias)
    return module


def words(length: int = 4, size: int = 8) -> Tensor:
    return torch.randn(3, length, size, generator=torch.Generator().manual_seed(length))


def only_pattern(run: fmr.Run) -> Tensor:
    (node,) = run.graph.find("*/softmax#*")
    return run[node.id].reshape(3, 2, *run[node.id].shape[-2:])


HIDDEN = torch.tensor([[False, False, False, True], [False] * 4, [False, True, True, True]])
WEIGHTS = list(itertools.product([True, False], [True, False]))


@pytest.mark.parametrize(("need_weights", "average"), WEIGHTS)
@pytest.mark.parametrize("train", [True, False])
def test_multihead_attention_shows_its_pattern(train: bool, need_weights: bool, average: bool) -> None:
    module, x = multihead(train), words()
    with torch.no_grad():
        plain, _ = module(x, x, x, need_weights=need_weights, average_attn_weights=average)
    run = fmr.run(module, x, x, x, need_weights=need_weights, average_attn_weights=average)
    assert {node.op for node in run.graph.nodes} & {"multi_head_attention_forward", "native_multi_head_attention"}
    assert torch.equal(run.output[0], plain)
    pattern, out = heads_by_hand(module, x, x, x)
    close(only_pattern(run), pattern)
    close(run.output[0], out, 1e-5)
    if need_weights:
        close(run.output[1], pattern.mean(1) if average else pattern)


@pytest.mark.parametrize("how", ["key_padding_mask", "bool attn_mask", "float attn_mask"])
@pytest.mark.parametrize("train", [True, False])
def test_multihead_attention_shows_its_pattern_under_a_mask(train: bool, how: str) -> None:
    module, x = multihead(train), words()
    causal = torch.ones(4, 4).tril().bool()
    bias = torch.zeros(4, 4).masked_fill(~causal, float("-inf"))
    options, seen = {
        "key_padding_mask": ({"key_padding_mask": HIDDEN}, ~HIDDEN[:, None, None]),
        "bool attn_mask": ({"attn_mask": ~causal}, causal),
        "float attn_mask": ({"attn_mask": bias}, causal),
    }[how]
    run = fmr.run(module, x, x, x, **options)
    pattern, out = heads_by_hand(module, x, x, x, seen)
    close(only_pattern(run), pattern)
    close(run.output[0], out, 1e-5)
    assert (only_pattern(run)[~seen.expand_as(pattern)] == 0).all()


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [({"add_bias_kv": True}, 8, 8), ({"add_zero_attn": True}, 8, 8), ({"kdim": 5, "vdim": 6}, 5, 6)],
    ids=["bias_kv", "zero_attn", "kdim_vdim"],
)
@pytest.mark.parametrize("train", [True, False])
def test_multihead_attention_with_more_keys_or_other_sizes(
    train: bool, options: dict[str, Any], key: int, value: int
) -> None:
    module = multihead(train, **options)
    q, k, v = words(3), words(4, key), words(4, value)
    run = fmr.run(module, q, k, v)
    pattern, out = heads_by_hand(module, q, k, v)
    close(only_pattern(run), pattern)
    close(run.output[0], out, 1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_multihead_attention_recomputed_from_its_inside_is_the_output(train: bool) -> None:
    run = fmr.run(multihead(train), *[words()] * 3)
    (op,) = {node.id.rpartition(":")[0] for node in run.graph.nodes if "multi_head_attention" in node.op}
    out = run[f"{op}/linear#1"]
    close(out.view(4, 3, 8).transpose(0, 1) if train else out, run.output[0], 1e-5)


# ---- nn.TransformerEncoderLayer


def layer(train: bool, norm_first: bool, activation: str) -> nn.TransformerEncoderLayer:
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        return nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True, norm_first=norm_first).train(train)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_an_encoder_layer_shows_its_pattern_its_memory_and_its_residual(
    train: bool, norm_first: bool, activation: str, masked: bool
) -> None:
    module, x = layer(train, norm_first, activation), words()
    options = {"src_key_padding_mask": HIDDEN} if masked else {}
    run = fmr.run(module, x, **options)
    read = module.norm1(x) if norm_first else x
    pattern, out = heads_by_hand(module.self_attn, read, read, read, ~HIDDEN[:, None, None] if masked else None)
    seen = ~HIDDEN if masked else torch.ones(3, 4, dtype=torch.bool)
    close(only_pattern(run)[seen[:, None, :, None].expand_as(pattern)], pattern[seen[:, None, :, None].expand_as(pattern)])
    middle = x + out if norm_first else module.norm1(x + out)
    post = getattr(F, activation)(module.linear1(module.norm2(middle) if norm_first else middle))
    (memory,) = run.graph.find(f"*{activation}#0")
    close(run[memory.id][seen], post[seen], 1e-5)
    final = middle + module.linear2(post)
    close(run.output[seen], (final if norm_first else module.norm2(final))[seen], 1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_encoder_layer_is_one_op_whose_last_inner_value_is_its_output(norm_first: bool) -> None:
    run = fmr.run(layer(False, norm_first, "gelu"), words())
    (node,) = [node for node in run.graph.nodes if not node.id.is_source]
    assert node.op == "transformer_encoder_layer_fwd"
    inside = run.graph.inner(node.id)
    close(run[inside[-1].id], run[node.id], 1e-5)


def test_a_stack_of_fast_layers_shows_each_pattern() -> None:
    stack = nn.TransformerEncoder(layer(False, False, "relu"), 3, enable_nested_tensor=False).eval()
    run = fmr.run(stack, words())
    found = [node.id for node in run.graph.find("*/softmax#*")]
    assert [name.partition("/")[0] for name in found] == ["layers.0", "layers.1", "layers.2"]
    for name in found:
        close(run[name].sum(-1), torch.ones(3, 2, 4))


# ---- dropout


def test_under_dropout_the_pattern_is_readable_and_what_lies_behind_it_refuses() -> None:
    q, k, v = qkv()
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        run = fmr.run(attend(dropout_p=0.5), q, k, v)
    op = "/scaled_dot_product_attention#0"
    close(run[f"{op}/softmax#0"], by_hand(q, k, {}, None))
    for behind in ("dropout#0", "matmul#1"):
        with pytest.raises(fmr.IdError, match="depends on the random mask"):
            run[f"{op}/{behind}"]


def test_a_multihead_attention_in_training_with_dropout_shows_its_pattern() -> None:
    module, x = multihead(True, dropout=0.3), words()
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        run = fmr.run(module, x, x, x)
    close(only_pattern(run), heads_by_hand(module, x, x, x)[0])
    (op,) = {node.id.rpartition(":")[0] for node in run.graph.nodes if node.op == "multi_head_attention_forward"}
    with pytest.raises(fmr.IdError, match="depends on the random mask"):
        run[f"{op}/dropout#0"]


# ---- plans and globs


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_plan_delivers_inner_values(name: str, stop: bool) -> None:
    model, given = with_attention(name, "sdpa")
    full = fmr.run(model, **given)
    names = [node.id for node in full.graph.find(PATTERN)]
    run = fmr.run(model, keep=names, stop=stop, **given)
    for key in names:
        assert torch.equal(run[key], full[key])
    lone = fmr.run(model, keep=names[0], stop=stop, **given)
    assert torch.equal(lone[names[0]], full[names[0]])
    assert names[1] not in lone


@pytest.mark.parametrize("keep", ["*softmax*", "*"])
def test_a_glob_streams_inner_values(keep: str) -> None:
    model, given = with_attention("gpt2", "sdpa")
    full = fmr.run(model, **given)
    run = fmr.run(model, keep=keep, **given)
    for node in full.graph.find("*softmax*"):
        assert node.id in run
        assert torch.equal(run[node.id], full[node.id])
    assert run.graph.fingerprint == full.graph.fingerprint


@pytest.mark.parametrize("train", [False, True])
def test_plans_and_globs_reach_into_multihead_attention_and_encoder_layers(train: bool) -> None:
    for model, args in ((multihead(train), [words()] * 3), (layer(train, True, "gelu"), [words()])):
        full = fmr.run(model, *args)
        (node,) = full.graph.find("*/softmax#*")
        for run in (fmr.run(model, *args, keep=node.id, stop=True), fmr.run(model, *args, keep="*softmax*")):
            assert torch.equal(run[node.id], full[node.id])


def test_a_value_behind_dropout_that_a_plan_asks_for_is_an_error_and_not_a_guess() -> None:
    with torch.random.fork_rng([]), pytest.raises(fmr.IdError, match=r"matmul#1"):
        fmr.run(attend(dropout_p=0.5), *qkv(), keep="/scaled_dot_product_attention#0/matmul#1")


def test_inner_values_are_those_of_the_call_also_when_its_arguments_are_overwritten_later() -> None:
    def forward(self: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scaled = q * 2
        out = F.scaled_dot_product_attention(scaled, k, v)
        scaled.zero_()
        k.zero_()
        return out

    q, k, v = qkv()
    expected = by_hand(q * 2, k.clone(), {}, None)
    for keep in ("all", "*", "*softmax*", "/scaled_dot_product_attention#0/softmax#0"):
        run = fmr.run(Fn(forward), q, k.clone(), v, keep=keep)
        close(run["/scaled_dot_product_attention#0/softmax#0"], expected)


def test_an_inner_value_is_refused_where_the_arguments_were_not_kept() -> None:
    run = fmr.run(attend(), *qkv(), keep="none")
    with pytest.raises(fmr.IdError, match="did not keep"):
        run["/scaled_dot_product_attention#0/softmax#0"]


@pytest.mark.parametrize(
    "op",
    [
        lambda _, a, b: torch.lerp(a, b, 0.25),
        lambda _, a, b: torch.addcmul(a, a, b),
        lambda _, a, b: a.addcmul(a, b, value=2.0),
    ],
)
def test_an_add_of_products_in_one_op_ends_in_an_add(op: Any) -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    run = fmr.run(Fn(op), a, b)
    last = run.graph.unfused.nodes[-2]
    assert last.op == "add"
    close(run[last.id], run.output)


@pytest.mark.parametrize("equation", ["ij,jk,kl->il", "ij,ik,kl->jl", "ij,jk,lk->li"])
def test_a_product_of_three_shows_the_products_of_two(equation: str) -> None:
    a, b, c = torch.randn(3, 3), torch.randn(3, 3), torch.randn(3, 3)
    run = fmr.run(Fn(lambda _, a, b, c: torch.einsum(equation, a, b, c)), a, b, c)
    first, last = run.graph.inner("/einsum#0")
    assert [node.op for node in (first, last)] == ["einsum", "einsum"]
    close(run[last.id], run.output)
    assert not run.graph.inner(first.id)


def test_a_product_of_three_multiplies_where_nothing_is_summed() -> None:
    a, b, c = torch.randn(3, 2), torch.randn(2, 4), torch.randn(3)
    run = fmr.run(Fn(lambda _, a, b, c: torch.einsum("ij,jk,i->ki", a, b, c)), a, b, c)
    assert [node.op for node in run.graph.inner("/einsum#0")] == [
        "einsum",
        "permute",
        "getitem",
        "permute",
        "getitem",
        "mul",
    ]
    close(run["/einsum#0/mul#0"], run.output)
