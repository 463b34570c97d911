"""The pages of the documentation, cut from what is written elsewhere: `python etc/docs/pages.py` puts them into build/.

Guides and chapters are sections of README.md, the API is a page for each public name with its docstring, notebooks are shown
as they are stored. Nothing is written twice, and nothing needs to be imported. `make docs` builds the site of them.
"""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build"

WANTS = "I want to ..."
"""The chapter of README.md whose sections are guides."""

GROUPS = {
    "Look": "see what a model does",
    "Change": "change what it computes",
    "Ask what it computes": "write down what a model might compute",
    "Patch and trace": "patch activations and paths, from text",
    "Memories, lenses, heads": "find what triggers a memory, and whether it says what follows",
    "Inputs, images, modules": "see which inputs an answer rests on",
    "Draw and keep": "look at the heads of one layer",
}
"""The groups of guides, each with the one that it begins with."""

ROOMS = ("fmr", "analyzers")
"""Packages whose every public name has a page of its own."""

RETURNED = ("fmr.structure.parts", "fmr.runs.passes")
"""Modules of what public functions return, and their names where `__all__` does not say."""

NAMES = {"fmr.runs.passes": ["Pass"]}

Nav = list[dict[str, "str | Nav"]]


class Section(NamedTuple):
    """A part of a text under one heading."""

    title: str
    text: str


class Site(NamedTuple):
    """Everything that the site is made of: pages by path, files that are copied, and how pages are reached."""

    pages: dict[str, str]
    files: dict[str, Path]
    nav: Nav


def sections(text: str, level: int) -> list[Section]:
    """A text cut at its headings of one level; what comes before the first has no title. Code is not searched."""
    found, title, lines, code = [], "", list[str](), False
    mark = "#" * level + " "
    for line in text.splitlines():
        code ^= line.startswith("```")
        if line.startswith(mark) and not code:
            found.append(Section(title, "\n".join(lines).strip()))
            title, lines = line.removeprefix(mark).strip(), []
        else:
            lines.append(line)
    return [*found, Section(title, "\n".join(lines).strip())]


def slug(title: str) -> str:
    """The name of a heading in addresses.

    >>> slug("I want to ...")
    'i-want-to'
    """
    return re.sub(r"[^\w]+", "-", title.lower()).strip("-")


def headed(title: str, text: str) -> str:
    return f"# {title[:1].upper()}{title[1:]}\n\n{text}\n"


# ---- from README.md


def chapters() -> tuple[str, list[Section], list[Section]]:
    """The beginning of README.md, its chapters, and its guides."""
    before, *rest = sections((ROOT / "README.md").read_text(), 2)
    guides = [guide for one in rest if one.title == WANTS for guide in sections(one.text, 3) if guide.title]
    return before.text, [one for one in rest if one.title != WANTS], guides


def grouped(guides: list[Section]) -> Iterator[tuple[str, list[Section]]]:
    """Guides in their groups, in the order of README.md."""
    starts = {title: group for group, title in GROUPS.items()}
    missing = starts.keys() - {guide.title for guide in guides}
    assert not missing, f"no guide of README.md is called {sorted(missing)}: GROUPS of etc/docs/pages.py names them"
    group, held = "", list[Section]()
    for guide in guides:
        if guide.title in starts:
            if held:
                yield group, held
            group, held = starts[guide.title], []
        held.append(guide)
    yield group, held


def linked(text: str, page: str, homes: dict[str, str]) -> str:
    """A text of README.md with links and pictures as a page at another place sees them."""
    up = "../" * page.count("/")

    def target(told: str) -> str:
        if told.startswith("#"):
            return up + homes[told[1:]]
        for folder, here in (
            ("etc/images/", "images/"),
            ("notebooks/", "notebooks/"),
            ("etc/bench/", "about/"),
            ("etc/scale", "about/scale"),
        ):
            if told.startswith(folder):
                return up + here + told.removeprefix(folder)
        return told

    text = re.sub(r"(\]\()([^)\s]+)(\))", lambda m: m[1] + target(m[2]) + m[3], text)
    return re.sub(r'(<img src=")([^"]+)(")', lambda m: m[1] + target(m[2]) + m[3], text)


# ---- the API


def public(module: str) -> list[str]:
    """The public names of a module, as its source says."""
    tree = source(module)
    assert tree is not None, f"{module} is no module of the two houses"
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return NAMES.get(module, [])


def modules() -> list[str]:
    """The modules that have a page with all of their public names: those among the public names of the two houses."""
    named = [f"{house}.{name}" for house in ROOMS for name in public(house)]
    return [*(name for name in named if source(name) is not None), "fmr.sweeps", *RETURNED]


def documented() -> dict[str, str]:
    """The page of each public name."""
    own = {f"{house}.{name}": f"api/{house}.{name}.md" for house in ROOMS for name in public(house)}
    for module in modules():
        own |= {module: f"api/{module}.md"} | {f"{module}.{name}": f"api/{module}.md" for name in public(module)}
    return own


def api() -> tuple[dict[str, str], Nav]:
    """The pages of the API, and how they are reached."""
    pages: dict[str, list[str]] = {}
    for name, path in documented().items():
        pages.setdefault(path, []).append(name)
    made = {path: _page(*names) for path, names in pages.items()}
    own = {
        house: [names[0] for names in pages.values() if names[1:] == [] and names[0].startswith(f"{house}.")]
        for house in ROOMS
    }
    more = modules()
    listed = "".join(f"\n## {house}\n\n{_listed(names)}\n" for house, names in own.items())
    made["api/index.md"] = f"# API\n\nEvery public name, with its first sentence.\n{listed}\n## Modules\n\n{_listed(more)}\n"
    nav: Nav = [{house: [{name: f"api/{name}.md"} for name in names]} for house, names in own.items()]
    return made, [{"All": "api/index.md"}, *nav, *({module: f"api/{module}.md"} for module in more)]


