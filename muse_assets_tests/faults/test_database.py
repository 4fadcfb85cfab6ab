"""The embedding database breaks while a snapshot is built of it: cut, killed, silent, slow, altered.

Here: connections and the server, on a real MariaDB. Not here: a replica that is behind (`test_replica.py`)
or rows that are bad or late (`test_rows.py`).

The table is spread thin over its keys, so that 2,400 rows are seven pages: a part has 2,048 rows at most, a
page here 100 ranges.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pymysql
import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from muse_assets.connections.databases import engine_for
from muse_assets.failures import MuseError, PassingFailure, PermanentFailure
from muse_assets.snapshots.cluster import train_cluster
from muse_assets_tests.embedding_rows import clear, npy, put_rows, unit_vectors
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting, Ledger
from muse_assets_tests.faults.tcp_proxy import Fault, TcpProxy, tcp_proxy
from muse_assets_tests.lanes import Lane, build, lane_at, temps
from muse_assets_tests.servers import MariaDb, execute, find_binary, mariadb_server

ROWS = 2400
PAGES = 7
TABLE, COLUMN = "tb_embedding_clap_h", "embedding_result"
# Of `?read_timeout=1`: five tries at a page and the 3 s between them; the rest is for a busy machine.
BOUND = 5 * 1 + 3 + 12
ROW_PAYLOADS = {
    64 * (row // 4) + row % 4 + 1: npy(vector) for row, vector in enumerate(unit_vectors(ROWS, seed=4))
}


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muse_assets.snapshots.parts._RANGES_A_PAGE", 100)


@dataclass(frozen=True)
class Sound:
    """A lane whose day 1 is built. expected: the bytes of its file, and of any later day's."""

    lane: Lane
    expected: bytes

    def through(self, url: str) -> Sound:
        """The same by another way to the same schema."""
        return replace(self, lane=replace(self.lane, engine=engine_for(url), url=url))

    def survives_or_red(self, run: Callable[[], Any] | None = None) -> MuseError | None:
        """Build day 2 in full under a fault: exact, or red by the table's name; never short, nothing left."""
        lane = self.lane
        failure: MuseError | None = None
        try:
            (run or (lambda: build(lane, 2, full=True)))()
        except MuseError as error:
            failure = error
            assert TABLE in error.what
            assert error.next_step
            assert not lane.file(2).exists()
        else:
            assert lane.file(2).read_bytes() == self.expected, "short or mixed"
        assert lane.file(1).read_bytes() == self.expected, "the last good file changed"
        assert not temps(lane)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]
        return failure

    def heals(self, ledger: Ledger) -> None:
        """The next clean run gives the whole file and leaves nothing."""
        self.lane.file(2).unlink(missing_ok=True)
        with ledger.recovery():
            build(self.lane, 2, full=True)
        assert self.lane.file(2).read_bytes() == self.expected
        assert not temps(self.lane)
        self.lane.file(2).unlink()


def sound_at(url: str, work: Path, trained: Path) -> Sound:
    """Fill the schema, take the trained cluster, build day 1."""
    shutil.copytree(trained, work)
    lane = lane_at(url, work)
    put_rows(lane.engine, lane.spec, ROW_PAYLOADS)
    built = build(lane)
    assert built.manifest.rows == ROWS
    return Sound(lane, built.path.read_bytes())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with the rows' cluster, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    lane = lane_at(f"sqlite:///{folder / 'e.sqlite'}", folder / "work")
    put_rows(lane.engine, lane.spec, ROW_PAYLOADS)
    train_cluster(lane.engine, lane.spec, lane.cluster)
    lane.engine.dispose()
    return lane.work


@pytest.fixture
def sound(mariadb_schema: str, tmp_path: Path, trained: Path) -> Iterator[Sound]:
    made = sound_at(mariadb_schema, tmp_path / "work", trained)
    yield made
    made.lane.engine.dispose()


@pytest.fixture
def proxied(sound: Sound) -> Iterator[tuple[Sound, TcpProxy]]:
    """The same lane through a proxy, with a read time-out of one second."""
    with tcp_proxy(sound.lane.url) as proxy:
        made = sound.through(with_read_timeout(proxy.url(sound.lane.url)))
        yield made, proxy
        made.lane.engine.dispose()


def with_read_timeout(url: str) -> str:
    query = {"read_timeout": "1", "connect_timeout": "1"}
    return make_url(url).update_query_dict(query).render_as_string(hide_password=False)


