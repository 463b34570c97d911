"""Modules of a few lines for tests that must know every op, and random trees of modules."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Fn(nn.Module):
    """A module whose forward is a given function of the module and its inputs; keywords are its attributes."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "mul": lambda x: x * 0.5,
    "add": lambda x: x + 1.0,
    "sub": lambda x: 2 - x,
    "softmax": lambda x: x.softmax(-1),
    "transpose": lambda x: x.transpose(0, 1).transpose(0, 1),
}


class Tree(nn.Module):
    """A module that runs ops and calls children in a given order; `steps` can be changed later."""

    def __init__(self, steps: list[str], children: dict[str, nn.Module]) -> None:
        super().__init__()
        self.steps = steps
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = OPS[step](x) if step in OPS else self.get_submodule(step)(x)
        return x


def random_tree(rng: random.Random, depth: int = 2) -> Tree:
    """A random tree of modules; a child may be called several times, or under two names."""
    children: dict[str, nn.Module] = {f"part{n}": _child(rng, depth) for n in range(rng.randint(0, 3) if depth else 0)}
    if children and rng.random() < 0.3:
        children["again"] = rng.choice(list(children.values()))
    steps = rng.choices(list(OPS), k=rng.randint(1, 4)) + list(children) + rng.choices(list(children) or ["relu"], k=1)
    rng.shuffle(steps)
    return Tree(steps, children)


def _child(rng: random.Random, depth: int) -> nn.Module:
    return nn.Linear(4, 4) if rng.random() < 0.3 else random_tree(rng, depth - 1)


def trees_in(tree: Tree) -> list[tuple[str, Tree]]:
    """Every module of a tree that has steps of its own, by path."""
    return [(path, module) for path, module in tree.named_modules() if isinstance(module, Tree)]
