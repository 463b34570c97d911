"""An error that ends a run: the module call that raised, and the run that the error carries out of the block."""

import traceback
from typing import NamedTuple

_LONGEST = 160


class Failure(NamedTuple):
    """The innermost module call that raised, the last value that was made before, and the error in one line."""

    call: str
    after: str
    error: str

    def __str__(self) -> str:
        after = f" after {self.after}" if self.after else ""
        return f"raised in {self.call or 'the model itself'}{after}: {self.error}"


def in_a_line(error: BaseException | None) -> str:
    """An error as the last line of its traceback says it."""
    return traceback.format_exception_only(error)[0].partition("\n")[0][:_LONGEST] if error is not None else ""


def carry(error: BaseException, run: object) -> None:
    """Let an error carry the run that it ended, as `error.run`, past any code of its class that refuses or has its own."""
    if not hasattr(type(error), "run"):
        BaseException.__setattr__(error, "run", run)
