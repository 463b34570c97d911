"""Batched from the start: the model's own forward, where its Python is another for each number of examples."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from tests.promises.test_edits import decoder
from tests.sweeps.looped import checked


def by_example(output: Tensor) -> Tensor:
    """One number for each example."""
    return output.flatten(1).double().sum(1)


class Between(nn.Module):
    """Something between two layers."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.what = nn.Linear(4, 4), nn.Linear(4, 3), what

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.what(self.first(x)).tanh())


def units(many: int = 4) -> list[fmr.Site]:
    return [fmr.Site("first", units=unit) for unit in range(many)]


APART: dict[str, Callable[[Tensor], Tensor]] = {
    "by row": lambda x: torch.stack([row * 2 for row in x]),
    "by number": lambda x: torch.cat([x[n : n + 1].exp() for n in range(len(x))]),
    "a list": lambda x: torch.stack(x.unbind(0)[::-1]).flip(0),
}


@pytest.mark.parametrize("what", APART)
@pytest.mark.parametrize("rows", [1, 3, None])
def test_python_over_examples_goes_in_one_forward(what: str, rows: int | None) -> None:
    grid = checked(Between(APART[what]).eval(), torch.randn(2, 4), units(), edits.Scale(3.0), by_example, rows=rows)
    assert grid.how == "batched"
    assert grid.why.startswith("no rows: ")
    assert grid.rows == (rows or 4)


def test_edits_inside_a_kernel_and_of_what_a_module_was_given_go_in_one_forward() -> None:
    model, ids = decoder("sdpa")
    blocks = fmr.locate(fmr.run(model, ids)).attention
    logits = lambda out: out.logits[:, -1, 3]  # noqa: E731
    grid = checked(model, ids, [block.pattern.at(heads=head) for block in blocks for head in (0, 3)], edits.Zero(), logits)
    assert grid.how == "batched"
    assert "lies inside a fused op" in grid.why
    assert grid.values.std() > 0
    grid = checked(model, ids, ["transformer.h.0", "transformer.h.1.mlp"], edits.Skip(), logits)
    assert grid.how == "batched"
    assert "expected the path of a module" in grid.why


MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x + x.roll(1, 0),
    "mean": lambda x: x - x.mean(0),
    "largest": lambda x: x + x[x.norm(dim=1).argmax()],
    "smallest": lambda x: x + x[x.norm(dim=1).argmin()],
    "gather": lambda x: x + x.gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "nan_to_num": lambda x: x.nan_to_num() - x.nan_to_num().mean(0),
    "asked": lambda x: x if x.sum() > 0 else -x,
    "item": lambda x: x * x.max().item(),
    "counted": lambda x: x + len(x.gt(0).nonzero()),
    "size": lambda x: x * 2 if len(x) < 3 else x * 3,
    "number": lambda x: x / len(x),
}


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("what", MIXED)
def test_rows_that_mix_by_values_or_by_python_are_looped_over(what: str, looped: bool) -> None:
    """`looped`: over the examples, so that no replay with rows comes first."""

    def mixing(x: Tensor) -> Tensor:
        return MIXED[what](torch.stack(list(x)) if looped else x)

    for edit in (edits.Scale(30.0), edits.Scale(-30.0), edits.Zero()):
        grid = checked(Between(mixing).eval(), torch.randn(2, 4), units(), edit, by_example)
        assert grid.how == "loop"
        assert grid.why


def test_a_path_that_taint_would_hide_is_the_loops() -> None:
    """NaN is not larger than anything: rows between tainted ones alone would not see the path that an edit opens."""
    model = Between(lambda x: x.sinh() if x.numpy().max() > 5 else x)
    grid = checked(
        model.eval(), torch.rand(2, 4), [{site: edits.Replace(n * 4.0)} for n, site in enumerate(units())], None, by_example
    )
    assert grid.how == "loop"
    assert "the model's Python asks for the number in first/linear#0" in grid.why


def test_values_that_are_asked_above_the_edits_choose_no_path() -> None:
    class Checked(Between):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool((x > -100).all()) else x

    assert checked(Checked(torch.exp).eval(), torch.randn(2, 4), units(), edits.Zero(), by_example).how == "rows"


class Stateful(nn.Module):
    """What a forward leaves in the model: a buffer, an attribute, a number, a list."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.what, self.last = nn.Linear(4, 4), what, torch.zeros(1, 4)
        self.register_buffer("count", torch.zeros(4))
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.what == "buffer":
            self.count += 1
            return h * self.count
        if self.what == "attribute":
            self.last = self.last + 1
            return h + self.last
        if self.what == "number":
            self.calls += 1
            return h * self.calls
        self.seen.append(h)
        return h * len(self.seen)


@pytest.mark.parametrize("what", ["buffer", "attribute", "number"])
def test_what_a_forward_leaves_in_the_model_is_put_back(what: str) -> None:
    model = Stateful(what).eval()
    checked(model, torch.randn(2, 4), units(), edits.Scale(2.0), by_example)
    assert (model.count == 0).all()
    assert (model.last == 0).all()
    assert model.calls == 0
    assert model.last is model.__dict__["last"]


def test_a_model_that_remembers_what_cannot_be_put_back_is_an_error() -> None:
    with pytest.raises(fmr.EditError, match="gives another answer to the same inputs when it is called again"):
        fmr.sweep(Stateful("list").eval(), torch.randn(2, 4), units(), edits.Zero(), torch.mean, progress=False)


@pytest.mark.parametrize("kind", ["norm", "dropout"])
def test_models_in_train_mode_are_looped_over_and_left_as_they_were(kind: str) -> None:
    model = Between(nn.BatchNorm1d(4) if kind == "norm" else nn.Dropout(0.5)).train()
    x, before = torch.randn(3, 4), copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    grid = fmr.sweep(model, x, units(), edits.Zero(), lambda out: out.sum(1), progress=False)
    assert grid.how == "loop"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_inside_a_cache_are_copied_for_each_forward_and_stay_as_they_were() -> None:
    model, ids = decoder()
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
    before = cache.layers[0].keys.clone()
    inputs = {"input_ids": ids[:, 3:], "past_key_values": cache}
    sites = [fmr.Site(f"transformer.h.{layer}", positions=t) for layer in range(2) for t in (3, 4, 5)]
    grid = checked(model, inputs, sites, edits.Scale(2.0), lambda out: out.logits[:, -1, 3])
    assert grid.how.startswith("rows")
    assert torch.equal(cache.layers[0].keys, before)


def test_an_empty_cache_that_was_given_stays_empty() -> None:
    from transformers import DynamicCache

    model, ids = decoder()
    cache = DynamicCache()
    inputs = {"input_ids": ids, "past_key_values": cache}
    grid = checked(
        model, inputs, ["transformer.h.0", "transformer.h.1.mlp"], edits.Scale(2.0), lambda out: out.logits[:, -1, 3]
    )
    assert grid.how.startswith("rows")
    assert cache.get_seq_length() == 0


def test_a_model_that_writes_into_its_inputs_gets_a_copy_each_time() -> None:
    class Writes(Between):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return super().forward(x)

    x = torch.randn(2, 4)
    before = x.clone()
    checked(Writes(torch.exp).eval(), x, units(), edits.Zero(), by_example)
    assert torch.equal(x, before)
