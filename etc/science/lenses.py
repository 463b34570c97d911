"""What the stream of a pretrained language model says on its way, and which heads wrote the answer's logit.

    python etc/science/lenses.py

SmolLM2-135M-Instruct. Its raw logit lens is nearly useless: answers that it knows come on top with the last layer. One
affine map a layer, fitted by least squares to a few thousand tokens of other text, lifts them into the top ten five layers
earlier; maps that were fitted to other tokens do not. Then who wrote the name that a sentence asks for ("When Mary and John
went to the store, John gave a drink to"): heads, memories and the embedding add up to the logit difference. Each claim is
checked on two sets of texts; the exit status is 1 where one fails.
"""

import importlib
import inspect
import sys
import time
from typing import Any

import torch
from circuits import KNOWN, NEW, NEW_PLACES, PLACES, talker_pairs
from torch import nn

import fmr
from analyzers import LensTranslator, LogitAttribution, LogitLens, ResidualDecomposition, Translator, sentences

COUNTRY, CAPITAL = "The city of {} is located in the country of", "The capital of {} is"
CITIES = "Shanghai Toronto Kyoto Mumbai Istanbul Munich Lyon Osaka Milan Barcelona".split()
STATES = "Germany France Italy Japan Spain".split()
FIRST = [COUNTRY.format(city) for city in CITIES] + [CAPITAL.format(state) for state in STATES]
"""Prompts as in the reference measurements, of which those count that the model knows."""

OTHERS = [
    "Mahatma Gandhi was a leader in the country of", "The Sydney Opera House is in the country of",
    "The president Vladimir Putin rules the country of", "The opposite of hot is", "The opposite of up is",
    "Monday, Tuesday, Wednesday,", "January, February, March,", "One, two, three,",
    "The ruins of Machu Picchu are in the country of", "The currency of Japan is the",
    "The first president of the United States was George", "The author of Romeo and Juliet is William",
    "The chemical formula of water is H", "Roses are red, violets are", "The sun rises in the",
]  # fmt: skip
"""Prompts of other kinds."""

MODULES = "argparse logging json re os subprocess collections functools itertools random statistics textwrap shutil".split()


def claimed(what: str, holds: bool) -> int:
    """Print a claim; 1 where it fails."""
    print(f"  {'ok  ' if holds else 'NOT '} {what}", flush=True)
    return int(not holds)


def documents() -> list[str]:
    """What the standard library says of itself."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for item in (module, *(value for value in vars(module).values() if getattr(value, "__module__", "") == name)):
            text = inspect.getdoc(item) or ""
            found += [text] if len(text) > 200 else []
    return list(dict.fromkeys(found))


def rows(texts: list[str], tokenizer: Any, length: int = 64, most: int = 6000) -> list[dict[str, torch.Tensor]]:
    """Texts one after the other, cut into rows of as many tokens, in batches of eight."""
    ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)][:most]
    made = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": few} for few in made.split(8)]


def fitted(model: nn.Module, tokenizer: Any, batches: list[Any], what: str) -> Translator:
    start = time.perf_counter()
    others = LensTranslator(model, tokenizer).over(batches[-2:], progress=False)
    found = LensTranslator(model, tokenizer).over(batches[:-2], progress=False).result(held_out=others)
    print(f"{what}: {found.tokens} tokens, {time.perf_counter() - start:.0f} s\n  {repr(found).splitlines()[1].strip()}")
    return found


def known(model: nn.Module, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The prompts after which the model is fairly sure of a token."""
    with torch.no_grad():
        shares = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1).max() for text in prompts]
    return [text for text, share in zip(prompts, shares, strict=True) if share > 0.3]


