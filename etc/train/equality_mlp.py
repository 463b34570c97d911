"""Train the zoo's "equality-mlp": four vectors, and whether the first pair is equal just as the second pair is.

python etc/train/equality_mlp.py [--out FOLDER] [--steps N]
"""

from common import Task, arguments, optimised, seeded, write
from torch import Tensor
from torch.nn import functional as F

from fmr.zoo import measure, models, tasks

SEED = 0
CONFIG = {"widths": [16, 16, 16, 16, 2]}


def main() -> None:
    given = arguments(__doc__, "equality-mlp", steps=10_000)
    seeded(SEED)
    model = models.MLP(**CONFIG)
    batches = iter(range(10_000, 10_000 + given.steps))

    def loss(done: float) -> Tensor:
        task = tasks.equality(1024, seed=next(batches))
        return F.cross_entropy(model(task.inputs), task.labels)

    def look() -> dict[str, float]:
        return measure("equality-mlp", model, seed=7)

    optimised(model, loss, steps=given.steps, rate=5e-3, look=look, every=2500)
    write(
        given.out, model, None,
        Task(
            name="equality-mlp", script="etc/train/equality_mlp.py", seed=SEED, steps=given.steps, metrics=look(),
            knows="whether (first == second) agrees with (third == fourth), of four vectors of size 4",
        ),
        CONFIG,
    )  # fmt: skip


if __name__ == "__main__":
    main()
