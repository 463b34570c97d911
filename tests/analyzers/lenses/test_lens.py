"""The logit lens and its translator: the end is the model's own, maps that are there are found, nulls find nothing."""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, HeadClustering, Lens, LensTranslator, LogitLens, Translator
from analyzers.lenses.opening import points_of
from fmr.zoo import world
from tests.analyzers.lenses.test_attribution import FAMILIES, Memories, made
from tests.models import build

TEXTS = [fact.prompt for fact in world.facts()[:160]]
HELD = [fact.prompt for fact in world.facts()[160:184]]


def batches(texts: list[str], size: int = 16) -> list[list[str]]:
    return [texts[at : at + size] for at in range(0, len(texts), size)]


@pytest.fixture(scope="module")
def fitted(loaded: tuple[nn.Module, Any]) -> LensTranslator:
    return LensTranslator(*loaded).over(batches(TEXTS), progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_row_is_what_the_model_says(name: str, dtype: torch.dtype) -> None:
    model, ids = made(name, dtype)
    found = LogitLens(model).run(ids)
    with torch.no_grad():
        logits = model(ids).logits.float()
    assert found.error == 0.0
    assert found.points == ("0", "1")
    assert torch.equal(found.answers, logits.argmax(-1))
    assert torch.equal(found.top["lens"][-1], logits.softmax(-1).topk(5).indices)
    assert torch.allclose(found.probability["lens"][-1], logits.softmax(-1).amax(-1))
    assert bool((found.rank["lens"][-1] == 0).all())
    assert bool((found.kl["lens"][-1] == 0).all())
    assert float(found.kl["lens"][0].max()) > 0


def test_an_earlier_row_is_the_model_without_the_layers_after_it() -> None:
    model, ids = made("Llama")
    found = LogitLens(model).run(ids, [4, 5, 6])
    model.model.layers = model.model.layers[:1]
    with torch.no_grad():
        said = model(ids).logits.log_softmax(-1)
    answers = torch.tensor([4, 5, 6])[:, None].expand(3, 7)
    own = said.gather(-1, answers[..., None])
    assert torch.allclose(found.probability["lens"][0], own[..., 0].exp(), atol=1e-6)
    assert torch.equal(found.rank["lens"][0], (said > own).sum(-1).float())
    assert torch.allclose(found.entropy["lens"][0], -(said.exp() * said).sum(-1), atol=1e-5)


def test_padding_and_the_size_of_a_batch_change_nothing(loaded: tuple[nn.Module, Any]) -> None:
    texts = ["Junel Dunoth grew up in", "The mother tongue of Velin dal Millwick is"]
    lens = LogitLens(*loaded)
    together = lens.run(texts, "Oskus", position=-1)
    assert int(together.read.sum()) == 2
    for row, text in enumerate(texts):
        alone = lens.run(text, "Oskus", position=-1)
        assert torch.allclose(alone.probability["lens"][:, 0, -1], together.probability["lens"][:, row, -1], atol=1e-5)
        assert torch.equal(alone.rank["lens"][:, 0, -1], together.rank["lens"][:, row, -1])


def test_points_of_ones_own_are_read(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    layers = fmr.locate(fmr.run(model, **inputs)).layers
    mids = {f"{number} mid": layer.resid_mid for number, layer in enumerate(layers)}
    found = LogitLens(model, tokenizer).run(TEXTS[0], sites=mids)
    assert found.points == tuple(mids)
    assert found.error == 0.0
    with pytest.raises(AnalyzerError, match="sites is empty: expected points of the stream by name"):
        LogitLens(model, tokenizer).run(TEXTS[0], sites={})
    with pytest.raises(AnalyzerError, match=r"sites is a list: expected points of the stream by name, as \{'mid'"):
        LogitLens(model, tokenizer).run(TEXTS[0], sites=["transformer.h.1"])  # type: ignore[arg-type]


def test_a_point_may_be_named_by_the_path_of_its_module(loaded: tuple[nn.Module, Any]) -> None:
    lens = LogitLens(*loaded)
    named, numbered = lens.run(TEXTS[0], sites={"1": "transformer.h.1"}), lens.run(TEXTS[0])
    assert torch.equal(named.entropy["lens"][0], numbered.entropy["lens"][1])


class Rotated(nn.Module):
    """A stream that a layer turns by a rotation, of which the logits are read: what the first layer says is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.turn = nn.Embedding(30, 12), nn.Linear(12, 12, bias=True)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 30, bias=False)
        matrix = torch.linalg.qr(torch.randn(12, 12)).Q
        self.turn.weight.data = matrix - torch.eye(12)  # the stream plus this is the stream turned

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.turn(x)
        return self.head(x)


def test_a_map_that_is_there_is_found_and_the_null_finds_none() -> None:
    """Known answer: the layer after the first is a rotation and a shift, so that they are the map."""
    torch.manual_seed(0)
    model, ids = Rotated().eval(), torch.randint(30, (32, 12))
    structure = fmr.locate(fmr.run(model, ids))
    first, last = structure.residual.writes
    fitting = LensTranslator(model)
    fitting.sites, fitting.end = {"0": fmr.Site(first.after)}, fmr.Site(last.after)
    found = fitting.update({"ids": ids}).result(ridge=1e-9)
    assert torch.allclose(found.maps[0], (torch.eye(12) + model.turn.weight.T).detach(), atol=1e-3)
    assert torch.allclose(found.biases[0], model.turn.bias.detach(), atol=1e-3)
    assert float(found.explained[0]) == pytest.approx(1, abs=1e-6)
    assert float(found.null_explained[0]) < 0.05


def test_the_translator_says_more_than_the_lens_on_other_texts_and_its_null_less(
    loaded: tuple[nn.Module, Any], fitted: LensTranslator
) -> None:
    found = LogitLens(*loaded, fitted.result(ridge=1e-2)).run(HELD)
    kl = {view: values[1][found.read].mean() for view, values in found.kl.items()}
    assert kl["translated"] < 0.5 * kl["lens"]
    assert kl["translated"] < 0.5 * kl["null"]
    table = found.summary().set_index(["layer", "view"])
    assert table.loc[("1", "translated"), "top ten"] > table.loc[("1", "null"), "top ten"]
    assert (table.loc[(found.points[-1], slice(None)), "median rank"] == 0).all()


def test_sums_do_not_hang_on_batches_shards_or_their_order(loaded: tuple[nn.Module, Any], fitted: LensTranslator) -> None:
    shards = [LensTranslator(*loaded).over(batches(part, 5), progress=False) for part in (TEXTS[90:], TEXTS[:90])]
    for settings in ({"skip": 1}, {"layers": [0]}, {"seed": 1}):
        with pytest.raises(AnalyzerError, match=r"expected the same model and settings"):
            LensTranslator(*loaded, **settings).merge(shards[0])  # and it would have been none's counts otherwise
    stranger = copy.deepcopy(loaded[0])
    torch.nn.init.normal_(stranger.get_parameter("transformer.h.1.mlp.c_fc.weight"), generator=torch.manual_seed(0))
    with pytest.raises(AnalyzerError, match=r"counted a model whose weights lie .* from those of this one"):
        LensTranslator(stranger, loaded[1]).merge(shards[0])
    merged = shards[0].merge(shards[1]).merge(LensTranslator(*loaded))
    whole = fitted.result(ridge=1e-2)
    other = LensTranslator(*loaded).merge(merged).result(ridge=1e-2)
    assert other.tokens == whole.tokens
    assert torch.allclose(other.maps, whole.maps, atol=1e-3)
    assert torch.allclose(other.biases, whole.biases, atol=1e-3)


def test_the_null_is_fitted_to_other_tokens_however_few_a_batch_has(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    pair = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"][:, :2]
    fitting = LensTranslator(model).update(pair)
    x, y = (fmr.run(model, keep=site, input_ids=pair)[site][0].double() for site in (fitting.sites["0"], fitting.end))
    assert torch.allclose(fitting.sums["0"].xy, x.mT @ y)
    assert torch.allclose(fitting.sums["0"].x_other, x.mT @ y.flip(0))
    first = LensTranslator(model).update(pair[:, :1])
    before, states = fitting.sums["0"].x_other.clone(), (first.sums["0"].x, y[1])
    after = fitting.update(pair[:, :1]).sums["0"].x_other - before
    assert torch.allclose(after, torch.outer(*states), atol=1e-5)


def test_the_map_is_the_least_squares_of_all_tokens_at_once(loaded: tuple[nn.Module, Any], fitted: LensTranslator) -> None:
    model, tokenizer = loaded
    structure = fmr.locate(fmr.run(model, **tokenizer(TEXTS[0], return_tensors="pt")))
    points = points_of(structure)
    xs, ys = [], []
    for text in TEXTS:
        run = fmr.run(model, keep=[points["1"], points["3"]], **tokenizer(text, return_tensors="pt"))
        xs.append(run[points["1"]][0].detach().double())
        ys.append(run[points["3"]][0].detach().double())
    x, y = torch.cat(xs), torch.cat(ys)
    full = torch.cat([x, torch.ones(len(x), 1)], 1)
    best = torch.linalg.lstsq(full, y, driver="gelsd").solution
    mine = fitted.result(ridge=1e-9)
    errors = [
        float((y - guess).pow(2).mean()) for guess in (full @ best, x @ mine.maps[1].double() + mine.biases[1].double())
    ]
    assert fitted.tokens == len(x)
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert float(mine.explained[1]) == pytest.approx(1 - errors[0] / float(y.var(0, correction=0).mean()), abs=1e-4)
    others = LensTranslator(*loaded).update(HELD)
    held = fitted.result(ridge=1e-2, held_out=others)
    assert 0 < float(held.explained[1]) < float(mine.explained[1])
    assert float(held.null_explained[1]) < 0.1
    assert f"on {others.tokens} held-out tokens" in repr(held)


def test_training_lowers_the_divergence_on_texts_that_it_did_not_see(
    loaded: tuple[nn.Module, Any], fitted: LensTranslator
) -> None:
    lens = LogitLens(*loaded, fitted.result(ridge=1e-2))
    found = lens.tune(batches(TEXTS), batches(HELD), layers=[1], steps=60, learning_rate=1e-3, progress=False)
    assert found.kl_after["1"] < 0.9 * found.kl_before["1"]
    read = LogitLens(*loaded, found).run(HELD[:4])
    assert (
        read.kl["translated"][1][read.read].mean()
        < LogitLens(*loaded, lens.translator).run(HELD[:4]).kl["translated"][1][read.read].mean()
    )
    assert "tuned by KL" in repr(found)
    assert lens.translator is not None
    assert torch.equal(found.maps[0], lens.translator.maps[0])
    with pytest.raises(AnalyzerError, match=r"There is no translator to tune. Expected LogitLens\(model, tokenizer, tr"):
        LogitLens(*loaded).tune([TEXTS], [HELD])
    with pytest.raises(AnalyzerError, match=r"layers=\[9\]: expected some of 0, 1, 2"):
        lens.tune([TEXTS[:2]], [HELD[:2]], layers=[9])


def test_results_are_told_drawn_and_kept(tmp_path: Path, loaded: tuple[nn.Module, Any], fitted: LensTranslator) -> None:
    translator = fitted.result()
    translator.save(tmp_path / "translator.safetensors")
    read = Translator.load(tmp_path / "translator.safetensors")
    assert torch.equal(read.maps, translator.maps)
    assert repr(read) == repr(translator)
    assert read.plot().axes[0].get_xlabel() == "layer"
    assert list(read.table()["layer"]) == ["0", "1", "2"]
    found = LogitLens(*loaded, read).run(TEXTS[:2])
    found.save(tmp_path / "lens.safetensors")
    again = Lens.load(tmp_path / "lens.safetensors")
    assert repr(again) == repr(found)
    assert "the last row is what the model says" in repr(found)
    assert torch.equal(again.rank["null"].nan_to_num(-1), found.rank["null"].nan_to_num(-1))
    assert len(found.table()) == 3 * 4 * int(found.read.sum())
    for what in ("probability", "rank", "entropy", "kl"):
        figure = found.plot(what=what, example=1)
        titles = [ax.get_title() for ax in figure.axes[:3]]
        assert titles == ["as it is", "through the translator", "translator fitted to other tokens (null)"]
    with pytest.raises(AnalyzerError, match=r"what='loss': expected one of 'probability', 'rank'"):
        found.plot(what="loss")
    with pytest.raises(AnalyzerError, match=r"view='tuned' was not read"):
        found.plot(view="tuned")
    with pytest.raises(AnalyzerError, match=r"example=2: expected 0 to 1"):
        found.plot(example=2)


def test_titles_stand_side_by_side_above_one_token(loaded: tuple[nn.Module, Any], fitted: LensTranslator) -> None:
    figure = LogitLens(*loaded, fitted.result()).run(TEXTS[0], position=-1).plot()
    figure.canvas.draw()
    ends = [ax.title.get_window_extent() for ax in figure.axes[:3]]
    assert all(one.x1 + 10 < other.x0 for one, other in pairwise(ends))


def test_what_cannot_be_read_says_why(loaded: tuple[nn.Module, Any], fitted: LensTranslator) -> None:
    model, tokenizer = loaded
    bert, args, kwargs = build("bert")
    with pytest.raises(AnalyzerError, match=r"Nothing can be read out of .*Expected pre-norm layers and logits"):
        LogitLens(bert).run(kwargs or {"input_ids": args[0]})
    other, ids = made("Llama")
    with pytest.raises(AnalyzerError, match=r"shape \[21, 32\]: this translator is of a model 128 wide"):
        LogitLens(other, translator=fitted.result(), tolerance=1).run(ids)
    with pytest.raises(AnalyzerError, match=r"maps for 0, 1, 2, and what is read is middle. .* at points of the same names"):
        LogitLens(*loaded, fitted.result()).run("Junel", sites={"middle": "transformer.h.1/add#0"})
    with pytest.raises(AnalyzerError, match=r"No map was fitted for '3': expected one of '0', '1', '2'"):
        fitted.result()("3", torch.zeros(128))
    with pytest.raises(AnalyzerError, match=r"Nothing has been counted yet"):
        LensTranslator(model).result()
    with pytest.raises(AnalyzerError, match=r"Nothing has been counted yet.*The first 99 tokens of each text are left out"):
        LensTranslator(model, tokenizer, skip=99).update(TEXTS[0]).result()
    with pytest.raises(AnalyzerError, match=r"merge got Translator, expected another LensTranslator"):
        LensTranslator(model).merge(fitted.result())  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match=r"layers=\[7\]: expected some of 0, 1, 2, the last one is the end itself"):
        LensTranslator(model, tokenizer, layers=[7]).update(TEXTS[:2])
    few = LensTranslator(model, tokenizer).update(TEXTS[:2])
    with pytest.raises(AnalyzerError, match=r"tokens do not determine a map from 128 numbers. Expected several times"):
        few.result(ridge=0)
    assert "the ends of texts that were fitted to are known by heart" in repr(few.result(ridge=1e-2))
    assert "by heart" not in repr(fitted.result())
    for ridge in (-1.0, float("nan"), "much", True):
        with pytest.raises(AnalyzerError, match=rf"ridge={ridge!r}: expected a share of the variance from 0 on"):
            few.result(ridge=ridge)  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match=r"held_out is a list: expected a LensTranslator that counted other texts"):
        few.result(held_out=HELD)  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match=r"skip=-1: expected a whole number from 0 on"):
        LensTranslator(model, tokenizer, skip=-1)
    with pytest.raises(AnalyzerError, match=r"translator is a str: expected what LensTranslator\(model, tokenizer\).over"):
        LogitLens(model, tokenizer, "translator.safetensors")  # type: ignore[arg-type]
    shard = LensTranslator(model, tokenizer, layers=[0]).update(TEXTS[:2])
    with pytest.raises(AnalyzerError, match=r"merge of \{'layers': \(0,\).*: expected the same model and settings"):
        shard.merge(fitted)
    with pytest.raises(AnalyzerError, match=r"held_out counted layers 0, expected 0, 1, 2"):
        fitted.result(held_out=shard)
    whisper, _, kwargs = build("whisper")
    with pytest.raises(AnalyzerError, match=r"has one layer, after which its stream ends: there is nothing to translate"):
        LensTranslator(whisper).update(kwargs)
    with pytest.raises(AnalyzerError, match=r"is text, and there is no tokenizer"):
        LogitLens(model).run("Junel")
    with pytest.raises(AnalyzerError, match=r"top=0: expected how many tokens to name, from 1 on"):
        LogitLens(model, tokenizer).run("Junel", top=0)
    with pytest.raises(AnalyzerError, match=r"position=0.5: expected the number of a token, such as 0 or -1"):
        LogitLens(model, tokenizer).run("Junel", position=0.5)  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match=r"The prompts have shape \[0, 4\]: expected an example with a token"):
        LogitLens(model).run(torch.zeros(0, 4, dtype=torch.long))


class LastAlone(nn.Module):
    """A model that gives the logits of its last column."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, logits_to_keep=1).logits


def test_a_model_that_says_its_last_token_alone_is_read_there_alone() -> None:
    model, ids = made("Llama")
    found, whole = LogitLens(LastAlone(model).eval()).run(ids), LogitLens(model).run(ids, position=-1)
    torch.testing.assert_close(found.entropy["lens"], whole.entropy["lens"], equal_nan=True)
    with pytest.raises(AnalyzerError, match=r"position=0: this model gives the logits of one column of each example alo"):
        LogitLens(LastAlone(model).eval()).run(ids, position=0)


def test_a_hand_written_model_without_attention_is_read() -> None:
    torch.manual_seed(0)
    found = LogitLens(Memories().eval()).run(torch.randint(20, (2, 5)))
    assert found.points == ("0", "1")
    assert found.error == 0.0


def test_texts_are_put_together_and_heads_say_what_they_take(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    texts = [gift.prompt for gift in world.ioi(20, seed=0)]
    alone = LensTranslator(model, tokenizer).update(texts[:16]).update(texts[16:])
    together = LensTranslator(model, tokenizer).over(texts, progress=False)
    assert together.tokens == alone.tokens
    assert torch.equal(together.result().maps[0], alone.result().maps[0])
    with pytest.raises(AnalyzerError, match="A batch is a list, expected a mapping"):
        HeadClustering(model).over(texts, progress=False)


def test_maps_that_were_fitted_to_other_weights_are_refused(
    tmp_path: Path, loaded: tuple[nn.Module, Any], fitted: LensTranslator
) -> None:
    """Points of the same names are no sign of the same model; rounding and a wrapper are no other one."""
    model, tokenizer = loaded
    maps, prompt = fitted.result(), TEXTS[0]
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.data = torch.randn_like(weight) * weight.std()
    with pytest.raises(
        AnalyzerError,
        match=r"GPT2LMHeadModel lie 100% from those that the translator was fitted to, more than 5%. Expected the model "
        r"that it was fitted to, in any precision; for a copy .* LogitLens\(model, tokenizer, translator, tolerance=1\)",
    ):
        LogitLens(other, tokenizer, maps).run(prompt)
    with pytest.raises(AnalyzerError, match="lie 100% from those"):
        LogitLens(other, tokenizer, maps).tune([TEXTS[:2]], [HELD[:2]])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert LogitLens(copy.deepcopy(model).to(dtype), tokenizer, maps).run(prompt).apart < 0.005
    assert LogitLens(Wrapped(model).eval(), tokenizer, maps).run(prompt).apart == 0
    shard = LensTranslator(other, tokenizer).update(TEXTS[:2])
    for mistake in (lambda: fitted.result(held_out=shard), lambda: shard.merge(fitted)):
        with pytest.raises(AnalyzerError, match="counted a model whose weights lie 100% from those of this one"):
            mistake()
    assert LensTranslator(copy.deepcopy(model).bfloat16(), tokenizer).update(TEXTS[:2]).merge(fitted).tokens > fitted.tokens


def test_a_copy_that_was_trained_on_is_read_where_that_is_asked_for(
    tmp_path: Path, loaded: tuple[nn.Module, Any], fitted: LensTranslator
) -> None:
    model, tokenizer = loaded
    near, far = copy.deepcopy(model), copy.deepcopy(model)
    for one, share in ((near, 0.02), (far, 0.15)):
        for weight in one.parameters():
            weight.data += share * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
    found = LogitLens(near, tokenizer, fitted.result()).run(TEXTS[0])
    assert found.apart == pytest.approx(0.02, abs=0.01)
    assert f"translated by maps that were fitted to weights {found.apart:.1%} away from these" in repr(found)
    with pytest.raises(AnalyzerError, match=r"lie 1\d% from those"):
        LogitLens(far, tokenizer, fitted.result()).run(TEXTS[0])
    assert LogitLens(far, tokenizer, fitted.result(), tolerance=0.3).run(TEXTS[0]).apart > 0.1


def test_a_file_without_weights_says_so(tmp_path: Path, loaded: tuple[nn.Module, Any], fitted: LensTranslator) -> None:
    replace(fitted.result(), weights={}).save(tmp_path / "older.safetensors")
    older = Translator.load(tmp_path / "older.safetensors")
    with pytest.raises(
        AnalyzerError, match=r"does not know which weights it was fitted to.* Fit it again, or, .* translator, tolerance=1\)"
    ):
        LogitLens(*loaded, older).run(TEXTS[0])
    assert "fitted to weights that are not known" in repr(LogitLens(*loaded, older, tolerance=1).run(TEXTS[0]))


class Wrapped(nn.Module):
    """A model in another, whose parameters have longer names then."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(input_ids, attention_mask=attention_mask).logits
