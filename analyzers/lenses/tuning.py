"""A translator trained further: by what the model would say, where least squares go by the distance of states."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from analyzers.lenses.translator import Translator
from fmr.structure.parts import Structure
from fmr.sweeps.bars import hidden

States = tuple[dict[str, Tensor], Tensor]
"""The stream after each layer and at its end, at some tokens: (tokens, width) each."""


@dataclass(eq=False)
class _Map:
    """A map while it is trained: what is added to it, in units of the deviations of its input and of its output."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    size: Tensor

    def __post_init__(self) -> None:
        self.more = torch.zeros_like(self.weight, requires_grad=True)
        self.shift = torch.zeros_like(self.bias, requires_grad=True)

    def __call__(self, states: Tensor) -> Tensor:
        added = ((states - self.mean) / self.scale) @ self.more + self.shift
        return states @ self.weight + self.bias + added * self.size

    def folded(self) -> tuple[Tensor, Tensor]:
        """The same as one weight and one bias."""
        with torch.no_grad():
            weight = self.weight + self.more / self.scale[:, None] * self.size
            return weight, self.bias + self.shift * self.size - self.mean @ (weight - self.weight)


def tuned(
    structure: Structure,
    translator: Translator,
    texts: Sequence[States],
    held: Sequence[States],
    layers: Sequence[str],
    *,
    steps: int,
    learning_rate: float,
    tokens: int,
    seed: int,
    progress: bool | None,
) -> Translator:
    """Train the maps of some layers by Adam on KL(model || lens), from where they are; the KL on held-out states before and
    after goes with them."""
    draw, maps, biases = torch.Generator().manual_seed(seed), translator.maps.clone(), translator.biases.clone()
    before, after = {}, {}
    for layer in tqdm(layers, desc="tuning", unit="layer", disable=hidden(progress)):
        place = translator.points.index(layer)
        x, y = (torch.cat(parts).float() for parts in zip(*((states[layer], end) for states, end in texts), strict=True))
        own = _Map(maps[place].to(x), biases[place].to(x), x.mean(0), x.std(0) + 1e-6, y.std(0))
        optimizer = torch.optim.Adam([own.more, own.shift], learning_rate)
        before[layer] = _divergence(structure, own, held, layer)
        for _ in range(steps):
            few = torch.randint(len(x), (tokens,), generator=draw).to(x.device)
            optimizer.zero_grad()
            _kl(structure, own(x[few]), y[few]).mean().backward()
            optimizer.step()
        after[layer] = _divergence(structure, own, held, layer)
        weight, bias = own.folded()
        maps[place], biases[place] = weight.cpu(), bias.cpu()
    return replace(translator, maps=maps, biases=biases, kl_before=before, kl_after=after)


def _kl(structure: Structure, states: Tensor, ends: Tensor) -> Tensor:
    """KL of what the model says to what states say, by token, in nats."""
    with torch.no_grad():
        said = structure.read_out(ends).float().log_softmax(-1)
    return torch.where(said.isinf(), 0.0, said.exp() * (said - structure.read_out(states).float().log_softmax(-1))).sum(-1)


@torch.no_grad()
def _divergence(structure: Structure, own: _Map, held: Sequence[States], layer: str) -> float:
    parts = [_kl(structure, own(states[layer].float()), end) for states, end in held]
    return float(torch.cat(parts).mean())
