"""Whether trained networks compute by variables, by distributed alignment search: hierarchical equality, recalled facts.

    python etc/science/alignment.py

A network of three layers of 16 units learns whether two pairs of objects are alike, both or neither; an object is a vector
of four numbers that it has not seen before. A rotation of the first layer, eight directions for each pair, is trained on
interchanges, and tested on others with objects that neither saw; the controls are tested on the same. Then the network is
trained by interchanges itself, so that named units hold the variables.

A language model that knows where made-up people grew up is searched for the town, at each layer and at the tokens of the
name, behind it and at the end: 24 directions are trained on interchanges between some people and tested on others. Where
they are found is held against causal tracing of the same facts. Each claim is checked; the exit status is 1 where one fails.
"""

import random
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers import AlignmentSearch, CausalModel, CausalTracing, Counterfactuals, InterchangeTraining
from fmr.zoo import world

OBJECTS, NUMBERS = 200, 4
STEPS, BATCH = 2000, 512


def equality() -> CausalModel:
    """Whether the pairs agree, of objects by their number."""
    functions = {"wx": lambda w, x: w == x, "yz": lambda y, z: y == z, "out": lambda wx, yz: wx == yz}
    return CausalModel(dict.fromkeys("wxyz", range(OBJECTS)), functions, columns="torch")