def _page(first: str, *names: str) -> str:
    """The page of one name, or of a module with all of its names."""
    if not names:
        return _asked(first, 1)
    return f"# {first}\n\n{sentence(first)}\n\n" + "\n".join(_asked(name, 2) for name in names)


def _asked(name: str, level: int) -> str:
    """What mkdocstrings is asked for: a name where it is defined, under the name that users know."""
    options = f"{{heading_level: {level}, heading: {name}, toc_label: {name.rpartition('.')[2]}}}"
    return f"::: {home(name)}\n    options: {options}\n"


def _listed(names: list[str]) -> str:
    return "\n".join(f"- [`{name}`]({name}.md): {sentence(name)}" for name in names)


def source(module: str) -> ast.Module | None:
    """The code of a module; None where there is none of this name."""
    place = ROOT.joinpath(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text()) if file.exists() else None


def home(name: str) -> str:
    """Where a public name is defined: a module may have the same name as a function in it, which tools mix up.

    >>> home("fmr.locate")
    'fmr.structure.locate.locate'
    """
    module, _, last = name.rpartition(".")
    tree = source(module) if module else None
    for node in tree.body if tree is not None else ():
        for one in node.names if isinstance(node, ast.ImportFrom) else ():
            if (one.asname or one.name) == last and f"{node.module}.{one.name}" != name:
                return home(f"{node.module}.{one.name}")
    return name


def sentence(name: str) -> str:
    """The first sentence of the docstring of a public name; of a constant, none."""
    module, _, last = home(name).rpartition(".")
    tree = source(module) if module else None
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == last:
            return _first(node)
    own = source(name)
    return _first(own) if own is not None else ""


def _first(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str:
    return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


# ---- all of it


def site() -> Site:
    """The whole site."""
    before, rest, guides = chapters()
    homes = {slug(one.title): f"about/{slug(one.title)}.md" for one in rest}
    homes |= {slug(one.title): f"guides/{slug(one.title)}.md" for one in guides} | {slug(WANTS): "guides/index.md"}
    pages = {"index.md": linked(before, "index.md", homes)}
    first = guides[0]
    for guide in guides:
        path = homes[slug(guide.title)]
        goes_on = (
            f"\n\nThe code goes on from *[{first.title}]({slug(first.title)}.md)* and the guides between."
            if guide != first
            else ""
        )
        pages[path] = headed(guide.title, linked(guide.text, path, homes) + goes_on)
    for one in rest:
        pages[homes[slug(one.title)]] = headed(one.title, linked(one.text, homes[slug(one.title)], homes))
    listed = [
        f"## {group}\n\n" + "\n".join(f"- [{one.title}]({slug(one.title)}.md)" for one in some)
        for group, some in grouped(guides)
    ]
    pages["guides/index.md"] = headed(WANTS, "\n\n".join(listed))
    pages["about/architecture.md"] = (ROOT / "etc/ARCHITECTURE.md").read_text()
    pages["about/scale.md"] = (ROOT / "etc/scale.md").read_text()
    pages["about/peers.md"] = (ROOT / "etc/bench/peers.md").read_text()
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    pages["notebooks/index.md"] = (ROOT / "notebooks/README.md").read_text()
    made, named = api()
    files = {"site.css": ROOT / "etc/docs/site.css"}
    files |= {f"notebooks/{path.name}": path for path in notebooks}
    files |= {
        f"images/{path.name}": path for path in (ROOT / "etc/images").iterdir() if path.suffix != ".py" and path.is_file()
    }
    return Site(pages | made, files, _nav(rest, guides, homes, notebooks, named))


def _nav(rest: list[Section], guides: list[Section], homes: dict[str, str], notebooks: list[Path], named: Nav) -> Nav:
    def of(some: list[Section]) -> Nav:
        return [{f"{one.title[:1].upper()}{one.title[1:]}": homes[slug(one.title)]} for one in some]

    titles: Nav = [{path.stem.replace("_", " "): f"notebooks/{path.name}"} for path in notebooks]
    return [
        {"fmr": "index.md"},
        {"Guides": [{"All": "guides/index.md"}, *({group: of(some)} for group, some in grouped(guides))]},
        {"API": named},
        {"Notebooks": [{"All": "notebooks/index.md"}, *titles]},
        {
            "About": [
                *of(rest),
                {"How fmr is built": "about/architecture.md"},
                {"At scale": "about/scale.md"},
                {"Peers, in full": "about/peers.md"},
            ]
        },
    ]


def write(out: Path = OUT) -> None:
    """Put the pages and the configuration of the site where mkdocs reads them; what is there goes first."""
    whole, docs = site(), out / "docs"
    shutil.rmtree(docs, ignore_errors=True)
    for path, text in whole.pages.items():
        (docs / path).parent.mkdir(parents=True, exist_ok=True)
        (docs / path).write_text(text)
    for path, source in whole.files.items():
        (docs / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, docs / path)
    here = {"INHERIT": "../etc/docs/mkdocs.yml", "docs_dir": "docs", "site_dir": "../site", "nav": whole.nav}
    (out / "mkdocs.yml").write_text(json.dumps(here, indent=1))  # JSON is YAML, too


if __name__ == "__main__":
    write()
