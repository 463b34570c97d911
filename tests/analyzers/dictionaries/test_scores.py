"""Dictionaries on a model: loss recovered between its ends, contexts and pages, steering; whatever the cut into batches."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import fmr
from analyzers import (
    AnalyzerError,
    Dictionary,
    DictionaryScored,
    DictionaryScores,
    DictionaryTraining,
    LatentContexts,
    LatentPages,
    LatentSteering,
    SparseAutoencoder,
)
from analyzers.dictionaries.dictionary import COMPONENTS, NULL, RANDOM
from fmr.zoo import world
from tests.analyzers.surgery.models import Looped, made

TOKENS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))

matplotlib.use("Agg")

Loaded = tuple[nn.Module, Any]
Told = tuple[nn.Module, Any, fmr.Site, Dictionary]


def texts(n: int = 40) -> list[str]:
    return [f"{fact.prompt} {fact.answer}" for fact in world.facts()[:: 2880 // n]][:n]


@pytest.fixture(scope="module")
def told(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A model, its tokenizer, a point of its stream, and a small dictionary there."""
    model, tokenizer = loaded
    site = fmr.locate(fmr.run(model, **tokenizer(texts(1), return_tensors="pt"))).layers[2].resid_post
    batches = [tokenizer(texts(600), return_tensors="pt", padding=True)]
    corpus = fmr.collect(model, batches, keep={"stream": site}, to=tmp_path_factory.mktemp("values"), progress=False)
    return model, tokenizer, site, DictionaryTraining(256, "top-k", 12, epochs=6).run(corpus, progress=False)


# ---- loss recovered


@pytest.fixture(scope="module")
def scored(told: Told) -> DictionaryScored:
    return DictionaryScores(*told_in_order(told)).over(texts(), progress=False).result()


def told_in_order(told: Told) -> tuple[Any, ...]:
    model, tokenizer, site, dictionary = told
    return model, tokenizer, dictionary, site


def test_a_dictionary_recovers_more_of_the_loss_than_its_controls(scored: DictionaryScored) -> None:
    assert list(scored.table().index) == ["dictionary", RANDOM, NULL, COMPONENTS]
    for ablated in ("zero", "mean"):
        share, low, high = scored.recovered(ablated=ablated)
        assert 0.95 < low <= share <= high < 1.05
        assert all(scored.recovered(name, ablated)[0] < share - 0.005 for name in (RANDOM, NULL, COMPONENTS))
    assert scored.explained["dictionary"] > max(scored.explained[name] for name in (RANDOM, NULL, COMPONENTS)) + 0.05
    assert scored.loss("clean") < scored.loss() < scored.loss("mean")


