"""An algorithm as a causal model: variables that are computed from each other, and what happens when one is set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from analyzers.alignment.mechanism import Mechanism
from analyzers.alignment.tables import Kind, by_value, known
from analyzers.alignment.variables import MOST, Column, Columns, Function, Variable, variables_of
from analyzers.circuits.choice import Bools
from analyzers.protocol import AnalyzerError, check_counts
from fmr.errors import nearest, number_of
from fmr.pictures.notebook import preformatted

if TYPE_CHECKING:
    import networkx

    from analyzers.alignment.counterfactuals import Counterfactuals

Setting = dict[str, Any]
"""A value for each of some variables."""

Settings = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""One setting, or several in a list."""


class CausalModel:
    """An algorithm as variables, each a function of its parents, that a network may compute.

    >>> model = CausalModel(
    ...     values=dict.fromkeys("abcd", range(4)),
    ...     functions={"wx": lambda a, b: a == b, "yz": lambda c, d: c == d, "out": lambda wx, yz: wx == yz},
    ... )
    >>> model.run({"a": 1, "b": 1, "c": 2, "d": 3})["out"]
    False
    >>> model.interchange({"a": 1, "b": 1, "c": 2, "d": 3}, {"wx": {"a": 0, "b": 1, "c": 1, "d": 1}})["out"]
    True

    values: of each input all values, as range(10), or a function that draws one with a NumPy generator, as
    `lambda rng: rng.normal()`; of what is computed, all that it may be: found out where that is left out and the values of
    its parents are known. functions: of each variable that is computed, called with one value of each parent.
    parents: names of what a function reads, where those are not its arguments without a default. output: the variable that
    the model is asked for; the one that nothing reads, where that is left out. columns: "numpy" or "torch" where functions
    take an array or a tensor of many values (rows,) of each parent and return one. A function returns the same for the same
    arguments; it is called for all settings of its parents at once, or for 65,536 of them where there are over 1,048,576.

    An error says what is wrong: variables that go round in a circle, a parent that is none, a function that returns what is
    not among the values, no output or several. Sources: J. Pearl, "Causality", 2009; A. Geiger et al., "Causal abstractions
    of neural networks", 2021 (arXiv:2106.02997).
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        functions: Mapping[str, Function],
        parents: Mapping[str, Sequence[str]] | None = None,
        *,
        output: str | None = None,
        columns: Kind = None,
    ) -> None:
        if columns not in (None, "numpy", "torch"):
            raise AnalyzerError(f"columns={columns!r}: expected 'numpy', 'torch', or None for functions of single values.")
        self.columns: Kind = columns
        self.variables = variables_of(values, functions, parents)
        self.output = self._output_of(output)
        self.mechanism = Mechanism(self.variables, columns)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The variables that are given."""
        return tuple(name for name, one in self.variables.items() if one.function is None)

    @property
    def computed(self) -> tuple[str, ...]:
        """The variables that are computed, each behind its parents; the output is one of them."""
        return tuple(name for name, one in self.variables.items() if one.function is not None)

    def values(self, variable: str) -> tuple[Any, ...] | None:
        """All that a variable may be, in the order in which they are counted; None where that is not known.

        >>> CausalModel({"a": range(3)}, {"out": lambda a: a % 2 == 0}).values("out")
        (False, True)
        """
        return self._variable(variable).values

    @overload
    def run(self, inputs: Mapping[str, Any], fixed: Mapping[str, Any] | None = None) -> Setting: ...

    @overload
    def run(self, inputs: Sequence[Mapping[str, Any]], fixed: Mapping[str, Any] | None = None) -> list[Setting]: ...

    def run(self, inputs: Settings, fixed: Mapping[str, Any] | None = None) -> Setting | list[Setting]:
        """The values of all variables.

        >>> functions = {"sum": lambda a, b: a + b, "even": lambda sum: sum % 2 == 0}
        >>> model = CausalModel({"a": range(10), "b": range(10)}, functions)
        >>> model.run({"a": 3, "b": 4}, fixed={"sum": 8})
        {'a': 3, 'b': 4, 'sum': 8, 'even': True}

        inputs: a value for each input; or several of these in a list, which gives a list. fixed: values of variables that
        are set instead of computed: an intervention, the same in all settings. A variable without a value, one that is not
        there, and a value that it cannot have are each an AnalyzerError.
        """
        given, several = self._given(inputs, "inputs")
        rows = len(next(iter(given.values())))
        held = {name: (self._column(name, [value] * rows, "fixed"), None) for name, value in (fixed or {}).items()}
        return self._told(self.mechanism.settings(given, held), several)

    @overload
    def interchange(self, base: Mapping[str, Any], sources: Mapping[str, Settings]) -> Setting: ...

    @overload
    def interchange(self, base: Sequence[Mapping[str, Any]], sources: Mapping[str, Settings]) -> list[Setting]: ...

    def interchange(self, base: Settings, sources: Mapping[str, Settings]) -> Setting | list[Setting]:
        """The values of all variables where some have the values that they have in runs of other inputs.

        >>> functions = {"sum": lambda a, b: a + b, "even": lambda sum: sum % 2 == 0}
        >>> model = CausalModel({"a": range(10), "b": range(10)}, functions)
        >>> model.interchange({"a": 3, "b": 4}, {"sum": {"a": 1, "b": 1}})
        {'a': 3, 'b': 4, 'sum': 2, 'even': True}

        base: a value for each input, or several of these in a list. sources: of each variable that is interchanged the
        inputs of the run that its value is taken from, as many as of the base. With the base itself for a source it is
        `run(base)`. Source: A. Geiger et al., "Causal abstractions of neural networks", 2021: interchange intervention.
        """
        given, several = self._given(base, "base")
        held: dict[str, tuple[Column, Bools | None]] = {}
        for name, source in sources.items():
            self._variable(name)
            found, _ = self._given(source, f"sources[{name!r}]")
            sizes = [len(next(iter(one.values()))) for one in (found, given)]
            if sizes[0] != sizes[1]:
                raise AnalyzerError(
                    f"sources[{name!r}] has {number_of(sizes[0], 'setting')}, the base {sizes[1]}. Expected one for each."
                )
            held[name] = self.mechanism.settings(found)[name], None
        return self._told(self.mechanism.settings(given, held), several)

    def classes(self, variable: str) -> Mapping[Any, list[tuple[Any, ...]]]:
        """Of each value of a variable the settings of its parents that lead to it: its equivalence classes.

        >>> CausalModel({"a": range(3), "b": range(3)}, {"wx": lambda a, b: a == b}).classes("wx")[True]
        [(0, 0), (1, 1), (2, 2)]

        Settings are values in the order of the parents: of these alone, not of all inputs. Where there are more than
        1,048,576, they are of 65,536 drawn ones. An input has none, nor has a variable with a parent that can be anything:
        an AnalyzerError names it.
        """
        one = self._variable(variable)
        if variable not in self.mechanism.tables:
            unknown = [name for name in one.parents if self.variables[name].values is None]
            if not one.parents:
                told = "is an input. Expected a variable that is computed"
            elif unknown:
                told = f"reads {unknown[0]!r}, whose values are not known. Expected values={{{unknown[0]!r}: [...]}}"
            else:
                told = f"has parents of over {MOST:,} settings. Expected its values, values={{{variable!r}: [...]}}"
            raise AnalyzerError(f"{variable!r} has no classes: it {told}.")
        return by_value(one, self.mechanism.parents(variable), self.mechanism.tables[variable])

    def sample(
        self, n: int, where: Mapping[str, Any] | None = None, *, balanced: bool = False, seed: int = 0
    ) -> list[Setting]:
        """Inputs for which variables have wanted values.

        >>> model = CausalModel(dict.fromkeys("ab", range(100)), {"wx": lambda a, b: a == b})
        >>> all(inputs["a"] == inputs["b"] for inputs in model.sample(50, {"wx": True}))
        True

        n: how many. where: the values, all to be met; without any, inputs are drawn independently, each value as likely as
        the others. balanced: all values of the output as likely as each other, however rare they are by chance, and so on
        from each variable to its parents: one of the settings that lead to its value. seed: the same one gives the same
        inputs. An AnalyzerError where none are found in thousands of draws.
        """
        check_counts(1, n=n)
        check_counts(0, seed=seed)
        rng = np.random.default_rng(seed)
        wanted = {name: np.repeat(self._column(name, [value], "where"), n) for name, value in (where or {}).items()}
        if balanced and self.output not in wanted:
            wanted[self.output] = rng.choice(self.mechanism.reached(self.output, rng), n)
        found = self._told(self.mechanism.draw(n, wanted, rng), True)
        assert isinstance(found, list)
        return found

    def counterfactuals(
        self,
        n: int,
        variables: Sequence[str] | None = None,
        *,
        seed: int = 0,
        balanced: bool = True,
        changed: float = 0.5,
        subsets: Sequence[Sequence[str]] | None = None,
        encode: Callable[[dict[str, Any]], Any] | None = None,
        label: Callable[[Any], int] | None = None,
        labels: int | None = None,
    ) -> Counterfactuals:
        """Pairs of inputs with the output of an interchange: what a network is trained on and tested with that is said to
        compute the variables.

        >>> model = CausalModel(dict.fromkeys("ab", range(10)), {"wx": lambda a, b: a == b, "out": lambda wx: not wx})
        >>> model.counterfactuals(100, ["wx"], encode=lambda inputs: torch.tensor([inputs["a"], inputs["b"]]))
        Counterfactuals: 100 examples, wx interchanged
          the label changes in 50.0 %; of the base it is 0 in 50.0 %, 1 in 50.0 %...

        n: how many. variables: which are interchanged, each from a source of its own; all that are computed but the output,
        where that is left out. subsets: which of them together, each subset as often as the others; all but the empty one,
        where that is left out. balanced: bases and sources as of `sample(balanced=True)`, and the label changes in a share
        of `changed` of the examples: where it seldom does, a model scores well that ignores the variable.

        encode: makes of the inputs of one setting what the network takes: a tensor of one shape, a number, a list of them, a
        text, or a mapping of these; with columns="numpy" or "torch", of columns of all settings. Left out, inputs that are
        numbers become a row of float32. label: makes of a value of the output the number of a class (a token, for a language
        model); left out, it is its place among its values. labels: how many classes the network has: a label outside is an
        AnalyzerError. seed: the same one gives the same examples.

        Source: A. Geiger et al., "Causal abstractions of neural networks", 2021 (arXiv:2106.02997).
        """
        from analyzers.alignment.pairs import counterfactuals

        return counterfactuals(
            self, n, variables, seed=seed, balanced=balanced, changed=changed, subsets=subsets,
            encode=encode, label=label, labels=labels,
        )  # fmt: skip

    # ---- as a graph

    def to_networkx(self) -> networkx.DiGraph[str]:
        """The variables as a networkx graph, from parents to children, with `kind` (input, inner or output) and `values`.

        >>> model = CausalModel({"a": range(3)}, {"out": lambda a: a == 1})
        >>> model.to_networkx().edges
        OutEdgeView([('a', 'out')])
        """
        import networkx

        graph = networkx.DiGraph()
        for name, one in self.variables.items():
            graph.add_node(name, kind=self.kind(name), values=one.values)
        graph.add_edges_from((parent, name) for name, one in self.variables.items() for parent in one.parents)
        return graph

    def kind(self, variable: str) -> str:
        """What a variable is: input, inner or output."""
        return "output" if variable == self.output else "inner" if self._variable(variable).parents else "input"

    def save_svg(self, path: str | os.PathLike[str]) -> None:
        """Write the model as an SVG picture: inputs above, the output below, values in the boxes.

        >>> CausalModel({"a": range(3)}, {"out": lambda a: a == 1}).save_svg("model.svg")

        An AnalyzerError where Graphviz's program `dot` is missing.
        """
        from analyzers.alignment.pictures import sheet
        from analyzers.circuits.pictures import write_svg

        write_svg(sheet(self), path, "model.to_networkx() needs no program.")

    def _repr_svg_(self) -> str | None:
        from analyzers.alignment.pictures import drawn

        return drawn(self)

    def _repr_html_(self) -> str | None:
        return None if self._repr_svg_() else preformatted(self)

    def __repr__(self) -> str:
        inner = [name for name in self.computed if name != self.output]
        wide = max(map(len, self.variables))
        reads = {name: f"from {', '.join(one.parents)}" if one.parents else "input" for name, one in self.variables.items()}
        far = max(map(len, reads.values()))
        rows = [f"  {name:{wide}}  {reads[name]:{far}}  {one.range}" for name, one in self.variables.items()]
        told = f"{number_of(len(self.inputs), 'input')}, {number_of(len(inner), 'inner variable')}, output {self.output}"
        return "\n".join([f"CausalModel: {told}", *rows])

    # ---- what is given, checked

    def _output_of(self, given: str | None) -> str:
        if given is not None:
            if given not in self.computed:
                told = "is an input" if given in self.variables else "is no variable"
                raise AnalyzerError(f"output={given!r} {told}. Expected what is computed: {', '.join(self.computed)}.")
            return given
        read = {parent for one in self.variables.values() for parent in one.parents}
        last = [name for name in self.computed if name not in read]
        if len(last) > 1:
            raise AnalyzerError(
                f"Nothing reads {' and '.join(map(repr, last))}: expected one output. Say which: output={last[-1]!r}."
            )
        return last[0]

    def _variable(self, name: Any) -> Variable:
        if name not in self.variables:
            near = nearest(name, self.variables) if isinstance(name, str) else ""
            raise AnalyzerError(f"There is no variable {name!r}. Expected one of {', '.join(self.variables)}.{near}")
        return self.variables[name]

    def _column(self, name: str, values: Sequence[Any], what: str) -> Column:
        """Values that were given, as a column."""
        one = self._variable(name)
        try:
            return one.column(values)
        except (KeyError, TypeError):
            wrong = next(value for value in values if not known(one, value))
            raise AnalyzerError(f"{what}: {name}={wrong!r}, expected one of its values: {one.range}.") from None

    def _given(self, given: Any, what: str) -> tuple[Columns, bool]:
        """Settings of the inputs as columns, and whether they are several."""
        rows = [given] if isinstance(given, Mapping) else given
        if isinstance(rows, str) or not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
            raise AnalyzerError(
                f"{what} is a {type(given).__name__}, expected a mapping with a value for each of {', '.join(self.inputs)}, "
                "or a list of these."
            )
        if not rows:
            raise AnalyzerError(f"{what} is empty, expected a setting of the inputs, or several.")
        names = self.inputs
        for row in rows:
            if row.keys() != {*names}:
                self._refuse(row, names, what)
        return {name: self._column(name, [row[name] for row in rows], what) for name in names}, rows is given

    def _refuse(self, row: Mapping[str, Any], names: Sequence[str], what: str) -> None:
        """Raise for a setting of what are not just the inputs."""
        for name in row:
            if self._variable(name).parents:
                raise AnalyzerError(
                    f"{what} sets {name!r}, which is computed. Expected the inputs {', '.join(names)} alone; to set it all "
                    f"the same: run(inputs, fixed={{{name!r}: {row[name]!r}}})."
                )
        missing = ", ".join(repr(name) for name in names if name not in row)
        raise AnalyzerError(f"{what} has no value for {missing}. Expected one for each input: {', '.join(names)}.")

    def _told(self, columns: Columns, several: bool) -> Setting | list[Setting]:
        told = [self.variables[name].told(column) for name, column in columns.items()]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*told, strict=True)]
        return rows if several else rows[0]
