"""Models compared: with themselves, turned, untrained; in any cuts, orders, paddings; and what is refused."""

import copy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import analyzers
from analyzers import AnalyzerError, Similarities, Similarity
from tests.analyzers.probes.models import Words, padded

matplotlib.use("Agg")
SITES = ["layers.0", "layers.1"]


def rows(n: int = 60, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 20, (int(torch.randint(2, 7, (), generator=draw)),), generator=draw).tolist() for _ in range(n)]


def turned() -> nn.Module:
    """The same words in vectors that are turned by a rotation."""
    model = Words()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3))).Q
    model.vectors.weight.data @= turn
    return model.eval()


def other() -> nn.Module:
    """Other vectors of the same words."""
    model = Words()
    model.vectors.weight.data = torch.randn(20, 8, generator=torch.Generator().manual_seed(9))
    return model.eval()


def compared(models: Any = None, batches: list[Any] | None = None, **options: Any) -> Similarities:
    measure = Similarity(models or Words().eval(), sites=options.pop("sites", SITES), **options)
    return measure.over(batches or [padded(rows(), "left")], progress=False).result(progress=False)


def same(one: Similarities, two: Similarities) -> bool:
    return all(np.allclose(one.values[kind], two.values[kind], atol=1e-9) for kind in one.values)


def test_layers_that_scale_are_the_same_and_rows_in_another_order_are_not() -> None:
    found = compared()
    for kind in ("cka", "rsa", "procrustes", "svcca"):
        assert found.of("layers.0", "layers.1", kind) == pytest.approx(1, abs=1e-6)
    assert abs(found.null("layers.0", "layers.1", "cka")) < 0.1
    assert abs(found.null("layers.0", "layers.1", "rsa")) < 0.1
    assert found.null("layers.0", "layers.1", "procrustes") < 0.5


def test_a_turned_model_is_the_same_and_another_is_not() -> None:
    models = {"one": Words().eval(), "turned": turned(), "other": other()}
    found = compared(models, measures=("cka", "procrustes"))
    for kind in ("cka", "procrustes"):
        assert found.between("one", "turned", kind) == pytest.approx(np.ones((2, 2)), abs=1e-5)
        assert (found.between("one", "other", kind) < 0.9).all()
    assert found.names[2] == "turned: layers.0"


@pytest.mark.parametrize("side", ["left", "right"])
def test_cuts_orders_and_padding_change_nothing(side: str) -> None:
    whole, given = compared(), rows()
    cut = [padded(given[start : start + 7], side) for start in range(0, 60, 7)]
    assert same(compared(batches=cut), whole)
    assert same(compared(batches=cut[::-1]), whole)


def test_shards_merge_to_the_same() -> None:
    given, model = rows(), Words().eval()
    one, two = (
        Similarity(model, sites=SITES, most=50).over([padded(part, "left")], progress=False)
        for part in (given[:20], given[20:])
    )
    whole = compared(most=50)
    assert same(two.merge(one).result(progress=False), whole)
    assert whole.rows == 50 < whole.seen


def test_models_of_other_sites_and_a_position(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    texts = ["Junel Dunoth grew up in", "Brigost", "Oskus Stridling speaks", "The birthplace of Junel Dunoth is"] * 3
    alike = Similarity(
        {"a": model, "b": model}, tokenizer, {"a": ["transformer.h.1"], "b": ["transformer.h.3"]}, position=-1
    )
    found = alike.over(texts, progress=False).result(progress=False)
    assert found.names == ("a: transformer.h.1", "b: transformer.h.3")
    assert found.rows == 12
    layers = Similarity(model, tokenizer, measures="cka").over(texts, progress=False).result(progress=False)
    assert layers.names == tuple(f"layers[{n}].resid_post" for n in range(4))
    assert layers.of(layers.names[0], layers.names[1]) > layers.of(layers.names[0], layers.names[3])


def test_vectors_of_images_are_one_an_example() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU())
    images = torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = Similarity(model.eval(), sites=["1", "2"]).update({"input": images}).result(progress=False)
    assert found.rows == 30
    assert 0.3 < found.of("1", "2") < 0.999


def test_it_is_saved_and_drawn(tmp_path: Path) -> None:
    models = {str(step): model for step, model in ((0, other()), (100, turned()), (250, Words().eval()))}
    found = compared(models, measures=["cka", "svcca"])
    found.save(tmp_path / "alike.safetensors")
    again = analyzers.Similarities.load(tmp_path / "alike.safetensors")
    assert same(again, found)
    assert again.steps == (0, 100, 250)
    axes = found.plot().axes[0]
    assert axes.get_xlabel() == "step"
    assert axes.lines[0].get_xydata()[:, 1] == pytest.approx(found.table()["250: layers.0"].iloc[[0, 2, 4]])
    shown = compared().plot(measure="rsa").axes[0].images[0].get_array()
    assert np.allclose(shown, 1, atol=1e-6)
    assert "Similarities of 6 sites of 3 models" in repr(found)


