"""Making the pages of latents: their contexts run again, the words of their directions, who writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fmr
from analyzers.causal.opening import first_run
from analyzers.dictionaries.latents import LatentPages
from analyzers.lenses.writers import named
from analyzers.memories.spelling import spelled
from analyzers.memories.vocabulary import wordless, words_of
from analyzers.probes.reading import vectors
from analyzers.prompts import prompts
from fmr.ids import Site
from fmr.interventions.roles import roles_of
from fmr.structure.parts import Structure

if TYPE_CHECKING:
    from analyzers.dictionaries.contexts import LatentContexts

NEAR = 3
"""How many directions are told that lie near one."""


def pages_of(counted: LatentContexts, latents: tuple[int, ...], words: int, seed: int) -> LatentPages:
    """The pages of some latents, from what was counted."""
    model = counted.autoencoder
    texts = [[counted.texts[key] for key in _keys(counted, latent)] for latent in latents]
    known = sorted({ids for some in texts for ids in some}) or [next(iter(counted.texts.values()), (0,))]
    spell = spelled(counted.tokenizer, {one for ids in known for one in ids})
    with torch.no_grad():
        first = prompts(torch.tensor([list(known[0])]), counted.model, counted.tokenizer)
        structure = fmr.locate(first_run(counted.model, first))
        read = {ids: _values(counted, structure, ids) for ids in known}
        contexts = tuple(
            tuple(
                (tuple(spell[one] for one in ids), place, tuple(model.encode(read[ids][0])[:, latent].tolist()))
                for ids, place in zip(some, _places(counted, latent), strict=True)
            )
            for latent, some in zip(latents, texts, strict=True)
        )
        places = [(latent, read[ids], place) for latent, some in zip(latents, texts, strict=True)
                  for ids, place in zip(some, _places(counted, latent), strict=True)]  # fmt: skip
        speaks, against, unread = _said(counted, structure, latents, words)
    fired = counted.tally.fired[list(latents)]
    return LatentPages(
        site=str(counted.site.id),
        role=roles_of(structure).get(counted.site.id, ""),
        size=model.size,
        latents=latents,
        density=tuple((fired / counted.tally.count).tolist()),
        mean=tuple((counted.sums[list(latents)] / fired.clamp_min(1)).tolist()),
        contexts=contexts,
        speaks=speaks,
        against=against,
        near=tuple(_near(model.decoder.detach(), latent) for latent in latents),
        writers=tuple(_written(counted, latent, places) for latent in latents),
        chance=_chance(model.size, model.width, seed),
        unread=unread,
        rows=counted.tally.count,
        documents=counted.documents,
        skip=counted.skip,
    )


def _keys(counted: LatentContexts, latent: int) -> list[int]:
    """The contexts of a latent, the largest first."""
    return [int(key) for key in counted.tops.texts[latent][counted.tops.values[latent] > 0]]


def _places(counted: LatentContexts, latent: int) -> list[int]:
    return [int(place) for place in counted.tops.places[latent][counted.tops.values[latent] > 0]]


Read = tuple[Tensor, dict[str, Tensor]]
"""The values at the site of a text, (tokens, width), and what each part wrote into them."""


def _values(counted: LatentContexts, structure: Structure, ids: tuple[int, ...]) -> Read:
    """The values of one text at the site, and what was written to them."""
    writes = _writes_up_to(structure, counted.site)
    inputs = prompts(torch.tensor([list(ids)]), counted.model, counted.tokenizer).inputs
    keep = [counted.site, *(Site(name) for name in writes.values())]
    run = fmr.run(counted.model, keep=list(dict.fromkeys(keep)), stop=True, **inputs)
    values = vectors(run, counted.site, -1, True, 1)[0]
    return values, {name: run[one].reshape(values.shape) for name, one in writes.items()}


def _writes_up_to(structure: Structure, site: Site) -> dict[str, Any]:
    """The values that a point of the stream is a sum of, by who wrote them; none where the site is no such point."""
    if not structure.streams or site.selection:
        return {}
    writes = structure.residual.writes
    after = [write.after for write in writes]
    if site.id not in after or (len(writes) and structure.graph[writes[0].before].shape != structure.graph[site.id].shape):
        return {}
    name = named(structure, structure.graph)
    found: dict[str, Any] = {"embedding": writes[0].before}
    return found | {name(write): write.added for write in writes[: after.index(site.id) + 1]}


def _written(counted: LatentContexts, latent: int, places: list[tuple[int, Read, int]]) -> dict[str, tuple[float, float]]:
    """What each part adds to the score of a latent at its own contexts, and at those of others, as shares of its own."""
    reader = counted.autoencoder.encoder[:, latent].detach().double()
    own = [(read, place) for one, read, place in places if one == latent]
    if not own or not own[0][0][1]:
        return {}
    others = [(read, place) for one, read, place in places if one != latent]
    whole = sum(float(read[0][place].double() @ reader) for read, place in own) / len(own)

    def share(some: list[tuple[Read, int]], name: str) -> float:
        if not some or not whole:
            return float("nan")
        return sum(float(read[1][name][place].double() @ reader) for read, place in some) / len(some) / whole

    return {name: (share(own, name), share(others, name)) for name in own[0][0][1]}


Said = tuple[tuple[tuple[str, float], ...], ...]


def _said(counted: LatentContexts, structure: Structure, latents: tuple[int, ...], words: int) -> tuple[Said, Said, str]:
    """The words that latents speak for and against, and why they have none."""
    nothing: Said = tuple(() for _ in latents)
    if why := wordless(structure):
        return nothing, nothing, why
    directions = counted.autoencoder.decoder[list(latents)].detach()
    end = structure.graph[structure.residual.points[-1]] if structure.streams else None
    if end is None or end.shape[-1] != directions.shape[1]:
        return nothing, nothing, "its values are no vectors of the residual stream"
    tokens, scores = words_of(structure, directions, words)
    spell: Mapping[int, str] = spelled(counted.tokenizer, tokens.unique().tolist())
    both = [
        tuple(
            tuple((spell[int(one)], float(score)) for one, score in zip(tokens[n, side], scores[n, side], strict=True))
            for n in range(len(latents))
        )
        for side in (0, 1)
    ]
    return both[0], both[1], ""


def _near(decoder: Tensor, latent: int) -> tuple[tuple[int, float], ...]:
    """The latents whose directions lie nearest to that of one."""
    cosines = F.normalize(decoder, dim=1) @ F.normalize(decoder[latent], dim=0)
    cosines[latent] = -2
    best = cosines.topk(min(NEAR, len(cosines) - 1))
    return tuple((int(one), float(cosine)) for one, cosine in zip(best.indices, best.values, strict=True))


def _chance(size: int, width: int, seed: int, draws: int = 64) -> float:
    """The largest cosine of a random direction with so many others, the mean over draws."""
    draw = torch.Generator().manual_seed(seed)
    others = F.normalize(torch.randn(max(size - 1, 1), width, generator=draw), dim=1)
    mine = F.normalize(torch.randn(draws, width, generator=draw), dim=1)
    return float((mine @ others.T).max(1).values.mean())
