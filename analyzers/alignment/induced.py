"""A network trained by interchanges: it learns to hold the variables of an algorithm where it is told to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyzers.alignment.causal_model import CausalModel
from analyzers.alignment.counterfactuals import Counterfactuals
from analyzers.alignment.examples import Examples, check_data
from analyzers.alignment.interchange import Network, Scores, Spaces
from analyzers.alignment.opening import check_causal, opened, share_of, site_of
from analyzers.alignment.parts import spaces_of
from analyzers.alignment.search import VALIDATION
from analyzers.alignment.training import Job, Settings, trained
from analyzers.alignment.trial import accuracy, key_of
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError, Method
from analyzers.results import Stored
from fmr.disk.files import new_folder
from fmr.errors import number_of
from fmr.ids import Site
from fmr.nodes import Key
from fmr.subspaces import Subspace
from fmr.sweeps.bars import hidden

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Induced(Stored):
    """What interchange-intervention training made of a network, on held-out examples.

    >>> induced.after["interchange"], induced.before["task"]
    (1.0, 1.0)

    before, after: how often the network gave the label of an `interchange`, that of one that changes it (`changed`), and
    that of the base without any (`task`). losses: (epochs, 2), of training and on the validation part.
    """

    variables: tuple[str, ...]
    site: str
    before: dict[str, float]
    after: dict[str, float]
    losses: Floats = field(repr=False)
    examples: dict[str, int]
    settings: dict[str, Any]
    seed: int

    def table(self) -> DataFrame:
        """One row for each accuracy, before and after.

        >>> induced.table()
        """
        import pandas as pd

        return pd.DataFrame({"what": list(self.before), "before": self.before.values(), "after": self.after.values()})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the losses by epoch.

        >>> induced.plot().savefig("losses.png")
        """
        from analyzers.alignment.maps import draw_losses
        from fmr.pictures.heatmap import returned

        return returned(draw_losses(self, ax)) if ax is None else draw_losses(self, ax)

    def __repr__(self) -> str:
        told = [f"{name} {self.before[name]:.3f} -> {after:.3f}" for name, after in self.after.items()]
        return (
            f"Induced {' and '.join(self.variables)} at {self.site}: accuracy on "
            f"{number_of(self.examples['test'], 'held-out example')}\n  {', '.join(told)}\n"
            f"  {len(self.losses)} of {number_of(self.settings['epochs'], 'epoch')} over {self.examples['train']} examples, "
            f"batch {self.settings['batch']}, lr {self.settings['lr']:g}, task {self.settings['task']:g}, seed {self.seed}"
        )


