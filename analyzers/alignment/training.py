"""Training by gradient steps on rows: seeded orders, a falling rate, early stopping, and files to go on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from analyzers.protocol import AnalyzerError, check_counts
from fmr.disk.files import write_whole
from fmr.errors import whole_number

BETWEEN = 10.0
"""After so many seconds a checkpoint is written again, and after each epoch."""

LARGEST = 1 << 62
"""The largest seed: others are made of it by adding."""


@dataclass(frozen=True)
class Settings:
    """How something is trained; `patience` is after how many epochs without a lower validation loss it stops."""

    epochs: int = 10
    batch: int = 64
    lr: float = 5e-3
    patience: int | None = None
    price: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(1, epochs=self.epochs, batch=self.batch, patience=1 if self.patience is None else self.patience)
        check_counts(0, seed=self.seed)
        for name, value, least in (("lr", self.lr, "above 0"), ("price", self.price, "from 0 on")):
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name == "lr"):
                raise AnalyzerError(f"{name}={value!r}: expected a number {least}.")
            object.__setattr__(self, name, float(value))
        if int(self.seed) > LARGEST:
            raise AnalyzerError(f"seed={self.seed!r}: expected a whole number up to 2**62.")
        for name in ("epochs", "batch", "patience", "seed"):  # of NumPy, too, and kept as Python's own
            object.__setattr__(self, name, whole_number(getattr(self, name)))


@dataclass(frozen=True, eq=False)
class Job:
    """What is trained: parameters by name, the loss of rows, the loss and accuracy of the validation part.

    anneal: is told before each step which share of all steps is done. softened: whether what is trained is not yet what it
    will be at the end, so that no earlier state is better.
    """

    parameters: Mapping[str, nn.Parameter]
    rows: int
    loss: Callable[[Tensor], Tensor]
    validation: Callable[[], tuple[float, float]]
    anneal: Callable[[float], None] = lambda share: None
    softened: bool = False


@dataclass(eq=False)
class State:
    """Where training is: steps done, losses by epoch, the best parameters so far."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    summed: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)
    since: int = 0
    done: bool = False

    def told(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "best"}


def trained(job: Job, settings: Settings, file: Path | None, key: str, tick: Callable[[], object]) -> State:
    """Train the parameters in place, from where a file left off; they end as they were where the validation loss was least.

    key: says what is trained, and a file of another one is refused. tick: is called after each step.
    """
    per_epoch = -(-job.rows // settings.batch)
    steps = per_epoch * settings.epochs
    optimizer = torch.optim.Adam(list(job.parameters.values()), settings.lr)
    state = State() if file is None or not file.exists() else _read(file, key, job, optimizer)
    for _ in range(state.step):
        tick()
    order, written = torch.empty(0), time.monotonic()
    while state.step < steps and not state.done:
        epoch, place = divmod(state.step, per_epoch)
        if not place or not len(order):
            order = torch.randperm(
                job.rows, generator=torch.Generator().manual_seed((settings.seed * 1_000_003 + epoch) % 2**63)
            )
        rows = order[place * settings.batch : (place + 1) * settings.batch]
        job.anneal(state.step / steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - state.step / steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = job.loss(rows)
        if not loss.requires_grad:
            raise AnalyzerError(
                "No gradient flows from the scores to what is trained. Expected a site on the way to the output, a model "
                "that does not detach it, and a subspace that is not hard yet (temperature above 0)."
            )
        loss.backward()
        optimizer.step()
        state.step, state.summed = state.step + 1, state.summed + float(loss.detach()) * len(rows)
        tick()
        if place == per_epoch - 1:
            _epoch_ends(job, settings, state)
        if file is not None and (place == per_epoch - 1 or time.monotonic() - written > BETWEEN):
            _write(file, key, job, optimizer, state)
            written = time.monotonic()
    with torch.no_grad():
        for name, value in state.best.items():
            job.parameters[name].copy_(value)
    job.anneal(1.0)
    return state


def _epoch_ends(job: Job, settings: Settings, state: State) -> None:
    """Take the losses down, and remember the parameters where they are the best."""
    if not math.isfinite(state.summed):
        raise AnalyzerError(
            f"The loss is {state.summed} in epoch {len(state.losses)}. Expected a finite one: lr= below {settings.lr}."
        )
    loss, accuracy = job.validation()
    better = job.softened or not state.validation or loss < min(state.validation)
    state.losses.append(state.summed / job.rows)
    state.validation.append(loss)
    state.accuracy.append(accuracy)
    state.summed, state.since = 0.0, 0 if better else state.since + 1
    if better:
        state.best = {name: one.detach().clone() for name, one in job.parameters.items()}
    state.done = len(state.losses) == settings.epochs or (settings.patience is not None and state.since >= settings.patience)


def _write(file: Path, key: str, job: Job, optimizer: torch.optim.Optimizer, state: State) -> None:
    tensors = {f"now.{name}": one.detach() for name, one in job.parameters.items()}
    tensors |= {f"best.{name}": one for name, one in state.best.items()}
    held = optimizer.state_dict()["state"]
    tensors |= {f"adam.{place}.{name}": value for place, own in held.items() for name, value in own.items()}
    data = {name: one.cpu().contiguous().clone() for name, one in tensors.items()}
    write_whole(file, save(data, {"key": key, "state": json.dumps(state.told())}))


def _read(file: Path, key: str, job: Job, optimizer: torch.optim.Optimizer) -> State:
    """The state in a file, with the parameters and the optimizer put back to it."""
    try:
        with safe_open(str(file), "pt") as opened:
            told = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        found, state = told["key"], State(**json.loads(told["state"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AnalyzerError(f"{file} is no checkpoint ({error}). Expected another folder: checkpoint=.") from error
    if found != key:
        raise AnalyzerError(
            f"{file} is a checkpoint of something else: {_difference(found, key)}. Expected the same data and settings, or "
            "another folder: checkpoint=."
        )
    state.best = {name.removeprefix("best."): one for name, one in tensors.items() if name.startswith("best.")}
    with torch.no_grad():
        for name, one in job.parameters.items():
            one.copy_(tensors[f"now.{name}"])
    held: dict[int, dict[str, Tensor]] = {}
    for name, one in tensors.items():
        if name.startswith("adam."):
            _, place, own = name.split(".")
            held.setdefault(int(place), {})[own] = one
    optimizer.load_state_dict({**optimizer.state_dict(), "state": held})
    return state


def _difference(one: str, other: str) -> str:
    """The first setting in which two keys differ."""
    was, now = json.loads(one), json.loads(other)
    name = next(name for name in {**was, **now} if was.get(name) != now.get(name))
    return f"{name} was {was.get(name)!r} and is {now.get(name)!r}"


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A block in which no parameter of a model takes a gradient; what they were before, they are after it."""
    before = [(one, one.requires_grad) for one in model.parameters()]
    try:
        for one, _ in before:
            one.requires_grad_(False)
        yield
    finally:
        for one, flag in before:
            one.requires_grad_(flag)
