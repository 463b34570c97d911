"""What methods cost on pretrained models: whole calls in plain forwards of their batch, with all preparation.

Run it as `make bench`, or `python etc/bench/methods.py`.
"""

import statistics
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from engine import row
from timing import cpu_seconds

import fmr
from analyzers import (
    ActivationPatching,
    AttributionPatching,
    CausalModel,
    CausalTracing,
    CircuitSearch,
    Composition,
    FeatureVisualization,
    HeadClustering,
    Heads,
    InputAttribution,
    KeyValueMemories,
    LensTranslator,
    LogitAttribution,
    LogitLens,
    Modularity,
    PathPatching,
    ResidualDecomposition,
    StyleTransfer,
    images,
    sentences,
)
from analyzers.alignment.examples import examples_of
from analyzers.alignment.interchange import Network
from analyzers.alignment.training import frozen
from analyzers.images.ascent import Steps, adam, task_of
from analyzers.images.transformations import robust
from fmr.sweeps import logit_diff

PEOPLE = [("Mary", "John"), ("Alice", "Bob"), ("Tom", "James"), ("Sarah", "Peter"),
          ("Emma", "Frank"), ("Kate", "Simon"), ("Laura", "Kevin"), ("Anna", "David")]  # fmt: skip
GIFT = "When {} and {} went to the store, {} gave a drink to"
SUBJECT, ANSWER = "The Eiffel Tower", " Paris"
FACT = f"{SUBJECT}, seen from the river, stands in the middle of the city of"


def gifts() -> tuple[list[str], list[str], list[str], list[str]]:
    """Clean prompts, corrupted ones in which somebody else gives, and the right and the wrong answers."""
    clean = [GIFT.format(to, giver, giver) for to, giver in PEOPLE]
    others = [other for other, _ in PEOPLE[1:] + PEOPLE[:1]]
    corrupted = [GIFT.format(to, giver, other) for (to, giver), other in zip(PEOPLE, others, strict=True)]
    return clean, corrupted, [f" {to}" for to, _ in PEOPLE], [f" {giver}" for _, giver in PEOPLE]


def counted(what: str, call: Callable[[], Any], forward: Callable[[], object], budget: str, rounds: int = 3) -> None:
    """Print what a call takes in plain forwards, the median of a few with a forward beside each."""
    ratios = []
    for _ in range(rounds):
        plain = min(cpu_seconds(forward) for _ in range(3))
        ratios.append(cpu_seconds(call) / plain)
    spread = f"{min(ratios):.3g}-{max(ratios):.3g}"
    row(what, f"{statistics.median(ratios):.3g} fwd", spread, budget, "", f"forward {plain:.2f} s")


@torch.no_grad()
def forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> object:
    return model(**inputs)


def main() -> None:
    torch.set_num_threads(1)
    print("Methods on SmolLM2-135M, float32: CPU time on one torch thread, over that of the plain forward of their batch.\n")
    row("what", "measured", "spread", "budget", "", "")
    model, tokenizer = fmr.zoo.load("smollm2")
    clean, corrupted, right, wrong = gifts()
    metric = logit_diff(right, wrong)
    inputs = dict(tokenizer(clean, return_tensors="pt"))
    batch, given = (lambda: forward(model, inputs)), (clean, corrupted, metric)

    attribution = AttributionPatching(model, tokenizer, direction="noising")
    counted("attribution patching, 1,530 sites, located before", lambda: attribution.run(*given), batch, "3.1", 5)
    structure = fmr.locate(fmr.run(model, **{name: value[:2] for name, value in inputs.items()}))
    blocks = [layer.attention for layer in structure.layers if layer.attention is not None]
    heads = [block.z.at(heads=head, positions=-1) for block in blocks for head in range(block.n_heads)]
    patching = ActivationPatching(model, tokenizer, direction="noising")
    counted("z of 270 heads, last position", lambda: patching.run(*given, heads, progress=False), batch, "11")
    paths = PathPatching(model, tokenizer)
    counted("paths of 270 heads to the logits", lambda: paths.run(*given, heads, progress=False), batch, "")
    search = CircuitSearch(model, tokenizer)
    wanted = {"method": "eap", "sizes": [0.05], "random": 1, "progress": False}
    counted("a circuit by EAP, tested beside a random one", lambda: search.run(*given, **wanted), batch, "", 1)

    units = Modularity(model, tokenizer, layers="memories", scope="*.1[01].*")
    counted("the graph of 3,072 memories of two layers", lambda: copy(units).update(inputs).net(), batch, "", 1)
    acting = Modularity(model, tokenizer, graph="activations", layers="memories", scope="*.1[01].*").update(inputs)
    counted("counting what they do, a batch, located before", lambda: acting.update(inputs), batch, "1.3")

    fact = dict(tokenizer(FACT, return_tensors="pt"))
    tracing = CausalTracing(model, tokenizer, kinds=("state",), samples=1)
    long = f"30 layers x {fact['input_ids'].shape[1]} tokens"
    one = {"progress": False, "answer": ANSWER}
    what = f"causal tracing, {long}, with controls"
    counted(what, lambda: tracing.run(FACT, SUBJECT, **one), lambda: forward(model, fact), "65")
    readings(model, tokenizer, clean, inputs)
    attribution_to(model, tokenizer, fact)
    triggers(model, tokenizer)
    heads_of(model, tokenizer)
    alignment(model, tokenizer)
    made_images()


