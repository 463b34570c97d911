"""The tokens on which jobs of heads show: random ones said twice, random ones that never come back, and people who give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from analyzers.protocol import AnalyzerError
from fmr.errors import whole_number

NAMES = """Mary John Alice Bob Tom James Sarah Peter Emma Frank Kate Simon Laura Kevin Anna David George Henry Jack
Paul Martin Adam Lucy Robert Steve Diana Max Eric Clara Louis Maria Oscar Karen Bella Felix Grace
Thomas Victor Wendy Ralph""".split()
SCENES = (
    "When {} and {} went to the store, {} gave a drink to",
    "When {} and {} went to the park, {} gave a book to",
    "When {} and {} went to the office, {} gave a ring to",
    "When {} and {} went to the school, {} gave a ball to",
    "When {} and {} went to the store , {} gave a book to",
)
"""Two people of whom one gives: the word that follows is the other's name. The last is for tokens that are words."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Sequences of 1 + 2n tokens: a first one, n random ones, and these again (`twice`) or n others (`once`)."""

    twice: Tensor
    once: Tensor
    length: int


def draw_tokens(pool: Tensor, first: int | None, examples: int, length: int, seed: int) -> Draws:
    """Random tokens, all of a sequence different; the first one is the same in all of them where it is given.

    >>> draw_tokens(torch.arange(100), 0, 2, 5, seed=0).twice.shape
    torch.Size([2, 11])
    """
    pool = pool[pool != first] if first is not None else pool
    if len(pool) <= 2 * length:
        raise AnalyzerError(
            f"length={length} needs more than {2 * length} different tokens, and there are {len(pool)} to draw from. "
            "Expected a smaller length, or more ids."
        )
    random = torch.Generator().manual_seed(seed)
    known = _different(pool, examples, length, random, pool.new_empty(examples, 0))
    others = _different(pool, examples, length, random, known)
    beginning = (
        torch.full((examples, 1), first)
        if first is not None
        else _different(pool, examples, 1, random, torch.cat([known, others], 1))
    )
    return Draws(torch.cat([beginning, known, known], 1), torch.cat([beginning, known, others], 1), length)


def _different(pool: Tensor, examples: int, length: int, random: torch.Generator, taken: Tensor) -> Tensor:
    """Tokens of which none comes twice in a row nor among those already taken there; what does is drawn again."""
    found = pool[torch.randint(len(pool), (examples, length), generator=random)]
    for row, before in zip(found, taken, strict=True):
        seen = set(before.tolist())
        for place, token in enumerate(row.tolist()):
            while token in seen:
                token = int(pool[torch.randint(len(pool), (), generator=random)])
            row[place] = token
            seen.add(token)
    return found


def pool_of(ids: Sequence[int] | None, rows: int, tokenizer: Any) -> Tensor:
    """The tokens to draw from: those given, else all that the model looks up and the tokenizer means as text."""
    if ids is None:
        special = set(getattr(tokenizer, "all_special_ids", ()) or ())
        known = len(tokenizer) if tokenizer is not None else rows
        return torch.tensor([n for n in range(min(rows, known)) if n not in special])
    numbers = [whole_number(one) for one in ids]
    if not numbers or any(one is None or not 0 <= one < rows for one in numbers):
        raise AnalyzerError(f"ids={str(ids)[:60]}: expected token ids from 0 to {rows - 1}, as range(1000, 40000).")
    return torch.tensor(list(dict.fromkeys(numbers)))


@dataclass(frozen=True, eq=False)
class People:
    """Prompts in which one of two people gives: the tokens, who receives and who gives (ids), and all names (ids)."""

    inputs: tuple[Mapping[str, Any], ...]
    receivers: Tensor
    givers: Tensor
    names: Tensor


def draw_people(tokenizer: Any, seed: int, prompts: int = 16) -> People | str:
    """Prompts with names of one token each, or why there are none."""
    if tokenizer is None:
        return "there is no tokenizer to write names with: Heads(model, tokenizer)"
    ids = {name: _single(tokenizer, name) for name in NAMES}
    known = {name: token for name, token in ids.items() if token is not None}
    if len(known) < 6:
        return f"the tokenizer has {len(known)} of {len(NAMES)} common names as single tokens, expected 6 or more"
    scene = [text for text in SCENES if not _unknown(tokenizer, text)]
    if not scene:
        return "the tokenizer has no tokens for the words around the names"
    random = torch.Generator().manual_seed(seed)
    pairs = list(permutations(sorted(known), 2))
    chosen = [pairs[n] for n in torch.randperm(len(pairs), generator=random)[: (prompts + 1) // 2].tolist()]
    texts, receivers, givers = [], [], []
    for number, (giver, receiver) in enumerate(chosen):
        for pair in ((giver, receiver), (receiver, giver)):
            texts.append(scene[number % len(scene)].format(*pair, giver))
            receivers.append(known[receiver])
            givers.append(known[giver])
    inputs = tuple({"input_ids": tokenizer(text, return_tensors="pt")["input_ids"]} for text in texts)
    for one, receiver, giver in zip(inputs, receivers, givers, strict=True):
        row = one["input_ids"][0].tolist()
        if (row.count(receiver), row.count(giver)) != (1, 2):
            return "the tokenizer writes names in a text in another way than alone"
    return People(inputs, torch.tensor(receivers), torch.tensor(givers), torch.tensor(sorted(known.values())))


def _single(tokenizer: Any, name: str) -> int | None:
    """The one token of a name within a text."""
    ids = list(tokenizer(f" {name}", add_special_tokens=False)["input_ids"])
    return int(ids[0]) if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None) else None


def _unknown(tokenizer: Any, text: str) -> bool:
    """Whether words of a text are no tokens."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    return unknown is not None and unknown in tokenizer(text.replace("{}", ""), add_special_tokens=False)["input_ids"]
