"""Do goals that vary modularly make networks modular? Kashtan and Alon's question, answered by numbers, whatever they are.

python etc/train/modular_goals.py [--seeds N] [--steps N] [--generations N]

A network of 8-8-4-2-1 units looks at two halves of four pixels each. Each half shows an object or none; the goal joins the
two answers. Three kinds of training, all from the same starts:

    fixed      always the same goal, L and R
    varying    the goal changes again and again, between L and R, and L or R: the parts stay, what joins them changes
    unrelated  the goal changes as often, between L and R and a random function of all eight pixels (the control)

They are trained by gradient, all seeds at once, and by evolution: of a population of weights the better half is kept, and
copied with random changes, as in the paper (there of integers, here of numbers). Then `analyzers.Modularity` finds Newman's
Q of each network, and of networks of the same strengths. What is printed: the difference of Q, and of Q above that null,
between varying goals and each of the others, the mean over seeds with its 95 % interval (bootstrap over seeds, paired).

Source: N. Kashtan, U. Alon, "Spontaneous evolution of modularity and network motifs", 2005. One thread, some ten minutes.
"""

import argparse
import time
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from analyzers import Modularity

WIDTHS = (8, 8, 4, 2, 1)
ARMS = ("fixed", "varying", "unrelated")
EVERY = 20
"""After how many steps, or generations, a goal that varies changes; the last one asked for is the second."""

Weights = list[Tensor]
"""For each layer the weights and the biases of all networks, (networks, made, read) and (networks, made, 1)."""


def pixels() -> Tensor:
    """All inputs: 256 pictures of eight pixels, 0 or 1."""
    return (torch.arange(256)[:, None] >> torch.arange(8) & 1).double()


