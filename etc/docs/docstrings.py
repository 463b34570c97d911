"""Docstrings as Markdown, for the site: examples become code, arguments a list. A plug-in of griffe, which reads them."""

import re
from typing import Any

from griffe import Class, Extension, Function, Object

EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?! *$).+)*", re.MULTILINE)
"""An example and what it prints, up to the next empty line."""

QUOTED = re.compile(r'"[^"\n]*\*[^"\n]*"')
"""A glob in quotes, whose stars mean no emphasis."""


def marked(text: str, names: set[str]) -> str:
    """A docstring as Markdown; names are those of the arguments.

    >>> print(marked("Add.\\n\\n>>> 1 + 1\\n2\\n\\na: a number. b, c: others.", {"a", "b", "c"}))
    Add.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    - **`a`**: a number.
    - **`b`, `c`**: others.
    """
    return "\n\n".join(_block(block, names) for block in text.split("\n\n"))


def _block(block: str, names: set[str]) -> str:
    if EXAMPLE.search(block):
        return EXAMPLE.sub(lambda found: f"{found['indent']}```pycon\n{found[0]}\n{found['indent']}```", block)
    block = QUOTED.sub(lambda found: found[0].replace("*", r"\*"), block)
    one = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    if not one or not re.match(rf"(?:{one})(?:, (?:{one}))*: ", block):
        return block
    starts = re.compile(rf"(?:^|(?<=[.;])\s)((?:{one})(?:, (?:{one}))*): ")
    items = starts.split(" ".join(block.split()))[1:]
    return "\n".join(f"- **{_named(told)}**: {text}" for told, text in zip(items[::2], items[1::2], strict=True))


def _named(told: str) -> str:
    return ", ".join(f"`{name}`" for name in told.split(", "))


def _arguments(found: Object) -> set[str]:
    """The names of what a function or the constructor of a class is given, and of the fields of a class."""
    if isinstance(found, Function):
        return {one.name for one in found.parameters}
    if isinstance(found, Class):
        made = found.members.get("__init__")
        given = {one.name for one in made.parameters} if isinstance(made, Function) else set[str]()
        return given | {name for name, member in found.members.items() if member.is_attribute}
    return set()


class Doctests(Extension):
    """Marks up everything that has a docstring, once a package has been read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = marked(obj.docstring.value, _arguments(obj))
