"""What is wrong with a site, data or settings is said before anything is trained; layouts and non-linear subspaces agree."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import Alignment, AlignmentSearch, AnalyzerError, Counterfactuals, InterchangeTraining
from analyzers.alignment.examples import examples_of
from analyzers.alignment.interchange import Network
from fmr import subspaces
from fmr.errors import StoreError
from tests.analyzers.alignment.models import Planted, one_hot, planted, rotated

FOREVER = 10**9
"""So many epochs no test would see the end of."""


def data(n: int = 60, variables: Any = ("x",), **settings: Any) -> Counterfactuals:
    return planted().counterfactuals(n, list(variables), encode=one_hot, seed=0, **settings)


def search(model: nn.Module | None = None, site: Any = "hidden", space: Any = None, **settings: Any) -> AlignmentSearch:
    model = Planted(rotated()).eval() if model is None else model
    return AlignmentSearch(model, planted(), site, subspaces.Rotation(8, 2) if space is None else space, **settings)


class Turned(nn.Module):
    """A `Planted` network that holds its hidden state once more with the dimensions in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.inner, self.order = Planted(rotated()), order

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.inner.hidden(inputs)[:, None].expand(-1, 3, -1)  # three positions, all alike
        turned = hidden.permute(self.order) * 1.0
        back = turned.permute([self.order.index(dim) for dim in range(3)])
        return self.inner.out(back.mean(1))


# ---- one interchange, however it is made


def test_parts_of_one_autoencoder_are_swapped_as_the_intervention_swaps_them() -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Linear(8, 12), nn.Tanh()), nn.Linear(12, 8)
    latents = subspaces.Latents(encoder, decoder, 8, 12)
    both = {"x": latents[:6], "y": latents[6:]}
    model, given = Planted(rotated()).eval(), data(40, ("x", "y"), subsets=[["x", "y"], ["x"]])
    found = search(model, space=both).evaluate(given, controls=False)
    examples = examples_of(given, ("x", "y"), model, None)
    rows = torch.stack(list(examples.interchanged.values())).all(0).nonzero()[:, 0]
    assert len(rows) > 2
    with torch.no_grad():
        one = Network(model).interchanged(fmr.Site("hidden"), both, examples.rows(rows))
        sources = {name: given.sources[name][rows] for name in ("x", "y")}
        other = found.intervention(model, given.base[rows], sources=sources)
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("order", "layout"),
    [
        ((1, 0, 2), ("positions", "examples", "units")),
        ((2, 0, 1), ("units", "examples", "positions")),
        ((2, 1, 0), ("units", "positions", "examples")),
        ((0, 2, 1), ("examples", "units", "positions")),
    ],
)
def test_dimensions_may_lie_in_any_order(order: tuple[int, ...], layout: tuple[str, ...]) -> None:
    model, turn = Turned(*order).eval(), subspaces.Basis(rotated()[:, :2])
    plain = search(model, "inner.hidden", turn).evaluate(data(), controls=False)
    found = search(model, fmr.Site("/mul#0", layout=layout), turn).evaluate(data(), controls=False)
    assert found.iia.tolist() == plain.iia.tolist() == [1.0]


@pytest.mark.parametrize("many", [60, 3])
def test_a_site_without_a_dimension_of_examples_in_front_is_refused(many: int) -> None:
    model = Turned(1, 0, 2).eval()
    told = r"holds shape \(3, 2, 8\), with axes \('examples', 'positions', 'units'\), and the batch has 2 examples"
    with pytest.raises(AnalyzerError, match=told + r".*name all: fmr.Site\('/mul#0', layout="):
        search(model, "/mul#0").evaluate(data(many), controls=False)  # as many positions as examples, too


# ---- before anything is trained


