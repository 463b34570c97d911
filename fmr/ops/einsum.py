"""`torch.einsum` of several operands, in products of two."""

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

_Factor = tuple[str, Tensor]
"""An operand with a letter for each of its dimensions."""


def einsum(*given: Any) -> Tensor:
    """The product of several operands, two at a time from the left.

    Where nothing is summed of two, they are multiplied; first an operand is multiplied into one that has all of its letters.
    """
    factors, after = _spelled(*given)
    while len(factors) > 1:
        (word, left), (other, right), rest = factors[0], factors[1], factors[2:]
        needed = after + "".join(letters for letters, _ in rest)
        kept = "".join(letter for letter in dict.fromkeys(word + other) if letter in needed) if rest else after
        if sorted(kept) != sorted(set(word + other)) or _repeats(word) or _repeats(other):
            factors = [(kept, torch.einsum(f"{word},{other}->{kept}", left, right)), *rest]
        elif (folded := _folded(factors) if rest else None) is not None:
            factors = folded
        else:
            factors = [(kept, _spread(left, word, kept).mul(_spread(right, other, kept))), *rest]
    return factors[0][1]


def _spelled(first: Any, *given: Any) -> tuple[list[_Factor], str]:
    """The operands with their letters, and those of the result, however they were given."""
    if not isinstance(first, str):
        return _numbered(first, *given)
    operands: Sequence[Tensor] = given[0] if isinstance(given[0], (list, tuple)) else given
    before, arrow, after = first.replace(" ", "").partition("->")
    words = before.split(",")
    dots = [operand.dim() - len(word.replace("...", "")) for word, operand in zip(words, operands, strict=True)]
    spare = [letter for letter in ascii_letters if letter not in first]
    most = "".join(spare[: max((n for n, word in zip(dots, words, strict=True) if "..." in word), default=0)])
    words = [word.replace("...", most[len(most) - n :]) for n, word in zip(dots, words, strict=True)]
    if not arrow:
        together = "".join(words)
        after = "..." + "".join(sorted(one for one in set(together) if together.count(one) == 1 and one not in most))
    return list(zip(words, operands, strict=True)), after.replace("...", most)


def _numbered(*given: Any) -> tuple[list[_Factor], str]:
    """The same where dimensions are named by numbers: operand, numbers, operand, numbers, ..., numbers of the result."""
    words = [("..." if n is ... else ascii_letters[n] for n in numbers) for numbers in given[1::2]]
    before = ",".join("".join(word) for word in words)
    after = "->" + "".join("..." if n is ... else ascii_letters[n] for n in given[-1]) if len(given) % 2 else ""
    return _spelled(before + after, *given[: len(given) // 2 * 2 : 2])


def _folded(factors: list[_Factor]) -> list[_Factor] | None:
    """The operands with one of them multiplied into another that has all of its letters; None where there is none."""
    for n, (word, value) in enumerate(factors):
        for m, (other, part) in enumerate(factors):
            if n != m and set(other) <= set(word) and not _repeats(word) and not _repeats(other):
                whole = word, value.mul(_spread(part, other, word))
                return [whole if at == n else factor for at, factor in enumerate(factors) if at != m]
    return None


def _repeats(word: str) -> bool:
    return len(set(word)) < len(word)


def _spread(value: Tensor, word: str, letters: str) -> Tensor:
    """A value with a dimension for each letter, of size one where it has none."""
    ordered = value.permute([word.index(letter) for letter in letters if letter in word])
    return ordered[tuple(slice(None) if letter in word else None for letter in letters)]
