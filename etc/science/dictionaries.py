"""What sparse dictionaries find where it is known what is there, and what the usual scores make of dictionaries of nothing.

    python etc/science/dictionaries.py

Sums of a few of 64 known directions in 32 dimensions: each kind of autoencoder finds them, one of Gaussian values with the
same covariance does not. Then a layer of the zoo's language model: latents for the name that a sentence asks for, steering
along them beside random directions, and the loss with reconstructions in the place of values. The exit status is 1 where a
claim fails. One thread, some two minutes.
"""

import sys
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import fmr
from analyzers import DictionaryScores, DictionaryTraining, LatentSteering
from analyzers.dictionaries.dictionary import NULL, RANDOM
from fmr.zoo import world

KINDS: dict[str, dict[str, Any]] = {
    "top-k": {"k": 4, "epochs": 20},
    "relu": {"price": 0.3, "epochs": 40},
    "jumprelu": {"price": 0.02, "epochs": 40},
}
NAMES = ("Sarah", "Henry", "Bella", "Oscar", "Emma", "Quinn")


def claimed(what: str, holds: bool) -> int:
    """Print a claim; 1 where it fails."""
    print(f"  {'ok  ' if holds else 'NOT '} {what}", flush=True)
    return int(not holds)


def recovered(seed: int) -> int:
    """Known directions, by kind; the null of Gaussian values beside top-k."""
    draw = torch.Generator().manual_seed(1000 + seed)
    true = normalize(torch.randn(64, 32, generator=draw), dim=1)
    on = torch.rand(12_000, 64, generator=draw) < 3 / 64
    rows = on * (0.5 + torch.rand(on.shape, generator=draw)) @ true

    def near(decoder: Tensor) -> float:
        return float((true @ normalize(decoder.detach(), dim=1).T).max(1).values.mean())

    random = near(torch.randn(128, 32, generator=draw))
    wrong = 0
    for kind, settings in KINDS.items():
        made = DictionaryTraining(128, kind, lr=1e-2, seed=seed, **settings).run(
            rows, progress=False, controls=kind == "top-k"
        )
        found = near(made.autoencoder.decoder)
        wrong += claimed(
            f"{kind}: mean largest cosine {found:.3f} with the true directions, random ones {random:.3f}", found > 0.95
        )
        if made.null:
            null = near(made.rivals()[NULL].decoder)
            wrong += claimed(f"{kind} of Gaussian values of that covariance: {null:.3f}", null < (random + found) / 2)
    return wrong


def named() -> int:
    """Latents for names in a layer of a language model."""
    model, tokenizer = fmr.zoo.load("facts")
    structure = fmr.locate(fmr.run(model, **tokenizer("Junel Dunoth grew up in", return_tensors="pt")))
    site = structure.layers[2].resid_post
    texts = [f"{fact.prompt} {fact.answer}" for fact in world.facts()]
    texts += [f"{gift.prompt} {gift.answer}" for gift in world.ioi(600, seed=5)]
    batches = [tokenizer(texts[n : n + 64], return_tensors="pt", padding=True) for n in range(0, len(texts), 64)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = fmr.collect(model, batches, keep=[site], to=folder, progress=False)
        dictionary = DictionaryTraining(512, "top-k", 16, epochs=6).run(corpus, progress=False)
    print(dictionary)
    fresh = [f"{fact.prompt} {fact.answer}" for fact in world.facts(taught=False)[::40]]
    scored = DictionaryScores(model, tokenizer, dictionary, site).over(fresh, progress=False).result()
    told = {name: (scored.loss(name), scored.recovered(name)[0]) for name in ("clean", "dictionary", RANDOM, NULL)}
    print("  " + "; ".join(f"{name} {loss:.3f}, recovered {share:.3f}" for name, (loss, share) in told.items()))
    wrong = claimed("less than 0.05 nats are lost", told["dictionary"][0] < told["clean"][0] + 0.05)
    wrong += claimed("more than 0.9 is 'recovered' by an autoencoder that was never trained", told[RANDOM][1] > 0.9)
    with torch.no_grad():
        logits = structure.read_out(dictionary.autoencoder.decoder) - structure.read_out(torch.zeros(1, 128))
    steering = LatentSteering(model, tokenizer, dictionary, site.at(positions=-1))
    beat = 0
    for name in NAMES:
        token = tokenizer.convert_tokens_to_ids(name)
        prompts = [gift.prompt for gift in world.ioi(80, seed=9) if len(gift.prompt.split()) == 14 and gift.answer != name][
            :8
        ]
        latent = int(logits[:, token].argmax())
        steered = steering.run(prompts, latent, fmr.sweeps.log_prob(token), [2.0], draws=19, progress=False)
        beat += bool(steered.effect[0] > steered.random.max())
    return wrong + claimed(f"steering along a latent beats 19 random directions for {beat} of {len(NAMES)} names", beat >= 5)


def main() -> int:
    torch.set_num_threads(1)
    return int(bool(sum(recovered(seed) for seed in (0, 1)) + named()))


if __name__ == "__main__":
    sys.exit(main())
