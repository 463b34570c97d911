"""A lab with a small network of known weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

import analyzers


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


@pytest.fixture
def lab(tmp_path: Path) -> analyzers.Lab:
    return analyzers.Lab(network(), tmp_path / "lab")
