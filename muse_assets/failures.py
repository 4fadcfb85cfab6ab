"""The two kinds of failure, told apart by whether trying again can help.

Here: exception types that carry what an operator needs. Not here: catching them; the Dagster layer
turns them into red runs (`assets/failing.py`), the command line into one sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial


class MuseError(Exception):
    """A failure in words an operator can act on.

    `what` names the fault and the thing it befell (index, table, path); `next_step` says what to do.
    Neither may hold a secret: both end in event logs.
    """

    def __init__(self, what: str, *, next_step: str) -> None:
        super().__init__(f"{what} Next: {next_step}")
        self.what = what
        self.next_step = next_step

    def __reduce__(self) -> tuple[Callable[..., MuseError], tuple[str]]:
        # Raised on another machine: an exception is made anew from its positional arguments alone.
        return partial(type(self), next_step=self.next_step), (self.what,)


class PermanentFailure(MuseError):
    """Bad data, a bad setting or a refused publication: the same run would fail again."""


class PassingFailure(MuseError):
    """An outside system was down, slow or busy: a later try may succeed."""


class Conflict(PassingFailure):
    """Another process holds the lock, or changed what this one was about to replace."""
