"""A name of a file that says another kind than what is written."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fmr
from fmr.errors import DrawError
from fmr.graph.graph import Graph


@pytest.fixture
def graph() -> Graph:
    return fmr.run(nn.ReLU(), torch.randn(2)).graph


@pytest.mark.parametrize(
    ("method", "name", "words"),
    [
        (
            "save_svg",
            "x.png",
            "'x.png' ends in '.png', but SVG is written: expected 'x.svg'. For that kind write graph.save_dot('x.dot') "
            "and run `dot -Tpng x.dot -o x.png`.",
        ),
        ("save_svg", "x.dot", "but SVG is written: expected 'x.svg'; graph.save_dot('x.dot') writes that kind."),
        ("save_svg", "x.html", "'x.html' ends in '.html', but SVG is written: expected 'x.svg'."),
        (
            "save_dot",
            "x.SVG",
            "ends in '.SVG', but DOT is written: expected 'x.dot'; graph.save_svg('x.SVG') writes",
        ),
        ("save_explorer", "x.svg", "but JSON is written: expected 'x.json'; graph.save_svg('x.svg') writes that kind."),
    ],
)
def test_the_name_of_another_kind_is_refused_and_nothing_is_written(
    graph: Graph, method: str, name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DrawError, match=re.escape(words)):
        getattr(graph, method)(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.dot", "x.GV", "x.txt", "x", "gpt2-0.5b", "run.7", ".hidden"])
def test_the_right_ending_none_and_a_number_are_taken(graph: Graph, name: str, tmp_path: Path) -> None:
    graph.save_dot(tmp_path / name)
    assert (tmp_path / name).read_text().startswith("digraph")
