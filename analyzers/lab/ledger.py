"""The database of a lab: versions and attempts, in SQLite, for any number of processes at once."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from analyzers.lab.errors import LabError, told
from fmr.disk.files import named, new_folder, write_whole

SCHEMA = 1
APPLICATION = 0x666D726C  # "fmrl", by which `file` and SQLite know a lab
PATIENCE = 120.0  # seconds to wait for other processes

TABLES = """
CREATE TABLE versions (
  version TEXT PRIMARY KEY, name TEXT NOT NULL, made TEXT NOT NULL, source TEXT NOT NULL, uses TEXT NOT NULL,
  arguments TEXT NOT NULL, seed INTEGER NOT NULL, model TEXT NOT NULL, environment TEXT NOT NULL,
  result TEXT NOT NULL, files TEXT NOT NULL, seconds REAL NOT NULL, memory REAL);
CREATE TABLE attempts (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, began TEXT NOT NULL, status TEXT NOT NULL,
  arguments TEXT NOT NULL, seed INTEGER NOT NULL, model TEXT NOT NULL, environment TEXT NOT NULL, place TEXT NOT NULL,
  seconds REAL, memory REAL, version TEXT REFERENCES versions(version), error TEXT);
CREATE INDEX by_name ON versions(name);
"""


def now() -> str:
    """This moment, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Ledger:
    """The database and the folder beside it that holds the files of versions."""

    folder: Path

    @property
    def path(self) -> Path:
        """The database."""
        return self.folder / "lab.sqlite"

    @property
    def running(self) -> Path:
        """Where the locks of attempts lie that are under way: the system lets go of a lock when its process dies."""
        return self.folder / "running"

    @contextmanager
    def open(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        """The database for a moment; what is written in the block is written whole or not at all."""
        with told(f"{'Writing to' if write else 'Reading'} the lab in {self.folder}"):
            source = f"file:{quote(str(self.path))}?mode=rw"
            db = sqlite3.connect(source, timeout=PATIENCE, isolation_level=None, uri=True)
            try:
                db.row_factory = sqlite3.Row
                db.execute("PRAGMA synchronous=FULL")
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                yield db
                db.execute("COMMIT")
            finally:
                db.close()  # which rolls back what was not committed

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """What a query finds."""
        with self.open() as db:
            return db.execute(query, values).fetchall()

    def files_of(self, name: str, version: str) -> Path:
        """The folder of a version's files."""
        return self.folder / "values" / name / version


def opened(folder: Any, make: bool) -> Ledger:
    """The lab in a folder, made where there is none yet; a folder of something else, or of a newer lab, is an error."""
    with told(f"Opening the lab in {folder}"):
        ledger = Ledger((new_folder(folder) if make else named(folder)).absolute())
        foreign = (
            ledger.folder.is_dir()
            and not ledger.path.exists()
            and any(not p.name.startswith(".") for p in ledger.folder.iterdir())
        )
        if foreign or not (make or ledger.path.exists()):
            what = "holds other files and no lab.sqlite" if foreign else "is no folder of a lab: there is no lab.sqlite"
            raise LabError(f"{folder} {what}. Expected a lab, or a new or empty folder: Lab(model, 'a new name').")
        if make:
            with FileLock(str(ledger.folder / ".lock"), timeout=PATIENCE):
                _made(ledger)
        _checked(ledger)
    return ledger


def _made(ledger: Ledger) -> None:
    """Make the tables where the file is new, in one step: whoever is killed before leaves an empty file, which is new."""
    db = sqlite3.connect(ledger.path, timeout=PATIENCE, isolation_level=None)
    try:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(f"BEGIN;{TABLES}PRAGMA application_id={APPLICATION};PRAGMA user_version={SCHEMA};COMMIT;")
    finally:
        db.close()


def _checked(ledger: Ledger) -> None:
    with ledger.open() as db:
        application, schema = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if application != APPLICATION:
        raise LabError(f"{ledger.path} is a database of something else, expected one that a lab made. Name another folder.")
    if schema > SCHEMA:
        raise LabError(f"{ledger.path} has schema {schema}, this version of fmr reads schema {SCHEMA}. Upgrade fmr.")


class Attempt:
    """One execution of an experiment while it is under way, from its row in the database to its end."""

    def __init__(self, ledger: Ledger, name: str, given: dict[str, Any]) -> None:
        self.ledger, self.name, self.given = ledger, name, given

    def __enter__(self) -> Attempt:
        with told(f"Beginning {self.name}"):
            self.ledger.running.mkdir(exist_ok=True)
        row = {**self.given, "name": self.name, "began": now(), "status": "starting", "place": socket.gethostname()}
        with self.ledger.open(write=True) as db:
            marks = ", ".join("?" * len(row))
            self.id = db.execute(f"INSERT INTO attempts ({', '.join(row)}) VALUES ({marks})", [*row.values()]).lastrowid
            self._lock = lock_of(self.ledger, self.id)
            self._lock.acquire()
            db.execute("UPDATE attempts SET status='running' WHERE id=?", [self.id])
        return self

    def finish(self, version: dict[str, Any], files: dict[str, bytes]) -> None:
        """Write the files, then the version and the attempt's end in one step."""
        place = self.ledger.files_of(self.name, version["version"])
        with told(f"Keeping the result of {self.name}"):
            self._write(place, files)
            with self.ledger.open(write=True) as db:
                marks = ", ".join("?" * len(version))
                db.execute(f"INSERT OR IGNORE INTO versions ({', '.join(version)}) VALUES ({marks})", [*version.values()])
                db.execute(
                    "UPDATE attempts SET status='finished', version=?, seconds=?, memory=? WHERE id=?",
                    [version["version"], version["seconds"], version["memory"], self.id],
                )

    def _write(self, place: Path, files: dict[str, bytes]) -> None:
        """All files of a version, in a folder that gets its name when it is complete; a damaged one is written again."""
        if place.is_dir():
            for name, data in files.items():
                if not (place / name).is_file() or (place / name).read_bytes() != data:
                    (place / name).parent.mkdir(exist_ok=True, parents=True)
                    write_whole(place / name, data)
        elif files:
            part = place.with_name(f".{self.id}.part")
            part.mkdir(parents=True)
            try:
                for name, data in files.items():
                    (part / name).parent.mkdir(exist_ok=True, parents=True)
                    write_whole(part / name, data)
                part.rename(place)
            except OSError:
                if not place.is_dir():  # else another process has just made the same version
                    raise
            finally:
                shutil.rmtree(part, ignore_errors=True)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is not None:
                text = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace").decode()
                with self.ledger.open(write=True) as db:
                    db.execute("UPDATE attempts SET status='failed', error=? WHERE id=?", [text, self.id])
        except LabError:
            if error is None:
                raise
        finally:
            self._lock.release()
            with suppress(OSError):
                Path(self._lock.lock_file).unlink()


def lock_of(ledger: Ledger, id: Any) -> FileLock:
    """The lock that an attempt holds while its process lives."""
    return FileLock(str(ledger.running / f"{id}.lock"), timeout=0)


def bury(ledger: Ledger) -> None:
    """Mark attempts as died whose process is gone: nobody holds their lock."""
    for row in ledger.rows("SELECT id, name FROM attempts WHERE status='running'"):
        lock = lock_of(ledger, row["id"])
        try:
            lock.acquire()
        except (Timeout, OSError):
            continue
        try:
            with ledger.open(write=True) as db:
                db.execute("UPDATE attempts SET status='died' WHERE id=? AND status='running'", [row["id"]])
            shutil.rmtree(ledger.folder / "values" / row["name"] / f".{row['id']}.part", ignore_errors=True)
        finally:
            lock.release()
            with suppress(OSError):
                Path(lock.lock_file).unlink()


def as_json(value: Any) -> str:
    """A column of the database."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
