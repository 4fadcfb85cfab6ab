"""Stored embeddings into float32 vectors: npy, raw float32 and JSON, each bad row named by its reason.

Here: bytes in, vectors and rejections out. Not here: fetching the bytes (`reading`).

Database bytes are data, never code: a pickled npy payload is rejected, not loaded. Rows of a page nearly
always share one npy header: a row that begins like the one before is not parsed, and payloads that are
alike are read as blocks.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from muse_assets.catalog import Encoding
from muse_assets.embeddings.payloads import Joined, Payload

_MAGIC = b"\x93NUMPY"
_HEADER_READERS = {
    (1, 0): npy_format.read_array_header_1_0,
    (2, 0): npy_format.read_array_header_2_0,
    (3, 0): npy_format.read_array_header_2_0,  # 3.0 differs in the names of structured types alone
}
# Below this norm a vector has no direction; a unit vector in float16 has 1.
_MIN_NORM = 1e-12
# FAISS's squared distances are float32: from here on they could become infinite.
_MAX_SQUARE = 1e37
# Payloads joined at a time, so that the copy out of them reads the cache: 0.9 us a row of 512 floats, 1.3 of
# 1024; a page of 4,096 joined at once took 2.8 and 4.4.
_BLOCK_ROWS = 256


class Reason(IntEnum):
    """Why a row cannot be indexed; 0 means that it can. Stored in snapshots: never renumber."""

    OK = 0
    NULL = 1
    WRONG_LENGTH = 2
    UNREADABLE = 3
    NOT_FINITE = 4
    ZERO = 5


@dataclass(frozen=True)
class Decoded:
    """vectors (n, d) float32, zeros where rejected; reasons (n,) uint8 of `Reason`."""

    vectors: NDArray[np.float32]
    reasons: NDArray[np.uint8]


def decode(
    payloads: Sequence[Payload], dimension: int, encoding: Encoding, normalize: bool = False
) -> Decoded:
    """Decode stored embeddings of `dimension` floats each; float16 and float64 are converted."""
    vectors = np.empty((len(payloads), dimension), np.float32)
    if encoding == "json":
        reasons = np.array([_decode_json(p, row) for p, row in zip(payloads, vectors, strict=True)], np.uint8)
    else:
        reasons = _decode_binary(payloads, vectors, _npy_layout if encoding == "npy" else _raw_layout)
    _reject_unusable(vectors, reasons)
    if normalize:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(norms > 0, norms, 1)
    return Decoded(vectors, reasons)


@dataclass(frozen=True)
class _Layout:
    """A payload of one vector: `header`, then its numbers, `width` bytes in all."""

    header: bytes
    dtype: np.dtype[Any]
    width: int


def _decode_binary(
    payloads: Sequence[Payload],
    vectors: NDArray[np.float32],
    layout_of: Callable[[bytes, int], _Layout | Reason],
) -> NDArray[np.uint8]:
    """Fill the rows of `vectors` (n, d) whose reasons (n,), which it returns, are OK."""
    reasons = np.zeros(len(payloads), np.uint8)
    if isinstance(payloads, Joined) and _copy_alike(payloads, vectors, layout_of):
        return reasons
    groups: dict[_Layout, list[int]] = {}
    header, width, rows = b"", -1, list[int]()
    for row, payload in enumerate(payloads):
        if not isinstance(payload, bytes):
            reasons[row] = Reason.NULL if payload is None else Reason.UNREADABLE
            continue
        if len(payload) != width or not payload.startswith(header):
            layout = layout_of(payload, vectors.shape[1])
            if isinstance(layout, Reason):
                reasons[row] = layout
                continue
            header, width, rows = layout.header, layout.width, groups.setdefault(layout, [])
        rows.append(row)
    for layout, rows in groups.items():
        for start in range(0, len(rows), _BLOCK_ROWS):
            _copy_block(payloads, rows[start : start + _BLOCK_ROWS], layout, vectors)
    return reasons


def _copy_alike(
    payloads: Joined, vectors: NDArray[np.float32], layout_of: Callable[[bytes, int], _Layout | Reason]
) -> bool:
    """Fill `vectors` (n, d) where all payloads are alike; else False, and nothing is done."""
    matrix = payloads.as_matrix()
    if matrix is None:
        return False
    layout = layout_of(matrix[0].tobytes(), vectors.shape[1])
    if not isinstance(layout, _Layout):
        return False
    start = len(layout.header)
    if (matrix[:, :start] != np.frombuffer(layout.header, np.uint8)).any():
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        vectors[:] = matrix[:, start:].view(layout.dtype)
    return True


def _copy_block(
    payloads: Sequence[Payload],
    rows: list[int],
    layout: _Layout,
    vectors: NDArray[np.float32],
) -> None:
    block = b"".join([p for row in rows if isinstance(p := payloads[row], bytes)])
    values = np.ndarray(
        (len(rows), vectors.shape[1]),
        layout.dtype,
        block,
        offset=len(layout.header),
        strides=(layout.width, layout.dtype.itemsize),
    )
    unbroken = rows[-1] - rows[0] == len(rows) - 1
    with np.errstate(over="ignore", invalid="ignore"):
        vectors[slice(rows[0], rows[-1] + 1) if unbroken else rows] = values


def _raw_layout(payload: bytes, dimension: int) -> _Layout | Reason:
    layout = _Layout(b"", np.dtype("<f4"), 4 * dimension)
    return layout if len(payload) == layout.width else Reason.WRONG_LENGTH


def _npy_layout(payload: bytes, dimension: int) -> _Layout | Reason:
    if payload[:6] != _MAGIC:
        return Reason.UNREADABLE
    start = 10 if payload[6:7] == b"\x01" else 12
    end = start + int.from_bytes(payload[8:start], "little")
    if end > len(payload):
        return Reason.WRONG_LENGTH
    layout = _parse_header(payload[:end], dimension)
    if isinstance(layout, _Layout) and len(payload) != layout.width:
        return Reason.WRONG_LENGTH
    return layout


@lru_cache(maxsize=1024)
def _parse_header(header: bytes, dimension: int) -> _Layout | Reason:
    stream = io.BytesIO(header)
    try:
        shape, _, dtype = _HEADER_READERS[npy_format.read_magic(stream)](stream)
    except Exception:  # numpy evaluates the header as Python: junk raises TokenError and a dozen others
        return Reason.UNREADABLE
    if dtype.hasobject or dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        return Reason.UNREADABLE
    if not _holds_one_vector(shape, dimension):
        return Reason.WRONG_LENGTH
    return _Layout(header, dtype, len(header) + dimension * dtype.itemsize)


def _holds_one_vector(shape: tuple[int, ...], dimension: int) -> bool:
    return shape in ((dimension,), (1, dimension))


def _decode_json(payload: Payload, row: NDArray[np.float32]) -> Reason:
    if payload is None:
        return Reason.NULL
    try:
        values = np.asarray(json.loads(payload), dtype=np.float64)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return Reason.UNREADABLE
    if not _holds_one_vector(values.shape, len(row)):
        return Reason.WRONG_LENGTH
    with np.errstate(over="ignore"):
        row[:] = values.ravel()
    return Reason.OK


def _reject_unusable(vectors: NDArray[np.float32], reasons: NDArray[np.uint8]) -> None:
    """FAISS drops a NaN row without a word and lets a zero vector be everyone's neighbor."""
    usable = reasons == Reason.OK
    with np.errstate(over="ignore", invalid="ignore"):
        # float32 is 5 times as fast as float64 and errs by 1 in 1,000 at most: doubt what is near a limit.
        squares = np.einsum("ij,ij->i", vectors, vectors)
        doubted = np.flatnonzero(usable & ~((squares > 2 * _MIN_NORM**2) & (squares < _MAX_SQUARE / 2)))
        exact = np.einsum("ij,ij->i", vectors[doubted], vectors[doubted], dtype=np.float64)
    reasons[doubted[~(exact <= _MAX_SQUARE)]] = Reason.NOT_FINITE
    reasons[doubted[exact < _MIN_NORM**2]] = Reason.ZERO
    vectors[reasons != Reason.OK] = 0
