"""What the engine costs: tracked runs as ratios to the plain forward, with the floors of the mechanism beside them.

Run it as `make bench`, or `python etc/bench/engine.py --quick` for a first look.
"""

import argparse
import ctypes
import gc
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import Clock, Ratio, Variant, child_cpu_seconds, compare, cpu_seconds
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fmr

TINY = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class Case(NamedTuple):
    """A model with its input, and how many calls make one sample."""

    name: str
    model: nn.Module
    ids: torch.Tensor
    calls: int = 1
    cache: bool = False

    def forward(self) -> object:
        with torch.no_grad():
            return self.model(self.ids, use_cache=self.cache)

    def run(self, **options: Any) -> fmr.Run:
        return fmr.run(self.model, self.ids, use_cache=self.cache, **options)


# ---- the floors: the least that each mechanism costs by itself


class NoOp(TorchFunctionMode):
    """Sees every call and does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Append(TorchFunctionMode):
    """Keeps every function and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tape.append((func, out))
        return out


def under(case: Case, make: Callable[[], TorchFunctionMode]) -> Variant:
    """The forward under a new mode."""

    def variant() -> object:
        with make():
            return case.forward()

    return variant


def hooked(case: Case) -> Variant:
    """The forward with a hook on each attention module that keeps its pattern."""
    modules = [module for name, module in case.model.named_modules() if name.endswith((".attn", ".self_attn"))]

    def variant() -> object:
        kept: list[torch.Tensor] = []
        handles = [module.register_forward_hook(lambda _m, _a, out: kept.append(out[1])) for module in modules]
        try:
            return case.forward(), kept
        finally:
            for handle in handles:
                handle.remove()

    return variant


# ---- the table


def row(what: str, value: str, spread: str, budget: str, verdict: str, floors: str = "") -> None:
    """Print one line."""
    print(f"{what:<50} {value:>8}  {spread:<11}  {budget:>7}  {verdict:<4}  {floors}".rstrip(), flush=True)


def heading(what: str) -> None:
    """Print how the rows were measured, and what their columns are."""
    print(f"{what}: CPU time on one torch thread, no_grad, eval, eager attention, use_cache=False.")
    print("Medians over rounds of variant / plain forward of the same round, in turns in one process; spread: quartiles.\n")
    row("what", "measured", "spread", "budget", "", "floors")


def judged(what: str, ratio: Ratio, budget: float | None = None, **floors: Ratio) -> None:
    """Print a measured ratio beside its budget and the floors."""
    beside = ", ".join(f"{name.replace('_', ' ')} {floor}" for name, floor in floors.items())
    limit, verdict = ("", "") if budget is None else (f"{budget:.2f}", "ok" if ratio.median <= budget else "OVER")
    row(what, f"{ratio.median:.3f}", f"{ratio.low:.2f}-{ratio.high:.2f}", limit, verdict, beside)


# ---- the rows


def gpt2(attention: str = "eager", **shape: int) -> nn.Module:
    """A GPT-2 architecture with seeded random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(attn_implementation=attention, **shape)).eval()


def llama_of(attention: str) -> nn.Module:
    """The shape of SmolLM2-135M, thirty layers, with seeded random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(**shape, num_key_value_heads=3, vocab_size=49152, attn_implementation=attention)
    return LlamaForCausalLM(config).eval()


def token_ids(model: nn.Module, length: int) -> torch.Tensor:
    """One sequence of random tokens."""
    return torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def attention_ids(case: Case) -> list[str]:
    """The IDs of every attention pattern, inside fused attention too."""
    return [node.id for node in case.run(keep="none").graph.find("*attn/*softmax#*")]


def recording(case: Case, clock: Clock, whole: float | None, graph: float | None, patterns: float | None) -> None:
    """Everything kept, the same with the graph built, and the attention patterns by ID in a later run."""
    wanted = attention_ids(case)
    at = clock.ratios(
        {
            "base": case.forward,
            "again": case.forward,
            "all": case.run,
            "graph": lambda: case.run().graph,
            "patterns": lambda: case.run(keep=wanted),
            "no-op": under(case, NoOp),
            "append": under(case, Append),
            "hooks": hooked(case),
        },
        case.calls,
    )
    judged(f"{case.name}: plain forward again ({at['base'].seconds * 1e3:.2f} ms)", at["again"])
    judged(f"{case.name}: record everything", at["all"], whole, no_op=at["no-op"], append=at["append"])
    judged(f"{case.name}: and build the graph", at["graph"], graph, append=at["append"])
    judged(f"{case.name}: {len(wanted)} patterns by ID", at["patterns"], patterns, hooks=at["hooks"])


def fused_patterns(case: Case, clock: Clock) -> None:
    """The attention patterns by ID where one kernel computes attention and no pattern exists; the base is that forward."""
    wanted = attention_ids(case)
    at = clock.ratios({"base": case.forward, "patterns": lambda: case.run(keep=wanted), "all": case.run}, case.calls)
    judged(f"{case.name}: record everything", at["all"])
    judged(f"{case.name}: {len(wanted)} patterns by ID, recomputed", at["patterns"])


