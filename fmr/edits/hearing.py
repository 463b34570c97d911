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
        self.asking = columns.is_open and (wanted or not names_masks(called))
        self.hearing = columns if self.asking else None
        columns.is_open = columns.is_open and not self.asking

    def asks(self, module: Any, args: Any, kwargs: Any) -> bool:
        """Hear a call, which may tell more of positions than the pass itself did."""
        hearing = self.hearing
        return hearing is not None and may_tell(module, args, kwargs) and alone(lambda: hearing.hear(module, args, kwargs))
