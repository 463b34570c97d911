"""What people type first: the paths of modules as keys, and arguments that are wrong before anything runs."""

import fnmatch
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.runs.keep import may_name_values
from tests.models import build
from tests.small import Fn, random_tree


class Pair(nn.Module):
    """Returns a tuple, a dict and nothing, in one nest."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.line(x), None, {"twice": x * 2, "none": None}


class Model(nn.Module):
    """A nest, a module called three times, one that returns its input, one without a tensor, and in-place work after all."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.cell, self.same = Pair(), nn.Linear(4, 4), nn.Identity()
        self.nothing = Fn(lambda self, x: None)

    def forward(self, x: Tensor) -> Tensor:
        y, _, more = self.pair(self.same(x))
        self.nothing(y)
        for _ in range(3):
            y = self.cell(y)
        more["twice"].add_(100.0)
        return y.mul_(2.0) + more["twice"]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Model().eval()


def hooked(model: nn.Module, x: Tensor) -> dict[str, list[Any]]:
    """What each module returned, by a hook on it, copied at once."""
    seen: dict[str, list[Any]] = {path: [] for path, _ in model.named_modules()}
    copied = torch.utils._pytree.tree_map
    handles = [
        module.register_forward_hook(
            lambda m, a, out, path=path: seen[path].append(
                copied(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, out)
            )
        )
        for path, module in model.named_modules()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


KEYS = ["", "pair", "pair.line", "same", "cell", "cell@1", "cell@2", "pair:0", "pair:2", "pair:2.twice"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("how", ["all", "plan", "stop", "with a glob", "elsewhere", "file", "file of a plan"])
def test_a_path_is_what_the_call_returned(model: nn.Module, key: str, how: str, tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    path, _, at = key.partition(":")
    calls = hooked(model, x)[path.partition("@")[0]]
    expected = calls[int(path.partition("@")[2] or 0)]
    keep: Any = {"all": "all", "elsewhere": "all", "file": "all", "with a glob": [key, "*linear#*"]}.get(how, [key])
    run = fmr.run(model, x, keep=keep, stop=how == "stop", dtype=torch.float32 if how == "elsewhere" else None)
    if how.startswith("file"):
        run.save(tmp_path / "run.fmr")
        run = fmr.load(tmp_path / "run.fmr")
    found = run[key]
    if path == "pair" and not at:
        same(found[0], expected[0])
        assert found[1] is None
        assert set(found[2]) == {"twice"}
        same(found[2]["twice"], expected[2]["twice"])
    elif at == "2":
        same(found["twice"], expected[2]["twice"])
    else:
        same(found, expected[0] if at == "0" else expected[2]["twice"] if at else expected)


def test_a_plan_of_paths_turns_no_mode_on_and_keeps_under_the_path(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[str] = []
    monkeypatch.setattr(fmr.watching.plan.Reader, "__torch_function__", lambda self, func, *rest: met.append(func.__name__))
    run = fmr.run(model, torch.randn(2, 4), keep=["cell@1", "pair", ""])
    assert met == []
    assert set(run.last.kept) == {"cell@1", "pair:0", "pair:2.twice", ""}
    assert {type(name) for name in run.last.kept} == {fmr.TensorId}


def test_a_glob_over_paths_keeps_the_outputs_of_all_blocks() -> None:
    model, args, kwargs = build("gpt2")
    full = fmr.run(model, *args, **kwargs)
    run = fmr.run(model, *args, keep="transformer.h.*.mlp", **kwargs)
    assert run.last.kept == ("transformer.h.0.mlp", "transformer.h.1.mlp")
    blocks = fmr.run(model, *args, keep=["transformer.h.?", "transformer.h.0.attn"], **kwargs)
    assert {str(name).partition(":")[0] for name in blocks.last.kept} == {
        "transformer.h.0",
        "transformer.h.1",
        "transformer.h.0.attn",
    }
    for one in (run, blocks):
        for name in one.last.kept:
            same(one[name], full[name])


def test_a_glob_that_can_match_ids_matches_ids_and_paths(model: nn.Module) -> None:
    x = torch.randn(2, 4)
    run = fmr.run(model, x, keep="*pai*")
    assert set(run.last.kept) == {"param:pair.line.weight", "param:pair.line.bias", "pair.line/linear#0", "pair/mul#0"}
    same(run["pair"][0], fmr.run(model, x)["pair.line/linear#0"])
    assert run.graph.nodes


def test_the_output_of_a_module_is_kept_by_path_beside_a_glob_where_its_id_matches_none(model: nn.Module) -> None:
    run = fmr.run(model, torch.randn(2, 4), keep=["same", "pair:2.twice", "*linear#*"])
    assert {"input:x", "pair/mul#0", "cell@2/linear#0"} <= set(run.last.kept)
    assert float(run["pair:2.twice"].max()) < 50


@pytest.mark.parametrize("seed", range(10))
def test_every_path_of_a_random_tree_has_the_value_of_the_full_run(seed: int) -> None:
    rng = random.Random(seed)
    tree, x = random_tree(rng, depth=3), torch.randn(3, 4)
    full = fmr.run(tree, x)
    paths = [scope.path for scope in full.graph.scopes]
    for keep in (paths, rng.sample(paths, 1), "*"):
        run = fmr.run(tree, x, keep=keep)
        for path in paths if keep == "*" else keep:
            same(run[path], full[path])


def test_a_module_that_no_graph_can_see_into_has_a_path() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Tanh())
    x = torch.randn(2, 4)
    same(fmr.run(model, x, keep="1")["1"], fmr.run(model, x)["1"])


# ---- gradients, sites, calls of a graph


@pytest.mark.parametrize("keep", [["cell@1", "pair"], ["cell@1", "pair", "*tanh*", "*linear#*"], "all"])
def test_the_gradient_of_a_path_is_that_of_the_value(model: nn.Module, keep: Any) -> None:
    x = torch.randn(2, 4)
    if "*tanh*" in keep:
        with pytest.raises(fmr.IdError, match=r"keep='\*tanh\*' matched no value of the run"):
            fmr.run(model, x, keep=keep)
        keep = [key for key in keep if key != "*tanh*"]
    run = fmr.run(model, x, keep=keep, grad=True)
    run.output.sum().backward()
    same(run.grad["cell@1"], torch.full((2, 4), 2.0) @ model.cell.weight)
    same(run.grad["pair:0"], run.grad["cell@1"] @ model.cell.weight @ model.cell.weight)
    with pytest.raises(fmr.IdError, match=r"'pair' returned 2 tensors, where one is expected: name one, 'pair:0'"):
        run.grad["pair"]


def test_a_site_may_be_a_path_where_the_call_returned_one_tensor(model: nn.Module) -> None:
    x = torch.randn(3, 2, 4)
    for run in (fmr.run(model, x), fmr.run(model, x, keep=["cell", "pair"])):
        same(run[fmr.Site("cell", positions=-1)], run["cell"][:, -1])
        with pytest.raises(fmr.IdError, match=r"'pair' returned 2 tensors, .* name one, 'pair:0'.*, 'pair:2\.twice'"):
            run[fmr.Site("pair", positions=-1)]
        same(run[fmr.Site("pair:0", positions=-1)], run["pair"][0][:, -1])
    same(fmr.run(model, x, keep=fmr.Site("cell", positions=0))["cell"], run["cell"])


def test_module_calls_and_their_outputs_are_keys(model: nn.Module) -> None:
    x = torch.randn(2, 4)
    full = fmr.run(model, x)
    pair, cell = full.graph.module("pair"), full.graph.module("cell@1")
    assert fmr.run(model, x, keep=cell).last.kept == ("cell@1",)
    assert fmr.run(model, x, keep=[cell.scope, pair]).last.kept == ("pair:0", "pair:2.twice", "cell@1")
    assert fmr.run(model, x, keep=pair.output).last.kept == ("pair.line/linear#0", "pair/mul#0")
    same(full[cell], full["cell@1"])


# ---- what teaches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, r"dtype='float16' is a str, expected a torch\.dtype: pass torch\.float16\."),
        ({"dtype": "torch.bfloat16"}, r"pass torch\.bfloat16\."),
        ({"dtype": 16}, r"dtype=16 is a int, expected a torch\.dtype: pass torch\.float32 for example\."),
        ({"to": "gpu"}, r"to='gpu' names no device \(.*\)\. Expected one such as 'cpu' or 'cuda:0'\."),
        ({"to": "cuda:99"}, r"to='cuda:99': torch finds \d+ cuda devices here\. Expected one of these, or 'cpu'\."),
        ({"keep": 7}, r"keep is 7\. Expected 'all', 'none', IDs, paths of modules"),
        ({"keep": ["cell", None]}, r"keep is \['cell', None\]\. Expected"),
        ({"keep": "h.*.mlp", "stop": True}, r"stop=True with keep='h\.\*\.mlp': expected a set of IDs"),
        (
            {"keep": nn.Linear(1, 1)},
            r"keep got a module, Linear, which the tracked Fn does not register\. Expected",
        ),
        ({"keep": "/relu"}, None),
    ],
)
def test_arguments_are_checked_before_the_model_runs(options: dict[str, Any], message: str | None) -> None:
    ran: list[int] = []
    model = Fn(lambda self, x: (ran.append(1), x.relu())[1])
    with pytest.raises(fmr.FmrError, match=message):
        fmr.run(model, torch.ones(2), **options)
    assert ran == ([] if message else [1])


def test_a_module_given_as_a_key_is_told_its_path(model: nn.Module) -> None:
    with pytest.raises(fmr.TrackError, match=r"keep got a module, Linear\. Expected its path.*: keep='pair\.line'\."):
        fmr.run(model, torch.randn(2, 4), keep=["cell", model.pair.line])
    with pytest.raises(fmr.IdError, match=r"Linear is a module, not a key: expected its path"):
        fmr.run(model, torch.randn(2, 4))[model.cell]


def test_a_path_that_is_not_there_offers_paths(model: nn.Module) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(fmr.IdError, match=r"Model called no module 'pair\.lime' .*Nearest that exist: pair\.line"):
        fmr.run(model, x)["pair.lime"]
    with pytest.raises(fmr.IdError, match=r"No pass reached 'pair\.lime'.*Nearest that exist: pair\.line"):
        fmr.run(model, x, keep="pair.lime")
    with pytest.raises(fmr.IdError, match=r"This run did not keep 'pair'\. Nearest that exist: pair\.line"):
        fmr.run(model, x, keep="pair.line")["pair"]
    with pytest.raises(fmr.IdError, match=r"keep='h\.\*\.mlp' matched no value of the run.*over the paths of modules"):
        fmr.run(model, x, keep="h.*.mlp")


@pytest.mark.parametrize("keep", [[], ["*linear#*"]])
def test_a_call_without_a_tensor_or_position_says_so(model: nn.Module, keep: list[str]) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(fmr.IdError, match=r"'pair' returned no tensor at '1': expected one of 'pair:0'.*'pair:2\.twice'"):
        fmr.run(model, x, keep=["pair:1"])
    with pytest.raises(fmr.IdError, match=r"'nothing' returned no tensor in this pass"):
        fmr.run(model, x, keep=["nothing"])
    full = fmr.run(model, x)
    with pytest.raises(fmr.IdError, match=r"'pair' returned no tensor at '1': .* 'pair:0' \(pair\.line/linear#0\)"):
        full["pair:1"]
    with pytest.raises(fmr.IdError, match=r"'cell' returned one tensor and no nest in this pass: expected the path alone"):
        full["cell:0"]
    with pytest.raises(fmr.IdError, match=r"'nothing' returned no tensor in this pass"):
        full["nothing"]


def test_what_ran_by_forward_is_no_call_and_the_error_says_so() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = Fn(lambda self, x: self.line.forward(self.block.forward(x)).tanh(), block=block, line=nn.Linear(4, 4))
    run = fmr.run(model, torch.ones(1, 4))
    with pytest.raises(fmr.IdError, match=r"Its module 'block\.0' was called: was it run by \.forward\(x\)\? Only"):
        run["block"]
    with pytest.raises(fmr.IdError, match=r"Its parameters were read by /linear#0: was it run by \.forward\(x\)\?"):
        run.graph.module("line")
    with pytest.raises(fmr.IdError, match=r"No pass reached 'block'\. Its module was not called: if it was run by"):
        fmr.run(model, torch.ones(1, 4), keep="block")
    with fmr.track(model) as past:
        model.forward(torch.ones(1, 4))
    assert [one.graph.scopes[0].path for one in past.passes] == ["block.0", "block.1"]
    with pytest.raises(fmr.TrackError, match=r"Linear was never called .*model\.forward\(\*\*inputs\) is none\."):
        with fmr.track(model.line):
            model.line.forward(torch.ones(1, 4))
    with pytest.raises(fmr.TrackError, match=r"The tracked Linear was never called inside the block; another Linear was\."):
        with fmr.track(nn.Linear(4, 4)):
            model.line(torch.ones(1, 4))


def test_a_module_registered_twice_is_told_its_other_name() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    with pytest.raises(fmr.IdError, match=r"No pass reached '3'\. The module is registered as '1' too"):
        fmr.run(model, torch.randn(1, 4), keep="3")


def test_values_under_plain_names_can_be_read_by_torch(tmp_path: Path) -> None:
    run = fmr.run(nn.Linear(4, 4), torch.randn(1, 4))
    torch.save({str(name): run[name] for name in run.last.kept}, tmp_path / "values.pt")
    same(torch.load(tmp_path / "values.pt")["/linear#0"], run["/linear#0"])


# ---- which globs name module calls alone


@pytest.mark.parametrize(
    "glob",
    ["*", "*softmax*", "h.*", "*.weight", "p*", "*linear#0", "h.0?relu#0", "h.*0", "h.????", "h[/]re[#]0", "input:*"],
)
def test_globs_that_can_match_ids(glob: str) -> None:
    assert may_name_values(glob)


@pytest.mark.parametrize("glob", ["h.*.mlp", "h.?", "h.??", "h.???", "encoder.*.attn", "h.[0-3]", "blocks.*.conv", "h.?*.x"])
def test_globs_that_name_module_calls_alone(glob: str) -> None:
    assert not may_name_values(glob)


def test_no_glob_that_matches_an_id_is_taken_for_one_over_paths() -> None:
    rng = random.Random(0)
    ids = ["/add#0", "h.0.attn/softmax#12", "a/split#0:1", "param:a.weight", "h/k#0/softmax#1", "input:x.0"]
    for _ in range(3000):
        name = rng.choice(ids)
        glob = "".join(rng.choice([c, c, c, "?", "*", f"[{c}]", "*?"]) for c in name)
        if any(wild in glob for wild in "*?[") and fnmatch.fnmatchcase(name, glob):
            assert may_name_values(glob), (glob, name)


def test_modules_whose_names_look_like_parts_of_ids_have_paths() -> None:
    parts = nn.ModuleDict({"a:b": nn.Linear(4, 4), "x#y": nn.Linear(4, 4), "all": nn.Linear(4, 4)})
    model = Fn(lambda self, x: [x := self.parts[name](x) for name in ("a:b", "x#y", "all")][-1], parts=parts)
    x = torch.randn(2, 4)
    full = fmr.run(model, x)
    for path in ("parts.a:b", "parts.x#y", "parts.all"):
        same(fmr.run(model, x, keep=path)[path], full[f"{path}/linear#0"])
        same(full[path], full[f"{path}/linear#0"])
        same(full[full.graph.module(path)], full[path])


def test_a_plan_of_paths_is_unseen_by_a_mode_of_the_user(model: nn.Module) -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    x, noise = torch.randn(2, 4), "_set_grad_enabled"
    with Seen():
        model(x)
    plain, seen = [name for name in seen if name != noise], []
    with Seen():
        fmr.run(model, x, keep=["cell@1", "pair", ""], dtype=torch.float16)
    assert [name for name in seen if name != noise] == plain


def test_each_pass_of_a_plan_of_paths_has_its_own_values(model: nn.Module) -> None:
    x = torch.randn(2, 4)
    with fmr.track(model, keep=["cell", "pair"]) as run, torch.no_grad():
        for scale in (1, 2):
            model(x * scale)
    for scale, one in zip((1, 2), run.passes, strict=True):
        same(one["cell"], fmr.run(model, x * scale)["cell"])
        same(one["pair"][0], fmr.run(model, x * scale)["pair:0"])


def test_a_nest_of_a_plan_and_its_gradients_are_saved_and_loaded(model: nn.Module, tmp_path: Path) -> None:
    run = fmr.run(model, torch.randn(2, 4), keep=["pair", "cell"], grad=True)
    run.output.sum().backward()
    run.save(tmp_path / "run.fmr")
    loaded = fmr.load(tmp_path / "run.fmr")
    same(loaded["pair"][2]["twice"], run["pair"][2]["twice"])
    same(loaded.grad["pair:0"], run.grad["pair:0"])
    assert loaded.last.kept == run.last.kept


# ---- what errors offer


def test_names_are_those_that_can_be_asked_for(model: nn.Module) -> None:
    for keep in ("*linear#*", "none", "all", ["cell"]):
        run = fmr.run(model, torch.randn(2, 4), keep=keep)
        assert all(name in run for name in run.last.names())
    assert "pair" not in fmr.run(model, torch.randn(2, 4), keep="*add#*").last.names()


def test_what_is_offered_was_kept() -> None:
    model = Fn(lambda self, x: self.second(self.first(x)).relu(), first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    run = fmr.run(model, torch.ones(2, 4), keep="second/linear#*")
    with pytest.raises(fmr.IdError, match=r"called no module 'secnd'.*Nearest that exist: second"):
        run["secnd"]
    with pytest.raises(fmr.IdError) as error:
        run["firs"]
    assert "first" not in str(error.value)
    with pytest.raises(
        fmr.IdError, match=r"no value 'first/linear#1' in this graph\. Nearest that exist: second/linear#0\."
    ):
        run["first/linear#1"]


def test_an_id_of_another_branch_is_not_offered() -> None:
    model = Fn(lambda self, x: x.relu().sigmoid() if self.flag else x.relu().tanh())
    model.flag = True
    assert fmr.run(model, torch.ones(2)).graph
    model.flag = False
    with pytest.raises(fmr.IdError) as error:
        fmr.run(model, torch.ones(2), keep="/sigmoid#1")
    assert "/sigmoid#0" not in str(error.value)
