"""Probes: what they find where it is known what is there, and what no cut into batches, no padding and no order changes."""

import copy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, Probe, Probed
from fmr import edits, subspaces
from fmr.ids import Site
from tests.analyzers.probes.models import WIDE, Two, Words, padded

matplotlib.use("Agg")

USED, UNUSED = 1, 0


def drawn(n: int = 300, seed: int = 0) -> Tensor:
    return torch.randn(n, WIDE, generator=torch.Generator().manual_seed(seed))


def of(variable: int, n: int = 300, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with the sign of one of them as their label."""
    x = drawn(n, seed)
    return {"x": x, "labels": (x[:, variable] > 0).long()}


def cut(batch: dict[str, Tensor], *sizes: int) -> list[dict[str, Tensor]]:
    pieces = {name: value.split(list(sizes)) for name, value in batch.items()}
    return [{name: parts[n] for name, parts in pieces.items()} for n in range(len(sizes))]


def same(one: Probed, other: Probed) -> bool:
    return (one.accuracy == other.accuracy).all() and (one.control == other.control).all()


def words(n: int = 60, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of tokens, each with its parity as its label."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 20, (int(torch.randint(2, 7, (), generator=draw)),), generator=draw).tolist() for _ in range(n)]
    return rows, [[token % 2 for token in row] for row in rows]


# ---- what it finds, and whether the model uses it


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("variable", [USED, UNUSED])
def test_a_probe_finds_a_variable_whether_or_not_it_is_used(kind: str, variable: int) -> None:
    found = Probe(Two().eval(), sites="norm", kind=kind).update(of(variable)).result()
    assert found.accuracy[0] > 0.97
    assert found.selectivity[0] > 0.3
    assert abs(found.control[0] - 0.5) < 0.2
    noise = {"x": drawn(), "labels": torch.randint(2, (300,))}
    assert abs(Probe(Two().eval(), sites="norm", kind=kind).update(noise).result().accuracy[0] - 0.5) < 0.15


@pytest.mark.parametrize(("variable", "is_used"), [(USED, True), (UNUSED, False)])
def test_within_its_subspace_the_output_changes_only_if_the_model_uses_it(variable: int, is_used: bool) -> None:
    """The dissociation: both variables are told alike, and one of them is never read."""
    model = Two().eval()
    found = Probe(model, sites="norm", ridge=1e-3).update(of(variable)).result()
    assert found.accuracy[0] > 0.97
    within = found.subspace("norm")
    assert abs(within.vectors[:, 0] @ model.turn[variable]) > 0.99
    base, source = drawn(40, seed=1), drawn(40, seed=2)
    run = fmr.run(model, base)
    for edit in (edits.Interchange(fmr.run(model, source), within=within), edits.Zero(within=within)):
        changed = (fmr.run(model, base, edits={"norm": edit}).output - run.output).abs().mean()
        assert (changed > 0.2) if is_used else (changed < 0.05)


def test_without_its_subspace_a_probe_is_at_chance_and_along_it_decisions_flip() -> None:
    model, batch, fresh = Two().eval(), of(USED), of(USED, 200, seed=1)
    found = Probe(model, sites="norm").update(batch).result()
    within = found.subspace("norm")

    def told(edit: Any) -> Tensor:
        run = fmr.run(model, fresh["x"], edits={"norm": edit})
        return found.predict("norm", run["norm"])

    assert (told(edits.Add(0.0, within=within)) == fresh["labels"]).float().mean() > 0.97
    assert len(told(edits.Zero(within=within)).unique()) == 1
    assert bool((told(edits.Add(4.0, within=within)) == 1).all())
    assert bool((told(edits.Add(-4.0, within=within)) == 0).all())


def test_several_classes_span_one_direction_less() -> None:
    x = drawn()
    batch = {"x": x, "labels": (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long() + 7}
    found = Probe(Two().eval(), sites={"state": "norm"}).update(batch).result()
    assert found.classes == (7, 8, 9, 10)
    assert found.accuracy[0] > 0.95
    assert found.directions("state").shape == (4, WIDE)
    basis = found.subspace("state")
    assert (basis.width, basis.size) == (WIDE, 3)
    assert isinstance(basis, subspaces.Basis)
    state = fmr.run(Two().eval(), x)["norm"]
    assert len(found.predict("state", basis.write(state, torch.zeros(len(x), 3))).unique()) == 1


def test_a_control_of_few_types_is_learned_by_heart() -> None:
    """Tokens that have vectors of their own: a wide probe tells any label of them, so that it selects nothing."""
    model = Words(words=20, wide=64).eval()
    rows, labels = words(120)
    found = Probe(model, sites="vectors").update(padded(rows, "right", labels)).result()
    assert found.accuracy[0] == found.control[0] == 1
    assert found.types == 19
    narrow = Probe(Words(words=20, wide=2).eval(), sites="vectors").update(padded(rows, "right", labels)).result()
    assert narrow.control[0] < 0.9


def test_types_may_be_given() -> None:
    batch = of(USED) | {"kinds": torch.arange(300) % 4}
    found = Probe(Two().eval(), sites="norm", types="kinds").update(batch).result()
    assert found.types == 4
    assert "whole inputs" not in repr(found)


# ---- batches, shards, order, padding


def test_batches_shards_and_order_change_nothing() -> None:
    model, whole = Two().eval(), of(USED)
    once = Probe(model, sites="norm").update(whole).result()
    pieces = cut(whole, 100, 7, 193)
    streamed = Probe(model, sites="norm").over(reversed(pieces), progress=False).result()
    merged = Probe(model, sites="norm").merge(Probe(model, sites="norm").update(pieces[2])).merge(
        Probe(model, sites="norm").over(pieces[:2], progress=False)
    ).result()  # fmt: skip
    for other in (streamed, merged):
        assert same(once, other)
        assert torch.allclose(once.directions("norm"), other.directions("norm"), atol=1e-4)


def test_of_many_rows_those_are_kept_that_content_chooses() -> None:
    model, whole = Two().eval(), of(USED)
    kept = [Probe(model, sites="norm", most=90).over(pieces, progress=False) for pieces in (
        [whole], cut(whole, 20, 20, 200, 60), cut(whole, 20, 20, 200, 60)[::-1], cut(whole, *[10] * 30),
    )]  # fmt: skip
    assert {tuple(one.sample.rows().examples.tolist()) for one in kept} == {tuple(kept[0].sample.rows().examples.tolist())}
    found = kept[0].result()
    assert found.train + found.test == 90
    assert "of 300 that came by" in repr(found)
    assert all(same(found, one.result()) for one in kept)


def test_no_example_is_on_both_sides_and_equal_ones_are_on_one() -> None:
    rows, labels = words(40)
    probe = Probe(Words().eval(), sites="vectors")
    probe.update(padded(rows, "right", labels)).update(padded(rows[::-1], "left", labels[::-1]))
    kept = probe.sample.rows()
    test = kept.held_out(0.25, seed=0)
    assert not set(kept.examples[test]) & set(kept.examples[~test])
    assert len(set(kept.examples)) == len({tuple(row) for row in rows})
    assert len(kept) == 2 * sum(map(len, rows))
    other = kept.held_out(0.25, seed=1)
    assert 0.1 < test.mean() < 0.4
    assert (test != other).any()


@pytest.mark.parametrize("per", ["token", "example"])
def test_the_side_of_the_padding_changes_nothing(per: str) -> None:
    rows, labels = words()
    found = []
    for side in ("left", "right"):
        batch = padded(rows, side, labels)
        if per == "example":
            batch["labels"] = torch.tensor([row[-1] for row in labels])
        probe = Probe(Words(wide=24).eval(), sites=["layers.0", "layers.1"]).update(batch)
        found.append(probe.result())
        assert bool((probe.sample.rows().vectors["layers.1"].abs() < 100).all())
    assert same(*found)
    assert found[0].train + found[0].test == (sum(map(len, rows)) if per == "token" else len(rows))
    assert found[0].accuracy[0] > 0.8


def test_a_label_of_an_example_is_read_at_the_position_that_is_named() -> None:
    rows, labels = words()
    batch = padded(rows, "left") | {"labels": torch.tensor([row[0] for row in labels])}
    model, site = Words(wide=64).eval(), Site("layers.1")
    first = Probe(model, sites=site, position=0).update(batch).result()
    assert first.accuracy[0] > 0.9
    assert Probe(model, sites=[site.at(positions=0)]).update(batch).result().accuracy[0] == first.accuracy[0]
    assert Probe(model, sites=[site]).update(batch).result().accuracy[0] < 0.8


def test_labels_of_none_are_not_counted() -> None:
    batch = of(USED)
    batch["labels"][::3] = -100
    assert Probe(Two().eval(), sites="norm").update(batch).counted == "200 examples"


# ---- precision, seeds, what is left as it was


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_same(dtype: torch.dtype) -> None:
    model, batch = Two().eval(), of(USED)
    plain = Probe(model, sites="norm").update(batch).result()
    found = Probe(model.to(dtype), sites="norm").update(batch | {"x": batch["x"].to(dtype)}).result()
    assert found.accuracy[0] > 0.97
    assert abs(found.accuracy[0] - plain.accuracy[0]) < 0.05
    run = fmr.run(model, batch["x"].to(dtype), edits={"norm": edits.Zero(within=found.subspace("norm"))})
    assert len(found.predict("norm", run["norm"].double()).unique()) <= 2


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_seed_gives_the_same_again_and_leaves_the_worlds_alone(kind: str) -> None:
    model, batch = Two(), of(USED, 120)
    model.eval().turn.requires_grad_(False)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    weights = copy.deepcopy(model.state_dict())
    one, again, other = (Probe(model, sites="norm", kind=kind, seed=seed).update(batch).result() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.turn.grad is None
    assert not model.turn.requires_grad
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(one.fits["norm"][name], again.fits["norm"][name]) for name in one.fits["norm"])
    assert not torch.equal(one.fits["norm"]["0.weight"], other.fits["norm"]["0.weight"])
    with torch.inference_mode():
        assert same(one, Probe(model, sites="norm", kind=kind).update(batch).result())


def test_regression_is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    probe = Probe(Two().eval(), sites="norm", held_out=0.3).update(of(USED))
    rows = probe.sample.rows()
    train = ~rows.held_out(0.3, 0)
    x, y = rows.vectors["norm"][torch.as_tensor(train)].double().numpy(), rows.labels[train]
    x = (x - x.mean(0)) / x.std(0)
    right = LogisticRegression(C=1.0, tol=1e-8).fit(x, y)
    weights = probe.result().directions("norm").double()
    apart = (weights[1] - weights[0]).numpy() * rows.vectors["norm"][torch.as_tensor(train)].double().numpy().std(0)
    # two rows of weights share what one has, at half the price
    assert np.corrcoef(apart, right.coef_[0])[0, 1] > 0.999


# ---- sites


def test_every_layer_of_a_model_is_read_where_no_sites_are_named(loaded: tuple[nn.Module, Any]) -> None:
    from fmr.zoo import world

    model, tokenizer = loaded
    texts = [fact.prompt for fact in world.facts()[::40]]
    labels = [int(text.endswith("is")) for text in texts]
    probe = Probe(model, tokenizer, ridge=10.0).over(
        [{"text": texts[n : n + 32], "labels": labels[n : n + 32]} for n in range(0, len(texts), 32)], progress=False
    )
    found = probe.result()
    assert found.names == tuple(f"layers[{n}].resid_post" for n in range(4))
    assert found.table().layer.tolist() == [0, 1, 2, 3]
    assert found.accuracy.min() > 0.95
    assert found.directions(probe.sites["layers[2].resid_post"]).shape == (2, 128)


def test_a_stack_without_a_stream_is_read_at_the_states_that_it_passes_on() -> None:
    task = fmr.zoo.tasks.equality(200, seed=0)
    batch = {"x": task.inputs, "labels": task.left}
    found = Probe(fmr.zoo.load("equality-mlp").model).update(batch).result()
    assert found.names == ("input:x", "/relu#0", "/relu#1", "/relu#2", "output/linear#0")
    assert found.accuracy[2] > 0.95 > 0.75 > found.accuracy[0]


class Headed(nn.Module):
    """Values laid out as (examples, heads, positions, units), and as positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.first = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        heads = self.heads(x.unflatten(-1, (4, 3)).transpose(1, 2))
        last: Tensor = self.first(heads.transpose(1, 2).flatten(2).transpose(0, 1))
        return last


def test_heads_and_layouts_are_read_as_they_are_named() -> None:
    x = torch.randn(60, 5, WIDE)
    batch = {"x": x, "labels": (x[:, :, 0] > 0).long()}
    first = Site("first", layout=("positions", "examples", "units"))
    sites = {"all": Site("heads"), "mine": Site("heads", heads=0), "others": Site("heads", heads=[1, 2, 3]), "first": first}
    found = Probe(Headed().eval(), sites=sites).update(batch).result()
    accuracy = dict(zip(found.names, found.accuracy, strict=True))
    assert {name: len(fit["center"]) for name, fit in found.fits.items()} == {"all": 12, "mine": 3, "others": 9, "first": 12}
    assert min(accuracy["all"], accuracy["mine"], accuracy["first"]) > 0.9 > 0.65 > accuracy["others"]
    assert found.types == 300


# ---- the result


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_result_is_written_and_read_again(kind: str, tmp_path: Path) -> None:
    batch = of(USED, 120)
    found = Probe(Two().eval(), sites={"state": "norm"}, kind=kind, epochs=3).update(batch).result()
    found.save(tmp_path / "probe.safetensors")
    again = Probed.load(tmp_path / "probe.safetensors")
    assert repr(again) == repr(found)
    assert again.table().equals(found.table())
    assert torch.equal(again.predict("state", batch["x"]), found.predict("state", batch["x"]))


def test_a_result_says_what_it_is() -> None:
    found = Probe(Two().eval(), sites="norm", kind="mlp", width=8, epochs=2, seed=3).update(of(USED, 120)).result()
    assert repr(found).splitlines()[0] == (
        "Probed: 1 site, 2 classes, mlp probes, 8 hidden units, 2 epochs, ridge 1, seed 3"
    )
    assert f"fitted to {found.train} examples, tested on {found.test}; majority {found.majority:.3f}" in repr(found)
    assert "the control is of whole inputs, each on one side" in repr(found)
    assert list(found.table().columns) == [
        "site", "accuracy", "control", "selectivity", "majority", "on train", "control by heart", "classes", "train", "test",
    ]  # fmt: skip


def test_a_picture_has_both_lines_and_chance() -> None:
    found = Probe(Two().eval(), sites=["norm", "/relu#0"][:1]).update(of(USED, 120)).result()
    (ax,) = found.plot().axes
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in ax.lines}
    assert drawn == {
        "labels": found.accuracy.tolist(), "control task": found.control.tolist(),
        "most frequent label": [found.majority, found.majority],
    }  # fmt: skip


