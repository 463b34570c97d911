"""Whether all links of the built site lead somewhere, and nothing is loaded from elsewhere: `python etc/docs/links.py`."""

import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).parents[2] / "site"

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser fetches by itself."""

NO_FILE = ("canonical", "alternate", "next", "prev", "edit")
"""Kinds of <link> that name an address without loading it."""


class Page(HTMLParser):
    """The addresses and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = {name: value or "" for name, value in attrs}
        self.anchors |= {held[name] for name in ("id", "name") if name in held}
        at = LOADED.get(tag, "href")
        if at in held and not (tag == "link" and held.get("rel") in NO_FILE):
            self.links.append((tag, held[at]))


def broken(site: Path = SITE) -> list[str]:
    """Links of the pages of a folder that lead nowhere, and what they load from another place."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for tag, link in dict.fromkeys(page.links):
            told = urlsplit(link)
            if told.scheme or told.netloc:
                if tag in LOADED and told.scheme != "data":
                    found.append(f"{path.relative_to(site)} loads {link}")
            elif path.name != "404.html" and (why := _wrong(path, told.path, unquote(told.fragment), pages)):
                found.append(f"{path.relative_to(site)}: {link} {why}")
    return found


def _wrong(path: Path, to: str, anchor: str, pages: dict[Path, Page]) -> str:
    """What is wrong about a link within the site; empty where nothing is."""
    there = Path(os.path.normpath(path.parent / unquote(to))) if to else path
    if there not in pages and there.is_dir():
        there /= "index.html"
    if there not in pages and not there.exists():
        return "leads to no file"
    return "has no such place in it" if there in pages and anchor not in pages[there].anchors | {"__search"} else ""


if __name__ == "__main__":
    wrong = broken()
    sys.stdout.writelines(f"{line}\n" for line in wrong)
    sys.exit(bool(wrong))
