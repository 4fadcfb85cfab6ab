"""Encoding on other machines: the workers of a Dask distributed cluster, by its scheduler's address.

Here: sending the trained cluster to every worker once, and what becomes of a build whose cluster fails. Not
here: a part's work (`parts`), or handing parts out (`encoding_workers`). The only module that knows Dask,
which comes with the extra `dask`.

A worker pulls its rows from the database itself, by the MUSE_EMBEDDING_DB_URL of its own environment, and
returns ids and codes: 74 bytes a row for 2,176 of a vector. Dask does the parts of a lost worker again, up
to three times. It sends Python objects by pickle: whoever reaches a scheduler or a worker runs code there, so
they belong into a private network, or behind TLS (`tls://`, configured as Dask's documentation says).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, KilledWorker, Worker, WorkerPlugin, get_worker
from distributed.client import ClosedClientError
from distributed.comm import CommClosedError
from sqlalchemy import Engine

import muse_assets
from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import engine_for
from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets.ivfpq.encoding import encoder, encoder_name, use_one_thread
from muse_assets.ivfpq.exact_neighbors import Queries
from muse_assets.ivfpq.files import from_trained_bytes, trained_bytes
from muse_assets.settings import Settings
from muse_assets.snapshots.encoding_workers import EncodingWorkers, Recruit, in_process
from muse_assets.snapshots.parts import EncodedPart, Part, encode_part

# Two cores encode these in some 12 s: a daily sync needs no cluster, and none that is down makes it red.
WORTH_ROWS = 500_000
# 2.4 MB of codes and ids: a worker is done in 2 s, so of a lost one little has to be done again.
_PART_ROWS = 32_768
_CONNECT_SECONDS = 30
# A worker gives up a database that does not answer after 270 s at most.
_PATIENCE_SECONDS = 600


def on_dask(address: str) -> Recruit:
    """Recruit the workers of the cluster whose scheduler has this address, such as tcp://10.0.0.5:8786.

    Raises PassingFailure where it cannot be reached, has no workers, is lost on the way, or gives nothing
    back for ten minutes; PermanentFailure where a worker is not fit for it.
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
    plugin = TrainedCluster(spec, trained_bytes(index), queries)
    with _connected(address, spec) as client:
        threads = partial(_threads, client, address, spec)
        try:
            _register(client, plugin, address, spec)
            yield EncodingWorkers(
                client.get_executor(pure=False),
                partial(_encode, plugin.name, plugin.token, _software()),
                _PART_ROWS,
                ahead=lambda: 2 * max(1, sum(threads().values())),
                look_after=partial(_look_after, threads, address, spec),
                where=f"{len(threads())} Dask workers",
                is_lost=_is_lost,
                dashboard=client.dashboard_link,
                own_database=True,
            )
        except (CancelledError, ClosedClientError, CommClosedError) as error:
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
    except TypeError as error:
        raise PermanentFailure(
            f"{spec.name}: Dask has no TLS settings for {address} ({error}).",
            next_step="set distributed.comm.tls as Dask's documentation says, here and on every worker.",
        ) from error
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


def _register(client: Client, plugin: TrainedCluster, address: str, spec: IndexSpec) -> None:
    """Send the plugin to the workers there are; the scheduler gives it to those that come."""
    try:
        client.register_plugin(plugin)
    except OSError as error:
        raise PassingFailure(
            f"{spec.name}: a worker of the Dask scheduler at {address} does not answer ({error}).",
            next_step="the scheduler forgets it within five minutes; launch the run again then.",
        ) from error
    except (ImportError, AttributeError) as error:
        raise PermanentFailure(
            f"{spec.name}: a worker of the Dask scheduler at {address} has not this muse_assets ({error}).",
            next_step="install the same muse_assets on every worker and start them again.",
        ) from error


def _is_lost(error: BaseException) -> bool:
    """Where a worker ends just as its result comes in, Dask's executor takes that result for an error.

    `distributed.cfexecutor._cascade_future` unpacks it as one.
    """
    return isinstance(error, TypeError) and f"non-iterable {EncodedPart.__name__}" in str(error)


