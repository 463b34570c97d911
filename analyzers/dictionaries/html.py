"""Pages of latents as HTML that needs no other file."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from fmr.errors import number_of

if TYPE_CHECKING:
    from analyzers.dictionaries.latents import LatentPages

STYLE = """body{font:14px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
h2{font-size:1.1em;margin:1.6em 0 .2em;border-top:1px solid #ddd;padding-top:.8em}
.text{font-family:ui-monospace,monospace;font-size:13px;margin:.15em 0}
.text .v{display:inline-block;width:4.5em;color:#777}.text span{padding:0 1px;border-radius:2px}
.text .at{outline:1.5px solid #b35806}.small{color:#555;font-size:13px}"""


def page(pages: LatentPages) -> str:
    """All pages as one document."""
    title = html.escape(f"Latents at {pages.role or pages.site}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{body(pages)}</body></html>\n"
    )


def body(pages: LatentPages) -> str:
    """The pages as a part of a document."""
    counted = f"{number_of(pages.rows, 'token')} of {number_of(pages.documents, 'text')}, {number_of(pages.size, 'latent')}"
    return f'<div><p class="small">{counted}</p>{"".join(_latent(pages, n) for n in range(len(pages.latents)))}</div>'


def _latent(pages: LatentPages, n: int) -> str:
    """One latent: how often it fires, its contexts, its words, its neighbours, its writers."""
    top = max((values[place] for _, place, values in pages.contexts[n]), default=1.0)
    texts = "".join(_text(tokens, place, values, top) for tokens, place, values in pages.contexts[n])
    lines = [line.strip() for line in pages.text(pages.latents[n]).splitlines()]
    rest = "".join(f'<div class="small">{html.escape(line)}</div>' for line in lines[1 + len(pages.contexts[n]) :])
    return f"<h2>{html.escape(lines[0])}</h2>{texts}{rest}"


def _text(tokens: tuple[str, ...], place: int, values: tuple[float, ...], top: float) -> str:
    """A context, each token the darker the more the latent fires there; the one it is a context of has a frame."""
    blank = "" if any(token[:1].isspace() or token[-1:].isspace() for token in tokens) else " "
    spans = [
        f'<span{" class=at" if at == place else ""} title="{value:.2f}" style="background:rgba(230,97,1,'
        f'{min(1.0, max(0.0, value / top)) * 0.7:.2f})">{html.escape(token)}</span>'
        for at, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]
    return f'<div class="text"><span class="v">{values[place]:.2f}</span>{blank.join(spans)}</div>'
