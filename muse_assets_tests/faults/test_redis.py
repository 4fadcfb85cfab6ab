"""Redis at its worst: down, full, read-only, busy, cut off, losing replies; live playlists stay whole.

Here: refreshes against a real Redis in each of its bad states and through a proxy that breaks connections.
Not here: the ids (`test_playlists.py`), or TLS (`test_tls.py`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import ExponentialBackoff

from muse_assets.connections import redis_server
from muse_assets.failures import MuseError, PassingFailure, PermanentFailure
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.redis_generations import (
    PROCESSES,
    Read,
    held,
    publish,
    publish_for_ever,
    read_until,
)
from muse_assets_tests.faults.tcp_proxy import Fault, TcpProxy, tcp_proxy
from muse_assets_tests.faults.tools import require_tool
from muse_assets_tests.servers import private_redis

# The product waits 5 s for a connection and 10 s for a reply, and tries a lost connection again after 0.2,
# 0.4 and 0.8 s; a second each and a tenth of the pauses keep thousands of faults short.
WAIT_SECONDS = 1
BOUND_SECONDS = 10
OPTIONS = ("--enable-debug-command", "yes", "--loading-process-events-interval-bytes", "1024")


@dataclass(frozen=True)
class Server:
    """A Redis whose settings the tests may change, and where its data lies."""

    url: str
    directory: Path

    @property
    def admin(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def as_user(self, *rules: str) -> str:
        """The URL of a user who may do what these ACL rules say."""
        password = urlsplit(self.url).password
        with self.admin as admin:
            admin.execute_command("ACL", "SETUSER", "batch", "reset", "on", f">{password}", *rules)
        return self.url.replace("redis://:", "redis://batch:")

    def configured(self, **settings: object) -> None:
        with self.admin as admin:
            for name, value in settings.items():
                admin.config_set(name.replace("_", "-"), value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_tool("redis-server")
    directory = tmp_path_factory.mktemp("redis")
    with private_redis(directory, *OPTIONS) as url:
        yield Server(url, directory)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CONNECT_SECONDS", "_REPLY_SECONDS"):
        monkeypatch.setattr(redis_server, name, WAIT_SECONDS)
    monkeypatch.setattr(
        redis_server, "ExponentialBackoff", lambda **_: ExponentialBackoff(cap=0.1, base=0.01)
    )


# --- 24: a Redis that cannot serve ------------------------------------------------------------------


@contextlib.contextmanager
def refused(server: Server) -> Iterator[str]:
    with tcp_proxy(server.url) as proxy:
        url = proxy.url(server.url)
    yield url


@contextlib.contextmanager
def unknown_host(server: Server) -> Iterator[str]:
    yield server.url.replace("127.0.0.1", "redis.invalid")


@contextlib.contextmanager
def hung(server: Server) -> Iterator[str]:
    with server.admin as admin:
        process = int(admin.info("server")["process_id"])
    os.kill(process, signal.SIGSTOP)
    try:
        yield server.url
    finally:
        os.kill(process, signal.SIGCONT)


@contextlib.contextmanager
def full(server: Server) -> Iterator[str]:
    with server.admin as admin:
        used = int(admin.info("memory")["used_memory"])
    server.configured(maxmemory=used // 2, maxmemory_policy="noeviction")
    yield server.url
    server.configured(maxmemory=0)


@contextlib.contextmanager
def read_only(server: Server) -> Iterator[str]:
    with server.admin as admin:
        admin.replicaof("127.0.0.1", 1)
        yield server.url
        admin.replicaof("NO", "ONE")


@contextlib.contextmanager
def masterless(server: Server) -> Iterator[str]:
    server.configured(replica_serve_stale_data="no")
    with read_only(server) as url:
        yield url
    server.configured(replica_serve_stale_data="yes")


@contextlib.contextmanager
def too_few_replicas(server: Server) -> Iterator[str]:
    server.configured(min_replicas_to_write=1)
    yield server.url
    server.configured(min_replicas_to_write=0)


@contextlib.contextmanager
def unsaved(server: Server) -> Iterator[str]:
    """Its snapshots fail, for a folder has their name, and so it refuses writes."""
    in_the_way = server.directory / "dump.rdb"
    in_the_way.unlink(missing_ok=True)
    in_the_way.mkdir()
    server.configured(save="3600 1")
    save(server, "err")
    yield server.url
    in_the_way.rmdir()
    save(server, "ok")
    server.configured(save="")


def save(server: Server, outcome: str) -> None:
    with server.admin as admin:
        admin.bgsave()
        wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == outcome)


@contextlib.contextmanager
def evicting(server: Server) -> Iterator[str]:
    server.configured(maxmemory_policy="allkeys-lru")
    yield server.url
    server.configured(maxmemory_policy="noeviction")


@contextlib.contextmanager
def crowded(server: Server) -> Iterator[str]:
    with server.admin as admin:
        admin.ping()
        admin.config_set("maxclients", 1)
        yield server.url
        admin.config_set("maxclients", 1000)


@contextlib.contextmanager
def busy(server: Server) -> Iterator[str]:
    def run() -> None:
        with server.admin as client, contextlib.suppress(redis.ResponseError):
            client.eval("while true do end", 0)

    server.configured(busy_reply_threshold=20)
    with in_background(run), server.admin as admin:
        wait_until(lambda: answers(admin, "BUSY"))
        yield server.url
        admin.script_kill()


@contextlib.contextmanager
def loading(server: Server) -> Iterator[str]:
    def reload() -> None:
        with server.admin as client:
            client.execute_command("DEBUG", "RELOAD")

    with server.admin as admin:
        # 400 bytes a key, so that it turns to its clients after every third of them.
        admin.mset({f"filler:{number}": os.urandom(200).hex() for number in range(200)})
        admin.config_set("key-load-delay", 10_000)
    with in_background(reload), server.admin as admin:
        wait_until(lambda: answers(admin, "LOADING"))
        yield server.url
        admin.config_set("key-load-delay", 0)
    with server.admin as admin:
        admin.delete(*(f"filler:{number}" for number in range(200)))


def allowing(*rules: str) -> Callable[[Server], AbstractContextManager[str]]:
    @contextlib.contextmanager
    def restricted(server: Server) -> Iterator[str]:
        yield server.as_user(*rules)

    return restricted


@contextlib.contextmanager
def wrong_password(server: Server) -> Iterator[str]:
    password = urlsplit(server.url).password or ""
    # The right one within: what may not be shown is looked for by it.
    yield server.url.replace(password, f"not-{password}")


@contextlib.contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(30)
    assert not thread.is_alive()


def answers(admin: redis.Redis, word: str) -> bool:
    try:
        admin.get("playlist_update:drp")
    except redis.exceptions.BusyLoadingError:
        return word == "LOADING"
    except redis.ResponseError as error:
        return word in str(error)
    return False


def wait_until(reached: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "the server did not reach the wanted state"
        time.sleep(0.01)


ALL_BUT = ("~playlist_*", "+ping", "+info", "+get", "+mget", "+multi", "+exec")
STATES: dict[str, tuple[Callable[[Server], AbstractContextManager[str]], type[MuseError], str]] = {
    "connection refused": (refused, PassingFailure, "it is down or out of reach"),
    "unknown host": (unknown_host, PassingFailure, "it is down or out of reach"),
    "hung (SIGSTOP)": (hung, PassingFailure, "no answer within"),
    "full (maxmemory, noeviction)": (full, PassingFailure, "memory is used up"),
    "read-only replica": (read_only, PassingFailure, "read-only replica"),
    "replica without its master": (masterless, PassingFailure, "lost its master"),
    "min-replicas-to-write": (too_few_replicas, PassingFailure, "replicas"),
    "cannot save (MISCONF)": (unsaved, PassingFailure, "cannot save to its disk"),
    "evicting policy": (evicting, PermanentFailure, "maxmemory-policy allkeys-lru"),
    "maxclients reached": (crowded, PassingFailure, "maxclients"),
    "busy in a script": (busy, PassingFailure, "script"),
    "loading": (loading, PassingFailure, "still loading"),
    "ACL without SET": (allowing(*ALL_BUT), PermanentFailure, "permission for a command refused"),
    "ACL without the update key": (
        allowing("~playlist_idx:*", "+set", *ALL_BUT[1:]),
        PermanentFailure,
        "permission for a command refused",
    ),
    "ACL without INFO": (
        allowing("~*", "+@all", "-info"),
        PermanentFailure,
        "permission for a command refused",
    ),
    "wrong password": (wrong_password, PermanentFailure, "login refused"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_redis_that_cannot_serve(server: Server, state: str, injecting: Injecting, times: Times) -> None:
    in_state, kind, reason = STATES[state]
    seconds = [0.0]
    with injecting("24", f"Redis {state}") as ledger:
        publish(server.url, 1)
        for number in range(2, 2 + times(1, 20)):
            with ledger.injection(number):
                before = held(server.url)
                with in_state(server) as url:
                    started = time.monotonic()
                    failure = failure_of(url, number)
                    seconds.append(time.monotonic() - started)
                where = f"Redis {urlsplit(url).hostname}:{urlsplit(url).port} db 0"
                assert type(failure) is kind, f"{type(failure).__name__}: {failure}"
                assert where in failure.what and reason in str(failure), str(failure)
                assert failure.next_step.endswith(".")
                assert seconds[-1] < BOUND_SECONDS
                assert held(server.url) == before == number - 1
                with ledger.recovery():
                    publish(server.url, number)
                assert held(server.url) == number
        ledger.note = f"red after {max(seconds):.1f} s at most"


def failure_of(url: str, number: int) -> MuseError | None:
    """How the refresh failed: returned, for the server has to be healed whatever the outcome."""
    try:
        publish(url, number)
    except MuseError as failure:
        return failure
    return None


# --- 25 and the network: lost replies, cuts, stalls, a slow line ------------------------------------


@pytest.fixture
def proxy(server: Server) -> Iterator[TcpProxy]:
    with tcp_proxy(server.url) as proxy:
        yield proxy


def test_a_lost_reply_to_the_write_publishes_once(
    server: Server, proxy: TcpProxy, injecting: Injecting, times: Times
) -> None:
    publish(server.url, 1)
    with injecting("25", "reply of EXEC lost once: retried, all keys new") as ledger:
        for number in range(2, 2 + times(6, 300)):
            with ledger.injection(number):
                lost = len(proxy.done)
                proxy.drop_reply(b"EXEC")
                with ledger.recovery():
                    publish(proxy.url(server.url), number)
                assert len(proxy.done) == lost + 1, "no reply was lost"
                assert held(server.url) == number


def test_replies_lost_for_ever_leave_the_new_keys_or_the_old_ones(
    server: Server, proxy: TcpProxy, injecting: Injecting, times: Times
) -> None:
    publish(server.url, 1)
    with injecting("25", "reply of EXEC lost at every retry: red, keys all new") as ledger:
        for number in range(2, 2 + times(2, 100)):
            with ledger.injection(number):
                lost = len(proxy.done)
                proxy.drop_reply(b"EXEC", times=4)
                failure = failure_of(proxy.url(server.url), number)
                assert isinstance(failure, PassingFailure) and "playlist of drp" in failure.what
                assert len(proxy.done) == lost + 4, "not each of the four tries lost its reply"
                assert held(server.url) == number
                proxy.heal()
                with ledger.recovery():
                    publish(proxy.url(server.url), number)
                assert held(server.url) == number


@pytest.mark.parametrize("fault", list(Fault))
def test_a_connection_that_breaks_anywhere(
    server: Server, proxy: TcpProxy, fault: Fault, injecting: Injecting, times: Times
) -> None:
    """After any byte of any reply, up to more often than redis-py tries again."""
    where, survived = random.Random(fault.value), 0
    publish(server.url, 1)
    replied = proxy.replied
    publish(proxy.url(server.url), 1)
    total = proxy.replied - replied
    with injecting("25", f"{fault.value} after a random byte of a reply, 1 to 6 times") as ledger:
        for number in range(2, 2 + (times(1, 40) if fault is Fault.STALL else times(6, 300))):
            with ledger.injection(number):
                done = len(proxy.done)
                # The first reply of a connection is the login's: at 0 the login itself gets no answer.
                proxy.arm(fault, after=where.randrange(total), times=where.randint(1, 6))
                published = published_by(proxy.url(server.url), number)
                assert len(proxy.done) > done, "nothing broke"
                assert held(server.url) in ({number} if published else {number - 1, number})
                survived += published
                proxy.heal()
                with ledger.recovery():
                    publish(proxy.url(server.url), number)
                assert held(server.url) == number
        ledger.note = f"{survived} survived"


def published_by(url: str, number: int) -> bool:
    """Whether the refresh says so; else it is red within its bound, for a reason that passes."""
    started = time.monotonic()
    try:
        publish(url, number)
    except PassingFailure as failure:
        assert f"Redis 127.0.0.1:{urlsplit(url).port}" in failure.what
        return False
    finally:
        assert time.monotonic() - started < BOUND_SECONDS
    return True


def test_a_connection_that_is_cut_at_any_moment(
    server: Server, proxy: TcpProxy, injecting: Injecting, times: Times
) -> None:
    """While requests are under way too, which faults at bytes of replies do not reach."""
    when = random.Random(25)
    publish(server.url, 1)
    cut_short = 0
    with injecting("25", "all connections cut at random moments of a refresh") as ledger:
        for number in range(2, 2 + times(20, 400)):
            with ledger.injection(number):
                accepted = proxy.accepted
                timer = threading.Timer(when.random() * 0.01, proxy.cut)
                timer.start()
                published = published_by(proxy.url(server.url), number)
                timer.join()
                cut_short += proxy.accepted > accepted + 1
                assert held(server.url) in ({number} if published else {number - 1, number})
                with ledger.recovery():
                    publish(proxy.url(server.url), number)
                assert held(server.url) == number
        # The rest were over, or not begun, when the cut came.
        ledger.note = f"{cut_short} in the middle of a refresh"
        assert cut_short


def test_a_slow_line_succeeds(server: Server, proxy: TcpProxy, injecting: Injecting, times: Times) -> None:
    publish(server.url, 1)
    with injecting("25", "slow line, replies at 60 kB/s") as ledger:
        for number in range(2, 2 + times(1, 10)):
            with ledger.injection(number):
                proxy.bytes_per_second = 60_000
                with ledger.recovery():
                    publish(proxy.url(server.url), number)
                assert held(server.url) == number
                assert ledger.recoveries[-1] > WAIT_SECONDS, "the line was not slow"


# --- G7: readers ------------------------------------------------------------------------------------


@contextlib.contextmanager
def readers(url: str, count: int = 2) -> Iterator[list[Read]]:
    """Processes that read all the while; at the end, what they saw."""
    seen: list[Read] = []
    stop = PROCESSES.Event()
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(count)]
    processes = [PROCESSES.Process(target=read_until, args=(url, stop, sender)) for _, sender in pipes]
    for process in processes:
        process.start()
    try:
        yield seen
        stop.set()
        for receiver, _ in pipes:
            assert receiver.poll(30), "a reader did not end"
            seen.append(receiver.recv())
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()


def require_whole(seen: list[Read], generations: int) -> str:
    """No reader saw a torn or mixed playlist; each saw it change `generations` times at least."""
    assert not [torn for one in seen for torn in one.torn]
    assert not [mixed for one in seen for mixed in one.mixed]
    assert all(one.generations >= generations for one in seen), [one.generations for one in seen]
    singles, together = sum(one.singles for one in seen), sum(one.together for one in seen)
    return f"{singles:,} GET and {together:,} MGET of all keys, 0 torn"


def test_readers_never_see_half_a_refresh(server: Server, injecting: Injecting, times: Times) -> None:
    publish(server.url, 1)
    with injecting("G7", "refreshes under two reading processes") as ledger:
        count = times(60, 1000)
        with readers(server.url) as seen:
            for number in range(2, 2 + count):
                with ledger.injection(number):
                    publish(server.url, number)
                    assert held(server.url) == number
        ledger.note = require_whole(seen, count // 10)


def test_a_killed_refresh_leaves_whole_playlists(server: Server, injecting: Injecting, times: Times) -> None:
    when = random.Random(7)
    publish(server.url, 1)
    number, moved = 1, 0
    with injecting("G7", "SIGKILL of the refreshing process under two readers") as ledger:
        with readers(server.url) as seen:
            for kill in range(times(6, 200)):
                with ledger.injection(kill):
                    writer = PROCESSES.Process(target=publish_for_ever, args=(server.url, number + 1, kill))
                    writer.start()
                    wait_until(lambda last=number: held(server.url) != last)  # type: ignore[misc]
                    time.sleep(when.random() * 0.02)
                    writer.kill()
                    writer.join(10)
                    assert writer.exitcode == -signal.SIGKILL
                    left = held(server.url)
                    assert left is not None and left > number, "the killed refresh left half a playlist"
                    moved += left - number
                    number = left + 1
                    with ledger.recovery():
                        publish(server.url, number)
                    assert held(server.url) == number
        ledger.note = f"{require_whole(seen, times(3, 100))}; {moved} refreshes"
