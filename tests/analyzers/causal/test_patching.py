"""Patching of activations, by gradients and of paths: equal to runs made by hand, exact where a model is linear."""

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import (
    ActivationPatching,
    AnalyzerError,
    AttributionPatching,
    CausalTracing,
    CircuitSearch,
    Effects,
    PathPatching,
    RankOneEdit,
)
from fmr import edits
from fmr.sweeps import log_prob, logit_diff
from fmr.zoo import world
from tests.models import build

matplotlib.use("Agg")

GIFTS = [gift for gift in world.ioi(40, seed=0) if len(gift.prompt.split()) == 14][:4]
CLEAN, CORRUPTED = [gift.prompt for gift in GIFTS], [gift.fresh for gift in GIFTS]
METRIC = logit_diff([gift.answer for gift in GIFTS], [gift.giver for gift in GIFTS])


@pytest.fixture(scope="module")
def patched(loaded: tuple[nn.Module, Any]) -> Effects:
    return ActivationPatching(*loaded).run(CLEAN, CORRUPTED, METRIC, progress=False)


def inputs(loaded: tuple[nn.Module, Any], texts: list[str]) -> dict[str, Tensor]:
    return dict(loaded[1](texts, return_tensors="pt"))


def measured(loaded: tuple[nn.Module, Any], run: fmr.Run) -> Tensor:
    tokens = [[loaded[1](text, add_special_tokens=False)["input_ids"][0] for text in texts] for texts in (
        [gift.answer for gift in GIFTS], [gift.giver for gift in GIFTS])]  # fmt: skip
    return logit_diff(*map(torch.tensor, tokens))(run.output).detach().double()


# ---- activations


def test_an_effect_is_that_of_a_run_with_the_edit(loaded: tuple[nn.Module, Any], patched: Effects) -> None:
    model, clean, corrupted = loaded[0], inputs(loaded, CLEAN), inputs(loaded, CORRUPTED)
    source = fmr.run(model, **clean)
    structure = fmr.locate(source)
    before, after = measured(loaded, fmr.run(model, **corrupted)), measured(loaded, source)
    sites = {
        "resid_pre 2.10": structure.layers[2].resid_pre.at(positions=10),
        "attention 1.12": structure.layers[1].attention.out.at(positions=12),
        "mlp 0.4": structure.layers[0].mlp.out.at(positions=4),
        "z 2.1": structure.layers[2].attention.z.at(heads=1),
    }
    for name, site in sites.items():
        run = fmr.run(model, **corrupted, edits={site: edits.Interchange(source)})
        expected = float((measured(loaded, run) - before).mean() / (after - before).mean())
        assert patched.effects[patched.names.index(name)] == pytest.approx(expected, abs=1e-5)


def test_nothing_is_gained_where_nothing_differs_and_all_of_it_by_the_whole_stream(loaded: tuple[nn.Module, Any]) -> None:
    structure = fmr.locate(fmr.run(loaded[0], **inputs(loaded, CLEAN)))
    start = structure.layers[0].resid_pre
    found = ActivationPatching(*loaded).run(
        CLEAN, CORRUPTED, METRIC, [start, start.at(positions=3), start.at(positions=7)], progress=False
    )
    np.testing.assert_allclose(found.effects, [1, 0, 0], atol=1e-5)  # the words at 3 and 7 are the same


def test_the_strongest_sites_are_no_better_than_none_with_values_of_another_pair(patched: Effects) -> None:
    assert patched.effects[patched.names.index(patched.strongest(1)[0])] > 0.5
    with pytest.raises(AnalyzerError, match=r"kind='heads' was not patched. Expected one of resid_pre, attention, mlp, z."):
        patched.strongest(3, "heads")
    assert max(patched.control.values()) < 0.2


