"""A look at a snapshot for people: a few sample songs and what lies nearest to them.

Here: which songs, their neighbors as the search server finds them in the written file, and their names.
Not here: judging the index (`gate`), or drawing the table (`assets.metadata`). A preview is an ornament:
nothing in it may fail a build or hold it up.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import connected
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.reading import join_pages, rows_by_idx, song_keys
from muse_assets.failures import MuseError
from muse_assets.ivfpq.contents import list_ids
from muse_assets.ivfpq.files import read_index

SONGS = 5
NEIGHBORS = 3
# Playlists name few songs of a catalog: of 300 rows, five have a title where every 40th song has one.
_CANDIDATES = 300
# Rows of the song itself and further rows of a neighbor (lyrics have a dozen a song) are passed over.
_HITS = 64
# Of each question to a database; a healthy one answers in milliseconds.
_SECONDS = 5.0

RowKey = tuple[str, ...]
"""A row's song key: (disc, track), or (disc,) where the index knows no track."""

TitleLookup = Callable[[Collection[RowKey]], Mapping[RowKey, tuple[str, str]]]
"""(title, artist) of those keys that have one, as `playlists.songs.song_titles` finds them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Neighbor:
    """distance: squared L2, as the server reads it."""

    song: str
    distance: float


@dataclass(frozen=True)
class PreviewedSong:
    """One row of the index and its nearest other songs, nearest first."""

    idx: int
    song: str
    neighbors: tuple[Neighbor, ...]


@dataclass(frozen=True)
class NeighborPreview:
    """note: what could not be shown and why; empty if nothing is missing."""

    songs: tuple[PreviewedSong, ...]
    note: str = ""


def preview_neighbors(
    engine: Engine, spec: IndexSpec, path: Path, day: date, titles: TitleLookup
) -> NeighborPreview:
    """Five songs of a snapshot file, others every day, with their three nearest other songs.

    Songs with a title are preferred. Searched as the server does: the stored nprobe, hits beyond the
    distance cut dropped. Costs one read of the file, three statements by primary key and two calls of
    `titles`. Never raises an Exception and waits for no database longer than 5 s: what went wrong is the
    note.
    """
    try:
        return _Preview(engine, spec, titles).of(path, day)
    except Exception as error:
        return NeighborPreview((), f"no preview: {_reason(error, 'the embedding database')}")


class _Preview:
    def __init__(self, engine: Engine, spec: IndexSpec, titles: TitleLookup) -> None:
        self.engine, self.spec, self.titles = engine, spec, titles
        self.known: dict[RowKey, tuple[str, str]] = {}
        self.note = ""

    def of(self, path: Path, day: date) -> NeighborPreview:
        index = read_index(path)
        drawn = _draw(list_ids(index), self.spec.name, day) - self.spec.id_offset
        keys = self._ask(lambda connection: song_keys(connection, self.spec, drawn))
        self._learn_titles(keys.values())
        if not self.known and not self.note:
            self.note = f"none of {len(keys):,} sampled songs has a title in the playlist tables"
        chosen = self._choose([int(idx) for idx in drawn if int(idx) in keys], keys)
        wanted = np.array(chosen, np.int64)
        page = self._ask(lambda connection: join_pages(rows_by_idx(connection, self.spec, wanted)))
        decoded = decode(page.payloads, self.spec.dimension, self.spec.encoding, self.spec.normalize)
        good = decoded.reasons == Reason.OK
        if not good.any():
            return NeighborPreview((), "no preview: the sampled rows have gone")
        hits = dict(zip(page.idx[good].tolist(), self._search(index, decoded.vectors[good]), strict=True))
        near = np.unique([idx for found in hits.values() for idx, _ in found]).astype(np.int64)
        keys |= self._ask(lambda connection: song_keys(connection, self.spec, near))
        if self.known:
            self._learn_titles([keys[idx] for idx in near.tolist() if idx in keys])
        songs = tuple(
            PreviewedSong(idx, self._name(keys[idx]), self._nearest(keys[idx], hits[idx], keys))
            for idx in chosen
            if idx in hits
        )
        return NeighborPreview(songs, self.note)

    def _ask(self, query: Callable[[Connection], T]) -> T:
        def ask() -> T:
            with connected(self.engine, f"reading {self.spec.table} for the neighbor preview") as connection:
                return query(connection)

        return _within(_SECONDS, ask)

    def _learn_titles(self, keys: Iterable[RowKey]) -> None:
        """Of songs and of their discs: the same rows of the playlist tables answer both."""
        wanted = {part for key in keys for part in (key, key[:1])} - set(self.known)
        try:
            self.known |= _within(_SECONDS, lambda: self.titles(wanted))
        except Exception as error:
            self.note = f"titles are missing: {_reason(error, 'the playlist database')}"

    def _choose(self, drawn: list[int], keys: Mapping[int, RowKey]) -> list[int]:
        """One row a song, those with a title first, else in the order in which they were drawn."""
        first: dict[RowKey, int] = {}
        for idx in drawn:
            first.setdefault(keys[idx], idx)
        return sorted(first.values(), key=lambda idx: keys[idx] not in self.known)[:SONGS]

    def _search(self, index: Any, vectors: NDArray[np.float32]) -> list[list[tuple[int, float]]]:
        """For each vector (idx, distance) of the rows that the server would return, nearest first."""
        cut = self.spec.distance_cut
        distances, ids = index.search(vectors, _HITS)
        return [
            [
                (int(hit) - self.spec.id_offset, float(distance))
                for distance, hit in zip(*row, strict=True)
                if hit >= 0 and (cut is None or distance <= cut)
            ]
            for row in zip(distances, ids, strict=True)
        ]

    def _nearest(
        self, own: RowKey, hits: list[tuple[int, float]], keys: Mapping[int, RowKey]
    ) -> tuple[Neighbor, ...]:
        nearest: dict[RowKey, float] = {}
        for idx, distance in hits:
            if idx in keys and keys[idx] != own:
                nearest.setdefault(keys[idx], distance)
        return tuple(Neighbor(self._name(key), far) for key, far in list(nearest.items())[:NEIGHBORS])

    def _name(self, key: RowKey) -> str:
        disc = key[:1]
        if key in self.known and key != disc:
            return " · ".join(self.known[key])
        # Playlists name few songs of a catalog, and one song of a disc tells whose it is.
        return "/".join(key) + (f", disc of {self.known[disc][1]}" if disc in self.known else "")


def _draw(ids: NDArray[np.int64], name: str, day: date) -> NDArray[np.int64]:
    """Random ids of the index (n,), the same for the same index, day and content."""
    random = np.random.default_rng([zlib.crc32(name.encode()), day.toordinal()])
    return random.choice(np.sort(ids), min(_CANDIDATES, len(ids)), replace=False)


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns, TimeoutError after `seconds`.

    In a thread of its own, for drivers have time-outs for a connection and a read but none for the whole.
    One that is late is left behind, and ends at its driver's time-out or with the process.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="neighbor-preview", daemon=True).start()
    return outcome.result(seconds)


def _reason(error: Exception, asked: str) -> str:
    if isinstance(error, TimeoutError):
        return f"{asked} did not answer within {_SECONDS:g} s"
    # The words of any other exception may hold what is secret.
    return error.what if isinstance(error, MuseError) else type(error).__name__
