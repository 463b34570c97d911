"""Reading logits out of any point of the stream, with the model's own norm and unembedding."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fmr
from fmr.errors import IdError, StructureError
from tests.models import build

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40}
TINY |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": TINY,
    "Gemma2": TINY | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
    "Cohere": TINY | {"logit_scale": 0.5},
    "Granite": TINY | {"logits_scaling": 8.0},
    "GPTNeoX": TINY,
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 40, (2, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_last_point_reads_as_the_models_own_logits(name: str, dtype: torch.dtype) -> None:
    """Soft caps and scales on the way are those of the model."""
    model, ids = made(name)
    run = fmr.run(model.to(dtype), ids)
    structure = fmr.locate(run)
    last = structure.layers[-1].resid_post
    assert torch.equal(structure.read_out(run, last), run.output.logits)
    assert structure.final_norm is not None
    assert torch.equal(structure.read_out(run, structure.final_norm), run.output.logits)
    narrow = structure.read_out(run, fmr.Site(last.id, positions=-1, examples=[1]))
    assert torch.equal(narrow, run.output.logits[[1], -1])


def test_an_earlier_point_reads_as_the_model_without_the_layers_after_it() -> None:
    model, ids = made("Llama")
    run = fmr.run(model, ids)
    structure = fmr.locate(run)
    early = structure.read_out(run, structure.layers[0].resid_post)
    model.model.layers = model.model.layers[:1]
    assert torch.equal(early, model(ids).logits)


def test_a_planned_run_needs_only_the_point() -> None:
    model, ids = made("Gemma2")
    structure = fmr.locate(fmr.run(model, ids))
    last = structure.layers[-1].resid_post
    longer = torch.randint(3, 40, (3, 9))
    run = fmr.run(model, longer, keep=[last])
    assert torch.equal(structure.read_out(run, last), model(longer).logits)


def test_a_scale_before_the_unembedding_is_one_of_the_way() -> None:
    model, args, kwargs = build("t5")
    run = fmr.run(model, *args, **kwargs)
    structure = fmr.locate(run)
    assert torch.equal(structure.read_out(run, structure.layers[-1].resid_post), run.output.logits)


@pytest.mark.parametrize(
    ("name", "words"), [("bert", "no projection makes logits of the end"), ("gpt1", "its norms stand on the stream itself")]
)
def test_a_model_without_a_final_norm_of_its_own_says_why(name: str, words: str) -> None:
    config = transformers.OpenAIGPTConfig(n_layer=2, n_embd=32, n_head=4, vocab_size=40)
    model = transformers.OpenAIGPTLMHeadModel(config).eval() if name == "gpt1" else build("bert")[0]
    run = fmr.run(model, input_ids=torch.randint(3, 30, (2, 7)))
    structure = fmr.locate(run)
    with pytest.raises(StructureError, match=rf"Nothing can be read out of .*: .*{words}.*Expected pre-norm layers"):
        structure.read_out(run, structure.layers[0].resid_post)


def test_what_is_no_point_of_the_stream_is_refused() -> None:
    model, ids = made("Llama")
    run = fmr.run(model, ids)
    structure = fmr.locate(run)
    with pytest.raises(StructureError, match=r"has shape \[2, 7, 48\]: expected a value of the stream, \[2, 7, 32\]"):
        structure.read_out(run, structure.mlps[0].post)
    with pytest.raises(StructureError, match="is a part of a vector, which has no logits: expected positions or examples"):
        structure.read_out(run, fmr.Site(structure.layers[0].resid_post.id, units=[0]))
    alone = fmr.locate(run.graph)
    with pytest.raises(IdError, match=r"did not keep .*nor was the structure found in one that did: fmr.locate\(run\)"):
        alone.read_out(fmr.run(model, ids, keep=[alone.layers[0].resid_post]), alone.layers[0].resid_post)


def test_the_path_of_a_layer_reads_as_what_it_returned() -> None:
    model, ids = made("Llama")
    run = fmr.run(model, ids)
    assert torch.equal(fmr.locate(run).read_out(run, "model.layers.1"), run.output.logits)