def test_the_control_is_a_run_with_values_of_the_pair_before(loaded: tuple[nn.Module, Any], patched: Effects) -> None:
    model, corrupted = loaded[0], inputs(loaded, CORRUPTED)
    site = fmr.locate(fmr.run(model, **corrupted)).layers[0].resid_pre
    found = ActivationPatching(*loaded).run(CLEAN, CORRUPTED, METRIC, [site.at(positions=p) for p in (2, 5)], progress=False)
    strongest = site.at(positions=(2, 5)[int(found.changes.mean(1).abs().argmax())])
    source = fmr.run(model, **inputs(loaded, [*CLEAN[-1:], *CLEAN[:-1]]))
    run = fmr.run(model, **corrupted, edits={strongest: edits.Interchange(source)})
    moved = (measured(loaded, run) - found.base).mean() / (found.source - found.base).mean()
    assert found.control["sites"] == pytest.approx(float(moved), abs=1e-5)


def test_noising_is_denoising_the_other_way_round(loaded: tuple[nn.Module, Any], patched: Effects) -> None:
    found = ActivationPatching(*loaded, direction="noising").run(CORRUPTED, CLEAN, METRIC, progress=False)
    np.testing.assert_allclose(found.effects, patched.effects, atol=1e-6)


def test_padded_pairs_are_as_each_pair_alone(loaded: tuple[nn.Module, Any]) -> None:
    clean = ["Alice and Karen went , Karen gave a flower to", "When Alice and Karen went , Karen gave a flower to"]
    corrupted = [text.replace("Alice", "Nora").replace("Karen", "Victor") for text in clean]
    metric, z = logit_diff(" Alice", " Karen"), fmr.locate(fmr.run(loaded[0], **inputs(loaded, CLEAN))).layers[2].attention.z
    sites = [z.at(heads=1), z.at(positions=3), z.at(positions=-1)]
    patching = ActivationPatching(*loaded)
    together = patching.run(clean, corrupted, metric, sites, progress=False)
    for place in range(2):
        alone = patching.run(clean[place], corrupted[place], metric, sites, progress=False)
        torch.testing.assert_close(alone.changes[:, 0], together.changes[:, place], atol=1e-4, rtol=1e-4)


# ---- gradients


