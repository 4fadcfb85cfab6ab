"""Decoding stored embeddings against `numpy.load` on each.

Here: npy BLOBs in memory, in pages as a build reads them. Not here: reading them from a database.
"""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from muse_assets.catalog import CATALOG
from muse_assets.embeddings.decoding import Decoded, Reason, decode
from muse_assets.embeddings.reading import page_rows
from muse_assets_tests.benchmarks.measuring import Facts, Row, begin, in_turn
from muse_assets_tests.benchmarks.vectors import clustered

_ROWS = 500_000
# Taken again and again: 140 to 270 MB of BLOBs, which no cache holds.
_DISTINCT_ROWS = 65_536
_REPEATS = 2

_Page = list[bytes | None]


def rows(scale: float) -> Iterator[Row]:
    """Good rows of 512 and 1024 floats, and a table of which 4 % are odd."""
    for dimension, odd, reach in ((512, False, 20), (1024, False, 20), (512, True, None)):
        work = (dimension, int(_ROWS * scale), odd)
        ours, baseline = in_turn(_REPEATS, (_decode, work), (_numpy_load, work))
        yield Row(
            f"decode {work[1]:,} BLOBs of {dimension} float32{', 4 % of them odd' if odd else ''}",
            "numpy.load on each",
            ours,
            baseline,
            reach,
            note=", ".join(f"{name} {count}" for name, count in ours.facts.items()),
        )


def _decode(dimension: int, rows: int, odd: bool) -> Facts:
    pages = _pages(dimension, odd)
    distinct = sum(len(page) for page in pages)
    equal = sum(_equal_rows(page, decode(page, dimension, "npy")) for page in pages)
    begin()
    found: Counter[int] = Counter()
    for page in _cycled(pages, rows):
        found.update(decode(page, dimension, "npy").reasons.tolist())
    counts = {Reason(reason).name.lower(): f"{count:,}" for reason, count in sorted(found.items())}
    return {**counts, "vectors equal to numpy's": f"{equal:,} of {distinct:,} distinct"}


def _numpy_load(dimension: int, rows: int, odd: bool) -> None:
    pages = _pages(dimension, odd)
    begin()
    for page in _cycled(pages, rows):
        for payload in page:
            _loaded(payload)


def _loaded(payload: bytes | None) -> NDArray[np.float32] | None:
    try:
        return None if payload is None else np.load(io.BytesIO(payload), allow_pickle=False)
    except (ValueError, EOFError):
        return None


def _equal_rows(page: _Page, decoded: Decoded) -> int:
    equal = 0
    for payload, vector, reason in zip(page, decoded.vectors, decoded.reasons, strict=True):
        loaded = _loaded(payload)
        if reason == Reason.OK:
            equal += loaded is not None and np.array_equal(loaded.ravel().astype(np.float32), vector)
        else:
            equal += not vector.any()
    return equal


def _cycled(pages: list[_Page], rows: int) -> Iterator[_Page]:
    left = rows
    for page in itertools.cycle(pages):
        yield page[:left]
        left -= len(page)
        if left <= 0:
            return


def _pages(dimension: int, odd: bool) -> list[_Page]:
    """Pages of BLOBs; of each 100 rows 4 are NULL, cut short, float16 or of two dimensions, if `odd`."""
    pages: list[_Page] = []
    count = page_rows(replace(CATALOG.index("vibe"), dimension=dimension))
    for seed in range(_DISTINCT_ROWS // count):
        page: _Page = []
        for row, vector in enumerate(clustered(count, dimension, seed)):
            kind = row % 100 if odd else None
            payload = _saved(vector[None] if kind == 13 else vector.astype("<f2") if kind == 37 else vector)
            page.append(None if kind == 61 else payload[:-4] if kind == 89 else payload)
        pages.append(page)
    return pages


def _saved(vector: NDArray[np.floating]) -> bytes:
    file = io.BytesIO()
    np.save(file, vector, allow_pickle=False)
    return file.getvalue()
