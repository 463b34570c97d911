"""The pictures of the README, made from models that need no download: `python etc/images/make.py`."""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

import analyzers
import fmr
from analyzers import images
from analyzers.dictionaries import superposed

SENTENCE = "The cat sat on the mat because it was tired."
SAID = "When Mary and John went to the store, John gave a drink to Mary. When Tom and Anna went to the park, Anna gave it to"
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
    seen(out / "seen.jpg")
    why(out / "why.jpg")
    page(out / "page.jpg")
    superposition(out / "superposition.png")
    for path in sorted([*out.glob("*.svg"), *out.glob("*.png"), *out.glob("*.jpg")]):
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


SHOWN = {"mean": 127 / 255, "std": 128 / 255}
"""What the classifier of photographs is given: (image - mean) / std."""


def seen(path: Path) -> None:
    """Images made for three channels, from shallow to deep, and for a class of a pretrained classifier."""
    seer = fmr.zoo.load("efficientnet")
    eye = analyzers.FeatureVisualization(seer.model, size=176, **SHOWN)
    asked = [images.Channel(f"_blocks.{block}", channel) for block, channel in ((2, 3), (5, 7), (10, 20))]
    made = eye.run([*asked, images.Logit(seer.labels.index("daisy"))], steps=128, progress=False)
    figure, axes = plt.subplots(1, 4, figsize=(8.0, 2.3), layout="constrained")
    names = ("block 2, channel 3", "block 5, channel 7", "block 10, channel 20", "daisy")
    for ax, image, name, score, elsewhere in zip(axes, made.images, names, made.score, made.robust, strict=True):
        ax.imshow(image.permute(1, 2, 0))
        ax.set_title(f"{name}\n{score:.0f}, elsewhere {elsewhere:.0f}", fontsize=8)
        ax.set_axis_off()
    figure.savefig(path, dpi=100)


def why(path: Path) -> None:
    """Which pixels, and which words, an answer rests on."""
    seer = fmr.zoo.load("efficientnet")
    photo, daisy = seer.preprocess(fmr.zoo.photos()["flower"]), seer.labels.index("daisy")
    model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
    figure = plt.figure(figsize=(8.4, 2.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    pixels = analyzers.InputAttribution(seer.model).run(photo, daisy, "deeplift", baseline="blur", progress=False)
    pixels.plot(left.subplots())
    words = analyzers.InputAttribution(model, tokenizer)
    for ax, method in zip(right.subplots(3, 1), ("deeplift", "ig", "occlusion"), strict=True):
        told = ("Brigost", "Oranby")
        words.run("Junel Dunoth grew up in", told, method, baseline="padding", progress=False).plot(ax)
    figure.savefig(path, dpi=100)


def page(path: Path) -> None:
    """A page of a pretrained language model, as a browser shows it."""
    browser = next(found for name in ("chromium", "google-chrome") if (found := shutil.which(name)))
    model, tokenizer = fmr.zoo.load("smollm2", attn_implementation="eager")
    run = fmr.run(model, **tokenizer(SAID, return_tensors="pt"))
    with tempfile.TemporaryDirectory() as folder:
        fmr.page(run, fmr.locate(run), f"{folder}/page.html", tokens=tokenizer)
        quietly = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        asked = ["--window-size=1400,1180", f"--screenshot={folder}/page.png"]
        address = f"file://{folder}/page.html#layer=12&head=3&row=20&key=3"
        subprocess.run([browser, *quietly, *asked, address], check=True, capture_output=True)
        with Image.open(f"{folder}/page.png") as shown:
            shown.convert("RGB").resize((1050, 885), Image.Resampling.LANCZOS).save(path, quality=82)


def superposition(path: Path) -> None:
    """Toy models of superposition: figures of five features, what a feature has for itself, phases of two."""
    names = ("superposition", "superposition-geometry", "superposition-phases")
    (five, many, two), given = (fmr.zoo.load(name).model.weights for name in names), [*map(fmr.zoo.tasks.toys, names)]
    figure = plt.figure(figsize=(8.4, 4.3), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 3))
    for ax, weights, share in zip(above.subplots(1, len(five)), five, given[0].shares, strict=True):
        superposed.draw_features(weights, ax)
        ax.set_title(f"{share:.2g}", fontsize=8)
    above.suptitle("five features in two dimensions, by the share of examples that have each", fontsize=9)
    left, right = below.subplots(1, 2)
    superposed.draw_dimensionalities(many, given[1].shares.tolist(), left)
    left.set_title("80 features in twelve dimensions", fontsize=9)
    side = fmr.zoo.tasks.PHASES
    rows, columns = given[2].importance[::side, 1].tolist(), given[2].shares[:side].tolist()
    superposed.draw_phases(two.view(side, side, 2, 1), rows, columns, right)
    right.set_title("two features in one: shared (orange), alone (blue)", fontsize=9)
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
