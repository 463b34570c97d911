"""Counts in one SQLite file: written in transactions, so that what a killed process leaves is whole, and read by plain SQL.

select memory, prefix, next, coefficient, z from prefixes where layer = 25 and rank = 0 order by z desc limit 10
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analyzers.memories.counted import SIGNS, Counted, Counts, Layer
from analyzers.memories.tops import Moments
from analyzers.protocol import AnalyzerError

FORMAT = 1

_TABLES = """
create table settings (name text primary key, value text);
create table layers (layer integer primary key, site text, memories integer, counted integer);
create table batches (batch integer primary key, digest integer, texts integer, tokens integer);
create table texts (text integer primary key, tokens text);
create table words (token integer primary key, word text);
create table memories (layer integer, memory integer, mean real, squares real, deviation real,
    primary key (layer, memory)) without rowid;
create table triggers (layer integer, memory integer, sign integer, rank integer, coefficient real, text integer,
    position integer, primary key (layer, memory, sign, rank)) without rowid;
create table value_words (layer integer, memory integer, sign integer, rank integer, token integer, score real,
    primary key (layer, memory, sign, rank)) without rowid;
create view prefixes as
    select t.layer, t.memory, t.sign, t.rank, t.coefficient, (t.coefficient - m.mean) / m.deviation as z,
        (select replace(group_concat(word, (select json_extract(value, '$') from settings where name = 'between')),
            ' ##', '') from (select w.word from json_each(x.tokens) j
            join words w on w.token = j.value where j.key <= t.position order by j.key)) as prefix,
        (select w.word from words w where w.token = json_extract(x.tokens, '$[' || (t.position + 1) || ']')) as next,
        t.text, t.position
    from triggers t join memories m using (layer, memory) join texts x using (text);
