"""Dictionaries find the directions that values were made of, beside controls; they go on after a kill to the same bits."""

import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, Dictionary, DictionaryTraining
from analyzers.dictionaries import steps
from analyzers.dictionaries.coding import Tally
from analyzers.dictionaries.dictionary import NULL, RANDOM
from tests.analyzers.dictionaries.sparse import ON, SIZE, WIDTH, found, sums

matplotlib.use("Agg")

KINDS: dict[str, dict[str, Any]] = {
    "top-k": {"k": ON},
    "relu": {"price": 0.3, "epochs": 40},
    "jumprelu": {"price": 0.02, "epochs": 60},
}


def small(kind: str = "top-k", **settings: Any) -> DictionaryTraining:
    return DictionaryTraining(SIZE, kind, **{"epochs": 2, "batch": 64, "k": ON if kind == "top-k" else None, **settings})


def same(one: Dictionary, other: Dictionary) -> bool:
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights) and all(
        (one.curves[name] == other.curves[name]).all() for name in one.curves
    )


# ---- what it finds


@pytest.mark.parametrize("kind", KINDS)
def test_the_directions_that_values_were_made_of_are_found(kind: str) -> None:
    training = DictionaryTraining(2 * SIZE, kind, **{"epochs": 20, "lr": 1e-2, **KINDS[kind]})
    made = training.run(sums(6000), controls=False, progress=False)
    assert found(made.autoencoder.decoder).mean() > 0.95
    assert found(made.rivals()[RANDOM].decoder).mean() < 0.6
    assert found(torch.randn(2 * SIZE, WIDTH)).mean() < 0.6
    assert made.explained > 0.8
    assert made.l0 < 4 * ON
    assert made.controls[RANDOM][1] < made.explained - 0.2
    assert made.controls["principal components"][1] < made.explained - 0.1


def test_of_gaussian_values_nothing_is_found() -> None:
    made = DictionaryTraining(2 * SIZE, "top-k", ON, epochs=20, lr=1e-2).run(sums(3000), progress=False)
    assert found(made.autoencoder.decoder).mean() > 0.9
    null = made.rivals()[NULL]
    assert found(null.decoder).mean() < 0.75
    assert max(made.controls[NULL][1], made.itself) < made.explained - 0.1
    assert f"{NULL} {made.controls[NULL][1]:.3f}" in repr(made)


