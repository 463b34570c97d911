"""A value of the normal form: what it is, what it is made of, who reads it, and which ops were folded into it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import Subscripts
from fmr.structure.normal.walks import walk

KINDS = "input weight constant move join projection product softmax norm statistic affine bend gate sum op".split()
"""What a value of the form is: what comes in; numbers moved, or several laid together; a product that
sums, of data with a weight or of two values; a softmax; a norm, and what it is told of many numbers; a scale or a shift by
what is no data; a function number by number; a product or a sum of two values number by number; any other op."""

_NONE = Subscripts("", "", "")
"""The subscripts of what is no product."""


@dataclass(eq=False, slots=True, repr=False)
class Value:
    """One value of the form: the op that made it, what it is, what it is made of, and who reads it.

    `inputs` are data alone, in order; what says how a value is cut, scaled or shifted is in the arguments and parents of
    `node`. `operands` are what a product, a softmax or a function reads, as IDs of the graph. `folded` are the ops that
    went into it, in order, itself last; `views` those after it that hand its numbers on.
    `is_data` tells whether an input flows into it.
    """

    node: Node
    kind: str
    inputs: tuple["Value", ...] = ()
    op: str = ""
    dim: int = -1
    operands: tuple[TensorId, ...] = ()
    subscripts: Subscripts = _NONE
    folded: tuple[Node, ...] = ()
    is_data: bool = True
    views: list[Node] = field(default_factory=list)
    users: list["Value"] = field(default_factory=list)

    @property
    def id(self) -> TensorId:
        """The ID of the value in the graph."""
        return self.node.id

    @property
    def unmoved(self) -> "Value":
        """What it was before it was moved."""
        return self.inputs[0].unmoved if self.kind == "move" else self

    def above(self, through: Callable[["Value"], bool]) -> Iterator["Value"]:
        """The value and what it is made of, nearest first, not going above one that `through` refuses."""
        return walk([self], lambda here: here.inputs if through(here) else ())

    def below(self, through: Callable[["Value"], bool]) -> Iterator["Value"]:
        """The value and what is made of it, nearest first, not going below one that `through` refuses."""
        return walk([self], lambda here: here.users if here is self or through(here) else ())

    def __repr__(self) -> str:
        return f"{self.kind} {self.id}"
