"""Being watched changes nothing: not a bit of the output, of the gradients, of the random state, nor of the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.models import ZOO, bits, build, tensors
from tests.residue import model_state, random_state, torch_state


class Setting(NamedTuple):
    """How a model is run."""

    train: bool
    around: Callable[[], Any]
    backward: bool


SETTINGS = {
    "eval-no_grad": Setting(False, torch.no_grad, False),
    "eval-inference": Setting(False, torch.inference_mode, False),
    "eval-backward": Setting(False, torch.enable_grad, True),
    "train-no_grad": Setting(True, torch.no_grad, False),
    "train-backward": Setting(True, torch.enable_grad, True),
}


class Seen(NamedTuple):
    """All that can be observed of one run of a model."""

    output: list[Any]
    kind: type
    gradients: list[Any]
    inputs: list[Any]
    weights: list[Any]
    random: bytes
    attributes: dict[str, Any]


def observe(name: str, setting: Setting, tracked: Callable[[nn.Module], Any]) -> Seen:
    """Build a model of the zoo, run it inside `tracked(model)`, backward included, and look at everything."""
    model, args, kwargs = build(name)
    model.train(setting.train)
    given = [t for t in tensors((args, kwargs)) if t.is_floating_point()]
    for tensor in given:
        tensor.requires_grad_(setting.backward)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        with setting.around(), tracked(model):
            out = model(*args, **kwargs)
            losses = [t.square().sum() for t in tensors(out) if t.requires_grad]
            if setting.backward and losses:
                torch.stack(losses).sum().backward()
        random = random_state()
    gradients = [p.grad for p in (*model.parameters(), *given) if p.grad is not None]
    state = list(model.state_dict().values())
    attributes = {path: names for path, (_, names, _) in model_state(model).items()}
    return Seen(bits(out), type(out), bits(gradients), bits((args, kwargs)), bits(state), random, attributes)


def ids_of(name: str, setting: Setting) -> list[str]:
    """Every fifth ID of a model of the zoo, sources included."""
    model, args, kwargs = build(name)
    model.train(setting.train)
    with torch.random.fork_rng([]), setting.around(), fmr.track(model, keep="none") as run:
        model(*args, **kwargs)
    return [node.id for node in run.graph][::5]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ZOO)
def test_a_tracked_run_is_bit_equal_to_a_plain_one(name: str, setting: str) -> None:
    how = SETTINGS[setting]
    plain = observe(name, how, lambda model: nullcontext())
    before = torch_state()
    for keep in ("all", "none", "*#[01]*", ids_of(name, how)):
        assert observe(name, how, lambda model, keep=keep: fmr.track(model, keep=keep)) == plain
        assert torch_state() == before


@pytest.mark.parametrize("name", ZOO)
def test_a_run_with_history_is_bit_equal_in_training(name: str) -> None:
    how = SETTINGS["train-backward"]
    plain = observe(name, how, lambda model: nullcontext())
    for keep in ("all", "*#[01]*", ids_of(name, how)):
        assert observe(name, how, lambda model, keep=keep: fmr.track(model, keep=keep, grad=True)) == plain


@pytest.mark.parametrize("name", ZOO)
def test_reading_every_value_and_the_graph_changes_nothing(name: str) -> None:
    model, args, kwargs = build(name)
    with torch.no_grad(), fmr.track(model) as run:
        out = model(*args, **kwargs)
    before, random, torch_before, model_before = bits(out), random_state(), torch_state(), model_state(model)
    run.graph.lint()
    values = {node.id: run[node] for node in run.graph if node.id in run}
    assert len(values) >= len(run.graph) - len(run.graph.opaque) - len(run.graph.find("*/alias#*"))
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in values.values())
    for node in run.graph:
        for inner in run.graph.inner(node):
            assert run[inner].shape == inner.shape
    assert (bits(out), random_state(), torch_state(), model_state(model)) == (before, random, torch_before, model_before)


# ---- the user's own hooks


def _listen(model: nn.Module, log: list[Any]) -> None:
    """Register every kind of hook on every module; one of them changes what its module returns."""
    for path, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            log.append(("before", path, bits((args, kwargs))))

        def after(module: nn.Module, args: Any, out: Any, path: str = path) -> Any:
            log.append(("after", path, bits(out)))
            return out * 2 if isinstance(module, nn.Linear) else None

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, always_call=True)


@pytest.mark.parametrize("name", ZOO)
def test_the_users_hooks_fire_as_always_and_stay(name: str) -> None:
    def heard(keep: Any) -> list[Any]:
        model, args, kwargs = build(name)
        log: list[Any] = []
        _listen(model, log)
        before = model_state(model)
        with torch.no_grad(), fmr.track(model, keep=keep) if keep else nullcontext():
            model(*args, **kwargs)
        assert model_state(model).keys() == before.keys()
        assert [hooks for *_, hooks in model_state(model).values()] == [hooks for *_, hooks in before.values()]
        return log

    plain = heard(None)
    assert plain
    for keep in ("all", "none", [*ids_of(name, SETTINGS["eval-no_grad"])[:1]]):
        assert heard(keep) == plain


@contextmanager
def _everywhere(log: list[str]) -> Iterator[None]:
    register = nn.modules.module
    handles = [
        register.register_module_forward_pre_hook(lambda module, args: log.append(f"before {type(module).__name__}")),
        register.register_module_forward_hook(lambda module, args, out: log.append(f"after {type(module).__name__}")),
        register.register_module_full_backward_hook(lambda module, *grads: log.append(f"backward {type(module).__name__}")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_global_hooks_and_backward_hooks_fire_as_always() -> None:
    def heard(keep: Any) -> list[str]:
        model, args, kwargs = build("transformer")
        log: list[str] = []
        for path, module in model.named_modules():
            module.register_full_backward_pre_hook(lambda module, grads, path=path: log.append(f"before backward {path}"))
        with _everywhere(log), fmr.track(model, keep=keep, grad=True) if keep else nullcontext():
            model(*(arg.requires_grad_() for arg in args), **kwargs).sum().backward()
        return log

    plain = heard(None)
    assert "backward Transformer" in plain
    for keep in ("all", "*linear*", ["encoder.layers.0.linear1/linear#0"]):
        assert heard(keep) == plain


def test_what_a_hook_computes_belongs_to_the_module_that_it_is_registered_on() -> None:
    model, args, _ = build("chain")
    model.up.register_forward_hook(lambda module, args, out: out * 2)
    run = fmr.run(model, *args)
    assert run.graph.module("up").output.id == "up/mul#0"
    assert run.graph["/mul#0"].parents == ("up/mul#0",)


# ---- code that no mode can see, and code that runs twice


def test_scripted_code_is_one_opaque_value_and_says_so() -> None:
    model, args, _ = build("scripted")
    run = fmr.run(model, *args)
    (hidden,) = run.graph.opaque
    assert hidden.id == "/opaque#0"
    assert run.graph["linear@1/linear#0"].parents[0] == hidden.id
    assert torch.equal(run[hidden], model.act(run["linear/linear#0"]))
    assert "1 value whose producer could not be seen" in repr(run.graph)


class Compiles(nn.Module):
    """A model that calls a compiled function, which must not be left for the interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bent = torch.compile(lambda x: (x * 2).relu(), backend="eager", fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bent(self.linear(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_function_compiles_as_always_whoever_watches() -> None:
    model, x = Compiles(), torch.randn(2, 4)
    expected = model(x)
    run = fmr.run(model, x)
    assert torch.equal(run.output, expected)
    assert [node.id for node in run.graph.nodes if not node.id.is_source] == [
        "linear/linear#0",
        "/mul#0",
        "/relu#0",
        "linear@1/linear#0",
    ]
    assert torch.equal(fmr.run(model, x, keep=["/relu#0"])["/relu#0"], run["/relu#0"])
    assert fmr.census(model, x).complete
    assert torch.equal(model(x), expected)


def test_a_scripted_module_is_one_opaque_value_that_reads_its_inputs() -> None:
    inner = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4), inner)
    run = fmr.run(model, torch.randn(2, 4))
    (hidden,) = run.graph.opaque
    assert hidden.parents == ("0/linear#0",)
    assert run.graph.module("1").output == hidden


def test_a_model_that_is_scripted_as_a_whole_is_one_opaque_value() -> None:
    model, x = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), torch.randn(2, 4)
    run = fmr.run(model, x)
    assert torch.equal(run.output, model(x))
    (output,) = run.graph.opaque
    assert run.graph[output.id].parents == ("input:input",)


