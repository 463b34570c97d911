"""Patterns in one order, (examples, heads, queries, keys), whatever the model's own, and the head that a site selects."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PretrainedConfig, Qwen2Config

import fmr
from fmr.errors import StructureError
from fmr.structure.attention.maps import maps_of

EXAMPLES, LENGTH, HEADS, SIZE = 3, 5, 4, 2
SHAPE = (EXAMPLES, LENGTH, HEADS, SIZE)


def queries_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.einsum("bqhd,bkhd->bqhk", q, k).softmax(-1)
    return p.transpose(1, 2), torch.einsum("bqhk,bkhd->bqhd", p, v)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.einsum("bqhd,bkhd->bkqh", q, k).softmax(1)
    return p.permute(0, 3, 2, 1), torch.einsum("bkqh,bkhd->bqhd", p, v)


def in_the_batch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    p = (q @ k.mT).softmax(-1)
    return p.unflatten(0, (-1, HEADS)), (p @ v).unflatten(0, (-1, HEADS)).transpose(1, 2)


def in_the_batch_heads_outside(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (torch.cat(x.unbind(2), 0) for x in (q, k, v))
    p = (q @ k.mT).softmax(-1)
    return p.unflatten(0, (HEADS, -1)).transpose(0, 1), torch.stack((p @ v).chunk(HEADS, 0), 2)


def in_the_queries(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = (q.transpose(1, 2).flatten(1, 2) @ k[:, :, 0].mT).softmax(-1)
    return p.unflatten(1, (HEADS, -1)), (p @ v[:, :, 0]).unflatten(1, (HEADS, -1)).transpose(1, 2)


def in_the_queries_heads_inside(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = (q.flatten(1, 2) @ k[:, :, 0].mT).softmax(-1)
    return p.unflatten(1, (-1, HEADS)).transpose(1, 2), (p @ v[:, :, 0]).unflatten(1, (-1, HEADS))


def key_heads_times_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = q.unflatten(2, (2, 2)).permute(0, 2, 3, 1, 4), *(x[:, :, :2].transpose(1, 2)[:, :, None] for x in (k, v))
    p = (q @ k.mT).softmax(-1)
    return p.flatten(1, 2), (p @ v).flatten(1, 2).transpose(1, 2)


def one_query_in_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = (q[:, -1].unflatten(1, (2, 2)) @ k[:, :, :2].permute(0, 2, 3, 1)).softmax(-1)
    return p.flatten(1, 2)[:, :, None], (p @ v[:, :, :2].transpose(1, 2)).flatten(1, 2)[:, None]


class Layer(nn.Module):
    """One attention, computed as a function does, which also says what its maps are."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.o = (nn.Linear(HEADS * SIZE, HEADS * SIZE) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        maps, z = self.attend(*(layer(x).unflatten(-1, (HEADS, SIZE)) for layer in (self.q, self.k, self.v)))
        self.maps = maps.detach()
        return x[:, -z.shape[1] :] + self.o(z.flatten(2))


LAYOUTS = [
    (queries_first, ("examples", "positions", "heads", "units")),
    (keys_first, ("examples", "units", "positions", "heads")),
    (in_the_batch, ("examples*heads", "positions", "units")),
    (in_the_batch_heads_outside, ("heads*examples", "positions", "units")),
    (in_the_queries, ("examples", "heads*positions", "units")),
    (in_the_queries_heads_inside, ("examples", "positions*heads", "units")),
    (key_heads_times_groups, ("examples", "key heads", "groups", "positions", "units")),
    (one_query_in_groups, ("examples", "key heads", "groups", "units")),
]


@pytest.mark.parametrize(("attend", "layout"), LAYOUTS, ids=lambda case: getattr(case, "__name__", ""))
def test_maps_have_one_order_by_plan_too(attend: Callable[..., tuple[Tensor, Tensor]], layout: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Layer(attend)
    (block,) = fmr.locate(fmr.run(model, torch.randn(EXAMPLES, LENGTH, HEADS * SIZE))).attention
    assert block.pattern.layout == layout
    later = fmr.run(model, torch.randn(EXAMPLES + 1, LENGTH + 2, HEADS * SIZE), keep=[block.pattern])
    assert block.maps(later).shape[:2] == (EXAMPLES + 1, HEADS)
    assert torch.allclose(block.maps(later), model.maps, atol=1e-6)


@pytest.mark.parametrize("attend", [queries_first, keys_first])
def test_a_head_is_its_own_where_a_dimension_counts_heads(attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
    model = Layer(attend)
    run = fmr.run(model, torch.randn(EXAMPLES, LENGTH, HEADS * SIZE))
    (block,) = fmr.locate(run).attention
    shown = run[block.head(1).pattern]
    assert torch.equal(shown if attend is queries_first else shown.mT, block.maps(run)[:, 1])


@pytest.mark.parametrize("attend", [in_the_batch, in_the_queries, key_heads_times_groups])
def test_a_head_without_a_dimension_says_where_it_is(attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
    (block,) = fmr.locate(fmr.run(Layer(attend), torch.randn(EXAMPLES, LENGTH, HEADS * SIZE))).attention
    with pytest.raises(StructureError, match=r"no dimension that counts heads alone.*block.maps\(run\)\[:, 1\]"):
        block.head(1)


FAMILIES: list[type[PretrainedConfig]] = [LlamaConfig, Qwen2Config, GemmaConfig]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_heads_that_share_keys_are_told_apart_at_a_step_of_generation(config: type[PretrainedConfig]) -> None:
    """At a step with a mask the groups of a key head stand where its queries did before."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = AutoModelForCausalLM.from_config(config(**sizes, **tokens, intermediate_size=48)).eval()
    ids = torch.randint(3, 32, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0

    def generated() -> fmr.Run:
        with fmr.track(model) as run:
            model.generate(ids, attention_mask=mask, min_new_tokens=3, max_new_tokens=3, do_sample=False)
        return run

    run = generated()
    model.set_attn_implementation("eager")
    plain = generated()
    true = plain[fmr.locate(plain).attention[0].pattern]
    first, last = (fmr.locate(one).attention[0] for one in (run.passes[0], run.passes[-1]))
    assert last.certified
    assert last.pattern.layout == ("examples", "key heads", "groups", "units")
    assert torch.allclose(last.maps(run), true, atol=1e-5)
    assert first.maps(run.passes[0]).shape == (2, 4, 6, 6)
    assert torch.allclose(first.maps(run), true, atol=1e-5)
    assert torch.allclose(run[first.head(1).pattern], true[:, 1], atol=1e-5)
    with pytest.raises(StructureError, match="no dimension that counts heads alone"):
        last.head(1)


def test_heads_beside_several_queries_are_not_guessed() -> None:
    site = fmr.Site("attn/softmax#0", layout=("examples", "heads", "positions", "units"))
    packed = torch.arange(28.0).reshape(1, 2, 2, 7)
    assert torch.equal(maps_of(packed, site, 4, 2), packed.reshape(1, 4, 1, 7))
    with pytest.raises(StructureError, match=r"2 heads, expected 4 heads as where it was found. Locate it in that run"):
        maps_of(torch.zeros(1, 2, 4, 7), site, 4, 2)
