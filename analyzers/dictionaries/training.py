"""Training a dictionary on collected values, with its controls."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from analyzers.dictionaries.autoencoder import SparseAutoencoder
from analyzers.dictionaries.coding import Moments, tallied
from analyzers.dictionaries.dictionary import COMPONENTS, NULL, Dictionary
from analyzers.dictionaries.rows import Values, values_of
from analyzers.dictionaries.steps import Job, Optimizer, State, trained
from analyzers.protocol import AnalyzerError, Method, check_counts
from fmr.disk.files import new_folder
from fmr.sweeps.bars import hidden

PRICES = {"relu": 0.1, "top-k": 0.0, "jumprelu": 5e-3}
"""What being on costs, where it is not said."""

REVIVING = ("resample", "ghost")


class DictionaryTraining(Method):
    """Train a sparse autoencoder on what a site holds over a corpus.

    >>> corpus = fmr.collect(model, batches, keep={"stream": structure.layers[2].resid_post}, to="values", progress=False)
    >>> training = analyzers.DictionaryTraining(256, "top-k", k=8, epochs=2)
    >>> training.run(corpus, progress=False)
    Dictionary of 256 latents (top-k, k=8) of 128 numbers at stream
    ...

    size: how many latents. kind: how they are kept few, of `SparseAutoencoder`. k: how many are on, for "top-k". price: what
    being on costs, in shares of the variance: for "relu" of a sum of coefficients as long as a value varies, for "jumprelu"
    of one latent; None takes 0.1 and 0.005. epochs: how often each row is seen. batch: rows of a step. lr: of the
    `optimizer`, a class of torch or what is called like one; it rises at first and falls to 0 in the last fifth. dead: what
    becomes of latents that do not fire: "resample" lets them begin anew at values that are badly reconstructed, four times
    in the first half; "ghost" gives them a gradient of what the others leave; None leaves them. held_out: the share of rows
    for testing; of a corpus, of documents, all equals of one on one side. skip: how many tokens at the start of each
    document of a corpus are left out: in many language models the first one's values are far longer than all others, so that
    1 is right. device: where it is trained. seed: of the start and of the order of rows.

    The loss is |v - v'|^2 over the variance of values, and the price. Directions have length 1 throughout.

    Sources: T. Bricken et al., "Towards Monosemanticity", 2023; L. Gao et al., "Scaling and evaluating sparse autoencoders",
    2024; S. Rajamanoharan et al., "Jumping Ahead", 2024; A. Jermyn, A. Templeton, "Ghost Grads", 2024.
    """

    def __init__(
        self,
        size: int,
        kind: str = "top-k",
        k: int | None = None,
        *,
        price: float | None = None,
        epochs: int = 10,
        batch: int = 256,
        lr: float = 3e-3,
        optimizer: Optimizer = torch.optim.Adam,
        dead: str | None = "resample",
        held_out: float = 0.1,
        skip: int = 0,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        check_counts(1, size=size, epochs=epochs, batch=batch)
        check_counts(0, seed=seed, skip=skip)
        SparseAutoencoder(1, size, kind, k)
        price = PRICES[kind] if price is None else price
        for name, value, end in (("price", price, math.inf), ("lr", lr, math.inf), ("held_out", held_out, 1.0)):
            if (
                isinstance(value, bool)
                or not isinstance(value, Real)
                or not 0 <= value < end
                or (not value and name != "price")
            ):
                raise AnalyzerError(
                    f"{name}={value!r}: expected "
                    + {"price": "a number from 0 on.", "lr": "a number above 0.", "held_out": "a share between 0 and 1."}[
                        name
                    ]
                )
        if dead not in (None, *REVIVING):
            raise AnalyzerError(f"dead={dead!r}: expected {' or '.join(map(repr, REVIVING))}, or None.")
        if not callable(optimizer):
            raise AnalyzerError(f"optimizer={optimizer!r}: expected a class of torch.optim, as torch.optim.Adam.")
        self.size, self.kind, self.k, self.dead, self.optimizer = operator.index(size), kind, k, dead, optimizer
        self.price, self.lr, self.held_out = float(price), float(lr), float(held_out)
        self.epochs, self.batch, self.seed, self.skip = map(operator.index, (epochs, batch, seed, skip))
        self.device = torch.device(device)

    def run(
        self,
        values: Any,
        site: Any = None,
        *,
        controls: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> Dictionary:
        """Train on values, and compare with the controls.

        >>> found = analyzers.DictionaryTraining(64, "relu", epochs=1).run(torch.randn(1000, 16), progress=False)
        >>> found.curves["loss"].shape
        (4,)

        values: a corpus that `fmr.collect` wrote, a site of it, or a tensor (rows, width). site: of the corpus, where it has
        several; else what the values are called. controls: also train one on Gaussian values, which takes as long again.
        checkpoint: a folder that a killed process goes on from, to the same bits. progress: show a bar.
        """
        given = values_of(values, site, self.held_out, self.seed, self.skip)
        moments = Moments.of(given.blocks(given.train))
        if not math.isfinite(moments.variance) or moments.variance <= 0:
            raise AnalyzerError(f"The values vary by {moments.variance}: expected finite ones that differ.")
        folder = None if checkpoint is None else new_folder(checkpoint)
        gaussian = _gaussian(moments, len(given.train), self.seed) if controls else None
        steps = self.epochs * -(-len(given.train) // self.batch)
        with (
            torch.inference_mode(False),
            tqdm(total=steps * (1 + controls), desc="training", unit="step", disable=hidden(progress)) as bar,
        ):
            made, state = self._trained(given, moments, folder and folder / "dictionary.safetensors", bar.update)
            null = None
            if gaussian is not None:
                null, _ = self._trained(gaussian, moments, folder and folder / "null.safetensors", bar.update)
        return self._result(given, moments, made, null, state, steps, gaussian)

    def _start(self, moments: Moments, scale: float) -> SparseAutoencoder:
        """An autoencoder of scaled values, as it begins."""
        made = SparseAutoencoder(len(moments.mean), self.size, self.kind, self.k, seed=self.seed)
        with torch.no_grad():
            made.bias.copy_(moments.mean * scale)
        return made

    def _trained(
        self, given: Values, moments: Moments, file: Any, tick: Callable[[], object]
    ) -> tuple[SparseAutoencoder, State]:
        """An autoencoder of some rows, in the units of these."""
        scale = (given.width / moments.variance) ** 0.5
        steps = self.epochs * -(-len(given.train) // self.batch)
        job = Job(
            given, scale, moments.variance, self.batch, steps, self.price, self.dead, self.lr, self.optimizer, self.seed
        )
        made = self._start(moments, scale).to(self.device)
        key = json.dumps({**self._told, "rows": given.digest, "torch": torch.__version__})
        state = trained(made, job, file, key, tick)
        with torch.no_grad():
            for one in (made.bias, made.encoder_bias, made.threshold):
                if one is not None:
                    one.div_(scale)
        return made.requires_grad_(False).cpu(), state

    @property
    def _told(self) -> dict[str, Any]:
        """The settings in plain words."""
        optimizer: Any = self.optimizer
        told = {name: getattr(self, name) for name in "size kind k price epochs batch lr dead held_out skip seed".split()}
        keywords = "".join(f" {name}={value!r}" for name, value in getattr(optimizer, "keywords", {}).items())
        plain = getattr(optimizer, "func", optimizer)
        return {**told, "optimizer": getattr(plain, "__name__", type(plain).__name__) + keywords}

    def _result(
        self,
        given: Values,
        moments: Moments,
        made: SparseAutoencoder,
        null: SparseAutoencoder | None,
        state: State,
        steps: int,
        gaussian: Values | None,
    ) -> Dictionary:
        test, train = (tallied(made, moments.mean, given.blocks(at)) for at in (given.test, given.train))
        density = (test.fired + train.fired) / (test.count + train.count)
        itself = math.nan
        if null is not None and gaussian is not None:
            itself = tallied(null, moments.mean, gaussian.blocks(gaussian.test)).explained
        result = Dictionary(
            site=given.name,
            settings=made.settings,
            training={**self._told, "steps": steps},
            weights=dict(made.state_dict()),
            null={} if null is None else dict(null.state_dict()),
            curves={name: np.array(one) for name, one in state.curves.items()},
            l0=test.l0,
            explained=test.explained,
            controls={},
            itself=itself,
            density=density.numpy(),
            revived=state.revived,
            train=len(given.train),
            test=len(given.test),
            mean=moments.mean,
            covariance=moments.covariance,
            place=given.place,
        )
        result.controls.update(_controls(result, given))
        return result


def _controls(result: Dictionary, given: Values) -> dict[str, tuple[float, float]]:
    """Latents on at once and share of the variance, of each rival."""
    counted = {name: tallied(one, result.mean, given.blocks(given.test)) for name, one in result.rivals().items()}
    on = {name: float(one.size) if name == COMPONENTS else counted[name].l0 for name, one in result.rivals().items()}
    return {name: (on[name], one.explained) for name, one in counted.items()}


def _gaussian(moments: Moments, many: int, seed: int) -> Values:
    """As many Gaussian rows of the same moments, or as memory holds well; and some of them held out."""
    rows = min(many, 1 << 18)
    drawn = moments.drawn(rows + rows // 8 + 1, seed + 1)
    return Values(drawn, NULL, torch.arange(rows), torch.arange(rows, len(drawn)))