def test_loss_and_edits_are_what_a_loop_gives(told: Told) -> None:
    model, tokenizer, site, dictionary = told
    found = DictionaryScores(*told_in_order(told)).update(texts(3)).result()
    one = dictionary.autoencoder

    def loss(text: str, edit: Any) -> float:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits = fmr.run(model, ids, edits={site: edit} if edit else {}).output.logits[0, :-1].double()
        return float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))

    ways: dict[str, Any] = {
        "clean": None,
        "dictionary": lambda value, context: one(value),
        "zero": fmr.edits.Zero(),
        "mean": lambda value, context: dictionary.mean.float().expand_as(value),
    }
    for name, edit in ways.items():
        assert found.losses[name] == pytest.approx([loss(text, edit) for text in texts(3)], rel=1e-5), name
    assert found.targets.tolist() == [len(tokenizer(text)["input_ids"]) - 1 for text in texts(3)]
    rows = torch.cat([fmr.run(model, tokenizer(text, return_tensors="pt")["input_ids"])[site][0] for text in texts(3)])
    assert found.density == pytest.approx((one.encode(rows) > 0).double().mean(0).numpy())
    left = (rows - one(rows)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert found.explained["dictionary"] == pytest.approx(1 - float(left), abs=1e-5)


def test_the_cut_into_batches_and_shards_counts_for_nothing(told: Told, scored: DictionaryScored) -> None:
    one, other = (DictionaryScores(*told_in_order(told)).update(some) for some in (texts()[:15], texts()[15:]))
    merged = one.merge(other).result()
    assert merged.loss() == pytest.approx(scored.loss(), rel=1e-5)
    assert merged.explained == pytest.approx(scored.explained, abs=1e-6)
    assert merged.rows == scored.rows
    assert np.allclose(merged.density, scored.density)


def test_half_precision_is_scored(told: Told) -> None:
    model, tokenizer, site, dictionary = told
    half = copy.deepcopy(model).to(torch.bfloat16)
    one, other = (DictionaryScores(two, tokenizer, dictionary, site).update(texts(8)).result() for two in (model, half))
    assert other.recovered()[0] == pytest.approx(one.recovered()[0], abs=0.02)
    assert other.explained["dictionary"] == pytest.approx(one.explained["dictionary"], abs=0.02)
    pages = LatentContexts(half, tokenizer, dictionary, site, k=2).update(texts(8)).result()
    assert len(pages.contexts[0]) == 2
    steered = LatentSteering(half, tokenizer, dictionary, site).run(texts(1), 3, fmr.sweeps.log_prob(7), [1.0], draws=2)
    assert np.isfinite(steered.effect).all()


def test_an_autoencoder_alone_is_scored(told: Told) -> None:
    model, tokenizer, site, dictionary = told
    with pytest.raises(AnalyzerError, match="mean=None: expected the mean of values at the site, a tensor of 128 numbers"):
        DictionaryScores(model, tokenizer, dictionary.autoencoder, site)
    alone = DictionaryScores(model, tokenizer, dictionary.autoencoder, site, mean=dictionary.mean.float())
    found = alone.update(texts(3)).result()
    whole = DictionaryScores(*told_in_order(told), controls=False).update(texts(3)).result()
    assert list(found.l0) == ["dictionary", RANDOM]
    assert list(whole.l0) == ["dictionary"]
    assert found.loss() == whole.loss()


def test_scores_are_saved_shown_and_drawn(scored: DictionaryScored, tmp_path: Path) -> None:
    scored.save(tmp_path / "scored.safetensors")
    assert repr(DictionaryScored.load(tmp_path / "scored.safetensors")) == repr(scored)
    assert f"dictionary: {scored.explained['dictionary']:.3f} of the variance" in repr(scored)
    assert len(scored.plot().axes) == 2
    with pytest.raises(AnalyzerError, match="ablated='noise': expected 'zero' or 'mean'"):
        scored.recovered(ablated="noise")
    with pytest.raises(AnalyzerError, match=r"'pca' was not measured\. Expected one of 'clean', 'dictionary'"):
        scored.recovered("pca")


def test_first_tokens_are_left_out(told: Told) -> None:
    model, tokenizer, site, dictionary = told
    found = DictionaryScores(*told_in_order(told), controls=False, skip=2).update(texts(3)).result()
    one = dictionary.autoencoder

    def kept(value: torch.Tensor, context: Any) -> torch.Tensor:
        return torch.cat([value[:, :2], one(value[:, 2:])], 1)

    for n, text in enumerate(texts(3)):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits = fmr.run(model, ids, edits={site: kept}).output.logits[0, 2:-1].double()
        assert found.losses["dictionary"][n] == pytest.approx(
            float(nn.functional.cross_entropy(logits, ids[0, 3:], reduction="sum")), rel=1e-5
        )
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts(3)]
    assert found.targets.tolist() == [length - 3 for length in lengths]
    assert found.rows == sum(lengths) - 6
    assert "tokens without the first 2 tokens of each; loss" in repr(found)
    pages = LatentContexts(*told_in_order(told), k=2, skip=2).update(texts(3)).result()
    assert pages.rows == found.rows
    assert all(place >= 2 for some in pages.contexts for _, place, _ in some)
    trained = replace(dictionary, training={**dictionary.training, "skip": 2})
    assert (
        DictionaryScores(model, tokenizer, trained, site).skip == LatentContexts(model, tokenizer, trained, site).skip == 2
    )
    for kind in (DictionaryScores, LatentContexts):
        with pytest.raises(
            AnalyzerError, match=r"Nothing has been counted yet.*The first 90 tokens of each text are left out"
        ):
            kind(*told_in_order(told), skip=90).update(texts(3)).result()  # type: ignore[attr-defined]