# ---- bad input


def wrong(told: str) -> Any:
    return pytest.raises(AnalyzerError, match=told)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "svm"}, r"kind='svm': expected 'linear' or 'mlp'"),
        ({"kind": "mlp", "width": 0}, r"width=0: expected a whole number from 1 on"),
        ({"held_out": 1.0}, r"held_out=1.0: expected a share between 0 and 1, such as 0.25"),
        ({"ridge": 0}, r"ridge=0: expected a number above 0, such as 1.0"),
        ({"position": "last"}, r"position='last': expected the number of a token, such as 0 or -1"),
        ({"sites": []}, r"sites=\[\]: expected sites, IDs or paths of modules, each once"),
        ({"sites": ["norm", "norm"]}, r"sites=\['norm', 'norm'\]: expected sites, IDs or paths of modules, each once"),
        ({"sites": 3}, r"sites=3: expected sites, IDs or paths of modules"),
    ],
)
def test_a_wrong_setting_is_told_so(settings: dict[str, Any], told: str) -> None:
    with wrong(told):
        Probe(Two(), **settings)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (None, r"The batch holds x, and no 'labels'\. Expected it beside the model's arguments"),
        (torch.ones(9).long(), r"'labels' has shape \(9,\), and the batch has 10 examples\. Expected one for each, \(10,\)"),
        (
            torch.rand(10),
            r"'labels' holds float32, expected whole numbers, one for each class\. Cut quantities into classes",
        ),
        (["a"] * 10, r"'labels' is a list of what are no numbers, expected the number of a class"),
        (torch.ones(10, 5).long(), r"one for each token, and 'norm' has axes \('examples', 'units'\), without positions"),
    ],
)
def test_wrong_labels_are_told_so(labels: Any, told: str) -> None:
    with wrong(told):
        Probe(Two().eval(), sites="norm").update({"x": drawn(10)} | ({} if labels is None else {"labels": labels}))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([3] * 12, r"all 12 labels counted are 3\. Expected two classes or more, of several examples each"),
        (list(range(12)), r"12 labels counted are of 12 classes\. Expected several of each: more data, or fewer classes"),
        ([0] * 11 + [1], r"None of 12 examples is held out at held_out=1e-12\. Expected more examples, or a larger share"),
    ],
)
def test_labels_that_nothing_can_be_fitted_to_are_told_so(labels: list[int], told: str) -> None:
    with wrong(told):
        Probe(Two().eval(), sites="norm", held_out=1e-12).update({"x": drawn(12), "labels": labels}).result()


