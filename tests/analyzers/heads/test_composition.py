"""Composition: equal to circuits that are multiplied out, exact against random rotations, and found where it was planted."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, OPTConfig

import fmr
from analyzers import AnalyzerError, Composition, Compositions
from analyzers.heads.circuits import Circuits, Part, triangle
from analyzers.heads.composition import _sharpness, _z
from tests.models import build

matplotlib.use("Agg")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
SIZES |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
IDS = torch.arange(2, 9)[None]


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **more})
    return _moved(AutoModelForCausalLM.from_config(config))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=1)
    return _moved(AutoModelForCausalLM.from_config(config))


def gemma2() -> nn.Module:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)
    return _moved(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def _moved(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def norm(matrix: Tensor) -> float:
    return float(matrix.norm())


def multiplied_out(circuits: dict[str, tuple[Tensor, ...]], writer: str, reader: str, role: str) -> float:
    """The score of two heads from whole circuits, as the paper writes it. circuits: W_Q, W_K, W_V, W_O of each head."""
    q, k, v, o = circuits[reader]
    qk, ov = q.T @ k, o.T @ v
    other = circuits[writer][3].T @ circuits[writer][2]
    left = {"q": qk.T, "k": qk, "v": ov}[role]
    return norm(left @ other) / norm(left) / norm(other)


def llama_circuits(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    return _cut(model, lambda layer: layer.input_layernorm.weight, lambda layer: 1.0)


def gemma2_circuits(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Norms stand before attention and after it, each with one added to its weight."""
    return _cut(
        model, lambda layer: 1 + layer.input_layernorm.weight, lambda layer: 1 + layer.post_attention_layernorm.weight
    )


def _cut(model: nn.Module, before: Any, after: Any) -> dict[str, tuple[Tensor, ...]]:
    found = {}
    for n, layer in enumerate(model.model.layers):
        gain, own = before(layer), layer.self_attn
        rows = {
            name: (getattr(own, name).weight * gain).unflatten(0, (-1, 8)).detach()
            for name in ("q_proj", "k_proj", "v_proj")
        }
        out = (own.o_proj.weight.T * after(layer)).unflatten(0, (4, 8)).detach()
        for head in range(4):
            found[f"{n}.{head}"] = rows["q_proj"][head], rows["k_proj"][head // 2], rows["v_proj"][head // 2], out[head]
    return found


def gpt2_circuits(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    found, centred = {}, torch.eye(32) - 1 / 32
    for n, layer in enumerate(model.transformer.h):
        read = (layer.attn.c_attn.weight.T * layer.ln_1.weight @ centred).unflatten(0, (3, 4, 8)).detach()
        out = layer.attn.c_proj.weight.unflatten(0, (4, 8)).detach()
        for head in range(4):
            found[f"{n}.{head}"] = *(read[role, head] for role in range(3)), out[head]
    return found


CUT = {"llama": (llama, llama_circuits), "gpt2": (gpt2, gpt2_circuits), "norms after": (gemma2, gemma2_circuits)}


@pytest.mark.parametrize(("make", "cut"), CUT.values(), ids=CUT)
def test_scores_are_those_of_circuits_multiplied_out(make: Any, cut: Any) -> None:
    model = make()
    found, circuits = Composition(model).run(IDS), cut(model)
    checked = 0
    for reader, role, row in zip(found.readers, found.roles, found.scores, strict=True):
        for writer, score in zip(found.writers, row, strict=True):
            if "mlp" in reader + writer:
                continue
            assert np.isnan(score) == (writer[0] >= reader[0])
            if score == score:
                assert score == pytest.approx(multiplied_out(circuits, writer, reader, role), abs=1e-5), (
                    writer,
                    reader,
                    role,
                )
                checked += 1
    assert checked == 3 * 3 * 4 * 4
    assert ((found.scores >= 0) | np.isnan(found.scores)).all()
    assert np.nanmax(found.scores) <= 1


def test_memories_read_and_write_by_their_matrices() -> None:
    model = llama()
    found, circuits = Composition(model).run(IDS), llama_circuits(model)
    mlp, gain = model.model.layers[1].mlp, model.model.layers[1].post_attention_layernorm.weight
    keys = (torch.cat([mlp.up_proj.weight, mlp.gate_proj.weight]) * gain).detach()
    ov = circuits["1.2"][3].T @ circuits["1.2"][2]
    assert dict(found.into("mlp 1", "in"))["1.2"] == pytest.approx(norm(keys @ ov) / norm(keys) / norm(ov), abs=1e-5)
    values, (q, k, _, _) = mlp.down_proj.weight.detach(), circuits["2.1"]
    expected = norm(q.T @ k @ values) / norm(q.T @ k) / norm(values)
    assert dict(found.into("2.1", "k"))["mlp 1"] == pytest.approx(expected, abs=1e-5)
    assert "mlp 2" not in dict(found.into("2.1", "k"))  # written after that layer's attention read
    assert found.rank("mlp 1", "2.1", "k")[1] == 2


def test_nothing_hangs_on_what_is_run_nor_much_on_precision() -> None:
    model = llama()
    found = Composition(model).run(IDS)
    other = Composition(model).run(torch.randint(2, 64, (3, 11)))
    np.testing.assert_allclose(other.scores, found.scores, atol=1e-6)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    padded = Composition(model).run({"input_ids": torch.randint(2, 64, (2, 5)), "attention_mask": mask})
    np.testing.assert_allclose(padded.scores, found.scores, atol=1e-6)
    half = Composition(model.to(torch.bfloat16)).run(IDS)
    np.testing.assert_allclose(half.scores, found.scores, atol=0.01)


def test_layers_that_are_chosen_have_the_scores_that_they_have_among_all() -> None:
    model = llama()
    every, some = Composition(model).run(IDS), Composition(model).run(IDS, into=1, memories=False)
    assert set(some.writers) == {f"0.{n}" for n in range(4)}
    assert some.into("1.3", "v") == [one for one in every.into("1.3", "v") if not one[0].startswith("mlp")]


def test_parallel_layers_do_not_read_what_is_written_beside_them() -> None:
    torch.manual_seed(0)
    model = _moved(AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES)))
    found = Composition(model).run(IDS)
    assert {name for name, _ in found.into("mlp 1", "in")} == {*(f"0.{n}" for n in range(4)), "mlp 0"}


