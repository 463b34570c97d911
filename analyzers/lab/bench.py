"""A bench: a model with its tools, and what was kept of the experiments on it."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from analyzers.lab.errors import LabError
from analyzers.lab.ledger import opened
from analyzers.lab.tools import GIVEN, known, made_of
from analyzers.lab.version import Version, Versions
from analyzers.protocol import check_model
from fmr.errors import nearest


class Bench:
    """What experiments are run with and kept in."""

    def __init__(self, model: nn.Module | None, folder: str | PathLike[str], tokenizer: Any = None) -> None:
        if model is not None:
            check_model(model, "Lab")
        self.model, self.tokenizer = model, tokenizer
        self.ledger = opened(folder, make=model is not None)
        self.folder = Path(folder)
        self.tools: dict[str, Callable[..., Any]] = known()

    @property
    def names(self) -> list[str]:
        """The names of parameters that are given to experiments."""
        return [*GIVEN, *self.tools]

    def given(self, name: str) -> Any:
        """What a parameter of this name is given: the model, the tokenizer, or a tool made of them."""
        if name in GIVEN:
            found = getattr(self, name)
            if found is None:
                raise LabError(
                    f"The lab has no {name}, which an experiment asks for. Make it with one: Lab(model, folder, tokenizer)."
                )
            return found
        return made_of(self.tools[name], name, self.given, self.tokenizer is not None)

    def versions(self, name: str | None = None) -> Versions:
        """The versions of an experiment, oldest first; of all experiments without a name.

        >>> lab.versions("kept")[-1].result
        {'double': 16}
        """
        rows = self.ledger.rows("SELECT * FROM versions WHERE ?1 IS NULL OR name=?1 ORDER BY made, rowid", name)
        names = [row[0] for row in self.ledger.rows("SELECT DISTINCT name FROM attempts")]
        if name is not None and name not in names:
            told = f" It has {', '.join(map(repr, names[:8]))}." if names else " It has none yet."
            raise LabError(f"The lab in {self.folder} has no experiment {name!r}.{told}{nearest(str(name), names)}")
        return Versions(Version.of(row, self.ledger) for row in rows)

    def version(self, version: str | Version) -> Version:
        """A version by its hash, or by the first letters of it.

        >>> first = lab.versions("kept")[0]
        >>> lab.version(first.version[:8]) == first
        True
        """
        if isinstance(version, Version):
            return version
        if not isinstance(version, str) or not version:
            raise LabError(f"{version!r} is no version. Expected one of lab.versions(), or the first letters of its hash.")
        rows = self.ledger.rows("SELECT * FROM versions WHERE substr(version, 1, ?)=?", len(version), version)
        if len(rows) != 1:
            found = f"{len(rows)} versions begin so" if rows else "there is none"
            raise LabError(f"{version!r} is no version of the lab in {self.folder}: {found}. Expected one of its versions.")
        return Version.of(rows[0], self.ledger)
