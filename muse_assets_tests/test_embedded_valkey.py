"""The embedded Valkey: shared, persistent, and gone with its last user, however users die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from muse_assets.connections.embedded_valkey import embedded_valkey
from muse_assets.connections.redis_server import connect
from muse_assets.failures import PassingFailure, PermanentFailure

# Prints the server's process id once it has the server, then holds it until a line comes in.
USER = """
import sys
from pathlib import Path
from muse_assets.connections.embedded_valkey import embedded_valkey
from muse_assets.connections.redis_server import connect
with embedded_valkey(Path(sys.argv[1])) as url:
    print(connect(url).info("server")["process_id"], flush=True)
    sys.stdin.readline()
"""


def start_user(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def server_of(user: subprocess.Popen[str]) -> int:
    assert user.stdout is not None
    return int(user.stdout.readline())


def leave(user: subprocess.Popen[str]) -> None:
    user.communicate("leave\n", timeout=30)
    assert user.returncode == 0


def server_id(url: str) -> int:
    return int(connect(url).info("server")["process_id"])


def runs(pid: int) -> bool:
    """A server that ended may wait as a zombie where nothing reaps adopted processes."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_ended(pid: int) -> None:
    deadline = time.monotonic() + 5
    while runs(pid):
        assert time.monotonic() < deadline, f"server {pid} still runs"
        time.sleep(0.01)


def test_processes_starting_together_share_one_server_and_the_last_stops_it(tmp_path: Path) -> None:
    users = [start_user(tmp_path) for _ in range(3)]
    servers = {server_of(user) for user in users}
    assert len(servers) == 1
    (server,) = servers
    for user in users[:-1]:
        leave(user)
        assert runs(server)
    leave(users[-1])
    assert_ended(server)


def test_data_survive_the_server(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path / "무스") as url:
        connect(url).set("제목", "드라이브 뮤직")
        first = server_id(url)
    assert_ended(first)
    with embedded_valkey(tmp_path / "무스") as url:
        assert server_id(url) != first
        assert connect(url).get("제목") == "드라이브 뮤직".encode()


def test_the_server_has_no_tcp_port_and_is_private(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path / "valkey") as url:
        assert connect(url).config_get("port") == {"port": "0"}
    assert (tmp_path / "valkey").stat().st_mode & 0o077 == 0


def test_a_killed_user_leaves_the_server_to_the_next(tmp_path: Path) -> None:
    killed = start_user(tmp_path)
    server = server_of(killed)
    killed.kill()
    killed.communicate()
    assert runs(server)
    with embedded_valkey(tmp_path) as url:
        assert server_id(url) == server
    assert_ended(server)


def test_a_killed_server_is_replaced_with_its_data(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        connect(url).set("key", "value")
        time.sleep(1.2)  # the append-only file is fsynced once a second
        killed = server_id(url)
        os.kill(killed, 9)
        assert_ended(killed)
        with embedded_valkey(tmp_path) as again:
            assert again == url
            assert connect(url).get("key") == b"value"


def test_users_coming_and_going_never_meet_a_stopped_server(tmp_path: Path) -> None:
    def come_and_go(number: int) -> None:
        for turn in range(15):
            with embedded_valkey(tmp_path) as url, redis.Redis.from_url(url, retry=None) as client:
                client.incr("visits")
                client.set(f"{number}:{turn}", "x")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    with embedded_valkey(tmp_path) as url:
        assert connect(url).get("visits") == b"60"
        assert connect(url).dbsize() == 61


@pytest.mark.parametrize("length", [20, 101, 150])
def test_a_socket_path_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("t")))
    with embedded_valkey(tmp_path / ("d" * length)) as url:
        connect(url).set("key", "value")
        socket = Path(url.removeprefix("unix://"))
        assert len(os.fsencode(socket)) <= 107
        assert socket.parent.stat().st_mode & 0o077 == 0


def test_a_socket_folder_open_to_others_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("t")))
    directory = tmp_path / ("d" * 120)
    with embedded_valkey(directory) as url:
        folder = Path(url.removeprefix("unix://")).parent
    folder.chmod(0o777)
    with pytest.raises(PermanentFailure, match=folder.name), embedded_valkey(directory):
        pass


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        connect(url).set("key", "value")
    (manifest,) = (tmp_path / "appendonlydir").glob("*.manifest")
    manifest.write_text("nonsense\n")
    started = time.monotonic()
    with pytest.raises(PassingFailure, match="manifest") as failed, embedded_valkey(tmp_path):
        pass
    assert "valkey.log" in failed.value.next_step
    assert time.monotonic() - started < 10


def test_an_error_of_the_user_is_not_hidden_and_the_server_stops(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), embedded_valkey(tmp_path) as url:
        server = server_id(url)
        raise KeyError("mine")
    assert_ended(server)
