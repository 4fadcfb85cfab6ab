"""Settings of the whole process that several threads want for a time.

Here: who is the first to want them and who the last. Not here: the settings (`encoding`,
`nearest_centroids`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class WhileWanted:
    """Enters what `settings` gives for the first who wants it, and leaves it after the last."""

    def __init__(self, settings: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._wanted_by = 0
        self._entered = contextlib.ExitStack()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """With the settings; any number of threads at once."""
        with self._lock:
            if not self._wanted_by:
                self._entered.enter_context(self._settings())
            self._wanted_by += 1
        try:
            yield
        finally:
            with self._lock:
                self._wanted_by -= 1
                if not self._wanted_by:
                    self._entered.close()
