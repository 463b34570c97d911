"""The engine on an accelerator: wall time of one forward, tracked in several ways, as ratios to the plain forward.

`python etc/bench/accelerator.py`: GPT-2 medium's shape, 8 x 512 tokens, bfloat16, medians over rounds in turns.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fmr

ROUNDS = 15


def main() -> int:
    if not torch.cuda.is_available():
        print("This bench needs a CUDA device; etc/bench/engine.py measures on the CPU.")
        return 1
    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).eval().to("cuda", torch.bfloat16)
    ids = torch.randint(0, 50000, (8, 512), device="cuda")
    with torch.no_grad():
        sites = [block.pattern for block in fmr.locate(fmr.run(model, ids[:1, :16], use_cache=False).graph).attention]
        report(measure(cases(model, ids, sites)))
    return 0


def cases(model: Any, ids: Any, sites: Any) -> dict[str, Callable[[], Any]]:
    def tracked(**options: Any) -> Callable[[], Any]:
        return lambda: fmr.run(model, ids, use_cache=False, **options)

    return {
        "plain": lambda: model(ids, use_cache=False),
        "plain again": lambda: model(ids, use_cache=False),
        "record everything": tracked(),
        "and build the graph": lambda: tracked()().graph,
        "graph alone": tracked(keep="none"),
        "24 patterns by ID": tracked(keep=sites),
        "24 patterns by ID, to the CPU": tracked(keep=sites, to="cpu"),
    }


def measure(variants: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS + 2):
        for name, variant in variants.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = variant()
            torch.cuda.synchronize()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
            del result
    return times


def report(times: dict[str, list[float]]) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: GPT-2 medium's shape, 8 x 512, bfloat16")
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["plain"], strict=True))
        print(f"{name:32s} {1e3 * statistics.median(taken):8.2f} ms  {ratio:6.3f}")


if __name__ == "__main__":
    sys.exit(main())
