"""Which heads of a pretrained language model name the indirect object, by three measures that disagree as they should.

    python etc/science/heads.py

"When Mary and John went to the store, John gave a drink to", in SmolLM2-135M-Instruct, against prompts with three other
people. A head is patched at the last position (all that it does), along paths to the logits with memories computed again,
and along direct paths alone. Heads that tell later heads where to look are seen by the first measure and not by the last.
Attribution patching, one backward for all heads, is held against the first. Each claim is checked, on the sentences of the
reference measurements and on others; the exit status is 1 where one fails.
"""

import sys

import numpy as np
import torch
from circuits import KNOWN, NEW, NEW_PLACES, PLACES, talker_pairs
from torch import nn

import fmr
from analyzers import ActivationPatching, AttributionPatching, Effects, PathPatching
from fmr.sweeps import logit_diff


def ranked(effects: Effects, names: list[str]) -> list[tuple[str, float]]:
    """The heads by the size of what they change the logit difference by, with that change."""
    changes = effects.changes.mean(1).numpy()
    return [(names[n], float(changes[n])) for n in np.argsort(-np.abs(changes))]


def shown(what: str, order: list[tuple[str, float]]) -> None:
    heads = ", ".join(f"{name} {change:+.2f}" for name, change in order[:8])
    typical = float(np.median([abs(change) for _, change in order]))
    print(f"  {what:<34} {heads}; the median of {len(order)} heads {typical:.3f}", flush=True)


def claimed(what: str, holds: bool) -> int:
    """Print a claim; 1 where it fails."""
    print(f"  {'ok  ' if holds else 'NOT '} {what}", flush=True)
    return int(not holds)


def measured(model: nn.Module, tokenizer: object, given: tuple[list[str], ...]) -> int:
    """Every head by every measure; how many claims fail."""
    clean, corrupted, right, wrong = given
    metric = logit_diff(right, wrong)
    inputs = tokenizer(clean, return_tensors="pt")  # type: ignore[operator]
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    answers = [tokenizer.decode(token) for token in logits.argmax(-1)]  # type: ignore[attr-defined]
    structure = fmr.locate(fmr.run(model, input_ids=inputs["input_ids"][:2]))
    blocks = [layer.attention for layer in structure.layers if layer.attention is not None]
    heads = [block.z.at(heads=head, positions=-1) for block in blocks for head in range(block.n_heads)]
    names = [f"{layer}.{head}" for layer, block in enumerate(blocks) for head in range(block.n_heads)]
    ways = {"direction": "noising"}
    patched = ActivationPatching(model, tokenizer, **ways).run(clean, corrupted, metric, heads, progress=False)
    guessed = AttributionPatching(model, tokenizer, **ways).run(clean, corrupted, metric, heads, exact=patched)
    paths = PathPatching(model, tokenizer, **ways).run(clean, corrupted, metric, heads, progress=False)
    direct = PathPatching(model, tokenizer, through_mlps=False, **ways).run(clean, corrupted, metric, heads, progress=False)
    orders = [ranked(one, names) for one in (patched, paths, direct, guessed)]
    print(f"  logit difference {float(patched.base.mean()):.2f} clean, {float(patched.source.mean()):.2f} corrupted")
    for what, order in zip(("patched", "paths, memories again", "direct paths", "attribution"), orders, strict=True):
        shown(what, order)
    all_of, again, straight, quick = ([name for name, _ in order] for order in orders)
    common = len({*all_of[:10]} & {*quick[:10]})
    change = dict(orders[2])
    return sum(
        (
            claimed("the model names the other person in every prompt", answers == right),
            claimed("23.3 is first by all three", all_of[0] == again[0] == straight[0] == "23.3"),
            claimed("29.0 works most against the answer along direct paths", max(change, key=change.__getitem__) == "29.0"),
            claimed("20.0 is among the first three patched, not among the first ten along direct paths",
                    "20.0" in all_of[:3] and "20.0" not in straight[:10]),
            claimed(f"attribution correlates with patching: {guessed.correlation:.3f} >= 0.97", guessed.correlation >= 0.97),
            claimed(f"and finds {common} of its first ten heads, 8 or more", common >= 8),
        )
    )  # fmt: skip


def main() -> int:
    """Print both tables."""
    torch.set_num_threads(1)
    model, tokenizer = fmr.zoo.load("smollm2")
    failed = 0
    for what, places, people in (("the reference's sentences", PLACES, KNOWN), ("other sentences", NEW_PLACES, NEW)):
        print(f"SmolLM2, {what}")
        failed += measured(model, tokenizer, talker_pairs(places, people, "others"))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
