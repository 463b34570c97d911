"""Dates of what changes in a training, and none of what only swings."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import fmr
from analyzers import AnalyzerError, Timeline
from analyzers.compare.timeline import date

matplotlib.use("Agg")


def trained(steps: int = 60, every: int = 3) -> fmr.Run:
    """A net that learns the sum of four numbers."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with fmr.track(net, keep=["", "input:input"], every=every) as run:
        for _ in range(steps):
            x = torch.randn(64, 4, generator=draw)
            optimizer.zero_grad()
            (net(x)[:, 0] - x.sum(1)).square().mean().backward()
            optimizer.step()
    return run


def loss(one: fmr.runs.passes.Pass) -> tuple[float, float]:
    x, out = one["input:input"], one[""][:, 0]
    return float((out - x.sum(1)).square().mean()), float((out - x.sum(1).flip(0)).square().mean())


def test_scores_have_the_steps_of_their_passes_a_null_and_a_date() -> None:
    found = Timeline.of(trained(), {"loss": loss, "noise": lambda one: float(one["input:input"].mean())})
    assert found.steps == tuple(range(0, 60, 3))
    values, nulls = found.values["loss"], found.nulls["loss"]
    assert values[0] > 1
    assert values[-1] < 0.01 < 1 < nulls[-1]
    assert found.dates["loss"] in range(3, 16)
    assert values[found.steps.index(found.dates["loss"])] < values[0] / 2 + 0.1
    assert found.dates["noise"] is None
    assert "no change beyond its swings" in repr(found)
    assert list(found.table().columns) == ["loss", "noise", "loss null"]


def test_it_is_saved_and_drawn(tmp_path: Path) -> None:
    found = Timeline.of(trained(), {"loss": loss})
    found.save(tmp_path / "line.safetensors")
    again = Timeline.load(tmp_path / "line.safetensors")
    assert again.dates == found.dates
    assert (again.values["loss"] == found.values["loss"]).all()
    axes = found.plot().axes[0]
    assert [text.get_text() for text in axes.texts] == [str(found.dates["loss"])]
    assert axes.lines[0].get_xydata()[:, 1] == pytest.approx(found.values["loss"])


@pytest.mark.parametrize(
    ("curve", "found"),
    [
        ([0, 0, 0, 1, 1, 1], 3),
        ([1, 1, 0, 0, 0, 0], 2),
        ([0, 1, 0, 1, 1, 1], 3),
        ([0, 0, 0, 0, 0, 0], None),
        ([0, 1, 0, 1, 0, 1], None),
        ([0, 0, float("nan"), 1, 1, 1], None),
    ],
)
def test_a_date_is_where_half_the_way_is_left_behind_for_good(curve: list[float], found: int | None) -> None:
    assert date(tuple(range(6)), np.array(curve, float)) == found


def test_what_is_no_training_is_refused() -> None:
    with pytest.raises(AnalyzerError, match=r"Timeline.of got a int, expected the run of a block: with fmr.track\(net"):
        Timeline.of(3, {"loss": loss})  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match="The run has 2 passes, expected 4 or more"):
        Timeline.of(trained(4), {"loss": loss})
    with pytest.raises(AnalyzerError, match="expected functions of a pass by name"):
        Timeline.of(trained(12), {})
    with pytest.raises(AnalyzerError, match=r"The score 'out' gave a Tensor .* Expected a number, or a number and its null"):
        Timeline.of(trained(12), {"out": lambda one: one[""]})


def test_a_score_that_is_not_finite_says_where() -> None:
    curve = np.array([1.0, 0.5, np.nan, 0.1, np.inf])
    told = repr(Timeline((0, 10, 20, 30, 40), {"loss": curve}, {}, {"loss": date((0, 10, 20, 30, 40), curve)}))
    assert "loss  1 to inf: not finite at step 20, and no date" in told
