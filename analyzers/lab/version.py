"""A version of an experiment: what went in, what came out, and what it took, under a hash of its content."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analyzers.lab.code import Code
from analyzers.lab.errors import LabError
from analyzers.lab.ledger import Ledger
from analyzers.lab.summary import brief
from analyzers.lab.values import unpack
from fmr.disk.files import digest

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Version:
    """One content of an experiment: the same code, arguments, seed, model and result are the same version.

    >>> version = lab.versions("kept")[0]
    >>> version.result
    {'double': 14}

    name: of the experiment. version: the hash of its content. made: when, in UTC. seconds and memory: of the first attempt
    that made it, memory in bytes above what the process had before. model: class, fingerprint, name and revision.
    environment: versions of Python, torch and others then. code: the source, and that of what it uses beside it.
    """

    name: str
    version: str
    made: str
    seed: int
    seconds: float
    memory: float | None
    model: dict[str, str] = field(repr=False)
    environment: dict[str, str] = field(repr=False)
    code: Code = field(repr=False)
    told: dict[str, Any] = field(repr=False, compare=False)
    files: dict[str, str] = field(repr=False)
    folder: Path = field(repr=False, compare=False)

    @staticmethod
    def of(row: sqlite3.Row, ledger: Ledger) -> Version:
        """A row of the database."""
        read = {name: json.loads(row[name]) for name in ("model", "environment", "uses", "arguments", "result", "files")}
        return Version(
            name=row["name"],
            version=row["version"],
            made=row["made"],
            seed=row["seed"],
            seconds=row["seconds"],
            memory=row["memory"],
            model=read["model"],
            environment=read["environment"],
            code=Code(row["source"], read["uses"]),
            told={"arguments": read["arguments"], "result": read["result"]},
            files=read["files"],
            folder=ledger.files_of(row["name"], row["version"]),
        )

    @property
    def source(self) -> str:
        """The text of the function."""
        return self.code.source

    @property
    def result(self) -> Any:
        """What the experiment returned, read now and verified; figures come back as pictures."""
        return unpack(self.told["result"], "result", self.read, self.folder)

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was called with, by name, defaults included; models and functions come back as words."""
        given: dict[str, Any] = unpack(self.told["arguments"], "arguments", self.read, self.folder)
        return given

    def read(self, name: str) -> bytes:
        """The bytes of one of its files, verified."""
        path = self.folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise LabError(
                f"{path} cannot be read ({error.strerror}). Expected a file of {self.name} {self.version}; run the "
                "experiment again with the same arguments, which writes it."
            ) from None
        if digest(data) != self.files.get(name):
            raise LabError(
                f"{path} is damaged: its checksum is not that of {self.name} {self.version}. Run the experiment again with "
                "the same arguments, which writes it."
            )
        return data

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={brief(value)}" for name, value in _items(self.told["arguments"]))
        return f"{self.name} {self.version}  {self.name}({given}) seed {self.seed} -> {brief(self.told['result'])}"


def _items(told: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in told["dict"]]


class Versions(list[Version]):
    """Versions in the order in which they were made; a list that prints one a line."""

    def table(self) -> DataFrame:
        """One row a version.

        >>> lab.versions("kept").table()
        """
        import pandas as pd

        columns = ["name", "version", "made", "seed", "seconds", "memory", "arguments", "result"]
        return pd.DataFrame(
            [[getattr(v, c) for c in columns[:6]] + [brief(v.told[c]) for c in columns[6:]] for v in self], columns=columns
        )

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no versions"
