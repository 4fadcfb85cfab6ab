"""The outside systems as Dagster resources, one each.

Here: configuration in Dagster's words. Not here: how the systems are reached (`connections/`) or which
environment variable names them (`settings.py`).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import redis
from sqlalchemy import Engine

from muse_assets.connections.databases import engine_for
from muse_assets.connections.redis_server import opened
from muse_assets.failures import PermanentFailure
from muse_assets.snapshots.encoding_workers import Recruit, in_process
from muse_assets.snapshots.progress import Progress


class Database(dg.ConfigurableResource[Any]):
    """A SQL database. `url` is a SQLAlchemy URL; give it by `EnvVar`, it may hold a password."""

    url: str

    @property
    def engine(self) -> Engine:
        """The engine of this database."""
        return engine_for(self.url)


class RedisServer(dg.ConfigurableResource[Any]):
    """The Redis that the search server reads; with no `url`, a Valkey of our own in `embedded_directory`."""

    url: str = ""
    embedded_directory: str = ""

    @contextlib.contextmanager
    def client(self) -> Iterator[redis.Redis]:
        """A connected client; the embedded server runs at least as long as it is used."""
        with opened(self.url, Path(self.embedded_directory)) as client:
            yield client


class Encoding(dg.ConfigurableResource[Any]):
    """Who encodes an index's rows: this process, or a Dask cluster where there are many."""

    dask_scheduler: str = ""

    @property
    def recruit(self) -> Recruit:
        """For `build_snapshot`; PermanentFailure where Dask is not installed."""
        if not self.dask_scheduler:
            return in_process
        try:
            from muse_assets.snapshots.dask_workers import on_dask  # noqa: PLC0415 - the extra `dask`
        except ImportError as error:
            raise PermanentFailure(
                f"MUSE_DASK_SCHEDULER is set, and Dask cannot be imported ({error}).",
                next_step="install the extra: pip install 'muse_assets[dask]'.",
            ) from error
        return on_dask(self.dask_scheduler)


class WorkDirectory(dg.ConfigurableResource[Any]):
    """Where clusters and dated snapshots are built. Created when missing: it holds nothing live."""

    path: str

    def ready(self) -> Path:
        """The directory, existing; PermanentFailure if it cannot be created."""
        return _made(Path(self.path), "MUSE_WORK_DIR")


class ServerDirectory(dg.ConfigurableResource[Any]):
    """Where the search server loads its files, and how it is made to load them.

    `create` is for the embedded default alone: a missing directory elsewhere is a missing mount.
    """

    path: str
    create: bool = False
    reload: str | None = None
    reload_health: str | None = None

    def ready(self) -> Path:
        """The directory; created only where that is allowed, PermanentFailure if it cannot be."""
        directory = Path(self.path)
        return _made(directory, "MUSE_SERVER_DIR") if self.create else directory


def _made(directory: Path, setting: str) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermanentFailure(
            f"The directory {directory} cannot be created: {error.strerror or error}.",
            next_step=f"remove what is in its place or grant this user access, or correct {setting}.",
        ) from error
    return directory


class ProgressLog:
    """Shows how far long work is as log events of the run: every stage, and within one a line a while.

    A build of 500,000 rows reports 120 pages; each event is a row in the instance's database.
    """

    def __init__(self, every_seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.every_seconds = every_seconds
        self.clock = clock

    def reporter(self, context: dg.AssetExecutionContext) -> Progress:
        """A progress callable for one step: a stage's first and last report and one each `every_seconds`."""
        started = self.clock()
        stage, began, shown_at, before = "", started, started, 0

        def report(doing: str, done: int, total: int) -> None:
            nonlocal stage, began, shown_at, before
            now = self.clock()
            if doing != stage:
                stage, began, before = doing, now, done
            elif now - shown_at < self.every_seconds and (not total or done != total):
                return
            shown_at = now
            text = progress_line(doing, done, total, rate=(done - before) / max(now - began, 1e-3))
            context.log.info(f"{text} ({now - started:.1f} s)")

        return report


def progress_line(doing: str, done: int, total: int, *, rate: float) -> str:
    """How far it is in words; total 0: unknown. rate: units a second, 0 while nothing can be said of it."""
    if not total:
        return doing
    text = f"{doing}: {done:,} of {total:,}"
    if rate <= 0:
        return text
    left = f", {timedelta(seconds=math.ceil((total - done) / rate))} left" if done < total else ""
    return f"{text}, {rate:,.0f}/s{left}"
