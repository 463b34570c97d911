"""Training a dictionary step by step: few latents at a price, dead ones revived, files to go on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from analyzers.dictionaries.autoencoder import START, SparseAutoencoder
from analyzers.dictionaries.rows import Values
from analyzers.protocol import AnalyzerError
from fmr.disk.files import decode, encode, write_whole

REVIVALS = (0.1, 0.2, 0.35, 0.5)
"""After which shares of all steps latents that have not fired since the one before begin anew."""

IDLE = 0.05
"""After which share of all steps without firing a latent is dead, and helped by a ghost's gradient."""

WARM, COOL, PAID = 0.02, 0.2, 0.1
"""Shares of all steps: the rate rises in the first of them and falls in the last, the price rises in the first."""

POINTS, BETWEEN = 100, 10.0
"""How many points a curve has at most; after so many seconds a checkpoint is written again."""

CURVES = ("step", "loss", "explained", "l0")

Optimizer = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Job:
    """What is trained on what: values are multiplied by `scale`, so that each number varies by about 1."""

    values: Values
    scale: float
    variance: float
    batch: int
    steps: int
    price: float
    dead: str | None
    rate: float
    optimizer: Optimizer
    seed: int

    @property
    def per_epoch(self) -> int:
        """Steps until each row was seen."""
        return -(-len(self.values.train) // self.batch)


@dataclass(eq=False)
class State:
    """Where training is: steps done, when each latent last fired, curves, and sums since the last point of them."""

    last: Tensor
    step: int = 0
    curves: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CURVES})
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    revived: int = 0

    def told(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "last"}


def trained(autoencoder: SparseAutoencoder, job: Job, file: Path | None, key: str, tick: Callable[[], object]) -> State:
    """Train an autoencoder in place on scaled values, from where a file left off."""
    parameters = dict(autoencoder.named_parameters())
    optimizer = job.optimizer(list(parameters.values()), lr=job.rate)
    state = State(torch.zeros(autoencoder.size, dtype=torch.long, device=autoencoder.bias.device))
    if file is not None and file.exists():
        _read(file, key, parameters, optimizer, state)
    for _ in range(state.step):
        tick()
    order, written = torch.empty(0), time.monotonic()
    revivals = {int(share * job.steps) for share in REVIVALS} if job.dead == "resample" else set()
    while state.step < job.steps:
        epoch, place = divmod(state.step, job.per_epoch)
        if not place or not len(order):
            order = torch.randperm(len(job.values.train), generator=_drawn(job.seed, epoch))
        _step(autoencoder, job, state, optimizer, job.values.train[order[place * job.batch : (place + 1) * job.batch]])
        if state.step in revivals:
            _revive(autoencoder, job, state, optimizer, max([0, *(one for one in revivals if one < state.step)]))
        tick()
        if file is not None and (state.step == job.steps or time.monotonic() - written > BETWEEN):
            _write(file, key, parameters, optimizer, state)
            written = time.monotonic()
    return state


