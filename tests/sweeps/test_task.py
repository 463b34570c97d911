"""What a sweep can be asked: pairs of inputs, edits of each row's own, memory; and what it refuses in words."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from fmr.sweeps import budget, logit_diff
from fmr.sweeps.onreplay import OnReplay
from fmr.sweeps.rowrun import RowRun
from fmr.sweeps.task import Task
from tests.promises.test_edits import decoder
from tests.sweeps.looped import checked


def metric(output: Any) -> Tensor:
    """One number for each example."""
    return output.logits[:, -1, 3]


def test_pairs_of_clean_and_corrupted_inputs_in_one_call_are_the_pairs_one_by_one() -> None:
    model, clean = decoder()
    corrupted = clean.flip(1)
    sites = [fmr.Site(f"transformer.h.{layer}", positions=t) for layer in range(2) for t in range(6)]
    grid = fmr.sweep(model, corrupted, sites, edits.Interchange(clean), metric, progress=False)
    assert grid.how == "rows, cut"
    assert grid.forwards == 5  # the clean run, the corrupted one, it with an example more, two cells besides
    assert grid.values.shape == (12, 2)
    for pair in range(2):
        one = slice(pair, pair + 1)
        alone = fmr.sweep(model, corrupted[one], sites, edits.Interchange(clean[one]), metric, progress=False)
        torch.testing.assert_close(grid.values[:, one], alone.values, rtol=1e-5, atol=1e-6)
    run = fmr.run(model, clean)
    assert torch.equal(
        grid.values, fmr.sweep(model, corrupted, sites, edits.Interchange(run), metric, progress=False).values
    )


def test_pairs_that_are_padded_differently_keep_their_positions() -> None:
    model, ids = decoder()
    left = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    corrupted = {"input_ids": ids.flip(1), "attention_mask": left, "position_ids": (left.cumsum(1) - 1).clamp(min=0)}
    clean = {**corrupted, "input_ids": ids}
    sites = [fmr.Site(f"transformer.h.{layer}", positions=t) for layer in range(2) for t in (0, 2, -1)]
    grid = checked(model, corrupted, sites, edits.Interchange(fmr.run(model, **clean)), metric)
    assert grid.how.startswith("rows")
    again = fmr.sweep(model, corrupted, sites, edits.Interchange(clean), metric, progress=False)
    assert torch.equal(again.values, grid.values)


@pytest.mark.parametrize("rows", [2, None])
def test_rows_with_edits_of_their_own(rows: int | None) -> None:
    model, ids = decoder()
    site, other = fmr.Site("transformer.h.0", positions=2), fmr.Site("transformer.h.1.mlp", units=slice(4))
    asked = [{site: edits.Scale(float(n))} for n in range(4)] + [
        {site: edits.Noise(0.1), other: [edits.Zero(), edits.Add(1.0)]}
    ]
    grid = checked(model, ids, asked, None, metric, rows=rows)
    assert grid.how == "rows, cut"
    assert grid.sites[4] == (site, other)
    torch.testing.assert_close(grid.values[1], grid.base, rtol=1e-5, atol=1e-6)
    assert len(set(grid.values[:, 0].tolist())) == 5


def test_corruption_by_noise_and_restored_states_are_one_sweep() -> None:
    model, ids = decoder()
    noise, clean = {fmr.Site("transformer.wte", positions=[1, 2]): edits.Noise(1.0, seed=3)}, fmr.run(model, ids)
    asked = [
        {**noise, fmr.Site(f"transformer.h.{layer}", positions=t): edits.Interchange(clean)}
        for layer in range(2)
        for t in range(6)
    ]
    grid = checked(model, ids, asked, None, metric)
    assert grid.how == "rows, cut"
    corrupted = metric(fmr.run(model, ids, edits=noise).output)
    torch.testing.assert_close(grid.values[11], grid.base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grid.values[0], corrupted, rtol=1e-4, atol=1e-5)


def test_values_have_no_gradients_and_a_metric_may_compute_some() -> None:
    model, ids = decoder()
    factor = torch.tensor(0.5, requires_grad=True)
    grid = fmr.sweep(model, ids, ["transformer.h.0"], edits.Scale(factor), metric, progress=False)
    assert not grid.values.requires_grad

    def slope(output: Any) -> Tensor:
        return torch.autograd.grad(output.logits.square().sum(), model.lm_head.weight)[0].norm()

    sites = [fmr.Site(f"transformer.h.{layer}", positions=t) for layer in range(2) for t in range(3)]
    grid = fmr.sweep(model, ids, sites, edits.Scale(0.5), slope, progress=False)
    by_hand = [slope(fmr.run(model, ids, edits={site: edits.Scale(0.5)}, grad=True).output) for site in sites]
    assert (grid.how, grid.why) == ("loop", "no rows: the metric asks for gradients, which rows would share")
    assert torch.equal(grid.values, torch.stack(by_hand))
    assert not grid.values.requires_grad
    assert model.lm_head.weight.grad is None

    def of_the_edit(output: Any) -> Tensor:
        return torch.autograd.grad(output.logits.sum(), factor)[0]

    with pytest.raises(fmr.EditError, match=r"The metric asks for gradients of what has none in a run of its own"):
        fmr.sweep(model, ids, ["transformer.h.0"], edits.Scale(factor), of_the_edit, progress=False)


# ---- memory


@pytest.mark.parametrize("most", [2**14, 2**16, 2**30])
def test_as_many_rows_go_at_once_as_fit_into_the_stated_share(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MOST", most)
    model, ids = decoder()
    sites = [fmr.Site(f"transformer.h.{layer}", units=n) for layer in range(2) for n in range(6)]
    graph = fmr.run(model, ids).graph
    row = budget.peak_of(graph, {graph.module(f"transformer.h.{layer}").output.id for layer in range(2)})
    grid = checked(model, ids, sites, edits.Scale(2.0), metric)
    assert grid.rows == max(1, min(12, most // row - budget.SENTINELS))
    assert f"{grid.rows} at once" in repr(grid)
    assert (grid.rows + budget.SENTINELS) * row <= most or grid.rows == 1
    assert grid.rows in ((12,) if most > 2**20 else range(12))


def test_a_sweep_allocates_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MOST", 2**19)
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 2)).eval(),
        torch.randn(4, 64),
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        grid = fmr.sweep(
            model, x, [fmr.Site("0", units=n) for n in range(200)], edits.Zero(), lambda out: out[:, 0], progress=False
        )
    assert 1 < grid.rows < 200
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    assert most < 2 * 2**19 + 200 * 4 * 8 + 2**19


def test_nothing_of_a_sweep_waits_for_the_garbage_collector() -> None:
    model, ids = decoder("eager")
    sites = [fmr.Site(f"transformer.h.{layer}", positions=t) for layer in range(2) for t in range(6)]
    gc.collect()
    before = {id(one) for one in gc.get_objects()}  # other tests keep runs
    gc.disable()
    try:
        grid = fmr.sweep(model, ids, sites, edits.Zero(), metric, progress=False)
        made = [one for one in gc.get_objects() if id(one) not in before]
        left = [type(one).__name__ for one in made if type(one) in (RowRun, OnReplay, Task, fmr.Run)]
    finally:
        gc.enable()
    assert (grid.how, left) == ("rows, cut", [])


# ---- what is refused


@pytest.mark.parametrize(
    ("sites", "edit", "measure", "more", "message"),
    [
        ([], edits.Zero(), metric, {}, "sites is empty: expected at least one site to edit"),
        ("transformer.h.0", edits.Zero(), metric, {}, r"sites is str, expected a list with what each run edits"),
        ([()], edits.Zero(), metric, {}, r"A run of the sweep edits nothing: \(\)"),
        ([{}], None, metric, {}, r"A run of the sweep edits nothing: \{\}"),
        (["transformer.h.0"], None, metric, {}, r"edit is None, and 'transformer.h.0' has no edit of its own"),
        (["transformer.h.0"], edits.Zero, metric, {}, r"expected one of fmr.edits.*Make one: Zero\(...\)"),
        (["transformer.h.7"], edits.Zero(), metric, {}, "transformer.h.7"),
        (["transformer.h.0/nothing#3"], edits.Zero(), metric, {}, "nothing#3"),
        (
            [fmr.Site("transformer.h.0", positions=6)],
            edits.Zero(),
            metric,
            {},
            r"positions=6\) lies nowhere: 'transformer.h.0' has shape \(2, 6, 16\) and no position 6 among",
        ),
        ([fmr.Site("transformer.h.0", units=16)], edits.Zero(), metric, {}, r"units=16, but .* expected indices below 16"),
        ([fmr.Site("transformer.h.0", heads=0)], edits.Zero(), metric, {}, "selects heads, but"),
        (["transformer.h.0"], edits.Zero(), lambda out: out.logits, {}, r"The metric returned shape \(2, 6, 32\)"),
        (["transformer.h.0"], edits.Zero(), lambda out: out.logits[0, 0, :3], {}, r"shape \(3,\), expected one number"),
        (["transformer.h.0"], edits.Zero(), metric, {"rows": 0}, "rows=0: expected how many runs go at once, 1 or more"),
        (["transformer.h.0"], edits.Replace(torch.zeros(5)), metric, {}, r"Replace at .* brings shape \(5,\)"),
        (["transformer.h.0"], lambda value, context: value[0], metric, {}, r"returned torch.float32 \(6, 16\)"),
        (["transformer.h.0"], edits.Interchange(3), metric, {}, r"source of Interchange.* is int, expected a run"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(sites: Any, edit: Any, measure: Any, more: dict[str, Any], message: str) -> None:
    model, ids = decoder()
    with pytest.raises(fmr.FmrError, match=message):
        fmr.sweep(model, ids, sites, edit, measure, progress=False, **more)


def test_inputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(fmr.EditError, match="inputs hold no tensor with examples"):
        fmr.sweep(nn.Identity(), (1, "a"), ["x"], edits.Zero(), torch.mean, progress=False)


def test_an_error_of_the_users_edit_is_the_users() -> None:
    model, ids = decoder()

    def wrong(value: Tensor, context: object) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fmr.sweep(model, ids, ["transformer.h.0"], wrong, logit_diff(1, 2), progress=False)


def test_weights_that_are_moved_in_for_each_call_are_swept_and_replayed() -> None:
    from accelerate import cpu_offload

    model, ids = decoder()
    sites = [fmr.Site(f"transformer.h.{layer}", positions=t) for layer in range(2) for t in range(6)]
    expected = fmr.sweep(model, ids, sites, edits.Scale(2.0), metric, progress=False)
    replayed = fmr.replay(fmr.run(model, ids), {sites[2]: edits.Scale(2.0)}).output.logits
    model.tie_weights()
    cpu_offload(model, execution_device=torch.device("cpu"))
    grid = fmr.sweep(model, ids, sites, edits.Scale(2.0), metric, progress=False)
    torch.testing.assert_close(grid.values, expected.values, rtol=1e-5, atol=1e-6)
    assert grid.how in ("rows, cut", "batched")  # where two moved copies of tied weights lie decides what is seen of them
    run = fmr.run(model, ids)
    assert torch.equal(fmr.replay(run, {sites[2]: edits.Scale(2.0)}).output.logits, replayed)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("direct", [False, True])
def test_path_patching_is_the_replay_with_the_same_values_frozen(direct: bool, attention: str) -> None:
    model, ids = decoder(attention)
    run, other = fmr.run(model, ids), fmr.run(model, ids.flip(1))
    structure = fmr.locate(run)
    blocks = structure.attention
    sites = [block.z.at(heads=head) for block in blocks for head in range(4)]
    freeze = [block.z for block in blocks] + ([block.out for block in structure.mlps] if direct else [])
    grid = fmr.sweep(model, ids, sites, edits.Interchange(other), metric, freeze=freeze, progress=False)
    assert grid.how == "rows, cut"
    for site, value in zip(sites, grid.values, strict=True):
        others = [key for key in freeze if key.id != site.id]
        others += [block.z.at(heads=[h for h in range(4) if h != site.heads]) for block in blocks if block.z.id == site.id]
        again = fmr.replay(run, {site: edits.Interchange(other)}, freeze=others)
        torch.testing.assert_close(value, metric(again.output), rtol=1e-5, atol=1e-6)
    loose = fmr.sweep(model, ids, sites, edits.Interchange(other), metric, progress=False)
    assert not torch.allclose(loose.values[:4], grid.values[:4])


def test_what_is_frozen_is_held_whichever_way_a_sweep_goes() -> None:
    model, ids = decoder("sdpa")
    blocks = fmr.locate(fmr.run(model, ids)).attention
    sites = [blocks[0].pattern.at(heads=0), "transformer.h.0.mlp"]
    grid = fmr.sweep(model, ids, sites, edits.Scale(0.5), metric, freeze=["transformer.h.0", blocks[1].z], progress=False)
    assert grid.how == "batched"
    torch.testing.assert_close(grid.values, grid.base.expand(2, 2), rtol=1e-5, atol=1e-6)
    with pytest.raises(fmr.EditError, match=r"freeze=Site\(.* in a sweep: expected whole values"):
        fmr.sweep(model, ids, sites, edits.Zero(), metric, freeze=[blocks[1].z.at(heads=1)], progress=False)


# ---- edits that all runs have


def test_edits_of_every_run_are_part_of_each_row_and_of_what_rows_are_compared_with() -> None:
    model, ids = decoder()
    clean = fmr.run(model, ids)
    noise = {fmr.Site("transformer.wte/embedding#0", positions=[1, 2]): edits.Scale(3.0)}
    places = [fmr.Site(f"transformer.h.{layer}", positions=t) for layer in range(2) for t in range(6)]
    rows = [{place: edits.Interchange(clean)} for place in [*places, fmr.Site("transformer.wte/embedding#0", positions=1)]]
    grid = fmr.sweep(model, ids, rows, None, metric, base=noise, progress=False)
    assert grid.how == "rows, cut"
    assert torch.equal(grid.base, metric(fmr.run(model, ids, edits=noise).output))
    for row, values in zip(rows, grid.values, strict=True):
        torch.testing.assert_close(values, metric(fmr.run(model, ids, edits=noise | row).output), rtol=1e-5, atol=1e-6)


def test_edits_of_every_run_behind_a_row_act_on_what_the_row_makes() -> None:
    model, ids = decoder()
    always, rows = {"transformer.h.1.mlp": edits.Scale(0.5)}, [fmr.Site("transformer.h.0", positions=t) for t in range(6)]
    grid = fmr.sweep(model, ids, rows, edits.Scale(2.0), metric, base=always, progress=False)
    assert "is edited in every run, and depends on what rows edit" in grid.why
    for row, values in zip(rows, grid.values, strict=True):
        expected = metric(fmr.run(model, ids, edits={row: edits.Scale(2.0), **always}).output)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
