"""Which parameters hold the keys and values of feed-forward blocks, by hooks: the projections that make the coefficients."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import groundtruth
import tinymodels
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fmr.errors import StructureError

BENDS = "gelu gelu_new quick_gelu relu silu relu2 tanh sigmoid mish leaky_relu gelu_10 relu6 laplace linear".split()
"""The nonlinearities of the library that are tried."""


class Keys(NamedTuple):
    """The parameters of keys, gate and values behind a second projection, and the vectors of its first and last memory."""

    w_in: str
    w_gate: str | None
    w_out: str
    ends: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def keys_of(
    model: nn.Module, inputs: Mapping[str, Any], seconds: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Keys]]:
    """The inputs of the second projections in the order in which these run, and what holds the keys of each.

    No keys are told where no two projections reproduce the input.
    """
    modules = dict(model.named_modules())
    blocks = {name: block_of(name, modules) for name in seconds}
    firsts = {
        name: [n for n, m in modules.items() if n.startswith(block + ".") and n != name and groundtruth.linear_like(m)]
        for name, block in blocks.items()
    }
    outputs = outputs_of(model, inputs, {*seconds, *(n for names in firsts.values() for n in names)})
    seconds = {name: seconds[name] for name in outputs if name in seconds}
    names = {id(parameter): f"param:{name}" for name, parameter in model.named_parameters()}  # of a tied one, its first
    found = {}
    for name, post in seconds.items():
        pair = next(producers(post, {n: outputs[n] for n in firsts[name] if n in outputs}), None)
        if pair is not None:
            up, gate, units = pair
            keys, values = rows(modules[up])[units], rows(modules[name]).mT
            ends = tuple((keys[i], values[i]) for i in (0, -1))
            w_in, w_out = (names[id(modules[one].weight)] for one in (up, name))
            found[name] = Keys(w_in, names[id(modules[gate].weight)] if gate else None, w_out, ends)
    return seconds, found


def agrees(block: Any, truth: Keys) -> bool:
    """Whether a located memory names these parameters and gives the same vectors for its first and its last unit."""
    names = block.w_in == truth.w_in and block.w_gate == truth.w_gate and block.w_out == truth.w_out
    pairs = zip((0, block.n - 1), truth.ends, strict=True)
    try:
        return names and all(torch.equal(a, b) for i, known in pairs for a, b in zip(block.memory(i), known, strict=True))
    except StructureError:
        return False


def block_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The layer around a projection: the innermost entry of a list of modules that holds more than one projection."""
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:size])
        if sum(map(groundtruth.linear_like, modules[path].modules())) > 1:
            return path
    return ""


def outputs_of(model: nn.Module, inputs: Mapping[str, Any], names: set[str]) -> dict[str, Tensor]:
    """The results of these modules in the order in which they come."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, out: Any) -> None:
        outputs[name] = out[0] if isinstance(out, tuple) else out

    known = [(name, module) for name, module in model.named_modules() if name in names]
    hooks = [module.register_forward_hook(lambda _, __, out, name=name: keep(name, out)) for name, module in known]
    tinymodels.run(model, inputs)
    for hook in hooks:
        hook.remove()
    return outputs


def rows(module: nn.Module) -> Tensor:
    """The weight of a projection as (outputs, inputs)."""
    weight = module.weight.detach()
    return weight.mT if type(module).__name__ == "Conv1D" else weight.flatten(1)


def producers(post: Tensor, outputs: Mapping[str, Tensor]) -> Iterator[tuple[str, str | None, slice]]:
    """The projections whose results, one bent and multiplied by the other, make coefficients; which units are keys."""
    n = post.shape[-1]
    whole = {
        name: out.reshape(post.shape) for name, out in outputs.items() if out.numel() == post.numel() and out.shape[-1] == n
    }
    fused = {name: out for name, out in outputs.items() if out.numel() == 2 * post.numel() and out.shape[-1] == 2 * n}
    halves = (slice(0, n), slice(n, 2 * n)), (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    for bend in map(ACT2FN.__getitem__, BENDS):
        for gate, out in whole.items():
            bent = bend(out)
            if near(bent, post):
                yield gate, None, slice(None)
            yield from ((up, gate, slice(None)) for up, other in whole.items() if up != gate and near(bent * other, post))
        for name, out in fused.items():
            for gate, up in (*halves, *(half[::-1] for half in halves)):
                if near((bend(out[..., gate]) * out[..., up]).reshape(post.shape), post):
                    yield name, None, up


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same up to rounding."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())
