"""What a notebook shows: a small picture, else text; escaped, the same each time, and never an error."""

import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.pictures import notebook
from fmr.pictures.notebook import preformatted, table
from tests.models import build

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's program 'dot' is not on the PATH")


def tracked(name: str = "gpt2") -> fmr.Run:
    model, args, kwargs = build(name)
    return fmr.run(model, *args, **kwargs)


class Read(HTMLParser):
    """The tags and the texts of a page; every tag that opens must close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# ---- graphs


@needs_dot
def test_a_small_picture_is_shown_and_nothing_else() -> None:
    graph = tracked().graph
    picture = graph._repr_svg_()
    assert picture is not None
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    assert "max-width:100%" in picture.partition(">")[0]
    assert graph._repr_html_() is None
    assert picture == tracked().graph._repr_svg_()


def test_a_picture_that_is_too_large_gives_way_to_the_summary() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(notebook.MOST_BOXES):
                x = x * self.weight
            return x

    side_by_side = tracked("gru").graph
    for large in (fmr.run(Wide(), torch.ones(1, 3)).graph, side_by_side):
        assert large._repr_svg_() is None
        assert Read(large._repr_html_() or "").texts == [repr(large)]


def test_without_dot_the_summary_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for graph in (tracked().graph, fmr.Graph([], [], "Empty")):
        assert graph._repr_svg_() is None
        assert Read(graph._repr_html_() or "").texts == [repr(graph)]


# ---- runs and structures


def test_runs_and_passes_are_shown_as_their_text() -> None:
    run = tracked("gru")
    assert Read(run._repr_html_()).texts == [repr(run)]
    assert Read(run.last._repr_html_()).texts == [repr(run.last)]
    assert Read(fmr.Run()._repr_html_()).texts == ["Run: nothing has run yet"]


def test_a_structure_is_a_table_of_layers_heads_sizes_and_certificates() -> None:
    structure = fmr.locate(tracked())
    page = structure._repr_html_()
    read = Read(page)
    assert read.tags.count("tr") == 1 + len(structure.attention) + len(structure.mlps)
    for text in ("layers[0]", "transformer.h.1.attn", "2 heads of 8", "64 memories"):
        assert text in read.texts
    assert sum(text.startswith("certified, error ") for text in read.texts) == 4
    assert page == fmr.locate(tracked())._repr_html_()
    assert "not computed" in fmr.locate(tracked().graph)._repr_html_()
    assert "table" not in Read(fmr.locate(tracked("gru"))._repr_html_()).tags


def test_what_was_rejected_stands_below_and_parts_outside_of_layers_have_rows() -> None:
    class Router(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x + x.softmax(-1)

    structure = fmr.locate(fmr.run(Router(), torch.randn(2, 3, 4)))
    read = Read(structure._repr_html_())
    assert len(structure.attention) == 1
    assert len(structure.rejected) == 1
    assert any(text.startswith("rejected: /softmax#1 is no attention") for text in read.texts)
    assert read.tags.count("tr") == 2


# ---- text


def test_text_is_escaped() -> None:
    class Sly:
        def __repr__(self) -> str:
            return "<script>alert('&')</script>"

    assert preformatted(Sly()) == "<pre>&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;</pre>"
    read = Read(table("<b>", ["<i>"], [["<u>", "&"]], "<p>"))
    assert read.texts == ["<b>", "<i>", "<u>", "&", "<p>"]
    assert not {"script", "u", "i", "p"} & set(read.tags)


def test_a_value_whose_text_fails_is_still_shown() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ValueError("no <text>")

    assert preformatted(Broken()) == "<pre>Broken that cannot be shown: no &lt;text&gt;</pre>"
