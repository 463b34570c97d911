"""Whether the name of a file says what will be written to it."""

import os

from fmr.disk.files import named
from fmr.errors import DrawError

_WRITERS = {"svg": "graph.save_svg", "dot": "graph.save_dot", "gv": "graph.save_dot", "json": "graph.save_explorer"}
_CONVERTED = "png pdf ps eps jpg jpeg gif webp bmp tif tiff svgz".split()
"""Formats that Graphviz's program makes of a DOT file."""


def check_ending(path: str | os.PathLike[str], *right: str) -> None:
    """Raise for a name that ends as another kind of file does; one without an ending, or with a number, is left alone."""
    given = named(path).suffix[1:]
    ending = given.lower()
    if ending in right or not given.isalpha():
        return
    name = str(os.fspath(path))
    stem = name.removesuffix(f".{given}")
    remedy = ""
    if ending in _WRITERS:
        remedy = f"; {_WRITERS[ending]}({name!r}) writes that kind"
    elif ending in _CONVERTED:
        remedy = f". For that kind write graph.save_dot({stem + '.dot'!r}) and run `dot -T{ending} {stem}.dot -o {name}`"
    raise DrawError(
        f"{name!r} ends in '.{given}', but {right[0].upper()} is written: expected {stem + '.' + right[0]!r}{remedy}."
    )
