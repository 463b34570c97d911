"""Circuits in trained language models: how few edges carry the answer, beside random circuits of the same size.

    python etc/science/circuits.py

Indirect objects ("When Mary and John went to the store, John gave a drink to") in SmolLM2-135M-Instruct, with two kinds of
corrupted prompts: the giver named as the other person (swapped), and three other people. With these, nodes that work against
the answer weigh more; where they are left out (signed), a hundredth of the edges is enough. Induction and indirect objects
in the small model that ships with fmr. Each claim is checked; the exit status is 1 where one fails.
"""

import sys
import time
from itertools import product

import torch
from torch import nn

import fmr
from analyzers import Circuit, CircuitSearch
from fmr.sweeps import logit_diff
from fmr.zoo import world

PLACES = ("the store", "a drink"), ("the park", "a book"), ("the office", "a ring"), ("the school", "a ball")
KNOWN = ("Mary", "John"), ("Alice", "Bob"), ("Tom", "James"), ("Sarah", "Peter")
"""The sentences of the reference measurements."""

NEW_PLACES = ("the beach", "a letter"), ("the market", "a basket"), ("the garden", "a flower"), ("the station", "a ticket")
NEW = ("Emma", "Frank"), ("Kate", "Simon"), ("Laura", "Kevin"), ("Anna", "David")
"""Sentences with other people, places and things."""

STRANGERS = ("Jack", "Henry", "George"), ("Martin", "Adam", "Paul"), ("Lucy", "Robert", "Steve"), ("Diana", "Max", "Eric")


def talker_pairs(
    places: tuple[tuple[str, str], ...], people: tuple[tuple[str, str], ...], kind: str
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Clean and corrupted prompts, right and wrong answers: each pair of people in both roles."""
    clean, corrupted, right, wrong = [], [], [], []
    for (number, pair), turned in product(enumerate(people), (False, True)):
        place, thing = places[number]
        giver, other = pair[::-1] if turned else pair
        text = "When {} and {} went to {}, {} gave {} to"
        clean.append(text.format(*pair, place, giver, thing))
        first, second, third = STRANGERS[number]
        swapped = kind == "swapped"
        corrupted.append(text.format(*(pair if swapped else (first, second)), place, other if swapped else third, thing))
        right.append(f" {other}")
        wrong.append(f" {giver}")
    return clean, corrupted, right, wrong


def gift_pairs() -> tuple[list[str], list[str], list[str], list[str]]:
    """Indirect objects in the language of the small model, the giver named as the other person."""
    gifts = [gift for gift in world.ioi(60, seed=0) if len(gift.prompt.split()) == 14][:16]
    swapped = [gift.answer.join(gift.prompt.rsplit(gift.giver, 1)) for gift in gifts]
    return [gift.prompt for gift in gifts], swapped, [gift.answer for gift in gifts], [gift.giver for gift in gifts]


def repeat_pairs() -> tuple[list[str], list[str], list[str], list[str]]:
    """Repeated words; in the corrupted text another one came after the last word before."""
    rows = [text.split() for text in world.repeats(16, 6, seed=0)]
    others = rows[1:] + rows[:1]
    corrupted = [" ".join([*row[:3], other[3], *row[4:9]]) for row, other in zip(rows, others, strict=True)]
    return [" ".join(row[:9]) for row in rows], corrupted, [row[3] for row in rows], [other[3] for other in others]


class Report:
    """Rows of a table, each with a claim that is checked."""

    def __init__(self) -> None:
        self.failed = 0

    def row(self, what: str, circuit: Circuit, seconds: float, at_least: float) -> None:
        """Print a circuit; its faithfulness is at least so much, and that of random ones at most a tenth."""
        curve = circuit.curve().set_index("edges")
        own = curve.loc[int(circuit.kept.sum())]
        enough = curve[curve.faithfulness >= 0.8].index
        holds = own.faithfulness >= at_least and own.random_most <= 0.1
        self.failed += not holds
        print(
            f"{what:44} {circuit.method:22} {own.name:5d} of {len(circuit.ends)} ({100 * own.share:4.1f} %)  "
            f"faithfulness {own.faithfulness:5.2f} [{own.low:5.2f}, {own.high:5.2f}]  without {own.without:5.2f}  "
            f"random {own.random:5.2f}, most {own.random_most:5.2f}  0.8 from {min(enough, default=0):5d} on  "
            f"{seconds:4.0f} s  {'as claimed' if holds else f'NOT as claimed: at least {at_least}'}",
            flush=True,
        )


def search(model: nn.Module, tokenizer: object, given: tuple[list[str], ...], **settings: object) -> tuple[Circuit, float]:
    """A circuit and the seconds that it took."""
    start = time.perf_counter()
    metric = logit_diff(given[2], given[3])
    circuit = CircuitSearch(model, tokenizer).run(given[0], given[1], metric, progress=False, **settings)  # type: ignore[arg-type]
    return circuit, time.perf_counter() - start


def main() -> int:
    """Print the table."""
    torch.set_num_threads(1)
    report = Report()
    small, words = fmr.zoo.load("facts")
    for what, given, share, least in (
        ("small: induction", repeat_pairs(), 0.05, 0.8),
        ("small: indirect object, swapped", gift_pairs(), 0.125, 0.8),
    ):
        for method in ("eap-ig", "eap"):
            report.row(what, *search(small, words, given, edges=share, method=method), least)
    talker, tokens = fmr.zoo.load("smollm2")
    sizes, known, new = [0.005, 0.01, 0.02, 0.05, 0.1], (PLACES, KNOWN), (NEW_PLACES, NEW)
    for what, sentences in (("the reference's", known), ("other sentences", new)):
        given = talker_pairs(*sentences, "swapped")
        for method in ("eap-ig", "eap"):
            report.row(f"SmolLM2: swapped, {what}", *search(talker, tokens, given, method=method, sizes=sizes), 0.8)
        given = talker_pairs(*sentences, "others")
        more = {"edges": 0.01, "sizes": [0.005, 0.02, 0.05], "signed": True}
        report.row(f"SmolLM2: other people, {what}", *search(talker, tokens, given, **more), 0.8)
        report.row(f"SmolLM2: other people, {what}", *search(talker, tokens, given, sizes=[0.01, 0.1, 0.2]), 0.2)
    return min(report.failed, 1)


if __name__ == "__main__":
    sys.exit(main())
