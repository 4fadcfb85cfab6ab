"""The stored bytes of many rows: a list, or one buffer with all of them.

Here: what a row's payload is, and payloads that the database sent joined. Not here: asking for them
(`reading`) or what they mean (`decoding`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

# As stored, whatever the column: None for NULL.
Payload = bytes | str | None
NULL = -1


@dataclass(frozen=True)
class Joined(Sequence[Payload]):
    """Payloads in one buffer: where each begins, and its length in bytes, NULL for none; (n,) int64 both."""

    buffer: bytes
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, row: int) -> Payload: ...
    @overload
    def __getitem__(self, row: slice) -> Joined: ...
    def __getitem__(self, row: int | slice) -> Payload | Joined:
        if isinstance(row, slice):
            return Joined(self.buffer, self.starts[row], self.lengths[row])
        return self._at(int(self.starts[row]), int(self.lengths[row]))

    def __iter__(self) -> Iterator[Payload]:
        return map(self._at, self.starts.tolist(), self.lengths.tolist())

    def _at(self, start: int, length: int) -> Payload:
        return None if length == NULL else self.buffer[start : start + length]

    def as_matrix(self) -> NDArray[np.uint8] | None:
        """The payloads as rows (n, w) uint8, where all are of one length and fill the buffer; else None."""
        width = int(self.lengths[0]) if len(self.lengths) else 0
        if width <= 0 or len(self.buffer) != width * len(self) or not (self.lengths == width).all():
            return None
        matrix = np.frombuffer(self.buffer, np.uint8).reshape(-1, width)
        rows = self.starts // width
        return matrix if np.array_equal(rows, np.arange(len(matrix))) else matrix[rows]


def join(parts: Sequence[Sequence[Payload]]) -> Sequence[Payload]:
    """The payloads of several sequences as one; in a buffer where all of them are."""
    joined = [part for part in parts if isinstance(part, Joined)]
    if len(parts) == 1:
        return parts[0]
    if not parts or len(joined) < len(parts):
        return [payload for part in parts for payload in part]
    offsets = np.cumsum([0, *(len(part.buffer) for part in joined[:-1])])
    return Joined(
        b"".join([part.buffer for part in joined]),
        np.concatenate([part.starts + offset for part, offset in zip(joined, offsets, strict=True)]),
        np.concatenate([part.lengths for part in joined]),
    )
