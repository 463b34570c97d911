"""`python -m analyzers`: what methods find in pretrained models: clusters of heads, a fact recalled, an answer patched."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from torch import nn

import analyzers
import fmr

BATCH = 32

GIFT = "When {} and {} went to the store, {} gave a drink to"
NAMES = (("Mary", "John", "Tom"), ("Anna", "Mark", "Paul"))
"""Who is given something, who gives, and who gives in the corrupted prompt."""


def main() -> int:
    """Read the command line, run the methods, print what they find and save their pictures."""
    parser = argparse.ArgumentParser(prog="python -m analyzers", description="What methods find in pretrained models.")
    parser.add_argument("--out", default="out", type=Path, help="directory for the pictures (default: out)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    clustered(out)
    model, tokenizer = fmr.zoo.load("smollm2")
    traced(model, tokenizer, out)
    patched(model, tokenizer, out)
    return 0


def clustered(out: Path) -> None:
    """The heads of the encoder by what they look at."""
    model, tokenizer = fmr.zoo.load("minilm")
    sentences = analyzers.sentences()
    print(f"\n6. The encoder's heads, clustered by what they attend to in {len(sentences)} sentences")
    clusters = analyzers.HeadClustering(model).over(list(batches(tokenizer, sentences)), progress=True).result()
    shown(clusters, out / "heads.png")
    clusters.table().to_csv(out / "heads.csv")
    print(f"   {out / 'heads.png'}: the map; {out / 'heads.csv'}: one row a head")


def traced(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Where the language model recalls a fact."""
    prompt, subject = "The Eiffel Tower is located in the city of", "The Eiffel Tower"
    print(f"\n7. Where the language model recalls what follows {prompt!r}")
    tracing = analyzers.CausalTracing(model, tokenizer, kinds=("state",), samples=1)
    shown(tracing.run(prompt, subject), out / "tracing.png")
    print(f"   {out / 'tracing.png'}: what each state brings back of the answer, by token and layer")


def patched(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Which states and heads of the language model know to whom something is given."""
    clean = [GIFT.format(to, giver, giver) for to, giver, _ in NAMES]
    corrupted = [GIFT.format(to, giver, other) for to, giver, other in NAMES]
    print(f"\n8. What makes {clean[0]!r} go on with {NAMES[0][0]!r}: patched from it into {corrupted[0]!r}")
    who = fmr.sweeps.logit_diff([f" {to}" for to, _, _ in NAMES], [f" {giver}" for _, giver, _ in NAMES])
    shown(analyzers.ActivationPatching(model, tokenizer).run(clean, corrupted, who), out / "patching.png")
    print(f"   {out / 'patching.png'}: the effect of every state, attention, memory and head")


def shown(result: Any, path: Path) -> None:
    """Print a result and save its picture."""
    print("   " + repr(result).replace("\n", "\n   "))
    figure = result.plot()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def batches(tokenizer: Any, sentences: list[str]) -> Iterator[Any]:
    """The sentences as padded batches of model inputs."""
    for start in range(0, len(sentences), BATCH):
        yield tokenizer(sentences[start : start + BATCH], return_tensors="pt", padding=True)


if __name__ == "__main__":
    sys.exit(main())
