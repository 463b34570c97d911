"""The two probes: a logistic regression, and a network with one hidden layer; both tell a class of each vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from analyzers.probes.rows import Ints

BATCH, RATE, STEPS = 128, 3e-3, 300
"""Of an MLP: rows of a step, and how far it goes; of a regression: iterations at most."""

Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Fit:
    """A probe that was fitted: (values - center) through layers of (weight, bias) with ReLU between, one output a class."""

    classes: Tensor
    center: Tensor
    layers: Layers

    def __call__(self, values: Tensor) -> Tensor:
        """The class of each of the values (..., width)."""
        device = values.device
        states = values.to(self.center.dtype) - self.center.to(device)
        for n, (weight, bias) in enumerate(self.layers):
            states = F.linear(states.relu() if n else states, weight.to(device), bias.to(device))
        return self.classes.to(device)[states.argmax(-1)]

    def accuracy(self, values: Tensor, labels: Ints) -> float:
        """The share of rows whose label it tells."""
        return float((self(values).cpu().numpy() == labels).mean())

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        layers = {f"{n}.{what}": one for n, pair in enumerate(self.layers) for what, one in zip(_PARTS, pair, strict=True)}
        return {"classes": self.classes, "center": self.center, **layers}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Fit:
        """The probe of these tensors."""
        many = sum(name.endswith("weight") for name in tensors)
        layers = [(tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in range(many)]
        return Fit(tensors["classes"], tensors["center"], layers)


_PARTS = ("weight", "bias")


def fitted(values: Tensor, labels: Ints, kind: str, *, width: int, ridge: float, epochs: int, seed: int) -> Fit:
    """A probe of values (rows, width) for the labels that there are; each number is measured in its own deviations."""
    rows = values.double()
    classes, targets = (torch.as_tensor(one) for one in np.unique(labels, return_inverse=True))
    center, deviation = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(deviation > 1e-12 * deviation.max(), 1 / deviation, 0.0)
    rows = (rows - center) * scale
    with torch.inference_mode(False):
        if kind == "linear":
            layers = _regression(rows.clone(), targets, len(classes), ridge)
        else:
            layers = _network(rows.float(), targets, len(classes), width, ridge, epochs, seed)
    (weight, bias), *rest = layers
    layers = [(weight * scale, bias), *rest]
    return Fit(classes, center.float(), [(weight.float(), bias.float()) for weight, bias in layers])


def _regression(rows: Tensor, targets: Tensor, classes: int, ridge: float) -> Layers:
    """Logistic regression with the squared length of the weights as its price: one minimum, whatever the order of rows."""
    from scipy.optimize import minimize

    count, width = rows.shape
    rows, wanted = torch.cat([rows, rows.new_ones(count, 1)], 1), F.one_hot(targets, classes).double()
    price = rows.new_full((width + 1,), ridge / count)
    price[-1] = 0

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = torch.from_numpy(flat).view(classes, width + 1)
        told = (rows @ weights.T).log_softmax(1)
        slope = (told.exp() - wanted).T @ rows / count + price * weights
        return float(0.5 * (price * weights**2).sum() - (told * wanted).sum() / count), slope.flatten().numpy()

    start = np.zeros(classes * (width + 1))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS, "gtol": 1e-6, "ftol": 1e-10})
    weights = torch.from_numpy(found.x).view(classes, width + 1)
    return [(weights[:, :-1], weights[:, -1])]


def _network(rows: Tensor, targets: Tensor, classes: int, width: int, ridge: float, epochs: int, seed: int) -> Layers:
    """One hidden layer of so many units, trained by Adam from a seed of its own."""
    draw = torch.Generator().manual_seed(seed)
    sizes = ((width, rows.shape[1]), (classes, width))
    weights = [torch.randn(size, generator=draw) / size[1] ** 0.5 for size in sizes]
    layers = [(weight, torch.zeros(len(weight))) for weight in weights]
    every = [one.requires_grad_() for pair in layers for one in pair]
    training = torch.optim.Adam(every, RATE, weight_decay=ridge / len(rows))
    (first, shift), (last, offset) = layers
    with torch.enable_grad():
        for _ in range(epochs):
            for some in torch.randperm(len(rows), generator=draw).split(BATCH):
                told = F.linear(F.linear(rows[some], first, shift).relu(), last, offset)
                training.zero_grad()
                F.cross_entropy(told, targets[some]).backward()
                training.step()
    return [(weight.detach(), bias.detach()) for weight, bias in layers]
