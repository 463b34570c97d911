"""Roles name the same values whatever computes them: eager or fused attention, the prompt or one step after it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import fmr
from fmr.structure.parts import Structure

PROMPT, STEPS = torch.arange(3, 10)[None], 3
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
}
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=0, eos_token_id=None)
MODELS: dict[str, tuple[type[Any], Any]] = {
    "heads side by side": (GPT2LMHeadModel, GPT2),
    "shared keys": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "a sliding window": (MistralForCausalLM, MistralConfig(sliding_window=4, **SIZES)),
}


def generated(name: str, attn: str) -> fmr.Run:
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model: nn.Module = kind._from_config(config, attn_implementation=attn).eval()
    with fmr.track(model) as run:
        model.generate(PROMPT, max_new_tokens=STEPS, do_sample=False)
    return run


def roles(one: Any, structure: Structure) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for n, layer in enumerate(structure.layers):
        block, mlp = layer.attention, layer.mlp
        named = {"out": block.out, "post": mlp.post, "mlp": mlp.out, "resid": layer.resid_post}
        found |= {f"{n}.{role}": one[site] for role, site in named.items()}
        found |= {f"{n}.pattern": one[block.pattern].reshape(4, -1), f"{n}.z": one[block.z].reshape(4, -1)}
    return found


@pytest.mark.parametrize("name", MODELS)
def test_roles_are_the_same_in_the_prompt_and_in_each_step(name: str) -> None:
    runs = {attn: generated(name, attn) for attn in ("eager", "sdpa")}
    for eager, fused in zip(runs["eager"].passes, runs["sdpa"].passes, strict=True):
        a, b = fmr.locate(eager), fmr.locate(fused)
        for structure in (a, b):
            assert len(structure.layers) == len(structure.attention) == len(structure.mlps) == 2
            assert all(block.certified for block in (*structure.attention, *structure.mlps))
            assert [(x.n_heads, x.n_kv_heads, x.head_dim) for x in structure.attention] == 2 * [
                (4, 4 if "side" in name else 2, 8)
            ]
            assert not structure.rejected
        values = roles(eager, a), roles(fused, b)
        for role in values[0]:
            torch.testing.assert_close(
                *(side[role].reshape(values[0][role].shape) for side in values), msg=lambda m, r=role: f"{r}: {m}"
            )
