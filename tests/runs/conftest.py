"""A run for the tests of saved runs."""

import pytest
import torch

import fmr
from fmr import Run
from tests.runs.stored import Tiny


@pytest.fixture(scope="module")
def tiny() -> Run:
    torch.manual_seed(0)
    return fmr.run(Tiny().eval(), torch.randn(2, 3))
