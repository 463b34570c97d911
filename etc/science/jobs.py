"""What heads of a pretrained language model do, who reads whom, and which heads are alike: SmolLM2-135M-Instruct.

    python etc/science/jobs.py

Random tokens said twice show heads that look at the token after the earlier occurrence (induction). By their weights alone,
heads 17.3, 17.4 and 17.5 read by their keys what the previous-token head 16.0 writes, more than what any other of the 153
heads before them does; with 16.0 silent they stop, with other heads silent they do not. Heads of one layer look alike,
with the first token (a sink) left out or in. Each claim is checked on the reference's tokens and sentences and on others;
the exit status is 1 where one fails.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from heads import claimed
from torch import nn

import fmr
from analyzers import Composition, HeadClustering, HeadJobs, Heads, sentences

INDUCTION = {"18.6": 0.897, "17.3": 0.760, "17.4": 0.685, "18.7": 0.602, "23.2": 0.528, "23.7": 0.475, "17.5": 0.413}
"""The reference: what plain hooks measured on six sequences of tokens 1,000 to 40,000, seed 0."""

LEAST = {"attention": 0.08, "beyond first": 0.05}
"""How much farther heads of different layers are apart, in bits."""

READERS = ("17.3", "17.4", "17.5")
TEXT = "The river froze before the first snow fell."


def silenced(blocks: Sequence[Any], heads: Sequence[str]) -> dict[Any, Any]:
    """Edits under which heads write nothing."""
    places = [tuple(map(int, head.split("."))) for head in heads]
    return {blocks[layer].head(number).z: fmr.edits.Zero() for layer, number in places}


def scores(jobs: HeadJobs, heads: Sequence[str], job: str = "induction") -> dict[str, float]:
    found = jobs.score(job)
    return {head: float(found[jobs.names.index(head)]) for head in heads}


def shown(what: str, jobs: HeadJobs, heads: Sequence[str]) -> None:
    told = ", ".join(f"{head} {score:.3f}" for head, score in scores(jobs, heads).items())
    print(f"  {what:<34} loss {jobs.losses[0]:.2f}, again {jobs.losses[1]:.3f}; induction {told}", flush=True)


def same(left: list[Any], right: list[Any]) -> bool:
    return bool(np.allclose(left, right, atol=0.005))


def induction(model: nn.Module, blocks: Sequence[Any], ids: range | None, seed: int, tokenizer: Any) -> int:
    """The heads that find what was said before, and what becomes of it without them; how many claims fail."""
    heads = Heads(model, tokenizer, ids=ids, writes=False)
    jobs = heads.run(seed)
    first = [head for head, _ in jobs.best("induction", 5)]
    random = np.random.default_rng(seed)
    layers = [int(head.split(".")[0]) for head in first]
    others = [f"{n}.{h}" for n in sorted(set(layers)) for h in range(9) if f"{n}.{h}" not in first]
    drawn = [str(one) for one in random.permutation(others)[:5]]
    shown("as it is", jobs, tuple(INDUCTION))
    without = {
        what: heads.run(seed, edits=silenced(blocks, gone))
        for what, gone in (("16.0 silent", ["16.0"]), ("16.1 and 16.2 silent", ["16.1", "16.2"]),
                           ("the first five silent", first), ("five others silent", drawn))
    }  # fmt: skip
    for what, found in without.items():
        shown(what, found, READERS)
    plain = scores(jobs, READERS)
    silent, control = (scores(without[what], READERS) for what in ("16.0 silent", "16.1 and 16.2 silent"))
    failed = claimed("18.6, 17.3 and 17.4 are the first three induction heads", first[:3] == ["18.6", "17.3", "17.4"])
    if ids is not None:
        near = same([jobs.losses[0], *scores(jobs, tuple(INDUCTION)).values()], [13.99, *INDUCTION.values()])
        failed += claimed("loss 13.99 and 3.254 and all seven scores are the reference's",
                          near and abs(jobs.losses[1] - 3.254) < 0.01)  # fmt: skip
    null = float(jobs.null("induction").max())
    failed += claimed(f"where nothing comes again no head looks there: at most {null:.3f} < 0.05", null < 0.05)
    before = [head for head, _ in jobs.best("previous token", 2)]
    failed += claimed("16.0 and 11.1 look most at the token before", before == ["16.0", "11.1"])
    failed += claimed("with 16.0 silent, 17.3, 17.4 and 17.5 find nothing: < 0.05", max(silent.values()) < 0.05)
    moved = max(abs(control[head] - plain[head]) for head in READERS)
    failed += claimed(f"with 16.1 and 16.2 silent they go on: change {moved:.3f} <= 0.06", moved <= 0.06)
    gone, kept = (without[what].losses[1] for what in ("the first five silent", "five others silent"))
    failed += claimed(
        "loss > 10 without the first five, < 4.5 without five others of their layers", gone > 10 and kept < 4.5
    )
    return failed


def composition(model: nn.Module, tokenizer: Any, text: str) -> int:
    """Who reads what 16.0 wrote, by weights alone; how many claims fail."""
    began = time.process_time()
    found = Composition(model, tokenizer).run(text, into=17, memories=False, progress=False)
    seconds = time.process_time() - began
    ranks = {reader: found.rank("16.0", reader, "k") for reader in READERS}
    for reader in READERS:
        (first, most), (second, next_) = found.into(reader, "k")[:2]
        print(f"  {reader} reads by its keys {first} {most:.3f}, then {second} {next_:.3f}", flush=True)
    print(f"  at random {found.expected:.3f}; 153 heads into layer 17 by q, k and v: {seconds:.2f} CPU s, with preparation")
    later = Composition(model, tokenizer).run(text, into=[18, 23], memories=False, progress=False)
    first = {reader: later.into(reader, "k")[0][0] for reader in ("23.2", "23.7")}
    pairs = {tuple(head for head, _ in later.into(reader, "k")[:2]) for reader in ("18.6", "18.7")}
    return (
        claimed("16.0 is the first of 153 for each of the three", set(ranks.values()) == {(1, 153)})
        + claimed(
            "18.6 and 18.7 read 17.8, then 16.0",
            pairs == {("17.8", "16.0")},
        )
        + claimed("23.2 and 23.7 read 22.1", first["23.2"] == first["23.7"] == "22.1")
    )


def clustering(model: nn.Module, tokenizer: Any, texts: list[str], induct: list[str]) -> int:
    """How far heads of one layer and of different ones are apart; how many claims fail."""
    inputs = [tokenizer(text, return_tensors="pt") for text in texts]
    began = time.process_time()
    counted = HeadClustering(model, distances=("attention", "beyond first", "output", "cka")).over(inputs)
    print(f"  {counted.sums.tokens} tokens: {time.process_time() - began:.1f} CPU s", flush=True)
    failed, apart = 0, dict[str, float]()
    for distance in counted.distances:
        found = counted.result(distance=distance, permutations=200)
        rest = [head for head in found.names if head not in induct]
        among, to = found.between(induct), found.between(induct, rest)
        # a token that sees one key alone is left out of the reference: all heads are alike there
        alone = {"attention": found.examples, "beyond first": 2 * found.examples}.get(distance, 0)
        scale = (found.tokens - alone // 2 * (distance == "beyond first")) / (found.tokens - alone) if alone else 1.0
        within, between = (scale * one for one in found.by_layer[:2])
        print(f"  {found.unit:<45} within a layer {within:.3f}, between {between:.3f}, p {found.by_layer.p_value:.3f}; "
              f"induction heads {scale * among:.3f}, to others {scale * to:.3f}", flush=True)  # fmt: skip
        apart[distance] = scale * among
        if distance in LEAST:
            farther = between - within >= LEAST[distance] and found.by_layer.p_value < 0.006
            failed += claimed(f"other layers are farther by {LEAST[distance]} bits, as in none of 200 permutations", farther)
    idle, busy = apart["attention"], apart["beyond first"]
    what = f"induction heads are alike by resting on the first token: {idle:.3f} bits with it, {busy:.3f} without"
    failed += claimed(what, idle < 0.05 and busy > 0.15)
    return failed


def main() -> int:
    """Print all three parts, on the reference's data and on other data."""
    torch.set_num_threads(1)
    model, tokenizer = fmr.zoo.load("smollm2")
    blocks = fmr.locate(fmr.run(model, **tokenizer(TEXT, return_tensors="pt"))).attention
    failed = 0
    for what, ids, seed in (("the reference's tokens", range(1000, 40000), 0), ("other tokens", None, 1)):
        print(f"Induction in SmolLM2, {what}")
        failed += induction(model, blocks, ids, seed, tokenizer)
    for text in (TEXT, "def add(a, b):\n    return a + b"):
        print(f"Composition in SmolLM2, by weights, from a run of {text!r}")
        failed += composition(model, tokenizer, text)
    every = [text for text in sentences() if 5 <= len(tokenizer(text)["input_ids"]) <= 20]
    for what, texts in (("sixty sentences", every[:60]), ("sixty others", every[60:120])):
        print(f"Heads of SmolLM2 on {what}")
        failed += clustering(model, tokenizer, texts, ["18.6", "17.3", "17.4", "18.7", "23.2", "23.7", "17.5", "20.6"])
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