def _threads(client: Client, address: str, spec: IndexSpec) -> dict[str, int]:
    """Worker -> its threads; PassingFailure where the scheduler is gone."""
    try:
        if client.status == "running":
            return dict(client.nthreads())
    except (OSError, AttributeError, RuntimeError) as error:  # as the client meets its closed connection
        raise _lost(address, spec) from error
    raise _lost(address, spec)


def _look_after(
    threads: Callable[[], dict[str, int]], address: str, spec: IndexSpec, silent_seconds: float
) -> None:
    workers = threads()
    if silent_seconds <= _PATIENCE_SECONDS:
        return
    if not workers:
        raise _no_workers(address, spec, silent_seconds)
    raise PassingFailure(
        f"{spec.name}: {len(workers)} Dask workers of {address} gave nothing back for "
        f"{silent_seconds:.0f} s.",
        next_step="see its dashboard: workers that are paused have no memory left; then launch again.",
    )


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

    Workers that come later get it when they join. token: of one build; the next build of the index takes the
    place of what a killed one left.
    """

    def __init__(self, spec: IndexSpec, trained: bytes, queries: Queries) -> None:
        self.name, self.token = f"muse {spec.name}", uuid.uuid4().hex
        self.idempotent = False
        self._spec, self._trained, self._queries = spec, trained, queries

    def setup(self, worker: Worker) -> None:
        """On the worker's event loop: prepare what parts need, at the first of them."""
        self._lock = threading.Lock()
        self._open = contextlib.ExitStack()
        self._encode_part: Callable[[Part], EncodedPart] | None = None
        self._running, self._closed = 0, False
        self._worker = worker.address

    def teardown(self, worker: Worker) -> None:
        """On the worker's event loop: leave FAISS's settings as they were, once no part needs them."""
        with self._lock:
            self._closed = True
            if not self._running:
                self._open.close()

    def encode(self, part: Part) -> EncodedPart:
        """Encode one part, in a thread of the worker."""
        use_one_thread()
        with self._lock:
            if self._closed:
                raise _another_build(self.name)
            self._encode_part = encode_part_here = self._encode_part or self._prepared()
            self._running += 1
        try:
            return encode_part_here(part)
        finally:
            self._done()

    def _done(self) -> None:
        with self._lock:
            self._running -= 1
            if self._closed and not self._running:
                self._open.close()

    def _prepared(self) -> Callable[[Part], EncodedPart]:
        settings = Settings()
        if settings.embedding_db_url is None:
            raise PermanentFailure(
                f"{self._spec.name}: the Dask worker {self._worker} has no MUSE_EMBEDDING_DB_URL.",
                next_step="set it in the environment of every worker, then start them again.",
            )
        engine = engine_for(settings.embedding_url())
        encode = self._open.enter_context(encoder(from_trained_bytes(self._trained)))
        return partial(encode_part, engine, self._spec, encode, self._queries)


def _another_build(plugin: str) -> PassingFailure:
    return PassingFailure(
        f"Another build of {plugin} took over the Dask cluster.",
        next_step="let it end, or give each installation a cluster of its own; then launch the run again.",
    )


@lru_cache
def _software() -> str:
    """Names all that decides a code: with another one on a worker its rows might get other codes."""
    digest = hashlib.sha256()
    package = Path(muse_assets.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)} ".encode() + file.read_bytes())
    return f"{encoder_name()}, numpy {np.__version__}, muse_assets {digest.hexdigest()[:12]}"


def _encode(plugin: str, token: str, wanted: str, part: Part) -> EncodedPart:
    """Runs on a worker."""
    worker = get_worker()
    if _software() != wanted:
        raise PermanentFailure(
            f"The Dask worker {worker.address} has {_software()}, this build {wanted}: rows might get other "
            "codes.",
            next_step="install the same packages on all machines; where processors differ, set "
            "FAISS_SIMD_LEVEL to the lowest level everywhere.",
        )
    found = worker.plugins.get(plugin)
    if found is None or found.token != token:
        raise _another_build(plugin)
    encoded: EncodedPart = found.encode(part)
    return encoded
