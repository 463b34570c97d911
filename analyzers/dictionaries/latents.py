"""A page of a latent: where it fires, what it says, which others lie near it, and who writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analyzers.protocol import AnalyzerError
from analyzers.results import Stored, told_skip
from fmr.disk.files import write_whole
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class LatentPages(Stored):
    """What some latents of a dictionary are: a page of each.

    >>> contexts = analyzers.LatentContexts(model, tokenizer, dictionary, site).over(texts, progress=False)
    >>> contexts.result([7])
    LatentPages of 1 of 64 latents at mlps[1].out, ...

    By latent, in the order of `latents`: density, the share of tokens it fires on, and mean, of those. contexts: the tokens
    of each text, the place of the one it is largest at, and what it is at each token, after which the text goes on. speaks,
    against: tokens whose logits its direction raises and lowers most, alone in an otherwise empty stream; `unread` is why
    there are none. near: other latents by the cosine of their directions; chance: the largest cosine of a direction with as
    many random ones, on average. writers: by part, what it adds to the latent's score at the contexts' tokens, and at the
    tokens of other latents' contexts, as shares of the score. skip: how many tokens at the start of each text have none.
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
    skip: int = 0

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
        counted = f"{number_of(self.rows, 'token')} of {number_of(self.documents, 'text')}{told_skip(self.skip)}"
        return f"{head}, {counted}\n" + "\n".join(map(self.text, self.latents))


def _spaced(tokens: Any) -> Iterator[str]:
    """Tokens with blanks between those that bring none, where no token brings one."""
    several = list(tokens)
    blank = "" if any(token[:1].isspace() or token[-1:].isspace() for token in several) else " "
    for n, token in enumerate(several):
        yield f"{blank if n else ''}{token}"
