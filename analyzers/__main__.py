"""`python -m analyzers`: what methods find in pretrained models, each with its picture: causes first, then readings."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from torch import nn

import analyzers
import fmr

BATCH = 32

GIFT = "When {} and {} went to the store, {} gave a drink to"
NAMES = (("Mary", "John", "Tom"), ("Anna", "Mark", "Paul"))
"""Who is given something, who gives, and who gives in the corrupted prompt."""


def main() -> int:
    """Read the command line, run the methods, print what they find and save their pictures."""
    parser = argparse.ArgumentParser(prog="python -m analyzers", description="What methods find in pretrained models.")
    parser.add_argument("--out", default="out", type=Path, help="directory for the pictures (default: out)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    clustered(out)
    model, tokenizer = fmr.zoo.load("smollm2")
    traced(model, tokenizer, out)
    patched(model, tokenizer, out)
    read_out(model, tokenizer, out)
    remembered(model, tokenizer, out)
    named(model, tokenizer, out)
    divided(model, tokenizer, out)
    looked_around(model, tokenizer, out)
    rested_on(model, tokenizer, out)
    sought(out)
    taken_apart(out)
    shortened(out)
    kept(out)
    print(f"\nPictures, tables and pages lie in {out}/.")
    return 0


def clustered(out: Path) -> None:
    """The heads of the encoder by what they look at."""
    model, tokenizer = fmr.zoo.load("minilm")
    sentences = analyzers.sentences()
    print(f"\n6. The encoder's heads, clustered by what they attend to in {len(sentences)} sentences")
    clusters = analyzers.HeadClustering(model).over(list(batches(tokenizer, sentences)), progress=True).result()
    shown(clusters, out / "heads.png")
    clusters.table().to_csv(out / "heads.csv")
    print(f"   {out / 'heads.png'}: the map; {out / 'heads.csv'}: one row a head")


def traced(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Where the language model recalls a fact."""
    prompt, subject = "The Eiffel Tower is located in the city of", "The Eiffel Tower"
    print(f"\n7. Where the language model recalls what follows {prompt!r}")
    tracing = analyzers.CausalTracing(model, tokenizer, kinds=("state",), samples=1)
    shown(tracing.run(prompt, subject), out / "tracing.png")
    print(f"   {out / 'tracing.png'}: what each state brings back of the answer, by token and layer")


