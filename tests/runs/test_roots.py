"""What a pass may begin at: the model, a module below it, one of its methods, a function."""

import copy
import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.runs.roots import Entry
from tests.small import Fn

X, TEXT = torch.ones(2, 4), torch.ones(2, 3)
KEEPS: list[Any] = ["all", "none", "*", lambda node: True]


def ids(graph: fmr.Graph) -> list[str]:
    return [str(node.id) for node in graph]


def begun(run: fmr.Run) -> list[str]:
    """The paths of the modules at which the passes began."""
    return [one.graph.scopes[0].path for one in run.passes]


class Coder(nn.Module):
    """An encoder and a decoder, with the ways in that such models have."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.decoder = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def encode(self, x: Tensor, *, twice: bool = False) -> Tensor:
        z: Tensor = self.encoder(x) * self.scale
        return z + z if twice else z

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def generate(self, x: Tensor, steps: int = 2) -> Tensor:
        z = self.encoder(x)
        for _ in range(steps):
            z = self.encoder(self(x, z))
        return self.decoder(z)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return self.decoder(self.encoder(x) if z is None else z)


# ---- modules below the root, called outside it


@pytest.mark.parametrize("keep", KEEPS)
def test_a_registered_module_called_outside_is_a_pass_with_the_ids_of_a_forward(keep: Any) -> None:
    model = Coder()
    forward = fmr.run(model, X)
    with fmr.track(model, keep=keep) as run:
        model.generate(X)
    assert begun(run) == ["encoder", "", "encoder", "", "encoder", "decoder"]
    for one in run.passes:
        one.graph.lint()
        assert {name for name in ids(one.graph) if not name.startswith("input:")} <= set(ids(forward.graph))
    assert ids(run.passes[0].graph)[0] == "input:input"
    if keep != "none":
        assert torch.equal(run.passes[0]["encoder.1/tanh#0"], forward["encoder.1/tanh#0"])
        assert run["encoder.1/tanh#0"] is not None  # the last pass, of the decoder, has none


def test_ids_found_in_a_forward_serve_calls_outside_it() -> None:
    model = Coder()
    name = "encoder.0/linear#0"
    with fmr.track(model, keep=[name, "param:decoder.bias"]) as run:
        model.generate(X, steps=1)
    assert [name in one for one in run.passes] == [True, False, True, False]
    assert torch.equal(run.passes[0][name], fmr.run(model, X)[name])
    assert torch.equal(run["param:decoder.bias"], model.decoder.bias)


def test_stop_ends_the_block_when_the_last_id_was_met_in_whichever_pass() -> None:
    model = Coder()
    after = []
    with fmr.track(model, keep=["encoder.0/linear#0", "decoder/linear#0"], stop=True) as run:
        z = model.encoder(X)
        model.decoder(z)
        after.append(z)
    assert after == []
    assert [len(one.kept) for one in run.passes] == [1, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.forward(X),
        lambda model: model.encode(X),
        lambda model: model.encoder[0](X),
        lambda model: model.decoder(TEXT),
        lambda model: torch.utils.checkpoint.checkpoint(model.encoder, X, use_reentrant=False),
    ],
)
def test_any_way_past_the_call_of_the_model_leaves_the_passes_of_its_modules(call: Callable[[nn.Module], Any]) -> None:
    model = Coder()
    with fmr.track(model) as run:
        call(model)
    known = set(ids(fmr.run(model, X).graph))
    assert run.passes
    assert all(name in known for one in run.passes for name in ids(one.graph) if not name.startswith("input:"))


def test_recomputation_in_a_backward_begins_no_pass() -> None:
    model = Coder()
    with fmr.track(model, grad=True) as run:
        torch.utils.checkpoint.checkpoint(model.encoder, X, use_reentrant=False).sum().backward()
    assert begun(run) == ["encoder"]


def test_a_module_that_the_model_does_not_register_is_no_pass() -> None:
    model, loss = Coder(), nn.MSELoss()
    with fmr.track(model) as run:
        loss(model(X), X)
    assert begun(run) == [""]


def test_a_module_that_is_registered_while_the_block_is_open() -> None:
    model = Coder()
    with fmr.track(model) as run:
        model.decoder(TEXT)
        model(X)
        model.head = nn.Linear(4, 2)
        model.head(X)
    assert begun(run) == ["decoder", "", "head"]


def test_a_pass_below_the_root_can_be_drawn_saved_and_read(tmp_path: Any) -> None:
    model = Coder()
    with fmr.track(model) as run:
        model.encode(X)
    assert run.graph.module("encoder").output.id == "encoder.1/tanh#0"
    assert "input   input:input" in repr(run.graph)
    run.graph.save_dot(tmp_path / "graph.dot", depth=2)
    assert "encoder" in (tmp_path / "graph.dot").read_text()
    run.save(tmp_path / "run.fmr")
    assert fmr.load(tmp_path / "run.fmr").graph.scopes == run.graph.scopes


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("keep", ["all", "*softmax#*", None])
def test_the_encoder_of_a_generation_is_a_pass_of_its_own(beams: int, keep: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        num_layers=1, d_model=16, d_kv=8, num_heads=2, d_ff=24, vocab_size=32, decoder_start_token_id=0, pad_token_id=2
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    tokens = torch.tensor([[5, 9, 3, 7]])
    forward = fmr.run(model, input_ids=tokens, decoder_input_ids=tokens[:, :1])
    wanted = [node.id for node in forward.graph.find("*softmax#*")]
    with fmr.track(model, keep=wanted if keep is None else keep) as run:
        model.generate(tokens, max_new_tokens=3, num_beams=beams, do_sample=False)
    assert len(run.passes) == 4
    assert len(wanted) == 3
    for name in wanted:
        assert name in run
    assert torch.allclose(run[wanted[0]], forward[wanted[0]])


# ---- a method


@pytest.mark.parametrize("keep", KEEPS)
def test_a_method_is_run_as_a_pass_with_inputs_by_its_signature(keep: Any) -> None:
    model = Coder()
    expected = ids(fmr.run(model, X).graph)
    for run in (fmr.run(model, X, method="encode", keep=keep), fmr.run(model.encode, X, keep=keep)):
        assert ids(run.graph)[:2] == ["input:x", "param:encoder.0.weight"]
        assert ids(run.graph)[:5] == expected[:5]
        assert ids(run.graph)[-1] == "/mul#0"
        assert run.graph.model == "Coder"
        assert torch.equal(run.output, model.encode(X))
    assert ids(fmr.run(model, X, method="encode", twice=True).graph)[-1] == "/add#0"
    assert ids(fmr.run(model, z=TEXT, method="decode").graph)[0] == "input:z"


def test_ids_of_a_method_can_be_read_by_plan_and_stopped_at() -> None:
    model = Coder()
    run = fmr.run(model, X, method="encode", keep=["encoder.0/linear#0", "input:x", "/mul#0"])
    assert torch.equal(run["/mul#0"], model.encode(X))
    assert run["input:x"] is not None
    assert fmr.run(model, X, method="encode", keep=["encoder.0/linear#0"], stop=True).output is None


@pytest.mark.parametrize("keep", ["all", "none", ["encoder.0/linear#0"]])
def test_the_calls_of_a_method_are_the_passes_of_a_block_and_nothing_stays_on_the_model(keep: Any) -> None:
    model = Coder()
    before = dict(vars(model))
    with fmr.track(model, method="encode", keep=keep) as run:
        model.encode(X)
        model.encode(x=X, twice=True)
        model.encoder(X)
        model(X)
    assert len(run.passes) == 2
    assert vars(model) == before


def test_a_whole_generation_is_one_pass_of_its_method() -> None:
    model = Coder()
    graph = fmr.run(model, X, method="generate").graph
    assert [scope.path for scope in graph.scopes if scope.module == ""] == ["", "root", "root@1"]
    assert {"encoder.0/linear#0", "root.decoder/linear#0", "decoder/linear#0"} <= set(ids(graph))


def test_the_forward_called_by_its_name_is_a_pass_where_it_is_the_method() -> None:
    model = Coder()
    with fmr.track(model, method="forward") as run:
        model.forward(X)
        model(X)
    assert [ids(one.graph) for one in run.passes] == [ids(fmr.run(model, X).graph)] * 2


def test_an_error_in_a_method_leaves_as_it_is_and_the_model_is_restored() -> None:
    model = Coder()
    model.encode = model.encode  # an attribute of the user's own
    own = vars(model)["encode"]
    with pytest.raises(TypeError, match="unexpected keyword"), fmr.track(model, method="encode"):
        model.encode(X, thrice=True)
    assert vars(model)["encode"] is own


def test_blocks_over_one_method_may_end_in_any_order() -> None:
    model = Coder()
    first, second = fmr.track(model, method="decode"), fmr.track(model, method="decode")
    one = first.__enter__()
    model.decode(TEXT)
    two = second.__enter__()
    model.decode(TEXT)
    second.__exit__(None, None, None)
    model.decode(TEXT)
    assert isinstance(vars(model)["decode"], Entry)
    first.__exit__(None, None, None)
    assert (len(one.passes), len(two.passes)) == (3, 1)
    assert "decode" not in vars(model)


def test_another_thread_and_a_copy_of_the_model_have_the_plain_method() -> None:
    model, found = Coder(), []
    with fmr.track(model, method="encode") as run:
        model.encode(X)
        thread = threading.Thread(target=lambda: found.append(model.encode(X)))
        thread.start()
        thread.join()
        other = copy.deepcopy(model)
        other.encode(X)
    assert len(run.passes) == 1
    assert torch.equal(found[0], model.encode(X))
    assert vars(other)["encode"].__self__ is other


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fmr.run(Coder(), X, method=Coder().encode),
            r"method is the function .encode., .* of Coder: method=.encode.\.",
        ),
        (lambda: fmr.run(Coder(), X, method=3), r"method is int, expected the name of a method of Coder"),
        (lambda: fmr.run(Coder(), X, method="encod"), r"Coder has no method 'encod'\. .*Nearest that exist: encode"),
        (lambda: fmr.run(Coder(), X, method="decoder"), r"Coder has no method 'decoder'"),
        (lambda: fmr.run(Coder(), X, method="scale"), r"Coder has no method 'scale'"),
        (lambda: fmr.run(torch.relu, X, method="encode"), r"got method='encode' and a builtin_function_or_method"),
        (lambda: fmr.run(3), r"fmr.run got int, expected a torch.nn.Module or a function that calls modules\."),
        (lambda: fmr.run(SimpleNamespace(net=Coder()), X), r"got SimpleNamespace, .* such as its attribute \.net\."),
        (lambda: fmr.track(method="encode").__enter__(), r"got method='encode' and no model"),
    ],
)
def test_what_is_no_method_and_no_function(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(fmr.TrackError, match=message):
        call()


def test_a_method_that_is_never_called() -> None:
    model = Coder()
    with (
        pytest.raises(fmr.TrackError, match=r"The method 'encode' of the tracked Coder was never called inside the block"),
        fmr.track(model, method="encode"),
    ):
        model(X)


# ---- a function

BODY = Coder()


def piped(x: Tensor, head: nn.Module) -> Tensor:
    return head(BODY.encode(x)).relu()


class Pipe:
    """An object that holds a model, as pipelines do."""

    def __init__(self) -> None:
        self.model, self.size = Coder(), 3

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)

    def predict(self, pixels: Tensor) -> Tensor:
        return self(pixels)


def made() -> Callable[..., Tensor]:
    layers, by_name = [nn.Linear(4, 4), nn.Linear(4, 2)], {"act": nn.Tanh()}
    gain = nn.Parameter(torch.ones(2))

    def run(x: Tensor, *more: Tensor, bias: dict[str, Tensor]) -> Tensor:
        return by_name["act"](layers[1](layers[0](x)) * gain + more[0] + bias["b"])

    return run


HEAD = nn.Linear(3, 2)
BODY_CALLS = ["", "BODY.encoder", "BODY.encoder.0", "BODY.encoder.1", "head"]
MODEL_CALLS = ["", "model", "model.encoder", "model.encoder.0", "model.encoder.1", "model.decoder"]
M_CALLS = [path.replace("model", "m") for path in MODEL_CALLS]


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "inputs", "modules", "model"),
    [
        (piped, (X, HEAD), {}, ["input:x"], BODY_CALLS, "piped"),
        (functools.partial(piped, head=HEAD), (X,), {}, ["input:x"], BODY_CALLS, "partial"),
        (Pipe(), (X,), {}, ["input:pixels"], MODEL_CALLS, "Pipe"),
        (Pipe().predict, (X,), {}, ["input:pixels"], MODEL_CALLS, "predict"),
        (
            made(), (X, X[:, :2]), {"bias": {"b": X[0, :2]}}, ["input:x", "input:args.0", "input:bias.b"],
            ["", "layers.0", "layers.1", "by_name.act"], "run",
        ),
        (lambda m: m(X), (BODY,), {}, [], M_CALLS, "lambda"),
        (torch.relu, (X,), {}, ["input:args.0"], [""], "relu"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_function_is_a_root_whose_modules_go_by_the_names_it_calls_them(
    function: Any, args: Any, kwargs: Any, inputs: list[str], modules: list[str], model: str, keep: str
) -> None:
    run = fmr.run(function, *args, keep=keep, **kwargs)
    run.graph.lint()
    assert [name for name in ids(run.graph) if name.startswith("input:")] == inputs
    assert [scope.path for scope in run.graph.scopes] == modules
    assert run.graph.model == model
    assert run.graph.opaque == ()
    assert torch.equal(run.output, function(*args, **kwargs))


def test_what_a_function_closes_over_has_its_name() -> None:
    graph = fmr.run(made(), X, X[:, :2], bias={"b": X[0, :2]}).graph
    assert {"param:layers.0.weight", "param:gain"} <= set(ids(graph))


def test_a_plan_over_a_function() -> None:
    run = fmr.run(piped, X, HEAD, keep=["BODY.encoder.0/linear#0", "param:head.weight", "/relu#0"])
    assert torch.equal(run["/relu#0"], piped(X, HEAD))
    assert torch.equal(run["param:head.weight"], HEAD.weight)
    assert fmr.run(piped, X, HEAD, keep=["BODY.encoder.0/linear#0"], stop=True).output is None


def test_gradients_through_a_function() -> None:
    run = fmr.run(lambda x: BODY(x).sum(), X, grad=True)
    run.output.backward()
    assert torch.equal(run.grad["BODY.decoder/linear#0"], torch.ones(2, 4))
    BODY.zero_grad()


def test_an_error_in_a_function_leaves_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        fmr.run(lambda x: BODY(x) * (1 / 0), X)
    assert ids(fmr.run(BODY, X).graph)


def test_a_function_inside_a_tracked_block_is_seen_by_both() -> None:
    with fmr.track(BODY) as outer:
        inner = fmr.run(lambda x: BODY(x).exp(), X)
    assert begun(outer) == [""]
    assert ids(inner.graph)[-1] == "/exp#0"


def test_a_module_that_a_function_finds_in_no_name_of_its_own_goes_by_its_class() -> None:
    hidden = Fn(lambda self, x: self.kept["a"](x))
    hidden.kept = {"a": nn.Tanh()}
    deep = {"x": {"y": hidden}}
    assert [scope.path for scope in fmr.run(lambda x: deep["x"]["y"](x), X).graph.scopes][:2] == ["", "fn"]


@pytest.mark.parametrize(
    "bound",
    [
        lambda model: functools.partial(model),
        lambda model: functools.partial(functools.partial(model)),
        lambda model: functools.partial(model.forward),
        lambda model: torch.no_grad()(model.forward),
    ],
    ids=["model", "twice", "forward", "wrapped forward"],
)
@pytest.mark.parametrize("keep", KEEPS, ids=["all", "none", "glob", "predicate"])
def test_a_partial_of_a_model_is_the_model(bound: Callable[[nn.Module], Any], keep: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    assert ids(fmr.run(bound(model), X, keep=keep).graph) == ids(fmr.run(model, X).graph)
    assert torch.equal(fmr.run(bound(model), X, keep="1.1")["1.1"], model(X))


def test_what_a_partial_binds_is_given_to_the_model() -> None:
    coder = Coder()
    run = fmr.run(functools.partial(coder.encode, X, twice=False), twice=True)
    assert ids(run.graph) == ids(fmr.run(coder.encode, X, twice=True).graph)
    model = Fn(lambda self, x, y: self.first(x) + y, first=nn.Linear(4, 4))
    assert ids(fmr.run(functools.partial(model, X), y=X).graph) == ids(fmr.run(model, X, y=X).graph)
