"""Counterfactual data say what an algorithm says by hand, in balance, and as a network takes them."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from analyzers import AnalyzerError, CausalModel, Counterfactuals
from tests.analyzers.alignment.models import by_hand, equality, sums


def settings(data: Counterfactuals, row: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The inputs of an example: of the base, and of the source of each variable that is interchanged."""
    read = {of: {name: column[row] for name, column in part.items()} for of, part in data.settings.items() if of != "output"}
    taken = [name for name, is_taken in zip(data.variables, data.interchanged[row].tolist(), strict=True) if is_taken]
    return read["base"], {name: read[name] for name in taken}


@pytest.mark.parametrize(
    ("make", "variables"), [(equality, ["wx", "yz"]), (sums, ["right"]), (sums, ["left", "right", "b"])]
)
@pytest.mark.parametrize("balanced", [True, False])
def test_labels_are_those_by_hand(make: Callable[[], CausalModel], variables: list[str], balanced: bool) -> None:
    model = make()
    data = model.counterfactuals(60, variables, balanced=balanced, seed=2)
    values = model.values(model.output)
    assert data.interchanged.any(1).all()
    for row in range(len(data)):
        base, sources = settings(data, row)
        taken = {name: by_hand(model, source, {})[name] for name, source in sources.items()}
        assert data.base_labels[row] == values.index(by_hand(model, base, {})[model.output])
        assert data.labels[row] == values.index(by_hand(model, base, taken)[model.output])


def test_bases_and_changes_are_in_balance() -> None:
    model = equality(range(50))
    data = model.counterfactuals(200, ["wx"], seed=0)
    assert int(data.changed.sum()) == 100
    assert int(data.base_labels.sum()) == 100
    assert 60 <= int(data.labels.sum()) <= 140
    assert int(model.counterfactuals(200, ["wx"], changed=0.25).changed.sum()) == 50
    assert int(model.counterfactuals(200, ["wx"], balanced=False).changed.sum()) < 20
    assert repr(data) == (
        "Counterfactuals: 200 examples, wx interchanged\n"
        "  the label changes in 50.0 %; of the base it is 0 in 50.0 %, 1 in 50.0 %"
    )


def test_a_base_that_cannot_change_is_not_asked_to() -> None:
    model = CausalModel({"a": range(2), "b": range(2)}, {"x": lambda a: a, "out": lambda x, b: 2 if b else x})
    data = model.counterfactuals(100, ["x"])
    assert int(data.changed.sum()) == 50
    assert 2 not in data.base_labels[data.changed]


def test_the_same_seed_gives_the_same_examples() -> None:
    first, again, other = (sums().counterfactuals(30, seed=seed) for seed in (1, 1, 2))
    assert first.settings == again.settings
    assert torch.equal(first.labels, again.labels)
    assert first.settings != other.settings


def test_subsets_say_what_is_interchanged_together() -> None:
    model = equality()
    assert {tuple(row) for row in model.counterfactuals(60).interchanged.tolist()} == {
        (True, False),
        (False, True),
        (True, True),
    }
    assert model.counterfactuals(20, subsets=[("wx", "yz")]).interchanged.all()
    one = model.counterfactuals(60, subsets=["wx", "yz"]).interchanged
    assert (one.sum(1) == 1).all()
    assert one.any(0).all()


def test_examples_are_batches_of_a_loader() -> None:
    data = equality().counterfactuals(
        12, ["wx"], encode=lambda inputs: {"ids": torch.tensor([*inputs.values()]), "words": f"{inputs['a']} {inputs['b']}"}
    )
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert batch["base"]["ids"].shape == (4, 4)
    assert batch["base"]["words"] == data[:4]["base"]["words"]
    for name, one in (("label", data.labels), ("base_label", data.base_labels), ("interchanged", data.interchanged)):
        assert torch.equal(batch[name], one[:4])
    assert torch.equal(batch["sources"]["wx"]["ids"], data[torch.arange(4)]["sources"]["wx"]["ids"])
    assert data[-1]["label"] == data.labels[11]
    with pytest.raises(IndexError, match="Example 12 of 12: expected 0 to 11"):
        data[12]
    with pytest.raises(FrozenInstanceError):
        data.labels = data.base_labels  # type: ignore[misc]


def test_numbers_are_rows_and_columns_are_encoded_at_once() -> None:
    plain = equality().counterfactuals(10, ["wx"], seed=3)
    assert plain.base.dtype == torch.float32
    assert plain.base.tolist() == [list(row) for row in zip(*plain.settings["base"].values(), strict=True)]
    at_once = equality(columns="torch").counterfactuals(
        10, ["wx"], seed=3, encode=lambda inputs: torch.stack([*inputs.values()], 1)
    )
    assert torch.equal(plain.base, at_once.base.float())
    assert torch.equal(plain.sources["wx"], at_once.sources["wx"].float())


