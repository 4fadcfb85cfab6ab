"""TLS to MariaDB and Redis: the right certificate or no connection at all, and never plain text instead.

Here: each way in which a server's certificate can be wrong, on real servers. Not here: other failures of
a connection (`test_redis.py`, the database's faults beside it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.backoff import NoBackoff
from sqlalchemy import text

from muse_assets.connections import redis_server
from muse_assets.connections.databases import connected, engine_for
from muse_assets.connections.redis_server import connect, explained
from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets_tests.certificates import Authority
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.tools import require_tool
from muse_assets_tests.servers import free_port, private_mariadb, private_redis


@dataclass(frozen=True)
class Servers:
    """URLs without TLS settings. setting: the URL parameter that names the CA.

    good: of a server whose certificate is for 127.0.0.1 alone. plain: of one without TLS.
    """

    good: str
    plain: str
    authority: Path
    stranger: Path
    setting: str

    def url(self, server: str, authority: Path) -> str:
        return f"{server}?{self.setting}={authority}"


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    directory = tmp_path_factory.mktemp("certificates")
    return Authority(directory, "ours"), Authority(directory, "stranger")


@pytest.fixture(scope="module")
def mariadb(
    authorities: tuple[Authority, Authority], mariadb_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    for tool in ("mariadbd", "mariadb-install-db"):
        require_tool(tool)
    ours, stranger = authorities
    made = ours.certificate("mariadb", "127.0.0.1")
    options = (f"--ssl-cert={made.certificate}", f"--ssl-key={made.key}", f"--ssl-ca={ours.file}")
    with private_mariadb(tmp_path_factory.mktemp("mariadb"), *options) as good:
        yield Servers(good, mariadb_url, ours.file, stranger.file, "ssl_ca")


@pytest.fixture(scope="module")
def redis_servers(
    authorities: tuple[Authority, Authority], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    require_tool("redis-server")
    ours, stranger = authorities
    made, port = ours.certificate("redis", "127.0.0.1"), free_port()
    options = (
        *("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(ours.file)),
        *("--tls-cert-file", str(made.certificate), "--tls-key-file", str(made.key)),
    )
    with private_redis(tmp_path_factory.mktemp("redis"), *options) as plain:
        good, silent = (with_tls(plain, one) for one in (port, urlsplit(plain).port or 0))
        yield Servers(good, silent, ours.file, stranger.file, "ssl_ca_certs")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis without TLS reads a handshake as an unfinished command and stays silent."""
    for name in ("_CONNECT_SECONDS", "_REPLY_SECONDS"):
        monkeypatch.setattr(redis_server, name, 1)
    monkeypatch.setattr(redis_server, "ExponentialBackoff", lambda **_: NoBackoff())


def with_tls(url: str, port: int) -> str:
    """The rediss:// URL of a server, at another port."""
    parts = urlsplit(url)
    return url.replace("redis://", "rediss://").replace(f":{parts.port}/", f":{port}/")


def ask_mariadb(url: str) -> bool:
    """Whether the connection is encrypted, asked of the server."""
    # A pool per call: what is proved is connecting.
    engine = engine_for.__wrapped__(url)
    try:
        with connected(engine, "asking for its cipher") as connection:
            return bool(connection.execute(text("SHOW STATUS LIKE 'Ssl_cipher'")).one()[1])
    finally:
        engine.dispose()


def ask_redis(url: str) -> bool:
    """Whether it answers; rediss:// is TLS or nothing."""
    client = connect(url)
    with explained(client, "saying hello"):
        return bool(client.ping())


ASK = {"MariaDB": ask_mariadb, "Redis": ask_redis}
FIXTURES = {"MariaDB": "mariadb", "Redis": "redis_servers"}
FAULTS = ["wrong CA", "right CA, wrong host", "server without TLS", "CA file missing", "no PEM"]
# Without ssl_ca MySQL's protocol takes what the server offers.
CASES = [("Redis", "CA not named"), *((product, fault) for product in ASK for fault in FAULTS)]


@pytest.mark.parametrize(("product", "fault"), CASES)
def test_a_wrong_certificate_is_refused(
    product: str,
    fault: str,
    tmp_path: Path,
    injecting: Injecting,
    times: Times,
    request: pytest.FixtureRequest,
) -> None:
    servers: Servers = request.getfixturevalue(FIXTURES[product])
    ask = ASK[product]
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    url, reasons = {
        "wrong CA": (servers.url(servers.good, servers.stranger), ["certificate", servers.setting]),
        "CA not named": (servers.good, ["certificate", servers.setting]),
        "right CA, wrong host": (
            servers.url(servers.good, servers.authority).replace("127.0.0.1", "localhost"),
            ["certificate", "localhost"],
        ),
        "server without TLS": (servers.url(servers.plain, servers.authority), ["TLS"]),
        "CA file missing": (
            servers.url(servers.good, tmp_path / "missing.pem"),
            ["missing.pem", servers.setting],
        ),
        "no PEM": (servers.url(servers.good, junk), ["junk.pem", servers.setting]),
    }[fault]
    with injecting("TLS", f"{product}: {fault}") as ledger:
        for number in range(times(1, 20)):
            with ledger.injection(number):
                assert ask(servers.url(servers.good, servers.authority)), "the right CA is not accepted"
                words = refusal(ask, url)
                # A CA that cannot be read is found before any server is asked.
                if "CA file" not in words:
                    assert f"{urlsplit(url).hostname}:{urlsplit(url).port}" in words, words
                assert all(reason in words for reason in reasons), words
                with ledger.recovery():
                    assert ask(servers.url(servers.good, servers.authority))


def refusal(ask: Callable[[str], bool], url: str) -> str:
    """What the operator reads. A later try can succeed only where the server did not answer."""
    try:
        answer = ask(url)
    except PermanentFailure as failure:
        return str(failure)
    except PassingFailure as failure:
        assert "no answer" in failure.what, f"would be tried again: {failure}"
        return str(failure)
    raise AssertionError(f"it was accepted, encrypted: {answer}")
