"""Exports by the clients of MLflow and W&B, which stand-ins take the place of: what they are asked to keep."""

import sys
from contextlib import nullcontext
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


def test_mlflow_gets_a_run_a_version(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict.fromkeys(["set_experiment", "log_params", "log_metrics", "log_text", "log_artifact"])
    calls = standing_in("mlflow", monkeypatch, start_run=lambda noting: nullcontext(), **names)
    first = filled(lab).versions("f")[0]
    assert lab.export("mlflow", "project", [first]) == 1
    assert [what for what, *_ in calls][:5] == ["set_experiment", "start_run", "log_params", "log_metrics", "log_text"]
    by_name = {what: (args, kwargs) for what, args, kwargs in calls}
    assert by_name["set_experiment"] == (("project",), {})
    assert by_name["start_run"][1]["run_name"] == f"f {first.version}"
    assert by_name["start_run"][1]["tags"]["version"] == first.version
    assert by_name["start_run"][1]["tags"]["model.fingerprint"] == first.model["fingerprint"]
    assert by_name["log_params"][0] == ({"seed": "0", "n": "1", "name": "'a'"},)
    (metrics,) = by_name["log_metrics"][0]
    assert metrics == {
        "loss": 0.5, "deep.accuracies.0": 0.1, "deep.accuracies.1": 0.2, "seconds": first.seconds, "memory": first.memory,
    }  # fmt: skip
    assert by_name["log_text"][0] == (first.code.text, "code.py")
    sent = {Path(args[0]).name for what, args, _ in calls if what == "log_artifact"}
    assert sent == {"result.safetensors", "result-figure.png"}
    assert all(Path(args[0]).is_file() for what, args, _ in calls if what == "log_artifact")
    calls.clear()
    assert lab.export("mlflow", "project") == 2
    assert max(len(text) for what, args, _ in calls if what == "log_params" for text in args[0].values()) == 400


def test_mlflow_gets_names_that_it_takes(lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict.fromkeys(["set_experiment", "log_params", "log_metrics", "log_text", "log_artifact"])
    calls = standing_in("mlflow", monkeypatch, start_run=lambda noting: nullcontext(), **names)

    @lab.experiment
    def f(x: Any) -> dict[str, float]:
        return {"layer[3].z": 1.0, "<b>": 2.0}

    f([{"a": 1}])
    lab.export("mlflow", "project")
    by_name = {what: args for what, args, _ in calls}
    assert by_name["log_params"] == ({"seed": "0", "x.0.a": "1"},)
    assert {"layer.3.z", "b"} <= by_name["log_metrics"][0].keys()


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
    assert by_name["Artifact"] == ((f"f-{version.version}",), {"type": "result"})
    assert calls[-1][0] == "run.finish"


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
    assert calls[-1][0] == "run.finish"
