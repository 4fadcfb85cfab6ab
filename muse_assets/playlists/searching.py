"""How good searches through a program's playlist are, measured as the search server runs them.

Here: which queries, what they are compared with, and what would mend searches that come back short. Not
here: searching (`ivfpq.filtered`), or showing it (`assets`). A measurement is an ornament of a refresh that
is done: nothing in it may fail that.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import redis
from numpy.typing import NDArray
from sqlalchemy import Engine

from muse_assets.catalog import Catalog, IndexSpec, Program
from muse_assets.connections.databases import connected
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.reading import rows_by_idx
from muse_assets.failures import MuseError, PassingFailure, PermanentFailure
from muse_assets.ivfpq.contents import list_ids
from muse_assets.ivfpq.files import discard_lists, read_index
from muse_assets.ivfpq.filtered import (
    Reach,
    measure_reach,
    recall_of_codes,
    recall_of_rows,
    search_among,
)
from muse_assets.playlists.cache import read_ids
from muse_assets.publishing.live import live_file
from muse_assets.server_search import PROGRAM_NPROBE

K = 10
# Half of them the playlist's own rows, half of the whole index: who searches may be after either.
QUERIES = 64
# Up to here the playlist's rows are read from the table; beyond, its codes are reconstructed.
ROWS_READ = 4096
# Share of searches that may come back short.
SHORT_SHARE = 0.05

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Remedy:
    """What would bring the share of short searches down to `SHORT_SHARE`.

    nprobe: stored in the file, the smallest power of two, at most nlist. scanned_now, scanned_then: codes a
    plain search scans with the present one and with that. nlist: the other way, after which the server's 100
    lists hold as large a part of the table; it takes a retrain.
    """

    nprobe: int
    scanned_now: float
    scanned_then: float
    nlist: int


@dataclass(frozen=True)
class PlaylistSearches:
    """Searches within one playlist in one live file.

    ids: of the playlist; held: those in the file. nprobe of nlist lists are probed. short: share of queries
    with fewer than min(10, held) results. recall: recall@10 within the playlist. reference: what that is
    measured against, the table's rows or, in a large playlist, the file's own codes (what probing every list
    would find). milliseconds: median of single searches.
    """

    index: str
    ids: int
    held: int
    queries: int
    nprobe: int
    nlist: int
    short: float
    recall: float
    reference: Literal["rows", "codes"]
    milliseconds: float
    remedy: Remedy | None


@dataclass(frozen=True)
class Measurement:
    """One program's searches in each live file; unmeasured: index -> why not."""

    searches: tuple[PlaylistSearches, ...]
    unmeasured: dict[str, str]
    seconds: float

    @property
    def all_full(self) -> bool:
        """Whether everything was measured, and no more than `SHORT_SHARE` came back short."""
        return not self.unmeasured and all(one.remedy is None for one in self.searches)

    @property
    def summary(self) -> str:
        """In words, what is short and what would mend it, or why it is not known."""
        lines = [described(one) for one in self.searches if one.remedy]
        lines += [f"{index}: not measured: {why}" for index, why in self.unmeasured.items()]
        return "\n".join(lines) or f"{K} results wherever the playlist has them"


def measure_searches(
    engine: Engine, client: redis.Redis, catalog: Catalog, program: Program, server: Path
) -> Measurement:
    """Search each live file in the directory `server` within the program's ids, as Redis holds them.

    The same queries every day as long as the rows are the same. Memory: one index, and at most 4,096 vectors.
    Never raises an Exception: what went wrong is the reason in `unmeasured`.
    """
    started = time.monotonic()
    searches: list[PlaylistSearches] = []
    unmeasured: dict[str, str] = {}
    for spec in catalog.indexes:
        try:
            searches.append(_measure(engine, client, spec, program, server))
        except PassingFailure as error:
            # What is down for one index is down for the next, and each would wait for it.
            rest = catalog.indexes[catalog.indexes.index(spec) :]
            unmeasured |= {one.name: error.what for one in rest}
            break
        except MuseError as error:
            unmeasured[spec.name] = error.what
        except Exception as error:
            # The words of any other exception may hold what is secret.
            unmeasured[spec.name] = type(error).__name__
    return Measurement(tuple(searches), unmeasured, time.monotonic() - started)


