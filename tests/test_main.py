"""The demo says what is missing, and shows the rest."""

from pathlib import Path
from typing import Any

import pytest

import fmr
from fmr import __main__ as command


def test_a_part_whose_model_is_missing_is_left_out_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str, **_: Any) -> None:
        raise fmr.ZooError(f"The zoo's {name} needs the package of {name}.")

    monkeypatch.setattr("sys.argv", ["fmr", "demo", "--out", str(tmp_path / "out")])
    monkeypatch.setattr("fmr.zoo.load", missing)
    assert command.main() == 1
    said = capsys.readouterr().out
    assert [name for name in ("facts", "smollm2", "minilm") if f"needs the package of {name}." in said] == [
        "facts",
        "smollm2",
        "minilm",
    ]
    assert said.count("This part is left out") == 3


def test_a_demo_that_shows_everything_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("language_model", "pretrained_language_model", "encoder"):
        monkeypatch.setattr(command, part, lambda out: (out / "picture").touch())
    monkeypatch.setattr("sys.argv", ["fmr", "demo", "--out", str(tmp_path / "out")])
    assert command.main() == 0
    assert (tmp_path / "out" / "picture").exists()
