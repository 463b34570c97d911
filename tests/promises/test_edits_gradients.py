"""Gradients and edits: through edits, of edited values, of the gradient itself, and what attributions are made of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr import Site, edits
from tests.models import build
from tests.small import Fn

LINEAR = nn.Linear(4, 4)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def rectified(module: nn.Module, x: Tensor) -> Tensor:
    h = module.lin(x)
    h.relu_()
    return h * 2


def by_function(module: nn.Module, x: Tensor) -> Tensor:
    return F.relu(module.lin(x), inplace=True) * 2


def by_item(module: nn.Module, x: Tensor) -> Tensor:
    h = module.lin(x) * 1
    h[:, 0] = x[:, 1]
    return h.tanh()


def by_view(module: nn.Module, x: Tensor) -> Tensor:
    h = module.lin(x) * 1
    h[:, 2:] += x[:, :2]
    return h.tanh()


def by_share(module: nn.Module, x: Tensor) -> Tensor:
    h = module.lin(x) * 1
    h.lerp_(x, 0.25)
    return h.tanh()


@pytest.mark.parametrize(
    ("forward", "site"),
    [
        (rectified, "/relu#0"),
        (by_function, "/relu#0"),
        (by_item, "/setitem#0"),
        (by_view, "/add#0"),
        (by_share, "/lerp#0"),
        (by_share, "/lerp#0/mul#0"),
        (rectified, "lin/linear#0"),
        (rectified, "lin"),
        (rectified, "param:lin.weight"),
        (rectified, "input:x"),
    ],
)
@pytest.mark.parametrize("keep", [(), "all"])
def test_a_factor_in_an_edit_has_the_gradient_that_differences_have(
    forward: Callable[..., Tensor], site: str, keep: Any
) -> None:
    model = Fn(forward, lin=LINEAR).double()
    signature = {"input:x": "input:args.0"}

    def loss(factor: Tensor) -> Tensor:
        run = fmr.run(model, X.double(), keep=keep, grad=True, edits={signature.get(site, site): edits.Scale(factor)})
        return (run.output * torch.linspace(-1, 1, 12).double().view(3, 4)).sum()  # type: ignore[no-any-return]

    one = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(one), one)
    with torch.no_grad():
        slope = (loss(one + 1e-5) - loss(one - 1e-5)) / 2e-5
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-8)
    assert gradient != 0


def weighted(run: fmr.Run) -> Tensor:
    found = [tensor for _, tensor in fmr.nests.leaves(fmr.nests.taken(run.output)) if tensor.requires_grad]
    return sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in found)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "name", ["gpt2", "t5", "mixtral", "mamba", "cnn", "in_place", "transformer", "lstm_packed", "shared"]
)
def test_a_recorded_run_with_an_edit_has_every_gradient_that_a_plan_reads_one_by_one(name: str) -> None:
    model, args, kwargs = build(name)
    plain = fmr.run(model, *args, grad=True, **kwargs)
    weighted(plain).backward()
    known = dict(plain.grad.items())
    some = [
        n.id
        for n in plain.graph.nodes
        if n.dtype.is_floating_point and not n.id.is_source and n.op not in ("alias", "view", "detach")
    ]
    for site in some[1 :: max(1, len(some) // 3)]:
        if "getitem" in site:
            continue
        edited = {site: edits.Scale(0.75)}
        whole = fmr.run(model, *args, grad=True, edits=edited, **kwargs)
        weighted(whole).backward()
        kept = [str(name) for name in dict.fromkeys([site, *some[:: max(1, len(some) // 8)]])]
        few = fmr.run(model, *args, keep=kept, grad=True, edits=edited, **kwargs)
        weighted(few).backward()
        found, expected = dict(whole.grad.items()), dict(few.grad.items())
        assert found.keys() & set(kept) == expected.keys()
        for one, gradient in expected.items():
            torch.testing.assert_close(found[one], gradient, rtol=1e-4, atol=1e-6)
        assert (site in found) == (site in known)
    model.zero_grad()


def test_a_value_that_was_replaced_has_a_gradient_and_what_made_it_has_none() -> None:
    model, _, kwargs = build("gpt2")
    for edit in (edits.Replace(0.5), edits.Zero()):
        run = fmr.run(
            model, grad=True, keep=["transformer.h.0", "transformer.h.1"], edits={"transformer.h.1": edit}, **kwargs
        )
        weighted(run).backward()
        assert run.grad["transformer.h.1"].abs().sum() > 0
        with pytest.raises(fmr.IdError, match=r"'transformer.h.0' has no gradient: backward\(\) ran and did not come to it"):
            run.grad["transformer.h.0"]
        assert model.transformer.h[0].mlp.c_fc.weight.grad is None
        model.zero_grad()


# ---- edits of the gradient


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.parametrize(
    ("edit", "change"),
    [
        (edits.Scale(0.5), lambda g: g * 0.5),
        (edits.Clamp(-0.1, 0.1), lambda g: g.clamp(-0.1, 0.1)),
        (edits.Replace(1.0), torch.ones_like),
        (edits.Zero(), torch.zeros_like),
        (lambda gradient, context: gradient.flip(0), lambda g: g.flip(0)),
    ],
)
@pytest.mark.parametrize("keep", [["1"], "all"])
def test_the_gradient_at_a_site_is_edited_on_its_way_back(edit: Any, change: Callable[[Tensor], Tensor], keep: Any) -> None:
    model = two_layers()
    hidden = model[1](model[0](X))
    (plain,) = torch.autograd.grad(model[2](hidden).sum(), hidden)
    run = fmr.run(model, X, grad=True, keep=keep, edits={"1": edits.OnGradient(edit)})
    assert run.receipts["1"].fired == 0  # what comes back is still to come
    run.output.sum().backward()
    assert torch.equal(run.grad["1"], change(plain))
    assert torch.allclose(model[0].weight.grad, ((1 - hidden.detach() ** 2) * change(plain)).T @ X, atol=1e-6)
    assert run.receipts["1"].fired == 1
    assert torch.equal(run.output, model(X))


def test_the_gradient_of_a_part_is_edited_alone_and_may_come_from_another_run() -> None:
    model = two_layers()
    source = fmr.run(model, X.flip(0) * 2, grad=True)
    (source.output * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    part = Site("1", examples=[1], units=[0, 3])
    run = fmr.run(model, X, grad=True, keep=["1"], edits={part: edits.OnGradient(edits.Interchange(source))})
    run.output.sum().backward()
    plain = fmr.run(model, X, grad=True, keep=["1"])
    plain.output.sum().backward()
    changed = run.grad["1"] != plain.grad["1"]
    assert changed.nonzero().tolist() == [[1, 0], [1, 3]]
    assert torch.equal(run.grad["1"][1, [0, 3]], source.grad["1"][1, [0, 3]])


def test_a_hook_on_a_weight_is_not_left_behind() -> None:
    model = two_layers()
    asked = {"param:0.weight": edits.OnGradient(edits.Zero())}
    run = fmr.run(model, X, grad=True, keep=(), edits=asked)
    run.output.sum().backward()
    assert not model[0].weight.grad.any()
    model(X).sum().backward()
    assert model[0].weight.grad.any()
    assert model[0].weight._backward_hooks is None


# ---- attributions


def test_counterfactuals_in_one_batch_have_one_graph() -> None:
    model = two_layers()
    other = fmr.run(model, X.flip(0), keep=["1"])
    coefficients = torch.zeros(3, 1, requires_grad=True)

    def mixed(value: Tensor, context: edits.Context) -> Tensor:
        return value + coefficients * (other["1"] - value)

    run = fmr.run(model, X, grad=True, keep=(), edits={"1": mixed})
    run.output.sum().backward()
    for row in range(3):
        alone = torch.zeros((), requires_grad=True)
        single = fmr.run(
            model, X[row : row + 1], grad=True, keep=(),
            edits={"1": lambda v, c, row=row, alone=alone: v + alone * (other["1"][row : row + 1] - v)},
        )  # fmt: skip
        single.output.sum().backward()
        torch.testing.assert_close(coefficients.grad[row, 0], alone.grad)


class Chain(nn.Module):
    """Writers to one sum, linear where `bend` is nothing."""

    def __init__(self, bend: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.u = (nn.Linear(4, 4).double() for _ in range(4))
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        a = self.bend(self.a(x))
        b = self.bend(self.b(x + a))
        c = self.bend(self.c(x + a + b))
        return self.u(x + a + b + c)


WRITERS, READERS = ("a", "b", "c"), {"b": "/add#0", "c": "/add#2", "u": "/add#5"}
"""What writes to the sum of a chain; what reads it, each by a sum of its own."""


def test_in_a_linear_model_effects_add_up_and_one_backward_is_every_patch() -> None:
    model, x = Chain(), X.double()
    clean, corrupt = fmr.run(model, x), fmr.run(model, x.flip(0), grad=True)
    corrupt.output.sum().backward()
    base = corrupt.output.detach().sum()

    def effect(asked: Any) -> Tensor:
        return fmr.replay(corrupt, asked).output.detach().sum() - base

    for n, writer in enumerate(WRITERS):
        readers = list(READERS)[n:]
        total = effect({f"{writer}/linear#0": edits.Interchange(clean)})
        direct = [
            effect({fmr.Edge(f"{writer}/linear#0", f"{reader}/linear#0"): edits.Interchange(clean)}) for reader in readers
        ]
        torch.testing.assert_close(sum(direct), total)
        step = (clean[f"{writer}/linear#0"] - corrupt[f"{writer}/linear#0"]).detach()
        torch.testing.assert_close((step * corrupt.grad[f"{writer}/linear#0"]).sum(), total)
        for reader, effect_of_edge in zip(readers, direct, strict=True):
            torch.testing.assert_close((step * corrupt.grad[READERS[reader]]).sum(), effect_of_edge)
    whole = [effect({fmr.Edge(f"{writer}/linear#0", "u/linear#0"): edits.Interchange(clean)}) for writer in WRITERS]
    every = effect({f"{writer}/linear#0": edits.Interchange(clean) for writer in WRITERS})
    torch.testing.assert_close(sum(whole), every)


def test_integrated_gradients_of_an_edited_value_come_to_its_effect() -> None:
    model, x = Chain(torch.tanh), X.double()
    clean, corrupt = fmr.run(model, x), fmr.run(model, x.flip(0))
    start, step = corrupt["/tanh#0"], clean["/tanh#0"] - corrupt["/tanh#0"]
    patched = fmr.run(model, x.flip(0), keep=(), edits={"/tanh#0": edits.Interchange(clean)})
    effect, errors = (patched.output - corrupt.output).sum(), []
    for steps in (1, 4, 16):
        told = torch.zeros((), dtype=torch.float64)
        for n in range(steps):
            here = {"/tanh#0": edits.Replace(start + (n + 0.5) / steps * step)}
            run = fmr.run(model, x.flip(0), keep=["/tanh#0"], grad=True, edits=here)
            run.output.sum().backward()
            told = told + (run.grad["/tanh#0"] * step).sum() / steps
        errors.append(float((told - effect).abs()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3 * float(effect.abs())


def test_attribution_in_one_backward_is_the_sweep_for_small_noise() -> None:
    model, _, kwargs = build("gpt2")
    model = model.double()
    torch.manual_seed(0)
    embedded = model.transformer.wte(kwargs["input_ids"][:1]).detach()
    noise = 1e-4 * torch.randn(embedded.shape, dtype=torch.float64)
    inputs = [{"inputs_embeds": one, "use_cache": False} for one in (embedded, embedded + noise)]
    layers = fmr.locate(fmr.run(model, **inputs[0])).layers
    points = [layer.resid_pre for layer in layers]
    clean = fmr.run(model, keep=points, **inputs[0])
    corrupt = fmr.run(model, keep=points, grad=True, **inputs[1])

    def metric(output: Any) -> Tensor:
        return output.logits[:, -1, 5] - output.logits[:, -1, 7]  # type: ignore[no-any-return]

    metric(corrupt.output).sum().backward()
    told = torch.stack([((clean[p] - corrupt[p]).detach() * corrupt.grad[p]).sum(-1)[0] for p in points])
    sites = [point.at(positions=position) for point in points for position in range(embedded.shape[1])]
    grid = fmr.sweep(model, inputs[1], sites, edits.Interchange(clean), metric)
    swept = grid.values.view(len(points), -1) - metric(corrupt.output).detach()
    torch.testing.assert_close(told, swept, rtol=0.0, atol=2e-3 * float(swept.abs().max()))
    assert swept.abs().max() > 1e-6


class Checkpointed(nn.Module):
    """Computes its block again when gradients come back."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.reentrant = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU()), reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.reentrant is None:
            return self.block(h)
        return torch.utils.checkpoint.checkpoint(self.block, h, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # as torch says without gradients
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keep", [(), "all"])
def test_an_edit_that_a_checkpoint_would_compute_again_without_is_refused(reentrant: bool, keep: Any) -> None:
    model, plain = Checkpointed(reentrant), Checkpointed(None)
    for site in ("block.0/linear#0", "block.0", "param:block.0.weight", "param:first.weight"):
        with pytest.raises(fmr.EditError, match=r"is read inside torch.utils.checkpoint, which computes it again without"):
            fmr.run(model, X, keep=keep, grad=True, edits={site: edits.Add(1.0)})
        pair = [fmr.run(one, X, keep=keep, edits={site: edits.Add(1.0)}).output for one in (model, plain)]
        assert torch.equal(*pair)
    for site, edit in (("first/linear#0", edits.Add(1.0)), ("block.0", lambda v, c: v)):
        for one in (model, plain):
            fmr.run(one, X, keep=keep, grad=True, edits={site: edit}).output.square().sum().backward()
        torch.testing.assert_close(model.block[0].weight.grad, plain.block[0].weight.grad)
