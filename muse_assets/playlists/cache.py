"""A program's Redis keys: seven lists of FAISS ids, the time of their refresh, and what they are.

Here: the values' form, their one transaction, and what is refused before it. Not here: where ids come
from (`ids.py`), or Redis errors in words (`connections/redis_server.py`).

The search server reads the lists and the time. `playlist_meta:<program>` is for a server that wants to do
better; docs/playlist_search.md is its contract.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import redis
from numpy.typing import NDArray

from muse_assets.catalog import Program
from muse_assets.connections.redis_server import check_eviction, describe, explained
from muse_assets.failures import Conflict, PermanentFailure
from muse_assets.playlists.ids import Matches

META_SCHEMA = 1
# 500k x 512-d, PQ64: of 10,000 ids reconstructed once a query takes 0.56 ms, a filtered one 1.15; of 100,000
# the vectors are 200 MB.
EXACT_IDS = 10_000


@dataclass(frozen=True)
class LiveContent:
    """What was live in an index when its ids were looked up.

    sha256 of the file, in hex. partition: day (Seoul, ISO) the content stands for, None if nobody knows it.
    """

    sha256: str
    partition: str | None


@dataclass(frozen=True)
class Refresh:
    """One program's refresh.

    counts: index -> ids written. previous: index -> ids before, None where the key held no list of ids.
    changed: whether any list differs from the one before. seconds: how long it took. matches: index ->
    what it has of the program's songs, where that is known.
    """

    program: str
    counts: dict[str, int]
    previous: dict[str, int | None]
    changed: bool
    seconds: float
    matches: Mapping[str, Matches] = field(default_factory=dict)


def refresh(
    client: redis.Redis,
    program: Program,
    ids: Mapping[str, NDArray[np.int64]],
    *,
    now: float,
    live: Mapping[str, LiveContent] | None = None,
    max_shrink_share: float = 0.5,
    confirm_shrink: bool = False,
) -> Refresh:
    """Replace the program's id lists (index -> ids), update time and metadata in one MULTI/EXEC; no expiry.

    `now` is in seconds since the epoch; `live` (index -> content) goes into the metadata. Unless
    `confirm_shrink`, refuses with PermanentFailure, before anything is written, a list that lost more than
    `max_shrink_share` of its ids, and an empty one (a list that is empty in Redis already was confirmed
    once). Also refuses a server that evicts (`check_eviction`).
    Raises Conflict when the keys read back differently, PassingFailure when Redis is down, full or slow.
    """
    started = time.monotonic()
    keys = {index: program.ids_key(index) for index in ids}
    check_eviction(client)
    with explained(client, f"reading the playlist of {program.id}"):
        held = client.mget(list(keys.values()))
    before = {index: _parsed(value) for index, value in zip(ids, held, strict=True)}
    after: dict[str, list[int]] = {index: found.tolist() for index, found in ids.items()}
    counts = {index: len(found) for index, found in after.items()}
    previous = {index: None if found is None else len(found) for index, found in before.items()}
    if not confirm_shrink:
        _refuse_losses(program, counts, previous, max_shrink_share)
    values = {keys[index]: json.dumps(found).encode() for index, found in after.items()}
    values[program.update_key] = str(float(now)).encode()
    values[program.meta_key] = json.dumps(_metadata(counts, live or {}, now)).encode()
    _write_together(client, program, values)
    return Refresh(program.id, counts, previous, before != after, time.monotonic() - started)


def read_ids(client: redis.Redis, program: Program, index: str) -> NDArray[np.int64]:
    """The program's FAISS ids in one index as Redis holds them, int64; PermanentFailure if it holds none."""
    key = program.ids_key(index)
    with explained(client, f"reading {key}"):
        value = client.get(key)
    found = _parsed(value)
    if found is None:
        state = "does not exist" if value is None else "is not a JSON array of ids"
        raise PermanentFailure(
            f"Key {key} on {describe(client)} {state}.",
            next_step=f"materialize playlist_cache for {program.id}.",
        )
    return np.array(found, dtype=np.int64)


def _metadata(counts: Mapping[str, int], live: Mapping[str, LiveContent], now: float) -> dict[str, object]:
    """The value of `playlist_meta:<program>`."""
    indexes = {
        index: {
            "count": count,
            "sha256": live[index].sha256 if index in live else None,
            "partition": live[index].partition if index in live else None,
            "way": "exact" if count <= EXACT_IDS else "filtered",
        }
        for index, count in counts.items()
    }
    return {"schema": META_SCHEMA, "time": float(now), "indexes": indexes}


def _parsed(value: object) -> list[int] | None:
    try:
        found = json.loads(value) if isinstance(value, bytes) else None
    except ValueError:
        return None
    return found if isinstance(found, list) and set(map(type, found)) <= {int} else None


def _refuse_losses(
    program: Program, counts: Mapping[str, int], previous: Mapping[str, int | None], max_shrink_share: float
) -> None:
    losses = [
        f"{index} {before if before is not None else 'none'} -> {count}"
        for index, count in counts.items()
        for before in (previous[index],)
        if (count == 0 and before != 0) or count < (before or 0) * (1 - max_shrink_share)
    ]
    if losses:
        raise PermanentFailure(
            f"Program {program.id} ({program.title}): playlists would be empty or lose more than "
            f"{max_shrink_share:.0%} of their ids: {', '.join(losses)}. Nothing was written.",
            next_step="check the program's songs and the embedding tables; if this is intended, "
            "refresh again with confirm_shrink.",
        )


def _write_together(client: redis.Redis, program: Program, values: Mapping[str, bytes]) -> None:
    with explained(client, f"writing the playlist of {program.id}"):
        with client.pipeline(transaction=True) as transaction:
            for key, value in values.items():
                transaction.set(key, value)
            transaction.execute()
        read_back = client.mget(list(values))
    differing = [key for key, value in zip(values, read_back, strict=True) if value != values[key]]
    if differing:
        raise Conflict(
            f"{', '.join(differing)} on {describe(client)} read back differently from what was written: "
            "another process writes them too.",
            next_step="stop the other writer (the legacy batch?) and refresh again.",
        )
