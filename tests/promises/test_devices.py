"""The promises on an accelerator and in half precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.models import bits, build, tensors

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
MODELS = ("gpt2", "gpt2_eager", "bert", "llama", "mixtral", "t5", "vit", "whisper", "encoder", "lstm", "cnn")


def moved(name: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
    model, args, kwargs = build(name)

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, (tuple, list)):
            return type(value)(move(item) for item in value)
        return {key: move(item) for key, item in value.items()} if isinstance(value, dict) else value

    return model.to(device, dtype), move(args), move(kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_same_bits(name: str, device: str, dtype: torch.dtype) -> None:
    model, args, kwargs = moved(name, device, dtype)
    with torch.no_grad():
        plain = [t.cpu().float() for t in flat(model(*args, **kwargs))]
        run = fmr.run(model, *args, **kwargs)
    assert bits([t.cpu().float() for t in flat(run.output)]) == bits(plain)
    run.graph.lint()
    assert all(node.device.type == device for node in run.graph.nodes if node.op == "param")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gpt2", "gpt2_eager", "bert", "llama"])
def test_patterns_are_certified_and_read_again(name: str, device: str, dtype: torch.dtype) -> None:
    model, args, kwargs = moved(name, device, dtype)
    run = fmr.run(model, *args, **kwargs)
    structure = fmr.locate(run)
    assert structure.attention, structure
    assert all(block.certified for block in structure.attention)
    sites = [block.pattern for block in structure.attention]
    again = fmr.run(model, *args, keep=sites, to="cpu", stop=True, **kwargs)
    for site in sites:
        assert again[site].device.type == "cpu"
        assert torch.equal(again[site], run[site].cpu())


def flat(value: Any) -> list[Tensor]:
    return list(tensors(value))
