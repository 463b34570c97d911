"""One op of a graph run again: its arguments as they were given, the function of torch that was called."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fmr.errors import StructureError
from fmr.ids import RESULT, TensorId
from fmr.nests import Hole, outputs, replaced
from fmr.nodes import Node
from fmr.ops.functions import function_of
from fmr.ops.names import TENSOR_PROPERTIES, is_tensor_result, op_of
from fmr.watching.mode import made_by_writing, written_by

_VIEWS = frozenset(
    """T as_strided chunk diagonal expand expand_as flatten getitem mT movedim narrow permute reshape select split
    split_with_sizes squeeze t tensor_split transpose unbind unflatten unfold unsqueeze view view_as""".split()
)
"""What may show the numbers of a value anew without a copy."""


_PROPERTIES = TENSOR_PROPERTIES | {"set_data"}
"""Reading or setting a property of a tensor, which is no function of torch's."""


def call_of(node: Node, tensors: Mapping[Any, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments of an op as they were given, with these tensors for its parents."""
    held = {parent.at: tensors[parent.id] for parent in node.parents}
    given = {**held, **{at: replaced(arg, Hole, lambda hole: held[hole.at]) for at, arg in node.args.items()}}
    positions = sorted((at for at in given if at.isdigit()), key=int)
    return tuple(given[at] for at in positions), {at: item for at, item in given.items() if at.isidentifier()}


def execute(node: Node, tensors: Mapping[Any, Tensor]) -> Tensor:
    """Run the op of a node again on these tensors, by the same function; the result has the same bits as the first time.

    What it overwrites is a copy, so that the tensors stay as they are. An op that draws random numbers draws new ones.

    >>> execute(node, {parent: run[parent] for parent in node.parents})
    """
    if node.op == RESULT:
        return tensors[node.parents[0].id]
    found = results(node, tensors).get(node.id.parts.output)
    if found is None:
        raise StructureError(f"{node.id} cannot be computed again: {node.function or node.op} returned no such tensor.")
    return found


_ALWAYS_DRAW = frozenset(
    """bernoulli binomial cauchy exponential gumbel_softmax geometric log_normal multinomial normal poisson rand rand_like
    randint randint_like randn randn_like random randperm uniform standard_gamma sample_dirichlet
    fractional_max_pool2d fractional_max_pool3d""".split()
)
_MASKS = {
    "dropout": 1,
    "feature_dropout": 1,
    "alpha_dropout": 1,
    "feature_alpha_dropout": 1,
    "dropout1d": 1,
    "dropout2d": 1,
    "dropout3d": 1,
}
_CELLS = frozenset({"gru", "lstm", "rnn_relu", "rnn_tanh"})


def draws(node: Node) -> bool:
    """Whether the op of a node drew random numbers."""
    if node.op in _MASKS:
        training = node.argument("training", 2, node.argument("train", 2, True))
        return bool(training) and node.argument("p", 1, 0.5) > 0
    if node.op == "rrelu":
        return bool(node.argument("training", 3, False))
    if node.op == "scaled_dot_product_attention":
        return bool(node.argument("dropout_p", 4, 0.0) > 0)
    if node.op == "multi_head_attention_forward":
        return bool(node.argument("training", 13, True)) and node.argument("dropout_p", 10, 0.0) > 0
    if node.op in _CELLS:
        numbers = [arg for at, arg in sorted(node.args.items()) if isinstance(arg, float)]
        flags = [arg for at, arg in sorted(node.args.items()) if isinstance(arg, bool)]
        return any(number > 0 for number in numbers) and len(flags) > 1 and flags[1]
    return node.op in _ALWAYS_DRAW


def results(node: Node, tensors: Mapping[Any, Tensor]) -> dict[int | None, Tensor]:
    """All that the op of a node returns when it runs again, by the index of each output."""
    args, kwargs = call_of(node, tensors)
    is_property = node.op in _PROPERTIES and isinstance(args[0], Tensor)  # torch.autograd.grad is a "grad", too
    if node.function or not is_property:
        made = _called(node, args, kwargs)
    elif node.op == "grad":
        raise StructureError(
            f"{node.id} cannot be computed again: what backward() leaves in .grad is not recorded. "
            f"Expected a value given for it."
        )
    else:
        made = args[1] if node.op == "set_data" else getattr(args[0], node.op)
    return dict(outputs(made) if made is not None else ())


def _called(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the function of a node returns, or overwrites, when it is called with these arguments."""
    func = function_of(node.function)
    if func is None:
        why = f"torch has no function {node.function!r}" if node.function else "its function is not one of torch's"
        raise StructureError(f"{node.id} cannot be computed again: {why}. Expected an op of torch, or a value given for it.")
    op = op_of(func)
    if op.reflected:
        args = args[::-1]
    written = written_by(op, args, kwargs)
    if written:
        copies = {id(tensor): tensor.clone() for tensor in written}
        args, kwargs = replaced((args, kwargs), Tensor, lambda tensor: copies.get(id(tensor), tensor))
        written = [copies[id(tensor)] for tensor in written]
    out = func(*args, **kwargs)
    return out if is_tensor_result(out) else made_by_writing(written)


def overwritten(
    lookup: Callable[[str], Node],
    node: Node,
    tensors: Mapping[TensorId, Tensor],
    run: Callable[[Node, Mapping[TensorId, Tensor]], Tensor] = execute,
) -> Tensor:
    """A value of which views were overwritten: the same views of a copy, overwritten one after the other."""
    old, *writes = (parent.id for parent in node.parents)
    whole = tensors[old].clone()
    for written in writes:
        way = [lookup(written)]
        while way[-1].id != old and way[-1].parents:
            way.append(lookup(way[-1].parents[0].id))
        if way[-1].id != old:
            raise StructureError(f"{node.id} was overwritten in place on the way, which is not recomputed.")
        part = whole
        for one in reversed(way[:-1]):  # what is no view was done in place
            if one.op in _VIEWS and len(one.parents) == 1:
                part = run(one, {one.parents[0].id: part})
        same = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        if not same or part.shape != tensors[written].shape:
            raise StructureError(f"{node.id} was overwritten in place on the way, which is not recomputed.")
        part.copy_(tensors[written])
    return whole
