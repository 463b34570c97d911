"""Text or tensors as what a model is called with, and the tokens that label what is measured."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.protocol import AnalyzerError, Given, checked, real_tokens
from fmr.nests import leaves


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a model is called with, and the tokens of each example as text, without padding."""

    inputs: Mapping[str, Any]
    tokens: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ids(self) -> Tensor | None:
        """The token ids, (examples, positions): `input_ids`, or the only tensor of whole numbers that is no mask."""
        given = self.inputs.get("input_ids")
        if isinstance(given, Tensor):
            return given
        whole = [
            one
            for name, one in self.inputs.items()
            if isinstance(one, Tensor) and one.dim() == 2 and one.dtype in (torch.int32, torch.int64) and "mask" not in name
        ]
        return whole[0] if len(whole) == 1 else None

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many real tokens each example has."""
        return tuple(map(len, self.tokens))

    @property
    def length(self) -> int | None:
        """The number of tokens of every example, None where they differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @property
    def labels(self) -> tuple[str, ...]:
        """A label for each position: the token where all examples have the same there, else its number."""
        columns = list(zip(*self.tokens, strict=False))
        return tuple(column[0] if len(set(column)) == 1 else str(place) for place, column in enumerate(columns))

    @property
    def last_word(self) -> str:
        """The last token of the first prompt of words with blanks between them that ends in a letter; else nothing."""
        ends = (row[-1] for row in self.tokens if any(" " in token for token in row))
        return next((end for end in ends if end[-1:].isalpha()), "")

    def rolled(self) -> "Prompts":
        """The same examples, each in the place of the one before it."""
        examples = len(self)

        def roll(value: Any) -> Any:
            counts = isinstance(value, Tensor) and value.dim() and len(value) == examples
            return value.roll(1, 0) if counts else value

        return Prompts({name: roll(value) for name, value in self.inputs.items()}, (*self.tokens[-1:], *self.tokens[:-1]))


