"""Jobs of heads: exact scores on patterns made by hand, nulls that catch wrong claims, and trained heads found by them."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, Gemma2Config, LlamaConfig

import fmr
from analyzers import AnalyzerError, HeadJobs, Heads
from analyzers.heads.circuits import Circuits
from analyzers.heads.draws import Draws, People, draw_people, draw_tokens, pool_of
from analyzers.heads.looks import Looked, look
from analyzers.heads.writes import Words, copying, naming
from fmr.structure.attention.factors import Factor, Factors
from fmr.structure.proof.certificate import Certificate

matplotlib.use("Agg")
N = 8
SIZE = 1 + 2 * N


@pytest.fixture(scope="module")
def jobs(loaded: tuple[nn.Module, Any]) -> HeadJobs:
    return Heads(*loaded, length=20).run(seed=0)


class Counts(nn.Module):
    """A model that takes numbers for amounts."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().cumsum(-1)


def drawn() -> Draws:
    return draw_tokens(torch.arange(100), 0, 3, N, seed=0)


def looking(at: Any) -> Tensor:
    """A pattern whose query t looks at the key that is named, and at the first where there is none."""
    rows = torch.zeros(SIZE, SIZE)
    for t in range(SIZE):
        key = at(t)
        rows[t, key if key is not None and 0 <= key <= t else 0] = 1.0
    return rows.expand(3, 1, SIZE, SIZE)


def scored(twice: Tensor, once: Tensor | None = None, causal: bool = True) -> Looked:
    return look(twice, twice if once is None else once, drawn(), causal, seed=0)


def means(looked: Looked, job: str) -> tuple[float, float]:
    return float(looked.scores[job].mean()), float(looked.nulls[job].mean())


# ---- where heads look


def test_heads_made_by_hand_have_the_score_one() -> None:
    idle = looking(lambda t: 0)
    assert means(scored(looking(lambda t: t - 1)), "previous token") == (1.0, 0.0)
    assert means(scored(looking(lambda t: t)), "self") == (1.0, 0.0)
    assert means(scored(idle), "first token") == (1.0, 0.0)
    by_content = looking(lambda t: t - N if t > N else None)
    assert means(scored(by_content, idle), "duplicate token") == (1.0, 0.0)
    after = looking(lambda t: t - N + 1 if t > N else None)
    assert means(scored(after, idle), "induction") == (1.0, 0.0)


def test_a_head_that_looks_a_fixed_way_back_is_no_induction_head() -> None:
    """It has the score 1, and so has its null, where nothing was said twice."""
    looked = scored(looking(lambda t: t - N + 1))
    assert means(looked, "induction") == (1.0, 1.0)
    score, null = means(looked, "positional")
    assert score > 0.3
    assert abs(null) < 0.1


def test_broad_heads_clear_no_null_of_permuted_keys() -> None:
    broad = torch.ones(SIZE, SIZE).tril()
    broad = (broad / broad.sum(-1, keepdim=True)).expand(3, 1, SIZE, SIZE)
    looked = scored(broad)
    for job in ("previous token", "self", "first token"):
        score, null = means(looked, job)
        assert score == pytest.approx(null, abs=1e-12), job
    assert float(looked.entropy.mean()) == pytest.approx(float(looked.uniform.mean()))


def test_only_patterns_that_tokens_do_not_change_are_positional() -> None:
    torch.manual_seed(0)
    random = (3 * torch.randn(3, 1, SIZE, SIZE)).masked_fill(torch.ones(SIZE, SIZE).triu(1).bool(), -torch.inf).softmax(-1)
    same = random[:1].expand(3, -1, -1, -1)
    mass = float(same[..., 1:, 1:].sum(-1).mean())
    score, null = means(scored(same), "positional")
    assert score == pytest.approx(mass, abs=1e-6)
    assert abs(null) < 0.1
    assert abs(means(scored(random), "positional")[0]) < 0.1


def test_the_permutation_moves_only_what_a_query_sees() -> None:
    """With two visible keys there are two orders; the null of a head is then plus or minus its score, never more."""
    torch.manual_seed(0)
    maps = torch.rand(3, 4, SIZE, SIZE).tril()
    maps = maps / maps.sum(-1, keepdim=True)
    looked = scored(maps)
    assert bool((looked.nulls["positional"].abs() <= looked.scores["positional"].abs().amax() + 1).all())
    assert bool(looked.nulls["positional"].isfinite().all())