def read(lens: LogitLens, prompts: list[str]) -> int:
    """The lens and its translator on prompts that neither was fitted to; how many claims fail."""
    found = lens.run(prompts, position=-1)
    table = found.summary().set_index(["layer", "view"])
    print(f"{len(prompts)} prompts that the model knows; tokens above the answer (median), share in the top ten")
    for layer in ("10", "15", "20", "24", "25", "27"):
        told = [
            f"{view} {table.loc[(layer, view), 'median rank']:>7.0f} {table.loc[(layer, view), 'top ten']:.2f}"
            for view in found.views
        ]
        print(f"  layer {layer}: {'   '.join(told)}   others' answers, translated "
              f"{table.loc[(layer, 'translated'), 'rank of others']:.0f}")  # fmt: skip
    first, ten = found.first(), {view: float(table.loc[("25", view), "top ten"]) for view in found.views}
    last = found.points[-1]
    return sum(
        (
            claimed("the last row is what the model says, to the bit", found.error == 0.0),
            claimed(f"raw, the answer is first on top at layer {first['lens']:.0f} of {last} (median)", first["lens"] >= 28),
            claimed(f"at layer 25 {ten['lens']:.2f} of answers are in the top ten raw, {ten['translated']:.2f} translated",
                    ten["lens"] <= 0.5 and ten["translated"] >= 0.9),
            claimed(f"and {ten['null']:.2f} through maps fitted to other tokens", ten["null"] <= 0.1),
            claimed("answers of other prompts are not lifted: more than 20 tokens above them",
                    float(table.loc[("25", "translated"), "rank of others"]) > 20),
        )
    )  # fmt: skip


def attributed(model: nn.Module, tokenizer: Any, given: tuple[list[str], ...]) -> int:
    """Direct logit attribution of names; how many claims fail."""
    clean, _, right, wrong = given
    found = LogitAttribution(model, tokenizer).run(clean, right, wrong)
    print(found)
    kinds, heads = found.by_kind(), dict(found.strongest(len(found.kinds), "head"))
    order, by_size = sorted(heads, key=heads.__getitem__), [name for name, _ in found.strongest(10, "head")]
    other = float(found.others[[kind == "head" for kind in found.kinds]].mean(1).abs().max())
    return sum(
        (
            claimed(f"the parts add up to the logit difference within 1e-4 ({found.error:.0e})", found.error < 1e-4),
            claimed("heads write more of it than memories, and those more than the embedding",
                    kinds["heads"] > kinds["memories"] > abs(kinds["embedding"])),
            claimed("23.3 writes most, 29.0 most against it", (order[-1], order[0]) == ("head 23.3", "head 29.0")),
            claimed("20.0, which patching finds, is not among the first ten", "head 20.0" not in by_size),
            claimed(f"for the answers of other prompts no head writes a third as much ({other:.2f})",
                    other < heads["head 23.3"] / 3),
        )
    )  # fmt: skip


def decomposed(model: nn.Module, tokenizer: Any, texts: list[str]) -> int:
    found = ResidualDecomposition(model, tokenizer).run(texts)
    print(found)
    own, other = (abs(found.medians(name)[1:]).mean() for name in ("cosine_end", "other_cosine"))
    return sum(
        (
            claimed(f"what was written adds up to the end of the stream ({found.error:.0e})", found.error < 1e-5),
            claimed(f"it points more to its own end ({own:.3f}) than to another token's ({other:.3f})", own > 1.2 * other),
        )
    )


def tuned(lens: LogitLens, texts: list[str]) -> int:
    start, batches = time.perf_counter(), [texts[at : at + 16] for at in range(0, 240, 16)]
    found = lens.tune(batches, [texts[240:270]], layers=[25], steps=30, progress=False)
    before, after = found.kl_before["25"], found.kl_after["25"]
    print(f"the map of layer 25 trained for 30 steps of 64 tokens, {time.perf_counter() - start:.0f} s")
    return claimed(f"KL on held-out sentences falls from {before:.3f} to {after:.3f} nats", after < before)


def main() -> int:
    """Print all tables; 1 where a claim fails."""
    torch.set_num_threads(1)
    model, tokenizer = fmr.zoo.load("smollm2")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = sentences()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [texts[n] for n in order]
    failed = 0
    part = [texts[at : at + 16] for at in range(0, 240, 16)]
    for what, batches in (("240 sentences", part), ("Python's documentation", rows(documents(), tokenizer))):
        lens = LogitLens(model, tokenizer, fitted(model, tokenizer, batches, f"Translator fitted to {what}"))
        failed += read(lens, known(model, tokenizer, FIRST)) + read(lens, known(model, tokenizer, OTHERS))
        failed += tuned(lens, texts) if batches is part else 0
    for what, given in (("of the reference measurements", (PLACES, KNOWN)), ("of other people", (NEW_PLACES, NEW))):
        print(f"\nIndirect objects in sentences {what}")
        failed += attributed(model, tokenizer, talker_pairs(*given, "fresh"))
    for some in (texts[:12], texts[12:24]):
        print()
        failed += decomposed(model, tokenizer, some)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
