"""`python -m analyzers`: what methods find in pretrained models, each with its picture: causes first, then readings."""

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
    read_out(model, tokenizer, out)
    remembered(model, tokenizer, out)
    named(model, tokenizer, out)
    divided(model, tokenizer, out)
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


def read_out(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """What the language model would say if it ended earlier, and who wrote its answer."""
    prompt = "The city of Shanghai is located in the country of"
    print(f"\n9. What the stream says after each layer of {prompt!r}, and which heads wrote {NAMES[0][0]!r}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    maps = analyzers.LensTranslator(model, tokenizer).over(analyzers.sentences()[:96], progress=True)
    shown(analyzers.LogitLens(model, tokenizer, maps.result()).run(prompt), out / "lens.png")
    given = [GIFT.format(to, giver, giver) for to, giver, _ in NAMES]
    right, wrong = [f" {to}" for to, _, _ in NAMES], [f" {giver}" for _, giver, _ in NAMES]
    shown(analyzers.LogitAttribution(model, tokenizer).run(given, right, wrong), out / "attribution.png")
    shown(analyzers.ResidualDecomposition(model, tokenizer).run(prompt), out / "decomposition.png")
    print(f"   {out / 'lens.png'}: raw, through fitted maps, through their null; {out / 'attribution.png'}: heads, layers")
    print(f"   {out / 'decomposition.png'}: what each attention and memory wrote, by token")


def remembered(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Which memories promote an answer."""
    prompt, answer = "The Eiffel Tower is located in the city of", " Paris"
    print(f"\n10. Which memories promote {answer!r} after {prompt!r}")
    shown(analyzers.KeyValueMemories(model, tokenizer).promotion(prompt, answer), out / "promotion.png")
    print(f"   {out / 'promotion.png'}: what the memories of each layer add to it, beside other words")


def named(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """What heads do, and which one an induction head reads."""
    print("\n11. The jobs of heads, and whom the keys of an induction head read")
    shown(analyzers.Heads(model, tokenizer, examples=3).run(), out / "jobs.png")
    reads = analyzers.Composition(model, tokenizer).run("It rains.", into=17, memories=False)
    shown(reads, out / "composition.png", reader="17.3", role="k")
    print(f"   {out / 'jobs.png'}: each head's scores beside nulls; {out / 'composition.png'}: 16.0 works for 17.3")


def divided(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Whether the memories of two layers fall into parts."""
    print("\n12. Communities of the memories of two layers, by the strongest of their edges, beside two kinds of nulls")
    given: dict[str, Any] = {"layers": "memories", "scope": "*.1[01].*", "edges": [0.02], "draws": 2}
    shown(analyzers.Modularity(model, tokenizer, **given).run("The store is closed."), out / "communities.png")
    print(f"   {out / 'communities.png'}: the network, and its modularity among those of the nulls")


def shown(result: Any, path: Path, **how: Any) -> None:
    """Print a result and save its picture."""
    print("   " + repr(result).replace("\n", "\n   "))
    figure = result.plot(**how)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def batches(tokenizer: Any, sentences: list[str]) -> Iterator[Any]:
    """The sentences as padded batches of model inputs."""
    for start in range(0, len(sentences), BATCH):
        yield tokenizer(sentences[start : start + BATCH], return_tensors="pt", padding=True)


if __name__ == "__main__":
    sys.exit(main())