def test_what_is_no_batch_with_labels_is_told_so() -> None:
    with wrong(r"A batch is a Tensor, expected a mapping with the model's arguments and its labels: \{'input_ids'"):
        Probe(Two().eval(), sites="norm", labels="y").update(drawn(3))  # type: ignore[arg-type]
    with wrong(r"'kinds' has shape \(10, 1\), expected \(10,\), as 'labels' has"):
        Probe(Two().eval(), sites="norm", types="kinds").update(of(0, 10) | {"kinds": torch.ones(10, 1).long()})


def test_a_site_that_a_probe_cannot_read_is_told_so() -> None:
    rows, labels = words(8)
    batch = padded(rows, "right", labels)
    model = Words().eval()
    with wrong(r"'input:input_ids' holds int64 numbers, expected a tensor of floats, such as a layer's output"):
        Probe(model, sites="input:input_ids").update(batch)
    with wrong(r"'param:vectors.weight' has shape .* expected those of 8 examples and of units"):
        Probe(model, sites="param:vectors.weight").update(batch | {"labels": torch.ones(8).long()})
    with wrong(r"selects 2 positions, and there is one label for each example\. Expected one position, as site"):
        Probe(model, sites=Site("layers.0", positions=[0, 1])).update(batch | {"labels": torch.ones(8).long()})
    with wrong(r"The labels have 9 positions, and 'layers.0' has 6\. Expected one label for each column of the inputs"):
        Probe(model, sites="layers.0").update(batch | {"labels": torch.ones(8, 9).long()})