def test_a_text_of_one_token_has_values_and_no_loss(told: Told) -> None:
    rows = [torch.tensor([[1]]), torch.tensor([[1, 150, 80]])]
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    padded = {"input_ids": torch.cat([torch.tensor([[1, 0, 0]]), rows[1]]), "attention_mask": mask}
    one = DictionaryScores(*told_in_order(told), controls=False).over(rows, progress=False).result()
    whole = DictionaryScores(*told_in_order(told), controls=False).update(padded).result()
    assert one.rows == whole.rows == 4
    assert one.targets.tolist() == whole.targets.tolist() == [0, 2]
    assert one.losses["dictionary"] == pytest.approx(whole.losses["dictionary"], rel=1e-4)
    with pytest.raises(AnalyzerError, match="Nothing has been counted yet"):
        DictionaryScores(*told_in_order(told), controls=False).update(rows[0]).result()


def test_a_dictionary_is_refused_at_another_place_than_its_own(told: Told) -> None:
    model, tokenizer, site, dictionary = told
    assert dictionary.place == "Site('transformer.h.2/add#1')"
    for kind in (DictionaryScores, LatentContexts):
        assert kind(model, tokenizer, dictionary, "transformer.h.2").update(texts(1)).counted  # the same by another name
        with pytest.raises(
            AnalyzerError, match=r"was trained at Site\('transformer.h.2/add#1'\), and site=Site\('transformer.h.1"
        ):
            kind(model, tokenizer, dictionary, "transformer.h.1").update(texts(1))
        with pytest.raises(AnalyzerError, match=r"selects positions, expected all of them; skip= leaves the first ones out"):
            kind(model, tokenizer, dictionary, site.at(positions=-1))
    for none in ("transformer.h.9", "layers[2].resid_post"):
        with pytest.raises(fmr.errors.IdError, match=r"No pass reached|matched no value of the run"):
            DictionaryScores(model, tokenizer, dictionary, none).update(texts(1))
    with pytest.raises(AnalyzerError, match=r"to put it there all the same, give dictionary.autoencoder"):
        LatentSteering(model, tokenizer, dictionary, "transformer.h.1").run(texts(1), 3, fmr.sweeps.log_prob(7))
    assert LatentContexts(model, tokenizer, dictionary.autoencoder, "transformer.h.1").update(texts(1)).counted
    assert LatentContexts(model, tokenizer, replace(dictionary, place=""), "transformer.h.1").update(texts(1)).counted
    steered = LatentSteering(model, tokenizer, dictionary, site.at(positions=-1))
    assert np.isfinite(steered.run(texts(1), 3, fmr.sweeps.log_prob(7), [1.0], draws=2).effect).all()


# ---- pages


@pytest.fixture(scope="module")
def contexts(told: Told) -> LatentContexts:
    return LatentContexts(*told_in_order(told), k=4).over(texts(80), progress=False)


def test_contexts_are_the_largest_of_all(told: Told, contexts: LatentContexts) -> None:
    model, tokenizer, site, dictionary = told
    pages = contexts.result([3, 5])
    every: dict[tuple[int, ...], float] = {}
    for text in texts(80):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        latents = dictionary.autoencoder.encode(fmr.run(model, ids)[site][0])[:, 3]
        every |= {tuple(ids[0, : n + 1].tolist()): float(one) for n, one in enumerate(latents)}
    largest = sorted(every.values(), reverse=True)[:4]
    found = [values[place] for _, place, values in pages.contexts[0]]
    assert found == pytest.approx([one for one in largest if one > 0], rel=1e-4)
    for tokens, place, values in pages.contexts[0]:
        assert len(tokens) == len(values)
        assert every[tuple(tokenizer.convert_tokens_to_ids(list(tokens[: place + 1])))] == pytest.approx(
            values[place], rel=1e-4
        )


def test_contexts_do_not_depend_on_shards_and_order(told: Told, contexts: LatentContexts) -> None:
    one, other = (
        LatentContexts(*told_in_order(told), k=4).over(some, progress=False) for some in (texts(80)[50:], texts(80)[:50])
    )
    one.merge(other)
    a, b = one.result([3, 5]), contexts.result([3, 5])
    assert [[(tokens, place) for tokens, place, _ in some] for some in a.contexts] == [
        [(tokens, place) for tokens, place, _ in some] for some in b.contexts
    ]
    assert a.density == b.density