def reply_bytes(sound: Sound, proxy: TcpProxy) -> int:
    """What an undisturbed build of day 2 pulls, its connection included."""
    sound.lane.engine.dispose()
    before = proxy.replied
    build(sound.lane, 2, full=True)
    sound.lane.file(2).unlink()
    return proxy.replied - before


@dataclass(frozen=True)
class Statements:
    """How often each phase's statements were sent: digests of the table, pages, samples."""

    digests: int
    pages: int
    samples: int


@contextlib.contextmanager
def counted(engine: Engine) -> Iterator[Callable[[], Statements]]:
    seen: list[str] = []

    def note(*arguments: Any) -> None:
        seen.append(arguments[2])

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield lambda: Statements(
            digests=sum("SUM(" in one for one in seen),
            pages=sum("BETWEEN" in one for one in seen),
            samples=sum(" IN (" in one for one in seen),
        )
    finally:
        event.remove(engine, "before_cursor_execute", note)


# 7: lost connections


def test_one_cut_at_any_byte_is_survived_by_the_page_it_fell_on(
    injecting: Injecting, times: Times, proxied: tuple[Sound, TcpProxy]
) -> None:
    sound, proxy = proxied
    whole = reply_bytes(sound, proxy)
    choose = random.Random(7)
    with counted(sound.lane.engine) as now:
        build(sound.lane, 2, full=True)
        once = now()
    assert once.pages == PAGES
    extra = []
    with injecting("7", "one cut (RST, FIN) at a random byte of a build") as ledger:
        for n in range(times(4, 150)):
            fault = (Fault.RESET, Fault.FIN)[n % 2]
            at = choose.randrange(whole)
            with ledger.injection(f"{fault.value} after {at}"), counted(sound.lane.engine) as now:
                sound.lane.engine.dispose()  # so that the handshake is cut as well
                sound.lane.file(2).unlink(missing_ok=True)
                before, done = proxy.replied, len(proxy.done)
                proxy.arm(fault, after=at)
                with ledger.recovery():
                    failure = sound.survives_or_red()
                assert proxy.done[done:] == [fault], "nothing was injected"
                assert failure is None, failure
                assert now().digests <= 2 * once.digests
                assert now().pages <= once.pages + 1, "not the whole build again"
                assert now().samples <= 2 * once.samples
                extra.append(proxy.replied - before - whole)
                # The sample is read again whole; nothing else is as long.
                assert extra[-1] < 0.6 * whole
            proxy.heal()
        ledger.note = f"read again: {np.median(extra) / whole:.0%} of the build's bytes (median)"
        sound.heals(ledger)


def test_connections_that_keep_being_cut_are_red_or_exact(
    injecting: Injecting, times: Times, proxied: tuple[Sound, TcpProxy]
) -> None:
    sound, proxy = proxied
    whole = reply_bytes(sound, proxy)
    choose = random.Random(8)
    reds = 0
    with injecting("7", "every connection cut, again and again") as ledger:
        for _n in range(times(3, 40)):
            # Few bytes a connection: no page gets through; many: each page needs some tries.
            at = int(whole * choose.uniform(0, 1) ** 3)
            with ledger.injection(f"every {at} bytes"):
                sound.lane.engine.dispose()
                done = len(proxy.done)
                proxy.arm(Fault.RESET, after=at, times=choose.randrange(2, 40))
                started = time.monotonic()
                failure = sound.survives_or_red()
                assert time.monotonic() - started < BOUND
                assert len(proxy.done) >= done + 1, "nothing was injected"
                if failure:
                    reds += 1
                    assert isinstance(failure, PassingFailure)
                proxy.heal()
                sound.heals(ledger)
            proxy.heal()
        ledger.note = f"{reds} red, the others exact"
    assert reds


def test_connections_killed_by_another_session(injecting: Injecting, times: Times, sound: Sound) -> None:
    """KILL CONNECTION and KILL QUERY at random times, with the build at work or between two pages."""
    lane = sound.lane
    schema = make_url(lane.url).database
    choose = random.Random(9)
    started = time.monotonic()
    build(lane, 2, full=True)
    seconds = time.monotonic() - started
    lane.file(2).unlink()
    mine = f"SELECT id FROM information_schema.processlist WHERE db = '{schema}' AND id <> CONNECTION_ID()"
    killer = create_engine(lane.url, poolclass=NullPool)

    def kill(kind: str, count: list[int]) -> None:
        time.sleep(choose.uniform(0, seconds))
        with killer.connect() as connection:
            for (number,) in connection.execute(text(mine)).all():
                with contextlib.suppress(DBAPIError):  # it has just gone
                    connection.execute(text(f"KILL {kind} {number}"))
                    count.append(number)

    with injecting("7", "KILL CONNECTION, KILL QUERY at random times") as ledger:
        hits = tries = 0
        while hits < times(4, 80) and tries < times(40, 800):
            tries += 1
            count: list[int] = []
            kind = choose.choice(["CONNECTION", "QUERY"])
            thread = threading.Thread(target=kill, args=(kind, count))
            with _counting_hits(ledger, count):
                thread.start()
                failure = sound.survives_or_red()
                thread.join(30)
                assert failure is None or not count, failure
                sound.heals(ledger)
            hits += bool(count)


