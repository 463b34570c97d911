"""A fact edited: the rank-one update as numbers, put into a model and taken out of it to the bit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from analyzers.editing.scores import EditScores, scores_of
from analyzers.editing.update import Update
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of

if TYPE_CHECKING:
    from typing import Self


class FactEdit:
    """An edit of one fact, applied for a while or for good.

    >>> with edit:
    ...     model(**inputs)
    >>> edit.scores(["The birthplace of Junel Dunoth is"], ["Velin dal Millwick grew up in"], words=0).plot()

    update: its numbers. An edit that is applied is nothing but other numbers in one parameter; `revert` puts the bits back
    that were there.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, update: Update) -> None:
        self.model, self.tokenizer, self.update = model, tokenizer, update
        self._before: Tensor | None = None

    @property
    def is_applied(self) -> bool:
        """Whether the model has the edit now."""
        return self._before is not None

    def apply(self) -> Self:
        """Write the update into the model's weight, and return the edit.

        >>> edit.apply().revert()
        """
        if self._before is not None:
            raise AnalyzerError(f"The edit of {self.update.subject!r} is applied already. Call revert() before it is again.")
        weight = self.update.values.weight(self.model)
        before = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(self.update.of(weight))
        self._before = before
        return self

    def revert(self) -> None:
        """Put back the bits that were in the weight before.

        >>> edit.apply().revert()

        `AnalyzerError` if it is not applied, or if the weight has been changed since, by a later edit or by training.
        """
        if self._before is None:
            raise AnalyzerError(f"The edit of {self.update.subject!r} is not applied. Call apply() before revert().")
        weight = self.update.values.weight(self.model)
        if not torch.equal(weight, self.update.of(self._before)):
            raise AnalyzerError(
                f"{self.update.parameter!r} has been changed since the edit of {self.update.subject!r} was applied. Revert "
                "later edits first, the last one before the others."
            )
        with torch.no_grad():
            weight.copy_(self._before)
        self._before = None

    def __enter__(self) -> Self:
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.revert()

    def scores(
        self,
        paraphrases: Sequence[str] = (),
        neighbours: Sequence[str | tuple[str, str]] = (),
        *,
        words: int = 40,
        seed: int = 0,
    ) -> EditScores:
        """What the edit does to the fact, to other words for it, to other subjects, and to how the model writes.

        >>> edit.scores(["The birthplace of Junel Dunoth is"], words=0).rates["before"]["paraphrase"]
        0.0

        paraphrases: other prompts after which the target should follow. neighbours: prompts that should be answered as
        before, with their answers, or without them for the model's own. words: how many tokens are written after each
        prompt on the subject, for the variety of what is written; 0 for none. seed: of these, and of the control: an
        update with a random change of the same length, which is scored beside the edit and the model before it.
        """
        if self.is_applied:
            raise AnalyzerError("The edit is applied. Scores compare the model before and after: call revert() first.")
        return scores_of(self.model, self.tokenizer, self.update, paraphrases, neighbours, words, seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the numbers of the edit to one safetensors file.

        >>> edit.save("edit.safetensors")
        """
        self.update.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, tokenizer: Any = None) -> Self:
        """An edit that was saved, for a model with the same weights.

        >>> edit.save("edit.safetensors")
        >>> FactEdit.load("edit.safetensors", model, tokenizer)
        """
        return cls(model, tokenizer, Update.load(path))

    def __repr__(self) -> str:
        update = self.update
        return (
            f"FactEdit of {update.prompt!r}: {update.answer!r} -> {update.target!r}, {update.parameter} (layer "
            f"{update.layer}), {'applied' if self.is_applied else 'not applied'}\n"
            f"  |delta| / |v| {update.ratio:.2f} (clamp {update.clamp:g}), |dW| / |W| {update.weight_ratio:.3f}; p(target) "
            f"{update.before:.3f} -> {update.after:.3f} in {number_of(len(update.losses) - 1, 'step')}\n"
            f"  keys of {number_of(update.tokens, 'token')}, condition number {update.condition:.3g}; seed {update.seed}"
        )
