"""Playlists in generations, so that a torn, mixed or partial one is told from a whole one by its bytes.

Here: a program's keys of one generation, processes that read them and processes that write them for ever.
Not here: faults, or what should hold (`test_redis.py`).
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from muse_assets.catalog import CATALOG
from muse_assets.connections.redis_server import connect
from muse_assets.playlists.cache import refresh

DRP = CATALOG.program("drp")
NAMES = [spec.name for spec in CATALOG.indexes]
KEYS = [*(DRP.ids_key(name) for name in NAMES), DRP.update_key]
LENGTH = 1000

# Children in 10 ms instead of a second: the server has imported everything and runs no thread.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def generation(number: int) -> dict[str, NDArray[np.int64]]:
    """index -> ids of one generation; no two generations or indexes share one list."""
    return {
        name: np.arange(LENGTH, dtype=np.int64) + number * 10_000 + place for place, name in enumerate(NAMES)
    }


def values_of(number: int) -> list[bytes]:
    """What the keys hold, in the order of `KEYS`."""
    ids = generation(number)
    return [*(json.dumps(ids[name].tolist()).encode() for name in NAMES), str(float(number)).encode()]


def publish(url: str, number: int) -> None:
    """One refresh of drp through the product."""
    client = connect(url)
    try:
        refresh(client, DRP, generation(number), now=float(number))
    finally:
        client.close()


def held(url: str) -> int | None:
    """The generation that all keys hold, None if they hold no single whole one."""
    with redis.Redis.from_url(url) as client:
        found = client.mget(KEYS)
    return whole(found)


def whole(found: Any) -> int | None:
    """The generation whose keys these are, or None."""
    number = int(float(found[-1])) if found[-1] else 0
    return number if number and found == values_of(number) else None


@dataclass(frozen=True)
class Read:
    """What one reader saw. torn: single keys that were no generation's; mixed: MGETs of several ones."""

    singles: int
    together: int
    generations: int
    torn: list[str]
    mixed: list[str]


def read_until(url: str, stop: Any, outcome: Connection) -> None:
    """Read as the search server does, key by key and all at once, until `stop` is set; send a `Read`."""
    singles, together, seen, torn, mixed = 0, 0, set(), [], []
    known: dict[int, list[bytes]] = {}
    with redis.Redis.from_url(url) as client:
        while not stop.is_set():
            for place, key in enumerate(KEYS[:-1]):
                value = client.get(key)
                singles += 1
                first = int(value[1 : value.index(b",")]) if isinstance(value, bytes) and b"," in value else 0
                number = first // 10_000
                if value != known.setdefault(number, values_of(number))[place]:
                    torn.append(f"{key}: {value!r:.80}")
            found: Any = client.mget(KEYS)
            together += 1
            number = int(float(found[-1] or 0))
            seen.add(number)
            if found != known.setdefault(number, values_of(number)):
                mixed.append(f"{number}: {[bytes(one or b'')[:20] for one in found]}")
    outcome.send(Read(singles, together, len(seen), torn, mixed))


def publish_for_ever(url: str, first: int, seed: int) -> None:
    """Refresh generation after generation, with pauses at random; to be killed."""
    pause = random.Random(seed)
    number = first
    while True:
        publish(url, number)
        number += 1
        time.sleep(pause.random() * 0.002)
