"""The normal form of a graph: its values as the matchers read them, each with what it is made of and who reads it.

One pass in execution order gives each node to the first rule that knows it (`RULES`): casts, copies, dropout and biases are
folded into the value that they hand on, runs of views are one move, every product is one contraction, a softmax or a norm
is one value however it is written, and so is what is computed number by number of one value. What was folded is kept, as
the names that a user sees are those of the graph.
"""

from functools import cached_property

from fmr.graph.graph import Graph
from fmr.ids import TensorId, within
from fmr.nests import ids_in
from fmr.structure.normal.match import data_inputs, is_constant
from fmr.structure.normal.rules import RULES
from fmr.structure.normal.value import Value
from fmr.structure.normal.walks import cached_per_graph


class Form:
    """The values of a graph in normal form, by the IDs of the graph.

    >>> form_of(run.graph)["transformer.h.0.attn/softmax#0"]
    softmax transformer.h.0.attn/softmax#0
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values: list[Value] = []
        self._known: dict[TensorId, Value] = {}
        for node in graph.nodes:
            read = tuple(self._known[name] for name in data_inputs(graph, node))
            value = next(one for rule in RULES if (one := rule(graph, node, read)) is not None)
            self._known[node.id] = value
            if value.node is node:
                value.is_data = not is_constant(graph, node.id)
                self.values.append(value)
                for higher in dict.fromkeys(value.inputs):
                    higher.users.append(value)
            else:
                value.views.append(node)

    def __getitem__(self, name: TensorId) -> Value:
        """The value that an ID of the graph is, or hands on."""
        return self._known[name]

    def of_kind(self, kind: str) -> list[Value]:
        """The values of a kind, in execution order."""
        return [value for value in self.values if value.kind == kind]

    @cached_property
    def numbers(self) -> dict[Value, int]:
        """The data that is read, or returned, each with its place: a view of a view, and what nothing reads, has none."""
        returned = set(ids_in(self.graph.scopes[0].output)) if self.graph.scopes else set()
        live: set[Value] = set()
        for value in reversed(self.values):
            names = {value.id, *(view.id for view in value.views)}
            if value.is_data and (names & returned or any(user in live for user in value.users)):
                live.add(value)
        return {value: n for n, value in enumerate(one for one in self.values if one in live)}

    def __str__(self) -> str:
        return self.text()

    def text(self, scope: str = "") -> str:
        """The values in the calls of a module but the moves, a line each: its number, what it is, of which, and its ID.

        `5~` is what value 5 is after a move.
        """
        shown = [one for one in self.numbers if within(one.node.module, scope) and one.kind != "move"]
        rows = [(str(self.numbers[one]), self._described(one), str(one.id)) for one in shown]
        widths = [max((len(row[n]) for row in rows), default=0) for n in range(2)]
        return "\n".join(f"{number:>{widths[0]}}  {what:{widths[1]}}  {name}" for number, what, name in rows)

    def _described(self, value: Value) -> str:
        """What a value is, and of which values."""
        made = (f"{self.numbers[one.inputs[0]]}~" if one.kind == "move" else str(self.numbers[one]) for one in value.inputs)
        words = value.subscripts
        op = f"{words.left},{words.right}->{words.result}" if any(words) else value.op
        return f"{value.kind:10} {' '.join(made):9} {op}".rstrip()


@cached_per_graph
def form_of(graph: Graph) -> Form:
    """The normal form of a graph, made once."""
    return Form(graph)