# ---- what is drawn


def test_tokens_come_twice_or_once_and_never_by_chance() -> None:
    draws = draw_tokens(torch.arange(50), 7, 20, 10, seed=3)
    for twice, once in zip(draws.twice.tolist(), draws.once.tolist(), strict=True):
        assert twice[0] == once[0] == 7
        assert twice[1:11] == twice[11:] == once[1:11]
        assert len(set(once)) == 21
    again = draw_tokens(torch.arange(50), 7, 20, 10, seed=3)
    assert torch.equal(draws.once, again.once)
    assert not torch.equal(draws.once, draw_tokens(torch.arange(50), 7, 20, 10, seed=4).once)


def test_special_tokens_and_rows_beyond_the_tokenizer_are_not_drawn(loaded: tuple[nn.Module, Any]) -> None:
    pool = pool_of(None, 600, loaded[1])
    assert pool.tolist() == list(range(3, 515))
    assert pool_of(range(4, 9), 10, None).tolist() == [4, 5, 6, 7, 8]


def test_people_are_named_by_single_tokens(loaded: tuple[nn.Module, Any]) -> None:
    people = draw_people(loaded[1], seed=0)
    assert not isinstance(people, str)
    texts = [loaded[1].decode(one["input_ids"][0]) for one in people.inputs]
    assert len(texts) == len(set(texts)) == 16
    giver = loaded[1].decode(people.givers[0])
    assert texts[0].split().count(giver) == 2
    assert loaded[1].decode(people.receivers[0]) in texts[0].split()


# ---- what heads write


def factors_of(v: Tensor, out: Tensor) -> Factors:
    nothing = Factor(fmr.TensorId("x"), v, torch.zeros(v.shape[:2]))
    return Factors(nothing, nothing, nothing._replace(matrix=v), nothing._replace(matrix=out), Certificate({}, 0.0))


def test_copying_is_one_for_a_head_that_hands_on_and_minus_one_for_its_opposite() -> None:
    torch.manual_seed(0)
    v = torch.linalg.qr(torch.randn(16, 16))[0].reshape(4, 4, 16)
    known = factors_of(v, torch.stack([v[0], -v[1], v[2], v[3].roll(1, 0)]))
    other = factors_of(*torch.randn(2, 4, 4, 16))
    own, null = copying([known, other], torch.eye(16))
    np.testing.assert_allclose(own[:4], [1, -1, 1, 0], atol=1e-5)
    assert null.shape == (8,)
    assert null.max() < 0.95  # no head hands on what another one's values hold


def test_copying_equals_the_eigenvalues_of_the_whole_circuit() -> None:
    torch.manual_seed(0)
    embedding, unembedding = torch.randn(2, 30, 16, dtype=torch.float64)
    v, out = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    own, _ = copying([factors_of(v, out)], embedding.T @ unembedding)
    for head in range(3):
        whole = torch.linalg.eigvals(unembedding @ out[head].T @ v[head] @ embedding.T)
        assert float(own[head]) == pytest.approx(float(whole.real.sum() / whole.abs().sum()), abs=1e-6)


def test_what_heads_add_to_names_is_what_their_outputs_add(loaded: tuple[nn.Module, Any]) -> None:
    """By hand: z through the output weights, the last norm with its size as it was, and the rows of the names."""
    model, tokenizer = loaded
    people = draw_people(tokenizer, seed=1, prompts=4)
    assert not isinstance(people, str)
    with torch.no_grad():
        run = fmr.run(model, input_ids=people.inputs[0]["input_ids"])
        structure = fmr.locate(run)
        circuits = Circuits(structure, run)
        blocks, known = structure.attention, [circuits.factors(block) for block in structure.attention]
        to, _, weight = naming(model, blocks, known, Words(structure, circuits), people)
        hidden = []
        handle = model.transformer.ln_f.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        model(input_ids=people.inputs[0]["input_ids"])
        handle.remove()
        norm, names = model.transformer.ln_f, people.names
        scale = hidden[0][0, -1].var(unbiased=False).add(norm.eps).rsqrt()
        z = run[blocks[2].z][0, 1, -1]
        written = z @ model.transformer.h[2].attn.c_proj.weight[32:64]
        logits = ((written - written.mean()) * scale * norm.weight) @ model.lm_head.weight[names].T
        expected = logits[names.tolist().index(int(people.receivers[0]))] - logits.mean()
    assert float(to[2 * 4 + 1, 0]) == pytest.approx(float(expected), abs=1e-4)
    place = people.inputs[0]["input_ids"][0].tolist().index(int(people.receivers[0]))
    assert float(weight[9, 0]) == pytest.approx(float(blocks[2].maps(run)[0, 1, -1, place]), abs=1e-6)