def test_a_page_says_what_a_latent_is(told: Told, contexts: LatentContexts) -> None:
    *_, dictionary = told
    most = contexts.result()
    assert len(most.latents) == 8
    assert most.role == "layers[2].resid_post"
    n, latent = 0, most.latents[0]
    assert list(most.writers[n])[:3] == ["embedding", "attention 0", "mlp 0"]
    reader = dictionary.autoencoder.encoder[:, latent]
    assert sum(own for own, _ in most.writers[n].values()) == pytest.approx(1, abs=1e-3)
    assert most.speaks[n][0][1] >= most.speaks[n][-1][1] > 0 > most.against[n][0][1]
    cosines = dictionary.autoencoder.decoder @ dictionary.direction(latent)
    cosines[latent] = -2
    assert most.near[n][0] == (int(cosines.argmax()), pytest.approx(float(cosines.max()), abs=1e-5))
    assert 0.2 < most.chance < 0.5
    assert most.density[n] == pytest.approx(float(contexts.tally.density[latent]))
    assert reader.shape == (128,)


def test_pages_are_saved_written_and_drawn(contexts: LatentContexts, tmp_path: Path) -> None:
    pages = contexts.result([3, 5], words=2)
    pages.save(tmp_path / "pages.safetensors")
    assert repr(LatentPages.load(tmp_path / "pages.safetensors")) == repr(pages)
    pages.save_html(tmp_path / "pages.html")
    text = (tmp_path / "pages.html").read_text()
    assert text.startswith("<!doctype html>")
    assert not re.search(r'(?:src|href)="', text)
    assert "latent 3: fires on" in text
    assert pages.contexts[0][0][0][0].replace("<", "&lt;").replace(">", "&gt;") in text
    assert pages._repr_html_() in text
    assert len(pages.table()) == sum(map(len, pages.contexts))
    assert pages.plot().axes[0].get_yticklabels()[0].get_text().startswith("latent 3, ")
    with pytest.raises(AnalyzerError, match=r"There is no page of latent 4\. Expected one of 3, 5\."):
        pages.text(4)


def test_a_site_that_is_no_point_of_the_stream_has_no_writers(told: Told) -> None:
    model, tokenizer, _, _ = told
    site = fmr.locate(fmr.run(model, **tokenizer(texts(1), return_tensors="pt"))).mlps[1].post
    pages = LatentContexts(model, tokenizer, SparseAutoencoder(512, 20), site, k=2).update(texts(4)).result([1])
    assert pages.writers == ({},)
    assert pages.unread == "its values are no vectors of the residual stream"
    assert pages.role == "mlps[1].post"
    assert pages.plot().axes[0].get_xlabel() == "share of tokens"


# ---- steering


def test_steering_is_the_edit_by_hand(told: Told) -> None:
    model, tokenizer, site, dictionary = told
    steering, metric = LatentSteering(model, tokenizer, dictionary, site.at(positions=-1)), fmr.sweeps.log_prob(7)
    found = steering.run([f"{fact.prompt}" for fact in world.facts()[:3]], 5, metric, [2.0, -1.0], draws=6, progress=False)
    by_hand = []
    for fact in world.facts()[:3]:
        ids = tokenizer(fact.prompt, return_tensors="pt")["input_ids"]
        edit = {site.at(positions=-1): fmr.edits.Add(2.0 * dictionary.direction(5))}
        by_hand.append(float((metric(fmr.run(model, ids, edits=edit).output) - metric(model(ids))).detach()))
    assert found.effect[0] == pytest.approx(np.mean(by_hand), abs=1e-4)
    assert found.random.shape == (2, 6)
    assert found.p.tolist() == [
        (np.sum(np.abs(one) >= abs(own)) + 1) / 7 for one, own in zip(found.random, found.effect, strict=True)
    ]
    assert list(found.table().dose) == [2.0, -1.0]
    assert found.plot().axes[0].get_legend() is not None
    assert "2 added: " in repr(found)


def test_a_latent_steers_to_the_words_it_speaks_for(told: Told, contexts: LatentContexts) -> None:
    model, tokenizer, site, dictionary = told
    pages = contexts.result(words=1)
    words = [tokenizer.convert_tokens_to_ids(spoken[0][0]) for spoken in pages.speaks]
    best = int(np.argmax([spoken[0][1] for spoken in pages.speaks]))
    steering = LatentSteering(model, tokenizer, dictionary, site.at(positions=-1))
    prompts = [fact.prompt for fact in world.facts()[:90:10]]
    found = steering.run(prompts, pages.latents[best], fmr.sweeps.log_prob(words[best]), [4.0], draws=10, progress=False)
    assert found.effect[0] > found.random.max()


