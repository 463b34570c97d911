"""`python -m analyzers`: cluster the heads of the pretrained encoder over the sentences that ship with the project."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

import analyzers
import fmr

BATCH = 32


def main() -> int:
    """Read the command line, cluster the heads, print what they look at and save the map."""
    parser = argparse.ArgumentParser(prog="python -m analyzers", description="Cluster the heads of a pretrained encoder.")
    parser.add_argument("--out", default="out", type=Path, help="directory for the picture (default: out)")
    out = parser.parse_args().out
    model, tokenizer = fmr.zoo.load("minilm")
    sentences = analyzers.sentences()
    print(f"\n6. The encoder's heads, clustered by what they attend to in {len(sentences)} sentences")
    clusters = analyzers.HeadClustering(model).over(list(batches(tokenizer, sentences)), progress=True).result()
    print("   " + repr(clusters).replace("\n", "\n   "))
    out.mkdir(parents=True, exist_ok=True)
    plt.sca(clusters.plot())
    plt.savefig(out / "heads.png", dpi=130, bbox_inches="tight")
    clusters.table().to_csv(out / "heads.csv")
    print(f"   {out / 'heads.png'}: the map; {out / 'heads.csv'}: one row a head")
    return 0


def batches(tokenizer: Any, sentences: list[str]) -> Iterator[Any]:
    """The sentences as padded batches of model inputs."""
    for start in range(0, len(sentences), BATCH):
        yield tokenizer(sentences[start : start + BATCH], return_tensors="pt", padding=True)


if __name__ == "__main__":
    sys.exit(main())