def test_a_label_is_what_is_asked_for() -> None:
    data = equality().counterfactuals(20, ["wx"], label=lambda value: 262 if value else 407)
    assert set(data.labels.tolist()) == {262, 407}
    assert int(data.changed.sum()) == 10


@pytest.mark.parametrize("make", [equality, sums])
def test_no_example_is_on_both_sides(make: Callable[[], CausalModel]) -> None:
    data = make().counterfactuals(400, seed=1)
    train, test = data.split(0.75)
    assert abs(len(train) - 300) < 20
    assert len(train) + len(test) == 400
    examples = [{str((settings(part, row), part.interchanged[row])) for row in range(len(part))} for part in (train, test)]
    assert not examples[0] & examples[1]
    assert torch.equal(torch.cat([train.labels, test.labels]).sort()[0], data.labels.sort()[0])


def test_drawn_values_that_have_no_hash_are_each_ones_own() -> None:
    model = CausalModel({"a": lambda rng: rng.normal(size=2), "out": [False, True]}, {"out": lambda a: bool(a[0] > 0)})
    data = model.counterfactuals(10, ["out"], encode=lambda inputs: inputs["a"])
    assert [len(part) for part in data.split(0.5)] == [5, 5]
    assert torch.equal(data.base[:, 0] > 0, data.base_labels.bool())
    assert torch.equal(data.sources["out"][:, 0] > 0, data.labels.bool())


def test_a_table_has_a_row_an_example() -> None:
    data = equality().counterfactuals(8, seed=5)
    table = data.table()
    assert len(table) == 8
    row = table.iloc[3]
    base, sources = settings(data, 3)
    assert row.interchanged == ", ".join(sources)
    assert all(row[f"base {name}"] == value for name, value in base.items())
    assert row["output interchanged"] == bool(row.label)
    assert row.changed == (row.label != row.base_label)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"variables": "wx"}, "variables='wx': expected names of variables, each once, as"),
        ({"variables": ["wy"]}, "There is no variable 'wy'.*Nearest that exist: .*wx"),
        ({"variables": ["unread"]}, "'unread' has no way to the output 'out'.*Expected some of a, b, c, d, wx, yz, out"),
        ({"subsets": [["wx"], []]}, "expected lists of some of wx, none of them empty"),
        ({"subsets": [["yz"]]}, "expected lists of some of wx, none of them empty"),
        ({"changed": 2}, "changed=2: expected a share from 0 to 1"),
        ({"n": 0}, "n=0: expected a whole number"),
        ({"label": lambda value: 2, "labels": 2}, "The label of out=.* is 2: expected 0 to 1, a class of the network"),
        ({"label": lambda value: "yes"}, "is 'yes': expected a whole number from 0 on"),
        ({"label": lambda value: -1}, "is -1: expected a whole number from 0 on"),
        ({"encode": lambda inputs: torch.ones(1 + inputs["a"])}, r"encode returned shapes .*: expected one shape for all"),
        ({"encode": lambda inputs: None}, "encode returned NoneType. Expected tensors"),
    ],
)  # fmt: skip
def test_natural_mistakes_are_told(asked: dict[str, Any], message: str) -> None:
    functions = {
        "wx": lambda a, b: a == b,
        "yz": lambda c, d: c == d,
        "out": lambda wx, yz: wx == yz,
        "unread": lambda wx: wx,
    }
    model = CausalModel(dict.fromkeys("abcd", range(5)), functions, output="out")
    with pytest.raises(AnalyzerError, match=message):
        model.counterfactuals(**{"n": 10, "variables": ["wx"], **asked})


def test_an_interchange_that_never_matters_is_told() -> None:
    model = CausalModel({"a": range(3)}, {"x": lambda a: a, "out": lambda x: x >= 0})
    with pytest.raises(
        AnalyzerError, match=r"50% have a label that the interchange of x changes.*balanced=False leaves.*draws"
    ):
        model.counterfactuals(10, ["x"])
    assert not model.counterfactuals(10, ["x"], balanced=False).changed.any()


def test_words_need_an_encoding_and_what_is_not_known_a_label() -> None:
    words = CausalModel({"a": ["cat", "dog"]}, {"out": lambda a: a == "cat"})
    with pytest.raises(AnalyzerError, match=r"a='(cat|dog)' is no number. Expected encode=, a function from a setting"):
        words.counterfactuals(4, ["out"])
    free = CausalModel({"a": lambda rng: rng.normal()}, {"out": lambda a: 2 * a})
    with pytest.raises(AnalyzerError, match="values of the output 'out' are not known, so that they have no numbers"):
        free.counterfactuals(4, ["out"], balanced=False)
    data = free.counterfactuals(4, ["out"], balanced=False, label=lambda value: int(value > 0))
    assert torch.equal(data.base[:, 0] > 0, data.base_labels.bool())
    with pytest.raises(AnalyzerError, match="1 example has no part to hold out: all are the same"):
        words.counterfactuals(1, ["out"], encode=lambda inputs: 0.0).split()