def test_numbers_that_are_not_finite_are_told_so() -> None:
    x = drawn(10)
    x[3, 4] = float("nan")
    with wrong(r"'norm' holds numbers that are not finite"):
        Probe(Two().eval(), sites="norm").update({"x": x, "labels": [0, 1] * 5})


def test_a_result_before_anything_was_counted_is_told_so() -> None:
    with wrong(r"Nothing has been counted yet\. Call update\(batch\) or over\(batches\) before result\(\)"):
        Probe(Two()).result()


def test_probes_that_do_not_belong_together_are_told_so() -> None:
    model = Two().eval()
    one = Probe(model, sites="norm").update(of(USED, 20))
    with wrong("merge got int, expected another Probe"):
        one.merge(3)  # type: ignore[arg-type]
    with wrong("merge of seed=0 with 1: expected one value. Use one Probe per model and setting"):
        one.merge(Probe(model, sites="norm", seed=1))
    with wrong("merge of sites norm with input:x"):
        one.merge(Probe(model, sites="input:x").update(of(USED, 20)))
    rows, labels = words(20)
    reader = Words().eval()
    tokens = Probe(reader, sites="vectors").update(padded(rows, "left", labels))
    with wrong("merge of labels one for each example with labels one for each token: expected one kind"):
        texts = padded(rows, "left") | {"labels": torch.arange(20) % 2}
        Probe(reader, sites="vectors").update(texts).merge(tokens)
    with wrong("The labels are one for each example, those of earlier batches one for each token"):
        tokens.update(padded(rows, "left") | {"labels": torch.ones(20).long()})


