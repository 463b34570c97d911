"""How modular trained networks are, and how the answer hangs on what they are compared with.

    python etc/science/modularity.py

Graphs of residual and expanded channels of consecutive blocks of EfficientNet-Lite0, the weights times the scale of the
batch norm behind them, divided by spectral clustering and by Louvain's moves; and those of the zoo's two networks that read
digits. Each is held against networks with the weights of each layer shuffled, and against graphs in which every unit keeps
its strength; the search for communities is the same in all. By all edges the blocks are modular beyond both nulls; Louvain
on the strongest tenth of them finds no more than in shuffled weights; with the scales in front of layers counted, too, the
strengths of units explain it all. Each claim is checked; the exit status is 1 where one fails.
"""

import sys
import time

import torch
from heads import claimed

import fmr
from analyzers import Communities, Modularity
from analyzers.networks.search import ratio

BLOCKS = {
    "6-7": ("_blocks.[67].*", 1040, 0.074),
    "9-10": (("_blocks.9.*", "_blocks.10.*"), 1456, 0.044),
    "12-14": ("_blocks.1[234].*", 3648, 0.029),
}
DRAWS = 8


def row(what: str, found: Communities, seconds: float) -> None:
    """A line for each share of edges: the network's Q, then that of each null with z and p."""
    for n, share in enumerate(found.shares):
        told = f"  {what:<26} {100 * share:>4g} % of edges  Q {found.q[n]:.3f} (k = {found.k[n]})"
        for kind, name in enumerate(found.kinds):
            null = found.null_q[n, kind]
            z, p = ratio(found.q[n], null, larger=True)
            told += f"   {name} {null.mean():.3f} ({null.min():.3f} - {null.max():.3f}), z {z:+.1f}, p {p:.2g}"
        print(told + f"   {seconds:.0f} s", flush=True)


def timed(what: str, model: torch.nn.Module, inputs: torch.Tensor, **settings: object) -> Communities:
    start = time.perf_counter()
    found = Modularity(model, **settings).run(inputs, progress=False)  # type: ignore[arg-type]
    row(what, found, time.perf_counter() - start)
    return found


def blocks_of_a_classifier() -> int:
    """The table of blocks; how many claims fail."""
    model, image, failed = fmr.zoo.load("efficientnet").model, torch.zeros(1, 3, 224, 224), 0
    for name, (scope, units, known) in BLOCKS.items():
        one = {"scope": scope, "ks": range(2, 8)}
        whole = timed(f"blocks {name}, spectral", model, image, edges=[1.0], draws=DRAWS, **one)
        few = timed(f"blocks {name}, Louvain", model, image, edges=[0.1], method="louvain", draws=2, **one)
        dealt, kept = whole.null_q[0]
        failed += claimed(f"{units:,} units, residual channels one each", len(whole.labels) == units)
        failed += claimed(f"Q is {known:.3f} within 0.002, as plain hooks measured", abs(whole.q[0] - known) < 0.002)
        failed += claimed("all edges: Q is above that of every network with shuffled weights", whole.q[0] > dealt.max())
        failed += claimed("strengths are kept within 1e-6", whole.drift[1] < 1e-6)
        failed += claimed("and Q is above that of every such graph", whole.q[0] > kept.max())
        failed += claimed(
            "Louvain on the strongest tenth: not above shuffled weights by more than 0.002",
            few.q[0] < few.null_q[0, 0].mean() + 0.002,
        )
    scope, units, _ = BLOCKS["6-7"]
    scaled = timed("blocks 6-7, all scales", model, image, scope=scope, ks=range(2, 8), edges=[1.0], draws=DRAWS, fold="all")
    z = ratio(scaled.q[0], scaled.null_q[0, 1], larger=True)[0]
    failed += claimed(f"with all scales in the weights strengths explain Q: z {z:+.1f}, below 3", z < 3)
    return failed


def readers_of_digits() -> int:
    """The two networks of the zoo; how many claims fail."""
    failed = 0
    for name in ("digits-mlp", "digits-cnn"):
        found = timed(name, fmr.zoo.load(name).model, torch.zeros(1, 1, 8, 8), draws=20)
        signs = {ratio(found.q[n], found.null_q[n, kind], larger=True)[0] > 0 for n in range(2) for kind in range(2)}
        failed += claimed("the sign of z hangs on the null and on the share of edges", len(signs) == 2)
    return failed


def main() -> int:
    """Print all tables."""
    torch.set_num_threads(1)
    print("EfficientNet-Lite0: residual and expanded channels, weights with the scales of batch norms")
    failed = blocks_of_a_classifier()
    print("the zoo's readers of digits")
    failed += readers_of_digits()
    model, start = fmr.zoo.load("efficientnet").model, time.perf_counter()
    whole = Modularity(model, draws=0, edges=[1.0]).run(torch.zeros(1, 3, 224, 224), progress=False)
    seconds, size = time.perf_counter() - start, f"{len(whole.labels):,} units, {int(whole.edges[0]):,} edges"
    print(f"all of EfficientNet-Lite0: {size}, Q {whole.q[0]:.3f}, k {whole.k[0]}")
    failed += claimed(f"graph and communities in {seconds:.0f} s, under a minute", seconds < 60)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
