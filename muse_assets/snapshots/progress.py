"""How long work tells how far it is: one callable, given by whoever shows it.

Here: the type and the silent one. Not here: bars (`cli`) or run logs (`assets`).
"""

from __future__ import annotations

from collections.abc import Callable

# (what is being done, units done, units in all); all is 0 where it is not known.
Progress = Callable[[str, int, int], None]


def silent(_doing: str, _done: int, _total: int) -> None:
    """Show nothing."""