class Linear(nn.Module):
    """A stream without anything that bends: two layers that add a projection of it, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.a(x)
        return self.out(x + self.b(x))


@pytest.mark.parametrize("steps", [1, 3])
def test_attribution_is_exact_where_the_model_is_linear(steps: int) -> None:
    model, clean, corrupted = Linear().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 7], [4, 9, 6]])
    sites, metric = ["a/linear#0", fmr.Site("b/linear#0", positions=2), fmr.Site("/add#0", units=[0, 3])], logit_diff(3, 7)
    exact = ActivationPatching(model).run(clean, corrupted, metric, sites, progress=False)
    found = AttributionPatching(model).run(clean, corrupted, metric, sites, steps=steps, exact=exact)
    torch.testing.assert_close(found.changes, exact.changes, atol=1e-5, rtol=1e-5)
    assert found.correlation == pytest.approx(1)


def test_attribution_comes_near_to_patching_and_leaves_no_gradient(loaded: tuple[nn.Module, Any], patched: Effects) -> None:
    found = AttributionPatching(*loaded).run(CLEAN, CORRUPTED, METRIC, exact=patched)
    assert found.correlation > 0.95
    assert found.forwards == 2
    assert all(parameter.grad is None for parameter in loaded[0].parameters())


@torch.no_grad()
def test_gradients_are_taken_whatever_is_switched_off_around_them(loaded: tuple[nn.Module, Any]) -> None:
    heads = [block.z for block in fmr.locate(fmr.run(loaded[0], **inputs(loaded, CLEAN))).attention]
    assert AttributionPatching(*loaded).run(CLEAN, CORRUPTED, METRIC, heads).changes.abs().max() > 0.1
    assert CircuitSearch(*loaded).run(CLEAN, CORRUPTED, METRIC, "eap", sizes=[0.1], random=0, progress=False).kept.any()


def test_attribution_needs_no_parameter_that_asks_for_gradients(loaded: tuple[nn.Module, Any]) -> None:
    attribution = AttributionPatching(*loaded)
    before = attribution.run(CLEAN, CORRUPTED, METRIC)
    try:
        loaded[0].requires_grad_(False)
        np.testing.assert_allclose(attribution.run(CLEAN, CORRUPTED, METRIC).effects, before.effects, atol=1e-6)
    finally:
        loaded[0].requires_grad_(True)


# ---- paths


@pytest.mark.parametrize("through", [True, False])
def test_a_path_to_the_logits_is_a_run_in_which_all_later_heads_are_held(
    loaded: tuple[nn.Module, Any], through: bool
) -> None:
    model, clean = loaded[0], inputs(loaded, CLEAN)
    held, source = fmr.run(model, **clean), fmr.run(model, **inputs(loaded, CORRUPTED))
    structure = fmr.locate(held)
    found = PathPatching(*loaded, through_mlps=through).run(CLEAN, CORRUPTED, METRIC, progress=False)
    for layer, head in ((0, 2), (2, 1), (3, 3)):
        sender = structure.layers[layer].attention.z
        asked = {sender.at(heads=head): edits.Interchange(source)}
        later = [one.attention.z for one in structure.layers[layer + 1 :]]
        later += [] if through else [one.mlp.out for one in structure.layers[layer:]]
        run = fmr.run(model, **clean, edits=asked | dict.fromkeys(later, edits.Interchange(held)))
        expected = measured(loaded, run) - measured(loaded, held)
        torch.testing.assert_close(found.changes[found.names.index(f"z {layer}.{head}")], expected, atol=1e-4, rtol=1e-4)


def test_what_a_receiver_hears_of_a_sender_is_made_in_one_run_and_put_into_another(loaded: tuple[nn.Module, Any]) -> None:
    model, clean = loaded[0], inputs(loaded, CLEAN)
    held, source = fmr.run(model, **clean), fmr.run(model, **inputs(loaded, CORRUPTED))
    structure = fmr.locate(held)
    sender, receiver = structure.layers[1].attention.z.at(heads=3), structure.layers[3].attention.v.at(heads=1)
    found = PathPatching(*loaded).run(CLEAN, CORRUPTED, METRIC, [sender], [receiver], progress=False)
    first = {sender: edits.Interchange(source), structure.layers[2].attention.z: edits.Interchange(held)}
    heard = fmr.run(model, **clean, edits=first, keep=[receiver])[receiver]
    run = fmr.run(model, **clean, edits={receiver: edits.Replace(heard)})
    torch.testing.assert_close(found.changes[0], measured(loaded, run) - measured(loaded, held), atol=1e-4, rtol=1e-4)


def test_a_receiver_hears_nothing_of_a_sender_that_comes_later(loaded: tuple[nn.Module, Any]) -> None:
    structure = fmr.locate(fmr.run(loaded[0], **inputs(loaded, CLEAN)))
    sender, receiver = structure.layers[3].attention.z, structure.layers[1].attention.q
    found = PathPatching(*loaded).run(CLEAN, CORRUPTED, METRIC, [sender], [receiver], progress=False)
    assert found.effects == pytest.approx([0], abs=1e-6)


# ---- results


def test_a_result_prints_tables_draws_and_is_frozen(patched: Effects) -> None:
    table, figure = patched.table(), patched.plot()
    assert list(table.columns) == ["kind", "layer", "place", "effect", "low", "high", "change", "site"]
    assert (table["low"] <= table["effect"] + 1e-9).all()
    assert (table["high"] >= table["effect"] - 1e-9).all()
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        "stream before the layer", "attention output", "memory output", "z of single heads",
    ]  # fmt: skip
    assert repr(patched).startswith("Activation patching (denoising): 196 sites over 4 pairs")
    narrow = patched.plot(kind="z")
    assert narrow.axes[0].get_xlabel() == "head"
    narrow.draw_without_rendering()
    (title,) = narrow.texts
    assert title.get_text().replace("\n", " ") == "Activation patching (denoising), 4 pairs"
    assert narrow.bbox.x0 <= title.get_window_extent().x0 < title.get_window_extent().x1 <= narrow.bbox.x1
    with pytest.raises(FrozenInstanceError):
        patched.seed = 1  # type: ignore[misc]


def test_a_result_comes_back_from_its_file(patched: Effects, tmp_path: Path) -> None:
    patched.save(tmp_path / "effects.safetensors")
    again = Effects.load(tmp_path / "effects.safetensors")
    assert repr(again) == repr(patched)
    assert again.table().equals(patched.table())
    assert again.changes.equal(patched.changes)
    with pytest.raises(AnalyzerError, match=r"holds a Effects, expected a HeadClusters"):
        type("HeadClusters", (Effects,), {}).load(tmp_path / "effects.safetensors")
    (tmp_path / "other").write_bytes(b"no result")
    with pytest.raises(AnalyzerError, match=r"other holds no result of fmr \(.*\). Expected what .save\(path\) wrote."):
        Effects.load(tmp_path / "other")


def test_a_run_again_gives_the_same_numbers(loaded: tuple[nn.Module, Any], patched: Effects) -> None:
    again = ActivationPatching(*loaded).run(CLEAN, CORRUPTED, METRIC, progress=False)
    np.testing.assert_array_equal(again.low, patched.low)
    np.testing.assert_array_equal(again.effects, patched.effects)


# ---- models of one's own


def test_a_tensor_is_the_first_argument_of_a_model_that_has_no_input_ids() -> None:
    model, sites = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).eval(), ["0", "1"]
    clean, corrupted = torch.eye(4)[:3], torch.ones(3, 4)

    def metric(output: Tensor) -> Tensor:
        return output[:, 0]

    found = ActivationPatching(model).run(clean, corrupted, metric, sites, progress=False)
    named = ActivationPatching(model).run({"input": clean}, {"input": corrupted}, metric, sites, progress=False)
    assert found.effects == pytest.approx([1, 1], abs=1e-5)
    assert found.changes.equal(named.changes)
    with pytest.raises(AnalyzerError, match=r"The prompts have x, and the forward of Sequential takes input."):
        ActivationPatching(model).run({"x": clean}, {"x": corrupted}, metric, sites)


def test_one_pair_may_be_measured_by_one_number(loaded: tuple[nn.Module, Any]) -> None:
    z = fmr.locate(fmr.run(loaded[0], **inputs(loaded, CLEAN))).layers[2].attention.z
    sites = [z.at(heads=head) for head in range(3)]

    def metric(output: Any) -> Tensor:
        return output.logits[0, -1, 3]

    for several in (sites, sites[:1]):
        one = ActivationPatching(*loaded).run(CLEAN[0], CORRUPTED[0], metric, several, progress=False)
        pair = ActivationPatching(*loaded).run(CLEAN[0], CORRUPTED[0], lambda o: metric(o)[None], several, progress=False)
        assert one.changes.equal(pair.changes)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_metric_reads_the_tokens_of_each_pair_whatever_pads_them(loaded: tuple[nn.Module, Any], side: str) -> None:
    tokenizer = loaded[1]
    clean = ["Alice and Karen went , Karen gave a flower to", "When Alice and Karen went , Karen gave a flower to"]
    corrupted = [text.replace("Alice", "Nora").replace("Karen", "Victor") for text in clean]
    both = [dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)) for texts in (clean, corrupted)]
    for given in both:
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    sites, metric = [fmr.Site("transformer.h.1", positions=-1)], logit_diff(3, 7, at=9)
    for method in (ActivationPatching, AttributionPatching):
        together = method(*loaded).run(*both, metric, sites)
        for place in range(2):
            alone = method(*loaded).run(clean[place], corrupted[place], metric, sites)
            for one, other in ((alone.base, together.base), (alone.source, together.source)):
                torch.testing.assert_close(one[0], other[place], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone.changes[:, 0], together.changes[:, place], atol=1e-4, rtol=1e-4)


def test_a_kind_that_nothing_was_located_of_is_said(patched: Effects) -> None:
    kept = [n for n, (kind, layer) in enumerate(zip(patched.kinds, patched.layers, strict=True))
            if kind in ("resid_pre", "attention") or (kind == "z" and layer > 1)]  # fmt: skip
    taken = {name: getattr(patched, name)[kept] for name in ("layers", "places", "effects", "low", "high")}
    words = {name: tuple(getattr(patched, name)[n] for n in kept) for name in ("kinds", "sites")}
    lines = repr(replace(patched, **taken, **words)).splitlines()
    assert lines[-2:] == [
        "  mlp: not patched, as fmr.locate found none in any layer",
        "  z: not patched, as fmr.locate found none in layers 0, 1",
    ]
    assert "not patched" not in repr(patched)


# ---- models without attention


class Mixing(nn.Module):
    """Positions are mixed by their running mean; what that writes is added to the stream, or takes its place."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual, self.embed, self.out = residual, nn.Embedding(11, 6), nn.Linear(6, 11)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            mean = layer(x).tanh().cumsum(1) / x.shape[1]
            x = x + mean if self.residual else mean
        return self.out(x)


