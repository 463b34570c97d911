"""Methods on a language model by fmr and by one peer: the rows, each once; a peer's `Methods` say how that does them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from engine import gpt2
from methods import ANSWER, FACT, SUBJECT, gifts
from peer_table import ATTRIBUTION, CIRCUIT, DAS, HEADS, TRACING
from timing import Variant
from torch import Tensor, nn

import fmr
from analyzers import ActivationPatching, AttributionPatching, CausalTracing, CircuitSearch
from analyzers.alignment.examples import Examples
from analyzers.alignment.interchange import Network
from analyzers.tracing.facts import fact_of
from fmr.sweeps import logit_diff

REAL, RANDOM = "SmolLM2", "GPT-2 small"
"""The models: the language model of the zoo, and the shape of GPT-2 small with random weights."""

EDGES = 0.05
"""The share of the edges that make the circuit."""


class Subject(NamedTuple):
    """A model, with pairs of prompts as token ids and the two answers between which it decides, one each for each pair."""

    name: str
    model: nn.Module
    clean: Tensor
    corrupted: Tensor
    right: Tensor
    wrong: Tensor

    def metric(self, logits: Tensor, pairs: slice = slice(None)) -> Tensor:
        """The difference of the answers at the last position, of some of the pairs."""
        last, rows = logits[:, -1], torch.arange(len(logits))
        return last[rows, self.right[pairs]] - last[rows, self.wrong[pairs]]

    def forward(self) -> object:
        with torch.no_grad():
            return self.model(self.clean, use_cache=False)

    @property
    def given(self) -> tuple[Any, ...]:
        """What a method of fmr is given."""
        return {"input_ids": self.clean}, {"input_ids": self.corrupted}, logit_diff(self.right, self.wrong)


class Trace(NamedTuple):
    """A fact whose subject is made unreadable by given noise on its embeddings, and the clean states that are put back."""

    ids: Tensor
    places: Sequence[int]
    noise: Tensor
    position: int
    states: Sequence[Tensor]
    answer: int


class Methods(Protocol):
    """How a peer does the methods, in words by method; one that it has no way for is missing there.

    attribution: of the clean run put into the corrupted one, the change to first order for the z of each head, then for
    what each memory writes at each position; means over pairs. cells: the probability of the answer with the state after
    each layer put back at one position. heads: the metric with the z of one head of each layer at the last position taken
    from `values`.
    das: the loss of a step of distributed alignment search within the directions that are the columns of `matrix`, whose
    gradient is computed, with the state after layer 18 at the last position taken from the clean run.
    circuit: the scores of all edges by EAP, (writers, readers) as fmr orders them, and, where a peer tests circuits, the
    metric of that of the kept edges.
    """

    how: Mapping[str, str]

    def attribution(self) -> Tensor: ...
    def cells(self, trace: Trace) -> Tensor: ...
    def heads(self, heads: Sequence[int], values: Sequence[Tensor]) -> Tensor: ...
    def das(self, matrix: Tensor) -> Tensor: ...
    def circuit(self, kept: Tensor) -> Tensor: ...


class Study(NamedTuple):
    """A row on one model: the plain forward beside it, how fmr does it, how a peer does, how often that goes into all."""

    what: str
    base: Variant
    own: Callable[[], Tensor]
    way: Callable[[Methods], Tensor]
    method: str
    times: float = 1.0


def subjects() -> Iterator[Subject]:
    """The pretrained model with sentences about gifts, and the random one with random tokens."""
    model, tokenizer = fmr.zoo.load("smollm2")
    clean, corrupted, right, wrong = gifts()
    tokens = [tokenizer(texts, return_tensors="pt")["input_ids"] for texts in (clean, corrupted)]
    answers = [torch.tensor([tokenizer(text)["input_ids"][0] for text in texts]) for texts in (right, wrong)]
    yield Subject(REAL, model, *tokens, *answers)
    random = gpt2()
    drawn = torch.randint(random.config.vocab_size, (2, 4, 12), generator=torch.Generator().manual_seed(0))
    yield Subject(RANDOM, random, *drawn, torch.full((4,), 3), torch.full((4,), 5))


def studies(subject: Subject) -> Iterator[Study]:
    """The rows of one model: all of them for the pretrained one, the circuit for the other."""
    if subject.name == REAL:
        yield attribution(subject)
        yield heads(subject)
        yield tracing(subject)
        yield das(subject)
    yield circuit(subject)


def attribution(subject: Subject) -> Study:
    patching = AttributionPatching(subject.model)
    patching.run(*subject.given)  # which locates the model

    def own() -> Tensor:
        found = patching.run(*subject.given)
        kinds = [torch.tensor([one == kind for one in found.kinds]) for kind in ("z", "mlp")]
        return torch.cat([found.changes[chosen].mean(1) for chosen in kinds])

    return Study(ATTRIBUTION, subject.forward, own, lambda peer: peer.attribution(), "attribution")


def heads(subject: Subject) -> Study:
    """All heads by fmr with its controls; one head of each layer by a peer, which has the values that it puts in."""
    patching = ActivationPatching(subject.model)
    blocks = fmr.locate(fmr.run(subject.model, subject.corrupted[:2])).attention
    many = blocks[0].n_heads
    sites = [block.z.at(heads=head, positions=-1) for block in blocks for head in range(many)]
    chosen = [layer % many for layer in range(len(blocks))]
    source = fmr.run(subject.model, subject.clean, keep=[str(block.z.id) for block in blocks])
    values = [source[block.z.at(positions=-1)].squeeze(2) for block in blocks]  # (pairs, heads, units)

    def own() -> Tensor:
        found = patching.run(*subject.given, sites, progress=False)
        picked = [layer * many + head for layer, head in enumerate(chosen)]
        return (found.base + found.changes[picked]).flatten()

    return Study(HEADS, subject.forward, own, lambda peer: peer.heads(chosen, values), "heads", many)


def tracing(subject: Subject) -> Study:
    """The grid of all layers and tokens by fmr with its controls; a column of it, the last of the subject, by a peer."""
    model, (_, tokenizer) = subject.model, fmr.zoo.load("smollm2")
    method = CausalTracing(model, tokenizer, kinds=("state",), samples=1)
    fact = fact_of(FACT, SUBJECT, ANSWER, tokenizer)
    clean, position = fmr.run(model, fact.ids[None]), fact.subject[-1]
    method.structure = structure = fmr.locate(clean)

    def own() -> Tensor:
        found = method.run(FACT, SUBJECT, ANSWER, progress=False)
        return torch.as_tensor(found.effects["state"][:, position] + found.corrupted[0])

    def base() -> object:
        with torch.no_grad():
            return model(fact.ids[None], use_cache=False)

    draw = torch.Generator().manual_seed(method.seed)  # the first that tracing draws, of two
    there = clean[structure.embedding][0, list(fact.subject)]
    noise = 3 * there.std() * torch.randn(2, 1, *there.shape, generator=draw)[0, 0]
    states = [clean[layer.resid_post][0, position] for layer in structure.layers]
    trace = Trace(fact.ids[None], list(fact.subject), noise, position, states, fact.answer[0])
    return Study(TRACING, base, own, lambda peer: peer.cells(trace), "cells", len(fact.tokens))


def das(subject: Subject) -> Study:
    """A step of training at one site, without the optimizer's."""
    model, labels = subject.model.requires_grad_(False), subject.right
    site = fmr.locate(fmr.run(model, subject.clean[:2])).layers[DAS_LAYER].resid_post.at(positions=-1)
    rotation, all_rows = fmr.subspaces.Rotation(model.config.hidden_size, 64), torch.ones(len(labels), dtype=torch.bool)
    sources = {"x": {"input_ids": subject.clean}}
    pairs = Examples({"input_ids": subject.corrupted}, sources, {"x": all_rows}, labels, labels)
    network = Network(model)

    def own() -> Tensor:
        rotation.zero_grad()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(network.interchanged(site, {"x": rotation}, pairs), labels)
        loss.backward()
        return loss.detach()[None]

    return Study(DAS, lambda: two_forwards(subject), own, lambda peer: peer.das(rotation.matrix.detach()), "das")


