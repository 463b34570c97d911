"""What stands where a layer was: nothing but the stream, or several layers in turn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from analyzers.surgery.places import Place


class _StandIn(nn.ModuleList):
    """A module that answers for the one whose place it has where code asks for its attributes."""

    def __init__(self, place: Place, for_module: nn.Module, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        self.place, self.stands_for = place, (for_module,)  # in a tuple, so that it is none of the modules
        self.train(for_module.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "stands_for" not in self.__dict__:
                raise
            return getattr(self.stands_for[0], name)

    def train(self, mode: bool = True) -> _StandIn:
        """Train or evaluate the layers in it; a layer that is left out stays as it is."""
        self.training = mode
        for module in self:
            if module.training != mode:
                module.train(mode)
        return self


class Passing(_StandIn):
    """Hands the stream on as it is given; of what else the layer returned, what it was given itself, and else None."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stream in the form in which the layer returned it."""
        place = self.place

        def at(name: int | str | None) -> Any:
            return None if name is None else args[name] if isinstance(name, int) else kwargs[name]

        if place.returned is None:
            return at(place.given)
        others = [at(name) for name in place.others]
        others[place.returned] = at(place.given)
        return tuple(others)


class Chain(_StandIn):
    """Layers in turn: each is given what the one before made of the stream, and all what else the first was given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the last of the layers returns."""
        place, given = self.place, list(args)
        output: Any = None
        for module in self:
            output = module(*given, **kwargs)
            stream = output if place.returned is None else output[place.returned]
            if isinstance(place.given, int):
                given[place.given] = stream
            else:
                kwargs = {**kwargs, place.given: stream}
        return output


def twin(module: nn.Module, model: nn.Module) -> nn.Module:
    """Another module with the same parameters and buffers, the tensors themselves, and with attributes of its own.

    >>> other = twin(model.transformer.h[0], model)
    >>> other.mlp.c_fc.weight is model.transformer.h[0].mlp.c_fc.weight, other is model.transformer.h[0]
    (True, False)
    """
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