@contextlib.contextmanager
def _counting_hits(ledger: Ledger, count: list[int]) -> Iterator[None]:
    """An injection that does not count where the kill found nobody."""
    with ledger.injection("KILL"):
        yield
    if not count:
        ledger.injected -= 1


def test_a_server_that_is_killed_and_restarted(
    injecting: Injecting,
    times: Times,
    trained: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    require_mariadb()
    choose = random.Random(10)
    with mariadb_server(tmp_path_factory.mktemp("killed"), "--innodb-flush-log-at-trx-commit=1") as server:
        sound = sound_at(server.url, tmp_path / "work", trained)
        lane = sound.lane
        outcomes = []

        def build_until(stop: threading.Event) -> None:
            while not stop.is_set():
                failure = sound.survives_or_red()
                assert isinstance(failure, PassingFailure | None)
                outcomes.append(failure is None)
                lane.file(2).unlink(missing_ok=True)

        with injecting("7", "database SIGKILLed and restarted during a build") as ledger:
            for n in range(times(2, 24)):
                seconds = (4, 0, 0.5, 0)[n % 4]  # a page is tried again for three seconds
                # Not the other way round: the server dies with the thread that started it.
                with ledger.injection(f"down for {seconds} s"), ThreadPoolExecutor(1) as pool:
                    stop = threading.Event()
                    builds = pool.submit(build_until, stop)
                    time.sleep(choose.uniform(0, 0.5))
                    server.kill()
                    time.sleep(seconds)
                    server.start()
                    stop.set()
                    builds.result(BOUND)
                    sound.heals(ledger)
            assert outcomes.count(False)
            ledger.note = f"{outcomes.count(False)} builds red, {outcomes.count(True)} exact"
        lane.engine.dispose()


def require_mariadb() -> None:
    if find_binary("mariadbd") is None:
        pytest.skip("SERVICE MISSING: no mariadbd; install it")


# 8: silence and slowness


def test_a_black_hole_is_red_in_bounded_time(
    injecting: Injecting, times: Times, sound: Sound, tmp_path: Path
) -> None:
    """At connecting, in the digest, in the middle of a page, in the sample: all at once."""
    lane = sound.lane
    with tcp_proxy(lane.url) as proxy:
        whole = reply_bytes(sound.through(proxy.url(lane.url)), proxy)
    choose = random.Random(11)
    waits = []

    def stalled(where: tuple[int, float]) -> float:
        number, share = where
        work = tmp_path / f"stalled_{number}"
        with tcp_proxy(lane.url) as proxy:
            url = with_read_timeout(proxy.url(lane.url))
            mine = sound_copy(sound, url, work)
            if share < 0:
                proxy.stall()
            else:
                proxy.arm(Fault.STALL, after=int(whole * share))
            started = time.monotonic()
            with pytest.raises(PassingFailure, match=TABLE):
                build(mine.lane, 2, full=True)
            waited = time.monotonic() - started
            assert proxy.done or share < 0
            assert waited > 1.5, "one time-out is tried again"
            assert waited < BOUND
            assert not mine.lane.file(2).exists()
            assert not temps(mine.lane)
            proxy.heal()
            with ledger.recovery():
                assert build(mine.lane, 2, full=True).path.read_bytes() == sound.expected
            mine.lane.file(2).unlink()
            mine.lane.engine.dispose()
        return waited

    with injecting("8", "database silent (black hole) at connect or in a reply") as ledger:
        for _ in range(times(1, 4)):
            # -1 is before the greeting, half of the bytes are pages (five tries), the last are the sample.
            shares = [-1.0, 0.001, 0.97, *(choose.uniform(0, 0.97) for _ in range(times(0, 5)))]
            places = list(enumerate(shares))
            with ThreadPoolExecutor(len(places)) as pool:
                outcomes = [(place, pool.submit(stalled, place)) for place in places]
            for place, outcome in outcomes:
                with ledger.injection(f"{place[1]:.0%} of the replies"):
                    waits.append(outcome.result())
        ledger.note = f"red after {max(waits):.1f} s at most, of read_timeout 1 s"


def sound_copy(sound: Sound, url: str, work: Path) -> Sound:
    """The lane in a work directory of its own that has the cluster alone."""
    lane = replace(sound.lane, engine=engine_for(url), url=url, work=work)
    work.mkdir(exist_ok=True)
    for path in (sound.lane.cluster, *(sound.lane.work / ".manifests").rglob("*.cluster.json")):
        target = work / path.relative_to(sound.lane.work)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return replace(sound, lane=lane)


def test_a_slow_database_is_waited_for(
    injecting: Injecting, times: Times, proxied: tuple[Sound, TcpProxy]
) -> None:
    sound, proxy = proxied
    whole = reply_bytes(sound, proxy)
    choose = random.Random(12)
    with injecting("8", "database slow: a build takes longer than the read time-out") as ledger:
        for seconds in [2.0, *(choose.uniform(2, 20) for _ in range(times(0, 4)))]:
            with ledger.injection(f"{seconds:.1f} s"):
                proxy.bytes_per_second = int(whole / seconds)
                started = time.monotonic()
                assert sound.survives_or_red() is None
                assert time.monotonic() - started > 1.5
                proxy.heal()
                sound.heals(ledger)


# 9: a slow consumer


def test_an_encoder_slower_than_the_servers_patience(
    injecting: Injecting,
    times: Times,
    trained: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The server gives up on a client that does not read, or says nothing, for a second."""
    require_mariadb()
    patience = ("--net-write-timeout=1", "--net-read-timeout=1", "--wait-timeout=1")
    with mariadb_server(tmp_path_factory.mktemp("impatient"), *patience) as server:
        assert_impatient(server)
        sound = sound_at(server.url, tmp_path / "work", trained)
        with injecting("9", "encoder slower than net_write_timeout and wait_timeout") as ledger:
            for _ in range(times(1, 4)):
                with ledger.injection("1.3 s a page"):
                    slept: list[float] = []

                    def sleep(doing: str, *_: int, slept: list[float] = slept) -> None:
                        if doing == "encoding" and len(slept) < times(1, PAGES):
                            time.sleep(1.3)
                            slept.append(1.3)

                    assert (
                        sound.survives_or_red(lambda: build(sound.lane, 2, full=True, on_progress=sleep))
                        is None
                    )
                    assert slept
                    sound.heals(ledger)
        sound.lane.engine.dispose()


def assert_impatient(server: MariaDb) -> None:
    """A reader that streams and pauses does lose its connection there."""
    url = make_url(server.url)
    connection = pymysql.connect(
        host="127.0.0.1",
        port=server.port,
        user=url.username,
        password=str(url.password),
        cursorclass=pymysql.cursors.SSCursor,
    )
    with pytest.raises(pymysql.err.OperationalError), connection.cursor() as cursor:
        cursor.execute("SELECT REPEAT('x', 1000000) FROM seq_1_to_60")
        cursor.fetchone()
        time.sleep(1.8)
        while cursor.fetchone():
            pass


# 28: the table is altered under the read


def test_alters_during_builds(injecting: Injecting, times: Times, sound: Sound) -> None:
    """Every kind of ALTER in a loop: none waits long for the build, and no build is short."""
    lane = sound.lane
    waits: list[float] = []
    stop = threading.Event()
    choose = random.Random(13)
    statements = [
        f"ALTER TABLE {TABLE} ADD COLUMN extra INT",
        f"ALTER TABLE {TABLE} FORCE, ALGORITHM=COPY",
        f"ALTER TABLE {TABLE} FORCE, ALGORITHM=INPLACE",
        f"ALTER TABLE {TABLE} DROP COLUMN extra, ALGORITHM=COPY",
        f"ALTER TABLE {TABLE} MODIFY {COLUMN} LONGBLOB",
        f"ALTER TABLE {TABLE} MODIFY {COLUMN} BLOB",
        f"OPTIMIZE TABLE {TABLE}",
        f"RENAME TABLE {TABLE} TO aside, aside TO {TABLE}",
    ]

    def alter() -> None:
        another = create_engine(lane.url, poolclass=NullPool)
        while not stop.is_set():
            for statement in statements:
                started = time.monotonic()
                with another.begin() as connection:
                    connection.execute(text(statement))
                waits.append(time.monotonic() - started)
                time.sleep(choose.uniform(0, 0.02))

    def pause(doing: str, *_: int) -> None:
        if doing == "encoding":
            time.sleep(0.6)  # a lock held from page to page would be held for 3.6 s

    thread = threading.Thread(target=alter)
    thread.start()
    reds = 0
    try:
        with injecting("28", "ALTERs without end during builds") as ledger:
            for _ in range(times(1, 12)):
                with ledger.injection("ALTERs"):
                    before = len(waits)
                    failure = sound.survives_or_red(lambda: build(lane, 2, full=True, on_progress=pause))
                    assert isinstance(failure, PassingFailure | None)
                    reds += failure is not None
                    assert len(waits) > before, "nothing was injected"
                    assert max(waits[before:]) < 3.0, "the build holds a lock that queues ALTERs"
                    lane.file(2).unlink(missing_ok=True)
            ledger.note = f"{len(waits):,} ALTERs, longest {max(waits):.2f} s; {reds} builds red"
            stop.set()
            thread.join(30)
            sound.heals(ledger)
    finally:
        stop.set()
        thread.join(30)


def test_error_1412_is_taken_again_once(injecting: Injecting, times: Times, sound: Sound) -> None:
    """The transaction's view is older than the table's definition: once it heals, always it is red."""
    lane = sound.lane
    another = create_engine(lane.url, poolclass=NullPool)
    execute(lane.url, "CREATE TABLE other (id INT) ENGINE=InnoDB")
    met: list[int] = []

    def age(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        in_read = statement.startswith("SELECT") and f"`{TABLE}`" in statement
        if in_read and len(met) < allowed and places.search_in(statement):
            with connection.connection.dbapi_connection.cursor() as own:
                own.execute("ROLLBACK")
                own.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT")
            with another.begin() as elsewhere:
                elsewhere.execute(text(f"ALTER TABLE {TABLE} FORCE, ALGORITHM=COPY"))

    def note(context: Any) -> None:
        if getattr(context.original_exception, "args", [None])[0] == 1412:
            met.append(1412)

    @dataclass
    class Places:
        word: str

        def search_in(self, statement: str) -> bool:
            return self.word in statement

    places = Places("")
    event.listen(lane.engine, "before_cursor_execute", age)
    event.listen(lane.engine, "handle_error", note)
    try:
        with injecting("28", "error 1412 (table redefined under a read)") as ledger:
            for n in range(times(3, 24)):
                places.word = ("ORDER BY idx DESC", "BETWEEN", " IN (")[n % 3]
                allowed = 1 if n % 2 else 1000
                met.clear()
                with ledger.injection(f"{places.word} {allowed}"):
                    failure = sound.survives_or_red()
                    assert met, "nothing was injected"
                    if allowed == 1:
                        assert failure is None, failure
                    else:
                        assert isinstance(failure, PassingFailure)
                        assert "1412" in failure.what
                        assert "nobody alters" in failure.next_step
                    allowed = 0
                    sound.heals(ledger)
    finally:
        event.remove(lane.engine, "before_cursor_execute", age)
        event.remove(lane.engine, "handle_error", note)


@contextlib.contextmanager
def before_statement(engine: Engine, number: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Let `act` happen before the build's n-th statement; gives that statement."""
    seen: list[str] = []
    acted: list[str] = []

    def count(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)
        if len(seen) == number + 1:
            acted.append(statement)
            act()

    event.listen(engine, "before_cursor_execute", count)
    try:
        yield acted
    finally:
        event.remove(engine, "before_cursor_execute", count)


def pages_and_samples(lane: Lane) -> list[int]:
    """Numbers of the build's statements that begin a transaction, so that none of ours waits for it."""
    seen: list[str] = []

    def note(*arguments: Any) -> None:
        seen.append(arguments[2])

    event.listen(lane.engine, "before_cursor_execute", note)
    build(lane, 2, full=True)
    event.remove(lane.engine, "before_cursor_execute", note)
    lane.file(2).unlink()
    firsts = [n for n, statement in enumerate(seen) if "BETWEEN" in statement]
    return [0, *firsts, next(n for n, statement in enumerate(seen) if " IN (" in statement)]


def test_a_table_emptied_under_the_read(injecting: Injecting, times: Times, sound: Sound) -> None:
    """TRUNCATE, and mass deletion, before any page: no index of what was read so far."""
    lane = sound.lane
    numbers = pages_and_samples(lane)
    first_build = sound_copy(sound, lane.url, lane.work.parent / "first")
    choose = random.Random(14)
    with injecting("16, 28", "TRUNCATE or mass deletion between two pages") as ledger:
        for n in range(times(4, 40)):
            number = numbers[n % len(numbers)]
            how = choose.choice(
                [f"TRUNCATE {TABLE}", f"DELETE FROM {TABLE} WHERE idx > {choose.randrange(20000)}"]
            )
            # A first build has no last snapshot whose size would show it.
            subject = first_build if n % 2 else sound
            with ledger.injection(f"{how} before statement {number}"):
                with before_statement(lane.engine, number, partial(execute, lane.url, how)) as acted:
                    failure = _built_or_failure(subject.lane)
                assert acted, "nothing was injected"
                if failure is None:
                    # Read to the end before: exactly what was there, and the next run is red.
                    assert subject.lane.file(2).read_bytes() == sound.expected
                else:
                    assert TABLE in failure.what or "recall" in failure.what
                    assert not subject.lane.file(2).exists()
                assert not temps(subject.lane)
                if subject is sound:
                    with pytest.raises(MuseError, match=TABLE):
                        build(lane, 3)
                    assert not lane.file(3).exists()
                    assert lane.file(1).read_bytes() == sound.expected
                with pytest.raises(PermanentFailure, match="no usable rows"):
                    clear(lane.engine, lane.spec)
                    build(lane, 3, confirm_shrink=True)
            clear(lane.engine, lane.spec)
            put_rows(lane.engine, lane.spec, ROW_PAYLOADS)
            for one in (first_build, sound):
                one.lane.file(2).unlink(missing_ok=True)
            sound.heals(ledger)


def _built_or_failure(lane: Lane) -> MuseError | None:
    try:
        build(lane, 2, full=True)
    except MuseError as failure:
        return failure
    return None


def test_the_embedding_column_goes_or_changes_under_the_read(
    injecting: Injecting, times: Times, sound: Sound
) -> None:
    lane = sound.lane
    numbers = pages_and_samples(lane)
    kinds = {
        "rename": (
            [f"ALTER TABLE {TABLE} RENAME COLUMN {COLUMN} TO gone"],
            [f"ALTER TABLE {TABLE} RENAME COLUMN gone TO {COLUMN}"],
        ),
        "other type": (
            [f"ALTER TABLE {TABLE} RENAME COLUMN {COLUMN} TO gone, ADD COLUMN {COLUMN} INT"],
            [
                f"ALTER TABLE {TABLE} DROP COLUMN {COLUMN}",
                f"ALTER TABLE {TABLE} RENAME COLUMN gone TO {COLUMN}",
            ],
        ),
        "empty": (
            [f"ALTER TABLE {TABLE} RENAME COLUMN {COLUMN} TO gone, ADD COLUMN {COLUMN} BLOB"],
            [
                f"ALTER TABLE {TABLE} DROP COLUMN {COLUMN}",
                f"ALTER TABLE {TABLE} RENAME COLUMN gone TO {COLUMN}",
            ],
        ),
        "shortened": (
            [
                f"ALTER TABLE {TABLE} ADD COLUMN gone BLOB",
                f"UPDATE {TABLE} SET gone = {COLUMN}",
                f"ALTER TABLE {TABLE} MODIFY {COLUMN} VARBINARY(20)",
            ],
            [
                f"ALTER TABLE {TABLE} DROP COLUMN {COLUMN}",
                f"ALTER TABLE {TABLE} RENAME COLUMN gone TO {COLUMN}",
            ],
        ),
    }
    with injecting("28", "embedding column dropped or changed between two pages") as ledger:
        for n in range(times(4, 40)):
            kind, (harm, mend) = list(kinds.items())[n % len(kinds)]
            number = numbers[n % (len(numbers) - 1)]  # the sample is what the index already holds
            with ledger.injection(f"{kind} before statement {number}"):

                def act(harm: list[str] = harm) -> None:
                    execute(lane.url, "SET SESSION sql_mode=''", *harm)

                with before_statement(lane.engine, number, act) as acted:
                    failure = _built_or_failure(lane)
                assert acted, "nothing was injected"
                assert failure is not None, "built of a column that was not there"
                assert COLUMN in failure.what
                assert not lane.file(2).exists()
                assert lane.file(1).read_bytes() == sound.expected
                assert not temps(lane)
            execute(lane.url, *mend)
            sound.heals(ledger)