DAS_LAYER = 18


def two_forwards(subject: Subject) -> None:
    """The plain model on both prompts, and a backward from the last to the embeddings of one."""
    subject.forward()
    with torch.enable_grad():
        states = subject.model.get_input_embeddings()(subject.corrupted).detach().requires_grad_()
        logits = subject.model(inputs_embeds=states, use_cache=False).logits[:, -1]
        nn.functional.cross_entropy(logits, subject.right).backward()


def circuit(subject: Subject) -> Study:
    """The scores of all edges, a circuit of the strongest, and what it answers."""
    search, settings = CircuitSearch(subject.model), {"sizes": [EDGES], "random": 0, "progress": False}
    kept = search.run(*subject.given, "eap", **settings)
    chosen = torch.zeros(len(kept.writers), len(kept.readers), dtype=torch.bool)
    chosen[tuple(torch.as_tensor(kept.ends[kept.kept]).T)] = True

    def own() -> Tensor:
        found = search.run(*subject.given, "eap", **settings)
        scores = torch.zeros(chosen.shape, dtype=torch.double)
        scores[tuple(torch.as_tensor(found.ends).T)] = torch.as_tensor(found.scores)
        gap = (found.clean - found.corrupted).mean()
        return torch.cat([(scores * gap).flatten(), found.measured[-1].flatten()])

    return Study(CIRCUIT, subject.forward, own, lambda peer: peer.circuit(chosen), "circuit")
