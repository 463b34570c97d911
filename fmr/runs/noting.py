"""The watchers of a run, which also note what each pass tells about positions, for those who read it later."""

from collections.abc import Callable
from typing import Any

from fmr.edits.frames import Columns, Frames, Pasts
from fmr.edits.hearing import Hearing
from fmr.watching.mode import RootWatcher
from fmr.watching.recorder import Recorder
from fmr.watching.scopes import Start, named_arguments


class _Noting(RootWatcher):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.pasts = Pasts()
        self.note: Callable[[Callable[[], Frames]], None] = lambda frames: None

    def noted(self, columns: Columns, called: Callable[..., Any]) -> None:
        """The columns of the pass that begins."""

    def record(self, proceed: Callable[..., Any], start: Start, args: Any, kwargs: Any) -> Any:
        """Run a call as a pass, if it is not let by."""
        if self.every > 1 and self.rests():
            return self.let_by(proceed, args, kwargs)
        frames = self.pasts.frames_of(named_arguments(start.called, args, kwargs))
        self.note(frames)
        self.noted(frames, start.called)
        return super().record(proceed, start, args, kwargs)


class Recording(_Noting, Recorder):
    """A recorder."""


class Reading(_Noting, Hearing):
    """A reader of a plan."""

    def noted(self, columns: Columns, called: Callable[..., Any]) -> None:
        """The columns of the pass that begins, of which calls inside it may tell more."""
        self.hear(columns, called)
