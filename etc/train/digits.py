"""Train the zoo's "digits-mlp" and "digits-cnn": which digit was written, on scikit-learn's images.

python etc/train/digits.py [--out FOLDER] [--steps N]     (writes FOLDER/digits-mlp and FOLDER/digits-cnn)
"""

from argparse import Namespace
from typing import Any

import torch
from common import Task, arguments, optimised, seeded, write
from torch import Tensor, nn
from torch.nn import functional as F

from fmr.zoo import measure, models, tasks

SEED = 0
NOISE = 0.1
"""Added to the images while training, whose values go from 0 to 1, so that little is learned by heart."""
MLP = {"widths": [64, 64, 64, 10]}
CNN = {"channels": [1, 16, 32], "size": 8, "classes": 10}


def train(name: str, kind: type[nn.Module], config: dict[str, Any], given: Namespace) -> None:
    seeded(SEED)
    model = kind(**config)
    images, labels = tasks.digits().train

    def loss(done: float) -> Tensor:
        rows = torch.randint(len(labels), (64,))
        noisy = images[rows] + NOISE * torch.randn(64, *images.shape[1:])
        return F.cross_entropy(model(noisy), labels[rows])

    optimised(model, loss, steps=given.steps, rate=3e-3, decay=0.05)
    task = Task(
        name=name, script="etc/train/digits.py", seed=SEED, steps=given.steps, metrics=measure(name, model),
        knows="which digit was written on an image of 8 by 8",
    )  # fmt: skip
    write(given.out / name, model, None, task, config)


def main() -> None:
    given = arguments(__doc__, "", steps=1500)
    train("digits-mlp", models.MLP, MLP, given)
    train("digits-cnn", models.CNN, CNN, given)


if __name__ == "__main__":
    main()
