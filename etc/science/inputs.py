"""Whether attributions to inputs are complete on trained networks, and find what the networks go by.

    python etc/science/inputs.py

A classifier of photographs with reused ReLU6, a language model with gates, norms and grouped queries, an encoder with GELU
and the small model of facts: DeepLIFT on their operations and integrated gradients must sum to the difference that they
explain, where captum's own DeepLIFT misses it without a word. On the photographs what is taken away and put back in the
order of each method is compared with random orders, and the cells of each with those of occlusion. Each claim is checked;
the exit status is 1 where one fails.
"""

import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fmr
from analyzers import Attribution, InputAttribution
from analyzers.inputs.sanity import rank_correlation

CELLS = 7


def claimed(what: str, holds: bool) -> int:
    """Print a claim; 1 where it fails."""
    print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
    return int(not holds)


def by_cell(found: Attribution) -> Tensor:
    """The sums of scores in 7 x 7 cells of a picture."""
    scores = found.scores[0].double()
    side = scores.shape[0] // CELLS
    return scores.view(CELLS, side, CELLS, side).sum((1, 3)).flatten()


def captums(model: torch.nn.Module, x: Tensor, target: int) -> float:
    """How far captum's DeepLIFT is from being complete, from zero."""
    from captum.attr import DeepLift

    base = torch.zeros_like(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = DeepLift(model).attribute(x, base, target=target)
    with torch.no_grad():
        difference = float((model(x) - model(base))[0, target])
    return abs(float(found.detach().double().sum()) - difference) / abs(difference)


def photographs() -> int:
    """The classifier, on both photographs."""
    seer = fmr.zoo.load("efficientnet")
    asking, failed = InputAttribution(seer.model), 0
    for name, photo in fmr.zoo.photos().items():
        x = seer.preprocess(photo)
        with torch.no_grad():
            target = int(seer.model(x).argmax())
        print(f"{name}: {seer.labels[target]}")
        own, theirs = asking.run(x, target, "deeplift"), captums(seer.model, x, target)
        failed += claimed(f"DeepLIFT on operations is complete: gap {own.gap[0]:.1e} <= 1e-4", own.gap[0] <= 1e-4)
        apart = asking.run(x, target, "deeplift-reveal-cancel")
        failed += claimed(f"so it is by reveal-cancel: gap {apart.gap[0]:.1e} <= 1e-4", apart.gap[0] <= 1e-4)
        failed += claimed(f"captum's, on modules, is not, without a word: {theirs:.0%} > 10%", theirs > 0.1)
        plain = asking.run(x, target, "ig", baseline="blur", steps=64, most=64)
        ig = asking.run(x, target, "ig", baseline="blur")
        print(f"  64 points as they are: gap {plain.gap[0]:.2%}; then {ig.how}")
        failed += claimed(f"integrated gradients are complete to 1%: gap {ig.gap[0]:.2%}", bool(ig.complete))
        methods: dict[str, Attribution] = {
            "ig": ig,
            "deeplift": asking.run(x, target, "deeplift", baseline="blur"),
            "deeplift-reveal-cancel": asking.run(x, target, "deeplift-reveal-cancel", baseline="blur"),
            "occlusion": asking.run(x, target, "occlusion", baseline="blur", cells=CELLS),
            "kernel-shap": asking.run(x, target, "kernel-shap", baseline="blur", cells=CELLS),
        }
        occluded = by_cell(methods["occlusion"])
        for method, found in methods.items():
            curves = asking.curves(x, target, found, baseline="blur", draws=20)
            areas = {one: float(area[0]) for one, area in curves.areas().items()}
            like = rank_correlation(by_cell(found), occluded)
            failed += claimed(
                f"{method}: deletion {areas['deletion']:.2f} (random {areas['random deletion']:.2f}), insertion "
                f"{areas['insertion']:.2f} (random {areas['random insertion']:.2f}), better than {curves.better[0]:.0%} of "
                f"random orders; rank correlation with occlusion {like:.2f}",
                areas["deletion"] < areas["random deletion"]
                and areas["insertion"] > areas["random insertion"]
                and curves.better[0] >= 0.8,
            )
    sanity = asking.sanity(x, target, "deeplift", stages=3)
    print(sanity)
    return failed + claimed("DeepLIFT depends on what was learned", sanity.passed)


def words() -> int:
    """Language models and an encoder."""
    failed = 0
    cases: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("facts", "Junel Dunoth grew up in", ("Brigost", "Oranby"), {}),
        ("smollm2", "The capital of France is", (" Paris", " Rome"), {"attn_implementation": "eager"}),
        ("smollm2", "The capital of France is", (" Paris", " Rome"), {"attn_implementation": "sdpa"}),
        ("minilm", "A man plays the guitar on a stage.", lambda output: output.last_hidden_state.mean(1)[:, 0], {}),
    ]
    for name, text, target, config in cases:
        model, tokenizer = fmr.zoo.load(name, **config)
        asking = InputAttribution(model, tokenizer)
        ways = (("deeplift", 1e-5), ("deeplift-reveal-cancel", 1e-5), ("ig", 1e-2))
        for method, most in ways[: 2 if "sdpa" in config.values() else 3]:
            found = asking.run(text, target, method, baseline="zero" if name == "facts" else "mean")
            print(f"{name} {' '.join(config.values())}: {found.target[0]}, most on {found.strongest(3)}; {found.how}")
            failed += claimed(
                f"{method} is complete: gap {found.gap[0]:.1e} <= {most}", bool(found.gap[0] <= most) and not found.notes
            )
    return failed


def main() -> int:
    """Print every claim."""
    torch.set_num_threads(1)
    np.seterr(all="raise")
    began = time.perf_counter()
    failed = words()
    print(f"{time.perf_counter() - began:.0f} s so far")
    failed += photographs()
    print(f"{time.perf_counter() - began:.0f} s in all")
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
