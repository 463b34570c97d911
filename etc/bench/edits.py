"""What edits, replays and sweeps cost: edited runs as ratios to the plain forward, sweeps in plain forwards.

Run it as `make bench`, or `python etc/bench/edits.py --quick` for a first look.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from engine import TINY, Case, gpt2, heading, judged, llama_of, row, token_ids
from timing import Clock, cpu_seconds
from torch import Tensor

import fmr
from fmr import edits
from fmr.structure.parts import Structure
from fmr.sweeps import logit_diff


def half(value: Tensor, _: edits.Context) -> Tensor:
    """An edit that changes every number."""
    return value * 0.5


def hooked(case: Case, path: str) -> Callable[[], object]:
    """The forward with a hook that returns another output: what an edit costs without IDs."""
    module = case.model.get_submodule(path)

    def variant() -> object:
        handle = module.register_forward_hook(lambda _m, _a, out: out * 0.5)
        try:
            return case.forward()
        finally:
            handle.remove()

    return variant


def editing(case: Case, clock: Clock, limit: float, named: float | None) -> None:
    """One edit: an op's value by its ID, and a named module's output; nothing else is watched or kept."""
    inside = fmr.locate(case.run()).mlps[0].post
    path = next(name for name, _ in case.model.named_modules() if name.endswith("0.mlp"))
    at = clock.ratios(
        {
            "base": case.forward,
            "op": lambda: case.run(keep=(), edits={inside: half}),
            "module": lambda: case.run(keep=(), edits={path: half}),
            "hook": hooked(case, path),
        },
        case.calls,
    )
    judged(f"{case.name}: one edit of an op by its ID", at["op"], limit, hook=at["hook"])
    judged(f"{case.name}: one edit of a module's output", at["module"], named, hook=at["hook"])


def fused(case: Case, clock: Clock, limit: float) -> None:
    """An edit of the pattern inside the fused kernel of one layer."""
    pattern = fmr.locate(case.run()).attention[0].pattern.at(heads=0)
    edited = partial(case.run, keep=(), edits={pattern: edits.Zero()})
    judged(
        f"{case.name}: a head's pattern edited inside",
        clock.ratios({"base": case.forward, "in": edited}, case.calls)["in"],
        limit,
    )


def replaying(case: Case, clock: Clock, limit: float) -> None:
    """One edit of each layer's residual stream, replayed from one recording: the mean over the layers."""
    run = case.run()
    points = [layer.resid_post for layer in fmr.locate(run).layers]
    same = all(
        torch.equal(
            fmr.replay(run, {point: edits.Scale(0.5)}).output.logits,
            case.run(keep=(), edits={point: edits.Scale(0.5)}).output.logits,
        )
        for point in points
    )

    def all_layers() -> None:
        for point in points:
            fmr.replay(run, {point: edits.Scale(0.5)})

    def plain() -> None:
        for _ in points:
            case.forward()

    at = clock.ratios({"base": plain, "replay": all_layers})
    judged(f"{case.name}: replay of one edit, {'bit-equal' if same else 'NOT EQUAL'}", at["replay"], limit)


# ---- sweeps: one whole call each, its recordings, probes and spot checks included


class Sweep(NamedTuple):
    """A sweep to measure: what to edit, with what, and the metric."""

    case: Case
    sites: Sequence[fmr.Site]
    edit: edits.Edit
    metric: Any
    at: int | None = None
    freeze: Sequence[fmr.Site] = ()


def swept(what: str, sweep: Sweep, budget: float, per: int, unit: str) -> None:
    """Print what one sweep takes, in plain forwards divided by `per`, the median of three with a forward beside each."""
    case, ratios = sweep.case, []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        forward = min(cpu_seconds(case.forward) for _ in range(3))
        start = time.process_time()
        found = whole(sweep)
        ratios.append((time.process_time() - start) / forward / per)
    low, value, high = sorted(ratios)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    verdict = "ok" if value <= budget else "OVER"
    row(
        f"{case.name}: {what}",
        f"{value:.3g}{unit}",
        f"{low:.3g}-{high:.3g}",
        f"{budget:g}",
        verdict,
        f"{found.how}, error {found.error:.0e}, {grown:.0f} MB more",
    )


