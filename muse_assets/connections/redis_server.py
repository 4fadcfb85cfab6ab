"""Redis or Valkey: a client with bounded time-outs, and its errors in an operator's words.

Here: connecting, and the boundary where redis-py's errors become failures without secrets. Not here: any
key (`playlists/cache.py`), or running the embedded server (`embedded_valkey.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from muse_assets.connections.authorities import check_authority
from muse_assets.connections.embedded_valkey import embedded_valkey
from muse_assets.failures import PassingFailure, PermanentFailure

_CONNECT_SECONDS = 5
_REPLY_SECONDS = 10
# redis-py 8 retries 10 times, time-outs too: a black hole then blocks for minutes. Only a lost connection
# is tried again, so only idempotent commands may be sent through this client.
_RETRIES = 3

_REFUSALS: dict[type[redis.RedisError], tuple[str, str]] = {
    redis.exceptions.BusyLoadingError: ("it is still loading its data", "wait until it has"),
    redis.exceptions.MasterDownError: ("it is a replica that lost its master", "restore the master"),
    redis.ReadOnlyError: ("it is a read-only replica", "point the URL at the master, or promote this one"),
    redis.OutOfMemoryError: ("its memory is used up (maxmemory)", "raise maxmemory or free memory there"),
    redis.TimeoutError: (
        f"no answer within {_CONNECT_SECONDS} s of connecting or {_REPLY_SECONDS} s of a command",
        "check its load, the network, and for rediss:// that this port speaks TLS",
    ),
}
# Refusals that redis-py has no type for, by a word of the server's.
_REFUSED_WORDS: dict[str, tuple[str, str]] = {
    "MISCONF": ("it refuses writes because it cannot save to its disk", "free space on that server's disk"),
    "NOREPLICAS": (
        "it refuses writes because too few replicas follow it (min-replicas-to-write)",
        "restore its replicas",
    ),
    "BUSY": ("it is busy with a long script", "end that with SCRIPT KILL there, or wait"),
    "max number of clients": (
        "it takes no more clients (maxclients)",
        "end idle clients or raise maxclients",
    ),
}


def connect(url: str) -> redis.Redis:
    """A client for a redis://, rediss:// or unix:// URL, replies as bytes; connects at the first command.

    Send idempotent commands only: a lost connection is retried 3 times, so one may run twice. Raises
    PermanentFailure for a URL that redis-py cannot read, and for a CA file (?ssl_ca_certs=) that is none.
    """
    try:
        client = redis.Redis.from_url(
            url,
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_timeout=_REPLY_SECONDS,
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.1), _RETRIES, (redis.ConnectionError,)),
        )
    except ValueError as error:
        raise PermanentFailure(
            f"The Redis URL cannot be used ({type(error).__name__}).",
            next_step="give a URL such as redis://user:password@host:6379/0 in MUSE_REDIS_URL.",
        ) from None
    if authority := client.connection_pool.connection_kwargs.get("ssl_ca_certs"):
        check_authority(authority, "ssl_ca_certs")
    return client


@contextlib.contextmanager
def opened(url: str, embedded_directory: Path) -> Iterator[redis.Redis]:
    """A client of the server at `url`, or with an empty `url` of the embedded Valkey in that directory.

    The embedded server runs at least as long as the client is used.
    """
    with contextlib.ExitStack() as stack:
        url = url or stack.enter_context(embedded_valkey(embedded_directory))
        yield stack.enter_context(contextlib.closing(connect(url)))


def describe_url(url: str) -> str:
    """The server of a URL as it may be printed: without user and password."""
    return describe(connect(url))


def describe(client: redis.Redis) -> str:
    """The client's server as it may be printed: without user and password."""
    options = client.connection_pool.connection_kwargs
    database = options.get("db") or 0
    if "path" in options:
        return f"Redis {options['path']} db {database}"
    return f"Redis {options.get('host', 'localhost')}:{options.get('port', 6379)} db {database}"


@contextlib.contextmanager
def explained(client: redis.Redis, doing: str) -> Iterator[None]:
    """Turn redis-py's errors into failures that name the server, without secrets.

    `doing` completes "while ...", for example "writing the playlist of drp". PassingFailure: down, slow,
    loading, out of memory, read-only. PermanentFailure: refused login, missing permission, wrong command.
    """
    try:
        yield
    except redis.RedisError as error:
        raise _failure(client, doing, error) from None


def _failure(client: redis.Redis, doing: str, error: redis.RedisError) -> PassingFailure | PermanentFailure:
    where = f"{describe(client)}, while {doing}"
    if isinstance(error, redis.AuthenticationError | redis.exceptions.NoPermissionError):
        # The server's own words may quote the user name or the command's arguments.
        refused = "login" if isinstance(error, redis.AuthenticationError) else "permission for a command"
        return PermanentFailure(
            f"{where}: {refused} refused.",
            next_step="correct user and password in MUSE_REDIS_URL; the user needs "
            "+ping +info +get +mget +set +multi +exec on playlist_*.",
        )
    text = " ".join(str(error).split())[:300]
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return PermanentFailure(
            f"{where}: its TLS certificate was refused ({text.rpartition(': ')[2]}).",
            next_step="name the CA that signed it (?ssl_ca_certs=/path/ca.pem) and a host that it is for in "
            "MUSE_REDIS_URL.",
        )
    known = [found for kind, found in _REFUSALS.items() if isinstance(error, kind)]
    known += [found for word, found in _REFUSED_WORDS.items() if word in text]
    # Last: several of the above are connection errors to redis-py.
    if isinstance(error, redis.ConnectionError):
        known.append(("it is down or out of reach", "start it, or check the URL and the network"))
    if known:
        reason, remedy = known[0]
        return PassingFailure(f"{where}: {reason}.", next_step=f"{remedy}, then launch the run again.")
    if password := client.connection_pool.connection_kwargs.get("password"):
        text = text.replace(str(password), "***")
    return PermanentFailure(
        f"{where}: {type(error).__name__}: {text}.", next_step="check that the URL names a Redis server."
    )


def check_eviction(client: redis.Redis) -> None:
    """Refuse a server that may evict keys without expiry: live playlists would vanish unnoticed.

    Raises PermanentFailure for a `maxmemory-policy` of allkeys-*.
    """
    with explained(client, "asking for its eviction policy"):
        policy = str(client.info("memory").get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys-"):
        raise PermanentFailure(
            f"{describe(client)} evicts keys without expiry (maxmemory-policy {policy}).",
            next_step="set maxmemory-policy to noeviction or volatile-* there, or use another server.",
        )
