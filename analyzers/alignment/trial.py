"""One trial of a search: a subspace trained at a site of a network, and how often the network then says what it shall."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.alignment.examples import Examples
from analyzers.alignment.interchange import Network, Spaces
from analyzers.alignment.parts import annealed, parameters, tempered, whole
from analyzers.alignment.training import Job, Settings, State, trained
from analyzers.protocol import AnalyzerError
from fmr.ids import Site

MOST = 1 << 16
"""Of a tensor with more numbers than these, only so many are read to know it again."""


@dataclass(frozen=True)
class Accuracy:
    """How often labels are right: of all examples, and of those whose label the interchange changes; and the loss."""

    all: float
    changed: float
    loss: float


@dataclass(frozen=True, eq=False)
class Trial:
    """What is trained where, on what."""

    network: Network
    site: Site
    spaces: Spaces
    train: Examples
    validation: Examples
    settings: Settings

    def accuracy(self, data: Examples, random: torch.Generator | None = None) -> Accuracy:
        """How often the interchange gives the labels of some data."""
        return accuracy(lambda batch: self.network.interchanged(self.site, self.spaces, batch, random), data, self.settings)

    def fitted(self, file: Path | None, tick: Callable[[], object], named: str) -> tuple[Trial, State]:
        """The same with a copy of the subspaces that was trained, or goes on being so from a file."""
        made = replace(self, spaces=copy.deepcopy(dict(self.spaces)))
        starts = [one.temperature for one in tempered(made.spaces)]
        if not parameters(made.spaces):
            return made, State()

        def loss(rows: Tensor) -> Tensor:
            batch = made.train.rows(rows)
            scores = made.network.interchanged(made.site, made.spaces, batch)
            found = nn.functional.cross_entropy(scores, batch.labels.to(scores.device))
            soft = [one.weights.mean() for one in tempered(made.spaces)]
            return found + made.settings.price * torch.stack(soft).mean() if soft else found

        def validation() -> tuple[float, float]:
            found = made.accuracy(made.validation)
            return found.loss, found.all

        job = Job(
            parameters(made.spaces),
            len(made.train),
            loss,
            validation,
            lambda share: annealed(made.spaces, starts, share),
            bool(starts),
        )
        key = "" if file is None else self._key(named)
        state = trained(job, self.settings, file, key, tick)
        return made, state

    def _key(self, named: str) -> str:
        """What says whether a checkpoint is one of this trial."""
        told: dict[str, Any] = {"trial": named, "site": repr(self.site), "subspace": repr(dict(self.spaces))}
        told |= asdict(self.settings)
        told |= key_of(self.network, self.spaces, (self.train, self.validation))
        return json.dumps(told)


def accuracy(scores: Callable[[Examples], Tensor], data: Examples, settings: Settings, base: bool = False) -> Accuracy:
    """How often scores give the labels of some data; with `base` those without the interchange."""
    right, losses = [], []
    with torch.no_grad():
        for batch in data.batches(settings.batch):
            found = scores(batch).float()
            if bool(found.isnan().any()):
                raise AnalyzerError(
                    "The scores of labels hold NaN. Expected numbers: a model that gives them, and logits= too."
                )
            labels = (batch.base_labels if base else batch.labels).to(found.device)
            right.append((found.argmax(-1) == labels).cpu())
            losses.append(nn.functional.cross_entropy(found, labels, reduction="none").cpu())
    hits, changed = torch.cat(right).double(), data.labels != data.base_labels
    some = float(hits[changed].mean()) if bool(changed.any()) else float("nan")
    return Accuracy(float(hits.mean()), some, float(torch.cat(losses).mean()))


def key_of(network: Network, spaces: Spaces, parts: Sequence[Examples]) -> dict[str, Any]:
    """What tells one training from another: the model, how its answers are read, the subspaces as they begin, the data."""
    modules = [one for one in dict.fromkeys(map(whole, spaces.values())) if isinstance(one, nn.Module)]
    with torch.no_grad():
        said = network.plain(parts[0].rows(torch.arange(min(2, len(parts[0])))).base)
    return {
        "start": digest(*(value for one in modules for value in one.state_dict().values())),
        "temperature": [one.temperature for one in tempered(spaces)],
        "model": digest(*network.model.parameters(), *network.model.buffers()),
        "logits": digest(said),
        "data": digest(*(value for part in parts for value in part.tensors)),
    }


def digest(*tensors: Tensor) -> str:
    """A short name for numbers of tensors: all of those of few, of the others some in every row and column."""
    found = hashlib.blake2b(digest_size=8)
    for one in tensors:
        flat = one.detach().flatten()
        step = max(1, len(flat) // MOST)
        while any(math.gcd(step, size) > 1 for size in one.shape):
            step += 1
        found.update(f"{tuple(one.shape)} {one.dtype}".encode() + flat[::step].double().cpu().numpy().tobytes())
    return found.hexdigest()
