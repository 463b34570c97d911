"""Train the zoo's "gru": ten symbols one by one, and whether the last is the first again.

python etc/train/gru.py [--out FOLDER] [--steps N]
"""

from common import Task, arguments, optimised, seeded, write
from torch import Tensor
from torch.nn import functional as F

from fmr.zoo import measure, models, tasks

SEED = 0
CONFIG = {"symbols": tasks.SYMBOLS, "width": 32, "classes": 2}


def main() -> None:
    given = arguments(__doc__, "gru", steps=1500)
    seeded(SEED)
    model = models.GRU(**CONFIG)
    batches = iter(range(10_000, 10_000 + given.steps))

    def loss(done: float) -> Tensor:
        task = tasks.sequences(256, seed=next(batches))
        return F.cross_entropy(model(task.inputs), task.labels)

    def look() -> dict[str, float]:
        return measure("gru", model, seed=7)

    optimised(model, loss, steps=given.steps, rate=5e-3, look=look, every=500)
    write(
        given.out, model, None,
        Task(
            name="gru", script="etc/train/gru.py", seed=SEED, steps=given.steps, metrics=look(),
            knows=f"whether the last of {tasks.LENGTH} symbols is the first again",
        ),
        CONFIG,
    )  # fmt: skip


if __name__ == "__main__":
    main()