def test_what_a_result_does_not_have_is_told_so() -> None:
    found = Probe(Two().eval(), sites="norm", kind="mlp", epochs=1).update(of(USED, 60)).result()
    with wrong(r"The probe is of kind 'mlp', which has no directions\. Expected kind='linear'"):
        found.subspace("norm")
    with wrong(r"'layers' was not probed\. Expected one of 'norm'"):
        found.predict("layers", drawn(2))
    with wrong(r"Values of shape \[2, 3\]: the probe of 'norm' reads a tensor \(\.\.\., 12\), as run\[site\] gives it"):
        found.predict("norm", torch.ones(2, 3))
    with wrong(r"Values are a ndarray: the probe of 'norm' reads a tensor"):
        found.predict("norm", np.ones((2, 12)))  # type: ignore[arg-type]


def test_a_batch_that_says_two_things_is_refused() -> None:
    model = Two().eval()
    with wrong(r"labels='labels' and types='labels': expected two keys of the batch, or types=None"):
        Probe(model, types="labels").update(of(USED, 20))
    with wrong(r"'labels' has shape \(0,\), and the batch has 20 examples"):
        Probe(model, sites="norm").update(of(USED, 20) | {"labels": []})
    with wrong(r"The batch holds texts beside mask. Expected texts alone, or the model's arguments"):
        Probe(model).update({"texts": ["a", "b"], "mask": torch.ones(2), "labels": [0, 1]})


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "ridge": np.float32(0.5),
        "held_out": np.float64(0.3),
        "seed": np.int64(1),
        "width": np.int32(4),
    }
    found = Probe(Two().eval(), sites="norm", **settings).update(of(USED, 60)).result()
    plain = {name: value.item() for name, value in settings.items()}
    assert same(found, Probe(Two().eval(), sites="norm", **plain).update(of(USED, 60)).result())
    found.save(tmp_path / "probed.safetensors")
    assert repr(Probed.load(tmp_path / "probed.safetensors")) == repr(found)


