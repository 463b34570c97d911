"""Autoencoders: how they choose, what they splice, and what they read of files, ours and SAELens'."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fmr
from analyzers import AnalyzerError, SparseAutoencoder
from analyzers.dictionaries.autoencoder import BANDWIDTH
from analyzers.dictionaries.axes import spliced
from fmr import edits
from tests.models import build

WIDTH, SIZE = 6, 10


def made(kind: str = "relu", **settings: Any) -> SparseAutoencoder:
    one = SparseAutoencoder(WIDTH, SIZE, kind, 3 if kind == "top-k" else None, seed=3, **settings)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=draw) * 0.3)
    return one


def values(rows: int = 20) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2))


# ---- how they choose


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("kind", ["relu", "top-k", "jumprelu"])
def test_latents_are_what_the_formula_says(kind: str, centered: bool) -> None:
    one, rows = made(kind, centered=centered), values()
    scores = (rows - one.bias * centered) @ one.encoder + one.encoder_bias
    if kind == "top-k":
        least = scores.sort(1, descending=True).values[:, 2:3]
        expected = torch.where(scores >= least, scores.relu(), 0.0)
    else:
        expected = torch.where(scores > (0.0 if one.threshold is None else one.threshold), scores.relu(), 0.0)
    assert torch.allclose(one.encode(rows), expected)
    assert torch.allclose(one(rows), expected @ one.decoder + one.bias)
    assert torch.equal(one.count(scores), (expected > 0).sum(1).float())
    assert one(rows.half()).dtype == torch.float16


def test_thresholds_move_by_the_scores_beside_them() -> None:
    one, rows = made("jumprelu"), values(200)
    assert one.threshold is not None
    scores = one.scores(rows).detach()
    one.count(scores).sum().backward()
    near = ((scores - one.threshold).abs() < BANDWIDTH / 2).float().sum(0) / BANDWIDTH
    assert one.threshold.grad is not None
    assert torch.allclose(one.threshold.grad, -near)
    one.threshold.grad = None
    one.chosen(scores).sum().backward()
    assert torch.allclose(one.threshold.grad, -near * one.threshold)


def test_the_start_is_a_matter_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, other, third = (SparseAutoencoder(WIDTH, SIZE, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.decoder, other.decoder)
    assert not torch.equal(one.decoder, third.decoder)
    assert torch.equal(one.encoder, one.decoder.T)
    assert torch.allclose(one.decoder.norm(dim=1), torch.ones(SIZE))


# ---- in a model


def test_a_splice_and_a_subspace_are_edits() -> None:
    model, args, kwargs = build("gpt2_eager")
    run = fmr.run(model, *args, **kwargs)
    site = fmr.locate(run).layers[0].resid_post
    one = SparseAutoencoder(run[site].shape[-1], 40, "top-k", 4).requires_grad_(False)
    changed = fmr.run(model, *args, edits={site: one.splice}, **kwargs)
    assert torch.equal(changed[site], one(run[site]))
    assert torch.equal(
        fmr.run(model, *args, edits={site: edits.Scale(1.0, within=one.subspace())}, **kwargs)[site], run[site]
    )
    latents = one.encode(run[site])
    latent = int(latents.flatten(0, -2).sum(0).argmax())
    without = fmr.run(model, *args, edits={site: edits.Zero(within=one.subspace()[latent])}, **kwargs)[site]
    assert torch.allclose(without, run[site] - latents[..., latent, None] * one.direction(latent), atol=1e-5)
    steered = fmr.run(model, *args, edits={site: one.steering(latent, 2.0)}, **kwargs)[site]
    assert torch.allclose(steered, run[site] + 2 * one.direction(latent))


def test_heads_of_a_value_are_one_vector() -> None:
    value = torch.randn(2, 4, 3, 8)
    axes = ("examples", "heads", "positions", "units")
    seen: list[Tensor] = []

    def add(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows + torch.arange(32.0)

    found = spliced(add, value, axes)
    assert seen[0].shape == (2, 3, 32)
    assert torch.equal(seen[0], value.movedim(1, 2).flatten(2))
    assert torch.allclose(found, value + torch.arange(32.0).view(4, 1, 8))


# ---- files


@pytest.mark.parametrize("kind", ["relu", "top-k", "jumprelu"])
def test_a_folder_gives_back_the_same_bits(kind: str, tmp_path: Path) -> None:
    one = made(kind, centered=False)
    one.save(tmp_path / "one")
    again = SparseAutoencoder.load(tmp_path / "one")
    assert repr(again) == repr(one)
    assert torch.equal(again(values()), one(values()))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["autoencoder.json", "autoencoder.safetensors"]


def saelens(folder: Path, one: SparseAutoencoder, **settings: Any) -> Path:
    """What SAELens would write of an autoencoder."""
    names = {"encoder": "W_enc", "encoder_bias": "b_enc", "decoder": "W_dec", "bias": "b_dec", "threshold": "threshold"}
    save_file({names[name]: value.detach().contiguous() for name, value in one.named_parameters()},
              folder / "sae_weights.safetensors")  # fmt: skip
    kinds = {"relu": "standard", "top-k": "topk", "jumprelu": "jumprelu"}
    told = {"architecture": kinds[one.kind], "d_in": WIDTH, "d_sae": SIZE, "apply_b_dec_to_input": one.centered,
            "normalize_activations": "none", "dtype": "float32"}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({**told, **({"k": one.k} if one.k else {}), **settings}))
    return folder


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("kind", ["relu", "top-k", "jumprelu"])
def test_what_saelens_wrote_is_read(kind: str, centered: bool, tmp_path: Path) -> None:
    one = made(kind, centered=centered)
    again = SparseAutoencoder.from_saelens(saelens(tmp_path, one))
    assert repr(again) == repr(one)
    assert torch.equal(again(values()), one(values()))
    of_z = SparseAutoencoder.from_saelens(saelens(tmp_path, one, reshape_activations="hook_z", hook_z=True))
    assert torch.equal(of_z(values()), one(values()))


def test_older_settings_and_choices_by_length_are_read(tmp_path: Path) -> None:
    one = made("top-k")
    old = saelens(tmp_path, one, architecture="standard", activation_fn_str="topk", activation_fn_kwargs={"k": 3}, k=None)
    (old / "cfg.json").write_text(json.dumps({**json.loads((old / "cfg.json").read_text()), "k": 3}))
    assert torch.equal(SparseAutoencoder.from_saelens(old)(values()), one(values()))
    by_length = SparseAutoencoder.from_saelens(saelens(tmp_path, one, rescale_acts_by_decoder_norm=True))
    norms = one.decoder.norm(dim=1)
    chosen = one.chosen(one.scores(values()) * norms)
    assert torch.allclose(by_length(values()), (chosen / norms) @ one.decoder + one.bias, atol=1e-5)
    assert torch.allclose(by_length.decoder.norm(dim=1), torch.ones(SIZE))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "gated"}, "is of the architecture 'gated': expected 'standard', 'topk', 'jumprelu'."),
        ({"normalize_activations": "layer_norm"}, "says normalize_activations='layer_norm': expected 'none'"),
        ({"reshape_activations": "flat"}, "says reshape_activations='flat': expected 'none'"),
        ({"activation_fn": "tanh-relu"}, "says that latents of 'standard' go through 'tanh-relu': expected 'relu'"),
        ({"activation_fn_str": "tanh-relu"}, "says that latents of 'standard' go through 'tanh-relu': expected 'relu'"),
        ({"d_in": 99}, f"says d_in=99, and W_enc is {WIDTH} x {SIZE}: expected {WIDTH}."),
        ({"architecture": "topk"}, "does not say how many latents are chosen: expected k."),
    ],
)
def test_what_cannot_be_read_is_told(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AnalyzerError, match=re.escape(message)):
        SparseAutoencoder.from_saelens(saelens(tmp_path, made(), **settings))


def test_damaged_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(fmr.FmrError, match="Expected a folder that SAELens wrote"):
        SparseAutoencoder.from_saelens(tmp_path)
    with pytest.raises(fmr.FmrError, match=r"Expected a folder that SparseAutoencoder\.save wrote"):
        SparseAutoencoder.load(tmp_path)
    saelens(tmp_path, made())
    (tmp_path / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(AnalyzerError, match="is no file of tensors"):
        SparseAutoencoder.from_saelens(tmp_path)
    save_file({"W_enc": torch.zeros(WIDTH, SIZE)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(AnalyzerError, match="has no 'b_enc': it holds W_enc"):
        SparseAutoencoder.from_saelens(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(AnalyzerError, match=r"cfg\.json is no JSON"):
        SparseAutoencoder.from_saelens(tmp_path)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: SparseAutoencoder(0, 4), "width=0: expected a whole number from 1 on."),
        (lambda: SparseAutoencoder(4, 4, "gated"), "kind='gated': expected 'relu', 'top-k' or 'jumprelu'."),
        (
            lambda: made().encode(torch.ones(3, WIDTH + 1)),
            "An autoencoder of 6 numbers was given torch.float32 of shape (3, 7)",
        ),
        (lambda: made().encode(torch.ones(3, WIDTH).long()), "was given torch.int64 of shape (3, 6)"),
        (lambda: made().direction(SIZE), "latent=10: expected a number from 0 to 9."),
        (
            lambda: made().steering(0, "much"),
            "strength='much': expected a finite number, in the units of the latent's coefficient.",
        ),
        (lambda: made().steering(0, float("nan")), "strength=nan: expected a finite number"),
        (lambda: made().encode(np.ones((3, WIDTH))), "The values are ndarray, expected a tensor (..., 6), as run[site]."),
        (lambda: made().decode(torch.ones(3, 4)), "The latents are of shape (3, 4): expected a tensor with 10 in the last"),
        (lambda: SparseAutoencoder.of(made().settings, {"bias": torch.zeros(2)}), "The tensors {'bias': (2,)} do not fit"),
    ],
)
def test_a_mistake_is_told(mistake: Any, message: str) -> None:
    with pytest.raises(AnalyzerError, match=re.escape(message)):
        mistake()
