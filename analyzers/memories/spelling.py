"""Tokens as text, one by one, and what stands between them."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

SPACE, INSIDE = "▁", "##"
"""How some tokenizers mark a token that begins a word, and how others mark one that goes on with it."""


def spelled(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """The text of tokens; their numbers where there is no tokenizer.

    >>> spelled(tokenizer, [5])
    """
    if tokenizer is None:
        return {one: str(one) for one in ids}
    return {one: _one(tokenizer, one) for one in ids}


def _one(tokenizer: Any, number: int) -> str:
    word = str(tokenizer.decode([number]))
    raw = tokenizer.convert_ids_to_tokens(number) if hasattr(tokenizer, "convert_ids_to_tokens") else word
    return f" {word}" if str(raw).startswith(SPACE) and not word.startswith(" ") else word


def glue(tokenizer: Any, texts: Iterable[Sequence[int]]) -> str:
    """What stands between tokens in a text: a space where they are whole words, else nothing.

    >>> glue(tokenizer, tokenizer(texts[:2])["input_ids"])
    ' '
    """
    if tokenizer is None:
        return " "
    for ids in texts:
        words = spelled(tokenizer, ids)
        for one, two in pairwise(ids):
            if f"{words[one]} {words[two]}" == tokenizer.decode([one, two]):
                return " "
    return ""


def joined(words: Iterable[str], between: str) -> str:
    """Tokens as one text.

    >>> joined(["play", "##ing", "fair"], " ")
    'playing fair'
    """
    return between.join(words).replace(f" {INSIDE}", "") if between else "".join(words)
