"""What the engine costs on a GPU: seconds on the wall as ratios to the plain forward, in half precision.

Run it as `python etc/bench/gpu.py` where torch finds one. Weights are random: only shapes count here.
"""

import torch
from engine import row
from timing import Clock, Ratio, gpu_seconds
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fmr
from fmr import edits
from fmr.sweeps import logit_diff

SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
CLOCK = Clock(rounds=7, seconds=8.0, least=5, timer=gpu_seconds)


def llama_of(shape: dict[str, int], attention: str) -> nn.Module:
    """A decoder of a shape, made on the GPU in bfloat16."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation=attention)).eval()
    finally:
        torch.set_default_dtype(before)


def shown(what: str, ratio: Ratio) -> None:
    row(what, f"{ratio.median:.2f}", f"{ratio.low:.2f}-{ratio.high:.2f}", "", "", f"{ratio.seconds * 1e3:.1f} ms")


def measured(name: str, model: nn.Module, ids: torch.Tensor) -> None:
    """Everything, the graph, patterns, one module, one edit; what a replay gives, and what locating takes."""

    def run(**options: object) -> fmr.Run:
        return fmr.run(model, ids, use_cache=False, **options)

    whole = run()
    taken = gpu_seconds(lambda: fmr.locate(whole))
    structure = fmr.locate(whole)
    certified = sum(bool(one.certified) for one in (*structure.attention, *structure.mlps))
    point, patterns = structure.layers[0].resid_post, [block.pattern for block in structure.attention]
    edit = {point: edits.Scale(0.5)}
    at = CLOCK.ratios(
        {
            "base": lambda: model(ids, use_cache=False),
            "all": run,
            "graph": lambda: run().graph,
            "patterns": lambda: run(keep=patterns),
            "module": lambda: run(keep="model.layers.3"),
            "edit": lambda: run(keep=(), edits=edit),
        }
    )
    row(f"{name}: plain forward", "", "", "", "", f"{at['base'].seconds * 1e3:.1f} ms")
    shown(f"{name}: record everything", at["all"])
    shown(f"{name}: and build the graph", at["graph"])
    shown(f"{name}: {len(patterns)} patterns by ID", at["patterns"])
    shown(f"{name}: one module's output", at["module"])
    shown(f"{name}: one edit", at["edit"])
    row(f"{name}: locate", f"{taken:.2f} s", "", "", "", f"{certified} of {2 * len(structure.layers)} parts certified")
    same = torch.equal(fmr.replay(whole, edit).output.logits, run(keep=(), edits=edit).output.logits)
    row(f"{name}: a replay is the edited model to the bit", str(same), "", "", "")


def swept(name: str, model: nn.Module, ids: torch.Tensor) -> None:
    """Causal tracing: every layer by every position, in one sweep."""
    run = fmr.run(model, ids, use_cache=False)
    places = [layer.resid_post.at(positions=t) for layer in fmr.locate(run).layers for t in range(ids.shape[1])]
    clean = edits.Interchange(fmr.run(model, ids.flip(1), use_cache=False))
    inputs = {"input_ids": ids, "use_cache": False}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    grids: list[fmr.sweeps.grid.Grid] = []
    seconds = gpu_seconds(lambda: grids.append(fmr.sweep(model, inputs, places, clean, logit_diff(3, 5), progress=False)))
    forward = min(gpu_seconds(lambda: model(ids, use_cache=False)) for _ in range(3))
    more = (torch.cuda.max_memory_allocated() - held) / 2**30
    what = f"{grids[0].how}, {seconds:.1f} s, {more:.1f} GB more"
    row(f"{name}: {len(places)} restores, in forwards", f"{seconds / forward:.0f}", "", "", "", what)


def main() -> None:
    torch.set_grad_enabled(False)
    print(f"fmr on one {torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16: wall time, medians, in turns.\n")
    row("what", "measured", "spread", "", "", "")
    for name, shape, attention, batch, length in (
        ("SmolLM2 16x128 sdpa", SMALL, "sdpa", 16, 128),
        ("8B 1x128 sdpa", LARGE, "sdpa", 1, 128),
        ("8B 4x512 eager", LARGE, "eager", 4, 512),
    ):
        measured(name, llama_of(shape, attention), torch.randint(0, 1000, (batch, length), device="cuda"))
        torch.cuda.empty_cache()
    for name, shape in (("SmolLM2 1x16 sdpa", SMALL), ("8B 1x16 sdpa", LARGE)):
        swept(name, llama_of(shape, "sdpa"), torch.randint(0, 1000, (1, 16), device="cuda"))


if __name__ == "__main__":
    main()
