"""Opening a block: what is tracked, what is kept, and what every mistake is told."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.models import bits, build, tokens


def chain() -> tuple[nn.Module, Tensor]:
    model, (x,), _ = build("chain")
    return model, x


# ---- what is tracked


def test_without_a_model_the_outermost_module_is_the_root() -> None:
    model, x = chain()
    with fmr.track() as run:
        model(x)
    assert run.graph.model == "Chain"
    assert run.graph.fingerprint == fmr.run(model, x).graph.fingerprint
    assert run.output.shape == (3, 4)


def test_without_a_model_each_outermost_call_is_a_pass_with_its_own_root() -> None:
    model, x = chain()
    with fmr.track() as run:
        model(nn.Identity()(x).tanh())
    assert [one.graph.model for one in run.passes] == ["Identity", "Chain"]


def test_a_tracked_submodule_is_the_root_of_its_ids() -> None:
    model, x = chain()
    with fmr.track(model.up) as run:
        model(x)
    assert [node.id for node in run.graph if not node.id.is_source] == ["/linear#0"]


def test_every_call_of_the_model_is_a_pass() -> None:
    model, x = chain()
    with torch.no_grad(), fmr.track(model) as run:
        first, second = model(x), model(x + 1)
    assert len(run.passes) == 2
    assert torch.equal(run.passes[0]["/add#0"], first)
    assert torch.equal(run["/add#0"], second)
    assert torch.equal(run.output, second)
    assert run.passes[0].graph.fingerprint == run.graph.fingerprint


@pytest.mark.parametrize("cache", [True, False])
def test_each_step_of_generation_is_a_pass_with_the_same_ids(cache: bool) -> None:
    model, _, _ = build("gpt2")
    prompt = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "use_cache": cache,
        "eos_token_id": None,
        "attention_mask": prompt * 0 + 1,
    }
    plain = model.generate(prompt, **options)
    with fmr.track(model) as run:
        out = model.generate(prompt, **options)
    assert torch.equal(out, plain)
    assert len(run.passes) == 4
    ids = [[node.id for node in one.graph if not node.id.is_source] for one in run.passes]
    assert ids[1] == ids[2] == ids[3]
    assert [one.graph.fingerprint for one in run.passes[2:]] == [run.passes[1].graph.fingerprint] * 2
    lengths = [one["lm_head/linear#0"].shape[1] for one in run.passes]
    assert lengths[1:] == ([1] * 3 if cache else lengths[1:])
    for one, token in zip(run.passes, plain[:, 5:].T, strict=True):
        assert torch.equal(one["lm_head/linear#0"][:, -1].argmax(-1), token)
    with fmr.track(model, keep=["lm_head/linear#0"]) as later:
        model.generate(prompt, **options)
    assert [bits(one["lm_head/linear#0"]) for one in later.passes] == [bits(one["lm_head/linear#0"]) for one in run.passes]


# ---- what is kept


def test_all_values_and_their_graph_are_kept() -> None:
    model, x = chain()
    run = fmr.run(model, x)
    run.graph.lint()
    assert all(node in run for node in run.graph)
    assert torch.equal(run["/softmax#0"], nn.functional.gelu(model.up(x) * 2).softmax(-1))
    assert torch.equal(run["up/linear#0"], model.up(x))


def test_none_keeps_the_graph_alone() -> None:
    model, x = chain()
    run = fmr.run(model, x, keep="none")
    assert run.graph.fingerprint == fmr.run(model, x).graph.fingerprint
    assert not any(node in run for node in run.graph)
    with pytest.raises(
        fmr.IdError, match=r"This run did not keep '/gelu#0'\. Ask for it when tracking: keep=\['/gelu#0'\] or keep='all'\."
    ):
        run["/gelu#0"]


def test_what_names_no_value_is_told_where_passes_are() -> None:
    model, x = chain()
    with pytest.raises(fmr.IdError, match=r"^0 names no value: expected an ID, the path .* or a site\. .*run\.passes\[i\]"):
        fmr.run(model, x)[0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("*linear#0", ["up/linear#0", "down/linear#0"]),
        (["/gelu#0", "up/linear#0"], ["/gelu#0", "up/linear#0"]),
        ("/gelu#0", ["/gelu#0"]),
        (["input:x", "param:up.bias", "/gelu#0"], ["input:x", "param:up.bias", "/gelu#0"]),
        (["up/*", "/add#0"], ["up/linear#0", "/add#0"]),
        (lambda node: node.op == "mul", ["/mul#0"]),
        (fmr.Site("/gelu#0", units=3), ["/gelu#0"]),
    ],
    ids=["glob", "ids", "one id", "sources", "glob and id", "predicate", "site"],
)
def test_only_what_was_asked_for_is_kept(keep: Any, kept: list[str]) -> None:
    model, x = chain()
    full = fmr.run(model, x)
    run = fmr.run(model, x, keep=keep)
    assert {node.id for node in full.graph if node in run} == set(kept)
    for name in kept:
        assert bits(run[name]) == bits(full[name])


def test_keep_takes_the_nodes_of_a_graph() -> None:
    model, x = chain()
    graph = fmr.run(model, x, keep="none").graph
    run = fmr.run(model, x, keep=graph.find("*softmax*"))
    assert run["/softmax#0"].shape == (3, 8)


def test_ids_make_no_graph_and_the_error_says_how_to_get_one() -> None:
    model, x = chain()
    run = fmr.run(model, x, keep=["/gelu#0"])
    with pytest.raises(
        fmr.TrackError, match=r"This run read a few IDs and recorded no graph\. Expected a run with keep='all'"
    ):
        _ = run.graph


def test_values_are_cast_and_moved() -> None:
    model, x = chain()
    for keep in ("all", "*gelu*", ["/gelu#0"]):
        run = fmr.run(model, x, keep=keep, dtype=torch.float64, to="cpu")
        assert run["/gelu#0"].dtype == torch.float64
        assert torch.equal(run["/gelu#0"].float(), fmr.run(model, x)["/gelu#0"])


def test_stop_runs_nothing_after_the_last_id() -> None:
    model, x = chain()
    ran: list[str] = []
    model.down.register_forward_pre_hook(lambda *_: ran.append("down"))
    run = fmr.run(model, x, keep=["up/linear#0", "/gelu#0"], stop=True)
    assert ran == []
    assert run["/gelu#0"].shape == (3, 8)
    assert run.output is None


# ---- gradients


class Overwritten(nn.Module):
    """`pre` is overwritten by relu_ after it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.linear(x)
        pre.relu_()
        return (pre * torch.arange(4.0)).tanh()


