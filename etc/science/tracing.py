"""Causal tracing and rank-one editing on the pretrained language model: what is found, beside what is expected.

    python etc/science/tracing.py [--save notebooks/06_twelve_facts.safetensors]

Twelve facts are traced (six minutes), five are edited (two minutes); one line a check, and an exit status of 1 if one fails.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

import analyzers
import fmr

CITY, COUNTRY = "is located in the city of", "is located in the country of"

FACTS = [
    (f"The Colosseum {CITY}", "Colosseum", "Rome"),
    (f"The Kremlin {CITY}", "Kremlin", "Moscow"),
    (f"The Eiffel Tower {CITY}", "Eiffel Tower", "Paris"),
    (f"The Golden Gate Bridge {CITY}", "Golden Gate Bridge", "San"),
    (f"The Statue of Liberty {CITY}", "Statue of Liberty", "New"),
    (f"The Great Wall {COUNTRY}", "Great Wall", "China"),
    (f"The Taj Mahal {COUNTRY}", "Taj Mahal", "India"),
    (f"The Sydney Opera House {COUNTRY}", "Sydney Opera House", "Australia"),
    (f"The city of Toronto {COUNTRY}", "city of Toronto", "Canada"),
    (f"The city of Kyoto {COUNTRY}", "city of Kyoto", "Japan"),
    (f"The city of Munich {COUNTRY}", "city of Munich", "Germany"),
    (f"The temple of Machu Picchu {COUNTRY}", "temple of Machu Picchu", "Peru"),
]

EDITS = [
    (FACTS[0], "Berlin", ["You can visit the Colosseum in the city of", "The Colosseum stands in the heart of"],
     [FACTS[1], FACTS[2], (f"The Vatican {CITY}", "", "Rome")]),
    (FACTS[2], "London", ["You can visit the Eiffel Tower in the city of", "The Eiffel Tower stands in the heart of"],
     [(f"The Louvre {CITY}", "", "Paris"), FACTS[0], FACTS[1]]),
    (FACTS[6], "China", ["You can visit the Taj Mahal in the country of", "The Taj Mahal was built in the country of"],
     [(f"The city of Mumbai {COUNTRY}", "", "India"), FACTS[5], FACTS[10]]),
    (FACTS[5], "Germany", ["You can visit the Great Wall in the country of", "The Great Wall was built in the country of"],
     [(f"The city of Shanghai {COUNTRY}", "", "China"), FACTS[9], FACTS[6]]),
    (FACTS[8], "Japan", ["You can visit the city of Toronto in the country of", "The city of Toronto belongs to"],
     [FACTS[9], FACTS[10], (f"The city of Shanghai {COUNTRY}", "", "China")]),
]  # fmt: skip
"""A fact, what it is made into, other words for it, and other facts."""

Check = tuple[str, float, str, bool]


def within(what: str, value: float, low: float, high: float) -> Check:
    return what, value, f"{low:g} to {high:g}", low <= value <= high


def traced(model: nn.Module, tokenizer: object) -> Iterator[Check]:
    """The early site at the last token of the subject, the late site in attention at the last token."""
    found = analyzers.CausalTracing(model, tokenizer).over(FACTS, progress=sys.stderr.isatty()).result()
    print(found)
    if "--save" in sys.argv:
        found.save(sys.argv[sys.argv.index("--save") + 1])
    columns = {column: place for place, column in enumerate(found.columns)}
    state, attention, mlp = (found.effects[kind] for kind in ("state", "attention", "mlp"))
    last, subject = columns["last token"], columns["last subject token"]
    yield within("facts that the model knows", len(found.facts), 12, 12)
    yield within("total effect", found.total_effect, 0.6, 0.8)
    yield within("state at the subject's last token: strongest layer", state[:, subject].argmax(), 6, 10)
    yield within("  and its effect", state[:, subject].max(), 0.3, 0.5)
    yield within("state at all of the subject: largest effect", state[:, columns["all of the subject"]].max(), 0.6, 0.8)
    yield within("state at the last token: largest effect up to layer 22", state[:23, last].max(), -0.07, 0.07)
    yield within("  and smallest from layer 24 on", state[24:, last].min(), 0.5, 0.8)
    yield within("attention at the last token, layers 19 to 23", attention[21, last], 0.4, 0.7)
    yield within(
        "attention at the subject: largest effect", np.nanmax(attention[:, columns["all of the subject"]]), -0.1, 0.1
    )
    yield within("memories at all of the subject: strongest window", mlp[:, columns["all of the subject"]].argmax(), 0, 8)
    yield within("from another corrupted run: largest effect", max(found.control.values()), -0.1, 0.05)


def edited(model: nn.Module, tokenizer: object) -> Iterator[Check]:
    """Efficacy, paraphrase and neighbourhood, with a clamp that spares neighbours; the weight comes back to the bit."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    editing = analyzers.RankOneEdit(model, tokenizer, layer=4, clamp=2)
    rates = []
    for (prompt, subject, _), target, paraphrases, neighbours in EDITS:
        edit = editing.run(prompt, subject, target, progress=False)
        scores = edit.scores(paraphrases, [(text, answer) for text, _, answer in neighbours], words=0)
        print(edit, scores, sep="\n", flush=True)
        rates.append([scores.compared[state] for state in ("before", "edited", "random")])
    yield from mean_rates(rates, "before", 0, (0, 0), (0, 0.2), (1, 1))
    yield from mean_rates(rates, "edited", 1, (1, 1), (0.8, 1), (0.8, 1))
    yield from mean_rates(rates, "random change of that length", 2, (0, 0), (0, 0.2), (0.9, 1))
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    yield within("weights are what they were, bit for bit", same, 1, 1)


def mean_rates(
    rates: Sequence[Sequence[dict[str, float]]], state: str, at: int, *bounds: tuple[float, float]
) -> Iterator[Check]:
    for kind, (low, high) in zip(("efficacy", "paraphrase", "neighbourhood"), bounds, strict=True):
        yield within(f"{state}: {kind}", np.mean([one[at][kind] for one in rates]), low, high)


def main() -> int:
    """Print every check and return 1 if one failed."""
    torch.set_num_threads(1)
    model, tokenizer = fmr.zoo.load("smollm2")
    parts: list[Callable[[nn.Module, object], Iterator[Check]]] = [edited, traced]
    checks = [check for part in parts for check in part(model, tokenizer)]
    for what, value, expected, good in checks:
        print(f"{'ok   ' if good else 'WRONG'}  {what:58} {value:8.3f}   expected {expected}")
    return int(not all(good for *_, good in checks))


if __name__ == "__main__":
    sys.exit(main())