# ---- what chance gives


@pytest.mark.parametrize(("rank", "other"), [(2, 3), (6, 1), (6, 6)])
def test_the_null_is_that_of_random_rotations(rank: int, other: int) -> None:
    """Mean and spread over sampled rotations are those of the formula, flat spectra and steep ones alike."""
    torch.manual_seed(0)
    d = 6
    read = torch.randn(rank, d, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    written = torch.randn(other, d, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(20000, d, d, dtype=torch.float64))
    rotations = turned[0] * turned[1].diagonal(dim1=1, dim2=2).sign()[:, None]
    scores = (read @ rotations @ written.T).flatten(1).norm(dim=1) / read.norm() / written.norm()
    assert float(scores.square().mean()) == pytest.approx(1 / d, rel=0.02)
    z = _z(scores[None].numpy(), np.array([_sharpness(read)]), np.full(len(scores), _sharpness(written)), d)
    assert abs(float(z.mean())) < 0.03
    assert float(z.std()) == pytest.approx(1, rel=0.03)


def test_random_weights_compose_as_chance_says() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "hidden_size": 128, "num_key_value_heads": 4})
    found = Composition(AutoModelForCausalLM.from_config(config).eval()).run(IDS, memories=False)
    scores, z = found.scores[np.isfinite(found.scores)], found.z[np.isfinite(found.z)]
    assert float(np.sqrt((scores**2).mean())) == pytest.approx(found.expected, rel=0.02)
    assert abs(z.mean()) < 0.2
    assert np.abs(z).max() < 5


