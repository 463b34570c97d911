"""`fmr.page`: a run and its structure as one file that a browser opens, without a server and without a network."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

import torch

from fmr.disk.files import write_whole
from fmr.errors import DrawError, FmrError, StructureError, TrackError, number_of, whole_number
from fmr.pages.arrays import Json, unpacked
from fmr.pages.outline import Outline, outline_of
from fmr.pages.tokens import Spelling, Tokenizer, Tokens, columns, spell, spelled_by, visible
from fmr.pages.told import View, told
from fmr.pages.words import promoted
from fmr.pictures.endings import check_ending
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.parts import Structure
from fmr.structure.prints import find_prints
from fmr.structure.proof.evaluate import check_run, own_work, why_without_numbers

LARGEST = 200_000_000
"""Bytes of patterns that a browser still opens at ease."""

HIGH = 900
"""Pixels of the frame in a notebook."""


@dataclass(frozen=True)
class Page:
    """A page as text: a notebook shows it in a frame, `save` writes it.

    >>> page = fmr.page(run, structure)
    >>> page
    Page of GPT2LMHeadModel: 4 layers, 16 heads, 1 pass of 1 example, ... kB
    """

    title: str
    text: str = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to one file, whole or not at all; its name ends in .html.

        >>> fmr.page(run, structure).save("page.html")
        """
        check_ending(path, "html")
        write_whole(path, self.text.encode())

    def __repr__(self) -> str:
        return f"{self.title}, {len(self.text.encode()) / 1e3:.0f} kB"

    def _repr_html_(self) -> str:
        frame = f"width:100%;height:{HIGH}px;border:0"
        text = html.escape(self.text, quote=True)
        return f'<iframe sandbox="allow-scripts" title="{html.escape(self.title)}" style="{frame}" srcdoc="{text}"></iframe>'


def page(
    run: Run | Pass,
    structure: Structure,
    path: str | os.PathLike[str] | None = None,
    *,
    tokens: Tokens = None,
    words: Tokenizer | Spelling | Sequence[str] | None = None,
    top: int = 5,
) -> Page:
    """Write a run as one page to look around in: layers, heads over the tokens, memories, the logit lens, norms.

    >>> page = fmr.page(run, structure, "page.html", tokens=tokenizer)

    run: one that kept every value (keep="all"); what another kept is shown, and the rest says why it is not. All passes and
    examples can be chosen on the page. path: a file whose name ends in .html; without one the page is only returned, and
    shown at the end of a notebook cell. tokens: a tokenizer, or a function from a list of token IDs to one of texts; or one
    token per position, such a list for each example, or a tuple of these for each residual stream (encoder, decoder); None
    shows numbers. words: the same for the vocabulary, or the name of each class; None takes that of tokens. top: how many
    memories of a token and how many words are shown.

    Patterns are rounded to one byte a weight (within 0.002), all else is float32. The file loads nothing and sends nothing.
    A run that kept nothing of all this, a structure of another model and a wrong number of tokens are errors; memories are
    read as in Geva et al. (2022), the lens is that of nostalgebraist (2020), without a fitted map.
    """
    check_run(run)
    if not isinstance(structure, Structure):
        raise StructureError(f"fmr.page got {type(structure).__name__} for the structure, expected fmr.locate(run).")
    number = whole_number(top)
    if number is None or number < 1:
        raise DrawError(f"top={top!r}: expected a whole number from 1 on, as top=5.")
    if path is not None:
        check_ending(path, "html")
    with own_work(), torch.no_grad():
        data = page_data(run, outline_of(structure), spelled_by(tokens), spelled_by(words), number)
    layers, heads = len(structure.layers), sum(block.n_heads for block in structure.attention)
    passes = data["passes"]
    size = f"{number_of(layers, 'layer')}, {number_of(heads, 'head')}, {number_of(len(passes), 'pass', 'passes')} of "
    size += number_of(passes[-1]["examples"], "example")
    made = Page(f"Page of {structure.model}: {size}", _text(structure.model, data))
    if path is not None:
        made.save(path)
    return made