def objects(images: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the left half shows an object, and the right: three pixels and more, or one or two of its outer column."""
    left, right = images[:, :4], images[:, 4:].flip(1)

    def shown(half: Tensor) -> Tensor:
        outer, inner = half[:, :2].sum(1), half[:, 2:].sum(1)
        return (outer + inner >= 3) | ((outer >= 1) & (inner == 0))

    return shown(left), shown(right)


def goals(arm: str, seed: int) -> list[Tensor]:
    """The answers that are asked for in turn, each for all inputs."""
    left, right = objects(pixels())
    strange = torch.rand(256, generator=torch.Generator().manual_seed(seed)) < 0.5
    return {"fixed": [left & right], "varying": [left & right, left | right], "unrelated": [left & right, strange]}[arm]


def answers(weights: Weights) -> Tensor:
    """What networks say, (networks, 256), above 0 for yes."""
    values = pixels().T.expand(len(weights[0]), -1, -1)
    for n in range(0, len(weights), 2):
        values = weights[n] @ values + weights[n + 1]
        values = values if n + 2 == len(weights) else torch.tanh(values)
    return values[:, 0]


def started(networks: int, seed: int) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    pairs = (
        (torch.randn(networks, b, a, generator=draw).double() / a**0.5, torch.zeros(networks, b, 1).double())
        for a, b in pairwise(WIDTHS)
    )
    return [part for pair in pairs for part in pair]


def by_gradient(arm: str, seeds: int, steps: int) -> Weights:
    """The networks of all seeds, trained at once; weights decay, so that those that are not needed vanish."""
    weights = [part.requires_grad_() for part in started(seeds, 0)]
    optimiser = torch.optim.AdamW(weights, lr=1e-2, weight_decay=1e-2)
    wanted = torch.stack([torch.stack(goals(arm, seed)) for seed in range(seeds)]).double()
    for step in range(steps):
        goal = wanted[:, step // EVERY % wanted.shape[1]]
        loss = nn.functional.binary_cross_entropy_with_logits(answers(weights), goal, reduction="none").mean(1).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return [part.detach() for part in weights]


def by_evolution(arm: str, seed: int, generations: int, population: int = 100) -> Weights:
    """The best network of a population, whose better half is kept and changed at random in each generation."""
    draw, weights = torch.Generator().manual_seed(seed), started(population, seed)
    wanted = goals(arm, seed)
    for generation in range(generations + 1):
        right = ((answers(weights) > 0) == wanted[min(generation, generations - 1) // EVERY % len(wanted)]).double().mean(1)
        order = right.argsort(descending=True, stable=True)
        if generation == generations:
            return [part[order[:1]] for part in weights]
        better = order[: population // 2]
        children = [part[better] + _change(part[better].shape, draw) for part in weights]
        weights = [torch.cat([part[better], child]) for part, child in zip(weights, children, strict=True)]
    raise AssertionError


def _change(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """A change of one weight in twenty."""
    return torch.randn(shape, generator=draw).double() * (torch.rand(shape, generator=draw) < 0.05)


def network(weights: Weights, number: int) -> nn.Module:
    layers: list[nn.Module] = []
    for n in range(0, len(weights), 2):
        layer = nn.Linear(weights[n].shape[2], weights[n].shape[1], dtype=torch.float64)
        layer.weight.data, layer.bias.data = weights[n][number], weights[n + 1][number, :, 0]
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval()


def measured(weights: Weights, draws: int) -> np.ndarray:
    """For each network its Q, and how far that is above networks of the same strengths."""
    rows = []
    for number in range(len(weights[0])):
        found = Modularity(network(weights, number), ks=range(2, 7), edges=[1.0], draws=draws)
        result = found.run(pixels()[:2], progress=False)
        kept = result.kinds.index("strengths kept")
        rows.append((result.q[0], result.q[0] - result.null_q[0, kept].mean()))
    return np.array(rows)


def interval(differences: np.ndarray) -> str:
    """The mean and its 95 % interval by the bootstrap."""
    drawn = np.random.default_rng(0).choice(differences, (4000, len(differences))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    verdict = "more modular" if low > 0 else "less modular" if high < 0 else "no difference that can be told"
    return f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]  {verdict}"


def rounds(given: str) -> int:
    """A number of steps in which both goals come equally often."""
    return -(-int(given) // (2 * EVERY)) * 2 * EVERY


def report(how: str, found: dict[str, Weights], draws: int) -> None:
    """Print what training came to, and the differences."""
    scores = {arm: measured(weights, draws) for arm, weights in found.items()}
    print(f"\nby {how}: {len(scores['fixed'])} networks of each kind")
    for arm, weights in found.items():
        said = answers(weights) > 0
        right_share = np.mean([float((one == goals(arm, seed)[-1]).double().mean()) for seed, one in enumerate(said)])
        q, above = scores[arm].mean(0)
        print(
            f"  {arm:<10} answers right {right_share:.3f}   Q {q:.4f}   Q above networks of the same strengths {above:+.4f}"
        )
    for other in ("fixed", "unrelated"):
        for n, what in enumerate(("Q", "Q above the null")):
            print(
                f"  varying - {other:<10} {what:<17} {interval(scores['varying'][:, n] - scores[other][:, n])}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=30, help="networks of each kind by gradient; a third as many by evolution"
    )
    parser.add_argument("--steps", type=rounds, default=8000, help="of gradient descent (default: 8000)")
    parser.add_argument("--generations", type=rounds, default=1200, help="of evolution (default: 1200)")
    parser.add_argument("--draws", type=int, default=10, help="networks of the same strengths, for each (default: 10)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    report("gradient", {arm: by_gradient(arm, given.seeds, given.steps) for arm in ARMS}, given.draws)
    evolved = {}
    for arm in ARMS:
        one_by_one = [by_evolution(arm, seed, given.generations) for seed in range(given.seeds // 3)]
        evolved[arm] = [torch.cat(parts) for parts in zip(*one_by_one, strict=True)]
    report("evolution", evolved, given.draws)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
