"""Versions of a lab in MLflow or Weights & Biases, by their own clients."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from types import ModuleType

from analyzers.lab.errors import LabError
from analyzers.lab.summary import leaves, numbers_of
from analyzers.lab.version import Version

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
    return numbers_of(version.told["result"]) | took


def _allowed(place: str) -> str:
    """A name with the letters that MLflow takes in one."""
    return re.sub(r"[^\w\- :/]+", ".", place).strip(".") or "value"


def _to_mlflow(client: ModuleType, version: Version, project: str) -> None:
    client.set_experiment(project)
    with client.start_run(run_name=f"{version.name} {version.version}", tags=_told(version)):
        client.log_params({_allowed(place): text for place, text in _given(version).items()})
        client.log_metrics({_allowed(place): number for place, number in _measured(version).items()})
        client.log_text(version.code.text, "code.py")
        for name in version.files:
            version.read(name)  # one that is damaged is not sent
            client.log_artifact(str(version.folder / name))


def _to_wandb(client: ModuleType, version: Version, project: str) -> None:
    config = {**_given(version), **_told(version), "code": version.code.text}
    run = client.init(
        project=project, name=f"{version.name} {version.version}", group=version.name, config=config, reinit=True
    )
    try:
        pictures = {name: client.Image(str(version.folder / name)) for name in version.files if name.endswith(".png")}
        run.log({**_measured(version), **pictures})
        artifact = client.Artifact(f"{version.name}-{version.version}", type="result")
        for name in version.files:
            version.read(name)
            artifact.add_file(str(version.folder / name))
        if version.files:
            run.log_artifact(artifact)
    finally:
        run.finish()
