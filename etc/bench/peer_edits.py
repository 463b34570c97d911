"""The same edits by fmr and by one peer: the rows, each once, with how fmr does it; a peer's `Ways` say how that does it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from engine import Case, token_ids
from peer_table import GENERATE, INTERCHANGE, ONE_EDIT, PATHS, RESTORES
from timing import Variant
from torch import Tensor

import fmr
from fmr import edits
from fmr.structure.parts import Structure
from fmr.sweeps import logit_diff

EXAMPLES, STEPS = 8, 20
"""How many examples the interchange has, and how many tokens are generated."""

LENGTH = 12
"""The tokens of the two studies of 144 edited runs: as many positions as there are layers, and heads in a layer."""

METRIC = logit_diff(3, 5)


class Ways(Protocol):
    """How a peer edits a GPT-2: `how` says it in words by method; each gives logits, and `steer` gives tokens.

    add: a vector onto the residual stream after a layer, at all positions. put: into the stream after a layer, in row i of
    the batch `values[i]` at `positions[i]`. heads: what the heads of some layers give, all of it. interchange: of the stream
    after a layer at one position, from a run on other tokens. steer: `add` in every pass of a generation.
    """

    how: Mapping[str, str]

    def add(self, ids: Tensor, layer: int, vector: Tensor) -> Tensor: ...
    def put(self, ids: Tensor, layer: int, positions: Sequence[int], values: Tensor) -> Tensor: ...
    def heads(self, ids: Tensor, values: Mapping[int, Tensor]) -> Tensor: ...
    def interchange(self, ids: Tensor, source: Tensor, layer: int, position: int) -> Tensor: ...
    def steer(self, ids: Tensor, layer: int, vector: Tensor, steps: int) -> Tensor: ...


class Task(NamedTuple):
    """A row on one model: the plain run beside it, how fmr does it, how a peer does, and over how many forwards."""

    what: str
    base: Variant
    own: Callable[[], Tensor]
    ways: Callable[[Ways], Iterator[tuple[str, Callable[[], Tensor]]]]
    forwards: int = 1


def tasks(case: Case) -> Iterator[Task]:
    """The rows of one model; those with 144 edited runs where it has so many heads."""
    structure = fmr.locate(case.run())
    yield one_edit(case, structure)
    yield interchange(case, structure)
    yield generation(case, structure)
    if sum(block.n_heads for block in structure.attention) == LENGTH**2:
        short = case._replace(ids=token_ids(case.model, LENGTH))
        yield restores(short, structure)
        yield paths(short, structure)


def vector(case: Case) -> Tensor:
    """A direction, the same each time."""
    return torch.randn(case.model.config.n_embd, generator=torch.Generator().manual_seed(0))


def middle(structure: Structure) -> int:
    """The layer that is edited where one is."""
    return len(structure.layers) // 2


def one_edit(case: Case, structure: Structure) -> Task:
    layer, addend = middle(structure), vector(case)
    point = structure.layers[layer].resid_post

    def own() -> Tensor:
        return case.run(keep=(), edits={point: edits.Add(addend)}).output.logits

    def ways(peer: Ways) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        yield peer.how["add"], lambda: peer.add(case.ids, layer, addend)

    return Task(ONE_EDIT, case.forward, own, ways)


def interchange(case: Case, structure: Structure) -> Task:
    layer, length = middle(structure), case.ids.shape[1]
    point = structure.layers[layer].resid_post.at(positions=length - 1)
    drawn = torch.Generator().manual_seed(1)
    ids, source = torch.randint(case.model.config.vocab_size, (2, EXAMPLES, length), generator=drawn)
    batch = case._replace(ids=ids)

    def own() -> Tensor:
        taken = edits.Interchange({"input_ids": source, "use_cache": False})
        return batch.run(keep=(), edits={point: taken}).output.logits

    def ways(peer: Ways) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        yield peer.how["interchange"], lambda: peer.interchange(ids, source, layer, length - 1)

    return Task(INTERCHANGE, batch.forward, own, ways)


def generation(case: Case, structure: Structure) -> Task:
    layer, addend = middle(structure), vector(case)
    point = structure.layers[layer].resid_post

    def own() -> Tensor:
        with fmr.track(case.model, keep=(), edits={point: edits.Add(addend)}):
            return generated(case.model, case.ids, STEPS)

    def ways(peer: Ways) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        yield peer.how["steer"], lambda: peer.steer(case.ids, layer, addend, STEPS)

    return Task(GENERATE, lambda: generated(case.model, case.ids, STEPS), own, ways)


GREEDY = {"do_sample": False, "pad_token_id": 0}


def generated(model: torch.nn.Module, ids: Tensor, steps: int) -> Tensor:
    """The model's own generation of so many tokens, each the likeliest."""
    return model.generate(ids, min_new_tokens=steps, max_new_tokens=steps, **GREEDY)


