"""What every test shares: one thread and one seed, so that results are the same on any machine and in any order."""

import sys

import pytest
import torch

torch.set_num_threads(1)

OF_TORCH = (
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning",
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
)
"""Warnings that torch gives about its own code when a model uses it; all others are errors."""


def pytest_configure(config: pytest.Config) -> None:
    for line in OF_TORCH:
        config.addinivalue_line("filterwarnings", line)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


def pytest_runtest_teardown() -> None:
    """Figures of one test are none of the next, which would be warned of their number."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if hasattr(pyplot, "close"):  # a test may put something else in its place
        pyplot.close("all")
