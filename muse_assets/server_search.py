"""What the search server does with a live file and a program's keys, step by step.

Here: a search as the server runs it, for people and for tests of the contract. Not here: anything the
server does not do. The rules are the server's and cannot change: the fallback file when the live one does
not load; the stored nprobe, at least 100 with a program; playlist ids kept only within
0 <= id < index.ntotal; hits beyond the distance cut dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import connected
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.reading import rows_by_idx, song_keys, table_columns
from muse_assets.failures import PermanentFailure

PROGRAM_NPROBE = 100


@dataclass(frozen=True)
class Hit:
    """idx: the table row, FAISS id + 1. distance: squared L2. song_key: as the row has it."""

    idx: int
    distance: float
    song_key: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """hits, nearest first; nprobe: lists probed; allowed: playlist ids within range, None without one.

    file: the one that answered, the fallback when the live file did not load.
    """

    hits: tuple[Hit, ...]
    nprobe: int
    allowed: int | None
    file: Path


def stored_vector(engine: Engine, spec: IndexSpec, idx: int) -> NDArray[np.float32]:
    """The embedding of one row, (1, d) float32.

    Raises PermanentFailure when there is no such row or it cannot be indexed.
    """
    with connected(engine, f"reading {spec.table} row {idx}") as connection:
        table_columns(connection, spec)
        found = [page for page in rows_by_idx(connection, spec, np.array([idx])) if len(page.idx)]
    if not found:
        raise PermanentFailure(
            f"{spec.name}: {spec.table} has no row with idx {idx}.", next_step="give an idx that exists."
        )
    decoded = decode(found[0].payloads, spec.dimension, spec.encoding, spec.normalize)
    if decoded.reasons[0] != Reason.OK:
        raise PermanentFailure(
            f"{spec.name}: row {idx} of {spec.table} cannot be searched with: "
            f"{Reason(decoded.reasons[0]).name.lower()}.",
            next_step="mend the row or give another one.",
        )
    return decoded.vectors


def search(
    engine: Engine,
    spec: IndexSpec,
    live: Path,
    query: NDArray[np.float32],
    *,
    k: int = 10,
    playlist_ids: NDArray[np.int64] | None = None,
) -> Answer:
    """The k nearest rows of `query` (1, d) float32 in the live file, within a playlist's ids if given.

    Raises PermanentFailure when neither the live file nor the fallback beside it can be loaded.
    """
    index, file = _load(spec, live)
    nprobe, allowed, selector = index.nprobe, None, None
    if playlist_ids is not None:
        allowed_ids = playlist_ids[(playlist_ids >= 0) & (playlist_ids < index.ntotal)]
        nprobe, allowed = max(nprobe, PROGRAM_NPROBE), len(allowed_ids)
        selector = faiss.IDSelectorBatch(np.ascontiguousarray(allowed_ids, dtype=np.int64))
    parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
    distances, ids = index.search(query, k, params=parameters)
    kept = [
        (int(found) - spec.id_offset, float(distance))
        for found, distance in zip(ids[0], distances[0], strict=True)
        if found >= 0 and (spec.distance_cut is None or distance <= spec.distance_cut)
    ]
    with connected(engine, f"looking up {spec.table} by idx") as connection:
        keys = song_keys(connection, spec, np.array([idx for idx, _ in kept], np.int64)) if kept else {}
    return Answer(tuple(Hit(idx, d, keys.get(idx, ())) for idx, d in kept), nprobe, allowed, file)


def _load(spec: IndexSpec, live: Path) -> tuple[Any, Path]:
    """The index that the server would have in memory, and its file."""
    for path in (live, live.with_name(spec.fallback_file)):
        try:
            return faiss.read_index(str(path)), path
        except RuntimeError:
            continue
    raise PermanentFailure(
        f"{spec.name}: neither {live} nor {spec.fallback_file} beside it can be loaded.",
        next_step=f"`muse deploy {spec.name}`, with --replace-damaged if the live file is damaged.",
    )
