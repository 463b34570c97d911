"""What the zoo's language model learns when: it is trained again, watched at each so-many-th step.

    python etc/science/training.py [--steps N] [--to FOLDER]

The script of the facts model is run as it is inside one block of `fmr.track(model, keep=..., every=25)`, which holds the
patterns of all heads, the logits and the tokens of each 25th batch. A head that looks behind the place where the word
stood before is an induction head; its null is what is looked at two words further. How long the repeated texts of a batch
are moves that share up and down, so that it may have no date of its own. What repeats is to be continued early, and facts to
be told later, when nothing is left to gain from repetition. Copies of the model at some steps are compared with the last,
layer by layer, beside rows in another order. Each claim is checked; the exit status is 1 where one fails. It takes as long
as the training, a quarter of an hour on one thread.
"""

import argparse
import copy
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import facts
from common import seeded
from transformers import GPT2LMHeadModel

import fmr
from analyzers import Similarity, Timeline

EVERY, COPIES = 25, (0, 0.03, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0)


def claimed(what: str, holds: bool) -> int:
    """Print a claim; 1 where it fails."""
    print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
    return int(not holds)


class Training:
    """The training of the facts model with the weights of each answer at hand, and copies of the model at some steps."""

    def __init__(self, steps: int) -> None:
        seeded(facts.SEED)
        self.tokenizer = facts.word_tokenizer()
        config = copy.deepcopy(facts.CONFIG)
        config._attn_implementation = "eager"
        self.model = GPT2LMHeadModel(config)
        self.rows, self.steps = facts.Rows(self.tokenizer), steps
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.copies: dict[int, GPT2LMHeadModel] = {}

    def run(self) -> None:
        from common import optimised

        marks = {int(share * self.steps) for share in COPIES[:-1]}

        def loss(done: float) -> Tensor:
            step = len(self.kept)
            if step in marks:
                self.copies[step] = copy.deepcopy(self.model).eval()
            self.kept.append(self.rows.batch(facts.REPEATS_FIRST if done < 0.15 else facts.REPEATS_LATER))
            return facts.loss_of(self.model, *self.kept[-1])

        optimised(self.model, loss, steps=self.steps, rate=1e-3, decay=0.01)
        self.copies[self.steps] = self.model.eval()

    # ---- what is read off a pass

    def rows_of(self, one: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of a batch, how much each counts, and which rows repeat words: whose answers follow each other."""
        ids, weights = self.kept[one.number]
        repeats = (weights[:, 1:] * weights[:, :-1] == 1).any(1)
        return ids, weights, repeats

    def induction(self, one: Any) -> tuple[float, float]:
        """How much the best head attends to the word behind the one that stood there before; to the second behind that."""
        ids, weights, repeats = self.rows_of(one)
        given = ids[repeats]
        rows, at = (weights[repeats, 1:] == 1).nonzero(as_tuple=True)  # what is told of the next word at `at`
        before = torch.stack(
            [(given[row, :place] == given[row, place]).nonzero()[-1, 0] for row, place in zip(rows, at, strict=True)]
        )
        shares: list[list[float]] = []
        for name in PATTERNS:
            value = one[name][repeats]
            both = (value[rows, :, at, (before + far).clamp(max=46)].mean(0).tolist() for far in (1, 3))
            shares += zip(*both, strict=True)
        return max(share for share, _ in shares), max(null for _, null in shares)

    def told(self, one: Any, which: str) -> tuple[float, float]:
        """How many answers are right, of repeated words or of facts; and with the answers of other places."""
        ids, weights, repeats = self.rows_of(one)
        chosen = (weights[:, 1:] == 1) & (repeats if which == "repetition" else ~repeats)[:, None]
        said, right = one["lm_head/linear#0"].argmax(-1)[chosen], ids[:, 1:][chosen]
        return float((said == right).float().mean()), float((said == right.roll(1)).float().mean())


PATTERNS = [f"transformer.h.{layer}.attn/softmax#0" for layer in range(4)]


def cost(training: Training) -> float:
    """A step that is let by, in steps outside any block: medians of pairs, in turns."""
    model, rows = copy.deepcopy(training.model).train(), training.rows
    batch = rows.batch(0.3)

    def step() -> float:
        start = time.process_time()
        facts.loss_of(model, *batch).backward()
        model.zero_grad()
        return time.process_time() - start

    pairs = []
    for _ in range(25):
        taken = []
        for block in (nullcontext(), fmr.track(model, keep=[*PATTERNS, "lm_head/linear#0"], every=10**6)):
            with block:
                step()
                taken.append(step())
        pairs.append(taken[1] / taken[0])
    return statistics.median(pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--to", type=Path, help="a folder for the two pictures")
    given = parser.parse_args()
    training = Training(given.steps)
    with fmr.track(training.model, keep=[*PATTERNS, "lm_head/linear#0"], every=EVERY) as run:
        training.run()
    scores = {
        "induction": training.induction,
        "repetition": lambda one: training.told(one, "repetition"),
        "facts": lambda one: training.told(one, "facts"),
    }
    line = Timeline.of(run, scores)
    print(line)
    failed, dates = 0, line.dates
    failed += claimed(
        "the best head ends above 0.3 where words repeat, and below 0.2 two words further",
        line.values["induction"][-1] > 0.3 and line.nulls["induction"][-1] < 0.2,
    )
    repetition, known = (dates[name] if dates[name] is not None else 10**9 for name in ("repetition", "facts"))
    failed += claimed(f"repetition is learned by step {repetition}, facts by {known}", repetition < known < given.steps)
    failed += claimed("neither is told with the answers of other places", max(line.nulls[name][-1] for name in dates) < 0.2)
    sentences = [f"{fact.prompt} {fact.answer}" for fact in facts.world.facts()[:200]]
    alike = Similarity(training.copies, training.tokenizer, measures=["cka", "procrustes"]).over(sentences, progress=False)
    found = alike.result(progress=False)
    print(found)
    last = str(given.steps)
    early = [found.between(str(step), last).diagonal() for step in training.copies]
    failed += claimed(
        "each layer nears what it ends as", bool((early[-2] > early[1] + 0.1).all() and (early[-2] > 0.9).all())
    )
    ratio = cost(training)
    failed += claimed(f"a step that is let by costs {ratio:.3f} of one outside any block", ratio < 1.03)
    if given.to is not None:
        given.to.mkdir(parents=True, exist_ok=True)
        line.plot().savefig(given.to / "dates.png", dpi=130)
        found.plot().savefig(given.to / "training.png", dpi=130)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
