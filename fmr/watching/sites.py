"""Call sites as text: `file:line` of an instruction."""

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

_lines: dict[tuple[int, int], tuple[CodeType, str]] = {}


def outermost(proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a root. Its frame ends the search for a call site: the line that calls the model is none of the model's."""
    return proceed(*args, **kwargs)


outermost.__code__ = outermost.__code__.replace(co_filename="<call of a root>")  # no file of fmr's, whose frames are passed


def where_of(code: CodeType | None, lasti: int) -> str:
    """`file:line` of an instruction, the file as it is imported, without the directory of the installation.

    It is empty for an op that no code of the model's own called, as in a root that is an `nn.Sequential` of torch's layers.
    """
    if code is None or code is outermost.__code__:
        return ""
    known = _lines.get((id(code), lasti))
    if known is None:
        line = next((n for start, end, n in code.co_lines() if start <= lasti < end), None)
        known = _lines[id(code), lasti] = code, f"{_short(code.co_filename)}:{line or code.co_firstlineno}"
    return known[1]


def _short(filename: str) -> str:
    roots = [root + "/" for root in sys.path if root and filename.startswith(root + "/")]
    return filename[len(max(roots, key=len)) :] if roots else filename
