"""Exports by the clients of MLflow and W&B, which stand-ins take the place of: what they are asked to keep."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt

import analyzers
from analyzers.lab.errors import LabError

matplotlib.use("Agg")


def filled(lab: analyzers.Lab) -> analyzers.Lab:
    @lab.experiment
    def f(n: int, name: str = "a") -> dict[str, Any]:
        figure, ax = plt.subplots(figsize=(1, 1))
        ax.plot([0, n])
        return {"loss": 0.5 * n, "deep": {"accuracies": [0.1, 0.2]}, "t": torch.arange(n), "figure": figure, "word": "x"}

    f(1)
    f(2, name="b" * 600)
    return lab


def standing_in(name: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[tuple[Any, ...]]:
    """A module that notes its calls."""
    calls: list[tuple[Any, ...]] = []

    def noting(what: str, result: Any = None) -> Any:
        def note(*args: Any, **kwargs: Any) -> Any:
            calls.append((what, args, kwargs))
            return result

        return note

    module = ModuleType(name)
    for what, result in given.items():
        setattr(module, what, noting(what, result(noting) if callable(result) else result))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def mlflow(monkeypatch: pytest.MonkeyPatch, known: str | None = None) -> list[tuple[Any, ...]]:
    """MLflow's client as far as it is asked, with one experiment that it knows already."""

    def store(noting: Any) -> Any:
        names = ("log_param", "log_metric", "log_text", "log_artifact", "set_terminated", "get_experiment_by_name")
        run = SimpleNamespace(info=SimpleNamespace(run_id="run"))
        made = {name: noting(name) for name in names}
        made |= {"create_experiment": noting("create_experiment", "new"), "create_run": noting("create_run", run)}
        if known is not None:
            found = SimpleNamespace(experiment_id=known)
            made["get_experiment_by_name"] = noting("get_experiment_by_name", found)
        return SimpleNamespace(**made)

    return standing_in("mlflow", monkeypatch, MlflowClient=store)


def told(calls: list[tuple[Any, ...]], what: str) -> dict[str, Any]:
    """What was logged under which name."""
    return {args[1]: args[2] for one, args, _ in calls if one == what}


