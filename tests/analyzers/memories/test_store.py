"""Counts in a file: whole after a kill, gone on with, merged, read by plain SQL, refused where they are another's."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from analyzers import AnalyzerError, KeyValueMemories
from fmr.zoo import world
from tests.analyzers.memories.planted import WORDS, Planted, counting_texts, random_texts
from tests.analyzers.memories.test_memories import same

IDS = random_texts(60)
BATCHES = IDS.split(6)


def asked(path: Path, line: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as base:
        return base.execute(line, values).fetchall()


def test_what_was_stored_is_read_again_to_the_bit(tmp_path: Path) -> None:
    model, path = Planted(gated=True), tmp_path / "memories.sqlite"
    whole = KeyValueMemories(model, k=4, store=path).over(BATCHES).result(seed=2)
    again = KeyValueMemories(model, k=4, store=path)
    assert repr(again) == (
        f"KeyValueMemories(Planted, k=4, store={type(path).__name__}): 360 tokens of 60 texts in 10 batches; 24 memories of "
        "1 layer counted"
    )
    found = again.result(seed=2)
    same(found, whole)
    assert np.array_equal(found.means, whole.means)
    assert np.array_equal(found.deviations, whole.deviations)
    assert KeyValueMemories(store=path).result(seed=2).table().equals(found.table())


def test_counting_goes_on_where_it_ended(tmp_path: Path) -> None:
    model, path = Planted(gated=True), tmp_path / "memories.sqlite"
    KeyValueMemories(model, k=4, store=path).over(BATCHES[:4])
    later = KeyValueMemories(model, k=4, store=path).over(BATCHES)
    assert later.counts is not None
    assert later.counts.n_texts == 60
    whole = KeyValueMemories(model, k=4).over(BATCHES).result()
    same(later.result(), whole)
    more = KeyValueMemories(model, k=4, store=path).over([*BATCHES, counting_texts(6)])
    assert more.counts is not None
    assert more.counts.n_texts == 66
    same(more.result(), KeyValueMemories(model, k=4).over([*BATCHES, counting_texts(6)]).result())


def test_a_batch_that_was_given_twice_is_passed_by_twice(tmp_path: Path) -> None:
    path = tmp_path / "memories.sqlite"
    KeyValueMemories(Planted(), store=path).over([BATCHES[0], BATCHES[0], BATCHES[1]])
    again = KeyValueMemories(Planted(), store=path).over([BATCHES[0], BATCHES[0], BATCHES[0], BATCHES[1]])
    assert again.counts is not None
    assert again.counts.n_texts == 24


KILLED = """
import sys, time, torch
from analyzers import KeyValueMemories
from tests.analyzers.memories.planted import Planted, random_texts
torch.set_num_threads(1)
def slow():
    for batch in random_texts(60).split(6):
        yield batch
        print("batch", flush=True)
        time.sleep(0.02)
