"""Who encodes the parts of a table: any `concurrent.futures.Executor`; here, threads of this process.

Here: handing parts out and taking them back, whoever does them. Not here: a part's work (`parts`), workers
on other machines (`dask_workers`), or what becomes of the codes (`sync`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import Engine

from muse_assets.catalog import IndexSpec
from muse_assets.embeddings.digests import Digests
from muse_assets.embeddings.reading import page_rows
from muse_assets.ivfpq.encoding import encoder, use_one_thread
from muse_assets.ivfpq.exact_neighbors import NearestRows, Queries
from muse_assets.snapshots.parts import EncodedPart, Part, encode_part, plan

# Reading and digesting hold the GIL for some 2 us a row, and an encoder takes 16 beside it: past a few
# there is nothing to gain, and each holds a connection.
_MOST_THREADS = 8
_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class EncodingWorkers:
    """Where parts are encoded.

    executor, encode: `executor.submit(encode, part)` gives an EncodedPart. part_rows: rows a part. ahead:
    asks how many parts to have under way. look_after: called now and then while nothing comes back, with the
    seconds since something did; raises where it has been too long, or nothing can. is_lost: whether this
    error means that the part was done, but what came of it is gone. where: for people; dashboard: where they
    can watch it, if anywhere. own_database: the one they read is named to them alone.
    """

    executor: Executor
    encode: Callable[[Part], EncodedPart]
    part_rows: int
    ahead: Callable[[], int]
    look_after: Callable[[float], None]
    where: str
    is_lost: Callable[[BaseException], bool] = lambda error: False
    dashboard: str | None = None
    own_database: bool = False


# For an engine, an index with its trained cluster, the queries, and so many rows.
Recruit = Callable[[Engine, IndexSpec, Any, Queries, int], AbstractContextManager[EncodingWorkers]]


@contextlib.contextmanager
def in_process(
    engine: Engine, spec: IndexSpec, index: Any, queries: Queries, rows: int
) -> Iterator[EncodingWorkers]:
    """Threads of this process, a page each: one reads while the others encode."""
    count = min(os.cpu_count() or 1, _MOST_THREADS)
    with (
        encoder(index) as encode,
        ThreadPoolExecutor(count, "encode", initializer=use_one_thread) as threads,
    ):
        yield EncodingWorkers(
            threads,
            partial(encode_part, engine, spec, encode, queries),
            page_rows(spec),
            ahead=lambda: count + 1,
            look_after=lambda silent: None,
            where=f"{count} threads",
        )


def encode_parts(
    workers: EncodingWorkers, digests: Digests, newest_idx: int, nearest: NearestRows
) -> Iterator[EncodedPart]:
    """The rows of the buckets in `digests`, part by part as they come back; `nearest` says what is near."""
    parts = plan(digests, workers.part_rows)
    under_way: dict[Future[EncodedPart], Digests] = {}

    def hand_out(part: Digests) -> None:
        request = Part(part, newest_idx, nearest.horizon)
        under_way[workers.executor.submit(workers.encode, request)] = part

    heard = time.monotonic()
    try:
        while True:
            free = workers.ahead() - len(under_way)
            for part in islice(parts, max(free, 0)):
                hand_out(part)
            if not under_way:
                return
            done, _ = wait(under_way, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            if done:
                heard = time.monotonic()
            else:
                workers.look_after(time.monotonic() - heard)
            for future in done:
                part = under_way.pop(future)
                if (error := future.exception()) and workers.is_lost(error):
                    hand_out(part)
                else:
                    yield future.result()
    finally:
        for future in under_way:
            future.cancel()