def prompts(given: Given, model: nn.Module, tokenizer: Any = None) -> Prompts:
    """Prompts of any kind as inputs of a model; texts of unequal length are padded on the left, so that the last is last.

    >>> prompts(["Alice gave", "Alice went"], model, tokenizer).labels
    ('<bos>', 'Alice', '2')

    A model that takes `position_ids` is given those of the real tokens then, since not every one counts them itself. A
    tensor is `input_ids`, or the first argument of a model that has none of that name.

    `AnalyzerError` for texts without a tokenizer, for no text at all, and for what is none of these.
    """
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Tensor):
        return _of_inputs({_first_argument(model, given): given}, model, tokenizer)
    if isinstance(given, Mapping):
        return _of_inputs(_known(checked(given), model), model, tokenizer)
    texts = list(given) if isinstance(given, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise AnalyzerError(
            f"Prompts are {type(given).__name__} {str(given)[:60]!r}: expected a text, a list of texts, token ids "
            "(examples, positions) or the model's arguments by name."
        )
    if tokenizer is None:
        raise AnalyzerError(f"The prompt {texts[0]!r} is text, and there is no tokenizer. Pass one behind the model.")
    return _of_inputs(_known(_encoded(texts, model, tokenizer), model), model, tokenizer)


def pairs(clean: Given, corrupted: Given, model: nn.Module, tokenizer: Any = None) -> tuple[Prompts, Prompts]:
    """Two lists of prompts that belong together one by one, with as many tokens each.

    >>> clean, corrupted = pairs("Alice gave", "Karen gave", model, tokenizer)
    """
    both = prompts(clean, model, tokenizer), prompts(corrupted, model, tokenizer)
    if len(both[0]) != len(both[1]):
        raise AnalyzerError(f"There are {len(both[0])} clean prompts and {len(both[1])} corrupted ones: expected pairs.")
    for place, (one, other) in enumerate(zip(both[0].tokens, both[1].tokens, strict=True)):
        if len(one) != len(other):
            raise AnalyzerError(
                f"Pair {place} has {len(one)} clean tokens and {len(other)} corrupted ones, so that positions do not "
                f"correspond: {' '.join(one)!r} and {' '.join(other)!r}. Expected as many: choose words of as many tokens."
            )
    return both


def token_ids(answers: Any, tokenizer: Any, given: Prompts | None = None) -> Any:
    """Answers as token ids: texts of one token each are looked up, numbers stay what they are.

    >>> token_ids(["Alice", "Karen"], tokenizer).shape
    torch.Size([2])

    given: the prompts, behind whose last word a text without its blank is refused where that is another token.
    """
    if isinstance(answers, str):
        return _single(answers, tokenizer, given)
    if isinstance(answers, Sequence) and any(isinstance(answer, str) for answer in answers):
        return torch.tensor([_single(a, tokenizer, given) if isinstance(a, str) else int(a) for a in answers])
    return answers


def _single(text: str, tokenizer: Any, given: Prompts | None) -> int:
    if tokenizer is None:
        raise AnalyzerError(f"The answer {text!r} is text, and there is no tokenizer. Pass one behind the model.")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    check_known(text, ids, tokenizer)
    if len(ids) != 1:
        parts = ", ".join(repr(tokenizer.decode([one])) for one in ids)
        remedy = "" if text.startswith(" ") else f" A word within a text begins with a space: {' ' + text!r}."
        raise AnalyzerError(f"The answer {text!r} is {len(ids)} tokens ({parts}), expected one.{remedy}")
    behind = given.last_word if given is not None else ""
    word = list(tokenizer(" " + text, add_special_tokens=False)["input_ids"]) if behind and text[0].isalpha() else []
    if len(word) == 1 and word != ids:
        raise AnalyzerError(
            f"The answer {text!r} is a token that goes on with the last word of the prompt, as in {behind + text!r}. "
            f"Expected the next word, with its blank: {' ' + text!r}; or the token's number, {ids[0]}."
        )
    return int(ids[0])


def check_known(answer: str, ids: Sequence[int], tokenizer: Any) -> None:
    """Whether a tokenizer has tokens for an answer; `AnalyzerError` where it has its unknown one."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids and tokenizer.unk_token not in answer:
        raise AnalyzerError(
            f"The answer {answer!r} is no token of this tokenizer, which knows {tokenizer.unk_token!r} for it."
        )


def _encoded(texts: list[str], model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    rows = tokenizer(texts)["input_ids"]
    even = len({len(row) for row in rows}) == 1
    if even:
        return dict(tokenizer(texts, return_tensors="pt"))
    if getattr(tokenizer, "pad_token", None) is None:
        sizes = ", ".join(str(len(row)) for row in rows[:4])
        raise AnalyzerError(
            f"The prompts have {sizes} tokens, and the tokenizer has none to pad with. Set tokenizer.pad_token = "
            "tokenizer.eos_token, or pass prompts of one length."
        )
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


def _arguments(model: nn.Module) -> list[inspect.Parameter]:
    """The arguments of a model's forward."""
    return list(inspect.signature(model.forward).parameters.values())


def _first_argument(model: nn.Module, given: Tensor) -> str:
    """The name under which a tensor is given."""
    arguments = _arguments(model)
    named = [one.name for one in arguments if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if "_orig_mod" in model._modules:
        raise AnalyzerError(
            "The model is compiled, and its code is not watched. Expected the one underneath, model._orig_mod."
        )
    if not named and (given.is_floating_point() or not _takes(arguments, "input_ids")):
        told = ", ".join(map(str, arguments)) or "nothing"
        raise AnalyzerError(
            f"The prompts are a tensor, and the forward of {type(model).__name__} takes {told}: no argument has a name. "
            "Expected a model whose forward names its inputs; a module of two lines around it will do."
        )
    return named[0] if named and "input_ids" not in [one.name for one in arguments] else "input_ids"


def _takes(arguments: Sequence[inspect.Parameter], name: str) -> bool:
    return any(one.name == name or one.kind is inspect.Parameter.VAR_KEYWORD for one in arguments)


def _known(inputs: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Named arguments, all of which the model takes."""
    arguments = _arguments(model)
    strange = [name for name in inputs if not _takes(arguments, name)]
    if strange:
        names = [one.name for one in arguments]
        raise AnalyzerError(
            f"The prompts have {', '.join(strange)}, and the forward of {type(model).__name__} takes {', '.join(names)}. "
            f"Expected its arguments by name, as {{{names[0] if names else 'x'!r}: tensor}}."
        )
    return inputs


def _of_inputs(inputs: dict[str, Any], model: nn.Module, tokenizer: Any) -> Prompts:
    """Named arguments on the model's device, with the text of their tokens; without a tokenizer, with their ids."""
    device = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), torch.device("cpu"))
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 1:
        ids = inputs["input_ids"] = ids[None]
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        first = next(tensor for _, tensor in leaves(inputs))
        _check_some(first)
        columns = first.shape[1] if first.dim() > 1 else 1
        return Prompts(inputs, tuple(tuple(map(str, range(columns))) for _ in range(len(first))))
    _check_some(ids)
    mask = inputs.get("attention_mask")
    by_token = isinstance(mask, Tensor) and mask.dim() == 2 and inputs.get("past_key_values") is None
    real = real_tokens(mask if by_token else None, *ids.shape).to(ids.device)
    rows = [row[kept].tolist() for row, kept in zip(ids, real, strict=True)]
    return Prompts(inputs, tuple(tuple(map(_as_text(tokenizer), row)) for row in rows))


def _check_some(first: Tensor) -> None:
    if not first.numel():
        raise AnalyzerError(f"The prompts have shape {list(first.shape)}: expected an example with a token, or several.")


def _as_text(tokenizer: Any) -> Any:
    return str if tokenizer is None else lambda token: tokenizer.decode([token])
