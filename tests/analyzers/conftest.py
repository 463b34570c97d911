"""The language model that the methods are tried on, loaded once for each file."""

from typing import Any

import pytest
from torch import nn

import fmr


@pytest.fixture(scope="module")
def loaded() -> tuple[nn.Module, Any]:
    model, tokenizer = fmr.zoo.load("facts")
    return model, tokenizer