def test_nothing_is_left_on_the_models() -> None:
    model = Words().eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    compared(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"measures": "cca"}, "measures='cca': expected some of 'cka', 'rsa', 'procrustes', 'svcca'"),
        ({"measures": ()}, "expected some of"),
        ({"position": "last"}, "position='last': expected the number of a token"),
        ({"most": 3}, "most=3: expected a whole number from 8 on"),
        ({"seed": -1}, "seed=-1: expected"),
        ({"sites": 7}, "sites=7: expected sites, IDs or paths"),
    ],
)
def test_wrong_settings_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(AnalyzerError, match=told):
        Similarity(Words().eval(), **options)


def test_models_without_names_of_their_own_are_refused() -> None:
    model = Words().eval()
    with pytest.raises(AnalyzerError, match="expected a name of its own for each"):
        Similarity({1: model, "1": model})
    with pytest.raises(AnalyzerError, match="Similarity got no model"):
        Similarity({})


def test_too_few_rows_and_other_tokens_are_refused() -> None:
    few = Similarity(Words().eval(), sites=SITES).update(padded([[1, 2, 3]], "left"))
    with pytest.raises(AnalyzerError, match="3 rows counted so far, expected 8 or more"):
        few.result()

    class Pools(Words):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            state: Tensor = self.layers[1](super().forward(input_ids, attention_mask)[:, ::2])
            return state

    with pytest.raises(AnalyzerError, match=r"Expected the same tokens at both; position=-1"):
        Similarity(Pools().eval(), sites={"whole": "layers.0", "half": "layers.1@1"}).update(padded([[1, 2, 3, 4]], "left"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_first_tokens_are_left_out(side: str) -> None:
    rows = [[1, 2, 3, 4, 5], [6, 7, 8], [9]]
    one = Similarity(Words().eval(), sites=SITES, skip=2).update(padded(rows, side)).sample.rows()
    every = Similarity(Words().eval(), sites=SITES).update(padded(rows, side)).sample.rows()
    assert sorted(one.places.tolist()) == [2, 2, 3, 4]
    later = every.take(np.flatnonzero(every.places >= 2))
    assert all(torch.equal(one.vectors[name], later.vectors[name]) for name in one.vectors)
    with pytest.raises(AnalyzerError, match=r"Nothing has been counted yet.*The first 9 tokens of each text are left out"):
        Similarity(Words().eval(), sites=SITES, skip=9).update(padded(rows, side)).result()
    with pytest.raises(AnalyzerError, match=r"skip=1 with position=-1: expected one of them"):
        Similarity(Words().eval(), sites=SITES, skip=1, position=-1)
    flat = Similarity(nn.Sequential(nn.Linear(4, 4)).eval(), sites=["0"], skip=1)
    with pytest.raises(AnalyzerError, match=r"skip=1 of '0', which has one vector an example: expected positions"):
        flat.update(torch.randn(9, 4))


def test_only_the_same_merges() -> None:
    one = Similarity(Words().eval(), sites=SITES)
    with pytest.raises(AnalyzerError, match=r"merge got what was counted on a .* with other weights"):
        one.merge(Similarity(other(), sites=SITES))
    with pytest.raises(AnalyzerError, match="merge of two with other settings"):
        one.merge(Similarity(Words().eval(), sites=SITES, seed=1))
    with pytest.raises(AnalyzerError, match="merge of two with other settings"):
        one.merge(Similarity(Words().eval(), sites=SITES, skip=1))
    with pytest.raises(AnalyzerError, match="merge of two with other sites"):
        Similarity(Words().eval()).merge(one)
    assert Similarity(Words().eval(), sites=SITES).merge(Similarity(Words().eval(), sites=SITES)).counted == ""
    with pytest.raises(AnalyzerError, match="merge got the same Similarity once more"):
        one.merge(one)


def test_a_site_without_variance_is_told(tmp_path: Path) -> None:
    flat = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).eval()
    batch = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    one = compared(flat, [batch], sites=["0", "1"])
    assert "rsa         no two sites with variance; rows in another order" in repr(one)
    assert repr(one).endswith("NaN for 1 in rsa: there is no variance to compare")  # distances of one number are none
    torch.nn.init.zeros_(flat[1].weight)  # type: ignore[arg-type]
    none = compared(flat, [batch], sites=["0", "1"])
    assert repr(none).endswith("NaN for 1 in cka, rsa, procrustes, svcca: there is no variance to compare")
    assert "nan to" not in repr(none)
    none.plot().savefig(tmp_path / "none.png")
    assert "of one site alone" in repr(compared(flat, [batch], sites=["1"]))