def test_another_site_of_another_width_is_refused_before_training() -> None:
    with pytest.raises(AnalyzerError, match=r"vectors of 8 numbers, and .*'out'.* holds 12"):
        search().run(data(), epochs=FOREVER, other="out", progress=False)
    with pytest.raises(AnalyzerError, match=r"vectors of 8 numbers, and .*'out'.* holds 12"):
        search(site=["hidden", "out"]).run(data(), epochs=FOREVER, progress=False)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"logits": "x"}, r"logits='x': expected a function of what the model returns"),
        ({"logits": lambda out: out.argmax(1)[:, None]}, r"shape \(1, 1\) of torch.int64, expected \(1, labels\)"),
        ({"site": {("a", "b", "c"): "hidden"}}, r"The site \('a', 'b', 'c'\) is named by 3: expected one name, or a pair"),
        ({"site": []}, r"site=\[\]: expected a site, or several"),
        ({"site": ["hidden", "hidden"]}, r"expected a site, or several, each once"),
        (
            {"site": fmr.Site("hidden", positions=[[0]] * 60)},
            r"selects a row of positions for each example. Expected a site",
        ),
        ({"site": [3]}, r"site=3: expected one site, ID or path of a module"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(AnalyzerError, match=told):
        search(**given).run(data(), epochs=FOREVER, progress=False)


def test_a_control_lies_elsewhere() -> None:
    with pytest.raises(AnalyzerError, match=r"other='hidden' is where the variables are looked for. Expected another site"):
        search().run(data(), epochs=FOREVER, other="hidden", progress=False)


def test_inference_mode_is_named() -> None:
    with torch.inference_mode(), pytest.raises(AnalyzerError, match=r"made in torch.inference_mode\(\) take no part in"):
        search().run(data(), epochs=FOREVER, progress=False)


def test_examples_that_were_trained_on_are_counted() -> None:
    given = data(200)
    found = search().run(given, given, epochs=1, controls=False, progress=False)
    train, _ = given.split(0.9)
    assert found.examples["trained on"] == given.shared(train) >= len(train)
    assert f"200 held-out examples ({given.shared(train)} of them trained on)" in repr(found)
    assert search().run(given, epochs=1, controls=False, progress=False).examples["trained on"] == 0


def test_positions_that_some_texts_do_not_have_are_refused() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 12)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.embed(input_ids) * 2).mean(1)

    torch.manual_seed(0)
    model, ids = Words().eval(), torch.randint(20, (60, 5))
    mask = torch.ones(60, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    both = {"input_ids": ids, "attention_mask": mask}
    given = replace(data(), base=both, sources={"x": {**both, "attention_mask": mask.flip(0)}})
    with pytest.raises((AnalyzerError, fmr.EditError), match=r"positions"):
        search(model, fmr.Site("embed", positions=[1, 4]), subspaces.Rotation(12, 2)).evaluate(given, controls=False)


def test_a_file_is_no_folder_for_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file cannot be made \(there is a file of that name\). Expected a folder, or the"):
        search().run(data(), epochs=FOREVER, checkpoint=tmp_path / "file", progress=False)


def test_texts_by_name_and_other_things_are_no_inputs() -> None:
    given = replace(data(), base={"text": ["a"] * 60}, sources={"x": {"text": ["b"] * 60}})
    with pytest.raises(AnalyzerError, match=r"encode= returns 'text' as a list. Expected tensors by name"):
        search().evaluate(given)


def test_a_training_needs_a_causal_model() -> None:
    with pytest.raises(AnalyzerError, match=r"causal_model is a NoneType, expected an analyzers.CausalModel"):
        InterchangeTraining(Planted(rotated()).eval(), None, "hidden", subspaces.Units(8, [0]))  # type: ignore[arg-type]


def test_what_is_no_path_is_no_alignment() -> None:
    with pytest.raises(fmr.errors.StoreError, match=r"3 is no path. Expected the name of a file"):
        Alignment.load(3)  # type: ignore[arg-type]


# ---- settings


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "batch": 16, "lr": 0.05, "price": 0.5, "patience": 2, "seed": 3}
    types = {"lr": np.float32, "price": np.float32}
    same = {name: types.get(name, np.int64)(value) for name, value in settings.items()}
    one, other = (search().run(data(), **given, controls=False, progress=False) for given in (settings, same))
    assert one.iia.tolist() == other.iia.tolist()
    other.save(tmp_path / "found")
    assert Alignment.load(tmp_path / "found").settings == other.settings
    with pytest.raises(AnalyzerError, match=r"seed=9223372036854775808: expected a whole number up to 2\*\*62"):
        search().run(data(), seed=2**63, progress=False)


# ---- the control without training


def test_the_untrained_model_is_the_same_one_and_has_its_weights_back() -> None:
    model = Planted(rotated()).eval()
    model.kept = model.out(torch.zeros(1, 8)) + 1.0  # a result with a history, which no copy can be made of
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotation = subspaces.Rotation(8, 2, seed=3)
    found = search(model, space=rotation).run(data(200), epochs=8, lr=0.1, batch=32, progress=False)
    assert found.iia[0] > found.controls["untrained model"] + 0.2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def failing(out: Tensor) -> Tensor:
        if not torch.equal(model.out.weight, before["out.weight"]):
            raise RuntimeError("stopped")
        return out

    with pytest.raises(RuntimeError, match="stopped"):
        search(model, space=subspaces.Units(8, [0]), logits=failing).evaluate(data())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