def test_what_heads_add_to_names_goes_through_the_norm_after_them() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(
        Gemma2Config(**sizes, intermediate_size=48, vocab_size=64, head_dim=8), attn_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    ids, names = torch.tensor([[2, 9, 8, 5, 9]]), torch.tensor([7, 8, 9])
    people = People(({"input_ids": ids},), torch.tensor([8]), torch.tensor([9]), names)
    with torch.no_grad():
        run = fmr.run(model, input_ids=ids)
        structure = fmr.locate(run)
        circuits = Circuits(structure, run)
        blocks = structure.attention
        to, _, _ = naming(model, blocks, [circuits.factors(blocks[0])], Words(structure, circuits), people)
        layer, seen = model.model.layers[0], {}
        for name, norm in (("own", layer.post_attention_layernorm), ("last", model.model.norm)):
            norm.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][0, -1]}))
        model(input_ids=ids)
        size = {name: x.square().mean().add(1e-6).rsqrt() for name, x in seen.items()}
        written = layer.self_attn.o_proj.weight[:, 8:16] @ run[blocks[0].z][0, 1, -1]
        written = written * size["own"] * (1 + layer.post_attention_layernorm.weight)
        logits = model.lm_head.weight[names] @ (written * size["last"] * (1 + model.model.norm.weight))
    assert float(to[1, 0]) == pytest.approx(float(logits[1] - logits.mean()), abs=1e-4)


# ---- trained heads


def test_trained_induction_heads_are_found_and_tell_what_comes_again(jobs: HeadJobs) -> None:
    found = [name for name, _ in jobs.best("induction")]
    assert found
    assert {name.split(".")[0] for name in found} == {"1"}
    assert jobs.score("induction").max() > 0.9
    assert jobs.null("induction").max() < 0.15
    first, second = jobs.losses
    assert first > 5 * second
    assert jobs.best("previous token", 1)[0][0] == "0.1"
    assert jobs.of(found[0])[0] in ("induction", "copying")


def test_other_seeds_name_the_same_induction_heads(loaded: tuple[nn.Module, Any], jobs: HeadJobs) -> None:
    other = Heads(*loaded, length=20, writes=False).run(seed=5)
    assert {name for name, _ in other.best("induction")} == {name for name, _ in jobs.best("induction")}
    assert other.absent["copying"] == "it was not asked for, writes=False"


def test_without_the_previous_token_head_there_is_no_induction(loaded: tuple[nn.Module, Any], jobs: HeadJobs) -> None:
    model = loaded[0]
    block = fmr.locate(fmr.run(model, input_ids=torch.arange(3, 9)[None])).attention[0]
    heads = Heads(*loaded, length=20, writes=False)
    silent = heads.run(edits={block.head(1).z: fmr.edits.Zero()})
    other = heads.run(edits={block.head(3).z: fmr.edits.Zero()})
    plain, gone, kept = (one.score("induction").max() for one in (jobs, silent, other))
    assert gone < 0.1 < 0.8 * plain < kept
    assert silent.losses[1] > other.losses[1]


def test_weights_at_random_have_no_job_but_by_place() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=200, pad_token_id=0, **sizes)).eval()
    found = Heads(model, length=20).run()
    for job in ("previous token", "duplicate token", "induction", "first token", "self", "copying"):
        assert not found.best(job), job
    assert found.absent.keys() == {"name mover"}
    assert "no tokenizer to write names with" in found.absent["name mover"]


def test_a_model_that_sees_both_ways_is_scored_by_where_it_looks() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    found = Heads(BertModel(BertConfig(vocab_size=200, **sizes)).eval(), length=20).run()
    assert found.losses[0] != found.losses[0]
    assert "post-norm" in found.absent["copying"]
    assert found.score("induction").shape == (4,)


