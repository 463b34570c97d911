"""What is made once: found whole or made again, by one process at a time, and never seen half."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

import fmr
from fmr.zoo import cache

MADE_OF = {"form": 1}

MAKER = """
import os, sys, time
from pathlib import Path
from fmr.zoo.cache import kept

def make(folder):
    with open(sys.argv[1], "a") as log:
        log.write(f"{os.getpid()}\\n")
    (folder / "first").write_bytes(b"1" * 100_000)
    time.sleep(float(sys.argv[2]))
    (folder / "second").write_bytes(b"2" * 100_000)

folder = kept("thing", {"form": 1}, make)
print((folder / "second").stat().st_size)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fmr" / "zoo"


class Maker:
    """Writes two files, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, folder: Path) -> None:
        self.asked += 1
        (folder / "weights").write_bytes(bytes(range(256)) * 40)
        (folder / "config").write_text("{}")


@pytest.fixture
def make() -> Maker:
    return Maker()


def process(log: Path, pause: float) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", MAKER, str(log), str(pause)], stdout=subprocess.PIPE, text=True)


def entries(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


# ---- made once


def test_it_is_made_once_and_then_found(make: Maker, home: Path) -> None:
    folder = cache.kept("thing", MADE_OF, make)
    assert folder == cache.kept("thing", MADE_OF, make)
    assert make.asked == 1
    assert sorted(path.name for path in folder.iterdir()) == ["config", "seal.json", "weights"]
    assert entries(home) == [folder.name, "thing.lock"]


def test_it_is_made_anew_where_it_depends_on_something_else(make: Maker) -> None:
    first = cache.kept("thing", {"form": 1}, make)
    assert cache.kept("thing", {"form": 2}, make) != first
    assert make.asked == 2
    assert cache.whole(first)


def test_the_folder_is_in_the_home_folder_where_no_other_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for named in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert cache.home() == Path("/home/somebody/.cache/fmr/zoo")


# ---- damage


@pytest.mark.parametrize("file", ["weights", "config", cache.SEAL])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "emptied"])
def test_a_damaged_file_is_noticed_and_all_is_made_again(file: str, damage: str, make: Maker, home: Path) -> None:
    folder = cache.kept("thing", MADE_OF, make)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    path = folder / file
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[:-1], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "emptied": b"", "removed": b""}[damage]
    )
    if damage == "removed":
        path.unlink()
    assert not cache.whole(folder)
    assert cache.kept("thing", MADE_OF, make) == folder
    assert make.asked == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert entries(home) == [folder.name, "thing.lock"]


@pytest.mark.parametrize("seal", [{}, [], None, {"weights": 3}, {"weights": [1, 2, 3]}, {"absent": [0, 0]}])
def test_a_seal_that_says_nothing_seals_nothing(seal: object, make: Maker) -> None:
    folder = cache.kept("thing", MADE_OF, make)
    (folder / cache.SEAL).write_text(json.dumps(seal))
    assert not cache.whole(folder)


# ---- several processes, and killed ones


def test_of_two_processes_at_once_one_makes_it_and_both_have_it(tmp_path: Path, home: Path) -> None:
    log = tmp_path / "log"
    both = [process(log, 0.3) for _ in range(2)]
    assert [one.communicate()[0].strip() for one in both] == ["100000", "100000"]
    assert len(log.read_text().splitlines()) == 1
    assert len(entries(home)) == 2


def test_what_a_killed_process_left_is_removed_and_all_is_made(tmp_path: Path, home: Path, make: Maker) -> None:
    log = tmp_path / "log"
    killed = process(log, 60)
    while not list(home.glob(".thing-*.tmp/first")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert len(list(home.glob(".thing-*.tmp"))) == 1
    assert not list(home.glob("thing-*"))
    folder = cache.kept("thing", MADE_OF, make)
    assert cache.whole(folder)
    assert entries(home) == [folder.name, "thing.lock"]


def test_an_interrupted_maker_leaves_nothing(home: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.kept("thing", MADE_OF, interrupted)
    assert entries(home) == ["thing.lock"]


# ---- a folder that cannot be written


def test_a_folder_that_cannot_be_made_is_one_clear_error(
    tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        fmr.ZooError, match=r"^The zoo keeps thing in .*/file/fmr/zoo, which cannot be written \(.*\)\. Make"
    ) as e:
        cache.kept("thing", MADE_OF, make)
    assert str(e.value).endswith("or name another folder in the environment variable XDG_CACHE_HOME.")
    assert make.asked == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_clear_error(home: Path, make: Maker) -> None:
    home.mkdir(parents=True)
    home.chmod(0o500)
    with pytest.raises(fmr.ZooError, match=r"which cannot be written \(.*Permission denied"):
        cache.kept("thing", MADE_OF, make)


@pytest.mark.parametrize("error", [PermissionError(13, "Read-only file system"), SafetensorError("No space left on device")])
def test_a_write_that_fails_is_one_clear_error_and_leaves_nothing(error: Exception, home: Path) -> None:
    def failing(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise error

    with pytest.raises(
        fmr.ZooError, match=r"The zoo keeps thing in .* \(.*(Read-only file system|No space left on device)\)"
    ):
        cache.kept("thing", MADE_OF, failing)
    assert entries(home) == ["thing.lock"]


def test_what_is_whole_is_read_where_nothing_may_be_written(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache.kept("thing", MADE_OF, make)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("a folder was to be made"))
    monkeypatch.setattr(cache, "FileLock", lambda *_: pytest.fail("a lock was to be taken"))
    assert cache.kept("thing", MADE_OF, make) == folder
