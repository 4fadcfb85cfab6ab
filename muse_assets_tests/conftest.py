"""Fixtures on real servers: private ones, or those that MUSE_TEST_MYSQL_URL and MUSE_TEST_REDIS_URL name.

Without the servers' binaries their tests are skipped with one loud line; with CI=true they fail.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import faiss
import pytest
import redis

from muse_assets.connections.embedded_valkey import embedded_valkey
from muse_assets_tests.faults.ledger import faults_table
from muse_assets_tests.servers import find_binary, fresh_schema, private_mariadb, private_redis

_MISSING = "SERVICE MISSING:"
# Files whose tests last longest, longest first: begun last, they would leave the other worker idle.
_LONGEST = (
    *("test_soak", "test_sensor", "test_kills", "test_deployment", "test_several_hosts", "test_cli"),
    "test_concurrency",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--heavy-faults`: inject each fault as often as `make test-faults` does."""
    parser.addoption("--heavy-faults", action="store_true", help="inject every fault many times")


def pytest_configure() -> None:
    """Undo a shell's `&`, which has SIGINT ignored: see `muse_assets.cli.main`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first; xdist keeps the order."""
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@dataclass(frozen=True)
class Stores:
    """URLs of two empty SQL databases and an empty Redis database."""

    embedding_url: str
    playlist_url: str
    redis_url: str


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Training these few vectors with spinning threads takes seconds on a busy machine."""
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="session")
def mariadb_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SQLAlchemy URL of a MariaDB or MySQL server on which tests may create databases."""
    if given := os.environ.get("MUSE_TEST_MYSQL_URL"):
        yield given
        return
    _require("mariadbd", "mariadb-install-db", instead="MUSE_TEST_MYSQL_URL")
    with private_mariadb(tmp_path_factory.mktemp("mariadb")) as url:
        yield url


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Redis database that tests flush."""
    if given := os.environ.get("MUSE_TEST_REDIS_URL"):
        yield _database_of_this_worker(given)
        return
    _require("redis-server", instead="MUSE_TEST_REDIS_URL")
    with private_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the session's embedded Valkey, which tests flush."""
    with embedded_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture(scope="session")
def server_python() -> Path:
    """The interpreter of the search server's environment."""
    path = Path(os.environ.get("MUSE_SERVER_PYTHON") or Path(__file__).parents[1] / ".venv-server/bin/python")
    if not path.exists():
        reason = f"SERVICE MISSING: no {path}; run `make .venv-server` or set MUSE_SERVER_PYTHON"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture
def mariadb_schema(mariadb_url: str) -> Iterator[str]:
    """SQLAlchemy URL of an empty database of the test's own."""
    with fresh_schema(mariadb_url) as url:
        yield url


@pytest.fixture(params=["sqlite-valkey", "mariadb-redis"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    """Empty stores: the embedded default, and what an installation has."""
    with contextlib.ExitStack() as stack:
        if request.param == "sqlite-valkey":
            embedding_url, playlist_url = (f"sqlite:///{tmp_path / name}.sqlite" for name in ("a", "b"))
            url = request.getfixturevalue("valkey_url")
        else:
            server = request.getfixturevalue("mariadb_url")
            embedding_url, playlist_url = (stack.enter_context(fresh_schema(server)) for _ in range(2))
            url = request.getfixturevalue("redis_url")
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        yield Stores(embedding_url, playlist_url, url)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line which tests had no server, and in one table which faults were injected."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    last = [report for report in reports if getattr(report, "when", None) == "teardown"]
    terminalreporter.write(faults_table([pair for report in last for pair in report.user_properties]))
    reasons = [str(report.longrepr) for report in terminalreporter.getreports("skipped")]
    if without := [reason for reason in reasons if _MISSING in reason]:
        names = sorted({reason.split(_MISSING)[1].split(";")[0].strip() for reason in without})
        terminalreporter.write_line(
            f"!!! {len(without)} TESTS ON REAL SERVERS DID NOT RUN: {', '.join(names)}", red=True, bold=True
        )


def _require(*binaries: str, instead: str) -> None:
    missing = [name for name in binaries if find_binary(name) is None]
    if not missing:
        return
    reason = f"{_MISSING} no {', '.join(missing)}; install it or set {instead}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _database_of_this_worker(url: str) -> str:
    """The URL with its database number raised by pytest-xdist's worker number: workers flush."""
    number = urlsplit(url).path.strip("/")
    if not number.isdigit() or number == "0":
        pytest.fail("MUSE_TEST_REDIS_URL needs a database number above 0, as in .../9: tests flush it")
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return urlsplit(url)._replace(path=f"/{int(number) + worker}").geturl()
