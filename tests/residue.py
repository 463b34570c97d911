"""What tracking could leave behind in torch and in a model, as values to compare before and after."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules


def torch_state() -> dict[str, Any]:
    """Everything in torch and in this thread that a tracker could have changed."""
    return {
        "nn.Module": dict(vars(nn.Module)),
        "bodies": [(f.__code__, f.__defaults__, f.__kwdefaults__) for f in (nn.Module.__call__, nn.Module._call_impl)],
        "has_torch_function": torch.overrides.has_torch_function,
        "functional": dict(vars(torch.nn.functional)),
        "overrides": dict(vars(torch.overrides)),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "functorch": torch._C._functorch.peek_interpreter_stack(),
        "global hooks": {
            k: list(v.items()) for k, v in vars(modules).items() if k.startswith("_global") and hasattr(v, "items")
        },
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "seen by python": (sys.gettrace(), sys.getprofile(), sys.excepthook, sys.unraisablehook),
    }


def model_state(model: nn.Module) -> dict[str, Any]:
    """The class, attribute names and hooks of every module of a model."""
    return {
        path: (
            type(module),
            sorted(vars(module)),
            {k: list(v.items()) for k, v in vars(module).items() if "hooks" in k and v},
        )
        for path, module in model.named_modules()
    }


def random_state() -> bytes:
    """torch's random state on the CPU."""
    return torch.get_rng_state().numpy().tobytes()
