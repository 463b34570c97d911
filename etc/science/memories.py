"""Feed-forward memories of a pretrained language model: whether what follows their triggers is what their values say.

    python etc/science/memories.py

SmolLM2-135M-Instruct over Python's documentation strings, over the reference of its language, and over short stories of
everyday life. Geva et al. (2021) found agreement in upper layers and none in lower ones; with gates, coefficients have two
signs, and a negative trigger is answered by the word that the value speaks against most. Each claim is checked; the exit
status is 1 where one fails.

How many times chance it is hangs on how much text there is to find a trigger in: of 1,536 memories some ten agree over 3,500
tokens and some twenty over 20,000, so that 20 times chance needs about 10,000 tokens of any kind, and an interval stands
beside each factor. Measured by hand on 4,500 sentences of a collection of quotations: 26, 28, 34, 37 times chance for
positive and 16, 22, 32, 30 for negative triggers over 3,600, 7,200, 14,400 and 21,600 tokens; six parts of 3,600 tokens by
themselves lie between 16 and 30, and between 8 and 21.
"""

import importlib
import inspect
import pydoc_data.topics
import sys
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

import analyzers
import fmr

MODULES = """argparse ast asyncio base64 calendar collections configparser contextlib copy csv dataclasses datetime decimal
    difflib email enum fractions functools glob gzip hashlib heapq html inspect io json locale logging math mimetypes
    multiprocessing operator os pathlib pickle pprint queue random re sched secrets shelve shutil socket sqlite3 statistics
    string subprocess tarfile tempfile textwrap threading timeit tokenize traceback typing unittest uuid warnings weakref
    zipfile""".split()
LAYERS, TEXTS, LONGEST = (5, 15, 25), 220, 260
ENOUGH = 8_000
"""From how many tokens on a factor is claimed by itself."""


def documentation() -> list[str]:
    """The first lines of documentation strings of Python's own library."""
    found: dict[str, None] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for _, one in sorted(vars(module).items()):
            text = inspect.getdoc(one) if callable(one) and getattr(one, "__module__", None) == name else None
            found.update(dict.fromkeys(long([text or ""])))
    return list(found)[:TEXTS]


def reference() -> list[str]:
    """Paragraphs of the reference of the language."""
    topics = pydoc_data.topics.topics
    paragraphs = [part for name in sorted(topics) for part in topics[name].split("\n\n")]
    every = long(part for part in paragraphs if "::=" not in part and ">>>" not in part)
    return every[:: max(1, len(every) // TEXTS)][:TEXTS]


def long(texts: Iterable[str]) -> list[str]:
    """Texts of some length, on one line, cut."""
    lines = (" ".join(text.split()) for text in texts)
    return [line[:LONGEST] for line in lines if len(line) > 200]


def claimed(what: str, holds: bool) -> int:
    """Print a claim; 1 where it fails."""
    print(f"  {'ok  ' if holds else 'NOT '} {what}", flush=True)
    return int(not holds)


def interval(found: analyzers.Memories, side: int) -> tuple[float, float]:
    """The 95 % interval of how many times chance memories of the last layer agree, over memories drawn anew."""
    own = slice(sum(found.sizes[:-1]), None)
    following, words = found.following[own, side], found.words[own, side, 0]
    followed = (following >= 0).any(1)
    following, words = following[followed], words[followed]
    first = following[np.arange(len(words)), (following >= 0).argmax(1)]
    draw, times = np.random.default_rng(0), []
    for _ in range(2000):
        some = draw.integers(0, len(words), len(words))
        chance = np.bincount(words[some], minlength=int(first.max()) + 1)[first[some]].mean() / len(words)
        times.append((first[some] == words[some]).mean() / chance)
    low, high = np.quantile(times, [0.025, 0.975])
    return float(low), float(high)


def agreeing(model: nn.Module, tokenizer: object, texts: list[str], times: float) -> tuple[analyzers.Memories, int]:
    """Agreement in three layers over a corpus, and how many claims about it fail: so many times chance, or, over few texts,
    an interval that holds it."""
    memories = analyzers.KeyValueMemories(model, tokenizer, k=30, layers=LAYERS)
    found = memories.over(texts).result(seed=0)
    print(found)
    print(found.by_layer().round(5).to_string(index=False))
    failed = 0
    for side, sign in enumerate(("positive", "negative")):
        low, _, high = (found.agreement[:, side] / found.chance[:, side]).tolist()
        p_low, _, p_high = found.p_values[:, side].tolist()
        least, most = interval(found, side)
        told = f"layer 25, {sign}: {high:.0f} times chance [{least:.0f}, {most:.0f}]"
        if found.n_tokens > ENOUGH:
            failed += claimed(f"{told}, {times:g} or more (p {p_high:.3f})", high >= times)
        else:
            failed += claimed(f"{told}: {times:g} is in the interval, 1 is not (p {p_high:.3f})", 1 < least < times < most)
        failed += claimed(f"layer 5, {sign}: {low:.1f} times chance, p {p_low:.2f} >= 0.05", p_low >= 0.05)
    among = found.among[2] / found.among_chance[2]
    failed += claimed(
        f"layer 25: words are among next tokens {among.min():.1f} times chance or more, 2.5", among.min() >= 2.5
    )
    return found, failed


def main() -> int:
    """Print all tables."""
    torch.set_num_threads(1)
    model, tokenizer = fmr.zoo.load("smollm2")
    print("SmolLM2, documentation of Python's library")
    texts = documentation()
    found, failed = agreeing(model, tokenizer, texts, 20)
    share = float((np.abs(found.coefficients[:, 0, 0]) > np.abs(found.coefficients[:, 1, 0])).mean())
    failed += claimed(f"the strongest trigger is positive in {share:.0%} of memories, 40 to 60 %", 0.4 <= share <= 0.6)
    print("SmolLM2, reference of the language")
    failed += agreeing(model, tokenizer, reference(), 20)[1]
    print("SmolLM2, sentences of everyday life")
    failed += agreeing(model, tokenizer, analyzers.sentences(), 20)[1]
    print("SmolLM2, as much of the documentation")
    failed += agreeing(model, tokenizer, texts[:66], 20)[1]

    print("SmolLM2, how predictions are composed")
    memories = analyzers.KeyValueMemories(model, tokenizer, layers=LAYERS)
    made = memories.run(texts[:8], seed=0)
    print(made)
    print(made.table().round(3).to_string(index=False))
    share = float(made.none.mean() / made.shuffled.mean())
    failed += claimed(
        f"layers say what none of their memories says {share:.2f} times as often as shuffled, < 0.95", share < 0.95
    )
    whole = analyzers.KeyValueMemories(model, tokenizer)
    paris = whole.promotion("The Eiffel Tower is located in the city of", " Paris", seed=0)
    print(paris)
    print(paris.table().head(5).round(2).to_string(index=False))
    times = float(paris.by_layer[24] / paris.spread[24])
    failed += claimed(f"layer 24 promotes Paris {times:.1f} times the spread of other words, 2 or more", times >= 2)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
