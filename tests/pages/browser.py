"""A page opened in headless Chromium: the DOM that it leaves, as values that tests compare."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH: what a page shows is read off the DOM that a browser makes of it"
)

VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())


@dataclass
class Element:
    """One element of a page: its attributes, what is in it, and its text."""

    tag: str
    attributes: dict[str, str]
    children: list["Element"] = field(default_factory=list)
    texts: list["str | Element"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(one if isinstance(one, str) else one.text for one in self.texts)

    def every(self, tag: str = "", **attributes: str) -> list["Element"]:
        """All elements below with this tag and these attributes, in order."""
        found = []
        for child in self.children:
            if tag in ("", child.tag) and all(child.attributes.get(k.strip("_")) == v for k, v in attributes.items()):
                found.append(child)
            found += child.every(tag, **attributes)
        return found

    def at(self, id: str) -> "Element":
        (only,) = self.every(id=id)
        return only


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(made)
        self.open[-1].texts.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_endtag(self, tag: str) -> None:
        if any(one.tag == tag for one in self.open):
            while self.open.pop().tag != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.open[-1].texts.append(data)


def parsed(text: str) -> Element:
    tree = _Tree()
    tree.feed(text)
    return tree.root


def opened(path: Path, choice: str = "", script: str = "") -> Element:
    """The document after the page has run: with a choice, as in its address, and then a script of the test's own.

    A page that raised anything, or did not come to its end, is a failure here.
    """
    if script:
        text = path.read_text().replace("</body>", f"<script>{script}</script></body>")
        path = path.with_name(f"scripted-{path.name}")
        path.write_text(text)
    address = f"{path.resolve().as_uri()}#{choice}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        told = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--window-size=1400,1000", "--virtual-time-budget=2000", f"--user-data-dir={profile}", "--dump-dom", address,
            ],
            capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "HOME": profile},
        )  # fmt: skip
    document = parsed(told.stdout)
    (root,) = document.every("html")
    assert "data-error" not in root.attributes, root.attributes["data-error"]
    assert re.fullmatch(r"\d+", root.attributes.get("data-ready", "")), told.stderr[-2000:]
    return document