@pytest.mark.parametrize("keep", ["all", "*", ["linear/linear#0", "/relu#0", "/mul#0", "param:linear.weight", "/tanh#0"]])
def test_gradients_are_those_of_the_value_also_where_it_was_overwritten_later(keep: Any) -> None:
    model, x = Overwritten(), torch.randn(5, 4)
    pre = model.linear(x)
    post = pre.relu()
    product = post * torch.arange(4.0)
    out = product.tanh()
    by_hand = torch.autograd.grad(out.square().sum(), [pre, post, product, model.linear.weight, out])
    with fmr.track(model, keep=keep, grad=True) as run:
        model(x).square().sum().backward()
    names = ["linear/linear#0", "/relu#0", "/mul#0", "param:linear.weight", "/tanh#0"]
    for name, value, grad in zip(names, [pre, post, product, model.linear.weight, out], by_hand, strict=True):
        assert torch.equal(run[name], value)
        assert torch.equal(run.grad[name], grad)
    assert set(run.grad) >= set(names)
    assert len(run.grad) == len(dict(run.grad))


def test_gradients_are_there_after_a_backward_outside_the_block_and_add_up() -> None:
    model, x = chain()
    with fmr.track(model, grad=True) as run:
        loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    once = run.grad["/gelu#0"].clone()
    loss.backward()
    assert torch.equal(run.grad["/gelu#0"], 2 * once)


def test_gradients_of_each_pass_are_its_own() -> None:
    model, x = chain()
    with fmr.track(model, grad=True) as run:
        loss = model(x).sum() + 3 * model(x).sum()
    loss.backward()
    assert torch.allclose(run.passes[1].grad["/gelu#0"], 3 * run.passes[0].grad["/gelu#0"])


