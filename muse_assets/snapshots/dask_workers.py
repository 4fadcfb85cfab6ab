"""Encoding on other machines: the workers of a Dask distributed cluster, by its scheduler's address.

Here: sending the trained cluster to every worker once, and what becomes of a build whose cluster fails. Not
here: a part's work (`parts`), or handing parts out (`encoding_workers`). The only module that knows Dask,
which comes with the extra `dask`.

A worker pulls its rows from the database itself, by the MUSE_EMBEDDING_DB_URL of its own environment, and
returns codes: 66 bytes a row for 2,176 of a vector. Dask does the parts of a lost worker again, up to three
times. It sends Python objects by pickle: whoever reaches a scheduler or a worker runs code there, so they
belong into a private network, or behind TLS (`tls://`, configured as Dask's documentation says).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from distributed import Client, KilledWorker, Worker, WorkerPlugin, get_worker
from distributed.comm import CommClosedError
from sqlalchemy import Engine

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import engine_for
from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets.ivfpq.contents import trained_fingerprint
from muse_assets.ivfpq.encoding import encoder, encoder_name, use_one_thread
from muse_assets.ivfpq.exact_neighbors import Queries
from muse_assets.ivfpq.files import from_trained_bytes, trained_bytes
from muse_assets.settings import Settings
from muse_assets.snapshots.encoding_workers import EncodingWorkers, Recruit, in_process
from muse_assets.snapshots.parts import EncodedPart, Part, encode_part

# Fewer rows are encoded here sooner than handed out, and a daily sync needs no cluster.
WORTH_ROWS = 50_000
# 4 MB of codes: a worker is done in 2 s, so of a lost one little has to be done again.
_PART_ROWS = 32_768
_CONNECT_SECONDS = 30
_PATIENCE_SECONDS = 300


def on_dask(address: str) -> Recruit:
    """Recruit the workers of the cluster whose scheduler has this address, such as tcp://10.0.0.5:8786.

    Raises PassingFailure where it cannot be reached, has no workers, or is lost on the way.
    """
    return partial(_recruit, address)


@contextlib.contextmanager
def _recruit(
    address: str, engine: Engine, spec: IndexSpec, index: Any, queries: Queries, rows: int
) -> Iterator[EncodingWorkers]:
    if rows < WORTH_ROWS:
        with in_process(engine, spec, index, queries, rows) as workers:
            yield workers
        return
    with _connected(address, spec) as client:
        plugin = TrainedCluster(spec, trained_bytes(index), queries, trained_fingerprint(index))
        client.register_plugin(plugin)
        try:
            yield EncodingWorkers(
                client.get_executor(pure=False),
                partial(_encode, plugin.name, encoder_name()),
                _PART_ROWS,
                ahead=lambda: 2 * max(1, sum(client.nthreads().values())),
                look_after=_patience(client, address, spec),
                where=f"{len(client.nthreads())} Dask workers",
                dashboard=client.dashboard_link,
            )
        except (CancelledError, CommClosedError) as error:
            raise _lost(address, spec) from error
        except KilledWorker as error:
            raise PassingFailure(
                f"{spec.name}: a part of {spec.table} ended every Dask worker that took it ({error}).",
                next_step="look into those workers' logs (memory?), then launch the run again.",
            ) from error
        finally:
            with contextlib.suppress(Exception):  # the build has its outcome, or its own error
                client.unregister_worker_plugin(plugin.name)


@contextlib.contextmanager
def _connected(address: str, spec: IndexSpec) -> Iterator[Client]:
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise PassingFailure(
            f"{spec.name}: no Dask scheduler answers at {address} ({type(error).__name__}: {error}).",
            next_step="start it, or correct MUSE_DASK_SCHEDULER; without that setting this host encodes "
            "alone.",
        ) from error
    try:
        try:
            client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
        except TimeoutError as error:
            raise _no_workers(address, spec, _CONNECT_SECONDS) from error
        yield client
    finally:
        client.close(timeout=5)


def _patience(client: Client, address: str, spec: IndexSpec) -> Callable[[], None]:
    """Raises where the scheduler is gone, or has had no worker for _PATIENCE_SECONDS."""
    seen = time.monotonic()

    def look_after() -> None:
        nonlocal seen
        if client.status != "running":
            raise _lost(address, spec)
        if client.nthreads():
            seen = time.monotonic()
        elif time.monotonic() - seen > _PATIENCE_SECONDS:
            raise _no_workers(address, spec, _PATIENCE_SECONDS)

    return look_after


def _no_workers(address: str, spec: IndexSpec, seconds: float) -> PassingFailure:
    return PassingFailure(
        f"{spec.name}: the Dask scheduler at {address} has had no worker for {seconds:.0f} s.",
        next_step=f"start workers (dask worker {address}), or unset MUSE_DASK_SCHEDULER, then launch again.",
    )


def _lost(address: str, spec: IndexSpec) -> PassingFailure:
    return PassingFailure(
        f"{spec.name}: the Dask scheduler at {address} was lost while {spec.table} was encoded.",
        next_step="see why it ended, start it again, then launch the run again.",
    )


class TrainedCluster(WorkerPlugin):  # type: ignore[misc]
    """What every worker holds while an index is encoded, sent once to each of them.

    Workers that come later get it when they join.
    """

    def __init__(self, spec: IndexSpec, trained: bytes, queries: Queries, fingerprint: str) -> None:
        # The content is in the name: whoever registers it again sends the same.
        self.name = f"muse {spec.name} {fingerprint[:16]}"
        self.idempotent = False
        self._spec, self._trained, self._queries = spec, trained, queries

    def setup(self, worker: Worker) -> None:
        """On the worker's event loop: prepare what parts need, at the first of them."""
        self._lock = threading.Lock()
        self._open = contextlib.ExitStack()
        self._encode_part: Callable[[Part], EncodedPart] | None = None
        self._worker = worker.address

    def teardown(self, worker: Worker) -> None:
        """On the worker's event loop: leave FAISS's settings as they were."""
        self._open.close()

    def encode(self, part: Part) -> EncodedPart:
        """Encode one part, in a thread of the worker."""
        with self._lock:
            if self._encode_part is None:
                settings = Settings()
                if settings.embedding_db_url is None:
                    raise PermanentFailure(
                        f"{self._spec.name}: the Dask worker {self._worker} has no MUSE_EMBEDDING_DB_URL.",
                        next_step="set it in the environment of every worker, then start them again.",
                    )
                engine = engine_for(settings.embedding_url())
                encode = self._open.enter_context(encoder(from_trained_bytes(self._trained)))
                self._encode_part = partial(encode_part, engine, self._spec, encode, self._queries)
        use_one_thread()
        return self._encode_part(part)


def _encode(plugin: str, wanted: str, part: Part) -> EncodedPart:
    """Runs on a worker."""
    worker = get_worker()
    if encoder_name() != wanted:
        raise PermanentFailure(
            f"The Dask worker {worker.address} encodes with {encoder_name()}, this build with {wanted}: rows "
            "between two centroids would get other codes.",
            next_step="give all machines the same faiss-cpu and processors of one SIMD level, or set "
            "FAISS_SIMD_LEVEL to the lowest of them everywhere.",
        )
    found: TrainedCluster = worker.plugins[plugin]
    return found.encode(part)
