"""Many processes in one lab, and those that are killed or run out of disk."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import analyzers
from analyzers.lab.errors import LabError
from tests.analyzers.lab.conftest import network

SCRIPT = Path(__file__).with_name("workers.py")
ROOT = Path(__file__).parents[3]


class Nursery:
    """A process that has imported everything, and makes a process of its own for each piece of work in `workers.py`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, work: str, folder: Path, number: int = 0) -> None:
        assert self.process.stdin is not None
        print(work, folder, number, file=self.process.stdin, flush=True)

    def wait(self, work: str = "wait") -> str:
        """How the oldest process that still runs ended."""
        self.start(work, Path("-"))
        return self.line()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(timeout=60)
    assert made.process.stdout is not None
    made.process.stdout.close()


def test_four_processes_write_into_one_lab(tmp_path: Path, nursery: Nursery) -> None:
    for worker in range(4):
        nursery.start("write", tmp_path / "lab", worker)
    assert [nursery.wait() for _ in range(4)] == ["ended 0"] * 4
    lab = analyzers.Lab(None, tmp_path / "lab")
    versions = lab.versions("step")
    assert len(versions) == 100
    given = sorted((version.arguments["worker"], version.arguments["n"]) for version in versions)
    assert given == [(worker, n) for worker in range(4) for n in range(25)]
    assert all(len(version.result["t"]) == version.arguments["n"] for version in versions)
    assert len(lab.versions("same")) == 5
    attempts = lab.attempts()
    assert len(attempts) == 200
    assert set(attempts["status"]) == {"finished"}
    assert left_over(lab.folder) == []


def left_over(folder: Path) -> list[str]:
    """What a lab has that belongs to no version."""
    names = [path.name for path in (folder / "values").rglob("*") if path.name.startswith(".")]
    return names + [path.name for path in (folder / "running").iterdir()]


def test_a_kill_loses_nothing_that_was_finished(tmp_path: Path, nursery: Nursery) -> None:
    nursery.start("sleep", tmp_path / "lab")
    word, pid = nursery.line().split()
    assert word == "asleep"
    lab = analyzers.Lab(network(), tmp_path / "lab")
    assert list(lab.attempts()["status"]) == ["finished"] * 3 + ["running"]
    os.kill(int(pid), signal.SIGKILL)
    assert nursery.wait() == "ended 9"
    assert list(lab.attempts()["status"]) == ["finished"] * 3 + ["died"]
    assert [len(version.result) for version in lab.versions("step")] == [0, 1, 2]
    assert left_over(lab.folder) == []
    db = sqlite3.connect(lab.folder / "lab.sqlite")
    assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    db.close()


def test_a_kill_while_files_are_written_leaves_no_half_version(tmp_path: Path, nursery: Nursery) -> None:
    nursery.start("write_slowly", tmp_path / "lab")
    word, pid = nursery.line().split()
    assert word == "wrote"
    os.kill(int(pid), signal.SIGKILL)
    assert nursery.wait() == "ended 9"
    lab = analyzers.Lab(network(), tmp_path / "lab")
    assert len(left_over(lab.folder)) == 2, "the folder of the version and the lock"
    assert list(lab.attempts()["status"]) == ["finished", "died"]
    assert len(lab.versions("step")) == 1
    assert left_over(lab.folder) == []
    assert len(list((lab.folder / "values" / "step").iterdir())) == 1


def test_a_file_that_does_not_fit_is_one_error_and_loses_nothing(tmp_path: Path, nursery: Nursery) -> None:
    nursery.start("fill", tmp_path / "lab")
    assert nursery.line().startswith("Keeping the result of step failed (File too large). Nothing was half written")
    assert nursery.line() == str(1 << 20)
    assert nursery.wait() == "ended 0"
    lab = analyzers.Lab(None, tmp_path / "lab")
    assert list(lab.attempts()["status"]) == ["finished", "failed", "finished"]
    assert "File too large" in lab.attempts()["error"][1]
    assert [len(version.result) for version in lab.versions("step")] == [10, 20]
    assert left_over(lab.folder) == []


def test_a_database_that_cannot_grow_is_one_error_and_loses_nothing(
    lab: analyzers.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    @lab.experiment
    def step(n: int) -> str:
        return "x" * n

    step(10)

    def full(*args: object, **kwargs: object) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*args, **kwargs)  # type: ignore[call-overload]
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count={pages + 2}")
        return db

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", full)
        with pytest.raises(LabError, match=r"database or disk is full.*Nothing was half written") as caught:
            step(1 << 20)
    assert len(caught.value.result) == 1 << 20
    assert [len(version.result) for version in lab.versions("step")] == [10]
    assert list(lab.attempts()["status"]) == ["finished", "failed"]


def test_a_lab_that_another_process_keeps_busy_is_waited_for(lab: analyzers.Lab) -> None:
    @lab.experiment
    def step() -> int:
        return 1

    busy = sqlite3.connect(lab.folder / "lab.sqlite", isolation_level=None, check_same_thread=False)
    busy.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.5, lambda: busy.execute("COMMIT"))
    timer.start()
    began = time.perf_counter()
    step()
    assert time.perf_counter() - began > 0.3
    timer.join()
    busy.close()
    assert len(lab.versions("step")) == 1
