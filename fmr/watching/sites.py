"""Call sites as text: `file:line` of an instruction."""

import sys
from types import CodeType

_lines: dict[tuple[int, int], tuple[CodeType, str]] = {}


def where_of(code: CodeType | None, lasti: int) -> str:
    """`file:line` of an instruction, the file as it is imported, without the directory of the installation."""
    if code is None:
        return ""
    known = _lines.get((id(code), lasti))
    if known is None:
        line = next((n for start, end, n in code.co_lines() if start <= lasti < end), None)
        known = _lines[id(code), lasti] = code, f"{_short(code.co_filename)}:{line or code.co_firstlineno}"
    return known[1]


def _short(filename: str) -> str:
    roots = [root + "/" for root in sys.path if root and filename.startswith(root + "/")]
    return filename[len(max(roots, key=len)) :] if roots else filename