def test_a_gradient_that_is_not_there_says_why() -> None:
    model, x = chain()
    with pytest.raises(fmr.TrackError, match=r"No gradient of '/gelu#0': the run kept no history\. Track with grad=True\."):
        fmr.run(model, x).grad["/gelu#0"]
    run = fmr.run(model, x, grad=True)
    with pytest.raises(
        fmr.IdError,
        match=r"'/gelu#0' has no gradient: no backward\(\) has come .*Expected backward\(\) from a loss that depends",
    ):
        run.grad["/gelu#0"]


def test_values_without_history_cannot_be_trained_through() -> None:
    model, x = chain()
    with fmr.track(model) as run:
        model(x)
    assert not run["/gelu#0"].requires_grad
    with fmr.track(model, grad=True) as run:
        model(x)
    assert run["/gelu#0"].requires_grad


# ---- blocks inside blocks, and threads


def test_blocks_of_one_model_nest_and_see_the_same() -> None:
    model, x = chain()
    with torch.no_grad(), fmr.track(model) as outer, fmr.track(model, keep="*softmax*") as middle:
        with fmr.track(model, keep=["/gelu#0"]) as inner:
            model(x)
        model(x + 1)
    assert (len(outer.passes), len(middle.passes), len(inner.passes)) == (2, 2, 1)
    assert torch.equal(inner["/gelu#0"], outer.passes[0]["/gelu#0"])
    assert torch.equal(middle["/softmax#0"], outer["/softmax#0"])
    assert outer.graph.fingerprint == middle.graph.fingerprint == fmr.run(model, x).graph.fingerprint


