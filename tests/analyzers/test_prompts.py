"""Answers as text: a word is looked up as it follows a prompt, not as it would go on with its last word; tensors."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from analyzers.prompts import Prompts, prompts, token_ids
from analyzers.protocol import AnalyzerError

VOCABULARY = ["The", " capital", " of", "Italy", " Italy", "ist", "=", "32", " 32"]


class Bytes:
    """A tokenizer whose words have their blank before them, as those that split bytes."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [VOCABULARY.index(text)] if text in VOCABULARY else [0, 0]}

    def decode(self, ids: list[int]) -> str:
        return "".join(VOCABULARY[one] for one in ids)


def _after(*tokens: str) -> Prompts:
    return Prompts({}, (tokens,))


@pytest.mark.parametrize("answers", ["Italy", [" Italy", "Italy"]])
def test_a_word_without_its_blank_is_refused_behind_a_word(answers: Any) -> None:
    with pytest.raises(AnalyzerError, match=r"goes on with .* as in ' ofItaly'.*: ' Italy'; or .* 3\."):
        token_ids(answers, Bytes(), _after("The", " capital", " of"))


@pytest.mark.parametrize(
    ("answer", "tokens", "number"),
    [
        (" Italy", ("The", " capital", " of"), 4),
        ("Italy", ("The", " capital", " of", "="), 3),  # what comes next may stand without a blank
        ("Italy", ("The",), 3),  # no words with blanks between them
        ("ist", ("The", " capital"), 5),  # no word of its own
        ("32", ("The", " capital"), 7),
    ],
)
def test_what_can_follow_as_it_stands_is_taken(answer: str, tokens: tuple[str, ...], number: int) -> None:
    assert token_ids(answer, Bytes(), _after(*tokens)) == number
    assert token_ids(answer, Bytes()) == number


class Pixels(torch.nn.Module):
    def forward(self, pixels: torch.Tensor, scale: float = 1.0, **others: Any) -> torch.Tensor:
        return pixels * scale


class Words(torch.nn.Module):
    def forward(self, mask: torch.Tensor | None = None, input_ids: torch.Tensor | None = None) -> None: ...


class Wrapped(torch.nn.Module):
    def forward(self, **inputs: Any) -> None: ...


@pytest.mark.parametrize(("model", "name"), [(Pixels(), "pixels"), (Words(), "input_ids"), (Wrapped(), "input_ids")])
def test_a_tensor_is_the_first_argument_of_a_model_without_input_ids(model: torch.nn.Module, name: str) -> None:
    assert list(prompts(torch.zeros(1, 3, dtype=torch.long), model).inputs) == [name]


def test_numbers_are_tokens_whatever_they_say() -> None:
    assert token_ids(3, SimpleNamespace(), _after("The", " capital")) == 3


@pytest.mark.parametrize("shape", [(2, 5), (2, 3), (1, 4)])
def test_a_mask_of_other_tokens_is_refused(shape: tuple[int, int]) -> None:
    inputs = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(shape, dtype=torch.long)}
    with pytest.raises(AnalyzerError, match=r"mask has shape \(., .\), expected .* = \(2, 4\) as the tokens"):
        prompts(inputs, Wrapped())
