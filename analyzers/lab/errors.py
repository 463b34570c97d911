"""What goes wrong in a lab, as one error that keeps what had been computed."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from analyzers.protocol import AnalyzerError
from fmr.errors import FmrError


class LabError(AnalyzerError):
    """Something that a lab cannot keep or read. `result`: what the experiment returned, where it came to its end.

    >>> try:
    ...     lab.version("no such version")
    ... except LabError as error:
    ...     print(error)
    'no such version' is no version of the lab in ...: there is none. Expected one of its versions.
    """

    result: Any = None


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what the disk or the database refuses into one clear error."""
    try:
        yield
    except sqlite3.Error as error:
        raise LabError(
            f"{what} failed ({error}). Nothing was half written; check the disk, and that the file is a lab."
        ) from error
    except OSError as error:
        raise LabError(
            f"{what} failed ({error.strerror or error}). Nothing was half written; check the disk and its permissions."
        ) from error
    except FmrError as error:
        raise error if isinstance(error, LabError) else LabError(str(error)) from error