def readings(model: torch.nn.Module, tokenizer: Any, clean: list[str], inputs: dict[str, torch.Tensor]) -> None:
    """What the stream says, who wrote it, and maps to its end."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    right, wrong = ([f" {pair[place]}" for pair in PEOPLE] for place in (0, 1))
    lens, shares = LogitLens(model, tokenizer), LogitAttribution(model, tokenizer)
    parts, maps = ResidualDecomposition(model, tokenizer), LensTranslator(model, tokenizer)
    texts = sentences()[:32]
    tokens = dict(tokenizer(texts, return_tensors="pt", padding=True))
    for one in (lens, shares, parts):
        one._opened(clean)
    maps.update(texts[:2])

    def batch() -> object:
        return forward(model, inputs)

    counted("logit lens, 30 layers at the last position", lambda: lens.run(clean, position=-1), batch, "")
    counted("logits of names as sums over 270 heads", lambda: shares.run(clean, right, wrong), batch, "")
    counted("who wrote what, 61 parts", lambda: parts.run(clean), batch, "")
    counted("29 translators and their nulls, streamed", lambda: maps.update(texts), lambda: forward(model, tokens), "")


def attribution_to(model: torch.nn.Module, tokenizer: Any, fact: dict[str, torch.Tensor]) -> None:
    """Which tokens an answer rests on, against the mean embedding, with the place located and rows checked."""
    asking, long = InputAttribution(model, tokenizer), fact["input_ids"].shape[1]
    ways: dict[str, dict[str, Any]] = {
        "integrated gradients, 64 steps": {"method": "ig", "most": 64},
        "DeepLIFT, rescale": {"method": "deeplift"},
        "DeepLIFT, reveal-cancel": {"method": "deeplift-reveal-cancel"},
    }
    for name, way in ways.items():
        whole = {"baseline": "mean", "progress": False, **way}
        what = f"{name}, one text of {long} tokens"
        counted(what, lambda whole=whole: asking.run(FACT, ANSWER, **whole), lambda: forward(model, fact), "")


def triggers(model: torch.nn.Module, tokenizer: Any) -> None:
    """Memories counted over two batches, after two that fill their lists."""
    texts = [" ".join(sentences()[n : n + 3]) for n in range(0, 96, 3)]
    batches = [dict(tokenizer(texts[n : n + 8], return_tensors="pt", padding=True)) for n in (0, 8, 16, 24)]
    memories = KeyValueMemories(model, tokenizer).over(batches[:2], progress=False)
    sizes = " and ".join("x".join(map(str, batch["input_ids"].shape)) for batch in batches[2:])
    what = f"triggers of 46,080 memories, both signs, {sizes}"
    counted(
        what, lambda: memories.over(batches[2:], progress=False), lambda: [forward(model, b) for b in batches[2:]], "1.3"
    )


def heads_of(model: torch.nn.Module, tokenizer: Any) -> None:
    """What heads do, who reads whom, and which are alike."""
    ids = torch.randint(1000, 40000, (6, 81), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids}
    found = Heads(model, tokenizer)
    counted("jobs of 270 heads, six sequences of 81", found.run, lambda: forward(model, batch), "", 3)
    short = {"input_ids": ids[:1, :16]}
    reads = Composition(model)
    small = {"into": 17, "memories": False, "progress": False}
    counted("153 heads into one layer, by q, k and v", lambda: reads.run(short, **small), lambda: forward(model, short), "")
    for kind in ("attention", "beyond first", "output", "cka"):
        clusters = HeadClustering(model, distances=kind).update(batch)
        what = f"clustering a batch, {kind}"
        counted(what, lambda clusters=clusters: clusters.update(batch), lambda: forward(model, batch), "1.3")


def alignment(model: torch.nn.Module, tokenizer: Any) -> None:
    """Steps of alignment search in those of the plain model: two forwards and a backward of the same pairs."""
    people = len(PEOPLE)
    words = [tokenizer(f" {to}")["input_ids"][0] for to, _ in PEOPLE]
    causal = CausalModel({"who": range(people)}, {"to": lambda who: who, "said": lambda to: words[to]})
    data = causal.counterfactuals(64, ["to"], encode=lambda one: GIFT.format(*PEOPLE[one["who"]], PEOPLE[one["who"]][1]),
                                  label=lambda word: word)  # fmt: skip
    structure = fmr.locate(fmr.run(model, **tokenizer("Mary gave", return_tensors="pt")))
    tokens = dict(tokenizer(data.base[:32], return_tensors="pt"))
    for n in (2, 18):
        site, rotation = structure.layers[n].resid_post.at(positions=-1), fmr.subspaces.Rotation(576, 64)
        network, pairs = Network(model), examples_of(data, ["to"], model, tokenizer).rows(torch.arange(32))

        def step(network: Any = network, pairs: Any = pairs, site: Any = site, rotation: Any = rotation) -> None:
            rotation.zero_grad()
            with frozen(model):
                scores = network.interchanged(site, {"to": rotation}, pairs)
                torch.nn.functional.cross_entropy(scores, pairs.labels).backward()

        what = f"a step of DAS after layer {n}, 32 x {tokens['input_ids'].shape[1]}, over 2 fwd + bwd"
        counted(what, step, lambda: plain_step(model, tokens), "1.15")


def plain_step(model: torch.nn.Module, tokens: dict[str, torch.Tensor]) -> None:
    """Two forwards of the plain model, and a backward of one to its embeddings."""
    forward(model, tokens)
    with frozen(model):
        states = model.get_input_embeddings()(tokens["input_ids"]).detach().requires_grad_()  # type: ignore[operator]
        model(inputs_embeds=states, attention_mask=tokens["attention_mask"]).logits[:, -1].logsumexp(-1).sum().backward()


STEPS = 16
"""How many steps an image is made in."""


def made_images() -> None:
    """Images for a channel, and in a style, in forwards and backwards that a hook cuts off behind the deepest site."""
    model, size, shown = fmr.zoo.load("efficientnet").model, 176, {"mean": 127 / 255, "std": 128 / 255}
    view, photos = FeatureVisualization(model, size=size, **shown).view, fmr.zoo.photos()
    for path in ("_blocks.2", "_blocks.10", "_fc"):
        task = task_of(view, (images.Channel(path, 3),))
        spectrum = images.FFT(size)
        steps = Steps(spectrum, robust(spectrum.size), adam, STEPS, redirect=True, seed=0)

        def plain(path: str = path) -> None:
            for _ in range(STEPS):
                cut_off(model, view.inputs(torch.rand(1, 3, size, size)), path)

        what = f"{STEPS} steps of an image for {path}, over fwd + bwd"
        counted(what, lambda task=task, steps=steps: steps.run(task, False, ""), plain, "", 5)
    transfer = StyleTransfer(model, "_blocks.4", ["_blocks.0", "_blocks.2", "_blocks.7"], size=size, **shown)
    whole = lambda: transfer.run(photos["china"], photos["flower"], steps=STEPS, progress=False)  # noqa: E731
    counted(f"{STEPS} steps of style to _blocks.7, with nulls", whole, lambda: plain("_blocks.7"), "", 5)


class _Reached(Exception):
    """The site was reached."""


def cut_off(model: torch.nn.Module, inputs: torch.Tensor, path: str) -> None:
    """A forward up to a module, and the gradient of one of its channels at the inputs."""
    given, found = inputs.requires_grad_(), []

    def stop(module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        found.append(out)
        raise _Reached

    handle = model.get_submodule(path).register_forward_hook(stop)
    try:
        model(given)
    except _Reached:
        torch.autograd.grad(found[0][:, 3].mean(), given)
    finally:
        handle.remove()


if __name__ == "__main__":
    main()
