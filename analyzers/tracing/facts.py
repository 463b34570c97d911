"""A fact as a model reads it: the tokens of the prompt, which of them are its subject, and the tokens of the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from analyzers.prompts import check_known
from analyzers.protocol import AnalyzerError


@dataclass(frozen=True, eq=False)
class Fact:
    """A prompt in tokens: `ids` (tokens,), the text of each, the positions of the subject, and the ids of the answer."""

    ids: Tensor
    tokens: tuple[str, ...]
    subject: tuple[int, ...]
    answer: tuple[int, ...]

    def inputs(self, examples: int = 1) -> dict[str, Tensor]:
        """What a model is called with to be asked for the answer: the prompt and all of the answer but its last token."""
        ids = torch.cat([self.ids, torch.tensor(self.answer[:-1], dtype=self.ids.dtype)])
        return {"input_ids": ids.repeat(examples, 1)}


def fact_of(prompt: Any, subject: Any, answer: Any, tokenizer: Any, behind: int = 0) -> Fact:
    """A fact in tokens, from text or from token ids.

    >>> fact_of("Junel Dunoth grew up in", "Junel Dunoth", "Brigost", tokenizer).subject
    (1, 2)

    prompt: a text, or its token ids. subject: a part of that text, found by its characters, or the positions of its tokens.
    answer: what follows, put behind the prompt like the next word; a token id, or several; None for none. behind: so many
    characters come before the text that holds the subject.
    """
    if not isinstance(prompt, str):
        ids = _ids(prompt)
        if isinstance(subject, str) or isinstance(answer, str):
            raise AnalyzerError(
                f"The prompt is token ids, the subject {subject!r} and the answer {answer!r}. Expected positions, such as "
                "subject=[1, 2], and a token id; or all of them as text, with a tokenizer behind the model."
            )
    elif tokenizer is None:
        raise AnalyzerError(f"The prompt {prompt!r} is text, and there is no tokenizer. Pass one behind the model.")
    else:
        ids = _ids(tokenizer(prompt)["input_ids"])
    places = span(prompt, subject, tokenizer, behind) if isinstance(subject, str) else _places(subject, len(ids))
    tokens = tuple(str(one) if tokenizer is None else tokenizer.decode([one]) for one in ids.tolist())
    return Fact(ids, tokens, places, _answer(prompt, ids, answer, tokenizer))


def span(text: str, subject: str, tokenizer: Any, behind: int = 0) -> tuple[int, ...]:
    """The positions of the tokens of which a character belongs to the subject.

    >>> span("Junel Dunoth grew up in", "Dunoth", tokenizer)
    (2,)
    """
    times = text.count(subject, behind) if subject else 0
    if times != 1:
        asked = "once" if times else "as it stands there, capitals and accents included"
        raise AnalyzerError(f"The subject {subject!r} is {times} times in {text!r}. Expected it {asked}.")
    start = text.index(subject, behind)
    return tuple(
        place for place, (a, b) in enumerate(_offsets(text, tokenizer)) if a < b and a < start + len(subject) and b > start
    )


def _offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """From which character to which each token goes; where the tokenizer does not tell, by decoding it bit by bit."""
    if getattr(tokenizer, "is_fast", False):
        return [(a, b) for a, b in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    ids = list(tokenizer(text)["input_ids"])
    parts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(len(ids) + 1)]
    if parts[-1] != text:
        raise AnalyzerError(
            f"The tokenizer does not tell which characters its tokens are, and makes {parts[-1]!r} of {text!r}. Expected a "
            "fast tokenizer, or the positions of the subject: subject=[1, 2]."
        )
    return [(len(a), len(b)) for a, b in pairwise(parts)]


def continued(prompt: str, answer: str) -> str:
    """The prompt with the answer behind it as its next word: after a blank, if the prompt has any and neither brings one.

    >>> continued("Junel Dunoth grew up in", "Brigost")
    'Junel Dunoth grew up in Brigost'
    """
    blank = " " if " " in prompt and not prompt[-1].isspace() and not answer[:1].isspace() else ""
    return prompt + blank + answer


def _answer(prompt: Any, ids: Tensor, answer: Any, tokenizer: Any) -> tuple[int, ...]:
    if answer is None:
        return ()
    if not isinstance(answer, str):
        found = tuple(_ids([answer] if isinstance(answer, int) else answer).tolist())
    elif tokenizer is None or not isinstance(prompt, str):
        raise AnalyzerError(f"The answer {answer!r} is text, and the prompt is none. Expected a token id.")
    else:
        whole = _ids(tokenizer(continued(prompt, answer))["input_ids"])
        if not torch.equal(whole[: len(ids)], ids):
            raise AnalyzerError(
                f"The tokens of {prompt!r} are others when {answer!r} follows. Expected an answer that begins a word, and a "
                "prompt that ends with one, without a blank."
            )
        found = tuple(whole[len(ids) :].tolist())
        check_known(answer, found, tokenizer)
    if not found:
        raise AnalyzerError(f"The answer {answer!r} has no token. Expected a word, or None for what the model says itself.")
    return found


def _ids(given: Any) -> Tensor:
    ids = torch.as_tensor(given)
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
        raise AnalyzerError(
            f"Token ids have shape {tuple(ids.shape)} of {ids.dtype}, expected those of one prompt: (tokens,)."
        )
    return ids.long()


def _places(subject: Any, length: int) -> tuple[int, ...]:
    places = sorted(set(subject)) if isinstance(subject, Sequence | range) else []
    if not places or not all(type(place) is int and 0 <= place < length for place in places):
        raise AnalyzerError(f"subject={subject!r}: expected a part of the text, or positions of it from 0 to {length - 1}.")
    return tuple(places)


def asked(given: Any) -> tuple[Any, Any, Any]:
    """Prompt, subject and answer (None where there is none) of a fact that is a mapping, a named tuple or a tuple.

    >>> asked({"prompt": "Junel Dunoth grew up in", "subject": "Junel Dunoth"})
    ('Junel Dunoth grew up in', 'Junel Dunoth', None)
    """
    if hasattr(given, "_asdict"):
        given = given._asdict()
    if isinstance(given, Mapping) and {"prompt", "subject"} <= given.keys():
        return given["prompt"], given["subject"], given.get("answer")
    if isinstance(given, tuple) and len(given) in (2, 3):
        return given[0], given[1], given[2] if len(given) == 3 else None
    raise AnalyzerError(
        f"A fact is {type(given).__name__} {str(given)[:60]!r}, expected prompt, subject and answer: a tuple, or a mapping "
        "with these names."
    )