def test_half_precision_names_the_same_heads(loaded: tuple[nn.Module, Any], jobs: HeadJobs) -> None:
    model, tokenizer = fmr.zoo.load("facts")
    half = Heads(model.to(torch.bfloat16), tokenizer, length=20).run()
    assert {name for name, _ in half.best("induction")} == {name for name, _ in jobs.best("induction")}
    np.testing.assert_allclose(half.score("copying"), jobs.score("copying"), atol=0.1)


# ---- what a user gets, and what is refused


def test_a_job_needs_its_distance_from_the_null_in_nine_of_ten_examples(jobs: HeadJobs) -> None:
    table = jobs.table()
    named = table["jobs"].str.contains("induction")
    assert (named == jobs.has("induction")).all()
    assert ((table["induction"] - table["induction null"])[named] >= 0.25).all()
    wavering = {"induction": np.array([[1.0, 1.0, 1.0, 0.0]])}, {"induction": np.array([[0.0, 0.0, 0.0, 0.1]])}
    one = HeadJobs(((0, 0),), ("",), *wavering, np.zeros(1), 1.0, (0.0, 0.0), {}, "M", 4, 9, 0.25, 0)
    assert not one.has("induction").any()


def test_it_is_shown_saved_and_read_again(jobs: HeadJobs, tmp_path: Path) -> None:
    jobs.save(tmp_path / "jobs.safetensors")
    again = HeadJobs.load(tmp_path / "jobs.safetensors")
    assert repr(again) == repr(jobs)
    assert again.table().equals(jobs.table())
    assert "HeadJobs of GPT2LMHeadModel: 16 heads, 6 sequences of 20 random tokens twice; loss" in repr(jobs)
    assert len(jobs.plot().axes) == 4
    assert jobs.plot().axes[-1].get_yticks().tolist() == [0, 1, 2, 3]  # layers are whole
    bottom, top = jobs.plot(job="induction").axes[0].get_ylim()
    assert bottom < top  # layers go up, as in all other maps
    assert jobs.plot(job="induction").axes[0].get_title("left") == "induction"
    assert jobs.plot(job="copying").axes
    figure = matplotlib.figure.Figure()
    assert jobs.plot(figure.subplots()) is figure


def test_what_is_wrong_is_said(loaded: tuple[nn.Module, Any], jobs: HeadJobs) -> None:
    model, tokenizer = loaded
    with pytest.raises(AnalyzerError, match=r"does not take 81 token ids: index out of range.*Heads\(model, length=20\)"):
        Heads(model, length=40).run()
    with pytest.raises(AnalyzerError, match="length=30 needs more than 60 different tokens, and there are 50 to draw from"):
        Heads(model, tokenizer, length=30, ids=range(10, 60)).run()
    with pytest.raises(AnalyzerError, match="length=4 needs more than 8 different tokens, and there are 2 to draw from"):
        Heads(model, tokenizer, length=4, ids=[10, 11] * 20).run()
    with pytest.raises(AnalyzerError, match=r"ids=\[9999\]: expected token ids from 0 to 514"):
        Heads(model, tokenizer, ids=[9999]).run()
    with pytest.raises(AnalyzerError, match="examples=1: expected 2 or more"):
        Heads(model, examples=1)
    with pytest.raises(AnalyzerError, match="length=2: expected 3 or more"):
        Heads(model, length=2)
    with pytest.raises(AnalyzerError, match="least=2: expected a share"):
        Heads(model, least=2)
    with pytest.raises(AnalyzerError, match=r"'inducing' is no job. Expected one of 'previous token'"):
        jobs.score("inducing")
    with pytest.raises(AnalyzerError, match=r"'9.9' is no head of GPT2LMHeadModel: expected one of 0.0, 0.1"):
        jobs.of("9.9")
    with pytest.raises(AnalyzerError, match=r"'name mover' was not scored: there is no tokenizer"):
        Heads(model, length=20).run().score("name mover")
    with pytest.raises(
        AnalyzerError, match=r"does not take 8 token ids: .*Expected a model that takes these alone, such as"
    ):
        Heads(nn.Sequential(nn.Linear(4, 4))).run()
    with pytest.raises(AnalyzerError, match="looks no tokens up in a table: expected a language model"):
        Heads(Counts()).run()