def test_directions_keep_their_length_and_values_their_units() -> None:
    one, other = (small().run(sums(1000) * scale, controls=False, progress=False) for scale in (1.0, 64.0))
    assert torch.allclose(one.autoencoder.decoder.norm(dim=1), torch.ones(SIZE), atol=1e-5)
    assert other.explained == pytest.approx(one.explained, abs=1e-4)
    latents = one.autoencoder.encode(sums(10)) * 64, other.autoencoder.encode(sums(10) * 64)
    assert torch.allclose(*latents, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "dead", "bias"),
    [("relu", "resample", -5.0), ("relu", "ghost", -5.0), ("top-k", "resample", -5.0), ("top-k", "ghost", -3.0)],
)
def test_latents_that_never_fire_are_revived(kind: str, dead: str, bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    start = DictionaryTraining._start

    def half_dead(self: DictionaryTraining, *args: Any) -> Any:
        made = start(self, *args)
        with torch.no_grad():
            made.encoder_bias[::2] = bias
        return made

    monkeypatch.setattr(DictionaryTraining, "_start", half_dead)

    def made(how: str | None) -> Dictionary:
        training = DictionaryTraining(SIZE, kind, ON if kind == "top-k" else None, epochs=40, lr=2e-2, dead=how)
        return training.run(sums(3000), controls=False, progress=False)

    left, helped = made(None), made(dead)
    assert left.dead > SIZE // 4
    assert helped.dead < 0.7 * left.dead
    assert (helped.revived > 0) == (dead == "resample")
    assert found(helped.autoencoder.decoder).mean() > found(left.autoencoder.decoder).mean() + (
        0.1 if dead == "resample" else -0.02
    )


# ---- files


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BETWEEN", -1.0)
    values, whole = sums(600), small("jumprelu", epochs=4)
    expected = whole.run(values, progress=False)
    before = steps._step

    def killed(*args: Any) -> None:
        if args[2].step == 25:
            raise KeyboardInterrupt
        before(*args)

    monkeypatch.setattr(steps, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        whole.run(values, checkpoint=tmp_path, progress=False)
    ran: list[int] = []
    monkeypatch.setattr(steps, "_step", lambda *args: (ran.append(args[2].step), before(*args)))
    assert same(whole.run(values, checkpoint=tmp_path, progress=False), expected)
    assert ran[0] == 25
    ran.clear()
    assert same(whole.run(values, checkpoint=tmp_path, progress=False), expected)
    assert ran == []
    with pytest.raises(AnalyzerError, match=r"is a checkpoint of something else: seed was 0 and is 1\. Expected the same"):
        small("jumprelu", epochs=4, seed=1).run(values, checkpoint=tmp_path, progress=False)
    (tmp_path / "dictionary.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AnalyzerError, match="is no checkpoint"):
        whole.run(values, checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_other_optimizers_go_on_too(optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BETWEEN", -1.0)
    values, training = sums(300), small(optimizer=optimizer, dead="resample")
    expected, before = training.run(values, controls=False, progress=False), steps._step

    def killed(*args: Any) -> None:
        if args[2].step == 7:
            raise KeyboardInterrupt
        before(*args)

    monkeypatch.setattr(steps, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        training.run(values, controls=False, checkpoint=tmp_path, progress=False)
    monkeypatch.setattr(steps, "_step", before)
    assert same(training.run(values, controls=False, checkpoint=tmp_path, progress=False), expected)


def test_a_result_is_saved_shown_and_drawn(tmp_path: Path) -> None:
    made = small().run(sums(500), progress=False)
    made.save(tmp_path / "dictionary.safetensors")
    again = Dictionary.load(tmp_path / "dictionary.safetensors")
    assert same(made, again)
    assert repr(again) == repr(made)
    assert list(made.table().index) == ["dictionary", RANDOM, NULL, "principal components"]
    assert made.density.shape == (SIZE,)
    assert made.density.sum() == pytest.approx(made.l0, rel=0.1)
    assert len(made.plot().axes) == 2
    assert made.plot(made.plot().axes[0]).axes[0].get_ylabel() == "variance explained"


# ---- corpora


class Layer(nn.Module):
    """Tokens as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.embedding(input_ids) * 2


def test_a_corpus_is_split_by_documents_and_equals_stay_together(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(20, (10, 5), generator=draw) for _ in range(8)]
    batches.append(batches[0])
    corpus = fmr.collect(Layer().eval(), [{"input_ids": one} for one in batches], ["/mul#0"], tmp_path, progress=False)
    values = fmr_values(corpus)
    documents = np.asarray(corpus.index)[:, 0]
    held, kept = set(documents[values.test.numpy()]), set(documents[values.train.numpy()])
    assert held
    assert not held & kept
    assert all((n in held) == (n + 80 in held) for n in range(10))
    one = DictionaryTraining(16, "top-k", 2, epochs=1).run(corpus, controls=False, progress=False)
    other = DictionaryTraining(16, "top-k", 2, epochs=1).run(corpus, "/mul#0", controls=False, progress=False)
    assert same(one, other)
    assert one.site == "/mul#0"
    assert one.train + one.test == len(corpus)


def fmr_values(corpus: fmr.Corpus) -> Any:
    from analyzers.dictionaries.rows import values_of

    return values_of(corpus, None, 0.3, 0)


def test_first_tokens_are_left_out_where_it_is_asked(tmp_path: Path) -> None:
    """Values of the first token that are a thousand times as long drown all others, and nothing else of them does."""
    draw = torch.Generator().manual_seed(0)
    texts = [{"x": torch.randn(1, 9, 8, generator=draw)} for _ in range(60)]
    for text in texts:
        text["x"][:, 0] *= 1000

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    corpus = fmr.collect(Twice().eval(), texts, ["/mul#0"], tmp_path / "values", progress=False)
    one, other = (DictionaryTraining(16, "top-k", 2, epochs=2, skip=skip).run(corpus, progress=False) for skip in (0, 1))
    assert (one.train + one.test, other.train + other.test) == (540, 480)
    assert other.mean.abs().max() < 1 < one.mean.abs().max()
    with pytest.raises(AnalyzerError, match=r"skip=1 of a Tensor: expected a corpus, which knows positions"):
        small(skip=1).run(sums(30))


def test_what_is_no_rows_is_refused() -> None:
    with pytest.raises(AnalyzerError, match=r"The values are torch.float32 of shape \(3, 9, 8\), expected rows"):
        small().run(torch.randn(3, 9, 8))
    with pytest.raises(AnalyzerError, match=r"Of 3 rows 1 are held out: expected two or more on each side"):
        small().run(torch.randn(3, 8))
    assert math.isnan(tallied_once(torch.ones(4, 8)))


def tallied_once(rows: Tensor) -> float:
    tally = Tally.of(rows[0], 2)
    tally.add(rows, rows * 0.5, torch.ones(len(rows), 2))
    return tally.explained


# ---- what is refused, and what is left alone


def test_training_leaves_torch_as_it_was() -> None:
    torch.manual_seed(5)
    before, values = torch.get_rng_state(), sums(300)
    with torch.inference_mode():
        made = small().run(values, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert not values.requires_grad
    assert not any(one.requires_grad for one in made.weights.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "topk"}, "kind='topk': expected 'relu', 'top-k' or 'jumprelu'."),
        ({"k": None}, "k=None: expected a whole number from 1 on."),
        ({"k": SIZE + 1}, f"k={SIZE + 1}, kind='top-k': expected k from 1 to {SIZE} for 'top-k', and none for other kinds."),
        ({"kind": "relu"}, f"k=4, kind='relu': expected k from 1 to {SIZE} for 'top-k', and none for other kinds."),
        ({"price": -1}, "price=-1: expected a number from 0 on."),
        ({"lr": 0}, "lr=0: expected a number above 0."),
        ({"held_out": 1.0}, "held_out=1.0: expected a share between 0 and 1."),
        ({"dead": "buried"}, "dead='buried': expected 'resample' or 'ghost', or None."),
        ({"optimizer": "adam"}, "optimizer='adam': expected a class of torch.optim, as torch.optim.Adam."),
        ({"epochs": 0}, "epochs=0: expected a whole number from 1 on."),
    ],
)
def test_a_wrong_setting_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AnalyzerError, match=re.escape(message)):
        DictionaryTraining(**{"size": SIZE, "kind": "top-k", "k": 4, **settings})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            torch.ones(3, dtype=torch.long),
            "The values are torch.int64 of shape (3,), expected rows of numbers with fractions",
        ),
        ([[1.0]], "The values are list, expected rows"),
        (torch.ones(50, 3), "The values vary by 0.0: expected finite ones that differ."),
        (torch.full((50, 3), float("nan")), "The values vary by nan: expected finite ones that differ."),
        (torch.randn(1, 3), "Of 1 rows 1 are held out: expected two or more on each side."),
    ],
)
def test_wrong_values_are_told(values: Any, message: str) -> None:
    with pytest.raises(AnalyzerError, match=re.escape(message)):
        small().run(values, progress=False)


def test_a_rate_that_is_too_high_is_told() -> None:
    with pytest.raises(AnalyzerError, match=r"The loss is (inf|nan) in step \d+\. Expected a finite one: lr= below 1e\+30"):
        small(lr=1e30, optimizer=torch.optim.SGD).run(sums(300), progress=False)