def test_a_trained_network_tells_a_variable_where_it_has_no_more_use_for_it() -> None:
    """The last layer of the equality network holds whether the first pair is equal, and the output does not read it."""
    model = fmr.zoo.load("equality-mlp").model
    task, fresh, source = (fmr.zoo.tasks.equality(400, seed=seed) for seed in (0, 1, 2))
    found = Probe(model, sites=["/relu#0", "/relu#2"]).update({"x": task.inputs, "labels": task.left}).result()
    assert found.accuracy.min() > 0.95
    assert found.selectivity.min() > 0.3
    said = fmr.run(model, fresh.inputs).output.argmax(-1)
    changed = {}
    for site in found.names:
        swap = edits.Interchange(source.inputs, within=found.subspace(site))
        now = fmr.run(model, fresh.inputs, edits={site: swap}).output.argmax(-1)
        changed[site] = float((now != said).double().mean())
    assert changed["/relu#0"] > 0.15
    assert changed["/relu#2"] < 0.02


def test_merging_probes_of_other_widths_is_refused_and_changes_nothing() -> None:
    ones = [Probe(nn.Identity().eval(), sites="input:input").update({"input": torch.randn(20, wide), "labels": [0, 1] * 10})
            for wide in (3, 5)]  # fmt: skip
    with pytest.raises(AnalyzerError, match=r"merge of 'input:input' with 3 numbers and with 5: expected as many"):
        ones[0].merge(ones[1])
    assert ones[0].counted == "20 examples"


def test_what_is_labelled_by_token_has_a_type_that_is_no_mask() -> None:
    class Embedded(nn.Module):
        def forward(self, attention_mask: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
            return inputs_embeds * 1.5

    mask, vectors = torch.ones(20, 3).long(), torch.randn(20, 3, 4)
    batch = {"attention_mask": mask, "inputs_embeds": vectors, "labels": torch.randint(2, (20, 3))}
    assert Probe(Embedded().eval(), sites="/mul#0").update(batch).result().types > 1
    with pytest.raises(AnalyzerError, match=r"No input holds one thing for each of 3 positions.*Expected types="):
        Probe(nn.Unflatten(1, (3, 4)).eval(), sites="/unflatten#0").update(
            {"input": torch.randn(20, 12), "labels": torch.randint(2, (20, 3))}
        )