def test_mlflow_gets_a_run_a_version(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = mlflow(monkeypatch)
    first = filled(lab).versions("f")[0]
    assert lab.export("mlflow", "project", [first]) == 1
    by_name = {what: (args, kwargs) for what, args, kwargs in calls}
    assert by_name["create_experiment"] == (("project",), {})
    assert by_name["create_run"][0] == ("new",)
    assert by_name["create_run"][1]["run_name"] == f"f {first.version}"
    assert by_name["create_run"][1]["tags"]["version"] == first.version
    assert by_name["create_run"][1]["tags"]["model.fingerprint"] == first.model["fingerprint"]
    assert told(calls, "log_param") == {"seed": "0", "n": "1", "name": "'a'"}
    assert told(calls, "log_metric") == {
        "loss": 0.5, "deep.accuracies.0": 0.1, "deep.accuracies.1": 0.2, "seconds": first.seconds, "memory": first.memory,
    }  # fmt: skip
    assert by_name["log_text"][0] == ("run", first.code.text, "code.py")
    sent = {Path(path).name for path in told(calls, "log_artifact")}
    assert sent == {"result.safetensors", "result-figure.png"}
    assert all(Path(path).is_file() for path in told(calls, "log_artifact"))
    assert calls[-1] == ("set_terminated", ("run", "FINISHED"), {})
    assert all(args[0] == "run" for what, args, _ in calls if what.startswith("log"))


def test_mlflow_takes_the_experiment_that_it_has_and_no_run_that_is_under_way(
    lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = mlflow(monkeypatch, known="old")
    assert filled(lab).export("mlflow", "project") == 2
    assert [what for what, *_ in calls].count("MlflowClient") == 2
    assert {args for what, args, _ in calls if what == "create_run"} == {("old",)}
    assert "create_experiment" not in [what for what, *_ in calls]
    assert max(map(len, told(calls, "log_param").values())) == 400


def test_mlflow_gets_names_that_it_takes_each_once(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = mlflow(monkeypatch)

    @lab.experiment
    def f(x: Any) -> dict[str, float]:
        return {"layer[3].z": 1.0, "<b>": 2.0, "a/b": 3.0, "c]": 4.0, "c[": 5.0, "d" * 300: 6.0, "seconds": 7.0}

    version = f.record([{"a": 1}])
    lab.export("mlflow", "project")
    assert told(calls, "log_param") == {"seed": "0", "x.0.a": "1"}
    assert told(calls, "log_metric") == {
        "layer.3.z": 1.0, "b": 2.0, "a.b": 3.0, "c": 4.0, "c-2": 5.0, "d" * 240: 6.0, "seconds": 7.0,
        "seconds-2": version.seconds, "memory": version.memory,
    }  # fmt: skip


def test_files_of_one_name_stay_apart(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = mlflow(monkeypatch)
    version = filled(lab).versions("f")[0]
    names = {f"{folder}/{name}": "x" for folder in ("one", "two") for name in ("a.json",)}
    object.__setattr__(version, "files", names)
    monkeypatch.setattr(type(version), "read", lambda self, name: b"")
    lab.export("mlflow", "project", [version])
    assert [args[2] for what, args, _ in calls if what == "log_artifact"] == ["one", "two"]


def test_wandb_gets_a_run_a_version(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(noting: Any) -> Any:
        return SimpleNamespace(**{name: noting(f"run.{name}") for name in ("log", "log_artifact", "finish")})

    calls = standing_in(
        "wandb",
        monkeypatch,
        init=run,
        Image="the image",
        Artifact=lambda noting: SimpleNamespace(add_file=noting("add_file")),
    )
    version = filled(lab).versions("f")[0]
    assert lab.export("wandb", "project", [version.version]) == 1
    by_name = {what: (args, kwargs) for what, args, kwargs in calls}
    assert by_name["init"][1]["project"] == "project"
    assert by_name["init"][1]["config"]["n"] == "1"
    assert by_name["init"][1]["config"]["code"] == version.code.text
    assert by_name["run.log"][0][0]["loss"] == 0.5
    assert by_name["run.log"][0][0]["result-figure.png"] == "the image"
    assert sum(what == "add_file" for what, *_ in calls) == 2
    assert by_name["init"][1]["reinit"] == "create_new"  # beside the run that is under way
    assert by_name["Artifact"] == ((f"f-{version.version}",), {"type": "result"})
    assert {kwargs["name"] for what, _, kwargs in calls if what == "add_file"} == version.files.keys()
    assert calls[-1] == ("run.finish", (), {"exit_code": 0})


def test_wandb_gets_names_that_it_takes(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(noting: Any) -> Any:
        return SimpleNamespace(**{name: noting(f"run.{name}") for name in ("log", "log_artifact", "finish")})

    artifact = lambda noting: SimpleNamespace(add_file=noting("add_file"))  # noqa: E731
    calls = standing_in("wandb", monkeypatch, init=run, Image=None, Artifact=artifact)

    @lab.experiment(name="größe.x")
    def f(code: str, version: int) -> torch.Tensor:
        return torch.zeros(2)

    kept = f.record("mine", 3)
    lab.export("wandb", "project")
    by_name = {what: (args, kwargs) for what, args, kwargs in calls}
    assert by_name["Artifact"][0] == (f"gr--e.x-{kept.version}",)
    config = by_name["init"][1]["config"]
    assert (config["code"], config["version"], config["version-2"]) == ("'mine'", "3", kept.version)
    assert config["code-2"] == kept.code.text


def test_misuse(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            LabError, match=f"An export to {name} needs its client, which is not installed. Get it with: pip"
        ):
            lab.export(name, "project")  # type: ignore[arg-type]
    with pytest.raises(LabError, match="to='tensorboard': expected 'mlflow' or 'wandb'"):
        lab.export("tensorboard", "project")


def test_a_damaged_file_is_not_sent_and_the_run_is_closed(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(noting: Any) -> Any:
        return SimpleNamespace(**{name: noting(f"run.{name}") for name in ("log", "log_artifact", "finish")})

    artifact = lambda noting: SimpleNamespace(add_file=noting("add_file"))  # noqa: E731
    calls = standing_in("wandb", monkeypatch, init=run, Image=None, Artifact=artifact)
    version = filled(lab).versions("f")[0]
    (version.folder / "result.safetensors").write_bytes(b"")
    with pytest.raises(LabError, match=r"result\.safetensors is damaged"):
        lab.export("wandb", "project", [version])
    assert calls[-1] == ("run.finish", (), {"exit_code": 1})
    calls = mlflow(monkeypatch)
    with pytest.raises(LabError, match=r"result\.safetensors is damaged"):
        lab.export("mlflow", "project", [version])
    assert calls[-1] == ("set_terminated", ("run", "FAILED"), {})