def test_a_planted_reader_is_found_and_a_planted_stranger_is_not() -> None:
    """Head 2.1 reads by its keys just where 0.3 writes; its queries read what no head writes."""
    model = llama(num_key_value_heads=4)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.fill_(1.0)
    own = model.model.layers[2].self_attn
    written = model.model.layers[0].self_attn.o_proj.weight.data[:, 24:32]
    own.k_proj.weight.data[8:16] = written.T
    found = Composition(model).run(IDS)
    assert found.rank("0.3", "2.1", "k") == (1, 8)
    row, column = found._row("2.1", "k"), found.writers.index("0.3")
    assert found.z[row, column] > 4
    assert found.rank("0.3", "2.1", "q")[0] > 1
    assert found.z[found._row("2.1", "q"), column] < 4


def test_trained_induction_heads_read_the_previous_token_head(loaded: tuple[nn.Module, Any]) -> None:
    """By weights alone, in the model that ships: all four heads of layer 1 read by their keys what 0.1 wrote, not what they
    read by their queries."""
    found = Composition(*loaded).run(IDS, into=1, memories=False)
    ranks = [found.rank("0.1", f"1.{head}", "k")[0] for head in range(4)]
    assert sorted(ranks) == [1, 1, 1, 2]
    assert min(found.rank("0.1", f"1.{head}", "q")[0] for head in range(4)) > 2
    assert all(found.z[found._row(f"1.{head}", "k"), found.writers.index("0.1")] > 10 for head in range(4))


