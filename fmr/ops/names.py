"""The canonical names of tensor operations: one table for every spelling that torch offers.

`x.softmax(-1)`, `torch.softmax` and `F.softmax` are all `softmax`; `+`, `+=`, `torch.add` and `add_` are all `add`.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmr.ops.functions import spelling_of
from fmr.ops.writes import Writes, first, moves, written_by_schema, written_when_asked

SPELLINGS = {
    "absolute": "abs",
    "and": "bitwise_and",
    "arccos": "acos",
    "arcsin": "asin",
    "arctan": "atan",
    "arctan2": "atan2",
    "bfloat16": "to",
    "bool": "to",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "cpu": "to",
    "cuda": "to",
    "divide": "div",
    "double": "to",
    "fix": "trunc",
    "float": "to",
    "floordiv": "floor_divide",
    "greater": "gt",
    "greater_equal": "ge",
    "grouped_mm_fallback": "grouped_mm",
    "half": "to",
    "idiv": "div",
    "int": "to",
    "invert": "bitwise_not",
    "less": "lt",
    "less_equal": "le",
    "long": "to",
    "lshift": "bitwise_left_shift",
    "mod": "remainder",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "or": "bitwise_or",
    "rshift": "bitwise_right_shift",
    "safe_softmax": "softmax",
    "short": "to",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
    "truediv": "div",
    "type": "to",
    "type_as": "to",
    "xor": "bitwise_xor",
}
"""A spelling, stripped of underscores, to the name that fmr uses; all others are their own name."""

REFLECTED = {
    "radd": "add",
    "rand": "bitwise_and",
    "rdiv": "div",
    "rfloordiv": "floor_divide",
    "rlshift": "bitwise_left_shift",
    "rmatmul": "matmul",
    "rmod": "remainder",
    "rmul": "mul",
    "ror": "bitwise_or",
    "rpow": "pow",
    "rrshift": "bitwise_right_shift",
    "rsub": "sub",
    "rtruediv": "div",
    "rxor": "bitwise_xor",
}
"""Dunder names whose two operands stand in the other order."""

IN_PLACE_DUNDERS = {
    f"__i{name}__" for name in "add and div floordiv lshift matmul mod mul or pow rshift sub truediv xor".split()
}

TENSOR_PROPERTIES = {"H", "T", "data", "grad", "imag", "mH", "mT", "real"}
"""Properties of a tensor whose value is a tensor: edges of the graph. All other properties pass unseen."""

QUERIES = {
    "__bool__", "__contains__", "__float__", "__format__", "__hash__", "__index__", "__int__", "__len__", "__repr__",
    "__reduce_ex__", "__str__", "_is_view", "_set_grad_enabled", "backward", "dim", "element_size",
    "get_device", "has_names", "is_complex", "is_conj", "is_contiguous", "is_floating_point", "is_inference", "is_neg",
    "is_nonzero", "is_same_size", "is_set_to", "is_shared", "is_signed", "item", "ndimension", "nelement", "numel",
    "pin_memory", "record_stream", "register_hook", "requires_grad_", "retain_grad", "share_memory_", "size",
    "storage_offset", "stride", "tolist",
}  # fmt: skip
"""Functions that answer about a tensor without making one."""

HANDING_OUT = {"__array__", "__dlpack__", "data_ptr", "numpy"}
"""Functions that hand out the memory of a tensor, to be written by what no mode sees."""

STORAGES = {"_typed_storage", "storage", "untyped_storage"}
"""Those that hand out its storage object, through which sharded models free their weights at each call."""

ASKING = frozenset(
    """__array__ __bool__ __complex__ __contains__ __dlpack__ __float__ __format__ __index__ __int__ __reduce_ex__ __repr__
    _local_scalar_dense allclose equal is_nonzero item numpy tolist""".split()
)
"""Functions that tell Python numbers of tensors, by which it may go."""

FILLS_NOTHING = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
"""Ops whose result holds whatever lay in memory."""

OF_SHAPES = frozenset("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor".split())
"""Ops that read a shape and no number."""

PASS, READ, WRITE = range(3)
"""What the tracker does with a function: let it pass unseen, record it, record it and guard what it overwrites."""


class Op(NamedTuple):
    """What fmr knows about one torch function.

    One that `moves` gives a tensor another shape, type or memory in place, one that `hands_out` gives its memory away, one
    that `asks` tells Python its numbers; `tells` is either of these.
    `reads` is how many of its arguments it reads, where others are for its own use.
    """

    name: str
    kind: int = READ
    reflected: bool = False
    writes: Writes | None = None
    function: str = ""
    moves: bool = False
    hands_out: bool = False
    reads: int | None = None
    asks: bool = False
    tells: bool = False


def canonical(spelling: str) -> str:
    """The one name of an operation, from any of torch's spellings of it.

    >>> canonical("__iadd__"), canonical("add_"), canonical("true_divide")
    ('add', 'add', 'div')
    """
    name = spelling.partition(".")[0]
    bare = name.strip("_").removeprefix("special_").removeprefix("linalg_")
    if name in IN_PLACE_DUNDERS:
        bare = bare[1:]
    elif name.startswith("__") and bare in REFLECTED:
        return REFLECTED[bare]
    return SPELLINGS.get(bare, bare)


def op_of(func: Callable[..., Any]) -> Op:
    """The op that a torch function performs; known functions answer from a table."""
    op = known_ops.get(func)
    if op is None:
        op = known_ops[func] = _classify(func)
    return op


def _classify(func: Callable[..., Any]) -> Op:
    spelling = getattr(func, "__name__", type(func).__name__)
    if spelling in ("__get__", "__set__", "__delete__"):
        return _property(func, spelling)
    if spelling in QUERIES or spelling in HANDING_OUT or spelling in STORAGES:
        hands_out, asks = spelling not in QUERIES, spelling in ASKING
        return Op(spelling, PASS, hands_out=hands_out, asks=asks, tells=hands_out or asks)
    name, written = canonical(spelling), _written(func, spelling)
    reflected = spelling.startswith("__") and spelling.strip("_") in REFLECTED
    changes = written is not None and moves(func)
    reads = 1 if name == "deepcopy" else None  # whose memo holds what it made
    return Op(
        name,
        WRITE if written else READ,
        reflected,
        written,
        spelling_of(func),
        changes,
        reads=reads,
        asks=spelling.partition(".")[0] in ASKING,
    )


def _property(func: Any, spelling: str) -> Op:
    owner = getattr(func, "__self__", None)
    name = str(getattr(owner, "__name__", None) or getattr(getattr(owner, "fget", None), "__name__", "property"))
    if spelling == "__get__":
        return Op(name, READ if name in TENSOR_PROPERTIES else PASS)
    return Op(f"set_{name}", WRITE, writes=first, moves=True) if name == "data" else Op(name, PASS)


def _written(func: Any, spelling: str) -> Writes | None:
    """How to find what a call of this function overwrites; None for a function that never writes."""
    if spelling in IN_PLACE_DUNDERS or spelling == "__setitem__":
        return first
    if inspect.isfunction(func):
        named = spelling.endswith("_") and not spelling.startswith("__")
        return first if named else written_when_asked(func)
    marked = written_by_schema(func)
    if marked is None and spelling.endswith("_") and not spelling.startswith("__"):
        return first
    return marked


known_ops: dict[Callable[..., Any], Op] = {}


def is_tensor_result(out: Any) -> bool:
    """Whether a function returned a tensor or a nest of lists and tuples that holds one."""
    if isinstance(out, Tensor):
        return True
    return isinstance(out, (tuple, list)) and type(out) is not torch.Size and any(is_tensor_result(item) for item in out)
