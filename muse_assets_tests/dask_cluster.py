"""A real Dask cluster: a scheduler and workers, each a process that can be killed.

Here: starting and ending them on this machine. Not here: what is encoded on them (`test_dask.py`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from muse_assets_tests.servers import dying_with_parent, free_port

# Quiet, and without the pauses in which a scheduler waits for workers that were killed.
_SETTINGS = {"DASK_DISTRIBUTED__ADMIN__LOG_LENGTH": "0", "PYTHONDONTWRITEBYTECODE": "1"}


def scheduler_command(host: str, port: int) -> list[str]:
    """Its dashboard has a port of its own."""
    dashboard = ["--dashboard-address", f"{host}:{free_port()}"]
    return [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        host,
        "--port",
        str(port),
        *dashboard,
    ]


def worker_command(scheduler: str, name: str) -> list[str]:
    """One process with one thread, which nobody starts again."""
    options = ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--name", name, "--memory-limit", "0"]
    return [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, *options]


@dataclass
class DaskCluster:
    """A scheduler and its workers on this machine. folder: for what they print; host: the scheduler's."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    scheduler: subprocess.Popen[bytes] | None = None
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    def start_scheduler(self) -> None:
        self.scheduler = self._started("scheduler", scheduler_command(self.host, self.port), {})

    def start_worker(self, name: str, environment: dict[str, str]) -> None:
        """Start one; it works as soon as it has found the scheduler."""
        self.workers[name] = self._started(name, worker_command(self.address, name), environment)

    def stop_worker(self, name: str) -> None:
        process = self.workers.pop(name)
        process.kill()
        process.wait()

    def stop_workers(self) -> None:
        for name in list(self.workers):
            self.stop_worker(name)

    def stop(self) -> None:
        self.stop_workers()
        if self.scheduler:
            self.scheduler.kill()
            self.scheduler.wait()

    def _started(self, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("MUSE_")}
        with (self.folder / f"{name}.log").open("ab") as output:
            return subprocess.Popen(
                dying_with_parent(command),
                env={**inherited, **_SETTINGS, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )


@contextlib.contextmanager
def dask_cluster(folder: Path, host: str = "127.0.0.1") -> Iterator[DaskCluster]:
    """A cluster without workers."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = DaskCluster(folder, host)
    try:
        cluster.start_scheduler()
        yield cluster
    finally:
        cluster.stop()


def wait_for_workers(address: str, count: int, seconds: float = 60) -> None:
    """Until so many have joined."""
    from distributed import Client

    with Client(address, timeout=seconds, set_as_default=False) as client:
        deadline = time.monotonic() + seconds
        while len(client.nthreads()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(client.nthreads())} of {count} workers after {seconds:.0f} s")
            time.sleep(0.05)