@pytest.mark.parametrize("residual", [True, False])
def test_what_is_no_transformer_is_patched_by_its_stream_or_by_what_its_layers_hand_on(residual: bool) -> None:
    torch.manual_seed(0)
    model, (clean, corrupted) = Mixing(residual).eval(), torch.randint(11, (2, 3, 5))
    clean[:, 1:] = corrupted[:, 1:]
    found = ActivationPatching(model).run(clean, corrupted, lambda output: output[:, -1, 3], progress=False)
    start = "resid_pre" if residual else "layer"
    assert set(found.maps) == ({"resid_pre", "mixer"} if residual else {"layer"})
    assert found.maps[start].shape[1] == 5
    np.testing.assert_allclose(found.maps[start][0], [1, 0, 0, 0, 0], atol=1e-5)  # the first word is what differs
    assert abs(found.maps[start][-1, 0] - 1) > 0.1  # later ones have heard of it


def test_a_model_without_stream_or_stack_is_told_to_pass_sites() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gru, self.out = nn.Embedding(11, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 11)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.out(self.gru(self.embed(input_ids))[0])

    with pytest.raises(
        AnalyzerError,
        match=r"no layers in Recurrent, and no stream or stack of \(examples, positions, units\) with 5 pos.*Pass",
    ):
        ActivationPatching(Recurrent().eval()).run(*torch.randint(11, (2, 3, 5)), lambda output: output[:, -1, 3])


