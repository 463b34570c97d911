"""fmr's own tensor work is seen by no mode, tracer or tensor class of the user: each sees the ops that ran without fmr."""

import contextlib
import copy
import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fmr
from tests.small import Fn


def named(func: Any) -> str:
    owner = getattr(func, "__self__", None)
    return str(getattr(owner, "__name__", None) or getattr(func, "__name__", func))


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(named(func))
        return func(*args, **(kwargs or {}))


class Listening(Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(named(func))
        return super().__torch_function__(func, types, args, kwargs)


def writing() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(self.lin(x))
        y[..., 0] += 1
        y.relu_()
        y.view(-1).mul_(2)
        return torch.lerp(y, y.sin(), 0.5) + torch.einsum("bij,bjk,bkl->bil", y, y.mT, y)

    return Fn(forward, lin=nn.Linear(8, 8), norm=nn.BatchNorm1d(3))


def attending() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.lin(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).unsqueeze_(0)

    return Fn(forward, lin=nn.Linear(8, 8))


def encoding() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"writing": writing, "attending": attending, "encoding": encoding}
KEEPS: dict[str, Callable[[fmr.Graph], Any]] = {
    "all": lambda graph: "all",
    "none": lambda graph: "none",
    "glob": lambda graph: "*",
    "inside": lambda graph: lambda node: "/" in node.scope,
    "plan": lambda graph: [node.id for node in graph.nodes if node.op not in ("alias", "opaque")],
}


def seen_by(kind: Any, model: nn.Module, block: Any, grad: bool) -> list[str]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    with contextlib.nullcontext() if grad else torch.no_grad():
        if kind is Listening:
            x = x.as_subclass(Listening)
            Listening.seen = []
            with block:
                model(x)
            return Listening.seen
        with kind() as mode, block:
            mode.seen.clear()
            model(x)
            return list(mode.seen)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", [Dispatched, Called, Listening])
@pytest.mark.parametrize("name", MODELS)
def test_modes_and_tensor_classes_see_the_ops_that_they_see_without_fmr(name: str, kind: Any, keep: str, grad: bool) -> None:
    torch.manual_seed(0)
    model, graphs = MODELS[name](), []

    def recorded() -> Any:
        with fmr.track(model, keep="none") as run:
            yield
        graphs.append(run.graph)

    plain = seen_by(kind, model, contextlib.nullcontext(), grad)
    seen_by(kind, model, contextlib.contextmanager(recorded)(), grad)  # a mode changes the kernels that the model uses
    assert seen_by(kind, model, fmr.track(model, keep=KEEPS[keep](graphs[0]), grad=grad), grad) == plain


@pytest.mark.parametrize("keep", ["all", "none", "*softmax*"])
def test_a_counter_of_flops_counts_those_of_the_model(keep: str) -> None:
    def flops(block: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), block:
            model(torch.ones(2, 3, 8))
        return counter.get_total_flops()

    model = encoding()
    assert flops(fmr.track(model, keep=keep)) == flops(contextlib.nullcontext())


@pytest.mark.parametrize("keep", ["all", "*", ["lin/linear#0", "/relu#0", "param:lin.weight"]])
@pytest.mark.parametrize("kind", [Dispatched, Called])
def test_modes_see_nothing_of_what_is_read_of_a_run(kind: Any, keep: Any) -> None:
    model = Fn(lambda self, x: self.lin(x).relu(), lin=nn.Linear(8, 8))
    with fmr.track(model, keep=keep, grad=True) as run:
        model(torch.ones(2, 8)).sum().backward()
    with kind() as mode:
        read = [run["lin/linear#0"], run.grad["lin/linear#0"], run.grad["param:lin.weight"], *dict(run.grad).values()]
        copied = copy.deepcopy(run)
        assert mode.seen == []
    assert len(read) > 5
    assert copied.grad["/relu#0"].equal(run.grad["/relu#0"])


TRACERS: dict[str, Callable[[nn.Module, Tensor], str]] = {
    "export": lambda model, x: str(torch.export.export(model, (x,)).module().code),
    "make_fx": lambda model, x: make_fx(model)(x).code,
    "jit.trace": lambda model, x: str(torch.jit.trace(model, x).inlined_graph),
}


def bare(code: str) -> str:
    """Code without comments, and without the names of values and the numbers of classes that scripting makes up."""
    return re.sub(r"#.*|___torch_mangle_\d+\.|%[\w.]+", "", code)


@pytest.mark.filterwarnings("ignore:Trace had nondeterministic nodes", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"keep": "none"}, {"keep": "*"}, {"grad": True}, {"keep": ["lin/linear#0"]}])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_model_traced_inside_a_block_is_traced_as_outside(tracer: str, options: dict[str, Any]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.lin(x)
        y[..., 0] += 1
        return y.relu().t_()

    model, x = Fn(forward, lin=nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    plain = TRACERS[tracer](model, x)
    with fmr.track(model, **options):
        model(x)
        inside = TRACERS[tracer](model, x)
    assert bare(inside) == bare(plain)


class Refusing(TorchFunctionMode):
    def __init__(self, name: str, error: type[BaseException]) -> None:
        super().__init__()
        self.name, self.error = name, error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if named(func) == self.name:
            raise self.error("refused")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [ValueError, StopIteration])
@pytest.mark.parametrize("name", ["_set_grad_enabled", "is_nested", "is_leaf", "register_hook", "clone"])
def test_a_mode_that_refuses_what_only_fmr_does_refuses_nothing(name: str, error: type[BaseException]) -> None:
    model = writing()
    for options in ({"keep": "*"}, {"grad": True}, {"keep": "none"}):
        with Refusing(name, error), fmr.track(model, **options):
            model(torch.ones(2, 3, 8))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("keep", ["all", "*", ["/view#0", "lin/linear#0"]])
def test_a_value_keeps_the_class_of_its_tensor(keep: Any) -> None:
    run = fmr.run(writing().eval(), torch.ones(2, 3, 8).as_subclass(Listening), keep=keep)
    assert type(run["lin/linear#0"]) is type(run["/view#0"]) is Listening


def test_fake_tensors_are_tracked_under_their_mode() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        run = fmr.run(attending(), torch.ones(2, 3, 8), keep="*softmax*")
        assert run["/scaled_dot_product_attention#0/softmax#0"].shape == (2, 2, 3, 3)
