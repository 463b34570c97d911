"""Reading logits out of any point of the stream, with the model's own norm and unembedding."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

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


@pytest.mark.parametrize("name", [*MODELS, "gpt2", "t5", "whisper", "mamba"])
def test_bare_vectors_read_as_the_points_that_hold_them(name: str) -> None:
    """GPT-2's own code writes the sizes of its batch into a view on the way: vectors go through it as many at a time."""
    model, args, kwargs = (*made(name), {}) if name in MODELS else build(name)
    run = fmr.run(model, *(args if isinstance(args, tuple) else (args,)), **kwargs)
    structure = fmr.locate(run)
    point = structure.residual.writes[-1].after
    vectors, logits = run[point].detach(), structure.read_out(run, point)
    assert torch.allclose(structure.read_out(vectors), logits, atol=1e-6)
    assert torch.allclose(structure.read_out(vectors[0, 0]), logits[0, 0], atol=1e-6)
    many = vectors.flatten(0, 1).repeat(3, 1)[:-1][:, None]
    assert torch.allclose(structure.read_out(many), logits.flatten(0, 1).repeat(3, 1)[:-1, None], atol=1e-6)
    assert structure.read_out(vectors[:0]).shape == (0, *logits.shape[1:])


def test_vectors_are_read_where_the_model_gives_logits_of_its_last_position_alone() -> None:
    model, ids = made("Llama")
    run = fmr.run(model, ids, logits_to_keep=1)
    structure = fmr.locate(run)
    last = run[structure.layers[-1].resid_post]
    assert torch.allclose(structure.read_out(last)[:, -1:], run.output.logits, atol=1e-6)
    assert torch.allclose(structure.read_out(last), model(ids).logits, atol=1e-6)


class Turned(nn.Module):
    """A model that keeps its positions first, or its tokens as rows, and gives its logits by example."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.rows, self.table, self.norm = rows, nn.Embedding(20, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).reshape(-1, 16) if self.rows else self.table(ids.T)
        x = self.head(self.norm(x + self.down(torch.relu(self.up(x)))))
        return x.view(*ids.shape, 20) if self.rows else x.transpose(0, 1)


def test_rows_are_told_from_positions_that_come_first() -> None:
    torch.manual_seed(0)
    ids = torch.randint(20, (5, 5))
    run = fmr.run(Turned(rows=True).eval(), ids)
    structure = fmr.locate(run)
    vectors = run[structure.residual.writes[-1].after].detach()
    assert torch.allclose(structure.read_out(vectors[3:20]), run.output.flatten(0, 1)[3:20], atol=1e-6)
    turned = fmr.locate(fmr.run(Turned(rows=False).eval(), ids))
    with pytest.raises(StructureError, match="has no logits for each vector of the stream"):
        turned.read_out(vectors)


def test_gradients_go_through_vectors_and_leave_weights_alone() -> None:
    model, ids = made("Gemma2")
    structure = fmr.locate(fmr.run(model, ids))
    vectors = torch.randn(3, 32, requires_grad=True)
    structure.read_out(vectors)[:, 5].sum().backward()
    assert vectors.grad is not None
    assert bool(vectors.grad.any())
    assert all(weight.grad is None for weight in model.parameters())


class Codebooks(nn.Module):
    """A stream of which several heads make logits, by one projection or by several."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 60)] if joint else [nn.Linear(16, 20) for _ in range(3)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        if len(self.heads) == 1:
            return self.heads[0](x).unflatten(-1, (3, 20))
        return torch.stack([head(x) for head in self.heads], -2)


@pytest.mark.parametrize("joint", [True, False])
def test_several_heads_are_read_as_the_model_returns_them(joint: bool) -> None:
    torch.manual_seed(0)
    model, ids = Codebooks(joint).eval(), torch.randint(20, (2, 5))
    run = fmr.run(model, ids)
    structure = fmr.locate(run)
    point = structure.residual.writes[-1].after
    assert run.output.shape == (2, 5, 3, 20)
    assert torch.equal(structure.read_out(run, point), run.output)
    assert torch.allclose(structure.read_out(run[point].detach()), run.output, atol=1e-6)


class Beside(Codebooks):
    """One head, to whose logits something is added or from which it is taken before they are returned."""

    def __init__(self, kind: str) -> None:
        super().__init__(joint=False)
        self.kind = kind

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        y = self.heads[0](x)
        match self.kind:
            case "what is seen is banned":
                return y - 1e9 * F.one_hot(ids, 20)
            case "log-probabilities":
                return y - y.logsumexp(-1, keepdim=True)
            case "two heads":
                return y + self.heads[1](x)
            case _:
                return y + self.heads[1](self.table(ids))


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        ("what is seen is banned", "heads.0/linear#0"),
        ("log-probabilities", "heads.0/linear#0"),
        ("two heads", "/add#1"),
        ("what the table says", None),
    ],
)
def test_what_is_added_to_logits_is_read_out_where_it_is_made_of_the_end_alone(kind: str, last: str | None) -> None:
    run = fmr.run(Beside(kind).eval(), torch.randint(20, (2, 5)))
    structure = fmr.locate(run)
    point = structure.residual.writes[-1].after
    if last is None:
        with pytest.raises(StructureError, match="its logits are made of more than the end of its residual stream"):
            structure.read_out(run, point)
    else:
        assert torch.equal(structure.read_out(run, point), run[last])


def test_vectors_that_no_weights_are_known_for_or_of_another_width_are_refused() -> None:
    model, ids = made("Llama")
    run = fmr.run(model, ids)
    structure = fmr.locate(run)
    with pytest.raises(StructureError, match=r"shape \[3, 31\]: expected numbers of shape \(\.\.\., 32\), as wide as"):
        structure.read_out(torch.zeros(3, 31))
    with pytest.raises(StructureError, match=r"Vectors of torch.int64 .*expected numbers"):
        structure.read_out(ids)
    with pytest.raises(StructureError, match=r"found in a graph alone, which holds no weights.*Expected fmr.locate\(run\)"):
        fmr.locate(run.graph).read_out(torch.zeros(32))
    with pytest.raises(StructureError, match=r"a run and no site. Expected read_out\(run, structure.layers"):
        structure.read_out(run)
