"""What every test shares: one thread, so that results are the same on any machine."""

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
