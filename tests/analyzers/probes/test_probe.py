"""Probes: what they find where it is known what is there, and what no cut into batches, no padding and no order changes."""

import copy
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor

import fmr
from analyzers import Probe, Probed
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
