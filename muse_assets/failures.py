"""The two kinds of failure, told apart by whether trying again can help.

Here: exception types that carry what an operator needs. Not here: catching them; the Dagster layer
turns them into red runs (`assets/failing.py`), the command line into one sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class MuseError(Exception):
    """A failure in words an operator can act on.

    `what` names the fault and the thing it befell (index, table, path); `next_step` says what to do.
    Neither may hold a secret: both end in event logs.
    """

    def __init__(self, what: str, *, next_step: str) -> None:
        super().__init__(f"{what} Next: {next_step}")
        self.what = what
        self.next_step = next_step

    def __reduce__(self) -> tuple[Callable[..., MuseError], tuple[Any, ...]]:
        # Raised on another machine: by itself an exception is made anew from `args`, by its constructor.
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[MuseError], args: tuple[Any, ...], facts: dict[str, Any]) -> MuseError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


class PermanentFailure(MuseError):
    """Bad data, a bad setting or a refused publication: the same run would fail again."""


class PassingFailure(MuseError):
    """An outside system was down, slow or busy: a later try may succeed."""


class Conflict(PassingFailure):
    """Another process holds the lock, or changed what this one was about to replace."""