class InterchangeTraining(Method):
    """Train a network so that interchanges at a site do what a causal model says, beside its task.

    >>> halves = {"wx": subspaces.Units(8, range(4)), "yz": subspaces.Units(8, range(4, 8))}
    >>> training = InterchangeTraining(copy.deepcopy(network), equality, "first", halves)
    >>> induced = training.run(equality.counterfactuals(200), epochs=1, progress=False)

    The arguments are those of `AlignmentSearch`, for one site; here the subspaces stay as they are, and the weights of the
    model are trained in place, those that take a gradient. Source: A. Geiger et al., "Inducing causal structure for
    interpretable neural networks", 2022 (arXiv:2112.00826).
    """

    def __init__(
        self,
        model: nn.Module,
        causal_model: CausalModel,
        site: Key,
        subspace: Subspace | Mapping[str, Subspace],
        *,
        tokenizer: Any = None,
        logits: Scores | None = None,
    ) -> None:
        check_causal(causal_model)
        self.model, self.causal_model, self.tokenizer = model, causal_model, tokenizer
        self.site, self.spaces, self.network = site_of(site), spaces_of(subspace), Network(model, logits)

    def run(
        self,
        data: Counterfactuals,
        test: Counterfactuals | None = None,
        *,
        task: float = 1.0,
        held_out: float = 0.2,
        epochs: int = 10,
        batch: int = 64,
        lr: float = 1e-3,
        patience: int | None = None,
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> Induced:
        """Train the model, and measure on held-out examples before and after.

        >>> training = InterchangeTraining(copy.deepcopy(network), equality, "first", halves)
        >>> training.run(equality.counterfactuals(200), epochs=1, progress=False).after["task"]
        1.0

        task: how much the loss on bases without an interchange counts, beside that with one. Gradients flow through the
        sources, too. lr: of Adam at the start; it falls to 0 over all steps. All else is as for `AlignmentSearch.run`; the
        model ends as it was in the best epoch.
        """
        check_data(data, test)
        settings = Settings(epochs, batch, lr, patience, 0.0, seed)
        if isinstance(task, bool) or not isinstance(task, (int, float)) or not 0 <= task < float("inf"):
            raise AnalyzerError(f"task={task!r}: expected a number from 0 on, the weight of the task's own loss.")
        if test is None:
            data, test = data.split(1 - share_of(held_out))
        parts, spaces = opened(self.network, (*data.split(VALIDATION), test), self.spaces, [self.site], self.tokenizer)
        job = self._job(spaces, parts[0], parts[1], settings, task)
        before = self._measured(spaces, parts[2], settings)
        told = {**asdict(settings), "task": task}
        key = {"site": repr(self.site), "subspace": repr(spaces), **told}
        key |= key_of(self.network, spaces, parts[:2])
        file = None if checkpoint is None else new_folder(checkpoint) / "model.safetensors"
        with tqdm(total=-(-job.rows // batch) * epochs, desc="training", unit="step", disable=hidden(progress)) as bar:
            with _whole_or_not_at_all(job.parameters):
                state = trained(job, settings, file, json.dumps(key), bar.update)
        return Induced(
            variables=data.variables,
            site=repr(self.site),
            before=before,
            after=self._measured(spaces, parts[2], settings),
            losses=np.array([state.losses, state.validation]).T,
            examples=dict(zip(("train", "validation", "test"), map(len, parts), strict=True)),
            settings={name: value for name, value in told.items() if name not in ("seed", "price")},
            seed=seed,
        )

    def _job(self, spaces: Spaces, train: Examples, validation: Examples, settings: Settings, task: float) -> Job:
        """The weights that take a gradient, with the loss on some rows and on the validation part."""
        own = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        if not own:
            raise AnalyzerError("No weight of the model takes a gradient. Expected some: model.requires_grad_().")

        def loss(rows: Tensor) -> Tensor:
            return _loss(self.network, self.site, spaces, train.rows(rows), task, through=True)

        def score() -> tuple[float, float]:
            with torch.no_grad():
                batches = validation.batches(settings.batch)
                told = [float(_loss(self.network, self.site, spaces, one, task)) * len(one) for one in batches]
            return sum(told) / len(validation), self._measured(spaces, validation, settings)["interchange"]

        return Job(own, len(train), loss, score)

    def _measured(self, spaces: Spaces, data: Examples, settings: Settings) -> dict[str, float]:
        found = accuracy(lambda batch: self.network.interchanged(self.site, spaces, batch), data, settings)
        plain = accuracy(lambda batch: self.network.plain(batch.base), data, settings, base=True)
        return {"interchange": found.all, "changed": found.changed, "task": plain.all}


@contextmanager
def _whole_or_not_at_all(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """A block after which weights are trained, or where it raised what they were; their gradients are the user's again."""
    before = [(one, one.detach().clone(), one.grad) for one in parameters.values()]
    try:
        for one, _, _ in before:
            one.grad = None
        yield
    except BaseException:
        with torch.no_grad():
            for one, value, _ in before:
                one.copy_(value)
        raise
    finally:
        for one, _, grad in before:
            one.grad = grad


def _loss(network: Network, site: Site, spaces: Spaces, batch: Examples, task: float, through: bool = False) -> Tensor:
    """The cross-entropy with the interchange, and that of the base without it."""
    scores = network.interchanged(site, spaces, batch, through=through)
    found = nn.functional.cross_entropy(scores, batch.labels.to(scores.device))
    if not task:
        return found
    plain = network.plain(batch.base)
    return found + task * nn.functional.cross_entropy(plain, batch.base_labels.to(plain.device))
