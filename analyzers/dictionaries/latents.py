"""A page of a latent: where it fires, what it says, which others lie near it, and who writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fmr
from analyzers.causal.opening import first_run
from analyzers.lenses.writers import named
from analyzers.memories.spelling import spelled
from analyzers.memories.vocabulary import wordless, words_of
from analyzers.probes.reading import vectors
from analyzers.prompts import prompts
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.disk.files import write_whole
from fmr.errors import number_of
from fmr.ids import Site
from fmr.interventions.roles import roles_of
from fmr.structure.parts import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from analyzers.dictionaries.contexts import LatentContexts

NEAR = 3
"""How many directions are told that lie near one."""


@dataclass(frozen=True, eq=False)
class LatentPages(Stored):
    """What some latents of a dictionary are: a page of each.

    >>> contexts = analyzers.LatentContexts(model, tokenizer, dictionary, site).over(texts, progress=False)
    >>> contexts.result([7])
    LatentPages of 1 of 64 latents at layers[2].resid_post ...

    By latent, in the order of `latents`: density, the share of tokens it fires on, and mean, of those. contexts: the tokens
    of each text, the place of the one it is largest at, and what it is at each token, after which the text goes on. speaks,
    against: tokens whose logits its direction raises and lowers most, alone in an otherwise empty stream; `unread` is why
    there are none. near: other latents by the cosine of their directions; chance: the largest cosine of a direction with as
    many random ones, on average. writers: by part, what it adds to the latent's score at the contexts' tokens, and at the
    tokens of other latents' contexts, as shares of the score.
    """

    site: str
    role: str
    size: int
    latents: tuple[int, ...]
    density: tuple[float, ...]
    mean: tuple[float, ...]
    contexts: tuple[tuple[tuple[tuple[str, ...], int, tuple[float, ...]], ...], ...] = field(repr=False)
    speaks: tuple[tuple[tuple[str, float], ...], ...] = field(repr=False)
    against: tuple[tuple[tuple[str, float], ...], ...] = field(repr=False)
    near: tuple[tuple[tuple[int, float], ...], ...] = field(repr=False)
    writers: tuple[dict[str, tuple[float, float]], ...] = field(repr=False)
    chance: float
    unread: str
    rows: int
    documents: int

    def table(self) -> DataFrame:
        """One row a context: its latent, the token, what the latent is there, and the text.

        >>> analyzers.LatentContexts(model, tokenizer, dictionary, site).update(texts[:2]).result([7]).table()
        """
        import pandas as pd

        rows = [
            {"latent": latent, "token": tokens[place], "value": values[place], "text": "".join(_spaced(tokens))}
            for latent, found in zip(self.latents, self.contexts, strict=True)
            for tokens, place, values in found
        ]
        return pd.DataFrame(rows, columns=["latent", "token", "value", "text"])

    def plot(self, ax: Axes | None = None) -> Figure:
        """Who writes the latents, as a map of shares.

        >>> analyzers.LatentContexts(model, tokenizer, dictionary, site).update(texts[:2]).result([0, 7]).plot()
        """
        from analyzers.dictionaries.pictures import draw_pages

        return draw_pages(self, ax)

    def text(self, latent: int) -> str:
        """The page of a latent in words.

        >>> analyzers.LatentContexts(model, tokenizer, dictionary, site).over(texts, progress=False).result([7]).text(7)
        """
        n = self._place(latent)
        lines = [f"latent {latent}: fires on {self.density[n]:.2%} of tokens, mean {self.mean[n]:.2f}"]
        for tokens, place, values in self.contexts[n]:
            marked = [f"[{token.strip()}]" if at == place else token for at, token in enumerate(tokens)]
            lines.append(f"  {values[place]:6.2f}  {''.join(_spaced(marked)).strip()}")
        for what, words in (("for", self.speaks[n]), ("against", self.against[n])):
            if words:
                lines.append(f"  speaks {what} {', '.join(f'{word.strip()} {score:+.1f}' for word, score in words)}")
        lines.append(
            f"  near {', '.join(f'{other} {cosine:.2f}' for other, cosine in self.near[n])} (random ones {self.chance:.2f})"
        )
        if written := self._most(n):
            lines.append(f"  written by {', '.join(f'{name} {own:+.2f} ({rest:+.2f})' for name, (own, rest) in written)}")
        return "\n".join(lines)

    def _most(self, n: int) -> list[tuple[str, tuple[float, float]]]:
        """The parts that write most of a latent."""
        return sorted(self.writers[n].items(), key=lambda one: -abs(one[1][0]))[:4]

    def _place(self, latent: int) -> int:
        if latent not in self.latents:
            raise AnalyzerError(
                f"There is no page of latent {latent!r}. Expected one of {', '.join(map(str, self.latents))}."
            )
        return self.latents.index(latent)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the pages to one file that needs no other.

        >>> analyzers.LatentContexts(model, tokenizer, dictionary, site).update(texts[:2]).result([7]).save_html("7.html")
        """
        from analyzers.dictionaries.html import page

        write_whole(path, page(self).encode())

    def _repr_html_(self) -> str:
        from analyzers.dictionaries.html import body

        return body(self)

    def __repr__(self) -> str:
        head = f"LatentPages of {len(self.latents)} of {number_of(self.size, 'latent')} at {self.role or self.site}"
        counted = f"{number_of(self.rows, 'token')} of {number_of(self.documents, 'text')}"
        return f"{head}, {counted}\n" + "\n".join(map(self.text, self.latents))


def _spaced(tokens: Any) -> Iterator[str]:
    """Tokens with blanks between those that bring none, where no token brings one."""
    several = list(tokens)
    blank = "" if any(token[:1].isspace() or token[-1:].isspace() for token in several) else " "
    for n, token in enumerate(several):
        yield f"{blank if n else ''}{token}"


# ---- how they are made


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