def test_the_triangle_of_a_matrix_without_full_rank_keeps_its_lengths() -> None:
    torch.manual_seed(0)
    tall = torch.randn(9, 2) @ torch.randn(2, 4)
    x = torch.randn(4, 5)
    torch.testing.assert_close((triangle(tall) @ x).norm(dim=0), (tall @ x).norm(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("called", ["grouped_mm", "eager"])
@torch.no_grad()
def test_experts_are_memories_of_their_own(called: str) -> None:
    """A router weighs what an expert writes and does not turn it: its score is that of its two matrices, be they read by one
    product or in a loop over the experts that get a token."""
    torch.manual_seed(0)
    config = MixtralConfig(**{**SIZES, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 1})
    model = _moved(AutoModelForCausalLM.from_config(config, experts_implementation=called))
    found, heads = Composition(model).run(IDS[:, :2]), llama_circuits(model)
    assert found.refused == {}
    assert found.writers[-6:] == tuple(f"mlp {layer} expert {expert}" for layer in (0, 1) for expert in range(3))
    for expert in range(3):
        writes = model.model.layers[0].mlp.experts.down_proj[expert]
        q, k, _, _ = heads["1.2"]
        score = norm(k.T @ q @ writes) / norm(k.T @ q) / norm(writes)
        assert dict(found.into("1.2", "k"))[f"mlp 0 expert {expert}"] != pytest.approx(score, abs=1e-5)
        assert dict(found.into("1.2", "q"))[f"mlp 0 expert {expert}"] == pytest.approx(score, abs=1e-5)
        layer = model.model.layers[1]
        reads = layer.mlp.experts.gate_up_proj[expert] * layer.post_attention_layernorm.weight
        _, _, v, o = heads["0.1"]
        score = norm(reads @ o.T @ v) / norm(reads) / norm(o.T @ v)
        assert dict(found.into(f"mlp 1 expert {expert}", "in"))["0.1"] == pytest.approx(score, abs=1e-5)


def test_a_model_in_train_mode_is_told_what_to_do() -> None:
    with pytest.raises(AnalyzerError, match=r"is in train mode, .* call model.eval\(\)"):
        Composition(llama().train()).run(IDS)


# ---- what a user gets, and what is refused


def test_it_is_shown_saved_and_read_again(tmp_path: Path) -> None:
    found = Composition(gpt2()).run(IDS)
    found.save(tmp_path / "found.safetensors")
    again = Compositions.load(tmp_path / "found.safetensors")
    assert repr(again) == repr(found)
    np.testing.assert_array_equal(again.z, found.z)
    table = found.table()
    best = table[(table.role == "k") & (table["rank"] == 1) & ~table.writer.str.startswith("mlp")]
    assert {(one.reader, one.writer) for one in best.itertuples()} >= {
        (reader, next(name for name, _ in found.into(reader, "k") if not name.startswith("mlp")))
        for reader in ("1.0", "2.2")
    }
    reader, writer, role, score = found.strongest(1)[0]
    assert (
        dict(found.into(reader, role))[writer]
        == score
        == np.nanmax(
            found.scores[[i for i, name in enumerate(found.readers) if "mlp" not in name]][
                :, [j for j, name in enumerate(found.writers) if "mlp" not in name]
            ]
        )
    )
    assert "0.177 expected of parts turned at random" in repr(found)
    for options in ({}, {"role": "v"}, {"reader": "2.0"}, {"reader": "mlp 1", "role": "in"}):
        assert found.plot(**options).axes  # type: ignore[arg-type]


def test_a_model_that_norms_its_stream_itself_is_refused() -> None:
    model, _, inputs = build("bert")
    with pytest.raises(AnalyzerError, match=r"normalises its residual stream itself \(post-norm\).*Expected .*pre-norm"):
        Composition(model).run(inputs)


def test_what_is_wrong_is_said() -> None:
    model = llama()
    with pytest.raises(AnalyzerError, match=r"into=7: expected layers of 0 to 2, as into=\[1, 2\], or None"):
        Composition(model).run(IDS, into=7)
    with pytest.raises(AnalyzerError, match="has no head or memory that writes before layers"):
        Composition(model).run(IDS, into=0, memories=False)
    with pytest.raises(AnalyzerError, match="is text, and there is no tokenizer"):
        Composition(model).run("a text")
    found = Composition(model).run(IDS)
    with pytest.raises(AnalyzerError, match=r"'2.0' does not read by 'in' here. Expected by 'k', 'q', 'v'"):
        found.into("2.0", "in")
    with pytest.raises(AnalyzerError, match=r"'9.9' does not read by 'k' here. Expected one of '0.0'"):
        found.into("9.9", "k")
    with pytest.raises(AnalyzerError, match=r"'2.3' writes nothing that '1.0' reads"):
        found.rank("2.3", "1.0", "k")
    with pytest.raises(AnalyzerError, match="has no residual stream"):
        Composition(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()).run({"input": torch.randn(2, 4)})


def test_a_map_of_what_no_head_wrote_says_what_can_be_drawn() -> None:
    found = Composition(llama()).run(IDS)
    with pytest.raises(AnalyzerError, match=r"role='x' has no reader of heads. Expected one of 'q', 'k', 'v', 'in'"):
        found.plot(role="x")
    heads = [n for n, name in enumerate(found.writers) if not name.startswith("mlp")]
    found.scores[:, heads] = np.nan
    with pytest.raises(AnalyzerError, match=r"role='in' has no reader of heads. Expected plot\(reader='mlp 2', role='in'\)"):
        found.plot(role="in")
    assert found.plot(reader="mlp 2", role="in").axes


class Mixed(nn.Module):
    """Two attentions, of which the first has values that its weights do not explain."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.norms, self.gate = nn.ModuleList(nn.LayerNorm(16) for _ in range(2)), nn.Linear(16, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (one(y).unflatten(-1, (2, 8)).transpose(1, 2) for one in (self.q, self.k, self.v))
        z = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.o(z * self.gate(y).sigmoid())
        y = self.norms[1](x)
        return x + self.second(y, y, y, need_weights=False)[0]


def test_what_its_weights_do_not_explain_is_left_out_with_the_reason() -> None:
    run = fmr.run(Mixed().eval(), torch.randn(2, 5, 16))
    circuits = Circuits(fmr.locate(run), run)
    parts: list[Part] = [part for parts in circuits.heads() for part in parts]
    assert len(parts) == 2
    assert len(circuits.refused) == 1
    assert "no weights of single heads" in next(iter(circuits.refused.values()))


def test_layers_that_lay_tokens_of_all_examples_in_rows_are_read_too() -> None:
    torch.manual_seed(0)
    config = OPTConfig(**{**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32})
    found = Composition(_moved(AutoModelForCausalLM.from_config(config))).run(IDS)
    assert found.refused == {}
    assert found.scores.shape == (3 * 13, 14)
