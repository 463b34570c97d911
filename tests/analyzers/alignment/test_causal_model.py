"""Causal models run as their functions say, backwards as well, and say what is wrong with one at once."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyzers import AnalyzerError, CausalModel
from tests.analyzers.alignment.models import by_hand, equality, sums

BASE, SOURCE = {"a": 1, "b": 1, "c": 2, "d": 3}, {"a": 0, "b": 1, "c": 4, "d": 4}


@st.composite
def models(draw: st.DrawFn) -> CausalModel:
    """Any model of up to three inputs and four variables, whose functions are tables of random numbers."""
    inputs = [f"i{n}" for n in range(draw(st.integers(1, 3)))]
    names, parents, functions = list(inputs), {}, {}
    for n in range(draw(st.integers(1, 4))):
        read = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        salt, size = draw(st.integers(1, 97)), draw(st.integers(2, 4))
        functions[f"v{n}"] = lambda *given, salt=salt, size=size: (
            sum((k + salt) * (v + 1) for k, v in enumerate(given)) % size
        )
        parents[f"v{n}"] = read
        names.append(f"v{n}")
    return CausalModel({name: range(3) for name in inputs}, functions, parents, output=names[-1])


@settings(max_examples=30, deadline=None)
@given(models(), st.integers(0, 99))
def test_interchange_is_a_run_with_the_value_of_another(model: CausalModel, seed: int) -> None:
    base, *others = model.sample(1 + len(model.computed), seed=seed)
    assert model.run(base) == by_hand(model, base, {})
    for name in model.variables:
        assert model.interchange(base, {name: base}) == model.run(base)
    sources = dict(zip(model.computed, others, strict=True))
    taken = {name: by_hand(model, source, {})[name] for name, source in sources.items()}
    assert model.interchange(base, sources) == by_hand(model, base, taken)
    assert model.run(base, fixed=taken) == by_hand(model, base, taken)


@settings(max_examples=30, deadline=None)
@given(models(), st.integers(0, 99))
def test_inputs_lead_to_what_is_wanted(model: CausalModel, seed: int) -> None:
    wanted = model.run(model.sample(1, seed=seed)[0])
    found = model.sample(8, {name: wanted[name] for name in model.computed}, seed=seed)
    assert all(model.run(inputs)[name] == wanted[name] for inputs in found for name in model.computed)


def test_several_settings_are_run_as_one_by_one() -> None:
    model = sums()
    rows = [dict(zip("abc", row, strict=True)) for row in itertools.product(range(6), repeat=3)]
    assert model.run(rows) == [by_hand(model, row, {}) for row in rows]
    shifted = rows[7:] + rows[:7]
    expected = [
        by_hand(model, row, {"left": by_hand(model, source, {})["left"]}) for row, source in zip(rows, shifted, strict=True)
    ]
    assert model.interchange(rows, {"left": shifted}) == expected


def test_several_variables_come_from_several_sources() -> None:
    model = equality()
    assert model.run(BASE) == {**BASE, "wx": True, "yz": False, "out": False}
    assert model.interchange(BASE, {"wx": SOURCE})["out"] is True
    assert model.interchange(BASE, {"wx": SOURCE, "yz": SOURCE})["out"] is False


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_functions_of_columns_give_what_functions_of_values_give(kind: Any) -> None:
    columns, rows = equality(columns=kind), [BASE, SOURCE]
    assert columns.run(rows) == equality().run(rows)
    assert columns.values("wx") == (False, True)
    drawn = {"a": lambda rng: rng.normal(size=3), "b": lambda rng: rng.normal()}
    model = CausalModel(drawn, {"far": lambda a, b: a[:, 0] > b}, columns=kind)
    inputs = model.sample(20, seed=1)
    assert [row["far"] for row in model.run(inputs)] == [row["a"][0] > row["b"] for row in inputs]


def test_classes_are_of_the_parents_alone() -> None:
    calls = Counter()

    def out(wx: bool, yz: bool) -> bool:
        calls["out"] += 1
        return wx == yz

    functions = {"wx": lambda a, b: a == b, "yz": lambda c, d: c == d, "out": out}
    model = CausalModel(dict.fromkeys("abcd", range(100)), functions)
    assert model.classes("out") == {False: [(False, True), (True, False)], True: [(False, False), (True, True)]}
    assert model.classes("wx")[True] == [(n, n) for n in range(100)]
    assert calls["out"] == 4


def test_too_many_parents_are_sampled() -> None:
    model = CausalModel(
        {**dict.fromkeys("abcdefg", range(10)), "even": [False, True]},
        {"even": lambda a, b, c, d, e, f, g: (a + b + c + d + e + f + g) % 2 == 0},
    )
    assert sum(map(len, model.classes("even").values())) == 65_536
    assert all(model.run(row)["even"] for row in model.sample(50, {"even": True}))


def test_rare_values_are_drawn_in_balance() -> None:
    model = equality(range(50))
    free, balanced = model.run(model.sample(100, seed=0)), model.run(model.sample(100, balanced=True, seed=0))
    assert sum(row["wx"] for row in free) < 10
    for name in ("wx", "yz", "out"):
        assert 30 <= sum(row[name] for row in balanced) <= 70
    assert model.sample(5, balanced=True, seed=3) == model.sample(5, balanced=True, seed=3)
    assert model.sample(5, balanced=True, seed=3) != model.sample(5, balanced=True, seed=4)


def test_what_is_drawn_is_found_by_drawing() -> None:
    model = CausalModel(
        {"a": lambda rng: rng.normal(), "b": lambda rng: rng.normal(), "more": [False, True], "out": [False, True]},
        {"more": lambda a, b: a > b + 2, "out": lambda more: not more},
    )
    found = model.run(model.sample(40, balanced=True, seed=0))
    assert 8 < sum(row["a"] > row["b"] + 2 for row in found) < 32


def test_what_cannot_be_is_not_balanced() -> None:
    model = CausalModel(
        {"a": range(4)}, {"low": lambda a: a < 2, "high": lambda a: a > 1, "both": lambda low, high: low and high}
    )
    assert model.values("both") == (False, True)
    assert not any(row["both"] for row in model.run(model.sample(20, balanced=True)))
    with pytest.raises(AnalyzerError, match=r"Inputs with both=True are wanted: none such for 1 of 1 in [\d,]+ draws"):
        model.sample(1, {"both": True})


def test_values_are_in_the_order_given_else_sorted() -> None:
    functions = {"size": lambda a: "large" if a > 1 else "small", "next": lambda size, a: a + 1}
    model = CausalModel({"a": [3, 1, 2], "size": ["small", "large"]}, functions, output="next")
    assert (model.values("a"), model.values("size"), model.values("next")) == ((3, 1, 2), ("small", "large"), (2, 3, 4))


def test_values_of_numpy_and_torch_are_plain_ones() -> None:
    model = CausalModel({"a": np.arange(3), "b": torch.arange(3)}, {"same": lambda a, b: np.bool_(a == b)})
    assert model.run({"a": np.int64(1), "b": torch.tensor(1)}) == {"a": 1, "b": 1, "same": True}


IDENTITY: dict[str, Callable[..., Any]] = {"out": lambda a: a}


@pytest.mark.parametrize(
    ("values", "functions", "more", "message"),
    [
        ({"a": range(2)}, {"x": lambda a, y: a, "y": lambda z: z, "z": lambda x: x}, {}, "circle: x -> z -> y -> x"),
        ({"a": range(2)}, {"x": lambda a, x: a}, {}, "circle: x -> x. Expected each to be computed from those before it"),
        ({"alpha": range(2)}, {"x": lambda alphe: 1}, {}, "'x' reads 'alphe', which has neither values.*Nearest.*alpha"),
        ({"a": range(2)}, {"x": lambda a: 1}, {"parents": {"y": ["a"]}}, "'y' has parents and no function"),
        ({"a": range(2)}, {"x": lambda a: 1}, {"parents": {"x": "a"}}, "parents of 'x' are 'a': expected names"),
        ({"a": range(2)}, {"x": lambda a: 1, "y": lambda a: 1}, {}, "Nothing reads 'x' and 'y': expected one.*output='y'"),
        ({"a": range(2)}, IDENTITY, {"output": "a"}, "output='a' is an input. Expected what is computed: out"),
        ({"a": range(2)}, IDENTITY, {"output": "b"}, "output='b' is no variable"),
        ({"a": range(2)}, {}, {}, "functions={}: expected at least one"),
        ({"a": range(2)}, {"x": 3}, {}, "function of 'x' is 3: expected what is called"),
        ({"a": range(2)}, {"x": lambda *a: 1}, {}, r"parents of 'x' cannot be read from .* \(\*a\): expected plain"),
        ({"a": range(2)}, {"x": lambda: 1}, {}, "parents of 'x' cannot be read"),
        ({"a": range(3), "x": [0, 1]}, {"x": lambda a: a}, {}, "'x' is 2 at a=2, expected one of its values: 0, 1. Put"),
        ({"a": range(3)}, {"x": lambda a: 1 // a}, {}, "function of 'x' failed at a=0: ZeroDivisionError"),
        ({"a": range(3)}, {"x": lambda a: [a]}, {}, "function of 'x' returned a list, which has no hash"),
        ({"a": range(3)}, {"x": lambda a: torch.ones(2)}, {}, "'x' returned a Tensor, which has no hash"),
        ({"a": range(3)}, {"x": lambda a: a[:2]}, {"columns": "numpy"}, r"shape \(2,\) for columns.*, expected \(3,\)"),
        ({"a": range(3)}, {"x": lambda a: not a}, {"columns": "numpy"}, "'x' failed at columns of 3 values: ValueError"),
        ({"a": range(3)}, IDENTITY, {"columns": "jax"}, "columns='jax': expected 'numpy', 'torch', or None"),
        ({"a": []}, IDENTITY, {}, "values of 'a' are none: expected 1 to 1,048,576"),
        ({"a": itertools.count()}, IDENTITY, {}, "values of 'a' are more than 1,048,576"),
        ({"a": [1, True]}, IDENTITY, {}, "values of 'a' hold True twice"),
        ({"a": [float("nan")]}, IDENTITY, {}, "values of 'a' hold nan which equals nothing"),
        ({"a": [[1], [2]]}, IDENTITY, {}, r"values of 'a' cannot be looked up: list has no hash.*range\(2\)"),
        ({"a": [torch.ones(2)]}, IDENTITY, {}, "values of 'a' cannot be looked up: Tensor"),
        ({"a": 3}, IDENTITY, {}, r"values of 'a' are 3: expected all of them, as range\(10\)"),
        ({"a": range(2), "out": lambda rng: 1}, IDENTITY, {}, "'out' has a function and a sampler"),
        (["a"], IDENTITY, {}, r"values=\['a'\]: expected a mapping from names"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_model_is_told_when_it_is_made(values: Any, functions: Any, more: Any, message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        CausalModel(values, functions, **more)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda m: m.run({"a": 1}), "inputs has no value for 'b', 'c', 'd'. Expected one for each input: a, b, c, d"),
        (lambda m: m.run({**BASE, "e": 1}), "There is no variable 'e'. Expected one of a, b, c, d, wx, yz, out"),
        (lambda m: m.run({**BASE, "wx": True}), r"inputs sets 'wx', which is computed.*fixed=\{'wx': True\}"),
        (lambda m: m.run({**BASE, "a": 17}), "inputs: a=17, expected one of its values: 5 values 0 … 4"),
        (lambda m: m.run({**BASE, "a": [1]}), r"inputs: a=\[1\], expected one of its values"),
        (lambda m: m.run(3), "inputs is a int, expected a mapping with a value for each of a, b, c, d, or a list"),
        (lambda m: m.run([]), "inputs is empty"),
        (lambda m: m.run(BASE, fixed={"wx": 3}), "fixed: wx=3, expected one of its values: False, True"),
        (lambda m: m.run(BASE, fixed={"wy": 3}), "There is no variable 'wy'.*Nearest that exist: .*wx"),
        (lambda m: m.interchange(BASE, {"wy": BASE}), "There is no variable 'wy'"),
        (lambda m: m.interchange([BASE, BASE], {"wx": BASE}), r"sources\['wx'\] has 1 setting, the base 2. Expected one"),
        (lambda m: m.classes("a"), "'a' has no classes: it is an input"),
        (lambda m: m.sample(0), "n=0: expected a whole number from 1"),
        (lambda m: m.sample(1, {"wx": 2}), "where: wx=2, expected one of its values"),
        (lambda m: m.values(3), "There is no variable 3"),
    ],
)  # fmt: skip
def test_natural_mistakes_are_told(mistake: Callable[[CausalModel], Any], message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        mistake(equality())


def test_what_is_not_known_is_told() -> None:
    model = CausalModel({"a": lambda rng: rng.normal()}, {"twice": lambda a: 2 * a})
    assert model.values("twice") is None
    with pytest.raises(AnalyzerError, match=r"'twice' has no classes: it reads 'a', whose values are not known"):
        model.classes("twice")
    with pytest.raises(
        AnalyzerError, match=r"output 'twice' are not known, so that they cannot be balanced. Expected values="
    ):
        model.sample(3, balanced=True)


def test_a_model_prints_and_is_a_graph() -> None:
    model = equality()
    assert repr(model).splitlines() == [
        "CausalModel: 4 inputs, 2 inner variables, output out",
        *(f"  {name}    input        5 values 0 … 4" for name in "abcd"),
        "  wx   from a, b    False, True",
        "  yz   from c, d    False, True",
        "  out  from wx, yz  False, True",
    ]
    graph = model.to_networkx()
    assert networkx.is_directed_acyclic_graph(graph)
    assert sorted(graph.predecessors("out")) == ["wx", "yz"]
    assert dict(graph.nodes("kind")) == {**dict.fromkeys("abcd", "input"), "wx": "inner", "yz": "inner", "out": "output"}


def test_a_picture_shows_each_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalModel({"<a>": range(3)}, {"b&c": lambda a: a == 1}, {"b&c": ["<a>"]})
    with pytest.raises(AnalyzerError, match=r"ends in '.png', but SVG is written: expected 'model.svg'. model.to_networkx"):
        model.save_svg("model.png")
    monkeypatch.setenv("PATH", "")
    assert model._repr_svg_() is None
    assert "from &lt;a&gt;" in str(model._repr_html_())
    with pytest.raises(AnalyzerError, match=r"needs Graphviz's program 'dot'.*model.to_networkx\(\) needs no program"):
        model.save_svg(tmp_path / "model.svg")
