"""A sweep beside the loop over its rows, each run by the model itself on copies of model and inputs."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from fmr.nests import leaves, taken
from fmr.sweeps.grid import Grid


def summed(output: Any) -> Tensor:
    """A metric that reads all that comes out: its weighted sum, for all examples together."""
    found = [tensor.double() for _, tensor in leaves(taken(output)) if tensor.is_floating_point()]
    weighted = [one.flatten() @ torch.linspace(0.5, 1.5, one.numel(), dtype=torch.double) for one in found]
    return torch.stack(weighted).sum()


def checked(model: nn.Module, inputs: Any, sites: Any, edit: Any = None, metric: Any = summed, **more: Any) -> Grid:
    """A sweep that is the loop over its rows, whichever way it took, to a millionth of the largest value."""
    twin = copy.deepcopy(model)
    grid = fmr.sweep(model, inputs, sites, edit, metric, progress=False, **more)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    expected = []
    for one in sites:
        row = one if isinstance(one, dict) else dict.fromkeys(one if isinstance(one, tuple) else (one,), edit)
        with torch.random.fork_rng([]):
            run = fmr.run(copy.deepcopy(twin), *copy.deepcopy(args), keep=(), edits=row, **copy.deepcopy(kwargs))
        expected.append(torch.as_tensor(metric(run.output)))
    scale = max(float(value.abs().max()) for value in expected) or 1.0
    assert float((grid.values - torch.stack(expected)).abs().max()) <= 1e-6 * scale, (grid.how, grid.why)
    return grid
