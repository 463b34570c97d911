"""The edits: small frozen values, each a pure function from what a site holds to what shall stand there instead."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from fmr.edits.layouts import check_alike, units_of
from fmr.errors import EditError
from fmr.ids import Site, TensorId
from fmr.nodes import Key
from fmr.subspaces.space import Part, Space, Subspace

Value = Tensor | float | int | bool


@dataclass(frozen=True)
class Context:
    """What an edit may know beside the value: where it is, in which pass, and how often it has fired before.

    `given` is the site's part of the first tensor that the module call was given, for sites that name a module. `source`
    gives the value that an `Interchange` takes; `examples` are those that the value holds, where it does not hold all.
    `axes` name the value's dimensions, as far as the site tells them, and `dropped` those that a single index left out.
    `coordinates` reads a value as the site holds it, where an edit acts within a subspace.
    """

    id: TensorId
    site: Site
    number: int
    fired: int
    given: Tensor | None = None
    source: Callable[[Any, Key], Tensor] | None = None
    examples: tuple[int, ...] | None = None
    axes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    coordinates: Callable[[Tensor], Tensor] | None = None


Edit = Callable[[Tensor, Context], Tensor]
"""What may stand in a mapping of edits: `f(value, context) -> value`, value and result of the same shape and type."""


@dataclass(frozen=True, eq=False, repr=False)
class _Within(ABC):
    """An edit of the value, or of its coordinates `within` a subspace, whose rest stays as it is."""

    within: Subspace | None = field(default=None, kw_only=True)

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        if self.within is None:
            return self._made(value, context)
        last = units_of(context.site, context.axes, value) - value.dim()
        with uncast(value):
            space = _now(self, context)
            inside = replace(context, coordinates=lambda given: space.read(given.movedim(last, -1)))
            coordinates = self._made(space.read(value.movedim(last, -1)), inside)
            return space.write(value.movedim(last, -1), coordinates).movedim(-1, last)

    @abstractmethod
    def _made(self, value: Tensor, context: Context) -> Tensor:
        """What shall stand in the place of a value, or of its coordinates."""

    def __repr__(self) -> str:
        names = [one.name for one in fields(self) if one.name != "within"] + ["within"] * (self.within is not None)
        given = {name: getattr(self, name) for name in names}
        told = [f"{name}={_shown(value)}" for name, value in given.items()]
        return f"{type(self).__name__}({', '.join(told)})"


@dataclass(frozen=True, repr=False)
class Zero(_Within):
    """Zero ablation: nothing is left of the value.

    >>> fmr.run(model, input_ids, edits={structure.mlps[3].out: edits.Zero()})
    """

    def _made(self, value: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(value)


@dataclass(frozen=True, eq=False, repr=False)
class Mean(_Within):
    """Mean ablation: the mean over the examples of `values`; without them, of the batch that runs.

    >>> fmr.run(model, input_ids, edits={block.z.at(heads=1): edits.Mean(other_run[block.z.at(heads=1)])})

    values: as the site holds them. over: the axes that the mean is taken over, as ("examples", "positions"); one that the
    site drops by a single index, as positions=-1, has nothing to be averaged.
    """

    values: Tensor | None = None
    over: tuple[str, ...] = ("examples",)

    def __post_init__(self) -> None:
        if self.values is not None and not isinstance(self.values, Tensor):
            kind = type(self.values).__name__
            raise EditError(f"Mean got {kind}, expected a tensor, as the site holds it: edits.Mean(run[site]).")
        if isinstance(self.over, str) or not all(isinstance(axis, str) for axis in self.over) or not self.over:
            raise EditError(f"Mean got over={self.over!r}, expected names of axes: over=('examples', 'positions').")

    def _made(self, value: Tensor, context: Context) -> Tensor:
        named = f"Mean(over={self.over}) at {context.site!r}"
        if self.values is None and context.examples is not None and "examples" in self.over:
            raise EditError(
                f"{named} means positions of which examples have different numbers, so that there is no mean over examples. "
                f"Give it values: edits.Mean(values)."
            )
        taken, axes = value if self.values is None else self.values, context.axes
        _check_exact(taken, self, context)
        if self.values is not None and context.coordinates is not None:
            taken = context.coordinates(taken)
        if unknown := [axis for axis in self.over if axis not in (*axes, *context.dropped)]:
            raise EditError(
                f"{named}, whose axes are {axes}, has none called {unknown[0]!r}. Expected some of these, or a site with "
                f"layout=(...) that names one axis per dimension."
            )
        if not set(self.over) & set(axes):
            raise EditError(
                f"{named} takes a single one of these, whose mean is the value itself. Expected a list, as "
                f"{self.over[0]}=[0], to average, or edits.Replace(values)."
            )
        if taken.dim() != len(axes):
            raise EditError(
                f"{named} brings shape {tuple(taken.shape)}, expected values with the axes {axes}, as the site holds them."
            )
        dims = [axes.index(axis) for axis in self.over if axis in axes]
        return _fitted(taken.mean(dims, keepdim=True), value, self, context).expand_as(value).clone()


@dataclass(frozen=True, eq=False, repr=False)
class Add(_Within):
    """Steering: something is added to the value.

    >>> fmr.run(model, input_ids, edits={structure.layers[2].resid_post: edits.Add(8 * direction)})

    addend: a number, or a tensor that broadcasts against the site.
    """

    addend: Value

    def _made(self, value: Tensor, context: Context) -> Tensor:
        return torch.add(value, _operand(self.addend, value, self, context))


@dataclass(frozen=True, eq=False, repr=False)
class Subtract(_Within):
    """Something is taken from the value, as a direction that shall be unlearned.

    >>> fmr.run(model, input_ids, edits={structure.layers[2].resid_post: edits.Subtract(direction)})
    """

    subtrahend: Value

    def _made(self, value: Tensor, context: Context) -> Tensor:
        return torch.sub(value, _operand(self.subtrahend, value, self, context))


@dataclass(frozen=True, eq=False, repr=False)
class Scale(_Within):
    """The value times a factor.

    >>> fmr.run(model, input_ids, edits={block.z.at(heads=1): edits.Scale(0.5)})
    """

    factor: Value

    def _made(self, value: Tensor, context: Context) -> Tensor:
        return torch.mul(value, _operand(self.factor, value, self, context))


@dataclass(frozen=True, eq=False, repr=False)
class Replace(_Within):
    """Another value in place of this one.

    >>> fmr.run(model, input_ids, edits={structure.embedding.at(positions=3): edits.Replace(vector)})

    value: a number, or a tensor that broadcasts to the site; the tensor itself is never written to.
    """

    value: Value

    def _made(self, value: Tensor, context: Context) -> Tensor:
        return _fitted(self.value, value, self, context).expand_as(value).clone()


@dataclass(frozen=True, eq=False, repr=False)
class Interchange(_Within):
    """Interchange intervention: what another run holds at the same site, or at another (Geiger et al. 2021).

    >>> fmr.run(model, input_ids, edits={block.z.at(heads=1): edits.Interchange(other_run)})
    >>> fmr.run(model, input_ids, edits={site.at(positions=-1): edits.Interchange(source_ids, at=site.at(positions=2))})

    source: a run, also one that was loaded or that had edits of its own; inputs of the model (a tensor, a tuple or a dict
    of arguments), which are run once before; or None, which leaves the value as it is. at: the site to read in the source,
    by default the edited one.
    """

    source: Any
    at: Key | None = None

    def _made(self, value: Tensor, context: Context) -> Tensor:
        if self.source is None:
            return value
        if context.source is None:
            raise EditError(f"{self!r} was called outside a run, which reads its source. Give it to edits={{site: edit}}.")
        taken = context.source(self.source, context.site if self.at is None else self.at)
        taken = taken if context.coordinates is None else context.coordinates(taken)
        check_alike(context.site, context.axes, taken, value, context.coordinates is not None)
        return _fitted(taken, value, self, context).expand_as(value).clone()

    def __repr__(self) -> str:
        where = "" if self.at is None else f", at={self.at!r}"
        within = "" if self.within is None else f", within={self.within!r}"
        source = repr(self.source) if isinstance(self.source, str) else type(self.source).__name__
        return f"Interchange({source}{where}{within})"


@dataclass(frozen=True, repr=False)
class Noise(_Within):
    """Gaussian noise is added, the same for the same seed, site and firing, on any device.

    >>> fmr.run(model, input_ids, edits={structure.embedding.at(positions=[2, 3]): edits.Noise(std=0.1, seed=0)})

    std: its standard deviation, in the units of the value.
    """

    std: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not (_is_number(self.std) and self.std >= 0):
            raise EditError(f"Noise got std={self.std!r}, expected a number from 0 on.")

    def _made(self, value: Tensor, context: Context) -> Tensor:
        _check_exact(value, self, context)
        told = hashlib.blake2b(f"{self.seed} {context.id} {context.fired}".encode(), digest_size=7).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(told, "big"))
        noise = torch.randn(value.shape, generator=draw, dtype=torch.float32)
        return value + self.std * noise.to(value)


@dataclass(frozen=True, repr=False)
class Clamp(_Within):
    """The value is kept within bounds, of which one may be missing.

    >>> fmr.run(model, input_ids, edits={structure.mlps[3].post.at(units=7): edits.Clamp(lo=4.0)})
    """

    lo: float | None = None
    hi: float | None = None

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.lo, self.hi) if bound is not None]
        if not bounds or not all(map(_is_number, bounds)):
            raise EditError(f"{self!r}: expected a number for lo, for hi, or for both.")
        if len(bounds) == 2 and bounds[0] > bounds[1]:
            raise EditError(f"{self!r}: lo lies above hi. Expected Clamp(lo={bounds[1]}, hi={bounds[0]}).")

    def _made(self, value: Tensor, context: Context) -> Tensor:
        return value.clamp(self.lo, self.hi)


@dataclass(frozen=True)
class Skip:
    """A module call hands on what it was given, as if it were not there; for sites that name a module.

    A block is left out so; an attention or a memory would hand on its normed input, and `Zero` is the run without it.

    >>> fmr.run(model, input_ids, edits={"transformer.h.1": edits.Skip()})
    """

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        if context.given is None:
            raise EditError(
                f"Skip at {context.site!r}: expected the path of a module, as 'h.3.mlp', whose input is handed on."
            )
        return _fitted(context.given, value, self, context).clone()


@dataclass(frozen=True)
class OnGradient:
    """An edit of the gradient that flows back through the site, instead of the value (needs grad=True and `backward()`).

    >>> with fmr.track(model, keep=(), grad=True, edits={site: edits.OnGradient(edits.Clamp(-1, 1))}) as run:
    ...     model(**inputs).logits.sum().backward()

    edit: any other edit; it is given the gradient where it would be given the value, and an `Interchange` reads the
    gradients of its source.
    """

    edit: Edit

    def __post_init__(self) -> None:
        if not callable(self.edit) or isinstance(self.edit, (type, OnGradient)):
            raise EditError(f"OnGradient got {self.edit!r}, expected one of fmr.edits or f(gradient, context).")

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        raise EditError(f"{self!r} acts on the gradient at {context.site!r} and is no function of the value.")


def _shown(value: object) -> str:
    """A setting as an edit prints it: of a tensor of many numbers its shape alone."""
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() > 1 else repr(value)


def _now(edit: _Within, context: Context) -> Subspace:
    """The subspace of an edit as it is at this moment, for the examples that the value holds."""
    space = edit.within
    if not isinstance(space, Subspace):
        raise EditError(
            f"{type(edit).__name__} at {context.site!r} got within={space!r}, expected one of fmr.subspaces, or an object "
            f"with read(values) and write(values, coordinates)."
        )
    if isinstance(space, Part) and context.examples is not None:
        return space.of(context.examples)
    return space.now() if isinstance(space, Space) else space


def uncast(value: Tensor) -> AbstractContextManager[Any]:
    """A block in which nothing is computed in another type than its operands have."""
    device = value.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _operand(given: Any, value: Tensor, edit: object, context: Context) -> Value:
    """The same, but that a Python number stays one: torch rounds the result once, and not the number before."""
    fitted = _fitted(given, value, edit, context)
    return given if isinstance(given, (int, float)) and not isinstance(given, bool) else fitted


def _fitted(given: Any, value: Tensor, edit: object, context: Context) -> Tensor:
    """What an edit brings, on the value's device; it must have the value's type and broadcast to its shape."""
    if not isinstance(given, Tensor):
        return _numbers(given, value, edit, context)
    if given.dtype != value.dtype:
        raise EditError(
            f"{type(edit).__name__} at {context.site!r} brings {given.dtype}, expected {value.dtype}. Convert it: "
            f".to({value.dtype})."
        )
    return _shaped(given, value, edit, context)


def _shaped(given: Tensor, value: Tensor, edit: object, context: Context) -> Tensor:
    """The same of what has the value's type."""
    if context.examples is not None and given.dim() == value.dim() and len(given) not in (1, len(value)):
        given = given[list(context.examples)]
    try:
        fits = given.shape == value.shape or torch.broadcast_shapes(given.shape, value.shape) == value.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise EditError(
            f"{type(edit).__name__} at {context.site!r} brings shape {tuple(given.shape)}, expected one that broadcasts to "
            f"{tuple(value.shape)}, {'what the site holds' if context.coordinates is None else 'its coordinates'}."
        )
    return given.to(value.device)


def _numbers(given: Any, value: Tensor, edit: object, context: Context) -> Tensor:
    """Numbers in the value's type, which must not lose any of them."""
    try:
        made = torch.as_tensor(given, dtype=value.dtype, device=value.device)
        lost = not (value.is_floating_point() or value.is_complex()) and bool((torch.as_tensor(given) != made.cpu()).any())
    except (TypeError, ValueError, RuntimeError):
        raise EditError(f"{edit!r} at {context.site!r}: expected a number or a tensor.") from None
    if lost:
        raise EditError(f"{edit!r} at {context.site!r}, which holds {value.dtype}: expected whole numbers.")
    return made if made.dim() == 0 else _shaped(made, value, edit, context)


def _check_exact(value: Tensor, edit: object, context: Context) -> None:
    if not (value.is_floating_point() or value.is_complex()):
        raise EditError(f"{edit!r} at {context.site!r}, which holds {value.dtype}: expected a value with fractions.")


def _is_number(given: object) -> bool:
    return isinstance(given, (int, float)) and given == given