def objects(seed: int) -> Tensor:
    """The vectors of objects."""
    return torch.rand(OBJECTS, NUMBERS, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def counterfactuals(causal: CausalModel, n: int, seed: int) -> Counterfactuals:
    """Interchanges of objects that no other seed has."""
    vectors = objects(seed)

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        return torch.cat([vectors[inputs[name].long()] for name in "wxyz"], 1)

    return causal.counterfactuals(n, encode=encode, seed=seed)


def trained(seed: int) -> nn.Sequential:
    """The network, trained on objects drawn anew for each batch."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(wide, 16), nn.ReLU()) for wide in (4 * NUMBERS, 16, 16)]
    model = nn.Sequential(*layers, nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, STEPS)
    for _ in range(STEPS):
        given, same = torch.rand(BATCH, 4, NUMBERS) * 2 - 1, torch.rand(BATCH, 2) < 0.5
        given[:, 1::2] = torch.where(same[..., None], given[:, ::2], given[:, 1::2])
        loss = nn.functional.cross_entropy(model(given.flatten(1)), (same[:, 0] == same[:, 1]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(True)


def claimed(what: str, holds: bool) -> int:
    """Print a claim; 1 where it fails."""
    print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
    return int(not holds)


def equality_network() -> int:
    """How many claims about the network of equality fail."""
    began = time.perf_counter()
    causal, model = equality(), trained(0)
    print(f"trained in {time.perf_counter() - began:.0f} s")
    train, test = counterfactuals(causal, 12_800, 1), counterfactuals(causal, 3_200, 2)
    rotation = fmr.subspaces.Rotation(16, seed=0)
    halves = {"wx": rotation[:8], "yz": rotation[8:]}
    settings = {"batch": 256, "progress": False}
    found = AlignmentSearch(model, causal, "0", halves).run(train, test, other="2", epochs=20, lr=1e-2, **settings)
    print(found)
    print(f"{time.perf_counter() - began:.0f} s so far")
    own = max(found.controls[name] for name in ("random subspace", "placebo", "shuffled labels", "untrained model"))
    units = {"wx": fmr.subspaces.Units(16, range(8)), "yz": fmr.subspaces.Units(16, range(8, 16))}
    induced = InterchangeTraining(model, causal, "0", units).run(train, test, epochs=10, lr=5e-3, **settings)
    print(induced)
    print(f"{time.perf_counter() - began:.0f} s in all")
    return sum(
        (
            claimed(f"the network knows equality of new objects: {found.task:.3f} >= 0.99", found.task >= 0.99),
            claimed(f"interchanges follow the algorithm: {found.iia[0]:.3f} >= 0.97", found.iia[0] >= 0.97),
            claimed(f"where they change the label, too: {found.changed[0]:.3f} >= 0.95", found.changed[0] >= 0.95),
            claimed(f"controls at that site are at chance: {own:.3f} <= 0.65", own <= 0.65),
            claimed(f"another layer holds them less well: {found.controls['another site']:.3f}",
                    found.controls["another site"] < found.iia[0] - 0.1),
            claimed(f"named units do after training: {induced.after['interchange']:.3f} >= 0.95",
                    induced.after["interchange"] >= 0.95),
            claimed(f"and the task is not lost: {induced.after['task']:.3f} >= {induced.before['task']:.3f} - 0.005",
                    induced.after["task"] >= induced.before["task"] - 0.005),
        )
    )  # fmt: skip


TOKENS = {"the name": [1, 2], "behind it": 3, "the end": -1}
"""Where a town is looked for in <bos> Junel Dunoth grew up in."""

RECALLED = {"the name": "all of the subject", "behind it": "first token after", "the end": "last token"}
"""What causal tracing calls these."""


def recall() -> int:
    """How many claims about the town of a person fail."""
    began = time.perf_counter()
    model, tokenizer = fmr.zoo.load("facts")
    facts = [one for one in [*world.facts(), *world.facts(taught=False)] if one.prompt.endswith("grew up in")]
    facts = [one for one in facts if len(one.subject.split()) == 2]
    random.Random(0).shuffle(facts)
    traced = CausalTracing(model, tokenizer).over(facts[::9], progress=False).result()
    states = traced.table().query("kind == 'state'").set_index(["layer", "column"]).effect
    (causal, train), (_, test) = (towns(part, tokenizer, n) for part, n in ((facts[:130], 3200), (facts[130:], 400)))
    structure = fmr.locate(fmr.run(model, **tokenizer(facts[0].prompt, return_tensors="pt")))
    sites = {
        (f"layer {n}", name): layer.resid_post.at(positions=at)
        for n, layer in enumerate(structure.layers)
        for name, at in TOKENS.items()
    }
    search = AlignmentSearch(model, causal, sites, fmr.subspaces.Rotation(128, 24), tokenizer=tokenizer)
    found = search.run(train, test, epochs=10, lr=2e-2, progress=False)
    effects = np.array([states[n, RECALLED[name]] for n in range(len(structure.layers)) for name in TOKENS])
    print(found)
    for (layer, name), accuracy, changed, effect in zip(sites, found.iia, found.changed, effects, strict=True):
        print(f"  {layer}, {name}: {accuracy:.3f}, {changed:.3f} where the town changes; tracing {effect:+.3f}")
    print(f"{time.perf_counter() - began:.0f} s")
    strong, weak, top = found.changed[effects > 0.5], found.changed[effects < 0.1], found.changed[effects.argmax()]
    tied = float(np.corrcoef(effects, found.changed)[0, 1])
    shuffled = found.controls_changed["shuffled labels"]
    own = max(found.controls_changed[name] for name in ("random subspace", "placebo", "untrained model"))
    return sum(
        (
            claimed(f"where tracing peaks, other people's towns follow: {top:.3f} >= 0.95", top >= 0.95),
            claimed(f"wherever it restores half of the answer: {strong.min():.3f} >= 0.6", strong.min() >= 0.6),
            claimed(f"and nowhere that it restores a tenth at most: {weak.max():.3f} <= 0.1", weak.max() <= 0.1),
            claimed(f"both maps agree: r = {tied:.3f} >= 0.9", tied >= 0.9),
            claimed(f"random directions, a placebo, an untrained model change nothing: {own:.3f} <= 0.15", own <= 0.15),
            claimed(f"directions of shuffled towns do less: {shuffled:.3f} <= {top:.3f} - 0.3", shuffled <= top - 0.3),
        )
    )


def towns(facts: list[world.Fact], tokenizer: Any, n: int) -> tuple[CausalModel, Counterfactuals]:
    """That a person has a town, which is said; interchanges of the towns of these people."""
    words = {one.answer: tokenizer(one.answer, add_special_tokens=False)["input_ids"][-1] for one in facts}
    causal = CausalModel(
        {"person": range(len(facts))},
        {"town": lambda person: facts[person].answer, "said": lambda town: words[town]},
    )
    data = causal.counterfactuals(
        n, ["town"], encode=lambda one: facts[one["person"]].prompt, label=lambda word: word, seed=n
    )
    return causal, data


def main() -> int:
    """Print every claim."""
    torch.set_num_threads(1)
    return min(1, equality_network() + recall())


if __name__ == "__main__":
    sys.exit(main())
