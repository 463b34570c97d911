"""What a lab keeps of a call, when a version is new, what two versions differ in, and what is refused."""

import copy
import hashlib
import json
import random
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import analyzers
import fmr
from analyzers.lab.errors import LabError
from analyzers.lab.identity import identity
from fmr.weights import fingerprint
from tests.analyzers.lab.conftest import network
from tests.residue import model_state, random_state, torch_state

FACTOR = 3


def times(x: float) -> float:
    return FACTOR * x


def defined(text: str, name: str, **names: Any) -> Any:
    """A function from a text, as from another state of a file."""
    exec(text, names)
    return names[name]


def test_a_call_is_kept_with_all_that_went_in_and_came_out(lab: analyzers.Lab) -> None:
    @lab.experiment(seed=5)
    def probe(model: nn.Module, x: Tensor, scale: float = 0.5) -> dict[str, Any]:
        return {"out": model(x) * scale, "drawn": torch.rand(3), "y": times(2)}

    x = torch.ones(1, 4)
    given = probe(x)
    (version,) = lab.versions("probe")
    assert torch.equal(version.result["out"], given["out"])
    assert torch.equal(version.result["drawn"], torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(version.arguments["x"], x)
    assert version.arguments["scale"] == 0.5
    assert (version.name, version.seed) == ("probe", 5)
    assert version.source.startswith("@lab.experiment(seed=5)\ndef probe(model: nn.Module, x: Tensor, scale: float = 0.5)")
    assert version.code.uses == {"times": "def times(x: float) -> float:\n    return FACTOR * x\n", "FACTOR": "3"}
    assert version.model == identity(lab.model)
    assert version.model["fingerprint"] == fingerprint(lab.model)
    assert version.environment["torch"] == torch.__version__
    assert {"python", "numpy", "fmr"} <= version.environment.keys()
    assert version.seconds > 0
    assert version.memory is not None
    assert repr(version).startswith(f"probe {version.version}  probe(x=tensor float32[1, 4], scale=0.5) seed 5 -> ")
    assert lab.load(version.version[:6])["y"] == 6


def test_a_function_with_a_seed_of_its_own_begins_with_it(lab: analyzers.Lab) -> None:
    own = defined("def own(n=1, seed=7):\n    return seed\n", "own")
    open_ = defined("def open_(seed=None):\n    return seed\n", "open_")
    assert (
        lab.experiment(own)(),
        lab.experiment(
            own,
        )
        .record()
        .seed,
    ) == (7, 7)
    assert lab.experiment(own).record(seed=3).result == lab.experiment(seed=3)(own)() == 3
    assert lab.experiment(open_)() == 0
    assert lab.hypothesis(null=0.0)(own).seed == 7


class Counting(nn.Module):
    """A module that counts its calls in several ways, and one that is set to something."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.seen, self.mode = nn.Linear(4, 4), 0, list[int](), "plain"

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.longest = max(getattr(self, "longest", 0), len(x))
        out: Tensor = self.inner(x)
        return out


def test_what_a_run_changes_of_its_model_is_no_other_model(tmp_path: Path) -> None:
    model = Counting().eval()
    lab = analyzers.Lab(model, tmp_path / "lab")

    @lab.experiment
    def f(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    @lab.experiment
    def g(other: nn.Module, x: Tensor) -> Tensor:
        return other(x)

    x, other = torch.ones(2, 4), Counting().eval()
    first = f.record(x)
    assert f.record(x) == first == f.record(x)
    assert first.model["changed"] == "calls, longest, seen"
    assert g.record(other, x) == g.record(other, x)
    assert "changed" not in g.record(other, x).model  # the lab's own was not called
    again = analyzers.Lab(model, tmp_path / "lab").experiment(f.function)  # as a cell of a notebook that is run once more
    assert again.record(torch.ones(2, 4)) == first
    model.mode = "another"
    assert f.record(x).version != first.version
    model.inner.bias.data[0] += 1
    assert len({one.version for one in (first, f.record(x), f.record(x))}) == 2
    assert f.record(x).arguments["x"].equal(x)


class Side(Enum):
    LEFT, RIGHT = 1, 2


SETTINGS: dict[str, tuple[Any, Any]] = {
    "a dict": ({"a": 1}, {"a": 2}),
    "a dict in a list": ([{"a": "x"}], [{"a": "y"}]),
    "a set": ({1}, {1, 2}),
    "a number of NumPy": (np.int64(1), np.int64(2)),
    "an array": (np.ones(2), np.zeros(2)),
    "a tensor that is no buffer": (torch.ones(2), torch.zeros(2)),
    "a record": (SimpleNamespace(width=1), SimpleNamespace(width=2)),
    "an enum": (Side.LEFT, Side.RIGHT),
    "a partial": (partial(torch.sum, dim=0), partial(torch.sum, dim=1)),
    "a range": (range(3), range(4)),
    "a function of one name": tuple(defined(f"def f(x):\n    return x * {n}\n", "f", __name__=__name__) for n in (2, 3)),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("what", SETTINGS)
def test_whatever_a_model_is_set_to_is_part_of_it(what: str, tmp_path: Path) -> None:
    model = Counting().eval()
    f = analyzers.Lab(model, tmp_path / "lab").experiment(
        defined("def f(model, x):\n    model(x)\n    return len(x)\n", "f")
    )
    first, second = SETTINGS[what]
    model.setting = first
    one = f.record(torch.ones(2, 4))
    model.setting = second
    assert one.version != f.record(torch.ones(2, 4)).version == f.record(torch.ones(2, 4)).version
    model.setting = first
    assert f.record(torch.ones(2, 4)) == one


class Caching(nn.Module):
    """A module that keeps what it made at its first call in attributes that were empty."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.length, self.turned, self.by_length = nn.Linear(4, 4), None, None, dict[int, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.length, self.turned = len(x), x.cos()  # type: ignore[assignment]
        out: Tensor = self.by_length.setdefault(len(x), self.inner(x))
        return out


def test_what_a_run_changes_of_a_model_that_its_code_reads_is_no_other_code(lab: analyzers.Lab) -> None:
    net, others = Counting().eval(), [Counting().eval()]

    @lab.experiment
    def f(x: Tensor) -> Any:
        return [net(x), others[0](x)]

    x = torch.ones(2, 4)
    first = f.record(x)
    assert f.record(x) == first == f.record(x)
    assert re.fullmatch(r"Counting  # \w{16}\n# Counting \w{16} \w{16}", first.code.uses["net"])
    for one, what in ((net, "mode"), (others[0], "mode"), (net, "other")):
        setattr(one, what, "another")
        assert first.version != f.record(x).version == f.record(x).version
    assert len(lab.versions("f")) == 4
    net.inner.bias.data += 1
    assert f.record(x) not in lab.versions("f")[:4]


def test_a_model_like_another_that_is_not_run_is_told_by_what_it_is(tmp_path: Path) -> None:
    model = Counting().eval()
    twin = copy.deepcopy(model)
    f = analyzers.Lab(model, tmp_path / "lab").experiment(defined("def f(net, x):\n    return net(x)\n", "f"))
    assert f.record(twin, torch.ones(2, 4)) == f.record(twin, torch.ones(2, 4))


def test_what_a_run_caches_is_no_other_model(tmp_path: Path) -> None:
    f = analyzers.Lab(Caching().eval(), tmp_path / "lab").experiment(defined("def f(model, x):\n    return model(x)\n", "f"))
    first = f.record(torch.ones(2, 4))
    assert first.model["changed"] == "by_length, length, turned"
    assert f.record(torch.ones(2, 4)) == first == f.record(torch.ones(2, 4))


def test_a_flag_that_a_run_changes_makes_another_model(lab: analyzers.Lab) -> None:
    f = lab.experiment(defined("def f(model):\n    model.train()\n", "f"))
    first, second = f.record(), f.record()
    assert first.version != second.version
    assert f.record() == second
    assert "changed" not in first.model


def test_what_a_run_changes_of_buffers_makes_another_model(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(4).train()
    f = analyzers.Lab(model, tmp_path / "lab").experiment(defined("def f(model, x):\n    return model(x)\n", "f"))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert len({f.record(x).version for _ in range(3)}) == 3
    model.eval()
    assert len({f.record(x).version for _ in range(3)}) == 1


def test_the_hash_is_that_of_the_content_by_hand(lab: analyzers.Lab) -> None:
    double = defined("def double(x):\n    return 2 * x\n", "double")
    version = lab.experiment(double).record(7)
    content = {
        "name": "double",
        "source": version.source,
        "uses": {},
        "arguments": {"dict": [["x", 7]]},
        "seed": 0,
        "model": [version.model["fingerprint"], version.model["settings"]],
        "result": 14,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert version.version == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_same_code_arguments_and_result_are_one_version(lab: analyzers.Lab, tmp_path: Path) -> None:
    @lab.experiment
    def probe(model: nn.Module, n: int) -> Tensor:
        return model(torch.full((1, 4), float(n))) + torch.rand(2)

    first = probe.record(1)
    assert probe.record(1) == first
    assert len(lab.versions("probe")) == 1
    assert list(lab.attempts("probe")["version"]) == [first.version] * 2
    other = analyzers.Lab(network(), tmp_path / "other")
    assert other.experiment(probe.function).record(1).version == first.version


def test_a_change_of_any_is_a_new_version(lab: analyzers.Lab, tmp_path: Path) -> None:
    text = "def f(n, torch=torch, noise=0.0):\n    return (shift + n) * 1.0 + noise * torch.rand(1).item()\n"

    def made(text: str = text, shift: int = 0, where: analyzers.Lab = lab, **given: Any) -> str:
        function = defined(text.replace("torch=torch, ", "").replace("torch.", "torch."), "f", shift=shift, torch=torch)
        return where.experiment(function).record(**{"n": 1, **given}).version

    changed = {
        "nothing": made(),
        "an argument": made(n=2),
        "the seed": made(seed=1),
        "its code": made(text.replace("* 1.0", "* 1.0 + 0.0")),
        "a constant that it reads": made(shift=1),
        "the seed of what is drawn": made(seed=2, noise=1.0),
    }
    with torch.no_grad():
        lab.model[0].weight[0, 0] += 1  # type: ignore[index, union-attr]
    changed["the model"] = made()
    assert len(set(changed.values())) == len(changed), changed


def test_a_change_of_the_model_outside_its_weights_is_a_new_version(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    model = nn.Sequential(nn.Linear(300, 300), nn.LayerNorm(300), nn.Dropout(0.1), nn.ReLU())
    model.register_buffer("table", torch.zeros(5000), persistent=False)
    lab = analyzers.Lab(model, tmp_path)
    changes: dict[str, Any] = {
        "nothing": lambda: None,
        "one weight": lambda: model[0].weight.data[17, 33].add_(1e-6),
        "one number of a buffer": lambda: model.table[4321].fill_(1),
        "a sign of zero": lambda: model.table[7].neg_(),
        "a dtype": lambda: model[1].double(),
        "a number that a module holds": lambda: setattr(model[1], "eps", 1.0),
        "eval mode": lambda: model[2].eval(),
        "a class": lambda: model.__setitem__(3, nn.GELU()),
        "a class of one's own": lambda: model.__setitem__(3, Shifted()),
        "its config": lambda: setattr(model, "config", {"depth": 3}),
        "a hook": lambda: model[0].register_forward_hook(lambda *_: None),
    }

    @lab.experiment
    def nothing(model: nn.Module) -> int:
        return 0

    made = {}
    for name, change in changes.items():
        change()
        made[name] = nothing.record().version
        assert nothing.record().version == made[name]
    assert len({*made.values()}) == len(made), made


def test_the_model_of_a_version_is_the_one_that_went_in(lab: analyzers.Lab) -> None:
    before = fingerprint(lab.model)

    @lab.experiment
    def trained(model: nn.Module) -> int:
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return 0

    first, second = trained.record(), trained.record()
    assert first.model["fingerprint"] == before != second.model["fingerprint"]
    assert first.version != second.version


def test_another_result_of_the_same_call_is_another_version(lab: analyzers.Lab) -> None:
    told = iter([1.0, 2.0])
    f = defined("def f():\n    return next(told)\n", "f", told=told)
    assert len({lab.experiment(f).record().version for _ in range(2)}) == 2


def test_helpers_beside_a_function_are_part_of_its_code(lab: analyzers.Lab, tmp_path: Path) -> None:
    import importlib.util

    made = []
    for n, body in enumerate(("x + 1", "x + 2")):
        path = tmp_path / f"state{n}.py"
        path.write_text(f"def helper(x):\n    return 0 * ({body})\n\ndef f(x):\n    return [helper(i) for i in [x]]\n")
        spec = importlib.util.spec_from_file_location("state", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made.append(lab.experiment(module.f).record(1))
    assert made[0].source == made[1].source
    assert made[0].version != made[1].version
    assert "-    return 0 * (x + 1)\n+    return 0 * (x + 2)" in repr(lab.diff(*made)).replace("\n    ", "\n")


class Base:
    shift = 1


class Tool(Base):
    scale = 1

    def go(self, x: float) -> float:
        return x * self.scale + self.shift


def test_code_of_ones_own_is_covered_however_it_is_reached(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(function: Any, name: str = "f") -> Any:
        return lab.experiment(function, name=name).record(1)

    def reading(helper: Any) -> Any:
        return lambda x: 0 * helper(x)

    def with_default(n: int) -> Any:
        def helper(x: float, n: int = n) -> float:
            return x * n

        return helper

    one, other = (lambda x: x + 1), (lambda x: x + 2)  # fmt: skip
    assert made(reading(one)) != made(reading(other)), "two functions on one line"
    assert made(one, "g").source != made(other, "g").source
    assert made(reading(partial(pow, 1))) == made(reading(partial(pow, 1)))
    assert made(reading(partial(pow, 1))) != made(reading(partial(pow, 2))), "what a partial brings along"
    assert made(partial(lambda a, x: 0, 1)) != made(partial(lambda a, x: 0, 2))
    assert made(reading(with_default(1))) != made(reading(with_default(2))), "a default of a helper"

    def method(scale: float) -> Any:
        tool = Tool()
        tool.scale = scale  # type: ignore[assignment]
        return tool.go

    assert made(lambda x: 0 * method(1)(x)) == made(lambda x: 0 * method(1)(x))
    assert made(reading(method(1))) != made(reading(method(2))), "the object that a method is of"

    def used(x: float) -> float:
        return 0 * Tool().go(x)

    states = [made(used)]
    for owner, part, value in ((Tool, "scale", 2), (Base, "shift", 2), (Tool, "go", lambda self, x: 3)):
        monkeypatch.setattr(owner, part, value)
        states.append(made(used))
    assert len({one.version for one in states}) == 4, "what a class holds now"
    assert states[1].code.uses["Tool.scale"] == "2"


def test_two_values_of_one_name_are_both_covered(lab: analyzers.Lab) -> None:
    def helper(n: int) -> Any:
        return lambda x: x * n

    def made(a: int, b: int) -> Any:
        first, second = helper(a), helper(b)
        return lab.experiment(lambda x: 0 * first(x) + 0 * second(x), name="f").record(1)

    assert len({made(a, b).version for a in (1, 2) for b in (1, 2)}) == 4


def test_helpers_of_another_file_of_ones_own_are_covered(lab: analyzers.Lab, tmp_path: Path) -> None:
    import importlib.util
    import sys

    made = []
    for n, how in ((1, "helper"), (2, "helper"), (1, "beside.helper"), (2, "beside.helper")):
        path = tmp_path / f"beside{n}.py"
        path.write_text(f"def helper(x):\n    return 0 * (x + {n})\n")
        spec = importlib.util.spec_from_file_location("beside", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["beside"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        f = defined(f"def f(x):\n    return {how}(x)\n", "f", helper=module.helper, beside=module)
        made.append(lab.experiment(f).record(1))
        del sys.modules["beside"]
    assert len({one.version for one in made}) == 4


def test_values_that_a_function_reads_are_part_of_its_code(lab: analyzers.Lab) -> None:
    text = "def f(x):\n    return x * (len(held) > 0)\n"
    for held in ({"a": 5}, [1, 7], torch.zeros(2), np.zeros(2), {1, 2}, {"f": lambda x: x}):
        f = defined(text, "f", held=held)
        first, again = (lab.experiment(f).record(1) for _ in range(2))
        assert first == again
        assert re.fullmatch(r".+  # [0-9a-f]{16}", first.code.uses["held"])
        for change in (lambda one: one.update(b=6), lambda one: one.append(2), lambda one: one.add_(1)):
            if isinstance(held, (dict, list, Tensor)):
                with suppress(AttributeError):
                    change(held)
        if isinstance(held, (dict, list, Tensor)):
            assert lab.experiment(f).record(1) != first


def test_a_value_that_no_lab_keeps_is_said_not_to_be_covered(lab: analyzers.Lab) -> None:
    text = "def f(x):\n    return x * other.real + len(held) + x.held.real if x else 0\n"
    version = lab.experiment(defined(text, "f", other=iter([1]), held=(), real=[3])).record(0)
    assert version.code.uses == {
        "held": "()",
        "other": "not covered: a builtins.list_iterator, which a lab cannot keep; its changes show nowhere",
    }  # and `real`, which is an attribute there, is none of them


def test_what_was_typed_at_a_prompt_is_kept_as_its_bytecode_and_says_so(lab: analyzers.Lab) -> None:
    one, same, other = (defined(f"def f(x):\n    return [x * {n} for _ in '{n}']\n", "f") for n in (2, 2, 3))
    first = lab.experiment(one).record(0)
    assert first.source.startswith("# No source: it was typed where Python keeps no text. Its bytecode, Python 3.")
    assert " at 0x" not in first.source
    assert lab.experiment(same).record(0) == first
    assert lab.experiment(other).record(0) != first


def test_random_numbers_go_on_as_if_there_had_been_no_experiment(lab: analyzers.Lab) -> None:
    @lab.experiment
    def drawn(seed: int) -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(1), seed]

    before = random.getstate(), np.random.get_state()[1].tolist(), random_state(), torch_state(), model_state(lab.model)  # type: ignore[index, arg-type]
    first = drawn(3)
    assert first[:2] == [random.Random(3).random(), np.random.RandomState(3).rand()]
    assert drawn(seed=3)[:2] == first[:2] != drawn(4)[:2]
    assert drawn()[3] == 0
    after = random.getstate(), np.random.get_state()[1].tolist(), random_state(), torch_state(), model_state(lab.model)  # type: ignore[index, arg-type]
    assert after == before


def test_experiments_of_several_threads_run_one_at_a_time(lab: analyzers.Lab) -> None:
    inside: list[int] = []

    @lab.experiment
    def inner(i: int) -> Tensor:
        return torch.rand(1)

    @lab.experiment
    def drawn(i: int) -> Tensor:
        inside.append(i)
        time.sleep(0.01)
        assert inside == [i]
        value = torch.rand(1) + 0 * inner(i)  # an experiment inside of one does not wait for it
        inside.clear()
        return value

    torch.manual_seed(5)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(drawn, range(4))]
    assert torch.equal(torch.cat(found), torch.rand(1, generator=torch.Generator().manual_seed(0)).expand(4))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))
    assert len(lab.versions("drawn")) == 4


def test_tools_are_given_by_name_the_users_own_too(tmp_path: Path) -> None:
    model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
    lab = analyzers.Lab(model, tmp_path, tokenizer)
    lab.tools["norms"] = lambda model: {name: p.norm().item() for name, p in model.named_parameters()}

    @lab.experiment
    def surest(logit_lens: Any, norms: dict[str, float], tokenizer: Any, prompt: str, top: int = 1) -> Any:
        assert type(logit_lens) is analyzers.LogitLens
        assert len(tokenizer(prompt)["input_ids"]) > 3
        return {"lens": logit_lens.run(prompt), "norm": max(norms.values())}

    result = surest("Junel Dunoth grew up in")
    (version,) = lab.versions()
    assert version.arguments == {"prompt": "Junel Dunoth grew up in", "top": 1}
    assert type(version.result["lens"]) is analyzers.Lens
    assert repr(version.result["lens"]) == repr(result["lens"])
    assert version.code.uses["tool logit_lens"] == "analyzers.lenses.lens.LogitLens"
    assert "named_parameters" in version.code.uses["tool norms"]
    given = surest("Junel Dunoth grew up in", norms={"all": 0.0})
    assert given["norm"] == 0.0


def test_a_diff_tells_each_part_that_differs(lab: analyzers.Lab) -> None:
    @lab.experiment
    def f(n: int, label: str = "a") -> dict[str, Any]:
        return {"t": torch.arange(3.0) * n, "deep": [{"x": n}], "same": 1, **({"new": 2} if n > 1 else {})}

    a, b = f.record(1), f.record(3, label="b", seed=2)
    difference = lab.diff(a, b.version)
    assert [change[:2] for change in difference.changes] == [
        ("seed", ""),
        ("arguments", "n"),
        ("arguments", "label"),
        ("result", "t"),
        ("result", "deep[0]['x']"),
        ("result", "new"),
    ]
    by = {change[1]: change[4] for change in difference.changes}
    assert by["t"] == 4.0
    assert by["deep[0]['x']"] == 2
    assert "  result new: - -> 2" in repr(difference)
    assert "  arguments label: 'a' -> 'b'" in repr(difference)
    assert len(difference.table()) == 6
    assert not lab.diff(a, a)
    assert repr(lab.diff(a, a)).endswith("no difference")


def test_an_error_in_an_experiment_is_kept_and_raised_again(lab: analyzers.Lab) -> None:
    @lab.experiment
    def broken(n: int) -> float:
        return 1 / (n - 1)

    broken(2)
    with pytest.raises(ZeroDivisionError):
        broken(1)
    attempts = lab.attempts("broken")
    assert list(attempts["status"]) == ["finished", "failed"]
    assert "return 1 / (n - 1)" in attempts["error"][1]
    assert attempts["error"][1].rstrip().endswith("ZeroDivisionError: division by zero")
    assert len(lab.versions("broken")) == 1


def test_a_result_that_cannot_be_kept_is_refused_and_not_lost(lab: analyzers.Lab) -> None:
    class Odd:
        pass

    @lab.experiment
    def odd() -> dict[str, Any]:
        return {"fine": 1, "odd": [Odd()]}

    message = (
        r"result\['odd'\]\[0\] is a tests.*Odd, which a lab cannot keep\. Expected numbers, text, lists, dicts, tensors, "
        r"arrays, data frames, figures and results of analyzers\. Return what of it counts as these\."
    )
    with pytest.raises(LabError, match=message) as caught:
        odd()
    assert caught.value.result["fine"] == 1
    attempts = lab.attempts("odd")
    assert list(attempts["status"]) == ["failed"]
    assert "which a lab cannot keep" in attempts["error"][0]
    assert not any(path.is_file() for path in (lab.folder / "values").rglob("*"))


def test_what_lies_too_deep_is_refused_and_not_lost(lab: analyzers.Lab) -> None:
    @lab.experiment
    def deep(levels: int) -> Any:
        value: Any = 0
        for _ in range(levels):
            value = [value]
        return value

    assert lab.load(deep.record(100)) == deep(100)
    for levels in (101, 5000):
        with pytest.raises(LabError, match=r"It lies deeper than 100 levels; return it as a flat list") as caught:
            deep(levels)
        assert isinstance(caught.value.result[0], list)


def test_an_error_whose_text_no_file_takes_is_kept_as_well(lab: analyzers.Lab) -> None:
    @lab.experiment
    def odd() -> None:
        raise ValueError("\ud800 bad")

    with pytest.raises(ValueError, match="bad"):
        odd()
    (row,) = lab.attempts("odd").itertuples()
    assert row.status == "failed"
    assert row.error.rstrip().endswith(r"ValueError: \ud800 bad")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda lab: analyzers.Lab("gpt", lab.folder), "Lab got 'gpt' for its model, expected a torch.nn.Module"),
        (
            lambda lab: analyzers.Lab(None, lab.folder / "no"),
            "is no folder of a lab: there is no lab.sqlite. Expected a lab",
        ),
        (lambda lab: analyzers.Lab(lab.model, lab.folder.parent), "holds other files and no lab.sqlite. Expected a lab"),
        (lambda lab: lab.versions("prob"), r"has no experiment 'prob'\. It has 'probe'\. Nearest that exist: probe\."),
        (lambda lab: lab.version("zz"), "'zz' is no version of the lab in .*: there is none. Expected one of its versions"),
        (lambda lab: lab.load(3), "3 is no version. Expected one of lab.versions"),
        (lambda lab: lab.experiment(3), "lab.experiment got a int, expected a function"),
        (lambda lab: lab.experiment(lambda: 3), "name='<lambda>' is no name for an experiment"),
        (lambda lab: lab.experiment(name="../x")(len), r"name='\.\./x' is no name for an experiment"),
        (lambda lab: lab.experiment(seed=-1)(test_misuse), r"seed=-1: expected a whole number from 0 to 2\*\*32 - 1"),
        (
            lambda lab: lab.experiment(probe)(1, 2),
            r"probe cannot be called so \(too many positional.*\)\. Expected probe\(x",
        ),
        (lambda lab: lab.experiment(probe)(y=2), r"probe cannot be called so \(.*\)\. Expected probe\(x"),
        (lambda lab: lab.experiment(probe)(object()), r"arguments\['x'\] is a builtins.object, which a lab cannot keep"),
        (lambda lab: lab.experiment(generator), "generator is a coroutine or a generator, expected a function"),
        (lambda lab: lab.experiment(asks)(), "The lab has no tokenizer, which an experiment asks for. Make it with one"),
        (
            lambda lab: (lab.tools.update(own=3), lab.experiment(own_tool)()),
            r"lab.tools\['own'\] is a int, expected a class",
        ),
    ],
)
def test_misuse(mistake: Any, message: str, lab: analyzers.Lab) -> None:
    lab.experiment(probe)(1)
    with pytest.raises(fmr.FmrError, match=message):
        mistake(lab)


def probe(x: Any) -> Any:
    return x


def generator() -> Any:
    yield 1


def asks(tokenizer: Any) -> Any:
    return tokenizer


def own_tool(own: Any) -> Any:
    return own


def test_a_newer_lab_and_a_foreign_file_are_refused(lab: analyzers.Lab, tmp_path: Path) -> None:
    with sqlite3.connect(lab.folder / "lab.sqlite") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(LabError, match=r"has schema 99, this version of fmr reads schema 1. Upgrade fmr"):
        analyzers.Lab(None, lab.folder)
    for name, content in (("text", b"not a database at all" * 100), ("other", None)):
        folder = tmp_path / name
        folder.mkdir()
        if content is None:
            with sqlite3.connect(folder / "lab.sqlite") as db:
                db.execute("CREATE TABLE t (x)")
            db.close()
        else:
            (folder / "lab.sqlite").write_bytes(content)
        before = (folder / "lab.sqlite").read_bytes()
        with pytest.raises(LabError, match=r"is a database of something else|file is not a database"):
            analyzers.Lab(network(), folder)
        assert (folder / "lab.sqlite").read_bytes() == before


def test_a_lab_is_read_without_its_model_and_without_this_library(lab: analyzers.Lab) -> None:
    @lab.experiment
    def f(model: nn.Module) -> Any:
        return {"t": model(torch.ones(1, 4)), "n": 3}

    version = f.record()
    read = analyzers.Lab(None, lab.folder)
    assert read.load(version.version)["n"] == 3
    with pytest.raises(LabError, match=r"The lab has no model"):
        read.experiment(f.function)()
    from safetensors.torch import load_file

    db = sqlite3.connect(lab.folder / "lab.sqlite")
    name, told = db.execute("SELECT version, result FROM versions").fetchone()
    db.close()
    at = json.loads(told)["dict"][0][1]["tensor"]["at"]
    found = load_file(lab.folder / "values" / "f" / name / "result.safetensors")[at]
    assert torch.equal(found, version.result["t"])


def test_a_damaged_or_missing_file_is_told_and_written_again(lab: analyzers.Lab) -> None:
    @lab.experiment
    def f(model: nn.Module) -> Tensor:
        return model(torch.ones(1, 4))

    version = f.record()
    file = version.folder / "result.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LabError, match=r"result.safetensors is damaged: its checksum is not that of f .* Run the"):
        _ = version.result
    file.unlink()
    with pytest.raises(LabError, match=r"result.safetensors cannot be read .*; run the experiment again"):
        _ = version.result
    f()
    assert file.read_bytes() == whole
