"""A sweep is the loop over its runs, whichever way it took; where rows would mix it says so and takes another way."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from fmr.errors import EditError
from fmr.sweeps import kl, log_prob, logit_diff, loss, probability
from fmr.sweeps.grid import Grid
from tests.models import ZOO
from tests.promises.test_edits import decoder, padded
from tests.sweeps.looped import checked

LANGUAGE = ["gpt2", "gpt2_eager", "llama", "mixtral"]


def looped(model: nn.Module, inputs: Any, sites: Any, edit: Any, metric: Any) -> Tensor:
    """The same, one run after the other."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    values = []
    for one in sites:
        several = one if isinstance(one, tuple) else (one,)
        values.append(metric(fmr.run(model, *args, keep=(), edits=dict.fromkeys(several, edit), **kwargs).output))
    return torch.stack(values)


def close(grid: Grid, expected: Tensor) -> bool:
    scale = float(expected.abs().max()) or 1.0
    return float((grid.values - expected).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("examples", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_restores_at_every_layer_and_position_are_the_loop(attention: str, examples: int) -> None:
    model, ids = decoder(attention)
    ids = ids[:examples]
    clean = fmr.run(model, ids.flip(1))
    sites = [fmr.Site(f"transformer.h.{layer}", positions=t) for layer in range(2) for t in range(6)]
    metric = logit_diff(3, 5)
    grid = fmr.sweep(model, ids, sites, edits.Interchange(clean), metric, progress=False)
    assert grid.how == "rows, cut"
    assert close(grid, looped(model, ids, sites, edits.Interchange(clean), metric))
    assert grid.forwards == 4
    assert torch.equal(grid.base, metric(fmr.run(model, ids).output))


@pytest.mark.parametrize("rows", [1, 5, None])
def test_chunks_of_any_size_give_the_same(rows: int | None) -> None:
    model, ids = decoder()
    sites = [fmr.locate(fmr.run(model, ids)).attention[layer].z.at(heads=head) for layer in range(2) for head in range(4)]
    for metric in (
        log_prob(3),
        log_prob(3, at=2),
        probability(3),
        probability([[3, 5]]),
        kl(fmr.run(model, ids).output),
        loss(ids),
    ):
        grid = fmr.sweep(model, ids, sites, edits.Zero(), metric, rows=rows, progress=False)
        assert close(grid, looped(model, ids, sites, edits.Zero(), metric))


def test_several_sites_in_a_row_and_a_custom_edit() -> None:
    model, ids = decoder()
    sites = [("transformer.h.0.mlp", fmr.Site("transformer.h.1", positions=t)) for t in range(6)]

    def half(value: Tensor, context: object) -> Tensor:
        return value * 0.5 + value.mean(-1, keepdim=True)

    grid = fmr.sweep(model, ids, sites, half, logit_diff(1, 2), progress=False)
    assert close(grid, looped(model, ids, sites, half, logit_diff(1, 2)))
    assert grid.how.startswith("rows")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    model, inputs, _ = padded(side)
    sites = [fmr.Site(f"model.layers.{layer}", positions=t) for layer in range(2) for t in (0, 2, -1)]

    def metric(output: Any) -> Tensor:
        return log_prob(3, at=4)(output)

    grid = fmr.sweep(model, inputs, sites, edits.Scale(2.0), metric, at=4, progress=False)
    assert close(grid, looped(model, inputs, sites, edits.Scale(2.0), metric))
    assert grid.how.startswith("rows")


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("inner_backward", "shared", "parts")])
def test_whatever_the_model_a_sweep_is_the_loop(name: str) -> None:
    model, args, kwargs = ZOO[name]()
    model.eval()
    run = fmr.run(model, *args, **kwargs)
    nodes = [n for n in run.graph.nodes if not n.id.is_source and n.op not in ("opaque", "alias") and -1 not in n.shape]
    sites = [node.id for node in nodes if node.dtype.is_floating_point][:: max(1, len(nodes) // 5)]

    def metric(output: Any) -> Tensor:
        return sum(tensor.double().nan_to_num().square().sum() for _, tensor in fmr.nests.leaves(fmr.nests.taken(output)))

    if args and kwargs:
        model, args, kwargs = Bound(model, args, kwargs), args, {}
        sites = [f"model.{site}" if not site.startswith("/") else f"model{site}" for site in sites]
    inputs: Any = kwargs or args
    try:
        grid = fmr.sweep(model, inputs, sites, edits.Scale(0.9), metric, progress=False)
    except EditError as error:
        pytest.skip(f"an edit that the model itself refuses: {error}")

    def twin() -> nn.Module:  # some write into their buffers
        return model if name == "scripted" else copy.deepcopy(model)

    expected = [metric(fmr.run(twin(), *args, keep=(), edits={site: edits.Scale(0.9)}, **kwargs).output) for site in sites]
    assert close(grid, torch.stack(expected)), (grid.how, grid.why)


class Bound(nn.Module):
    """A model with named arguments that stay."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.model, self.kwargs = model, kwargs

    def forward(self, *args: Any) -> Any:
        return self.model(*args, **self.kwargs)


class Mixing(nn.Module):
    """Rows that do not stay apart."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(4, 4), nn.Linear(4, 3), mix
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)).tanh())


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x + x.roll(1, 0),
    "mean": lambda x: x - x.mean(0),
    "sort": lambda x: x.sort(0).values,
    "last": lambda x: x + x[-1:],
    "first": lambda x: x + x[:1],
    "stale": lambda x: x + x[torch.arange(2), torch.zeros(2, dtype=torch.long)][:1, None],
    "treated": lambda x: x.nan_to_num(),
    "asked": lambda x: x if not x.isnan().any() else torch.zeros_like(x),
    "norm": lambda x: x[x.norm(dim=1).argmax()] + x,
    "folded": lambda x: x.view(2, -1)[:, :4].repeat_interleave(len(x) // 2, 0) + x,
}


