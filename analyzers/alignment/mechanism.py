"""How a causal model runs: all settings at once, and backwards, from a value that is wanted to inputs that lead to it."""

from collections.abc import Mapping

import numpy as np

from analyzers.alignment.tables import Kind, Table, computed, kept, table_of
from analyzers.alignment.variables import Column, Columns, Variable
from analyzers.circuits.choice import Bools
from analyzers.numbers.embed import Ints
from analyzers.protocol import AnalyzerError

Held = Mapping[str, tuple[Column, Bools | None]]
"""Of variables that are set, their columns, and in which rows; None is all."""


class Mechanism:
    """The variables of a causal model with the tables of their functions, where the values of all parents are known."""

    def __init__(self, variables: dict[str, Variable], kind: Kind) -> None:
        self.variables, self.kind = variables, kind
        self.tables: dict[str, Table] = {}
        for name, one in variables.items():
            if one.function is not None:
                variables[name], table = table_of(one, self.parents(name), kind)
                self.tables |= {} if table is None else {name: table}

    def parents(self, name: str) -> list[Variable]:
        """The variables that one is computed from."""
        return [self.variables[parent] for parent in self.variables[name].parents]

    def settings(self, inputs: Columns, held: Held | None = None) -> Columns:
        """Columns of all variables, from those of the inputs."""
        found: Columns = {}
        for name in self.variables:
            column, where = (held or {}).get(name, (None, None))
            if column is None or where is not None:
                own = inputs[name] if self.variables[name].function is None else self._computed(name, found)
                column = own if column is None or where is None else np.where(where, column, own)
            found[name] = column
        return found

    def _computed(self, name: str, found: Columns) -> Column:
        table = self.tables.get(name)
        if table is not None and table.whole:
            return table.look_up(found)
        return computed(self.variables[name], self.parents(name), found, self.kind)

    def draw(self, n: int, wanted: Columns, rng: np.random.Generator) -> Columns:
        """Columns of inputs for which variables have the wanted values, row by row."""
        if not wanted:
            return self._guided({}, n, rng)

        def attempt(rows: Ints) -> tuple[Columns, Bools]:
            asked = {name: column[rows] for name, column in wanted.items()}
            inputs = self._guided(dict(asked), len(rows), rng)
            found = self.settings(inputs)
            good: Bools = np.all([found[name] == column for name, column in asked.items()], axis=0)
            return inputs, good

        told = ", ".join(f"{name}={self.variables[name].told(column[:1])[0]!r}" for name, column in wanted.items())
        return kept(n, attempt, f"Inputs with {told}{' and others' if n > 1 else ''} are wanted")

    def _guided(self, wanted: Columns, n: int, rng: np.random.Generator) -> Columns:
        """Inputs that lead to what is wanted, as far as tables tell: each variable hands on to its parents."""
        for name, one in reversed(self.variables.items()):
            if name in wanted and name in self.tables:
                table = self.tables[name]
                rows = table.choose(wanted[name], wanted, rng)
                for place, parent in enumerate(table.parents):
                    wanted.setdefault(parent, table.settings[rows, place])
            elif one.function is None and name not in wanted:
                wanted[name] = one.drawn(n, rng)
        return {name: wanted[name] for name, one in self.variables.items() if one.function is None}

    def reached(self, output: str, rng: np.random.Generator) -> Ints:
        """The values of the output that some inputs lead to, as far as thousands of draws find them."""
        values = self.variables[output].values
        if values is None:
            raise AnalyzerError(
                f"The values of the output {output!r} are not known, so that they cannot be balanced. Expected "
                f"values={{{output!r}: [...]}}, or balanced=False."
            )
        asked = np.tile(np.arange(len(values)), 1 + 1000 // len(values))
        found = [self.settings(self._guided({output: asked}, len(asked), rng))[output] for _ in range(10)]
        reached: Ints = np.unique(np.concatenate(found))
        return reached