# ---- what is refused, and what is left alone


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda a: DictionaryScores(*a[:2], "dictionary", a[3]),
            "The dictionary is a str, expected what DictionaryTraining made",
        ),
        (lambda a: LatentContexts(*a[:3], None), "site=None: expected one site, an ID or the path of a module"),
        (lambda a: LatentContexts(*a, k=0), "k=0: expected a whole number from 1 on."),
        (lambda a: LatentContexts(*a).result(), "Nothing has been counted yet."),
        (lambda a: DictionaryScores(*a).result(), "Nothing has been counted yet."),
        (lambda a: DictionaryScores(*a).update({"inputs_embeds": torch.ones(1, 2, 128)}), "a loss needs what comes next."),
        (lambda a: LatentContexts(*a).update(texts(2)).result([256]), "latent=256: expected a number from 0 to 255."),
        (
            lambda a: LatentContexts(*a).merge(DictionaryScores(*a)),
            "merge got DictionaryScores, expected another LatentContexts.",
        ),
        (
            lambda a: LatentContexts(*a).merge(LatentContexts(*a, k=3)),
            "expected one dictionary, one site, one k and one skip.",
        ),
        (
            lambda a: DictionaryScores(*a).merge(LatentContexts(*a)),
            "merge got LatentContexts, expected another DictionaryScores.",
        ),
        (
            lambda a: LatentSteering(*a).run(texts(1), 0, fmr.sweeps.log_prob(3), ["much"]),
            "doses=['much']: expected finite numbers",
        ),
    ],
)
def test_a_mistake_is_told(mistake: Callable[[Any], Any], message: str, told: Told) -> None:
    with pytest.raises(AnalyzerError, match=re.escape(message)):
        mistake(told_in_order(told))


def test_nothing_is_left_on_the_model(told: Told) -> None:
    model, *_ = told
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    DictionaryScores(*told_in_order(told)).update(texts(2)).result()
    LatentContexts(*told_in_order(told)).update(texts(2)).result([1])
    LatentSteering(*told_in_order(told)).run(texts(2)[0], 1, fmr.sweeps.log_prob(3), draws=2, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    model.train()
    try:
        with pytest.raises(AnalyzerError, match="is in train mode"):
            DictionaryScores(*told_in_order(told)).update(texts(2))
    finally:
        model.eval()


def own_ids(seed: int = 0) -> tuple[nn.Module, Any]:
    """A model whose forward calls its token ids otherwise, and a site of it."""
    model = made(Looped)
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(seed)
        model.head.weight.normal_()
    return model, fmr.locate(fmr.run(model, TOKENS)).layers[1].resid_post


@pytest.mark.parametrize("kind", [DictionaryScores, LatentContexts])
def test_what_is_merged_is_of_one_dictionary_and_one_model(kind: Any) -> None:
    model, site = own_ids()
    told = {"mean": torch.zeros(16)} if kind is DictionaryScores else {}

    def counted(one: SparseAutoencoder, on: nn.Module = model) -> Any:
        return kind(on, None, one, site, **told).update({"tokens": TOKENS})

    plain = SparseAutoencoder(16, 24, "top-k", k=4)
    for other in (
        SparseAutoencoder(16, 24, "relu"),
        SparseAutoencoder(16, 24, "top-k", k=12),
        SparseAutoencoder(16, 24, "top-k", k=4, centered=False),
        SparseAutoencoder(16, 24, "top-k", k=4, seed=1),
    ):
        with pytest.raises(AnalyzerError, match="expected one dictionary, one site, one"):
            counted(plain).merge(counted(other))
    with pytest.raises(AnalyzerError, match="counted on a Looped with other weights"):
        counted(plain).merge(counted(plain, own_ids(seed=1)[0]))
    one = counted(plain)
    with pytest.raises(AnalyzerError, match=f"merge got the same {kind.__name__} once more"):
        one.merge(one)
    assert one.merge(counted(plain)).counted.startswith("6 ")
