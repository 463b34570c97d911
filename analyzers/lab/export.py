"""Versions of a lab in MLflow or Weights & Biases, by their own clients."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from types import ModuleType
from typing import TypeVar

from analyzers.lab.errors import LabError
from analyzers.lab.summary import leaves, numbers_of
from analyzers.lab.values import unused
from analyzers.lab.version import Version

V = TypeVar("V")
PLACES = {"mlflow": "mlflow", "wandb": "wandb"}


def exported(versions: Iterable[Version], to: str, project: str) -> int:
    """Send each version as a run of its own; how many there were."""
    if to not in PLACES:
        raise LabError(f"to={to!r}: expected 'mlflow' or 'wandb'.")
    try:
        client = importlib.import_module(PLACES[to])
    except ImportError as error:
        raise LabError(
            f"An export to {to} needs its client, which is not installed. Get it with: pip install {to}."
        ) from error
    send: Callable[[ModuleType, Version, str], None] = _to_mlflow if to == "mlflow" else _to_wandb
    chosen = list(versions)
    for version in chosen:
        send(client, version, project)
    return len(chosen)


def _told(version: Version) -> dict[str, str]:
    """What identifies a version, in words."""
    model = {f"model.{name}": value for name, value in version.model.items()}
    environment = {f"environment.{name}": value for name, value in version.environment.items()}
    return {"version": version.version, "experiment": version.name, "made": version.made, **model, **environment}


def _given(version: Version) -> dict[str, str]:
    """Seed and arguments in words, each shorter than the 500 characters that both take."""
    arguments = {place: text for place, text in leaves(version.told["arguments"]) if place}
    return {"seed": str(version.seed), **arguments}


def _measured(version: Version) -> dict[str, float]:
    took = {"seconds": version.seconds} | ({"memory": version.memory} if version.memory is not None else {})
    return _joined(numbers_of(version.told["result"]), took)


def _joined(*several: Mapping[str, V]) -> dict[str, V]:
    """All of them together; a name that one before has already becomes another."""
    found: dict[str, V] = {}
    for name, value in (pair for one in several for pair in one.items()):
        found[unused(name, found)] = value
    return found


def _allowed(given: Mapping[str, V], most: int = 240) -> dict[str, V]:
    """The same under names of the letters and the length that MLflow takes, each once."""
    named = ({re.sub(r"[^\w\- :]+", ".", place).strip(".")[:most] or "value": one} for place, one in given.items())
    return _joined(*named)


def _to_mlflow(client: ModuleType, version: Version, project: str) -> None:
    store = client.MlflowClient()  # which knows of no run and no experiment that are under way
    known = store.get_experiment_by_name(project)
    experiment = store.create_experiment(project) if known is None else known.experiment_id
    run = store.create_run(experiment, tags=_told(version), run_name=f"{version.name} {version.version}").info.run_id
    status = "FAILED"
    try:
        for place, text in _allowed(_given(version)).items():
            store.log_param(run, place, text)
        for place, number in _allowed(_measured(version)).items():
            store.log_metric(run, place, number)
        store.log_text(run, version.code.text, "code.py")
        for name in version.files:
            version.read(name)  # one that is damaged is not sent
            store.log_artifact(run, str(version.folder / name), str(PurePosixPath(name).parent).strip("."))
        status = "FINISHED"
    finally:
        store.set_terminated(run, status)


def _to_wandb(client: ModuleType, version: Version, project: str) -> None:
    config = _joined(_given(version), _told(version), {"code": version.code.text})
    run = client.init(
        project=project, name=f"{version.name} {version.version}", group=version.name, config=config, reinit="create_new"
    )  # beside a run that is under way
    status = 1
    try:
        pictures = {name: client.Image(str(version.folder / name)) for name in version.files if name.endswith(".png")}
        run.log({**_measured(version), **pictures})
        artifact = client.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", f"{version.name}-{version.version}"), type="result")
        for name in version.files:
            version.read(name)
            artifact.add_file(str(version.folder / name), name=name)
        if version.files:
            run.log_artifact(artifact)
        status = 0
    finally:
        run.finish(exit_code=status)
