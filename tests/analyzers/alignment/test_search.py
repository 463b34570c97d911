"""A search finds what was planted, with its size, and its controls find nothing; it leaves the model as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fmr
from analyzers import Alignment, AlignmentSearch, AnalyzerError, CausalModel, Counterfactuals
from analyzers.alignment import training
from fmr import subspaces
from fmr.zoo import world
from tests.analyzers.alignment.models import ByHand, Planted, equality, one_hot, planted, rotated

SITE = fmr.Site("hidden")


def data(n: int = 400, seed: int = 0) -> Counterfactuals:
    return planted().counterfactuals(n, ["x"], encode=one_hot, seed=seed)


def network(turn: Tensor | None = None) -> Planted:
    return Planted(rotated() if turn is None else turn).eval()


def degrees(found: Tensor, true: Tensor) -> float:
    """The largest angle between two spans of orthonormal columns."""
    cosine = torch.linalg.svdvals(found.detach().double().T @ true.double()).min()
    return float(torch.rad2deg(torch.arccos(cosine.clamp(max=1.0))))


def fit(model: torch.nn.Module, space: Any, **settings: Any) -> Alignment:
    given = {"epochs": 10, "lr": 0.1, "batch": 32, "progress": False, "controls": False} | settings
    return AlignmentSearch(model, planted(), SITE, space).run(data(), **given)


# ---- what is found


def test_a_hypothesis_by_hand_is_right_and_its_controls_are_not() -> None:
    model, causal = ByHand().eval(), equality()
    halves = {"wx": subspaces.Units(8, range(4)), "yz": subspaces.Units(8, range(4, 8))}
    found = AlignmentSearch(model, causal, "/relu#0", halves).evaluate(causal.counterfactuals(200), other="first")
    assert found.iia.tolist() == found.changed.tolist() == [1.0]
    assert found.task == 1.0
    assert found.ignored == 0.5
    assert found.ignored_changed == 0.0
    assert list(found.controls) == ["random subspace", "placebo", "another site", "untrained model"]
    assert found.controls["another site"] == 1.0  # what the units are made of
    for name in ("random subspace", "placebo", "untrained model"):
        assert found.controls[name] < 0.75, name
    assert repr(found).splitlines()[0] == "Alignment of wx and yz: interchange accuracy 1.000 at Site('/relu#0')"
    assert repr(found).splitlines()[-1] == "  wx in 4 coordinates, yz in 4 coordinates, nothing trained; seed 0"
    swapped = {"wx": halves["yz"], "yz": halves["wx"]}
    wrong = AlignmentSearch(model, causal, "/relu#0", swapped).evaluate(causal.counterfactuals(200), controls=False)
    assert wrong.iia[0] < 0.8


def test_a_planted_subspace_is_recovered() -> None:
    model, rotation = network(), subspaces.Rotation(8, 2, seed=3)
    before = rotation.columns.detach().clone()
    found = fit(model, rotation, epochs=15, controls=True)
    assert found.iia[0] >= 0.97
    assert found.changed[0] >= 0.97
    assert found.task == 1.0
    assert list(found.controls) == ["random subspace", "placebo", "shuffled labels", "untrained model"]
    assert max(found.controls_changed.values()) < 0.6
    assert degrees(found.intervention.parts[0].matrix, model.turn[:, :2]) < 5
    assert torch.equal(rotation.columns, before)  # a copy was trained
    assert "15 of 15 epochs over 287 examples, batch 32, lr 0.1 falling to 0, seed 0" in repr(found)


def test_boundless_finds_how_many_directions_it_takes() -> None:
    model = network()
    found = fit(model, subspaces.Boundless(8, temperature=2.0, seed=1))
    space = found.intervention.parts[0]
    assert found.sizes == {"x": 2}
    assert space.directions == 2
    assert space.temperature == 0
    assert found.iia[0] >= 0.97
    assert degrees(space.matrix[:, :2], model.turn[:, :2]) < 5


def test_a_mask_finds_planted_units() -> None:
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    model = network(torch.eye(8)[:, order])
    found = fit(model, subspaces.Mask(8))
    weights = found.intervention.parts[0].weights
    assert sorted(weights.nonzero()[:, 0].tolist()) == sorted(model.turn[:, :2].argmax(0).tolist())
    assert found.iia[0] == 1.0


def test_two_variables_have_parts_of_one_rotation() -> None:
    model, causal, rotation = network(), planted(), subspaces.Rotation(8, 5, seed=3)
    both = causal.counterfactuals(400, encode=one_hot, seed=0)
    search = AlignmentSearch(model, causal, SITE, {"x": rotation[:2], "y": rotation[2:]})
    found = search.run(both, epochs=8, lr=0.1, batch=32, controls=False, progress=False)
    assert found.iia[0] >= 0.97
    assert found.sizes == {"x": 2, "y": 3}
    matrix = found.intervention.parts[0].space.matrix
    assert degrees(matrix[:, :2], model.turn[:, :2]) < 10
    assert degrees(matrix[:, 2:], model.turn[:, 2:5]) < 10


def test_the_intervention_says_the_same_as_the_search() -> None:
    model, causal = network(), planted()
    spaces = {"x": subspaces.Basis(model.turn[:, :2]), "y": subspaces.Basis(model.turn[:, 2:5])}
    both = causal.counterfactuals(60, encode=one_hot, subsets=[["x", "y"]])
    found = AlignmentSearch(model, causal, SITE, spaces).evaluate(both, controls=False)
    run = found.intervention.run(model, both.base, sources=dict(both.sources))
    assert found.iia[0] == float((run.output.argmax(-1) == both.labels).double().mean()) == 1.0


def test_a_sweep_is_a_map_and_its_best_site_has_the_controls(tmp_path: Path) -> None:
    model, causal = network(), planted()
    sites = {("early", "hidden"): "hidden", ("early", "again"): "hidden/linear#0"}
    found = AlignmentSearch(model, causal, sites, subspaces.Rotation(8, 2)).run(
        data(200), epochs=3, lr=0.1, batch=32, progress=False
    )
    assert found.map.shape == (1, 2)
    assert found.iia[0] == found.iia[1]  # the same value under two names, from the same seed
    assert found.controls["another site"] == found.iia[1 - found.best]
    assert found.table().what.tolist() == ["early hidden", "early again", *found.controls, "no interchange"]
    found.plot()
    found.save(tmp_path / "found")
    again = Alignment.load(tmp_path / "found")
    assert repr(again) == repr(found)
    assert again.table().equals(found.table())
    matrices = [one.intervention.parts[0].matrix for one in (again, found)]
    assert torch.equal(*matrices)


def test_one_site_is_drawn_as_bars() -> None:
    found = AlignmentSearch(network(), planted(), SITE, subspaces.Units(8, [0])).evaluate(data(40))
    texts = [label.get_text() for label in found.plot().axes[0].get_yticklabels()]
    assert texts == ["no interchange", "untrained model", "placebo", "random subspace", "hidden"]


# ---- what is left as it was


def test_the_model_and_the_state_of_random_numbers_are_left_alone() -> None:
    model = network()
    model.out.weight.requires_grad_(False)
    before, state = {name: one.clone() for name, one in model.state_dict().items()}, torch.get_rng_state()
    fit(model, subspaces.Rotation(8, 2), epochs=1, controls=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert [one.requires_grad for one in model.parameters()] == [True, False]
    assert all(one.grad is None for one in model.parameters())


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, again, other = (fit(network(), subspaces.Rotation(8, 2), epochs=2, seed=seed).losses for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("space", [subspaces.Rotation(8, 2, seed=1), subspaces.Boundless(8, temperature=2.0)])
@pytest.mark.parametrize("steps", [4, 13, 31])
def test_a_search_that_was_killed_goes_on_to_the_same_numbers(
    space: Any, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "BETWEEN", 0.0)  # a checkpoint at each step
    settings: dict[str, Any] = {"epochs": 3, "batch": 64, "controls": True}
    whole = fit(network(), space, **settings)
    taken, plain = 0, torch.optim.Adam.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == steps:
            raise Killed
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        with pytest.raises(Killed):
            fit(network(), space, checkpoint=tmp_path / "here", **settings)
    taken = 0
    again = fit(network(), space, checkpoint=tmp_path / "here", **settings)
    assert again.table().equals(whole.table())
    assert (again.losses == whole.losses).all()
    ends = [one.intervention.state_dict() for one in (again, whole)]
    assert all(torch.equal(one, ends[1][name]) for name, one in ends[0].items())


def test_training_stops_early_and_keeps_the_best_epoch() -> None:
    found = fit(network(), subspaces.Rotation(8, 2), epochs=40, lr=0.8, patience=2)
    epochs = len(found.losses)
    assert epochs < 40
    assert found.losses[:, 1].argmin() == epochs - 3
    assert f"{epochs} of 40 epochs" in repr(found)


# ---- what is refused


def refused(match: str, space: Any = None, given: Any = None, site: Any = SITE, model: Any = None, **settings: Any) -> None:
    with pytest.raises(AnalyzerError, match=match):
        AlignmentSearch(model or network(), planted(), site, subspaces.Rotation(8, 2) if space is None else space).run(
            data(40) if given is None else given, **{"progress": False, "epochs": 1} | settings
        )


def test_a_subspace_of_another_width_is_refused() -> None:
    refused(
        r"The subspace is one of vectors of 16 numbers, and Site\('hidden'\) holds 8. Expected one of that width, as "
        r"subspaces.Rotation\(8, ...\).",
        subspaces.Rotation(16, 2),
    )


def test_labels_that_the_network_has_no_score_of_are_refused() -> None:
    far = planted().counterfactuals(40, ["x"], encode=one_hot, label=lambda out: out + 1)
    refused(r"The data have the label 12, and the network scores 12 labels. Expected 0 to 11: say which they are", given=far)


def test_variables_without_a_subspace_are_refused() -> None:
    both = planted().counterfactuals(40, encode=one_hot)
    rotation = subspaces.Rotation(8, 4)
    refused(
        r"The data interchange 'y', and the subspaces are those of x. Expected a subspace for each", {"x": rotation}, both
    )
    refused(r"The data interchange 'x' and 'y', and there is one subspace. Expected one for each", rotation, both)
    with pytest.raises(AnalyzerError, match=r"There is no variable 'z'. Expected one of a, b, x, y, out"):
        AlignmentSearch(network(), planted(), SITE, {"z": rotation})


def test_subspaces_that_overlap_are_refused() -> None:
    rotation = subspaces.Rotation(8, 4)
    refused(
        r"The subspaces of 'x' and 'y' overlap: coordinates 1. Expected parts that share nothing",
        {"x": rotation[:2], "y": rotation[1:]},
    )
    refused("overlap: each is trained by itself", {"x": rotation, "y": subspaces.Rotation(8, 2)})
    refused(
        "overlap: directions of both have a cosine of 1.00", {"x": subspaces.Units(8, [1]), "y": subspaces.Units(8, [1])}
    )
    refused(r"subspace=\{\}: expected a subspace for each variable", {})
    refused(r"The subspace of 'x' is 3: expected one of fmr.subspaces", {"x": 3})


def test_sites_are_refused_that_are_none_or_mean_examples() -> None:
    refused(r"site=\[\]: expected a site, or several", site=[])
    refused(r"selects examples or passes. Expected a site that means the same in every example", site=SITE.at(examples=0))


def test_data_that_leave_nothing_to_hold_out_are_refused() -> None:
    refused("Data of 1 example has no part to hold out", given=data(1))
    refused(r"held_out=1: expected a share of the data between 0 and 1, as 0.2, or test=", held_out=1)


def test_settings_are_refused_that_cannot_be() -> None:
    refused("epochs=0: expected a whole number from 1 on", epochs=0)
    refused("patience=0: expected a whole number from 1 on", patience=0)
    refused("lr=-1: expected a number above 0", lr=-1)
    refused("price=-1: expected a number from 0 on", price=-1)
    refused("is in train mode", model=network().train())


def test_texts_need_a_tokenizer_and_sources_the_length_of_their_base() -> None:
    causal = CausalModel({"a": range(3)}, {"x": lambda a: a, "out": lambda x: x})
    texts = causal.counterfactuals(20, ["x"], encode=lambda inputs: f"say {inputs['a']}")
    with pytest.raises(AnalyzerError, match=r"The data are texts, as 'say \d', and there is no tokenizer. Pass one"):
        AlignmentSearch(network(), causal, SITE, subspaces.Rotation(8, 2)).run(texts)


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "checkpoint": tmp_path}
    fit(network(), subspaces.Rotation(8, 2), **settings)
    with pytest.raises(AnalyzerError, match=r"is a checkpoint of something else: lr was 0.1 and is 0.2. Expected the same"):
        fit(network(), subspaces.Rotation(8, 2), lr=0.2, **settings)
    (tmp_path / "site 0.safetensors").write_bytes(b"nothing")
    with pytest.raises(AnalyzerError, match=r"is no checkpoint \(.*\). Expected another folder: checkpoint="):
        fit(network(), subspaces.Rotation(8, 2), **settings)


def test_output_without_scores_of_labels_is_refused() -> None:
    with pytest.raises(AnalyzerError, match=r"The scores of labels have shape \(1,\), expected \(1, labels\)"):
        AlignmentSearch(network(), planted(), SITE, subspaces.Rotation(8, 2), logits=lambda out: out[:, 0]).evaluate(
            data(20)
        )


# ---- language models, from text


def cities() -> tuple[Any, Any, CausalModel, Counterfactuals]:
    """A model that knows where people grew up, and interchanges of the city."""
    model, tokenizer = fmr.zoo.load("facts")
    known = [fact for fact in world.facts() if fact.prompt.endswith("grew up in")]
    known = [fact for fact in known if len(tokenizer(fact.prompt)["input_ids"]) == 6][:12]
    lives = {fact.subject: fact.answer for fact in known}
    causal = CausalModel({"who": list(lives)}, {"city": lives.__getitem__, "out": lambda city: city}, {"city": ["who"]})
    data = causal.counterfactuals(
        16,
        ["city"],
        encode=lambda inputs: f"{inputs['who']} grew up in",
        label=lambda out: tokenizer(out, add_special_tokens=False)["input_ids"][0],
    )
    return model, tokenizer, causal, data


def test_a_sweep_over_layers_and_positions_of_a_language_model() -> None:
    model, tokenizer, causal, data = cities()
    structure = fmr.locate(fmr.run(model, **tokenizer(data.base[0], return_tensors="pt")))
    places = {"first name": 1, "last name": 2, "in": -1}
    sites = {(n, what): structure.layers[n].resid_post.at(positions=at) for n in (0, 3) for what, at in places.items()}
    whole = subspaces.Units(128, range(128))
    found = AlignmentSearch(model, causal, sites, whole, tokenizer=tokenizer).evaluate(data, controls=False)
    assert found.task == 1.0
    assert found.map.shape == (2, 3)
    assert found.map[0, 1] > 0.8  # the name is put together at its last token
    assert found.map[1, 2] == 1.0  # all of the answer
    assert found.map[0, 2] < 0.7
    assert found.map[1, 0] == found.map[1, 1] == found.ignored
    picture = found.plot().axes[0]
    assert [label.get_text() for label in picture.get_xticklabels()] == list(places)


def test_sources_of_other_lengths_are_refused_where_all_positions_are_meant() -> None:
    model, tokenizer, causal, data = cities()
    shorter = [text if row % 2 else f"The birthplace of {text.removesuffix(' grew up in')} is" for row, text in
               enumerate(data.base)]  # fmt: skip
    other = replace(data, base=shorter)
    site, space = "transformer.h.0", subspaces.Units(128, range(128))
    search = AlignmentSearch(model, causal, site, space, tokenizer=tokenizer)
    with pytest.raises(
        AnalyzerError, match=r"Example 0 has 7 tokens, and its source for 'city' 6, so that the positions of"
    ):
        search.evaluate(other)
    last = AlignmentSearch(model, causal, fmr.Site(site).at(positions=-1), space, tokenizer=tokenizer)
    assert last.evaluate(other, controls=False).iia.shape == (1,)


def test_a_checkpoint_says_all_that_it_was_made_with(tmp_path: Path) -> None:
    given = data(60)
    settings: dict[str, Any] = {"epochs": 1, "checkpoint": tmp_path, "progress": False, "controls": False}

    def search(one: Counterfactuals = given, temperature: float = 1.0, **others: Any) -> None:
        AlignmentSearch(network(), planted(), SITE, subspaces.Boundless(8, temperature), **others).run(one, **settings)

    search()
    search()
    other = replace(given, sources={"x": given.sources["x"].roll(1, 0)})
    for change, told in (
        (lambda: search(temperature=50.0), "temperature"),
        (lambda: search(other), "data"),
        (lambda: search(logits=lambda out: 2 * out), "logits"),
    ):
        with pytest.raises(AnalyzerError, match=f"is a checkpoint of something else: {told} was"):
            change()


def test_parts_of_parts_are_told_apart_by_what_they_are_of_the_whole() -> None:
    rotation = subspaces.Rotation(8)
    AlignmentSearch(network(), planted(), SITE, {"x": rotation[4:][:2], "y": rotation[:2]})
    with pytest.raises(AnalyzerError, match=r"overlap: coordinates 4, 5"):
        AlignmentSearch(network(), planted(), SITE, {"x": rotation[4:][:2], "y": rotation[4:6]})
    with pytest.raises(
        AnalyzerError, match=r"has a row for each example. Expected one that means the same in every example"
    ):
        AlignmentSearch(network(), planted(), SITE, rotation[[[0, 1], [2, 3]]])


def test_an_autoencoder_is_tested_and_not_trained() -> None:
    encoder = torch.nn.Linear(8, 8)
    latents = subspaces.Latents(encoder, torch.nn.Linear(8, 8), 8, 8, module=encoder)
    found = AlignmentSearch(network(), planted(), SITE, latents[:4]).run(data(40), controls=False, progress=False)
    assert not len(found.losses)
    assert encoder.weight.grad is None


def test_what_gives_no_numbers_or_no_gradient_is_refused() -> None:
    with pytest.raises(AnalyzerError, match=r"The scores of labels hold NaN. Expected numbers"):
        AlignmentSearch(network(), planted(), SITE, subspaces.Units(8, [0]), logits=lambda out: out * float("nan")).evaluate(
            data(20)
        )
    hard = subspaces.Mask(8, temperature=0.0)
    refused(r"No gradient flows from the scores to what is trained. .*not hard yet \(temperature above 0\)", hard)
    refused(r"The data are a dict, expected Counterfactuals: causal_model.counterfactuals", given={"a": 1})
    refused(r"selects examples or passes. Expected a site that means the same", other=SITE.at(examples=[0]))