@pytest.mark.parametrize("decoded", [3, 9])
def test_a_decoder_has_positions_of_its_own(decoded: int) -> None:
    model, _, _ = build("t5")
    ids = torch.randint(3, 11, (2, 1, 7), generator=torch.Generator().manual_seed(0))
    patching = ActivationPatching(model)
    for length in (2, decoded):  # the same analyzer, on other lengths
        texts = [{"input_ids": row, "decoder_input_ids": torch.arange(length)[None]} for row in ids]
        found = patching.run(*texts, logit_diff(3, 7), progress=False)
    layers, states = fmr.locate(fmr.run(model, **texts[0])).layers, found.maps["resid_pre"]
    assert states.shape == (len(layers), max(7, decoded))
    assert (~np.isnan(states)).sum(1).tolist() == [7] * (len(layers) // 2) + [decoded] * (len(layers) // 2)


def test_a_picture_has_positions_that_its_tensor_does_not_count() -> None:
    model, _, _ = build("vit")  # 8 x 8 in patches of 4 x 4, and a token for the class
    pictures = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = ActivationPatching(model).run(*pictures, lambda output: output.logits[:, 0], progress=False)
    assert found.maps["resid_pre"].shape == (2, 5)


# ---- bad input


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "unequal": ((["a b"], ["a b c"], METRIC), r"Pair 0 has 3 clean tokens and 4 corrupted ones"),
    "how many": ((CLEAN, CORRUPTED[:2], METRIC), r"There are 4 clean prompts and 2 corrupted ones: expected pairs."),
    "the same": ((CLEAN, CLEAN, METRIC), r"so that nothing can go over. Expected prompts with other answers"),
    "no metric": ((CLEAN, CORRUPTED, 3), r"metric is int, expected a function of the model's output"),
    "no text": (([], [], METRIC), r"Prompts are list '\[\]': expected a text, a list of texts, token ids"),
    "no sites": ((CLEAN, CORRUPTED, METRIC, []), r"sites=\[\]: expected a list of sites"),
    "two tokens": ((CLEAN, CORRUPTED, log_prob("Alice Karen")), r"The answer 'Alice Karen' is 2 tokens"),
    "unknown": (
        (CLEAN, CORRUPTED, log_prob("Brigosst")),
        r"The answer 'Brigosst' is no token of this .* '<unk>'",
    ),
    "one for all": (
        (CLEAN, CORRUPTED, lambda output: output.logits[:, -1, 3].mean()),
        r"The metric returned one number for 4 pairs, expected one for each",
    ),
    "not called": (
        (CLEAN, CORRUPTED, fmr.sweeps.logit_diff),
        r"metric is logit_diff itself, .* as logit_diff\(right, wrong\)",
    ),
    "an edit": ((CLEAN, CORRUPTED, edits.Zero()), r"metric is Zero, expected a function of the model's output"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(loaded: tuple[nn.Module, Any], name: str) -> None:
    args, message = BAD[name]
    with pytest.raises(AnalyzerError, match=message):
        ActivationPatching(*loaded).run(*args, progress=False)


@pytest.mark.parametrize("method", [ActivationPatching, AttributionPatching, PathPatching, CircuitSearch])
def test_a_model_in_train_mode_is_refused(method: Any, loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    try:
        model.transformer.h[1].train()
        with pytest.raises(AnalyzerError, match=r"GPT2LMHeadModel.transformer.h.1 is in train mode.*call model.eval\(\)."):
            method(model, tokenizer).run(CLEAN, CORRUPTED, METRIC)
        for run in (CausalTracing(model, tokenizer).run, RankOneEdit(model, tokenizer).run):
            with pytest.raises(AnalyzerError, match=r"transformer.h.1 is in train mode"):
                run("Junel Dunoth grew up in", "Junel Dunoth", "Brigost")
    finally:
        model.eval()


def test_a_metric_without_a_gradient_is_refused_where_one_is_taken(loaded: tuple[nn.Module, Any]) -> None:
    with pytest.raises(AnalyzerError, match=r"The metric has no gradient. Expected one that is differentiable"):
        AttributionPatching(*loaded).run(CLEAN, CORRUPTED, lambda output: output.logits[:, -1].argmax(-1))


def test_text_needs_a_tokenizer_and_a_direction_is_one_of_two(loaded: tuple[nn.Module, Any]) -> None:
    with pytest.raises(AnalyzerError, match=r"is text, and there is no tokenizer. Pass one behind the model."):
        ActivationPatching(loaded[0]).run(CLEAN, CORRUPTED, METRIC)
    with pytest.raises(AnalyzerError, match=r"direction='up': expected 'denoising' or 'noising'."):
        PathPatching(*loaded, direction="up")  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match=r"steps=0: expected how many gradients to average, 1 or more."):
        AttributionPatching(*loaded).run(CLEAN, CORRUPTED, METRIC, steps=0)


def test_positions_of_pairs_of_several_lengths_do_not_correspond(loaded: tuple[nn.Module, Any]) -> None:
    clean = ["Alice and Karen went , Karen gave a flower to", "When Alice and Karen went , Karen gave a flower to"]
    with pytest.raises(AnalyzerError, match=r"The pairs have 11 to 12 tokens, so that positions do not correspond"):
        ActivationPatching(*loaded).run(clean, [text.replace("Alice", "Nora") for text in clean], logit_diff(3, 7))
