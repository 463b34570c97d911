"""Surgery: layers and heads left out, repeated, reordered or replaced while a block lasts, and nothing else."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from analyzers.protocol import AnalyzerError, check_eval, check_model
from analyzers.surgery.export import called, exported
from analyzers.surgery.flow import flow_of
from analyzers.surgery.heads import HeadOrder, Heads
from analyzers.surgery.operate import Running, operate
from analyzers.surgery.places import Place, places_of, ties
from fmr.errors import number_of, whole_number
from fmr.structure.parts import Structure

if TYPE_CHECKING:
    from typing import Self


class Surgery:
    """Layers and heads left out, repeated, reordered or replaced, in every run and every generation of a block.

    >>> surgery = analyzers.Surgery(model, structure).delete(2).repeat(1)
    >>> with surgery:
    ...     logits = model(**inputs, use_cache=False).logits
    >>> surgery.flow(**inputs)
    (0, 1, 1, 3)

    structure: what `fmr.locate` found in a run of the model. Layers have the numbers that they have in `structure.layers`,
    whatever was done before; each method returns a surgery with one operation more. A layer is the module whose call holds
    what the layer writes, from stream to stream: its place is taken by another, by several or by none, which is what the
    model would be with that list of modules. Heads are changed in their weights. After the block each module is where it
    was, and each weight has the same bits, whatever was raised inside; during it the operation is there for every thread.

    A layer that has no call of its own, that makes more than the stream for others, or whose place was given other values
    beside the stream than its own, as another mask, is an `AnalyzerError`; what a place is given stays with the place, and
    what a layer hands on as it was given it goes on. So is a call of the model that does not go through the modules that
    were put there, as where the code keeps a list of its layers itself.
    Layers keep their own numbers, until they are given a cache: then they are counted anew, where that changes no bit of
    what a layer computes; where it does or there is no place, the run is refused, and `use_cache=False` is the remedy.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        check_model(model, "Surgery")
        self.model, self.structure = model, structure
        if not isinstance(structure, Structure):
            raise AnalyzerError(
                f"Surgery got {type(structure).__name__} as its structure, expected fmr.locate(fmr.run(model, ...))."
            )
        self._places = places_of(structure)
        known = dict(model.named_modules())
        strange = next((one.module for one in self._places if isinstance(one, Place) and one.module not in known), None)
        if strange is not None:
            raise AnalyzerError(
                f"{type(model).__name__} has no module {strange!r}, which is a layer of the structure of {structure.model}. "
                "Expected the structure of this model: fmr.locate(fmr.run(model, ...))."
            )
        self._ties = ties(structure, self._places)
        self._order: dict[int, tuple[int, ...]] = {n: (n,) for n in range(len(self._places))}
        self._heads = Heads(structure, {})
        self._told: tuple[str, ...] = ()
        self._undo: ExitStack | None = None
        self._running: tuple[Running, ...] = ()

    # ---- operations

    def delete(self, *layers: int | str, heads: int | Sequence[int] | None = None) -> Self:
        """Leave out layers, or with `heads` these heads of one layer.

        >>> analyzers.Surgery(model, structure).delete(0, heads=[1, 2])
        Surgery of GPT2LMHeadModel: layer 0 without heads 1, 2
        >>> analyzers.Surgery(model, structure).delete("layer 2", "head 0.1")
        Surgery of GPT2LMHeadModel: without layer 2; layer 0 without head 1

        layers: numbers, or the names that the costs of parts have, those of heads among them; heads of a layer that is left
        out in the same call go with it.
        The call of a layer that is left out returns the stream that it was given. A head that is left out writes nothing;
        the bias of the output projection stays.
        """
        if not layers or (heads is not None and not isinstance(heads, int) and not list(heads)):
            raise AnalyzerError(f"delete got {list(layers)} and heads={heads!r}: expected what to leave out, as delete(2).")
        numbers, by_layer = parts_named(layers)
        if heads is not None:
            (layer,) = self._one(numbers)
            by_layer |= {layer: [heads] if isinstance(heads, int) else list(heads)}
        found = self._without(numbers) if numbers and heads is None else self
        for layer, chosen in by_layer.items():
            if heads is None and layer in numbers:  # which are left out with it
                continue
            if len({*chosen}) < len(chosen):
                raise AnalyzerError(f"heads={chosen} of layer {layer}: expected each head once.")
            told = f"layer {layer} without {_many('head', chosen)}"
            found = found._with_heads({(layer, head): None for head in chosen}, told)
        return found

    def _without(self, layers: Sequence[int]) -> Self:
        """A surgery without these layers."""
        for layer in layers:
            self._running_layer(layer)
        if len({*layers}) < len(layers):
            raise AnalyzerError(f"delete got layers {list(layers)}: expected each once.")
        order = {n: tuple(one for one in own if one not in layers) for n, own in self._order.items()}
        return self._with(order, f"without {_many('layer', layers)}")

    def repeat(self, layer: int, times: int = 2) -> Self:
        """Run a layer so many times in turn, each time on what it made the time before.

        >>> analyzers.Surgery(model, structure).repeat(1, times=3)
        Surgery of GPT2LMHeadModel: layer 1 run 3 times
        """
        self._running_layer(layer)
        if whole_number(times) is None or times < 1:
            raise AnalyzerError(f"times={times!r}: expected how often layer {layer} runs, 1 or more.")
        order = {n: tuple(one for one in own for _ in range(times if one == layer else 1)) for n, own in self._order.items()}
        return self._with(order, f"layer {layer} run {times} times")

    def replace(self, layer: int, by: int, heads: Mapping[int, int] | None = None) -> Self:
        """Run another layer in the place of one, or with `heads` give heads of it the weights of heads of the other.

        >>> analyzers.Surgery(model, structure).replace(2, by=1, heads={0: 3})
        Surgery of GPT2LMHeadModel: layer 2 with heads of layer 1 {0: 3}

        heads: by head of the one the head of the other. Heads that share keys and values are replaced together; a bias of
        their scores that is no weight of theirs stays with the place.
        """
        if heads is not None:
            if not isinstance(heads, Mapping) or not heads:
                raise AnalyzerError(
                    f"heads={heads!r}: expected by head of layer {layer} the head of layer {by} in its place, as {{0: 3}}."
                )
            pairs = {(layer, head): (by, other) for head, other in heads.items()}
            return self._with_heads(pairs, f"layer {layer} with heads of layer {by} {dict(heads)}")
        if self._running_layer(layer).stream != self._placed(by).stream:
            raise AnalyzerError(f"Layers {layer} and {by} write to different streams. Expected two of one stream.")
        order = {n: tuple(by if one == layer else one for one in own) for n, own in self._order.items()}
        return self._with(order, f"layer {by} for layer {layer}")

    def reorder(self, order: Sequence[int], layer: int | None = None) -> Self:
        """Run the layers of a stream in this order, or with `layer` put the heads of that layer into this order.

        >>> analyzers.Surgery(model, structure).reorder([0, 2, 1, 3]).flow(**inputs)
        (0, 2, 1, 3)

        order: numbers of layers of one stream; some may be missing, and some be there several times. Of heads each once:
        the model stays the same but for rounding, and where the scores meet something for each head, as a linear or a
        relative bias, which would stay at its place, it is an `AnalyzerError`.
        """
        if layer is not None:
            self._heads.check_order(layer, order)
            pairs = {(layer, head): (layer, other) for head, other in enumerate(order) if head != other}
            return self._with_heads(pairs, f"heads of layer {layer} in the order {list(order)}")
        streams = {self._running_layer(one).stream for one in order}
        if len(streams) != 1:
            raise AnalyzerError(f"order={list(order)!r}: expected numbers of layers of one stream, at least one.")
        own = [n for n, one in enumerate(self._places) if isinstance(one, Place) and one.stream in streams]
        slots = [order[n : n + 1] for n in range(len(own) - 1)] + [order[len(own) - 1 :]]
        placed = {n: tuple(several) for n, several in zip(own, slots, strict=True)}
        return self._with({**self._order, **placed}, f"layers in the order {list(order)}")

    def _with(self, order: dict[int, tuple[int, ...]], told: str) -> Self:
        return self._changed(told, _order=order)

    def _with_heads(self, pairs: HeadOrder, told: str) -> Self:
        joined = self._heads.joined(pairs)
        for layer in dict.fromkeys(layer for layer, _ in pairs):
            self._check_runs(layer)
        return self._changed(told, _heads=joined)

    def _changed(self, told: str, **changes: Any) -> Self:
        other = copy.copy(self)
        vars(other).update(changes, _told=(*self._told, told), _undo=None, _running=())
        return other

    # ---- the block

    def __enter__(self) -> Self:
        if self._undo is not None:
            raise AnalyzerError("The surgery is under way already. Expected one block at a time.")
        with ExitStack() as undo:
            self._heads.write(self.model, undo)
            self._running = operate(self.model, self.structure.graph, self._places, self._order, self._ties, undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        undo, self._undo = self._undo, None
        assert undo is not None
        undo.close()

    def flow(self, *args: Any, **inputs: Any) -> tuple[int, ...]:
        """The layers that the stream goes through, in order, read off the recorded graph of a run of the operated model.

        >>> analyzers.Surgery(model, structure).replace(3, by=0).flow(**inputs)
        (0, 1, 2, 0)

        A layer that was not called, or that was given something else than the layer before it made, is an `AnalyzerError`:
        then the code does not run its layers as they lie in its modules. Of several streams the layers come one stream after
        the other.
        """
        if self._undo is None:
            with self:
                return self.flow(*args, **inputs)
        return flow_of(self.model, self._places, self._running, args, {"use_cache": False, **inputs})

    def export(self, *args: Any, **inputs: Any) -> nn.Module:
        """The operated model as a plain module of its own: a copy, in which nothing of fmr is left.

        >>> smaller = analyzers.Surgery(model, structure).delete(2).delete(0, heads=1).export(**inputs)
        >>> len(smaller.transformer.h), len(model.transformer.h)
        (3, 4)

        args, inputs: of one forward, in which the copy must answer as the operated model does, to the bit, or it is an
        `AnalyzerError`. A layer that runs twice is there twice, with weights of its own. The copy is saved and loaded by its
        `state_dict`, as any module. Its layers are numbered anew where that changes no bit. Of the settings that the model
        holds those count its layers that a model is built of, where building one of them gives the modules of the copy: so a
        library that saves them beside the weights loads the same model. Where none does, load the `state_dict` into a copy.
        """
        check_eval(self.model)
        with self:
            expected = called(self.model, args, inputs)
        with ExitStack() as undo:
            self._heads.write(self.model, undo)
            return exported(self.model, self._places, self._order, expected, args, inputs)

    def _placed(self, layer: int) -> Place:
        """The place of a layer; why it has none is told."""
        number = whole_number(layer)
        if number is None or not 0 <= number < len(self._places):
            raise AnalyzerError(f"Layer {layer!r}: {self.structure.model} has layers 0 to {len(self._places) - 1}.")
        place = self._places[number]
        if isinstance(place, str):
            raise AnalyzerError(
                f"Layer {layer} cannot be operated on: {place}. Expected a layer that is one module call from stream to "
                "stream; edits.Zero() at what it writes leaves it out of a run."
            )
        return place

    def _running_layer(self, layer: int) -> Place:
        """The place of a layer that still runs."""
        place = self._placed(layer)
        self._check_runs(layer)
        return place

    def _check_runs(self, layer: int) -> None:
        if not any(layer in own for own in self._order.values()):
            raise AnalyzerError(f"Layer {layer} does not run any more: {'; '.join(self._told)}. Expected one that does.")

    def _one(self, layers: Sequence[int]) -> tuple[int]:
        if len(layers) != 1:
            raise AnalyzerError(f"heads= with {number_of(len(layers), 'layer')}: expected the heads of one layer.")
        return (layers[0],)

    def __repr__(self) -> str:
        return f"Surgery of {type(self.model).__name__}: {'; '.join(self._told) or 'nothing done'}"


def parts_named(given: Sequence[int | str]) -> tuple[list[int], dict[int, list[int]]]:
    """The layers among numbers and names of parts, and by layer the heads.

    >>> parts_named([3, "layer 1", "head 2.0", "head 2.3"])
    ([3, 1], {2: [0, 3]})
    """
    layers: list[int] = []
    heads: dict[int, list[int]] = {}
    for one in given:
        match = _PART.fullmatch(one) if isinstance(one, str) else None
        if isinstance(one, str) and match is None:
            raise AnalyzerError(
                f"delete got {one!r}: expected the number of a layer, 'layer 2' or 'head 2.1'. What a memory writes is left "
                "out of a run by edits.Zero() at structure.layers[2].mlps[0].out."
            )
        if match is not None and match["head"] is not None:
            heads.setdefault(int(match["of"]), []).append(int(match["head"]))
        else:
            layers.append(one if not isinstance(one, str) else int(one.removeprefix("layer ")))
    return layers, heads


_PART = re.compile(r"layer \d+|head (?P<of>\d+)\.(?P<head>\d+)")
"""How parts are called by what they cost."""


def _many(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