KeyValueMemories(Planted(gated=True), k=4, store=sys.argv[1], every=2).over(slow(), progress=False)
"""


def test_a_killed_process_leaves_a_whole_state_that_says_what_was_counted(tmp_path: Path) -> None:
    path = tmp_path / "memories.sqlite"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(6):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = KeyValueMemories(Planted(gated=True), k=4, store=path)
    assert left.counts is not None
    done = len(left.counts.batches)
    assert 4 <= done < 10
    assert done % 2 == 0
    assert f": {36 * done} tokens of {6 * done} texts in {done} batches" in repr(left)
    same(left.result(), KeyValueMemories(Planted(gated=True), k=4).over(BATCHES[:done]).result())
    whole = KeyValueMemories(Planted(gated=True), k=4).over(BATCHES).result()
    same(KeyValueMemories(Planted(gated=True), k=4, store=path).over(BATCHES).result(), whole)


def test_an_error_in_the_middle_of_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memories.sqlite"
    KeyValueMemories(Planted(), store=path).over(BATCHES[:2])
    before = asked(path, "select * from triggers"), asked(path, "select * from batches")
    memories = KeyValueMemories(Planted(), store=path).update(BATCHES[2])
    monkeypatch.setattr("analyzers.memories.store.json.dumps", lambda value: 1 / 0 if isinstance(value, list) else "1")
    with pytest.raises(ZeroDivisionError):
        memories.save()
    monkeypatch.undo()
    assert (asked(path, "select * from triggers"), asked(path, "select * from batches")) == before
    memories.save()
    assert len(asked(path, "select * from batches")) == 3
    same(KeyValueMemories(Planted(), store=path).result(), KeyValueMemories(Planted()).over(BATCHES[:3]).result())


def test_stores_are_merged(tmp_path: Path) -> None:
    model = Planted(gated=True)
    for name, part in (("one", BATCHES[::2]), ("two", BATCHES[1::2])):
        KeyValueMemories(model, k=4, store=tmp_path / name).over(part)
    one, two = (KeyValueMemories(model, k=4, store=tmp_path / name) for name in ("one", "two"))
    same(one.merge(two).result(), KeyValueMemories(model, k=4).over(BATCHES).result())
    again = KeyValueMemories(model, k=4, store=tmp_path / "one")
    assert again.counts is not None
    assert again.counts.n_texts == 60
    with pytest.raises(AnalyzerError, match=r"merge of the same counts twice: every batch of the other was counted here"):
        again.merge(two)
    new = KeyValueMemories(k=4, store=tmp_path / "all").merge(again)
    same(new.result(words=0), again.result(words=0))
    counts = [asked(tmp_path / name, "select count(*) from triggers") for name in ("all", "one")]
    assert counts[0] == counts[1]


def test_plain_sql_reads_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "memories.sqlite"
    found = KeyValueMemories(Planted(gated=True), k=4, store=path).over(counting_texts().split(10)).result()
    which = "from prefixes where layer = 0 and memory = 4 and sign = 1 order by rank"
    rows = asked(path, f"select prefix, next, coefficient, z {which}")
    triggers = found.triggers(0, 4)
    assert [row[0] for row in rows] == triggers["prefix"].tolist()
    assert [row[1] or "" for row in rows] == triggers["next"].tolist()
    assert np.allclose([row[2:] for row in rows], triggers[["coefficient", "z"]])
    agree = """select avg(v.token = w.token) from prefixes p join words w on w.word = p.next
        join value_words v using (layer, memory, sign) where p.rank = 0 and v.rank = 0 and p.sign = 1"""
    assert asked(path, agree) == [(1.0,)]
    assert asked(path, "select memories, counted from layers") == [(WORDS, 180)]
    assert asked(path, "select sum(texts), sum(tokens) from batches") == [(30, 180)]
    assert json.loads(asked(path, "select value from settings where name = 'k'")[0][0]) == 4


def test_words_of_a_tokenizer_are_spelled_in_the_file(tmp_path: Path, loaded: tuple[nn.Module, Any]) -> None:
    path = tmp_path / "memories.sqlite"
    texts = [fact.prompt for fact in world.facts()[:12]]
    found = KeyValueMemories(*loaded, k=3, store=path).over(texts).result(words=2)
    ((prefix, following),) = asked(path, "select prefix, next from prefixes where layer = 3 and memory = 7 and rank = 0")
    first = found.triggers(3, 7).iloc[0]
    assert (prefix, following) == (first["prefix"], first["next"])
    assert " " in prefix
    says = "select word from value_words join words using (token) where layer = 3 and memory = 7 and sign = 1 order by rank"
    assert [word for (word,) in asked(path, says)] == found.says(3, 7)["word"].tolist()


def test_texts_that_no_list_names_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyzers.memories.counted._SPARE", 5)
    path = tmp_path / "memories.sqlite"
    ids = torch.randint(WORDS, (300, 3), generator=torch.Generator().manual_seed(0))
    memories = KeyValueMemories(Planted(), k=1, store=path, every=3).over(ids.split(10))
    named = {text for (text,) in asked(path, "select distinct text from triggers")}
    assert {text for (text,) in asked(path, "select text from texts")} == named
    assert len(named) <= WORDS
    same(memories.result(), KeyValueMemories(Planted(), k=1).over(ids.split(50)).result())


def test_a_store_of_another_model_or_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memories.sqlite"
    KeyValueMemories(Planted(), k=3, store=path).over(BATCHES[:1])
    with pytest.raises(AnalyzerError, match=r"memories.sqlite: other weights: expected counts of one model"):
        KeyValueMemories(Planted(seed=1), k=3, store=path)
    with pytest.raises(AnalyzerError, match=r"memories.sqlite: k=3 where k=5 was asked for"):
        KeyValueMemories(Planted(), k=5, store=path)
    with pytest.raises(AnalyzerError, match=r"layer 0 with 7 memories after layer 0 with 24 memories at '/relu#0'"):
        KeyValueMemories(k=3, store=path).update_coefficients([torch.rand(1, 2, 7)], torch.zeros(1, 2, dtype=torch.long))
    (tmp_path / "text.sqlite").write_text("no database at all, but some text that is long enough")
    with pytest.raises(AnalyzerError, match=r"text.sqlite cannot be used as a store of memories \(file is not a database\)"):
        KeyValueMemories(store=tmp_path / "text.sqlite")
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as base, base:
        base.execute("create table songs (name text)")
    with pytest.raises(AnalyzerError, match=r"other.sqlite has the tables songs: no store of memories"):
        KeyValueMemories(store=tmp_path / "other.sqlite")
    memories = KeyValueMemories(Planted(), store=tmp_path / "no" / "folder.sqlite").update(IDS)
    with pytest.raises(AnalyzerError, match=r"unable to open database file.*a new one in a folder that is there"):
        memories.save()
    with pytest.raises(AnalyzerError, match=r"There is no store to write to. Make one with"):
        KeyValueMemories(Planted()).update(IDS).save()


def test_a_store_of_other_layers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memories.sqlite"
    KeyValueMemories(Planted(), k=4, layers=[0], store=path).over(BATCHES[:2])
    with pytest.raises(AnalyzerError, match=r"sqlite: layers=\[0\] where layers=\[1\] was asked for. .* another"):
        KeyValueMemories(Planted(), k=4, layers=[1], store=path)
    assert KeyValueMemories(Planted(), k=4, layers=[0], store=path).resumed == 2


def test_two_processes_on_one_store_are_told(tmp_path: Path) -> None:
    path = tmp_path / "memories.sqlite"
    one, two = (KeyValueMemories(Planted(), store=path) for _ in range(2))
    one.update(BATCHES[0]).save()
    with pytest.raises(AnalyzerError, match=r"holds 1 batches, of which 0 are known here: another process writes to it"):
        two.update(BATCHES[1]).save()


def test_many_memories_are_counted_at_once(tmp_path: Path) -> None:
    """A tenth of a million with five triggers each: seconds, not minutes."""
    layers, n = 10, 10_000
    values = torch.rand(2, 16, n, generator=torch.Generator().manual_seed(0)) + 0.1
    start = time.process_time()
    memories = KeyValueMemories(k=5, store=tmp_path / "many.sqlite")
    memories.update_coefficients([values.roll(n // 10 * layer, -1) for layer in range(layers)], torch.arange(32).view(2, 16))
    memories.save()
    assert KeyValueMemories(k=5, store=tmp_path / "many.sqlite").counts is not None
    assert time.process_time() - start < 30
    assert asked(tmp_path / "many.sqlite", "select count(*) from triggers") == [(5 * layers * n,)]
