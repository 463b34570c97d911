"""At which tokens the latents of a dictionary are largest, over a whole corpus, whatever its order and its shards."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from analyzers.dictionaries.autoencoder import SparseAutoencoder
from analyzers.dictionaries.coding import Tally
from analyzers.dictionaries.dictionary import Dictionary
from analyzers.dictionaries.latents import LatentPages
from analyzers.dictionaries.scoring import alike
from analyzers.dictionaries.standing import Standing, left_out, opened
from analyzers.lenses.opening import mask_of
from analyzers.memories.tops import Prefixes, Tops
from analyzers.probes.reading import vectors
from analyzers.prompts import Prompts, prompts
from analyzers.protocol import (
    Analyzer,
    AnalyzerError,
    Given,
    check_counts,
    check_eval,
    check_other,
    nothing_counted,
    real_tokens,
)
from fmr.errors import number_of
from fmr.nodes import Key


class LatentContexts(Analyzer[LatentPages]):
    """Find the contexts in which the latents of a dictionary are largest, and make a page of some of them.

    >>> contexts = analyzers.LatentContexts(model, tokenizer, dictionary, structure.layers[2].resid_post, k=3)
    >>> pages = contexts.over(texts, progress=False).result([0, 7])
    >>> pages.save_html("latents.html")

    model: any module in eval mode that takes token ids. dictionary: a `Dictionary`, or a `SparseAutoencoder`. site: where it
    stands. k: how many contexts are kept of each latent; of contexts that are equal up to the token, one. skip: how many
    tokens at the start of each text are left out, None for as many as in a `Dictionary`'s training: they are part of
    contexts, and have none of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        dictionary: Dictionary | SparseAutoencoder,
        site: Key,
        *,
        k: int = 8,
        skip: int | None = None,
    ) -> None:
        check_counts(1, k=k)
        self.standing, self.skip = Standing(dictionary, site, every=True), left_out(dictionary, skip)
        self.model, self.tokenizer, self.k = model, tokenizer, operator.index(k)
        self.autoencoder, self.site = opened(dictionary, model)[0], self.standing.site
        self.tops = Tops.empty(self.autoencoder.size, self.k)
        self.tally = Tally.of(self.autoencoder.bias, self.autoencoder.size)
        self.sums = torch.zeros(self.autoencoder.size, dtype=torch.float64)
        self.texts: dict[int, tuple[int, ...]] = {}
        self.documents = 0

    def update(self, batch: Given) -> LatentContexts:
        """Count a batch: texts, token ids or named arguments.

        >>> analyzers.LatentContexts(model, tokenizer, dictionary, site).update(texts[:2]).counted
        '2 texts'
        """
        check_eval(self.model)
        given = prompts(batch, self.model, self.tokenizer)
        self.standing.check(self.model, given.inputs)
        with torch.no_grad():
            run = fmr.run(self.model, keep=[self.site], stop=True, **given.inputs)
            values = vectors(run, self.site, -1, True, len(given))
            rows = _rows(given, mask_of(given, values.shape[:2], real_tokens), self.skip)
            states = values.flatten(0, 1)[torch.tensor([column for _, column, _ in rows], dtype=torch.long)]
            latents = self.autoencoder.encode(states)
            self.tally.add(states, self.autoencoder.decode(latents), latents)
        self.sums += latents.double().sum(0).cpu()
        self.documents += len(given)
        self._enter(rows, latents)
        return self

    def _enter(self, rows: Sequence[tuple[tuple[int, ...], int, int]], latents: Tensor) -> None:
        """Enter the latents of the tokens of a batch, each as the last of what comes up to it."""
        first: dict[int, int] = {}
        for n, (ids, _, place) in enumerate(rows):
            key = _number(ids[: place + 1])
            first.setdefault(key, n)
            self.texts[key] = min(self.texts.get(key, ids), ids)
        keys, chosen = list(first), list(first.values())
        places = torch.tensor([rows[n][2] for n in chosen], dtype=torch.long)
        self.tops.add(latents[chosen], Prefixes(torch.tensor(keys, dtype=torch.long), places))
        self._forget()

    def _forget(self) -> None:
        """Keep the texts that are still among the contexts."""
        wanted = set(self.tops.texts[self.tops.values > 0].tolist())
        self.texts = {key: ids for key, ids in self.texts.items() if key in wanted}

    @property
    def counted(self) -> str:
        """How many texts were counted."""
        return number_of(self.documents, "text") if self.documents else ""

    def merge(self, other: LatentContexts) -> LatentContexts:
        """Add what another one counted of the same model and dictionary on other texts, and return this one.

        >>> one, two = (analyzers.LatentContexts(model, tokenizer, dictionary, site).update(batch) for batch in batches[:2])
        >>> one.merge(two).counted
        '8 texts'
        """
        check_other(self, other)
        ours, theirs = ((one.site, one.k, one.skip) for one in (self, other))
        if ours != theirs or not alike(self.autoencoder, other.autoencoder):
            raise AnalyzerError(
                f"merge of {self.k} contexts of {self.autoencoder} at {self.site.id} (skip={self.skip}) with {other.k} of "
                f"{other.autoencoder} at {other.site.id} (skip={other.skip}): expected one dictionary, one site, one k and "
                "one skip."
            )
        self.tops.merge(other.tops)
        self.tally.merge(other.tally)
        self.sums += other.sums
        self.documents += other.documents
        for key, ids in other.texts.items():
            self.texts[key] = min(self.texts.get(key, ids), ids)
        self._forget()
        return self

    def result(self, latents: Sequence[int] | None = None, *, words: int = 8, seed: int = 0) -> LatentPages:
        """A page of each of some latents; None takes the eight that fire most often.

        >>> analyzers.LatentContexts(model, tokenizer, dictionary, site).over(texts, progress=False).result([7]).latents
        (7,)

        words: how many tokens are told that a latent speaks for and against. seed: of the random directions beside it.
        The model is run again on the contexts of these latents.
        """
        from analyzers.dictionaries.pages import pages_of

        if not self.tally.count:
            raise AnalyzerError(nothing_counted(self.skip))
        check_counts(1, words=words)
        check_counts(0, seed=seed)
        every = self.tally.fired.topk(min(8, self.autoencoder.size)).indices.tolist() if latents is None else list(latents)
        for one in every:
            self.autoencoder.direction(one)
        return pages_of(self, tuple(every), words, seed)


def _rows(given: Prompts, real: Tensor, skip: int) -> list[tuple[tuple[int, ...], int, int]]:
    """The real tokens of a batch but the first ones: the ids of their text, their column in the batch, their place in it."""
    ids = given.ids
    if not isinstance(ids, Tensor) or ids.shape != real.shape:
        told = tuple(ids.shape) if isinstance(ids, Tensor) else "none"
        raise AnalyzerError(
            f"The token ids are {told} for values of {tuple(real.shape)} examples and positions. Expected token ids "
            "of that shape: input_ids, or the only tensor of whole numbers."
        )
    found = []
    for n, (row, mask) in enumerate(zip(ids.cpu(), real.cpu(), strict=True)):
        text = tuple(row[mask].tolist())
        columns = (mask.nonzero()[:, 0] + n * real.shape[1]).tolist()
        found += [(text, column, place) for place, column in enumerate(columns) if place >= skip]
    return found


def _number(ids: tuple[int, ...]) -> int:
    """A number for a prefix, the same in every process."""
    told = hashlib.blake2b(repr(ids).encode(), digest_size=8).digest()
    return int.from_bytes(told, "little", signed=True)
