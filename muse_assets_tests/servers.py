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


class MariaDb:
    """A MariaDB whose data lies in `directory`: it can be killed and started again on the same port and data.

    options: of mariadbd, beside those that make it small; they win.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.port = free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def server_url(self) -> str:
        """SQLAlchemy URL without a schema."""
        return f"mysql+pymysql://{_USER}:{CANARY}@127.0.0.1:{self.port}/"

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the schema `muse`."""
        return f"{self.server_url}muse"

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def start(self) -> None:
        """Start it, on new data the first time, and wait until it answers."""
        data = self.directory / "mariadb"
        if not data.exists():
            _install_mariadb(data, self.directory / "first.sql")
        self._process = _started(self._command(data), self.directory / "mariadb.log", self._ready)

    def kill(self) -> None:
        """SIGKILL, as a power cut is for it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Shut it down."""
        if self._process is not None:
            _stop(self._process)
            self._process = None

    def _command(self, data: Path) -> list[str]:
        return [
            _binary("mariadbd"),
            "--no-defaults",
            f"--datadir={data}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--socket=m.sock",  # relative to the data folder: a socket path has 107 bytes at most
            "--character-set-server=utf8mb4",
            "--max-allowed-packet=64M",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M",
            "--skip-log-bin",
            f"--init-file={self.directory / 'first.sql'}",
            *_as_root(),
            *self._options,
        ]

    def _ready(self) -> bool:
        try:
            execute(self.server_url, "CREATE DATABASE IF NOT EXISTS muse")
        except OperationalError:
            return False
        return True


@contextlib.contextmanager
def private_mariadb(directory: Path, *options: str) -> Iterator[str]:
    """SQLAlchemy URL of the empty schema `muse` on a new MariaDB whose data lies in `directory`."""
    with mariadb_server(directory, *options) as server:
        yield server.url


@contextlib.contextmanager
def mariadb_server(directory: Path, *options: str) -> Iterator[MariaDb]:
    """A running MariaDB of the test's own, to be killed and restarted at will."""
    server = MariaDb(directory, *options)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _install_mariadb(data: Path, first: Path) -> None:
    data.mkdir(parents=True)
    first.write_text(
        f"CREATE USER IF NOT EXISTS {_USER}@'%' IDENTIFIED BY '{CANARY}';\n"
        f"GRANT ALL ON *.* TO {_USER}@'%' WITH GRANT OPTION;\n"
    )
    subprocess.run(
        [
            _binary("mariadb-install-db"),
            "--no-defaults",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            *_as_root(),
        ],
        check=True,
        capture_output=True,
    )


def _as_root() -> list[str]:
    return ["--user=root"] if os.getuid() == 0 else []


@contextlib.contextmanager
def private_redis(directory: Path, *options: str) -> Iterator[str]:
    """URL of database 0 of a new Redis that saves nothing unless `options` say so."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [_binary("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--appendonly", "no", "--dir", str(directory), "--requirepass", CANARY, *options]
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
    process = _started(command, log, ready)
    try:
        yield
    finally:
        _stop(process)


def _started(command: list[str], log: Path, ready: Callable[[], bool]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        process = subprocess.Popen(dying_with_parent(command), stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"{command[0]} did not start (exit status {process.returncode}): {tail}")
            time.sleep(0.05)
    except BaseException:
        _stop(process)
        raise
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def die_with_parent() -> None:
    """Have this process killed when the one that started it ends."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def dying_with_parent(command: list[str]) -> list[str]:
    """The command so started that it is killed when the thread that starts it ends.

    By a program and not by `preexec_fn`: between fork and exec that waited for ever for a lock that a
    thread of FAISS held.
    """
    setpriv = find_binary("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else command


def _binary(name: str) -> str:
    found = find_binary(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
