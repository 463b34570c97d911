"""What trained language models know, which weights tell it, and what they can do without, each beside its null.

    python etc/science/knowledge.py

Capitals in SmolLM2-135M-Instruct and towns in the small model that ships with fmr: completions among false ones with their
calibration, relations read out of OV circuits and values, the cost of each layer, and the loss of pruned models. Each claim
is checked; the exit status is 1 where one fails.
"""

import sys
import time

import analyzers
import fmr
from fmr.zoo import world

CAPITALS = """France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, England London, Ireland Dublin,
    Greece Athens, Poland Warsaw, Hungary Budapest, Austria Vienna, Russia Moscow, Japan Tokyo, China Beijing, India Delhi,
    Egypt Cairo, Kenya Nairobi, Cuba Havana, Peru Lima, Chile Santiago, Norway Oslo, Sweden Stockholm, Finland Helsinki,
    Denmark Copenhagen, Turkey Ankara, Iran Tehran, Iraq Baghdad, Thailand Bangkok, Vietnam Hanoi, Canada Ottawa,
    Belgium Brussels, Nepal Kathmandu"""

failed: list[str] = []


def check(claim: str, holds: bool) -> None:
    """Print a claim and whether it holds."""
    print(f"  {'holds' if holds else 'FAILS'}: {claim}")
    if not holds:
        failed.append(claim)


def capitals() -> None:
    """What a pretrained model knows of capitals, and who says it."""
    model, tokenizer = fmr.zoo.load("smollm2")
    pairs = dict(pair.split() for pair in CAPITALS.split(","))
    facts = [{"prompt": f"The capital of {one} is", "answer": other, "relation": "capital"} for one, other in pairs.items()]
    known = analyzers.KnowledgeProbe(model, tokenizer).run(facts, false=8, progress=False)
    print(known)
    check("more than 9 of 10 capitals are known, and no more than chance with another's", known.accuracy > 0.9)
    check("the null is at chance", known.accuracy_null < 0.3)
    check("it is as sure as it is right, within 0.05", known.ece < 0.05)
    truth = {
        f"The capital of {one}": f" {other}"
        for one, other in pairs.items()
        if len(tokenizer(f" {other}", add_special_tokens=False)["input_ids"]) == 1
    }
    found = analyzers.TokenRelations(model, tokenizer).run(list(truth), list(truth.values()))
    told = found.against(truth)
    print(found, told.head(5).round(3), sep="\n")
    edges = found.graph().edges
    true = sum(truth[one] == other for one, other in edges)
    print(f"  {true} of {len(edges)} edges are true, of {len(truth)} that are")
    check("one head writes what is nearest to the own capital for 9 of 10 countries", told["first"][0] > 0.9)
    check("exchanged capitals are found by chance", told["null"][0] < 0.1)


def towns() -> None:
    """What a small model knows of towns: in its memories, once it is asked."""
    model, tokenizer = fmr.zoo.load("facts")
    cities = {fact.subject: fact.answer for fact in world.facts() if fact.relation == "city"}
    relations, objects = analyzers.TokenRelations(model, tokenizer), sorted(set(cities.values()))
    best = {}
    for form in ("{}", "{} grew up in"):
        truth = {form.format(subject): answer for subject, answer in cities.items()}
        found = relations.run(list(truth), objects)
        told = found.against(truth)
        edges = found.graph().edges
        print(form, told.head(4).round(3), sep="\n")
        print(
            f"  {sum(truth[one] == other for one, other in edges)} of {len(edges)} edges are true, of {len(truth)} that are"
        )
        best[form] = told.iloc[0]
    check("asked, a memory speaks most for the own town of 9 of 10", best["{} grew up in"]["first"] > 0.9)
    check("and it is a memory", best["{} grew up in"]["part"].startswith("memory"))
    check("at the bare name no part does for half of them", best["{}"]["first"] < 0.5)


def without() -> None:
    """What a small model can do without."""
    model, tokenizer = fmr.zoo.load("facts")
    texts = [f"{fact.prompt} {fact.answer}" for fact in world.facts()[::90]]
    costs = analyzers.Ablation(model, tokenizer).run(texts, progress=False)
    print(costs)
    check("each layer costs more than a random change as large", bool((costs.cost > costs.control)[[0, 6, 12, 18]].all()))
    print(analyzers.ActivationSparsity(model, tokenizer).over(texts, progress=False).result())
    for what in ("coefficients", "weights"):
        curves = analyzers.Pruning(model, tokenizer).run(texts, what, keep=[1.0, 0.7, 0.5, 0.3, 0.1])
        print(curves)
        by_size, random = curves.loss[0, 2] - curves.base, curves.loss[2, 2] - curves.base
        check(f"half of the {what} by magnitude cost less than 0.1 nats, at random more than 1", by_size < 0.1 < 1 < random)


def main() -> int:
    """Run every part; 1 where a claim fails."""
    for part in (capitals, towns, without):
        start = time.time()
        print(f"{part.__doc__}")
        part()
        print(f"  {time.time() - start:.0f} s\n")
    print(f"{len(failed)} claims fail")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
