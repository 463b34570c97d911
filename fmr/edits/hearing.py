"""A reader of a plan that lets calls inside a pass tell of its columns what the pass itself does not."""

from collections.abc import Callable
from typing import Any

from fmr.edits.frames import Columns, may_tell, names_masks
from fmr.watching.own import alone
from fmr.watching.plan import Reader


class Hearing(Reader):
    """Asks the calls inside a pass as long as something is to be heard for its columns."""

    hearing: Columns | None = None

    def hear(self, columns: Columns, called: Callable[..., Any], wanted: bool = False) -> None:
        """Hear the calls inside the one that begins, where its own signature knows no masks, or where that is `wanted`."""
        hears = columns.is_open and (wanted or not names_masks(called))
        self.hearing = columns if hears else None
        columns.is_open = columns.is_open and not hears

    def call(self, proceed: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        """Run a module call; inside a pass it may tell more of positions than the pass itself did."""
        hearing = self.hearing
        if hearing is None or not self.in_pass or not may_tell(module, args, kwargs):
            return super().call(proceed, module, args, kwargs)
        if not alone(lambda: hearing.hear(module, args, kwargs)):
            return super().call(proceed, module, args, kwargs)
        self.hearing = None  # for what this one calls
        try:
            return super().call(proceed, module, args, kwargs)
        finally:
            self.hearing = hearing
