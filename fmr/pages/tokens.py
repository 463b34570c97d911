"""What stands at the columns of a page: tokens of each pass and example, and words of the vocabulary."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fmr.errors import DrawError, IdError, number_of
from fmr.ids import TensorId

Spelling = Callable[[list[int]], Sequence[str]]
"""What token IDs are called: the text of each."""


class Tokenizer(Protocol):
    """What knows the texts of token IDs, as tokenizers of the transformers library do."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """A name for each ID."""

    def decode(self, ids: Any) -> Any:
        """The text of IDs."""


Tokens = Sequence[Any] | Tokenizer | Spelling | None
"""One token per position; a list of them for each example; a tuple of either for each stream; a spelling; or nothing."""

Given = TypeVar("Given")


def spelled_by(given: Sequence[Given] | Tokenizer | Spelling | None) -> Sequence[Given] | Spelling | None:
    """What was given for tokens, a tokenizer by its function that spells."""
    if not hasattr(given, "convert_ids_to_tokens"):
        return given
    tokenizer = cast("Tokenizer", given)
    return lambda ids: [str(tokenizer.decode([one])) for one in ids]


def visible(text: object) -> str:
    """A token in which everything can be seen: blanks are marked, and what is not printed, as a line's end, is written out.

    >>> visible(" a\\n"), visible("")
    ('␣a\\\\n', '(empty)')
    """
    text = str(text).replace(" ", "␣")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))
    return shown or "(empty)"


@dataclass(frozen=True)
class Text:
    """The positions of one stream in one pass: how many, from which one of the text on, and the IDs of their tokens.

    keys: those of an attention, (examples, heads, positions, units), by which an example is known again in the next pass.
    """

    positions: int
    start: int
    ids: Tensor | None = None
    keys: Tensor | None = None

    @property
    def end(self) -> int:
        """How many tokens the text has up to the end of the pass."""
        return self.start + self.positions


def spell(spelling: Spelling, ids: Sequence[int]) -> list[str]:
    """The names of token IDs; a function that does not give one text for each is a `DrawError`."""
    told = spelling(list(ids))
    if isinstance(told, str) or len(told) != len(ids):
        raise DrawError(
            f"{getattr(spelling, '__name__', type(spelling).__name__)} made {str(told)[:80]!r} of "
            f"{number_of(len(ids), 'token ID')}. Expected a list of one text each, as tokenizer.convert_ids_to_tokens gives."
        )
    return [visible(token) for token in told]


def columns(
    tokens: Sequence[Any] | Spelling | None, texts: Sequence[Sequence[Text | None]], examples: int
) -> list[list[list[list[str]] | None]]:
    """The tokens of each pass, stream and example, from the beginning of the text to the end of the pass; None for numbers.

    texts: for each pass what is known of each stream, None where the pass has no part of it.
    """
    if tokens is None:
        return [[None for _ in streams] for streams in texts]
    if callable(tokens):
        return _spelled(tokens, texts)
    of_stream = _of_streams(tokens, len(texts[0]))
    given = [_checked(of_stream[n], [streams[n] for streams in texts], examples) for n in range(len(texts[0]))]
    return [
        [
            None if text is None or own is None else [row[: text.end] for row in own]
            for text, own in zip(s, given, strict=True)
        ]
        for s in texts
    ]


def _spelled(spelling: Spelling, texts: Sequence[Sequence[Text | None]]) -> list[list[list[list[str]] | None]]:
    """The tokens by their IDs: under a cache those of earlier passes come first."""
    if not any(text is not None and text.ids is not None for streams in texts for text in streams):
        raise DrawError(
            "tokens= is a function of token IDs, and no stream of this run begins with IDs that it kept. Expected one token "
            "per position, as tokens=[...], or tokens=None for numbers."
        )
    before: dict[int, tuple[Text, list[list[str]]]] = {}
    found = []
    for streams in texts:
        row: list[list[list[str]] | None] = []
        for n, text in enumerate(streams):
            now = [spell(spelling, ids) for ids in text.ids.tolist()] if text is not None and text.ids is not None else None
            if now is not None and text is not None and text.start:
                old = _followed(*before[n], text) if n in before else []
                fits = len(old) == len(now) and all(len(one) == text.start for one in old)
                now = [a + b for a, b in zip(old, now, strict=True)] if fits else None
            if now is not None and text is not None:
                before[n] = text, now
            row.append(now)
        found.append(row)
    return found


def _followed(last: Text, old: list[list[str]], text: Text) -> list[list[str]]:
    """The earlier tokens of each example of a pass, which beams bring into another order; empty where that is not known."""
    if len(old) == 1:
        return old
    if last.keys is None or text.keys is None or last.keys.shape[::3] != text.keys.shape[::3]:
        return []
    cached = text.keys.shape[2] - text.positions
    parts = (slice(0, text.start),) * 2 if cached >= text.start else (slice(-cached, None), slice(0, cached))
    known, held = last.keys[:, :, parts[0]], text.keys[:, :, parts[1]]
    found = []
    for row in held:
        same = [tokens for tokens, one in zip(old, known, strict=True) if torch.equal(one, row)]
        if not same or any(tokens != same[0] for tokens in same):
            return []
        found.append(same[0])
    return found


def _of_streams(tokens: Sequence[Any], streams: int) -> list[Any]:
    """What is given for each stream: a tuple has one part for each, anything else is meant for the last."""
    if isinstance(tokens, str):
        raise DrawError(
            f"tokens={tokens!r} is one text. Expected one token per position, as tokenizer.convert_ids_to_tokens(ids) gives."
        )
    if isinstance(tokens, tuple) and not all(isinstance(part, str) for part in tokens):
        if len(tokens) != streams:
            raise DrawError(
                f"tokens= has {number_of(len(tokens), 'part')}, expected one for each of {number_of(streams, 'stream')}."
            )
        return list(tokens)
    if not isinstance(tokens, Iterable) or isinstance(tokens, Tensor):
        raise DrawError(
            f"tokens= is a {type(tokens).__name__}. Expected a tokenizer, one text per position, as "
            "tokenizer.convert_ids_to_tokens(ids) gives, or a list of these for each example."
        )
    return [None] * (streams - 1) + [list(tokens)]


def _checked(tokens: Any, texts: Iterable[Text | None], examples: int) -> list[list[str]] | None:
    """The tokens of each example, as many as the longest pass has positions."""
    if tokens is None:
        return None
    odd = next((one for one in tokens if isinstance(one, str) or not isinstance(one, Iterable)), None)
    if odd is not None and not all(isinstance(token, str) for token in tokens):
        raise DrawError(
            f"tokens= holds {odd!r}, a {type(odd).__name__}. Expected texts, one per position, or a list of them for each "
            "example, as tokenizer.convert_ids_to_tokens(ids) gives of IDs."
        )
    rows = [list(tokens)] if all(isinstance(token, str) for token in tokens) else [list(row) for row in tokens]
    most = max((text.end for text in texts if text is not None), default=0)
    if len(rows) == 1 < examples and all(isinstance(token, str) for token in tokens):
        raise DrawError(
            f"Got one list of {number_of(len(rows[0]), 'token')} for {examples} examples. Expected a list for each of them."
        )
    if len(rows) != examples:
        raise DrawError(
            f"Got tokens of {number_of(len(rows), 'example')}, but the run has {examples}. Expected one list each."
        )
    for n, row in enumerate(rows):
        if len(row) != most:
            raise DrawError(
                f"Got {number_of(len(row), 'token')} for example {n}, but the run has {number_of(most, 'position')}. "
                "Expected one each; tokens=None shows numbers."
            )
    return [[visible(token) for token in row] for row in rows]


def token_ids(run: Any, source: TensorId | None, examples: int, positions: int) -> Tensor | None:
    """The IDs of the tokens that a stream begins with, (examples, positions); None where the run does not hold so many."""
    if source is None:
        return None
    try:
        ids: Tensor = run[source]
    except IdError:
        return None
    if ids.dtype.is_floating_point or ids.numel() != examples * positions:
        return None
    return ids.detach().cpu().reshape(examples, positions)
