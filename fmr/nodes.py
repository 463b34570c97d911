"""What a graph is made of: a node for each value, a scope for each module call."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard, cast

import torch
from torch import Tensor

from fmr.errors import IdError
from fmr.ids import Parent, Site, TensorId
from fmr.nests import Nest

_NUMPY = {"dim": "axis", "keepdim": "keepdims"}
"""Arguments that torch knows by another name, too."""


class Node(NamedTuple):
    """One value of a pass and the op that made it.

    `parents` are the IDs of the tensors that the op read, each with the argument it fills (`parent.at`);
    `args` are its other arguments as they were given, by position or name ("0", "dim"); where a tensor stood inside one,
    in a list or a slice, it has a `Hole` with the position of the parent, "1.2". `where` is the call site, `file:line`;
    `function` the function of torch that was called ("Tensor.add_"), empty for one that is not torch's own.
    """

    id: TensorId
    op: str
    scope: str
    parents: tuple[Parent, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    args: Mapping[str, Any]
    where: str
    function: str = ""

    def __hash__(self) -> int:
        return hash(self.id)

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        """A non-tensor argument by its name, that of NumPy too, or its position, whichever the call used."""
        return self.args.get(name, self.args.get(_NUMPY.get(name, name), self.args.get(str(position), default)))

    def parent(self, name: str, position: int | None = None) -> Parent | None:
        """The tensor given for an argument, by its name or its position; None where none was."""
        at = (name, None if position is None else str(position))
        return next((parent for parent in self.parents if parent.at in at), None)

    @property
    def module(self) -> str:
        """The module call that it ran in, by its dynamic path: its scope without the fused ops."""
        return self.scope.partition("/")[0]

    @property
    def kind(self) -> str:
        """The dtype's short name, as `float32`."""
        return str(self.dtype).removeprefix("torch.")

    def __repr__(self) -> str:
        reads = ", ".join(self.parents)
        place = f"  at {self.where}" if self.where else ""
        return f"{self.id} {self.kind}{list(self.shape)}" + (f" <- {reads}" if reads else "") + place


class Scope(NamedTuple):
    """One call of a module: its place, and the IDs that went in and came out.

    `path` is the dynamic path (`cell@2`), `module` the registered one (`cell`), `kind` the class's name for display.
    """

    path: str
    module: str
    kind: str
    parent: str | None
    inputs: Nest
    output: Nest


def shape_of(value: Tensor) -> tuple[int, ...]:
    """The shape as plain ints; a ragged dimension of a nested tensor is -1."""
    if value.is_nested:
        return (value.size(0),) + (-1,) * (value.dim() - 1)
    return tuple(value.shape)


def scope_of(node: Node) -> str:
    """The scope that holds the inner values of a fused op, the same for each of its outputs."""
    part = node.id.parts
    return f"{node.scope}/{part.op}#{part.k}"


def source_node(name: str, tensor: Tensor) -> Node:
    """The node of a parameter, a buffer or an input."""
    kind = name.partition(":")[0]
    return Node(TensorId(name), kind, "", (), shape_of(tensor), tensor.dtype, tensor.device, {}, "")


class OfCall(Protocol):
    """What stands for one call of a module, and so for what the call returned."""

    @property
    def scope(self) -> Scope:
        """The call."""


Key = str | Node | Site | Scope | OfCall
"""What names a value: an ID, the path of a module, a node, a site, or a module call of a graph."""


def is_key(key: object) -> TypeGuard[Key]:
    """Whether an object is of a kind that names a value."""
    return isinstance(key, (str, Node, Site, Scope)) or isinstance(getattr(key, "scope", None), Scope)


def id_of(key: Key) -> TensorId:
    """The ID that a key names; for a module call its path."""
    if type(key) is TensorId:
        return key
    if isinstance(key, str):
        return TensorId(key)
    if isinstance(key, (Node, Site)):
        return key.id
    call = key if isinstance(key, Scope) else getattr(key, "scope", None)
    if isinstance(call, Scope):
        return TensorId(call.path)
    raise IdError(no_key(key))


def called(key: Any) -> str:
    """What a key is called where it has no name: its ID, for a site that selects something with that."""
    return repr(key) if not is_key(key) or (isinstance(key, Site) and key.selection) else str(id_of(key))


def sites_by_name(keys: Any) -> dict[str, Site] | None:
    """Sites by name, as they are asked for: one key, several, or a mapping from names; None where they are none."""
    if isinstance(keys, Mapping):
        pairs = [(str(name), key) for name, key in keys.items()]
    else:
        several = [keys] if is_key(keys) else list(keys) if isinstance(keys, Iterable) else []
        pairs = [(called(key), key) for key in several]
    if not pairs or not all(is_key(key) for _, key in pairs) or len(dict(pairs)) < len(pairs):
        return None
    return {name: key if isinstance(key, Site) else Site(id_of(key)) for name, key in pairs}


def keys_of(keys: Key | Iterable[Key]) -> list[Key]:
    """One key or several, as a list."""
    if is_key(keys):
        return [keys]
    return list(cast("Iterable[Key]", keys))


def no_key(key: object) -> str:
    """The message for what is no key, with the keys that it holds: an attention has .pattern, a layer .resid_post."""
    kind = type(key).__name__
    if isinstance(key, torch.nn.Module):
        return f"{kind} is a module, not a key: expected its path, as in model.named_modules()."
    if told := getattr(type(key), "no_key", ""):
        return str(told)
    fields = (*getattr(key, "__dataclass_fields__", ()), *getattr(key, "_fields", ()))
    sites = [f".{name}" for name in fields if isinstance(getattr(key, name), Site)]
    if sites:
        scope = ", or .scope for the path of its module call" if isinstance(getattr(key, "scope", None), str) else ""
        return f"{kind} has several values and is no key: expected one of its sites, {', '.join(sites)}{scope}."
    expected = "expected an ID, the path of a module, a node or a site. Passes are counted in run.passes[i]."
    return f"{shown if len(shown := repr(key)) < 100 else kind} names no value: {expected}"


class Nodes(Protocol):
    """What pictures and comparisons need of a graph: its nodes in execution order, its module calls, a node by its key."""

    @property
    def model(self) -> str:
        """The class name of the root, for display."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every value, each before its readers."""

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The module calls in the order in which they began."""

    @property
    def sources(self) -> tuple[Node, ...]:
        """Parameters, buffers and inputs."""

    def __getitem__(self, key: Key) -> Node:
        """The node of an ID, inner values of fused ops included."""