def patched(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Which states and heads of the language model know to whom something is given."""
    clean = [GIFT.format(to, giver, giver) for to, giver, _ in NAMES]
    corrupted = [GIFT.format(to, giver, other) for to, giver, other in NAMES]
    print(f"\n8. What makes {clean[0]!r} go on with {NAMES[0][0]!r}: patched from it into {corrupted[0]!r}")
    who = fmr.sweeps.logit_diff([f" {to}" for to, _, _ in NAMES], [f" {giver}" for _, giver, _ in NAMES])
    shown(analyzers.ActivationPatching(model, tokenizer).run(clean, corrupted, who), out / "patching.png")
    print(f"   {out / 'patching.png'}: the effect of every state, attention, memory and head")


def read_out(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """What the language model would say if it ended earlier, and who wrote its answer."""
    prompt = "The city of Shanghai is located in the country of"
    print(f"\n9. What the stream says after each layer of {prompt!r}, and which heads wrote {NAMES[0][0]!r}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    maps = analyzers.LensTranslator(model, tokenizer).over(analyzers.sentences()[:96], progress=True)
    shown(analyzers.LogitLens(model, tokenizer, maps.result()).run(prompt), out / "lens.png")
    given = [GIFT.format(to, giver, giver) for to, giver, _ in NAMES]
    right, wrong = [f" {to}" for to, _, _ in NAMES], [f" {giver}" for _, giver, _ in NAMES]
    shown(analyzers.LogitAttribution(model, tokenizer).run(given, right, wrong), out / "attribution.png")
    shown(analyzers.ResidualDecomposition(model, tokenizer).run(prompt), out / "decomposition.png")
    print(f"   {out / 'lens.png'}: raw, through fitted maps, through their null; {out / 'attribution.png'}: heads, layers")
    print(f"   {out / 'decomposition.png'}: what each attention and memory wrote, by token")


def remembered(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Which memories promote an answer."""
    prompt, answer = "The Eiffel Tower is located in the city of", " Paris"
    print(f"\n10. Which memories promote {answer!r} after {prompt!r}")
    shown(analyzers.KeyValueMemories(model, tokenizer).promotion(prompt, answer), out / "promotion.png")
    print(f"   {out / 'promotion.png'}: what the memories of each layer add to it, beside other words")


def named(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """What heads do, and which one an induction head reads."""
    print("\n11. The jobs of heads, and whom the keys of an induction head read")
    shown(analyzers.Heads(model, tokenizer, examples=3).run(), out / "jobs.png")
    reads = analyzers.Composition(model, tokenizer).run("It rains.", into=17, memories=False)
    shown(reads, out / "composition.png", reader="17.3", role="k")
    print(f"   {out / 'jobs.png'}: each head's scores beside nulls; {out / 'composition.png'}: 16.0 works for 17.3")


def divided(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Whether the memories of two layers fall into parts."""
    print("\n12. Communities of the memories of two layers, by the strongest of their edges, beside two kinds of nulls")
    given: dict[str, Any] = {"layers": "memories", "scope": "*.1[01].*", "edges": [0.02], "draws": 2}
    shown(analyzers.Modularity(model, tokenizer, **given).run("The store is closed."), out / "communities.png")
    print(f"   {out / 'communities.png'}: the network, and its modularity among those of the nulls")


def looked_around(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """A page of one run for a browser."""
    prompt = GIFT.format(*NAMES[0][:2], NAMES[0][1])
    print(f"\n13. A page to look around in what happens on {prompt!r}")
    run = fmr.run(model, **tokenizer(prompt, return_tensors="pt"))
    fmr.page(run, fmr.locate(run), out / "page.html", tokens=tokenizer)
    print(f"   {out / 'page.html'}: layers, heads, memories, norms and the logit lens; open it in a browser")


def rested_on(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """Which words and which pixels an answer rests on."""
    prompt, told = "The Eiffel Tower is located in the city of", (" Paris", " London")
    print(f"\n14. Which words {told[0]!r} instead of {told[1]!r} rests on, and which pixels a classifier's 'daisy'")
    words = analyzers.InputAttribution(model, tokenizer).run(prompt, told, "deeplift", baseline="zero", progress=True)
    shown(words, out / "words.png")
    seer = fmr.zoo.load("efficientnet")
    assert seer.preprocess is not None
    photo, daisy = seer.preprocess(fmr.zoo.photos()["flower"]), seer.labels.index("daisy")
    shown(analyzers.InputAttribution(seer.model).run(photo, daisy, "deeplift", baseline="blur"), out / "pixels.png")
    print(f"   {out / 'words.png'}, {out / 'pixels.png'}: their shares, which add up to the difference that they explain")


def sought(out: Path) -> None:
    """What units of the classifier look for."""
    print("\n15. What three channels and a class of the classifier look for, and what photographs hold of it")
    seer = fmr.zoo.load("efficientnet")
    assert seer.preprocess is not None
    given: dict[str, Any] = {"mean": 127 / 255, "std": 128 / 255}
    asked = [analyzers.images.Channel(f"_blocks.{block}", channel) for block, channel in ((2, 3), (5, 7), (10, 20))]
    eye = analyzers.FeatureVisualization(seer.model, size=128, **given)
    shown(eye.run([*asked, analyzers.images.Logit(seer.labels.index("daisy"))], steps=96), out / "sought.png")
    photos = [seer.preprocess(photo) for photo in fmr.zoo.photos().values()]
    crops = analyzers.TopImages(seer.model, "_blocks.2", [3, 5], **given).over(photos).result()
    shown(crops, out / "crops.png")
    print(f"   {out / 'sought.png'}: images made for them; {out / 'crops.png'}: where photographs excite two channels most")


def taken_apart(out: Path) -> None:
    """A dictionary for one layer of the model of facts."""
    from fmr.zoo import world

    print("\n16. A layer of the small model of facts as few of many directions")
    model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
    told = [f"{fact.prompt} {fact.answer}" for fact in world.facts()[::4]]
    layer = fmr.locate(fmr.run(model, **tokenizer(told[0], return_tensors="pt"))).layers[2].resid_post
    with tempfile.TemporaryDirectory() as folder:
        inputs = [tokenizer(told[n : n + BATCH], return_tensors="pt", padding=True) for n in range(0, len(told), BATCH)]
        corpus = fmr.collect(model, inputs, [layer], folder, progress=False)
        dictionary = analyzers.DictionaryTraining(256, "top-k", k=8, epochs=10).run(corpus)
    shown(dictionary, out / "dictionary.png")
    pages = analyzers.LatentContexts(model, tokenizer, dictionary, layer).over(told[:128]).result()
    pages.save_html(out / "latents.html")
    print(f"   {out / 'dictionary.png'}: beside rivals; {out / 'latents.html'}: where its latents are on, and what they say")


def shortened(out: Path) -> None:
    """What each layer, memory and head is worth, and what the model says without one."""
    model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
    told = "Junel Dunoth grew up in Brigost"
    print(f"\n17. The loss of {told!r} without each layer, memory and head, and the model without a layer")
    costs = analyzers.Ablation(model, tokenizer).run([told])
    shown(costs, out / "costs.png")
    inputs = tokenizer(told.removesuffix(" Brigost"), return_tensors="pt")
    structure = fmr.locate(fmr.run(model, **inputs))
    for layer in range(len(structure.layers)):
        with analyzers.Surgery(model, structure).delete(layer):
            print(f"   without layer {layer} it goes on with {tokenizer.decode(model(**inputs).logits[0, -1].argmax())!r}")
    print(f"   {out / 'costs.png'}: the loss without each part, beside a random change as large")


def kept(out: Path) -> None:
    """An experiment and a hypothesis in a lab, and its report."""
    print("\n18. An experiment kept with its code, seed and versions, and a hypothesis beside its null")
    model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
    shutil.rmtree(out / "lab", ignore_errors=True)
    lab = analyzers.Lab(model, out / "lab", tokenizer)

    @lab.experiment
    def surest(logit_lens: Any, prompt: str) -> Any:
        return logit_lens.run(prompt)

    def other_tokens(heads: Any, seed: int) -> float:
        return float(heads.run(seed=seed).null("induction").max())

    @lab.hypothesis(null=other_tokens, test="permutation")
    def induces(heads: Any, seed: int) -> float:
        return float(heads.run(seed=seed).score("induction").max())

    surest("Junel Dunoth grew up in")
    outcome = induces.over(seeds=range(8))
    print("   " + repr(lab).replace("\n", "\n   "))
    shown(outcome, out / "hypothesis.png")
    lab.report(out / "lab.html")
    print(f"   {out / 'lab.html'}: all that was kept, without a server; {out / 'hypothesis.png'}: the seeds and their null")


def shown(result: Any, path: Path, **how: Any) -> None:
    """Print a result and save its picture."""
    print("   " + repr(result).replace("\n", "\n   "))
    figure = result.plot(**how)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def batches(tokenizer: Any, sentences: list[str]) -> Iterator[Any]:
    """The sentences as padded batches of model inputs."""
    for start in range(0, len(sentences), BATCH):
        yield tokenizer(sentences[start : start + BATCH], return_tensors="pt", padding=True)


if __name__ == "__main__":
    sys.exit(main())
