"""Weights that lie elsewhere, offloaded or sharded, and are put in place while their modules run, keep their names."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param import free_storage

import fmr
from fmr.errors import IdError
from tests.models import build
from tests.small import Fn


def offloaded(model: nn.Module) -> nn.Module:
    """The model with each weight on the meta device, and hooks that put the true one in its place for each call."""
    empty = {own: _like(own, own.to("meta")) for own in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        held = {name: own for name, own in (*module._parameters.items(), *module._buffers.items()) if own is not None}
        away = {name: empty[own] for name, own in held.items()}
        put(module, away)
        module.register_forward_pre_hook(
            lambda module, args, held=held: put(module, {name: _like(own, own) for name, own in held.items()})
        )
        module.register_forward_hook(lambda module, args, out, away=away: put(module, away))
    return model


def put(module: nn.Module, weights: dict[str, Any]) -> None:
    """Make these the weights of a module."""
    for name, tensor in weights.items():
        (module._parameters if name in module._parameters else module._buffers)[name] = tensor


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A new tensor object, a parameter where the old one is."""
    with torch._C.DisableTorchFunction():
        return nn.Parameter(new.detach()) if isinstance(old, nn.Parameter) else new.detach()


def edges(graph: fmr.Graph) -> list[Any]:
    return [(node.id, node.parents) for node in graph.nodes if not node.id.is_source and node.op != "detach"]


@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_offloaded_weights_have_the_ids_of_the_model_with_its_weights(name: str, keep: str) -> None:
    model, args, kwargs = build(name)
    plain = fmr.run(model, *args, keep=keep, **kwargs)
    away = fmr.run(offloaded(copy.deepcopy(model)), *args, keep=keep, **kwargs)
    assert edges(away.graph) == edges(plain.graph)
    assert not away.graph.opaque
    assert {name for name in plain.graph.ids() if name.is_source} == {name for name in away.graph.ids() if name.is_source}


def test_offloaded_weights_are_found_and_certified_and_the_outputs_are_bit_equal() -> None:
    model, args, kwargs = build("llama")
    away = offloaded(copy.deepcopy(model))
    expected = away(*args, **kwargs).logits
    run = fmr.run(away, *args, **kwargs)
    assert torch.equal(run.output["logits"], expected)
    assert all(tensor.is_meta for tensor in away.parameters())
    found, true = fmr.locate(run), fmr.locate(fmr.run(model, *args, **kwargs))
    assert repr(found) == repr(true)
    assert all(torch.equal(a, b) for a, b in zip(found.mlps[0].memory(3), true.mlps[0].memory(3), strict=True))


def test_a_weight_that_is_put_in_place_twice_in_a_pass_is_one_value() -> None:
    model = offloaded(Fn(lambda self, x: self.inner(self.inner(x).relu()), inner=nn.Linear(3, 3)))
    graph = fmr.run(model, torch.randn(2, 3)).graph
    assert [node.id for node in graph.nodes if node.op == "param"] == ["param:inner.weight", "param:inner.bias"]
    first, second = graph.find("*/linear#0")
    assert first.parents[1:] == second.parents[1:]


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def claimed(part: object) -> dict[str, object]:
    """What is said of an attention or a memory."""
    return {name: value for name, value in vars(part).items() if name not in ("graph", "weights", "certified")}


@pytest.mark.usefixtures("alone")
def test_sharded_weights_are_found_and_certified() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, args, kwargs = build("llama")
    true = fmr.locate(fmr.run(model, *args, **kwargs))
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    expected = model(*args, **kwargs).logits
    run = fmr.run(model, *args, **kwargs)
    assert torch.equal(run.output["logits"], expected)
    found = fmr.locate(run)
    for block, other in zip((*found.attention, *found.mlps), (*true.attention, *true.mlps), strict=True):
        assert claimed(block) == claimed(other)
        assert block.certified
    assert len(found.residual.writes) == len(true.residual.writes)


def test_a_value_whose_memory_was_freed_by_torch_is_refused() -> None:
    def frees(self: nn.Module, x: Tensor) -> Tensor:
        y = self.inner(x)
        z = y.relu()
        free_storage(y)
        return z

    run = fmr.run(Fn(frees, inner=nn.Linear(3, 3)), torch.randn(2, 3))
    assert run["/relu#0"].shape == (2, 3)
    with pytest.raises(IdError, match=r"The memory of 'inner/linear#0' was freed .* Read it in a run of its own"):
        run["inner/linear#0"]


def test_a_value_whose_memory_the_model_frees_itself_is_what_it_was() -> None:
    def frees(self: nn.Module, x: Tensor) -> Tensor:
        y = self.inner(x)
        z = y.relu()
        y.untyped_storage().resize_(0)
        return z

    run = fmr.run(Fn(frees, inner=nn.Linear(3, 3)), torch.randn(2, 3))
    assert run["inner/linear#0"].relu().equal(run["/relu#0"])


@pytest.mark.parametrize("keep", ["all", "none"])
def test_weights_that_are_freed_and_filled_at_each_call_keep_their_names(keep: str) -> None:
    layer = nn.Linear(3, 3)
    whole = layer.weight.detach().clone()

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        storage = self.inner.weight.untyped_storage()
        storage.resize_(36).copy_(whole.untyped_storage())
        y = self.inner(x)
        storage.resize_(0)
        return y

    graph = fmr.run(Fn(forward, inner=layer), torch.randn(2, 3), keep=keep).graph
    assert [str(parent.id) for parent in graph["inner/linear#0"].parents][1:] == ["param:inner.weight", "param:inner.bias"]
    assert not graph.opaque
