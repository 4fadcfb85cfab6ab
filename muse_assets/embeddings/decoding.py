"""Stored embeddings into float32 vectors: npy, raw float32 and JSON, each bad row named by its reason.

Here: bytes in, vectors and rejections out. Not here: fetching the bytes (`reading`).

Database bytes are data, never code: a pickled npy payload is rejected, not loaded. Rows of a page nearly
always share one npy header, so each distinct header is parsed once and the payloads are read as one block.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from muse_assets.catalog import Encoding

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
    payloads: Sequence[bytes | str | None], dimension: int, encoding: Encoding, normalize: bool = False
) -> Decoded:
    """Decode stored embeddings of `dimension` floats each; float16 and float64 are converted."""
    vectors = np.zeros((len(payloads), dimension), np.float32)
    reasons = np.zeros(len(payloads), np.uint8)
    if encoding == "json":
        for row, payload in enumerate(payloads):
            reasons[row] = _decode_json(payload, vectors[row])
    elif encoding == "float32":
        _decode_blocks(payloads, [(0, np.dtype("<f4"))] * len(payloads), vectors, reasons)
    else:
        _decode_blocks(payloads, [_npy_layout(p, dimension) for p in payloads], vectors, reasons)
    _reject_unusable(vectors, reasons)
    if normalize:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(norms > 0, norms, 1)
    return Decoded(vectors, reasons)


_Layout = tuple[int, np.dtype[Any]] | Reason


def _decode_blocks(
    payloads: Sequence[bytes | str | None],
    layouts: Sequence[_Layout],
    vectors: NDArray[np.float32],
    reasons: NDArray[np.uint8],
) -> None:
    dimension = vectors.shape[1]
    groups: dict[tuple[int, np.dtype[Any]], list[int]] = {}
    for row, (payload, layout) in enumerate(zip(payloads, layouts, strict=True)):
        if payload is None:
            reasons[row] = Reason.NULL
        elif isinstance(layout, Reason) or isinstance(payload, str):
            reasons[row] = layout if isinstance(layout, Reason) else Reason.UNREADABLE
        elif len(payload) != layout[0] + dimension * layout[1].itemsize:
            reasons[row] = Reason.WRONG_LENGTH
        else:
            groups.setdefault(layout, []).append(row)
    for (offset, dtype), rows in groups.items():
        block = b"".join(p for row in rows if isinstance(p := payloads[row], bytes))
        width = offset + dimension * dtype.itemsize
        table = np.frombuffer(block, np.uint8).reshape(len(rows), width)[:, offset:]
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.ascontiguousarray(table).view(dtype).astype(np.float32, copy=False)
        if len(rows) == len(vectors):
            vectors[:] = values
        else:
            vectors[rows] = values


def _npy_layout(payload: bytes | str | None, dimension: int) -> _Layout:
    if not isinstance(payload, bytes) or payload[:6] != _MAGIC:
        return Reason.NULL if payload is None else Reason.UNREADABLE
    start = 10 if payload[6:7] == b"\x01" else 12
    end = start + int.from_bytes(payload[8:start], "little")
    return _parse_header(payload[:end], end, dimension) if end <= len(payload) else Reason.WRONG_LENGTH


@lru_cache(maxsize=1024)
def _parse_header(header: bytes, end: int, dimension: int) -> _Layout:
    stream = io.BytesIO(header)
    try:
        shape, _, dtype = _HEADER_READERS[npy_format.read_magic(stream)](stream)
    except Exception:  # numpy evaluates the header as Python: junk raises TokenError and a dozen others
        return Reason.UNREADABLE
    if dtype.hasobject or dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        return Reason.UNREADABLE
    return (end, dtype) if _holds_one_vector(shape, dimension) else Reason.WRONG_LENGTH


def _holds_one_vector(shape: tuple[int, ...], dimension: int) -> bool:
    return shape in ((dimension,), (1, dimension))


def _decode_json(payload: bytes | str | None, row: NDArray[np.float32]) -> Reason:
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
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    good = reasons == Reason.OK
    reasons[good & ~(squares <= _MAX_SQUARE)] = Reason.NOT_FINITE
    reasons[good & (squares < _MIN_NORM**2)] = Reason.ZERO
    vectors[reasons != Reason.OK] = 0