@pytest.mark.parametrize("mix", MIXES)
def test_rows_that_mix_are_found_out_and_the_answer_is_the_loop(mix: str) -> None:
    torch.manual_seed(1)
    model, x = Mixing(MIXES[mix]).eval(), torch.randn(2, 4)
    sites = [fmr.Site("first", units=unit) for unit in range(4)]
    grid = fmr.sweep(model, x, sites, edits.Zero(), lambda out: out[:, 0], progress=False)
    assert close(grid, looped(model, x, sites, edits.Zero(), lambda out: out[:, 0]))
    assert grid.how == "loop" or mix in ("treated", "asked", "stale", "first")
    assert bool(grid.why) == (grid.how != "rows, cut")


def test_state_that_a_model_keeps_and_the_random_state_are_left() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    x = torch.randn(5, 4)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    grid = fmr.sweep(model, x, ["0", "1"], edits.Scale(0.5), lambda out: out.sum(), progress=False)
    assert grid.how == "loop"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_grid_prints_and_tabulates() -> None:
    model, ids = decoder()
    grid = fmr.sweep(model, ids, ["transformer.h.0", "transformer.h.1"], edits.Zero(), logit_diff(3, 5), progress=False)
    assert repr(grid).startswith("Grid of 2 edited runs by rows, cut, 2 at once: values ")
    table = grid.table()
    assert list(table.columns) == ["site", "value", "change"]
    assert table["change"].tolist() == pytest.approx([v - float(grid.base.mean()) for v in grid.values.mean(1).tolist()])


@pytest.mark.parametrize(
    ("sites", "metric", "message"),
    [
        ([], logit_diff(1, 2), "sites is empty"),
        (["transformer.h.0"], lambda out: out.logits, r"The metric returned shape \(2, 6, 32\), expected one number"),
        (["transformer.h.9"], logit_diff(1, 2), "h.9"),
    ],
)
def test_what_cannot_be_swept_is_one_clear_error(sites: Any, metric: Any, message: str) -> None:
    model, ids = decoder()
    with pytest.raises(fmr.FmrError, match=message):
        fmr.sweep(model, ids, sites, edits.Zero(), metric, progress=False)


@pytest.mark.parametrize("rows", [4, None])
def test_examples_that_one_loud_one_doubles_are_the_loop(rows: int | None) -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x * (1 + (x > 50).any(0).float())

    told = [-900.0, *range(1, 15), 60, 61, *range(1, 15)]
    asked = [{fmr.Site("a", units=1): edits.Replace(float(value))} for value in told]
    checked(Loud().eval(), torch.ones(1, 4), asked, None, lambda out: out.double().sum(1), rows=rows)
