"""Whether a trained network computes by the variables of hierarchical equality, by distributed alignment search.

    python etc/science/alignment.py

A network of three layers of 16 units learns whether two pairs of objects are alike, both or neither; an object is a vector
of four numbers that it has not seen before. A rotation of the first layer, eight directions for each pair, is trained on
interchanges, and tested on others with objects that neither saw; the controls are tested on the same. Then the network is
trained by interchanges itself, so that named units hold the variables. Each claim is checked; the exit status is 1 where one
fails.
"""

import sys
import time

import torch
from torch import Tensor, nn

import fmr
from analyzers import AlignmentSearch, CausalModel, Counterfactuals, InterchangeTraining

OBJECTS, NUMBERS = 200, 4
STEPS, BATCH = 2000, 512


def equality() -> CausalModel:
    """Whether the pairs agree, of objects by their number."""
    functions = {"wx": lambda w, x: w == x, "yz": lambda y, z: y == z, "out": lambda wx, yz: wx == yz}
    return CausalModel(dict.fromkeys("wxyz", range(OBJECTS)), functions, columns="torch")


def objects(seed: int) -> Tensor:
    """The vectors of objects."""
    return torch.rand(OBJECTS, NUMBERS, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def counterfactuals(causal: CausalModel, n: int, seed: int) -> Counterfactuals:
    """Interchanges of objects that no other seed has."""
    vectors = objects(seed)

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        return torch.cat([vectors[inputs[name].long()] for name in "wxyz"], 1)

    return causal.counterfactuals(n, encode=encode, seed=seed)


def trained(seed: int) -> nn.Sequential:
    """The network, trained on objects drawn anew for each batch."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(wide, 16), nn.ReLU()) for wide in (4 * NUMBERS, 16, 16)]
    model = nn.Sequential(*layers, nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, STEPS)
    for _ in range(STEPS):
        given, same = torch.rand(BATCH, 4, NUMBERS) * 2 - 1, torch.rand(BATCH, 2) < 0.5
        given[:, 1::2] = torch.where(same[..., None], given[:, ::2], given[:, 1::2])
        loss = nn.functional.cross_entropy(model(given.flatten(1)), (same[:, 0] == same[:, 1]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(True)


def claimed(what: str, holds: bool) -> int:
    """Print a claim; 1 where it fails."""
    print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
    return int(not holds)


def main() -> int:
    """Print every claim."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    causal, model = equality(), trained(0)
    print(f"trained in {time.perf_counter() - began:.0f} s")
    train, test = counterfactuals(causal, 12_800, 1), counterfactuals(causal, 3_200, 2)
    rotation = fmr.subspaces.Rotation(16, seed=0)
    halves = {"wx": rotation[:8], "yz": rotation[8:]}
    settings = {"batch": 256, "progress": False}
    found = AlignmentSearch(model, causal, "0", halves).run(train, test, other="2", epochs=20, lr=1e-2, **settings)
    print(found)
    print(f"{time.perf_counter() - began:.0f} s so far")
    own = max(found.controls[name] for name in ("random subspace", "placebo", "shuffled labels", "untrained model"))
    units = {"wx": fmr.subspaces.Units(16, range(8)), "yz": fmr.subspaces.Units(16, range(8, 16))}
    induced = InterchangeTraining(model, causal, "0", units).run(train, test, epochs=10, lr=5e-3, **settings)
    print(induced)
    print(f"{time.perf_counter() - began:.0f} s in all")
    return min(1, sum(
        (
            claimed(f"the network knows equality of new objects: {found.task:.3f} >= 0.99", found.task >= 0.99),
            claimed(f"interchanges follow the algorithm: {found.iia[0]:.3f} >= 0.97", found.iia[0] >= 0.97),
            claimed(f"where they change the label, too: {found.changed[0]:.3f} >= 0.95", found.changed[0] >= 0.95),
            claimed(f"controls at that site are at chance: {own:.3f} <= 0.65", own <= 0.65),
            claimed(f"another layer holds them less well: {found.controls['another site']:.3f}",
                    found.controls["another site"] < found.iia[0] - 0.1),
            claimed(f"named units do after training: {induced.after['interchange']:.3f} >= 0.95",
                    induced.after["interchange"] >= 0.95),
            claimed(f"and the task is not lost: {induced.after['task']:.3f} >= {induced.before['task']:.3f} - 0.005",
                    induced.after["task"] >= induced.before["task"] - 0.005),
        )
    ))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
