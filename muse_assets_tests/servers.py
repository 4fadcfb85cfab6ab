"""Private MariaDB and Redis servers for tests: free ports of 127.0.0.1, empty folders, gone with the test.

Here: starting, waiting, stopping. Not here: fixtures (`conftest.py`), or the embedded Valkey, which the
package itself runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import redis
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

CANARY = "canary-5f1c9e07"
"""The password of every private server: nothing that the pipeline writes may hold it."""

_USER = "muse"
_START_SECONDS = 60
_STOP_SECONDS = 30
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def find_binary(name: str) -> str | None:
    """The program's path, /usr/sbin included: a plain user's PATH often lacks it, and mariadbd is there."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin")


@contextlib.contextmanager
def private_mariadb(directory: Path) -> Iterator[str]:
    """SQLAlchemy URL of the empty schema `muse` on a new MariaDB whose data lies in `directory`."""
    data = directory / "mariadb"
    data.mkdir(parents=True)
    first = directory / "first.sql"
    first.write_text(
        f"CREATE USER IF NOT EXISTS {_USER}@'%' IDENTIFIED BY '{CANARY}';\n"
        f"GRANT ALL ON *.* TO {_USER}@'%' WITH GRANT OPTION;\n"
    )
    as_root = ["--user=root"] if os.getuid() == 0 else []
    subprocess.run(
        [
            _binary("mariadb-install-db"),
            "--no-defaults",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            *as_root,
        ],
        check=True,
        capture_output=True,
    )
    port = _free_port()
    command = [
        _binary("mariadbd"),
        "--no-defaults",
        f"--datadir={data}",
        f"--port={port}",
        "--bind-address=127.0.0.1",
        "--socket=m.sock",  # relative to the data folder: a socket path has 107 bytes at most
        "--character-set-server=utf8mb4",
        "--max-allowed-packet=64M",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-buffer-pool-size=32M",
        "--innodb-log-file-size=16M",
        "--skip-log-bin",
        f"--init-file={first}",
        *as_root,
    ]
    server = f"mysql+pymysql://{_USER}:{CANARY}@127.0.0.1:{port}"

    def ready() -> bool:
        try:
            execute(f"{server}/", "CREATE DATABASE IF NOT EXISTS muse")
        except OperationalError:
            return False
        return True

    with _running(command, directory / "mariadb.log", ready):
        yield f"{server}/muse"


@contextlib.contextmanager
def private_redis(directory: Path) -> Iterator[str]:
    """URL of database 0 of a new Redis that saves nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    command = [_binary("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--appendonly", "no", "--dir", str(directory), "--requirepass", CANARY]
    client = redis.Redis(port=port, password=CANARY)

    def ready() -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(client.ping())
        return False

    with client, _running(command, directory / "redis.log", ready):
        yield f"redis://:{CANARY}@127.0.0.1:{port}/0"


@contextlib.contextmanager
def fresh_schema(url: str) -> Iterator[str]:
    """URL of a new, empty database with a random name on the server of `url`; dropped afterwards."""
    name = f"muse_test_{uuid.uuid4().hex[:12]}"
    execute(url, f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
    try:
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
    finally:
        execute(url, f"DROP DATABASE {name}")


def execute(url: str, *statements: str) -> None:
    """Run and commit SQL statements that take no parameters."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


@contextlib.contextmanager
def _running(command: list[str], log: Path, ready: Callable[[], bool]) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - loads no module, takes no lock
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"{command[0]} did not start (exit status {process.returncode}): {tail}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _binary(name: str) -> str:
    found = find_binary(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
