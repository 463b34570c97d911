"""The documentation as it is cut from README and docstrings, without the tools that make a site of it (`make docs`)."""

import importlib
import importlib.util
import inspect
import posixpath
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import analyzers
import fmr

ROOT = Path(__file__).parents[1]


@cache
def script(name: str) -> ModuleType:
    """A script of etc/docs as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"etc/docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def whole() -> Any:
    return script("pages").site()


def reached(nav: Any) -> list[str]:
    """The paths that a menu leads to."""
    if isinstance(nav, str):
        return [nav]
    return [path for one in nav for part in one.values() for path in reached(part)]


@pytest.mark.parametrize("house", ["fmr", "analyzers", *script("pages").modules()[:-1]])
def test_every_public_name_has_a_page_and_a_sentence(house: str) -> None:
    pages = script("pages")
    module = importlib.import_module(house)
    for name in module.__all__:
        full, found = f"{house}.{name}", getattr(module, name)
        page = whole().pages[pages.documented()[full]]
        assert page.startswith(f"# {full}\n") if full in pages.modules() else f"::: {pages.home(full)}\n" in page
        if inspect.isclass(found) or inspect.isfunction(found):
            assert pages.home(full) == f"{found.__module__}.{found.__name__}"
            assert pages.sentence(full) == " ".join((found.__doc__ or "").partition("\n\n")[0].split())


def test_every_section_of_the_readme_is_a_page() -> None:
    titles = re.findall(
        r"^###? (.+)$", re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.M | re.S), re.M
    )
    headings = {text.partition("\n")[0].removeprefix("# ").lower() for text in whole().pages.values()}
    assert len(titles) > 40
    assert [title for title in titles if title.lower() not in headings] == []


def test_a_menu_leads_to_every_page() -> None:
    assert sorted(reached(whole().nav)) == sorted(
        [*whole().pages, *(path for path in whole().files if path.endswith(".ipynb"))]
    )


def test_links_between_pages_lead_somewhere() -> None:
    known = {*whole().pages, *whole().files}
    links = [
        (path, target)
        for path, text in whole().pages.items()
        for target in re.findall(
            r"\]\(([^)\s#]+)\)|<img src=\"([^\"]+)\"", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        )
        for target in target
        if target and not target.startswith("http")
    ]
    assert len(links) > 100
    lost = [(path, to) for path, to in links if posixpath.normpath(posixpath.join(posixpath.dirname(path), to)) not in known]
    assert lost == []


def test_headings_in_code_are_no_headings() -> None:
    told = script("pages").sections("a\n## b\n```\n## c\n```\n## d", 2)
    assert [one.title for one in told] == ["", "b", "d"]


def test_docstrings_become_code_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("griffe") is None:  # it is there where the site is made
        monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Class=1, Extension=object, Function=1, Object=1))  # type: ignore[arg-type]
    marked = script("docstrings").marked
    assert marked('Add.\n\n>>> 1 + 1\n2\n\na: a "*.mlp" b. c, d: others: all.', {"a", "c", "d"}) == (
        'Add.\n\n```pycon\n>>> 1 + 1\n2\n```\n\n- **`a`**: a "\\*.mlp" b.\n- **`c`, `d`**: others: all.'
    )
    assert marked("No: argument.", {"a"}) == "No: argument."


def test_links_of_a_site_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a><a href="c.html">c</a><a href="b.html#there">b</a>')
    (tmp_path / "b.html").write_text(
        '<p id="here"></p><script src="https://elsewhere/x.js"></script><a href="https://x">x</a>'
    )
    assert script("links").broken(tmp_path) == [
        "a.html: c.html leads to no file",
        "a.html: b.html#there has no such place in it",
        "b.html loads https://elsewhere/x.js",
    ]


def test_both_houses_are_documented() -> None:
    pages = whole().pages
    assert {f"api/fmr.{name}.md" for name in fmr.__all__} <= pages.keys()
    assert {f"api/analyzers.{name}.md" for name in analyzers.__all__} <= pages.keys()
