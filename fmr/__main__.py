"""`python -m fmr demo`: a tour with a small trained language model, a pretrained one and an encoder, nothing downloaded."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fmr

PROMPT = "When Mary and John went to the store, John gave a drink to"
REPEATED = "The old clock in the kitchen was slow." + " The old clock in the kitchen was slow."
ROWS, LENGTH = 4, 40
"""Of the random tokens that induction is scored on: how many rows, and how many tokens before they are repeated."""
SENTENCES = ("The cat sat on the mat because it was tired.", "When Mary met John, she gave him the book.")


def main() -> int:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(prog="python -m fmr", description="Look inside any PyTorch model while it runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="tour two language models and an encoder")
    demo.add_argument("--out", default="out", type=Path, help="directory for the pictures (default: out)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    complete = [shown(part, out) for part in (language_model, pretrained_language_model, encoder)]
    print(f"\nPictures and graphs lie in {out}/.")
    return 0 if all(complete) else 1


def shown(part: Callable[[Path], None], out: Path) -> bool:
    """Show a part of the tour; where its model's package is missing, say which, and go on."""
    try:
        with torch.no_grad():
            part(out)
    except fmr.ZooError as error:
        say("   This part is left out", str(error))
        return False
    return True


def language_model(out: Path) -> None:
    """A model that was trained on a made-up world: its graph, its structure, what it answers."""
    model, tokenizer = fmr.zoo.load("facts")
    fact = fmr.zoo.world.facts()[0]
    inputs = tokenizer(fact.prompt, return_tensors="pt")
    start = time.perf_counter()
    run = fmr.run(model, **inputs)
    took = time.perf_counter() - start
    answer = tokenizer.decode(run.output.logits[0, -1].argmax())
    say("1. A language model trained on a made-up world", f"{fact.prompt!r} -> {answer!r} (the truth is {fact.answer!r})")
    say("   Every op of that forward, as a graph", f"tracked in {1e3 * took:.0f} ms", repr(run), repr(run.graph))
    structure = fmr.locate(run)
    say("   Its structure, found in the graph and certified from the values", repr(structure))
    pictures(run.graph, structure, {"language_model": {"depth": 2}}, out)


def pretrained_language_model(out: Path) -> None:
    """A real language model: its graph, its layers, and the head in it that continues what is repeated."""
    trained = fmr.zoo.load("smollm2")
    model, tokenizer = trained
    run = fmr.run(model, **tokenizer(PROMPT, return_tensors="pt"))
    structure = fmr.locate(run)
    answer = tokenizer.decode(run.output.logits[0, -1].argmax())
    say("2. A pretrained language model", repr(trained), f"{PROMPT!r} -> {answer!r}")
    say("   Its graph and its structure", repr(run.graph), repr(structure))

    scores = induction(model, structure, len(tokenizer))
    say(f"3. Its layers, and in each the head that most looks at what came next the last time, in {LENGTH} repeated tokens")
    for number, (layer, heads) in enumerate(zip(structure.layers, scores, strict=True)):
        say("", f"{number:2}  {layer!r}   head {int(heads.argmax())}: {float(heads.max()):.3f}")
    block, head = divmod(int(scores.argmax()), scores.shape[1])
    best, mean = float(scores.max()), float(scores.mean())
    say("", f"layer {block}, head {head} is an induction head: {best:.3f}; the mean of all {scores.numel()} is {mean:.3f}")

    inputs = tokenizer(REPEATED, return_tensors="pt")
    tokens = [tokenizer.decode(token) for token in inputs["input_ids"][0]]
    again = fmr.run(model, keep=[structure.attention[block].pattern], stop=True, **inputs)
    structure.attention[block].plot(again, tokens=tokens, heads=head).savefig(out / "induction.png", dpi=110)
    say("", f"{out / 'induction.png'}: its pattern on {REPEATED!r}")


def induction(model: torch.nn.Module, structure: Any, vocabulary: int) -> torch.Tensor:
    """For each layer and head, the share of its attention that goes to the token after the last occurrence of this one."""
    draw = torch.Generator().manual_seed(0)
    once = torch.randint(100, vocabulary, (ROWS, LENGTH), generator=draw)
    sites = [block.pattern for block in structure.attention]
    run = fmr.run(model, keep=sites, stop=True, input_ids=torch.cat([once, once], dim=1))
    return torch.stack([run[site].diagonal(1 - LENGTH, -2, -1)[..., 1:].mean((0, -1)) for site in sites])


def encoder(out: Path) -> None:
    """A real encoder: structure, the patterns of all heads by ID in a second run, pictures."""
    model, tokenizer = fmr.zoo.load("minilm")
    first, second = (tokenizer([sentence], return_tensors="pt") for sentence in SENTENCES)
    run = fmr.run(model, **first)
    structure = fmr.locate(run)
    say("4. A pretrained encoder, tracked on " + repr(SENTENCES[0]), repr(run.graph), repr(structure))

    sites = [block.pattern for block in structure.attention]
    again = fmr.run(model, keep=sites, stop=True, **second)
    tokens = tokenizer.convert_ids_to_tokens(second["input_ids"][0])
    say("5. Its 6 x 12 patterns by ID, in a second run on " + repr(SENTENCES[1]))
    for layer, site in enumerate(sites):
        say("", f"{site.id}  {tuple(again[site].shape)}  {strongest(again[site][0], tokens, layer)}")

    scope = structure.attention[0].scope
    pictures(run.graph, structure, {"encoder": {"depth": 2}, "attention": {"around": scope, "hops": 1}}, out)
    structure.attention[-1].plot(again, tokens=tokens).savefig(out / "patterns.png", dpi=110)
    say("", f"{out / 'patterns.png'}: the twelve heads of the last layer")


def strongest(pattern: torch.Tensor, tokens: list[str], layer: int) -> str:
    """Which token attends most to which other, special tokens aside, and in which head."""
    inner = pattern[:, 1:-1, 1:-1].clone()
    inner.diagonal(dim1=1, dim2=2).zero_()
    head, query, key = (int(i) for i in torch.unravel_index(inner.argmax(), inner.shape))
    return f"L{layer}.H{head}: {tokens[query + 1]!r} attends to {tokens[key + 1]!r} with {float(inner.max()):.2f}"


def pictures(graph: fmr.Graph, structure: Any, views: dict[str, dict[str, Any]], out: Path) -> None:
    """Write each view of a graph as DOT and, where Graphviz is installed, as SVG."""
    for name, options in views.items():
        graph.save_dot(out / f"{name}.dot", structure=structure, **options)
        try:
            graph.save_svg(out / f"{name}.svg", structure=structure, **options)
            say("", f"{out / name}.svg, {out / name}.dot")
        except fmr.DrawError as error:
            say("", f"{out / name}.dot", str(error))


def say(title: str, *lines: str) -> None:
    """Print a step of the tour and what it shows."""
    if title:
        print(f"\n{title}")
    for line in lines:
        print("   " + line.replace("\n", "\n   "))


if __name__ == "__main__":
    sys.exit(main())
