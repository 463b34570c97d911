"""The promises on an accelerator and in half precision."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from fmr.structure.parts import Structure
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


# ---- edits, replays and sweeps


class Placed(NamedTuple):
    """A model on a device, what it is called with, a recorded run and its structure."""

    model: nn.Module
    args: Any
    kwargs: Any
    run: fmr.Run
    structure: Structure

    def again(self, **more: Any) -> fmr.Run:
        return fmr.run(self.model, *self.args, **{**self.kwargs, **more})


def placed(name: str, device: str, dtype: torch.dtype) -> Placed:
    model, args, kwargs = moved(name, device, dtype)
    run = fmr.run(model, *args, **kwargs)
    return Placed(model, args, kwargs, run, fmr.locate(run))


ON = [pytest.param(device, dtype, id=f"{device}-{dtype}") for device in DEVICES for dtype in (torch.float32, torch.bfloat16)]
ATTENTIVE = ("gpt2", "gpt2_eager", "bert", "llama", "mixtral")


@pytest.mark.parametrize(("device", "dtype"), ON)
@pytest.mark.parametrize("name", ATTENTIVE)
def test_an_edit_replayed_is_the_model_under_it_to_the_bit(name: str, device: str, dtype: torch.dtype) -> None:
    one = placed(name, device, dtype)
    block, layer = one.structure.attention[0], one.structure.layers[0]
    for site, edit in {
        block.z.at(heads=1, positions=[2, 3]): edits.Scale(0.5),
        block.pattern.at(heads=0): edits.Zero(),
        layer.resid_post.at(positions=-1): edits.Noise(0.1, seed=3),
    }.items():
        edited, replayed = one.again(edits={site: edit}), fmr.replay(one.run, {site: edit})
        assert edited.receipts[site].fired
        assert bits(host(edited.output)) == bits(host(replayed.output)) != bits(host(one.run.output))
    assert bits(host(one.again(edits={site: edits.Interchange(one.run)}).output)) == bits(host(one.run.output))


@pytest.mark.parametrize(("device", "dtype"), ON)
@pytest.mark.parametrize("name", MODELS)
def test_a_recording_run_again_is_the_same(name: str, device: str, dtype: torch.dtype) -> None:
    placed(name, device, dtype).run.verify()


@pytest.mark.parametrize(("device", "dtype"), ON)
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_a_sweep_is_the_loop_over_its_rows(name: str, device: str, dtype: torch.dtype) -> None:
    one = placed(name, device, dtype)
    places = [layer.resid_post.at(positions=t) for layer in one.structure.layers for t in range(3)]
    grid = fmr.sweep(one.model, one.kwargs, places, edits.Scale(0.5), last, progress=False)
    loop = torch.stack([last(one.again(keep=(), edits={place: edits.Scale(0.5)}).output) for place in places])
    assert grid.how == "rows, cut", grid.why
    near = {torch.float32: 1e-6 if device == "cpu" else 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert float((grid.values.cpu() - loop.cpu()).abs().max()) <= near * float(loop.abs().max())


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_a_source_may_lie_elsewhere(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    one = placed("gpt2", device, dtype)
    site = one.structure.layers[0].resid_post
    saved = one.again(keep=[site], to="cpu")
    saved.save(tmp_path / "saved.fmr")
    for source in (saved, fmr.load(tmp_path / "saved.fmr")):
        patched = one.again(edits={site: edits.Interchange(source)})
        assert bits(host(patched.output)) == bits(host(one.run.output))


@pytest.mark.parametrize(("device", "dtype"), ON)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_steering_a_generation_by_nothing_changes_no_token(name: str, device: str, dtype: torch.dtype) -> None:
    model, _, kwargs = moved(name, device, dtype)
    inputs = {"input_ids": kwargs["input_ids"], "attention_mask": torch.ones_like(kwargs["input_ids"])}
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    site = fmr.locate(fmr.run(model, **inputs)).layers[0].resid_post
    with fmr.track(model, keep=(), edits={site: edits.Add(0.0)}):
        steered = model.generate(**inputs, **options)
    assert bits(host(steered.logits)) == bits(host(plain.logits))


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_gradients_by_id_are_those_of_autograd(device: str, dtype: torch.dtype) -> None:
    model, _, kwargs = moved("gpt2_eager", device, dtype)
    site = fmr.locate(fmr.run(model, **kwargs)).attention[0].z
    with fmr.track(model, grad=True) as run:
        loss = model(**kwargs).logits.float().square().mean()
        loss.backward(retain_graph=True)
    found = run.grad[site].clone()
    assert torch.equal(found, torch.autograd.grad(loss, run[site])[0])


def last(output: Any) -> Tensor:
    """A metric: the weighted sum of the last position of what comes out first, for all examples together."""
    found = next(tensors(output))[:, -1].float()
    return (found * torch.linspace(0.5, 1.5, found.numel(), device=found.device).view_as(found)).sum()


def host(value: Any) -> list[Tensor]:
    return [tensor.detach().cpu().float() for tensor in flat(value)]


def flat(value: Any) -> list[Tensor]:
    return list(tensors(value))