def page_data(
    run: Run | Pass,
    outline: Outline,
    tokens: Sequence[Any] | Spelling | None,
    words: Sequence[str] | Spelling | None,
    top: int,
) -> Json:
    """Everything that a page shows, in plain types."""
    views = _views(run, outline, top)
    past, texts = [0] * max(1, len(outline.streams)), []
    for _, view in views:
        texts.append(view.texts(past))
        past = [text.end if text is not None else old for text, old in zip(texts[-1], past, strict=True)]
    shown = columns(tokens, texts, max(view.examples for _, view in views))
    _check_size([view for _, view in views])
    passes = [
        {
            **view.told(),
            "number": number,
            "tokens": row,
            "starts": [text.start if text is not None else 0 for text in streams],
        }
        for (number, view), row, streams in zip(views, shown, texts, strict=True)
    ]
    structure, several = outline.structure, [view for _, view in views]
    said = [told(partial(promoted, structure, several, n, top)) for n in range(len(structure.mlps))]
    spelling = words if words is not None else tokens if callable(tokens) else None
    of = "classes" if _of_classes(structure) else "words"
    read = {"promoted": said, "of": of, "words": _words(spelling, passes, said)}
    return {**outline.told(), "passes": passes, **read}


def _views(run: Run | Pass, outline: Outline, top: int) -> list[tuple[int, View]]:
    """The passes that hold something of the structure, by number; that none does is an error."""
    passes = list(run.passes) if isinstance(run, Run) else [run]
    if not passes:
        raise TrackError("Nothing has run yet: call the model inside the block before making a page of the run.")
    views = [(n, View(outline, one, top)) for n, one in enumerate(passes)]
    whys = [view.nothing() for _, view in views]
    if all(whys):
        raise StructureError(
            f"This run holds no pattern, no coefficients and no point of the stream of {outline.structure.model}: "
            f"{whys[0].partition(' Ask for it')[0].partition(' Nearest')[0].rstrip('.')}. Expected a run of that model with "
            "keep='all': fmr.page(run, fmr.locate(run), ...)."
        )
    found = [one for one, why in zip(views, whys, strict=True) if not why]
    for number, view in found:
        _check_numbers(view.one)
        _check_same(number, view)
    return found


def _check_numbers(one: Pass) -> None:
    """Raise for a pass whose values have shapes alone; one that kept a few values recorded no graph that would tell."""
    with suppress(TrackError):
        if nothing := why_without_numbers(one):
            raise StructureError(f"There is nothing to show: {nothing}. Expected a run with real tensors.")


def _check_same(number: int, view: View) -> None:
    """Raise for a pass whose weights are not those of the structure."""
    try:
        graph = view.one.graph.unfused
        ours, theirs = view.structure.prints, find_prints(graph, view.one.__getitem__)
    except FmrError:
        return  # a run that kept a few values has no weights to compare
    weights = (name for name in theirs if name.startswith("param:"))  # buffers may be written to by each pass
    other = next((name for name in weights if name in ours and ours[name] != theirs[name]), None)
    if other is not None:
        raise StructureError(
            f"The structure is of another model than pass {number} of the run: {other} has other numbers there. Expected "
            "fmr.locate of this run, or of another run of the same model."
        )


def _check_size(views: Sequence[View]) -> None:
    size = sum(maps.numel() for view in views for maps in view.patterns if isinstance(maps, torch.Tensor))
    if size > LARGEST:
        raise DrawError(
            f"The patterns of this run are {size / 1e6:.0f} MB on a page, more than the {LARGEST / 1e6:.0f} that a browser "
            "opens at ease. Expected fewer examples, positions or passes: fmr.page(run.passes[0], ...)."
        )


def _of_classes(structure: Structure) -> bool:
    return not isinstance(structure.readout, str) and not structure.readout.of_words


def _words(words: Spelling | Sequence[str] | None, passes: Sequence[Json], said: Sequence[Json]) -> dict[int, str]:
    """The names of all words that the page shows, by token ID; none where there are no names."""
    if words is None:
        return {}
    arrays = [one["lens"]["words"] for one in passes if "words" in one["lens"]]
    arrays += [one["words"] for one in said if "words" in one]
    ids = sorted({int(n) for array in arrays for n in unpacked(array).unique()})
    if callable(words):
        return dict(zip(ids, spell(words, ids), strict=True))
    if ids and ids[-1] >= len(words):
        raise DrawError(
            f"words= has {number_of(len(words), 'name')}, and the model says number {ids[-1]}. Expected one each."
        )
    return {n: visible(words[n]) for n in ids}


def _text(model: str, data: Json) -> str:
    """The page: markup, style, code and data in one text."""
    assets = files("fmr.pages") / "assets"
    parts = {name: (assets / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    plain = json.dumps(data, separators=(",", ":"))
    for sign in "<>&":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    filled = {"TITLE": html.escape(model), "STYLE": parts["css"], "CODE": parts["js"], "DATA": plain}
    first, *rest = parts["html"].split("{{")
    return first + "".join(filled[name] + after for name, _, after in (part.partition("}}") for part in rest))