def described(one: PlaylistSearches) -> str:
    """One index in a sentence, with the remedy if its searches are short."""
    text = (
        f"{one.index}: {one.short:.0%} of {one.queries} searches find fewer than {min(K, one.held)} of the "
        f"{one.held:,} ids at nprobe {one.nprobe} of {one.nlist:,} lists."
    )
    if one.remedy is None:
        return text
    return (
        f"{text} A stored nprobe of {one.remedy.nprobe} brings that to {SHORT_SHARE:.0%} or less; plain "
        f"search then scans {one.remedy.scanned_then:,.0f} codes a query, now {one.remedy.scanned_now:,.0f}. "
        f"Or an nlist of about {one.remedy.nlist:,} (a retrain) lets {PROGRAM_NPROBE} lists be enough."
    )


def _measure(
    engine: Engine, client: redis.Redis, spec: IndexSpec, program: Program, server: Path
) -> PlaylistSearches:
    ids = read_ids(client, program, spec.name)
    index = _live_index(spec, server)
    try:
        every = list_ids(index)
        held = ids[np.isin(ids, every)]
        if not len(held):
            raise PermanentFailure(
                f"none of the {len(ids):,} ids is in the live file.", next_step="deploy the newest build."
            )
        drawn = _draw(held, every, f"{program.id} {spec.name}")
        # A large playlist is measured against its codes: then only the queries are read.
        wanted = held if len(held) <= ROWS_READ else held[:0]
        rows, vectors = _read(engine, spec, np.union1d(drawn, wanted))
        queries = vectors[np.isin(rows, drawn)]
        if not len(queries):
            raise PermanentFailure(
                f"no sampled row of {spec.table} can be searched with.",
                next_step="mend the table, or build and deploy what it has.",
            )
        nprobe = max(index.nprobe, PROGRAM_NPROBE)
        found = search_among(index, held, queries, K, nprobe)
        reach = measure_reach(index, held, queries, K)
        among = np.isin(rows, wanted)
        short = float(((found.ids >= 0).sum(axis=1) < min(K, len(held))).mean())
        return PlaylistSearches(
            index=spec.name,
            ids=len(ids),
            held=len(held),
            queries=len(queries),
            nprobe=min(nprobe, index.nlist),
            nlist=index.nlist,
            short=short,
            recall=recall_of_rows(found, rows[among], vectors[among], queries)
            if among.any()
            else recall_of_codes(found, index, held, queries),
            reference="rows" if among.any() else "codes",
            milliseconds=float(np.median(found.seconds)) * 1000,
            remedy=_remedy(index, reach) if short > SHORT_SHARE else None,
        )
    finally:
        discard_lists(index)


def _live_index(spec: IndexSpec, server: Path) -> Any:
    """The live file in memory, with the table that the server's `read_index` computes too."""
    live = live_file(server, spec)
    if live is None or live.damaged:
        state = "is no live file" if live is None else "is a damaged live file"
        raise PermanentFailure(
            f"there {state} {server / spec.live_file}.", next_step="deploy the index, then refresh again."
        )
    # In memory: whoever truncates a mapped file in place kills this process.
    return read_index(live.path, precompute=True)


def _remedy(index: Any, reach: Reach) -> Remedy:
    needed = reach.nprobe_for(SHORT_SHARE)
    nprobe = min(1 << (needed - 1).bit_length(), index.nlist)
    return Remedy(
        nprobe=nprobe,
        scanned_now=reach.codes_scanned(index.nprobe),
        scanned_then=reach.codes_scanned(nprobe),
        nlist=max(1, PROGRAM_NPROBE * index.nlist // needed),
    )


def _draw(held: NDArray[np.int64], every: NDArray[np.int64], seed: str) -> NDArray[np.int64]:
    """Ids to search with, ascending: of the playlist, and of the index."""
    random = np.random.default_rng(zlib.crc32(seed.encode()))
    halves = [
        random.choice(np.sort(ids), min(QUERIES // 2, len(ids)), replace=False) for ids in (held, every)
    ]
    return np.unique(np.concatenate(halves))


def _read(engine: Engine, spec: IndexSpec, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], Vectors]:
    """Those of `ids` (n,) ascending whose rows can be searched with, and their vectors (n, d)."""
    found_ids, found = [np.empty(0, np.int64)], [np.empty((0, spec.dimension), np.float32)]
    with connected(engine, f"reading {spec.table} to measure playlist searches") as connection:
        for page in rows_by_idx(connection, spec, ids - spec.id_offset):
            decoded = decode(page.payloads, spec.dimension, spec.encoding, spec.normalize)
            good = decoded.reasons == Reason.OK
            found_ids.append(page.idx[good] + spec.id_offset)
            found.append(decoded.vectors[good])
    return np.concatenate(found_ids), np.concatenate(found)