"""


_MOMENT = np.dtype([("mean", "f8"), ("squares", "f8")])
_TRIGGER = np.dtype([("memory", "i8"), ("rank", "i8"), ("coefficient", "f8"), ("text", "i8"), ("position", "i8")])
"""Columns that are read at once."""


class Store:
    """One file of counts, and how many batches of them were last read from it or written to it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.batches = 0
        self.texts: set[int] = set()

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path)) as base, base:
                yield base
        except sqlite3.Error as error:
            raise AnalyzerError(
                f"{self.path} cannot be used as a store of memories ({error}). Expected a file that KeyValueMemories wrote, "
                "or the name of a new one in a folder that is there, used by one process at a time."
            ) from error

    def read(self) -> tuple[dict[str, Any], Counts] | None:
        """Settings and counts; None where the file is not there or nothing was written to it."""
        if not os.path.exists(self.path):
            return None
        with self._open() as base:
            names = {name for (name,) in base.execute("select name from sqlite_master where type = 'table'")}
            if not names:
                return None
            if "settings" not in names:
                raise AnalyzerError(f"{self.path} has the tables {', '.join(sorted(names))}: no store of memories.")
            settings = {name: json.loads(value) for name, value in base.execute("select name, value from settings")}
            if settings["format"] != FORMAT:
                raise AnalyzerError(f"{self.path} has format {settings['format']}, this version of fmr reads {FORMAT}.")
            rows = list(base.execute("select layer, site, memories, counted from layers order by layer"))
            layers = [_layer(base, row, settings["k"], settings["signs"]) for row in rows]
            texts = {number: np.array(json.loads(ids), np.int32) for number, ids in base.execute("select * from texts")}
            batches = [Counted(*row) for row in base.execute("select digest, texts, tokens from batches order by batch")]
        self.batches, self.texts = len(batches), set(texts)
        return settings, Counts(layers, texts, batches)

    def write(self, counts: Counts, settings: Mapping[str, Any], words: Mapping[int, str], between: str) -> None:
        """Bring the file up to date, all at once or not at all.

        words: the text of each token that the texts hold; between: what stands between two of them.
        """
        counts.forget()
        with self._open() as base:
            base.execute("begin immediate")
            if not base.execute("select 1 from sqlite_master").fetchone():
                for line in _TABLES.split(";"):
                    base.execute(line) if line.strip() else None
            (there,) = base.execute("select count(*) from batches").fetchone()
            if there != self.batches:
                raise AnalyzerError(
                    f"{self.path} holds {there} batches, of which {self.batches} are known here: another process writes to "
                    "it. Give each its own store and merge them: KeyValueMemories(model, store=one).merge(another)."
                )
            told = {"format": FORMAT, **settings, "between": between}
            base.executemany("insert or replace into settings values (?, ?)", [(n, json.dumps(v)) for n, v in told.items()])
            new = counts.batches[self.batches :]
            rows = [(self.batches + n, *batch) for n, batch in enumerate(new)]
            base.executemany("insert into batches values (?, ?, ?, ?)", rows)
            for layer in counts.layers:
                _write_layer(base, layer)
            gone, added = self.texts - counts.texts.keys(), counts.texts.keys() - self.texts
            base.executemany("delete from texts where text = ?", [(one,) for one in gone])
            base.executemany(
                "insert into texts values (?, ?)", ((one, json.dumps(counts.texts[one].tolist())) for one in added)
            )
            base.executemany("insert or ignore into words values (?, ?)", words.items())
        self.batches, self.texts = len(counts.batches), set(counts.texts)
        for layer in counts.layers:
            for changed in layer.changed:
                changed[:] = False

    def write_values(self, layer: int, tokens: Tensor, scores: Tensor, words: Mapping[int, str]) -> None:
        """Add the words of the values of a layer, both (memories, 2, top)."""
        n, _, top = tokens.shape
        memory, sign, rank = _indices(n, 2, top)
        rows = zip(memory, sign, rank, tokens.flatten().tolist(), scores.flatten().tolist(), strict=True)
        with self._open() as base:
            base.execute("delete from value_words where layer = ?", (layer,))
            base.executemany("insert into value_words values (?, ?, ?, ?, ?, ?)", ((layer, *row) for row in rows))
            base.executemany("insert or ignore into words values (?, ?)", words.items())

    def read_values(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The words of the values of a layer, where they were added."""
        with self._open() as base:
            order = "order by memory, sign desc, rank"
            rows = base.execute(f"select token, score from value_words where layer = ? {order}", (layer,)).fetchall()
            (n,) = base.execute("select memories from layers where layer = ?", (layer,)).fetchone() or (0,)
        if not rows:
            return None
        tokens, scores = (torch.tensor(column).reshape(n, 2, -1) for column in zip(*rows, strict=True))
        return tokens.to(torch.int32), scores.float()


def _indices(n: int, signs: int, k: int) -> tuple[list[int], list[int], list[int]]:
    """The memory, the sign and the rank of each entry of a table (memories, signs, k)."""
    memory, sign, rank = (one.ravel() for one in np.indices((n, signs, k)))
    return memory.tolist(), np.where(sign == 0, *SIGNS).tolist(), rank.tolist()


def _write_layer(base: sqlite3.Connection, layer: Layer) -> None:
    base.execute(
        "insert or replace into layers values (?, ?, ?, ?)", (layer.number, layer.site, layer.n, layer.moments.count)
    )
    deviation = layer.moments.variance.sqrt().tolist()
    means = zip(range(layer.n), layer.moments.mean.tolist(), layer.moments.squares.tolist(), deviation, strict=True)
    base.executemany("insert or replace into memories values (?, ?, ?, ?, ?)", ((layer.number, *row) for row in means))
    for sign, tops, changed in zip(SIGNS, layer.tops, layer.changed, strict=False):
        rows = changed.nonzero()[:, 0]
        own = tops.of(rows)
        filled = (own.values > 0).flatten()
        memory = rows[:, None].expand_as(own.values).flatten()[filled].tolist()
        rank = torch.arange(own.values.shape[1]).expand_as(own.values).flatten()[filled].tolist()
        columns = [(sign * own.values).flatten(), own.texts.flatten(), own.places.flatten()]
        entries = zip(memory, rank, *(column[filled].tolist() for column in columns), strict=True)
        base.executemany(f"insert or replace into triggers values ({layer.number}, ?, {sign}, ?, ?, ?, ?)", entries)


def _layer(base: sqlite3.Connection, row: Sequence[Any], k: int, signs: int) -> Layer:
    """A layer as it was written."""
    number, site, n, counted = row
    layer = Layer.empty(number, site, n, k, signs)
    moments = np.fromiter(
        base.execute("select mean, squares from memories where layer = ? order by memory", (number,)), _MOMENT
    )
    layer.moments = Moments(counted, torch.tensor(moments["mean"]), torch.tensor(moments["squares"]))
    columns = ", ".join(_TRIGGER.names or ())
    for sign, tops in zip(SIGNS, layer.tops, strict=False):
        rows = base.execute(f"select {columns} from triggers where layer = ? and sign = ?", (number, sign))
        found = np.fromiter(rows, _TRIGGER)
        at = torch.tensor(found["memory"]), torch.tensor(found["rank"])
        tops.values[at] = torch.tensor(sign * found["coefficient"]).float()
        tops.texts[at] = torch.tensor(found["text"])
        tops.places[at] = torch.tensor(found["position"]).to(torch.int32)
    return layer
