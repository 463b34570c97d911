"""Train the zoo's toy models of superposition: more features than dimensions, from always there to rare.

python etc/train/superposition.py [superposition | superposition-geometry | superposition-phases] [--steps N]

Each model is trained from several starts, and the one with the least error is kept: what is shown is what is best, not
where a start happened to end. One thread; the three take some ten minutes.

Source: N. Elhage et al., "Toy Models of Superposition", 2022.
"""

import argparse

import torch
from common import DATA, Task, optimised, seeded, write
from torch import Tensor

from fmr.zoo import measure, models, tasks

SEED = 0
STEPS = {"superposition": 5000, "superposition-geometry": 5000, "superposition-phases": 3000}
STARTS = {"superposition": 16, "superposition-geometry": 1, "superposition-phases": 3}
PHASES = ((1.0, -1.0), (1.0, 0.0), (0.0, 1.0))
"""Where two features in one dimension begin: both, opposite; the first alone; the second alone."""

KNOWS = {
    "superposition": "five features in two dimensions, at eight shares of examples that have each of them",
    "superposition-geometry": "eighty features of one importance in twelve dimensions, at twenty shares of examples",
    "superposition-phases": "two features in one dimension, at 16 shares of examples and 16 importances of the second",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*KNOWS], help="which of the three (default: all)")
    parser.add_argument(
        "--steps", type=int, help=f"how long to train (default: {', '.join(map(str, STEPS.values()))} steps)"
    )
    given = parser.parse_args()
    for name in given.names:
        train(name, given.steps or STEPS[name])


def train(name: str, steps: int) -> None:
    """Train one of the three and write it."""
    seeded(SEED)
    toys, starts = tasks.toys(name), STARTS[name]
    many, features = toys.importance.shape
    several = tasks.Toys(toys.shares.repeat(starts), toys.importance.repeat(starts, 1), toys.width)
    model = models.Superposed(many * starts, features, toys.width)
    if name == "superposition-phases":
        with torch.no_grad():
            model.weights[..., 0] = torch.tensor(PHASES).repeat_interleave(many, 0) + 0.05 * torch.randn(many * starts, 2)
    rows = max(256, 250_000 // several.importance.numel())
    draw = torch.Generator().manual_seed(SEED)
    size = (rows, many * starts, features)

    def errors(inputs: Tensor) -> Tensor:
        """The error of each model, over that of saying nothing at its share."""
        return ((inputs - model(inputs)).square() * several.importance).mean(0).sum(-1) / several.shares

    def loss(done: float) -> Tensor:
        inputs = (torch.rand(size, generator=draw) < several.shares[:, None]) * torch.rand(size, generator=draw)
        return errors(inputs).sum()

    optimised(model, loss, steps=steps, rate=1e-2)
    with torch.no_grad():
        same = (tasks.features(toys, 1000, seed).repeat(1, starts, 1) for seed in range(100, 140))  # for each start
        left = sum(map(errors, same)).view(starts, many)
        best = left.argmin(0) * many + torch.arange(many)
        kept = models.Superposed(many, features, toys.width)
        kept.weights.copy_(model.weights[best])
        kept.bias.copy_(model.bias[best])
    write(
        DATA / name, kept.eval(), None,
        Task(
            name=name, script="etc/train/superposition.py", seed=SEED, steps=steps, metrics=measure(name, kept, seed=7),
            knows=KNOWS[name],
        ),
        {"instances": many, "features": features, "width": toys.width},
    )  # fmt: skip


if __name__ == "__main__":
    main()
