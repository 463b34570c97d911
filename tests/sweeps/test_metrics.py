"""Ready-made metrics: the token that a site would mean under padding, and what they and sweeps refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from fmr.errors import EditError, IdError, ReplayError
from fmr.sweeps import kl, log_prob, logit_diff, loss, probability
from fmr.sweeps.metrics import Metric
from tests.promises.test_edits import decoder, padded


def alone(inputs: dict[str, Any], example: int) -> dict[str, Tensor]:
    """One example without its padding."""
    real = inputs["attention_mask"][example].bool()
    return {name: value[example][real][None] for name, value in inputs.items()}


READY: dict[str, Callable[[Any, Any], Metric]] = {
    "logit_diff": lambda model, inputs: logit_diff(3, 5),
    "an earlier one": lambda model, inputs: logit_diff(3, 5, at=2),
    "log_prob": lambda model, inputs: log_prob(3),
    "probability": lambda model, inputs: probability(3),
    "of several": lambda model, inputs: probability([[3, 5]]),
    "kl": lambda model, inputs: kl(model(**{**inputs, "input_ids": inputs["input_ids"] + 1})),
    "loss": lambda model, inputs: loss(inputs["input_ids"]),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", READY)
def test_a_padded_sweep_measures_what_each_example_alone_does(name: str, side: str) -> None:
    model, inputs, _ = padded(side)
    sites = [fmr.Site("model.layers.1", positions=-1), fmr.Site("model.layers.0", positions=2)]
    grid = fmr.sweep(model, inputs, sites, edits.Scale(3.0), READY[name](model, inputs), progress=False)
    assert grid.how.startswith("rows")
    for example in range(len(inputs["input_ids"])):
        one = alone(inputs, example)
        found = fmr.sweep(model, one, sites, edits.Scale(3.0), READY[name](model, one), progress=False)
        torch.testing.assert_close(grid.base[example], found.base[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grid.values[:, example], found.values[:, 0], rtol=1e-4, atol=1e-5)
    assert (grid.values != grid.base).any()


def test_a_token_that_an_example_does_not_have_is_refused() -> None:
    model, inputs, _ = padded("right")
    with pytest.raises(EditError, match=r"at=5: example \d has no such token. Expected one that each example has"):
        fmr.sweep(model, inputs, ["model.layers.0"], edits.Zero(), log_prob(3, at=5), progress=False)


BAD: dict[str, tuple[Metric, str]] = {
    "text": (logit_diff("Brigost", "Lundara"), r"The token 'Brigost' is text, and a metric reads numbers. Expected its ID"),
    "text in a list": (log_prob([1, "Lundara"]), r"The token 'Lundara' is text"),
    "too many": (logit_diff([1, 2, 3], 4), r"The tokens \[1, 2, 3\] have shape \(3,\), and there are 2 examples."),
    "too few": (log_prob([1]), r"The tokens \[1\] have shape \(1,\), and there are 2 examples. Expected one token for all"),
    "outside": (logit_diff(3, 99999), r"There is no token 99999: the logits have 32. Expected 0 to 31."),
    "negative": (log_prob(-1), r"There is no token -1: the logits have 32. Expected 0 to 31."),
    "no whole number": (log_prob(1.5), r"The tokens 1.5 are no token IDs. Expected a whole number"),
    "nothing": (log_prob(None), r"The tokens None are no token IDs."),
    "several": (log_prob([[1, 2], [3, 4]]), r"The tokens .* have shape \(2, 2\), and there are 2 examples."),
    "three of several": (probability([[1], [2], [3]]), r"have shape \(3, 1\), and there are 2 examples."),
    "beyond the end": (probability([[1, 2, 3]], at=4), r"at=4: 3 tokens follow from there, and the logits have 6"),
    "longer than it": (probability([[1] * 7]), r"at=-7: the logits have 6 positions"),
    "at outside": (log_prob(3, at=77), r"at=77: the logits have 6 positions, expected a whole number from -6 to 5."),
    "at text": (logit_diff(3, 4, at="end"), r"at='end': the logits have 6 positions, expected a whole number"),  # type: ignore[arg-type]
    "reference": (kl(torch.zeros(2, 3, 40)), r"The reference has shape \(2, 3, 40\), and the logits have \(2, 6, 32\)."),
    "targets": (loss(torch.zeros(2, 3)), r"The targets are \(2, 3\), expected token IDs of shape \(2, 6\), as input_ids."),
    "None": (lambda output: None, r"The metric returned NoneType, expected one number or one for each of the 2 examples."),  # type: ignore[arg-type, return-value]
    "a tuple": (lambda output: output.logits, r"The metric returned shape \(2, 6, 32\), expected one number or one"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_metric_that_does_not_fit_is_one_clear_error(name: str) -> None:
    model, ids = decoder()
    assert ids.shape == (2, 6)
    metric, message = BAD[name]
    with pytest.raises(EditError, match=message):
        fmr.sweep(model, ids, ["transformer.h.0"], edits.Zero(), metric, progress=False)


def test_logits_without_positions_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    message = r"The logits have shape \(2, 3\), expected \(examples, positions, tokens\). Give a metric of your own"
    for metric in (logit_diff(0, 1), log_prob(1), kl(torch.zeros(2, 3)), loss(torch.zeros(2, 3))):
        with pytest.raises(EditError, match=message):
            fmr.sweep(model, torch.zeros(2, 4), ["0"], edits.Zero(), metric, progress=False)


def test_counts_and_truths_are_numbers() -> None:
    model, ids = decoder()
    for metric in (lambda output: output.logits[:, -1].argmax(-1), lambda output: output.logits[:, -1, 3] > 0):
        grid = fmr.sweep(model, ids, ["transformer.h.0"], edits.Scale(4.0), metric, progress=False)
        assert grid.values.dtype == torch.double
        run = fmr.run(model, ids, edits={"transformer.h.0": edits.Scale(4.0)})
        assert torch.equal(grid.values[0], metric(run.output).double())
        assert grid.table()["value"][0] == float(grid.values.mean())


MISUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a function": (lambda g: {"model": lambda ids: g(ids)}, r"model is function, expected a torch.nn.Module."),
    "a run": (lambda g: {"inputs": fmr.run(g, decoder()[1])}, r"inputs are a Run, expected what the model is called with"),
    "swapped": (
        lambda g: {"edit": log_prob(3), "metric": edits.Zero()},
        r"metric is Zero, expected a function .* The order",
    ),
    "not called": (
        lambda g: {"metric": fmr.sweeps.loss},
        r"metric is loss itself, not what it returns: expected a metric, as loss\(targets\)\. The order",
    ),
    "a kind": (lambda g: {"metric": nn.CrossEntropyLoss}, r"metric is CrossEntropyLoss itself, .* CrossEntropyLoss\(...\)"),
    "two metrics": (lambda g: {"edit": log_prob(3)}, r"edit is LogProb, a metric: expected an edit, as edits.Zero\(\)."),
    "at twice": (lambda g: {"at": 3}, r"at=3 in a sweep with LogProb, which has its own"),
    "at outside": (
        lambda g: {"at": 99, "metric": lambda out: out.logits[:, 0, 3]},
        r"at=99: expected the column of",
    ),
    "at text": (
        lambda g: {"at": "1", "metric": lambda out: out.logits[:, 0, 3]},
        r"at='1': expected the column of",
    ),
}


@pytest.mark.parametrize("name", MISUSED)
def test_a_sweep_refuses_what_its_places_are_not_for(name: str) -> None:
    model, ids = decoder()
    change, message = MISUSED[name]
    given = {"model": model, "inputs": ids, "sites": ["transformer.h.0"], "edit": edits.Zero(), "metric": log_prob(3)}
    with pytest.raises(EditError, match=message):
        fmr.sweep(**{**given, "progress": False, **change(model)})


def test_a_replay_takes_a_run_and_a_mapping() -> None:
    model, ids = decoder()
    with pytest.raises(ReplayError, match=r"run is GPT2LMHeadModel, expected a recorded run: fmr.replay\(fmr.run\("):
        fmr.replay(model, {"transformer.h.0": edits.Zero()})  # type: ignore[arg-type]
    with pytest.raises(EditError, match=r"edits is str, expected a mapping from sites or edges to edits"):
        fmr.replay(fmr.run(model, ids), "transformer.h.0")  # type: ignore[arg-type]


def test_one_key_may_be_frozen_without_a_list() -> None:
    model, ids = decoder()
    run, edit = fmr.run(model, ids), {"transformer.h.0.mlp": edits.Zero()}
    held = fmr.replay(run, edit, freeze="transformer.h.1.mlp").output.logits
    assert torch.equal(held, fmr.replay(run, edit, freeze=["transformer.h.1.mlp"]).output.logits)
    grid = fmr.sweep(model, ids, [edit], None, log_prob(3), freeze="transformer.h.1.mlp", progress=False)
    torch.testing.assert_close(grid.values[0], log_prob(3)(fmr.replay(run, edit, freeze=["transformer.h.1.mlp"]).output))


def test_an_edge_is_for_replays_alone() -> None:
    model, ids = decoder()
    edge = fmr.Edge("transformer.h.0.mlp", "transformer.ln_f")
    message = r"An Edge is no place in the model's own forward.*Expected it in fmr.replay\(run, \{edge: edit\}\)"
    with pytest.raises(IdError, match=message):
        fmr.run(model, ids, edits={edge: edits.Zero()})  # type: ignore[dict-item]
    with pytest.raises(IdError, match=message):
        fmr.sweep(model, ids, [edge], edits.Zero(), log_prob(3), progress=False)  # type: ignore[list-item]


def test_a_bar_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = decoder()
    for progress, shown in ((None, False), (False, False), (True, True)):
        fmr.sweep(model, ids, ["transformer.h.0"] * 3, edits.Zero(), log_prob(3), rows=1, progress=progress)
        assert bool(capsys.readouterr().err) is shown