def whole(sweep: Sweep) -> Any:
    """The sweep as a user asks for it."""
    inputs = {"input_ids": sweep.case.ids, "use_cache": False}
    asked = sweep.case.model, inputs, sweep.sites, sweep.edit, sweep.metric, sweep.at
    return fmr.sweep(*asked, freeze=sweep.freeze, progress=False)


def all_logits(output: Any) -> Tensor:
    """A metric that reads every position's logits, so that none can be left out."""
    return output.logits.log_softmax(-1)[..., 3].mean(-1)


def located(case: Case) -> Structure:
    """The structure of the model, from its graph and values."""
    return fmr.locate(case.run())


def other_run(case: Case) -> fmr.Run:
    """A run of the model on other tokens of the same number."""
    return fmr.run(case.model, case.ids.flip(1), use_cache=False)


def grid(structure: Structure, positions: int) -> list[fmr.Site]:
    """The residual stream after each layer, at each position."""
    return [layer.resid_post.at(positions=n) for layer in structure.layers for n in range(positions)]


def patched(case: Case, clean: edits.Edit) -> None:
    """Path patching of every head to the last token's logits: with the other heads frozen, and with all else frozen."""
    found = located(case)
    heads = [block.z.at(heads=n) for block in found.attention for n in range(block.n_heads)]
    frozen = [block.z for block in found.attention]
    direct = [*frozen, *(block.out for block in found.mlps)]
    for what, freeze, budget in (("heads frozen", frozen, 0.09), ("direct", direct, 0.07)):
        swept(f"paths of 144 heads, {what}", Sweep(case, heads, clean, logit_diff(3, 5), freeze=freeze), budget, 144, "")


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    heading("Edits, replays and sweeps of fmr")
    clock = Clock(rounds=7, seconds=6.0, least=3) if quick else Clock(rounds=21, seconds=24.0, least=7)
    tiny, small = gpt2(**TINY), gpt2()
    editing(Case("tiny 1x16", tiny, token_ids(tiny, 16), 8), Clock(clock.rounds * 2, clock.seconds), 1.20, 1.15)
    editing(Case("small 1x32", small, token_ids(small, 32)), clock, 1.02, None)
    sdpa = gpt2("sdpa", **TINY)
    fused(Case("tiny 1x16 sdpa", sdpa, token_ids(sdpa, 16), 8), clock, 1.8)
    twelve = Case("small 1x12", small, token_ids(small, 12))
    replaying(twelve, clock, 0.85)
    restores = grid(located(twelve), 12)
    clean = edits.Interchange(other_run(twelve))
    swept("144 restores, last token", Sweep(twelve, restores, clean, logit_diff(3, 5)), 0.18, 144, "")
    swept("144 restores, all logits", Sweep(twelve, restores, clean, all_logits), 0.35, 144, "")
    wide = Case("small 1x32", small, token_ids(small, 32))
    patched(wide, edits.Interchange(other_run(wide)))
    deep = llama_of("eager")
    long = Case("SmolLM2 1x16", deep, token_ids(deep, 16))
    clean = edits.Interchange(other_run(long))
    swept("grid of 30 layers x 16", Sweep(long, grid(located(long), 16), clean, logit_diff(3, 5)), 65, 1, " fwd")
    if not quick:
        prompts = torch.randint(0, 1000, (16, 14), generator=torch.Generator().manual_seed(0))
        many = Case("SmolLM2 16x14", deep, prompts)
        heads = [block.z.at(heads=n, positions=-1) for block in located(many).attention for n in range(block.n_heads)]
        clean = edits.Interchange(other_run(many))
        swept("z of 270 heads, two tokens", Sweep(many, heads, clean, logit_diff(3, 5)), 11, 1, " fwd")
        swept("z of 270 heads, all logits", Sweep(many, heads, clean, all_logits), 16, 1, " fwd")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, without the sweep of heads")
    main(parser.parse_args().quick)
