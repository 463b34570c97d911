"""Writers of runs that are killed, fail, compete, or write over what is there already."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fmr
from fmr import Run, StoreError
from fmr.disk import files
from tests.runs.stored import FORMS, Tiny, assert_whole, back_from, parts


@pytest.mark.parametrize("name", ["absent/run.fmr", "absent/run", "file/run.fmr", "file"])
def test_a_path_that_cannot_be_written_is_an_error(tiny: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"there is no folder .* Create it first|cannot be made a folder"):
        tiny.save(tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"mine"


# ---- killed, failing and competing writers


@pytest.mark.parametrize(
    ("form", "step", "which"),
    [("run.fmr", "fsync", 1), ("run.fmr", "replace", 1), ("run", "fsync", 1), ("run", "replace", 1), ("run", "replace", 2)],
)
def test_a_save_that_fails_leaves_the_earlier_one(
    tiny: Run, tmp_path: Path, form: str, step: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path / form)
    other = fmr.run(Tiny(), torch.randn(5, 3))
    do, calls = getattr(os, step), []

    def fail(*args: object) -> None:
        calls.append(args)
        if len(calls) == which:
            raise OSError("disk full")
        do(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            other.save(tmp_path / form)
    assert_whole(fmr.load(tmp_path / form), tiny)
    assert not list(tmp_path.rglob("*.tmp"))
    back_from(other, tmp_path / form)
    assert len(parts(tmp_path / form)) == (2 if form == "run" else 1)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tiny: Run, tmp_path: Path) -> None:
    tiny.save(tmp_path / "run")
    mine = {"notes.txt", "values-mine.safetensors", ".hidden.tmp"}
    for name in (
        *mine,
        f"values-{'0' * 32}.safetensors",
        f".values-{'0' * 32}.safetensors.01234567.tmp",
        ".graph.json.89abcdef.tmp",
    ):
        (tmp_path / "run" / name).write_bytes(b"")
    back_from(tiny, tmp_path / "run")
    assert {path.name for path in parts(tmp_path / "run") if not path.name.startswith("values-0")} >= mine
    assert len(parts(tmp_path / "run")) == len(mine) + 2


KILLED = """
import os, random, signal, sys, time
import torch
from torch import nn
import fmr

torch.set_num_threads(1)
draw = random.Random(0)
runs = [fmr.run(nn.Sequential(nn.Linear(4, 4096), nn.ReLU()), torch.full((64, 4), float(n))) for n in range(2)]
for path in sys.argv[1:]:
    runs[0].save(path)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            while True:
                for run in runs:
                    run.save(path)
        time.sleep(draw.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        back = fmr.load(path)
        which = int(back["input:input"][0, 0])
        assert len(back.last.kept) == 3
        assert all(torch.equal(back[name], runs[which][name]) for name in back.last.kept)
    runs[1].save(path)
print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, *(str(tmp_path / form) for form in FORMS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "whole\n", done.stderr
    assert len(parts(tmp_path / "run")) == 2
    assert sorted(os.listdir(tmp_path)) == ["run", "run.fmr"]


def test_writers_and_a_reader_of_one_folder_do_not_disturb_each_other(tiny: Run, tmp_path: Path) -> None:
    runs = [tiny, fmr.run(Tiny().eval(), torch.randn(5, 3))]
    tiny.save(tmp_path / "run")
    writers = [threading.Thread(target=lambda run=run: [run.save(tmp_path / "run") for _ in range(8)]) for run in runs]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        back = fmr.load(tmp_path / "run")
        assert_whole(back, runs[len(back["input:x"]) == 5])
    for writer in writers:
        writer.join()
    assert len(parts(tmp_path / "run")) == 2


# ---- what is there already


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_private_file_stays_private(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path / "run.fmr")
    tiny.save(tmp_path / "run")
    for path in (tmp_path / "run.fmr", tmp_path / "run" / "graph.json"):
        path.chmod(0o600)
    seen: list[int] = []
    flush = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (seen.extend(mode(left) for left in tmp_path.rglob("*.tmp")), flush(handle))[1]
    )
    other = fmr.run(Tiny(), torch.randn(5, 3))
    back_from(other, tmp_path / "run.fmr")
    back_from(other, tmp_path / "run")
    assert {mode(path) for path in (tmp_path / "run.fmr", *(tmp_path / "run").iterdir())} == {0o600}
    assert set(seen) == {0o600}


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_points_to_is_replaced(tiny: Run, tmp_path: Path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    if there:
        fmr.run(Tiny(), torch.randn(5, 3)).save(tmp_path / "far" / "run.fmr")
    (tmp_path / "latest.fmr").symlink_to(Path("far") / "run.fmr")
    back_from(tiny, tmp_path / "latest.fmr")
    assert (tmp_path / "latest.fmr").is_symlink()
    assert_whole(fmr.load(tmp_path / "far" / "run.fmr"), tiny)
    assert os.listdir(tmp_path / "far") == ["run.fmr"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_or_a_device_is_not_replaced(tiny: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.fmr")
    (tmp_path / "null.fmr").symlink_to(os.devnull)
    (tmp_path / "loop.fmr").symlink_to("loop.fmr")
    for name in ("pipe.fmr", "null.fmr"):
        with pytest.raises(StoreError, match="cannot be written: it is no regular file"):
            tiny.save(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe.fmr").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["loop.fmr", "null.fmr", "pipe.fmr"]


def test_what_killed_writers_of_a_file_left_goes_with_the_next_save(tiny: Run, tmp_path: Path) -> None:
    left = [".run.fmr.01234567.tmp", ".run.fmr.89abcdef.tmp"]
    others = [".run2.fmr.01234567.tmp", ".run.fmr.012345.tmp", ".run.fmr.0123456g.tmp", "run.fmr.01234567.tmp"]
    for name in (*left, *others):
        (tmp_path / name).write_bytes(b"half")
    back_from(tiny, tmp_path / "run.fmr")
    assert sorted(os.listdir(tmp_path)) == sorted(["run.fmr", *others])


def test_a_file_that_another_writer_writes_is_not_removed(tiny: Run, tmp_path: Path) -> None:
    with files.replacing(tmp_path / "run.fmr") as file:
        tiny.save(tmp_path / "run.fmr")
        file.write(b"the later one")
    assert (tmp_path / "run.fmr").read_bytes() == b"the later one"
    assert os.listdir(tmp_path) == ["run.fmr"]


def test_writers_of_one_file_do_not_disturb_each_other(tiny: Run, tmp_path: Path) -> None:
    runs = [tiny, fmr.run(Tiny().eval(), torch.randn(5, 3))]
    failed: list[BaseException] = []

    def write(run: Run) -> None:
        try:
            for _ in range(25):
                run.save(tmp_path / "run.fmr")
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(run,)) for run in (*runs, *runs)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed == []
    assert os.listdir(tmp_path) == ["run.fmr"]
    back = fmr.load(tmp_path / "run.fmr")
    assert_whole(back, runs[len(back["input:x"]) == 5])
