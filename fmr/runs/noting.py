"""The watchers of a run, which also note what each pass tells about positions, for those who read it later."""

from collections.abc import Callable
from typing import Any

from fmr.edits.frames import Frames, Pasts
from fmr.watching.mode import RootWatcher
from fmr.watching.plan import Reader
from fmr.watching.recorder import Recorder
from fmr.watching.scopes import Start, named_arguments


class _Noting(RootWatcher):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.pasts = Pasts()
        self.note: Callable[[Callable[[], Frames]], None] = lambda frames: None

    def record(self, proceed: Callable[..., Any], start: Start, args: Any, kwargs: Any) -> Any:
        """Run a call as a pass."""
        self.note(self.pasts.frames_of(named_arguments(start.called, args, kwargs)))
        return super().record(proceed, start, args, kwargs)


class Recording(_Noting, Recorder):
    """A recorder."""


class Reading(_Noting, Reader):
    """A reader of a plan."""
