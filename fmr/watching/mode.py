"""What both watchers share: where a pass begins, and what a call overwrites."""

from typing import Any

import torch
from torch import Tensor, nn

from fmr.nests import Nest, leaves
from fmr.ops.names import Op
from fmr.watching.calls import WatcherMode
from fmr.watching.scopes import refuse_transformed

is_traced = torch.compiler.is_dynamo_compiling


functorch_level = torch._C._functorch.peek_interpreter_stack


def fills_parameters(module: nn.Module) -> bool:
    """Whether a lazy layer still gives its parameters shapes and first values: that is no part of its forward."""
    return "_initialize_hook" in module.__dict__


class RootWatcher(WatcherMode):
    """A mode that knows where a pass begins: at each outermost call of `root`, or of any module where none is given."""

    def __init__(self, root: nn.Module | None) -> None:
        super().__init__()
        self.root = root
        self.missed: list[nn.Module] = []
        self.foreign: list[nn.Module] = []

    def begins_pass(self, module: nn.Module) -> bool:
        """Whether this call, made outside any pass, begins one. Recomputation during backward begins none."""
        if torch._C._current_graph_task_id() != -1:
            return False
        if self.root is None or module is self.root:
            if functorch_level() is not None:
                refuse_transformed(module)
            return True
        self.missed.append(module)
        return False


def written_by(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call overwrites."""
    written = op.writes(args, kwargs) if op.writes else []
    return written + [tensor for _, tensor in leaves(kwargs["out"])] if "out" in kwargs else written


def made_by_writing(written: list[Tensor]) -> Nest:
    """What a function that returns no tensor (`__setitem__`) made: the new value of what it overwrote."""
    return None if not written else written[0] if len(written) == 1 else tuple(written)