class Asks(nn.Module):
    """Runs a model of its own under fmr while it is itself tracked."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.helper = [build("chain")[0]]
        self.runs: list[fmr.Run] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(fmr.run(self.helper[0], x))
        return self.net(x) + self.runs[-1]["/gelu#0"].sum()


def test_a_model_may_track_another_one_inside_its_own_forward() -> None:
    model, x = Asks(), torch.randn(3, 4)
    run = fmr.run(model, x)
    (inner,) = model.runs
    assert inner.graph.fingerprint == fmr.run(model.helper[0], x).graph.fingerprint
    run.graph.lint()
    assert run.graph["/add#0"].parents == ("net/linear#0", "/sum#0")
    model.runs.clear()
    assert torch.equal(fmr.run(model, x, keep=["/add#0"])["/add#0"], run["/add#0"])


def test_two_threads_track_two_models_at_once() -> None:
    models = [build("chain")[0], build("attention")[0]]
    inputs = [build("chain")[1], build("attention")[1]]
    alone = [fmr.run(model, *args) for model, args in zip(models, inputs, strict=True)]
    meet = threading.Barrier(2, timeout=30)
    runs: list[Any] = [None, None]

    def wait(*_: Any) -> None:
        meet.wait()

    for model in models:
        model.register_forward_pre_hook(wait)
        model.register_forward_hook(wait)

    def work(place: int) -> None:
        with torch.no_grad(), fmr.track(models[place]) as run:
            for _ in range(5):
                models[place](*inputs[place])
            meet.wait()
        runs[place] = run

    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for run, one in zip(runs, alone, strict=True):
        assert len(run.passes) == 5
        for each in run.passes:
            assert each.graph.fingerprint == one.graph.fingerprint
            assert all(torch.equal(each[node], one[node]) for node in one.graph)


def _in_a_thread(act: Any) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join(60)


def test_a_model_called_in_another_thread_is_not_seen_and_the_error_says_so() -> None:
    model, x = chain()
    out: list[Tensor] = []
    with pytest.raises(
        fmr.TrackError,
        match=r"fmr saw 3 module calls on other threads or in other tasks \(first: Chain\) and none on the thread and in "
        r"the task that opened the block\. A block sees its own only: open fmr\.track where the model is called\.",
    ):
        with fmr.track(model):
            _in_a_thread(lambda: out.append(model(x)))
    assert torch.equal(out[0], model(x))


def test_a_thread_beside_a_tracked_call_leaves_no_trace_in_it() -> None:
    model, x = chain()
    with fmr.track(model) as run:
        model(x)
        _in_a_thread(lambda: model(x))
    assert len(run.passes) == 1


# ---- mistakes


def test_something_else_than_a_module() -> None:
    for wrong in (42, "gpt2", nn.Linear, torch.zeros(2)):
        with pytest.raises(
            fmr.TrackError,
            match=rf"fmr\.track got {type(wrong).__name__}, expected a torch\.nn\.Module\. Pass the module itself",
        ):
            with fmr.track(wrong):  # type: ignore[arg-type]
                pass


def test_nothing_ran() -> None:
    model, _ = chain()
    with pytest.raises(
        fmr.TrackError,
        match=r"The tracked Chain was never called inside the block\. Expected a call such as model\(\*\*inputs\) there\.",
    ):
        with fmr.track(model):
            pass
    with pytest.raises(fmr.TrackError, match=r"No module was called inside the block\. Expected a call"):
        with fmr.track():
            torch.ones(2).add(1)


@pytest.mark.parametrize("keep", ["all", ["up/linear#0"]])
def test_another_module_ran(keep: Any) -> None:
    model, x = chain()
    other = nn.Linear(4, 4)
    with pytest.raises(
        fmr.TrackError,
        match=r"The tracked Chain was never called inside the block; Linear was\. "
        r"Call the tracked module itself, or track the module that you call\.",
    ):
        with fmr.track(model, keep=keep):
            other(x)


@pytest.mark.parametrize("keep", ["all", "none", ["0/linear#0"]])
def test_compiled_models_are_refused(keep: Any) -> None:
    x = torch.randn(2, 4)
    wrapped = torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager")
    with pytest.raises(
        fmr.TrackError,
        match=r"fmr cannot track OptimizedModule: it is compiled \(OptimizedModule\), and compiled code runs outside "
        r"the Python that fmr watches\. Expected a plain module; track the module underneath, `model\._orig_mod`\.",
    ):
        fmr.run(wrapped, x, keep=keep)
    assert fmr.run(wrapped._orig_mod, x)["0/linear#0"].shape == (2, 4)
    model = nn.Sequential(nn.Linear(4, 4))
    model.compile(backend="eager")
    with pytest.raises(
        fmr.TrackError, match=r"cannot track Sequential: it is compiled .*; track a model that was not compiled\."
    ):
        fmr.run(model, x, keep=keep)


def test_a_compiled_part_is_refused_where_it_is_asked_for() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    model[1].compile(backend="eager")
    for keep in ("all", "none", ["1/linear#0"]):
        with pytest.raises(fmr.TrackError, match=r"cannot track Sequential: its module '1' is compiled \(Linear\)"):
            fmr.run(model, x, keep=keep)
    assert torch.equal(fmr.run(model, x, keep=["0/linear#0"])["0/linear#0"], model[0](x))


def test_an_empty_keep() -> None:
    model, x = chain()
    for empty in ([], (), set(), {}):
        with pytest.raises(fmr.FmrError, match=r"Expected"):
            fmr.run(model, x, keep=empty)
    with pytest.raises(
        fmr.TrackError,
        match=r"keep is empty\. Expected 'all', 'none', IDs, paths of modules, .* or a predicate on nodes\.",
    ):
        fmr.run(model, x, keep=[])


def test_a_name_that_is_no_id() -> None:
    model, x = chain()
    with pytest.raises(
        fmr.IdError,
        match=r"No pass reached 'softmax'\. No module of that path is registered and none was called\. Expected a path as "
        r"in model\.named_modules\(\), or an ID such as 'h\.0\.attn/softmax#0', with an empty scope for the root",
    ):
        fmr.run(model, x, keep="softmax")


def test_an_id_that_no_pass_reached_names_the_nearest_and_where_the_run_left_the_graph() -> None:
    model, x = chain()
    fmr.run(model, x, keep="none")
    with pytest.raises(fmr.IdError, match=r"^No pass reached '/gelu#1'\. .*Nearest that exist: /gelu#0"):
        fmr.run(model, x, keep=["/gelu#1"])
    with pytest.raises(
        fmr.IdError,
        match=r"^No pass reached 'upp/linear#0'\. The module call 'upp' did not take place\. "
        r"Nearest that exist: up/linear#0, down/linear#0",
    ):
        fmr.run(model, x, keep=["upp/linear#0"])
    with pytest.raises(fmr.IdError, match=r"^No pass reached 'input:y'\. The pass had no such source\."):
        fmr.run(model, x, keep=["input:y"])


def test_a_changed_model_names_the_first_op_that_differs() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp() if x.sum() > 0 else x.cos().sin()
            return y.tanh()

    model = Branch()
    fmr.run(model, torch.ones(2), keep="none")
    with pytest.raises(
        fmr.IdError,
        match=r"No pass reached '/exp#0'\. In '' this run left the recorded graph after gt#0: recorded exp#0, now cos#0\.",
    ):
        fmr.run(model, -torch.ones(2), keep=["/exp#0"])


def test_an_unknown_id_in_a_finished_run_names_three_that_exist() -> None:
    model, x = chain()
    run = fmr.run(model, x)
    with pytest.raises(fmr.IdError) as error:
        run["up/linear#1"]
    assert str(error.value).startswith("Chain has no value 'up/linear#1' in this graph. Nearest that exist: up/linear#0, ")
    assert len(str(error.value).partition("exist: ")[2].split(",")) <= 3


def test_an_id_is_read_in_the_last_pass_that_has_it() -> None:
    class Warm(nn.Module):
        def forward(self, x: Tensor, first: bool) -> Tensor:
            return x.exp() if first else x.sin()

    model = Warm()
    with fmr.track(model) as run:
        model(torch.zeros(2), True)
        model(torch.ones(2), True)
        model(torch.ones(2), False)
    assert torch.equal(run["/exp#0"], torch.ones(2).exp())
    assert "/exp#0" in run
    assert "/sin#0" in run
    with pytest.raises(fmr.IdError, match=r"has no value '/cos#0' in this graph"):
        run["/cos#0"]


def test_a_glob_that_matches_nothing() -> None:
    model, x = chain()
    with pytest.raises(
        fmr.IdError,
        match=r"keep='\*attention\*' matched no value of the run\. Expected a glob over IDs such as '\*attn\*/softmax#\*'",
    ):
        fmr.run(model, x, keep="*attention*")


def test_stop_without_ids() -> None:
    model, x = chain()
    for keep in ("all", "none", "*gelu*"):
        with pytest.raises(
            fmr.TrackError, match=r"stop=True with keep='.*': expected a set of IDs, after the last of which to stop\."
        ):
            fmr.run(model, x, keep=keep, stop=True)


def test_a_model_inside_a_transform_of_functorch() -> None:
    model, x = chain()
    for keep in ("all", "none", ["/gelu#0"]):
        with pytest.raises(
            fmr.TrackError,
            match=r"Chain was called inside a torch\.func transform \(vmap, grad, jvp\), whose tensors are only stand-ins\. "
            r"Expected a plain call; track the function of the transform from outside, as a module that calls it\.",
        ):
            with fmr.track(model, keep=keep):
                torch.vmap(model)(x)
    with pytest.raises(fmr.TrackError, match=r"inside a torch\.func transform"), fmr.track(model):
        torch.func.grad(lambda y: model(y).sum())(x)


def test_tokens_of_the_zoo_leave_the_special_ones_out() -> None:
    assert tokens(4, 4).min() >= 3


@pytest.mark.parametrize("keep", [3, None, [4]], ids=repr)
def test_what_cannot_be_kept_is_named(keep: object) -> None:
    with pytest.raises(fmr.TrackError, match=r"keep is .*(3|None|\[4\])\. Expected 'all', 'none', IDs"):
        fmr.run(torch.nn.ReLU(), torch.ones(1), keep=keep)  # type: ignore[arg-type]


def test_a_value_inside_a_fused_op_is_in_the_run_that_can_compute_it() -> None:
    attend = torch.nn.functional.scaled_dot_product_attention

    class Attend(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(x, x, x)

    run = fmr.run(Attend(), torch.ones(1, 2, 3, 4))
    assert "/scaled_dot_product_attention#0/softmax#0" in run
    assert "/scaled_dot_product_attention#0/softmax#1" not in run


@pytest.mark.parametrize("order", [1, -1])
def test_while_kernels_are_opened_their_values_are_what_they_are_otherwise(order: int) -> None:
    encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    run = fmr.run(torch.nn.Sequential(encoder, encoder).requires_grad_(False), torch.randn(2, 3, 8))
    names = [one.id for one in run.graph.unfused.nodes][::order]
    own = {one.id for one in run.graph.nodes}
    inner, plain = [name for name in names if name not in own], {name: run[name] for name in names}

    def places() -> list[int]:
        twice = [(run[name], run[name]) for name in inner]
        return [len({one.data_ptr() for one in pair}) for pair in twice]

    with run.last.opening():
        opened, held = {name: run[name] for name in names}, places()
    assert all(torch.equal(opened[name], plain[name]) for name in names)
    assert (len(inner) > 20, {*held}) == (True, {1})
    assert 2 in places()


# ---- some calls only


def loop(model: nn.Module, x: Tensor, calls: int, **options: Any) -> tuple[Any, list[Tensor]]:
    """A training loop in a block, and what the model returned in each step."""
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr=0.1), []
    with fmr.track(model, **options) as run:
        for _ in range(calls):
            optimizer.zero_grad()
            out = model(x)
            out.square().sum().backward()
            optimizer.step()
            outputs.append(out.detach())
    return run, outputs


@pytest.mark.parametrize("keep", [["/add#0"], ["up"], "all", "none", "*linear*", ["up*"]], ids=str)
def test_each_so_many_th_call_is_seen(keep: Any) -> None:
    model, x = chain()
    run, outputs = loop(model, x, 8, keep=keep, every=3)
    assert [one.number for one in run.passes] == [0, 3, 6]
    for one in run.passes:
        torch.testing.assert_close(one.output, outputs[one.number])
        if "/add#0" in one:
            assert torch.equal(one["/add#0"], outputs[one.number])


def test_a_loop_of_which_some_calls_are_seen_learns_what_it_learns_alone() -> None:
    (model, x), (other, _) = chain(), chain()
    run, outputs = loop(model, x, 7, every=2)
    _, plain = loop(other, x, 7, keep=["up"], every=100)
    assert all(map(torch.equal, outputs, plain))
    assert len(run.passes) == 4


def test_nothing_of_a_call_that_is_let_by_is_seen_or_told() -> None:
    model, x = chain()
    seen = []

    class Looks(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            seen.append(len(torch.overrides._get_current_function_mode_stack()))
            return given

    model = nn.Sequential(model, Looks())
    with fmr.track(model, every=2) as run:
        for _ in range(4):
            model(x)
        model[0](x)
    assert seen == [1, 0, 1, 0]
    assert [one.number for one in run.passes] == [0, 2, 4]


def test_an_error_of_a_call_that_is_let_by_leaves_the_next_to_be_seen() -> None:
    model, x = chain()
    with fmr.track(model, every=2) as run:
        model(x)
        with pytest.raises(RuntimeError):
            model(x[:, :1])
        model(x + 1)
    assert [one.number for one in run.passes] == [0, 2]
    assert run.graph.lint() is None


def test_blocks_in_each_other_count_for_themselves() -> None:
    model, x = chain()
    with fmr.track(model, every=2) as outer, fmr.track(model, keep=["/add#0"], every=3) as inner:
        for _ in range(7):
            model(x)
    assert [one.number for one in outer.passes] == [0, 2, 4, 6]
    assert [one.number for one in inner.passes] == [0, 3, 6]


def test_calls_of_a_method_are_counted() -> None:
    model, x = chain()
    with fmr.track(model, method="forward", every=2) as run:
        for _ in range(3):
            model(x)
    assert [one.number for one in run.passes] == [0, 2]


def test_the_number_of_a_pass_is_saved(tmp_path: Any) -> None:
    model, x = chain()
    run, _ = loop(model, x, 5, keep=["/add#0"], every=2)
    run.save(tmp_path / "run")
    assert [one.number for one in fmr.load(tmp_path / "run").passes] == [0, 2, 4]


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", None, True])
def test_calls_are_counted_by_whole_numbers(every: Any) -> None:
    model, _ = chain()
    with pytest.raises(fmr.TrackError, match=rf"every={every!r}: expected a whole number from 1 on"):
        with fmr.track(model, every=every):
            pass


@pytest.mark.parametrize(
    ("given", "told"),
    [({"stop": True, "keep": ["up"]}, "stop=True"), ({"edits": {"up": lambda value, _: value}}, "edits=")],
)
def test_what_would_change_other_calls_is_refused_beside_it(given: dict[str, Any], told: str) -> None:
    model, _ = chain()
    with pytest.raises(fmr.TrackError, match=f"every=2 with {told}: other calls of the model would run to their end"):
        with fmr.track(model, every=2, **given):
            pass