def deep(clock: Clock) -> None:
    """A deep and narrow pretrained shape, eager and fused: everything, the graph, its patterns, one module's output."""
    for attention, limit in (("eager", 1.04), ("sdpa", 1.10)):
        model = llama_of(attention)
        case = Case(f"SmolLM2 1x14 {attention}", model, token_ids(model, 14))
        wanted = attention_ids(case)
        at = clock.ratios(
            {
                "base": case.forward,
                "all": case.run,
                "graph": lambda case=case: case.run(keep="none").graph,
                "patterns": lambda case=case, wanted=wanted: case.run(keep=wanted),
                "module": lambda case=case: case.run(keep="model.layers.12"),
                "no-op": under(case, NoOp),
                "append": under(case, Append),
            }
        )
        judged(f"{case.name}: record everything", at["all"], None, no_op=at["no-op"], append=at["append"])
        judged(f"{case.name}: the graph alone", at["graph"], 1.15, no_op=at["no-op"])
        judged(f"{case.name}: {len(wanted)} patterns by ID", at["patterns"], limit)
        judged(f"{case.name}: one module's output", at["module"])
        taken = min(cpu_seconds(partial(fmr.locate, case.run())) for _ in range(3))
        verdict, beside = "ok" if taken <= 0.5 else "OVER", f"forward {at['base'].seconds:.3f} s"
        row(f"{case.name}: locate with certificates", f"{taken:.3f} s", "", "0.500 s", verdict, beside)


def memory(case: Case) -> None:
    """The bytes that a run with every value holds, against the sum over its values."""
    run = case.run()
    values = [run[node.id] for node in run.graph.nodes if not node.id.is_source]
    own = {p.untyped_storage().data_ptr() for p in (*case.model.parameters(), *case.model.buffers())}
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in values}
    unique = sum(size for place, size in held.items() if place not in own) / 2**20
    total = sum(value.nbytes for value in values) / 2**20
    row(
        f"{case.name}: memory of every value", f"{unique:.1f}MB", "", "", "", f"sum over {len(values)} values {total:.1f} MB"
    )


def llama(clock: Clock) -> None:
    """The graph of a 70B-parameter shape on the meta device, which holds no weights."""
    case = llama_case()
    at = clock.ratios({"base": case.forward, "graph": lambda: case.run(keep="none").graph, "no-op": under(case, NoOp)})
    judged(f"{case.name}: graph ({at['graph'].seconds:.2f} s)", at["graph"], 3.0, no_op=at["no-op"])
    peak = float(subprocess.check_output([sys.executable, __file__, "--peak"], text=True))
    bare = float(subprocess.check_output([sys.executable, __file__, "--peak", "--bare"], text=True))
    verdict = "ok" if peak < 0.8 else "OVER"
    row(
        f"{case.name}: peak resident memory",
        f"{peak:.2f}GB",
        "",
        "0.80GB",
        verdict,
        f"model and forward alone {bare:.2f} GB",
    )


def locating() -> None:
    """Structure from the graph alone, of a 32-layer decoder and of one twice as deep; no garbage is collected within."""
    seconds = {}
    for layers in (32, 64):
        config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=8)
        with torch.device("meta"):
            model = LlamaForCausalLM(config).eval()
            graph = fmr.run(model, torch.zeros(1, 16, dtype=torch.long), keep="none").graph
        gc.collect()
        gc.disable()
        seconds[layers] = cpu_seconds(partial(fmr.locate, graph))
        gc.enable()
    verdict = "ok" if seconds[32] < 1.0 else "OVER"
    twice = f"64 layers take {seconds[64] / seconds[32]:.2f} times as long"
    row("locate in the graph of 32 layers", f"{seconds[32]:.3f} s", "", "1.000 s", verdict, twice)


def llama_case() -> Case:
    """A 70B-parameter Llama shape without its weights; without a cache its forward would ask a mask for its values."""
    with torch.device("meta"):
        config = LlamaConfig(**LLAMA_70B, num_key_value_heads=8, vocab_size=128256, attn_implementation="eager")
        return Case("Llama 70B, meta", LlamaForCausalLM(config).eval(), torch.zeros(1, 16, dtype=torch.long), cache=True)


def peak_gigabytes(bare: bool) -> float:
    """The peak resident memory of this process after one meta run."""
    case = llama_case()
    _ = case.forward() if bare else case.run(keep="none").graph
    status = Path("/proc/self/status")  # getrusage also counts what the parent held when it started this process
    if status.exists():
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024 / 1e9
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def importing(rounds: int) -> None:
    """`import fmr` against `import torch`, each in a new process."""
    samples: dict[str, list[float]] = {"torch": [], "fmr": []}
    for _ in range(rounds):
        for name, taken in samples.items():
            taken.append(child_cpu_seconds([sys.executable, "-c", f"import {name}"]))
    at = compare(samples)
    judged(f"import fmr / import torch ({at['torch'].seconds:.2f} s)", at["fmr"], 1.3)


def raise_mmap_threshold() -> bool:
    """Let glibc serve large blocks from its heap, so that freed pages stay mapped; this cannot be undone."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    heading("The engine of fmr")
    clock = Clock(rounds=7, seconds=6.0, least=3) if quick else Clock(rounds=21, seconds=24.0, least=7)
    tiny, small = gpt2(**TINY), gpt2()
    recording(Case("tiny 1x16", tiny, token_ids(tiny, 16), 8), Clock(clock.rounds * 2, clock.seconds), 2.2, 3.8, 1.35)
    recording(Case("small 1x32", small, token_ids(small, 32)), clock, 1.08, 1.12, 1.02)
    memory(Case("small 1x32", small, token_ids(small, 32)))
    long = Case("small 1x128", small, token_ids(small, 128))
    recording(long, clock, 1.10, None, None)
    fused = gpt2("sdpa", **TINY)
    fused_patterns(Case("tiny 1x16 sdpa", fused, token_ids(fused, 16), 8), clock)
    deep(clock)
    locating()
    llama(Clock(clock.rounds, 15.0, 3))
    importing(2 if quick else 5)
    if raise_mmap_threshold():
        print("\nglibc's mmap threshold raised, so that memory once freed stays mapped and costs no page faults:")
        recording(long, clock, 1.10, None, None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_gigabytes(options.bare))
    else:
        main(options.quick)