def test_a_transform_of_functorch_is_one_opaque_value_that_reads_what_went_in() -> None:
    model, args, _ = build("vmapped")
    run = fmr.run(model, *args)
    first, second = run.graph.opaque
    assert set(first.parents) == {"/mul#0", "param:weight"}
    assert second.parents == (first.id,)


def test_a_write_inside_a_transform_makes_a_new_value_and_spares_the_kept_one() -> None:
    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            torch.vmap(lambda row: row[1:].add_(1.0))(y)
            return y.exp()

    x = torch.randn(3, 4)
    run = fmr.run(Inside(), x)
    assert torch.equal(run["/mul#0"], x * 2)
    assert "/mul#0" not in run.graph["/exp#0"].parents
    assert "/mul#0" in [node.id for node in run.graph.ancestors("/exp#0")]


def test_recomputation_in_backward_adds_no_pass_and_no_node() -> None:
    model, args, _ = build("checkpointed")
    sizes = []
    for inside in (False, True):
        with fmr.track(model, grad=True) as run:
            loss = model(*args).sum()
            if inside:
                loss.backward()
        assert len(run.passes) == 1
        sizes.append(run.graph.fingerprint)
    assert sizes[0] == sizes[1]


def test_the_fused_path_of_an_encoder_is_kept_and_shows_as_one_op() -> None:
    model, args, kwargs = build("encoder")
    run = fmr.run(model, *args, **kwargs)
    assert [node.op for node in run.graph if not node.id.is_source] == ["transformer_encoder_layer_fwd"] * 2


def test_a_users_mode_keeps_its_place_and_sees_what_it_always_saw() -> None:
    class Count(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    def seen(keep: Any) -> tuple[list[str], list[str]]:
        model, args, kwargs = build("encoder")
        outer, inner = Count(), Count()
        with torch.no_grad(), outer, fmr.track(model, keep=keep) if keep else nullcontext(), inner:
            model(*args, **kwargs)
        return outer.seen, inner.seen

    plain = seen(None)
    assert plain[0]
    for keep in ("all", "none", ["layers.1.linear2/linear#0"]):
        assert seen(keep) == plain