def _drawn(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def _step(autoencoder: SparseAutoencoder, job: Job, state: State, optimizer: torch.optim.Optimizer, at: Tensor) -> None:
    """One step on some rows."""
    share = state.step / job.steps
    for group in optimizer.param_groups:
        group["lr"] = job.rate * min(1.0, (state.step + 1) / (WARM * job.steps), (1 - share) / COOL)
    rows = job.values[at].to(autoencoder.bias.device) * job.scale
    optimizer.zero_grad()
    with torch.enable_grad():
        scores = autoencoder.scores(rows)
        latents = autoencoder.chosen(scores)
        left = rows - autoencoder.decode(latents)
        unexplained = left.square().sum(1).mean() / autoencoder.width
        loss = unexplained + job.price * min(1.0, share / PAID) * _paid(autoencoder, scores, latents)
        idle = state.step - state.last > IDLE * job.steps
        if job.dead == "ghost" and bool(idle.any()):
            loss = loss + _ghost(autoencoder, scores, left.detach(), idle, unexplained.detach())
        loss.backward()
    _keep_lengths(autoencoder.decoder, optimizer)
    if autoencoder.threshold is not None:
        autoencoder.threshold.data.clamp_(min=0)
    state.step += 1
    fired = latents.detach() > 0
    state.last[fired.any(0)] = state.step
    _take_down(job, state, [float(loss.detach()), float(unexplained.detach()), float(fired.sum(1).float().mean())])


def _paid(autoencoder: SparseAutoencoder, scores: Tensor, latents: Tensor) -> Tensor:
    """What has a price: the sum of coefficients in lengths of a value, or how many latents are on; nothing for top-k."""
    if autoencoder.kind == "relu":
        lengths: Tensor = latents.sum(1).mean() / autoencoder.width**0.5
        return lengths
    return autoencoder.count(scores).mean() if autoencoder.kind == "jumprelu" else latents.new_zeros(())


def _ghost(autoencoder: SparseAutoencoder, scores: Tensor, left: Tensor, idle: Tensor, unexplained: Tensor) -> Tensor:
    """How badly idle latents make up what the others left: as exponentials of their scores (Jermyn and Templeton 2024), as
    much of it as there is; of top-k the largest of them as they are, a 32nd of it (Gao et al. 2024)."""
    directions, own = autoencoder.decoder[idle], scores[:, idle]
    if autoencoder.k is not None:
        best = own.topk(min(2 * autoencoder.k, own.shape[1]), 1)
        made = torch.zeros_like(own).scatter(1, best.indices, best.values.relu()) @ directions
        few: Tensor = (left - made).square().sum(1).mean() / autoencoder.width / 32
        return few
    ghosts = own.clamp(max=10).exp() @ directions
    length = left.norm(dim=1, keepdim=True) / (2 * ghosts.detach().norm(dim=1, keepdim=True) + 1e-9)
    missed: Tensor = (left - ghosts * length).square().sum(1).mean() / autoencoder.width
    return missed * (unexplained / (missed.detach() + 1e-9))


def _keep_lengths(decoder: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Step so that each direction keeps its length of 1."""
    with torch.no_grad():
        if decoder.grad is not None:
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
        optimizer.step()
        decoder.div_(decoder.norm(dim=1, keepdim=True).clamp_min(1e-9))


def _take_down(job: Job, state: State, found: list[float]) -> None:
    """Add a step to the sums, and a point to the curves where one is due."""
    if not math.isfinite(found[0]):
        raise AnalyzerError(f"The loss is {found[0]} in step {state.step}. Expected a finite one: lr= below {job.rate}.")
    state.sums = [total + one for total, one in zip(state.sums, [1.0, *found], strict=True)]
    if state.step % max(1, job.steps // POINTS) == 0 or state.step == job.steps:
        many, loss, unexplained, l0 = state.sums
        point = (float(state.step), loss / many, 1 - unexplained / many, l0 / many)
        for name, one in zip(CURVES, point, strict=True):
            state.curves[name].append(one)
        state.sums = [0.0] * 4


# ---- latents that died


def _revive(autoencoder: SparseAutoencoder, job: Job, state: State, optimizer: torch.optim.Optimizer, since: int) -> None:
    """Let each latent that did not fire for so long begin at a value that is badly reconstructed (Bricken et al. 2023)."""
    dead = (state.last <= since).nonzero()[:, 0]
    if not len(dead):
        return
    draw = _drawn(job.seed + 1, state.step)
    train = job.values.train
    with torch.no_grad():
        rows = job.values[train[torch.randperm(len(train), generator=draw)[: max(4096, len(dead))]]]
        rows = rows.to(autoencoder.bias.device) * job.scale
        missed = (rows - autoencoder(rows)).square().sum(1)
        if not bool(missed.isfinite().all()):  # which the next step tells
            return
        chosen = torch.multinomial(missed.cpu().square() + 1e-12, len(dead), len(dead) > len(rows), generator=draw)
        directions = nn.functional.normalize(rows[chosen] - autoencoder.bias, dim=1)
        live = torch.ones(autoencoder.size, dtype=torch.bool, device=dead.device).index_fill_(0, dead, False)
        lengths = autoencoder.encoder[:, live].norm(dim=0)
        length = (lengths.mean() if len(lengths) else 1.0) * (1.0 if autoencoder.kind == "top-k" else 0.2)
        autoencoder.decoder[dead] = directions
        autoencoder.encoder[:, dead] = directions.T * length
        autoencoder.encoder_bias[dead] = 0
        if autoencoder.threshold is not None:
            autoencoder.threshold[dead] = START
        for name, one in autoencoder.named_parameters():
            for held in optimizer.state.get(one, {}).values():
                if name != "bias" and isinstance(held, Tensor) and held.shape == one.shape:
                    held.index_fill_(1 if name == "encoder" else 0, dead, 0)
    state.last[dead] = state.step
    state.revived += len(dead)


# ---- files


def _write(
    file: Path, key: str, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: State
) -> None:
    tensors = {f"now.{name}": one.detach() for name, one in parameters.items()} | {"last": state.last}
    plain = []
    for place, own in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{place}.{name}": one for name, one in own.items() if isinstance(one, Tensor)}
        plain += [[place, name, encode(one)] for name, one in own.items() if not isinstance(one, Tensor)]
    data = {name: one.cpu().contiguous().clone() for name, one in tensors.items()}
    write_whole(file, save(data, {"key": key, "state": json.dumps(state.told()), "optimizer": json.dumps(plain)}))


def _read(file: Path, key: str, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put state, parameters and optimizer back to what a file holds."""
    try:
        with safe_open(str(file), "pt") as opened:
            told = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        found, plain, kept = told["key"], json.loads(told["optimizer"]), json.loads(told["state"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AnalyzerError(f"{file} is no checkpoint ({error}). Expected another folder: checkpoint=.") from error
    if found != key:
        was, now = json.loads(found), json.loads(key)
        name = next(name for name in {**was, **now} if was.get(name) != now.get(name))
        raise AnalyzerError(
            f"{file} is a checkpoint of something else: {name} was {was.get(name)!r} and is {now.get(name)!r}. Expected the "
            "same data and settings, or another folder: checkpoint=."
        )
    for name, value in kept.items():
        setattr(state, name, value)
    state.last = tensors["last"].to(state.last.device)
    with torch.no_grad():
        for name, one in parameters.items():
            one.copy_(tensors[f"now.{name}"])
    held: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, place, own = name.split(".")
            held.setdefault(int(place), {})[own] = tensor
    for place, own, value in plain:
        held.setdefault(int(place), {})[own] = decode(value)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": held})
