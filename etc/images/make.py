"""The pictures of the README, made from models that need no download: `python etc/images/make.py`."""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fmr

SENTENCE = "The cat sat on the mat because it was tired."
LARGEST = 300_000  # bytes of a picture


def main() -> None:
    """Read the command line and make the pictures."""
    parser = argparse.ArgumentParser(description="Make the pictures of the README.")
    parser.add_argument("--out", default=Path(__file__).parent, type=Path, help="folder for the pictures")
    out = parser.parse_args().out
    import matplotlib

    matplotlib.use("Agg")
    with torch.no_grad():
        encoder(out)
        layers(out / "layers.svg")
    for path in sorted([*out.glob("*.svg"), *out.glob("*.png")]):
        print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")
        assert path.stat().st_size < LARGEST, f"{path} is too large for a repository; expected less than {LARGEST} bytes"


def encoder(out: Path) -> None:
    """One attention of a pretrained encoder with its fused kernel written out, and where the heads of a layer look."""
    model, tokenizer = fmr.zoo.load("minilm")
    inputs = tokenizer([SENTENCE], return_tensors="pt")
    run = fmr.run(model, **inputs)
    structure = fmr.locate(run)
    scope = structure.attention[0].scope.rpartition(".")[0]
    run.graph.unfused.save_svg(out / "attention.svg", around=scope, hops=0, structure=structure)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    structure.attention[1].plot(run, tokens).savefig(out / "heads.png", dpi=100, metadata={"Software": None})


def layers(path: Path) -> None:
    """A model of twelve layers down to two levels of modules, equal layers folded."""
    torch.manual_seed(0)
    run = fmr.run(GPT2LMHeadModel(GPT2Config()).eval(), torch.arange(16)[None])
    run.graph.save_svg(path, depth=2, structure=fmr.locate(run))


if __name__ == "__main__":
    main()
