"""The memory of a layer as a matrix that can be changed: which parameter holds its values, and how they lie there."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from analyzers.protocol import AnalyzerError
from fmr.structure.memories.memory import Memory
from fmr.structure.parts import Structure


@dataclass(frozen=True)
class Values:
    """Where the values of a memory lie: in which parameter, along which dimension, from which place on, and how many."""

    parameter: str
    dim: int
    first: int
    n: int

    def of(self, weight: Tensor) -> Tensor:
        """The values as a view of the parameter, a row for each memory."""
        return weight.narrow(self.dim, self.first, self.n).transpose(0, self.dim)

    def weight(self, model: nn.Module) -> nn.Parameter:
        """The parameter in a model."""
        found = dict(model.named_parameters(remove_duplicate=False)).get(self.parameter)
        if found is None or found.dim() != 2 or found.shape[self.dim] < self.first + self.n:
            shape = "none" if found is None else str(tuple(found.shape))
            raise AnalyzerError(
                f"{type(model).__name__} has as {self.parameter!r} {shape}, expected a matrix with {self.n} memories along "
                f"dimension {self.dim}. Use the model that the edit was made for."
            )
        return found


def default_layer(layers: int) -> int:
    """The layer that is changed where none is named: a sixth of the way up."""
    return layers // 6


def memory_of(structure: Structure, layer: int | None) -> tuple[int, Memory]:
    """The memory of a layer, with the number of the layer."""
    have = [number for number, one in enumerate(structure.layers) if one.mlp is not None]
    wanted = next((one for one in have if one >= default_layer(len(structure.layers))), None) if layer is None else layer
    if wanted not in have or isinstance(wanted, bool):
        raise AnalyzerError(
            f"layer={layer!r}: {structure.model} has memories in layers {have or 'nowhere'}. Expected one of these."
        )
    found = structure.layers[wanted].mlp
    assert found is not None
    return wanted, found


def values_of(memory: Memory, model: nn.Module) -> Values:
    """Where the values of a memory lie, if that is a matrix which is a parameter and has a row or column for each."""
    name = memory.w_out.removeprefix("param:")
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(name)
    read = memory.weights.get(memory.values)
    if parameter is not None and read is not None and parameter.dim() == read.dim() == 2 and memory.axis == -1:
        for dim, same in ((memory.value_dim, parameter), (1 - memory.value_dim, parameter.mT)):
            if read.shape == same.shape and torch.equal(read, same):
                return Values(name, dim, memory.first or 0, memory.n)
    raise AnalyzerError(
        f"The values of the memories of {memory.scope!r} come from {memory.w_out}, which is no matrix of {memory.n} rows or "
        "columns that could be changed. Expected a layer whose second projection reads a parameter as it is; merge adapters "
        "and dequantise first, or name another layer."
    )