def restores(case: Case, structure: Structure) -> Task:
    """Activation patching: the clean stream put back after each layer, at each position."""
    points = [layer.resid_post for layer in structure.layers]
    clean = fmr.run(case.model, case.ids.flip(1), use_cache=False)
    streams = [clean[point] for point in points]
    sites = [point.at(positions=position) for point in points for position in range(LENGTH)]
    rows = list(range(LENGTH))

    def own() -> Tensor:
        inputs = {"input_ids": case.ids, "use_cache": False}
        return fmr.sweep(case.model, inputs, sites, edits.Interchange(clean), METRIC, progress=False).values.flatten()

    def one_by_one(peer: Ways) -> Tensor:
        each = [
            peer.put(case.ids, layer, [position], stream[:, position])
            for layer, stream in enumerate(streams)
            for position in rows
        ]
        return torch.cat([METRIC(logits) for logits in each])

    def by_layers(peer: Ways) -> Tensor:
        each = [peer.put(case.ids.expand(LENGTH, -1), layer, rows, stream[0]) for layer, stream in enumerate(streams)]
        return torch.cat([METRIC(logits) for logits in each])

    return Task(RESTORES, case.forward, own, both("put", one_by_one, by_layers), LENGTH**2)


def paths(case: Case, structure: Structure) -> Task:
    """Path patching: each head from another run, the heads above it as they were, all else computed again."""
    heads = [block.z for block in structure.attention]
    source, recorded = fmr.run(case.model, case.ids.flip(1), use_cache=False), case.run()
    flat = (1, LENGTH, case.model.config.n_embd)
    before, after = ([run[site].transpose(1, 2).reshape(flat) for site in heads] for run in (recorded, source))
    wide = flat[-1] // LENGTH

    swap, last = edits.Interchange(source), {"positions": LENGTH - 1}  # frozen heads mix no positions, and the last is read
    sites = [
        (site.at(heads=head, **last), *(above.at(**last) for above in heads[layer + 1 :]))
        for layer, site in enumerate(heads)
        for head in range(LENGTH)
    ]

    def own() -> Tensor:
        hold = edits.Interchange(case.run())

        def path(value: Tensor, context: edits.Context) -> Tensor:
            return (hold if context.site.heads is None else swap)(value, context)

        inputs = {"input_ids": case.ids, "use_cache": False}
        return fmr.sweep(case.model, inputs, sites, path, METRIC, progress=False).values.flatten()

    def patched(layer: int, chosen: Sequence[int]) -> dict[int, Tensor]:
        """What the heads from this layer on give, a row for each chosen head."""
        mixed = before[layer].repeat(len(chosen), 1, 1)
        for row, head in enumerate(chosen):
            mixed[row, :, head * wide : (head + 1) * wide] = after[layer][0, :, head * wide : (head + 1) * wide]
        above = range(layer + 1, LENGTH)
        return {layer: mixed, **{number: before[number].repeat(len(chosen), 1, 1) for number in above}}

    def one_by_one(peer: Ways) -> Tensor:
        places = [(layer, head) for layer in range(LENGTH) for head in range(LENGTH)]
        return torch.cat([METRIC(peer.heads(case.ids, patched(layer, [head]))) for layer, head in places])

    def by_layers(peer: Ways) -> Tensor:
        ids, every = case.ids.expand(LENGTH, -1), range(LENGTH)
        return torch.cat([METRIC(peer.heads(ids, patched(layer, every))) for layer in range(LENGTH)])

    return Task(PATHS, case.forward, own, both("heads", one_by_one, by_layers), LENGTH**2)


def both(
    method: str, one_by_one: Callable[[Ways], Tensor], by_layers: Callable[[Ways], Tensor]
) -> Callable[[Ways], Iterator[tuple[str, Callable[[], Tensor]]]]:
    """A study of 144 edited runs by a peer: one by one as its users do it, and by hand in batches of 12 rows."""

    def ways(peer: Ways) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        yield f"{peer.how[method]}, one by one", lambda: one_by_one(peer)
        yield f"{peer.how[method]}, 12 rows at once", lambda: by_layers(peer)

    return ways
