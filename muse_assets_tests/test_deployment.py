"""A real installation as `deploy/` describes it: its README followed, its units run, its users' rights.

Here: what those files promise, on private servers and under a prefix. Not here: what the assets do.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dagster as dg
import pytest
import redis
from dagster import DagsterRunStatus
from dagster._core.scheduler.instigation import TickStatus
from dagster_graphql import DagsterGraphQLClient
from dagster_shared.yaml_utils import load_yaml_from_path
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.pool import NullPool

from muse_assets.automation import DAILY, DEPLOY, PLAYLISTS, REBUILD
from muse_assets.catalog import CATALOG
from muse_assets.connections.databases import engine_for
from muse_assets.durable_files import file_sha256
from muse_assets.sample import write_sample
from muse_assets.sample.further_days import write_days
from muse_assets.settings import Settings
from muse_assets_tests.certificates import Authority
from muse_assets_tests.faults.tools import require_tool
from muse_assets_tests.installations import DAY_ONE, DAY_TWO
from muse_assets_tests.servers import CANARY, execute, find_binary, free_port, private_mariadb, private_redis
from muse_assets_tests.systemd_units import Service, read_environment, read_unit

ROOT = Path(__file__).parent.parent
DEPLOY_FILES = ROOT / "deploy"
UNITS = ("code", "daemon", "webserver", "viewer")
INDEX = "artist"
PATIENCE_SECONDS = 120

# Every character that a URL, SQL or a shell takes for something else.
PASSWORDS = {
    f"{name.upper()}_PASSWORD": f"{CANARY}-{name}/@:%+ $#" for name in ("embedding", "playlist", "instance")
}
REDIS_PASSWORD = f"{CANARY}-redis/@:%+"
HTTP_PASSWORD = f"{CANARY}-operator"


# --- What the files say ---------------------------------------------------------------------------------


def test_the_instance_is_the_package_s_own_and_more() -> None:
    ours = load_yaml_from_path(str(DEPLOY_FILES / "dagster.yaml"))
    package = load_yaml_from_path(str(ROOT / "muse_assets/dagster.yaml"))
    assert isinstance(ours, dict) and isinstance(package, dict)

    assert differing(package, ours) == []
    assert ours["storage"] == {"mysql": {"mysql_url": {"env": "MUSE_INSTANCE_DB_URL"}}}
    assert ours["concurrency"]["runs"]["tag_concurrency_limits"]


def differing(wanted: Mapping[str, Any], given: Mapping[str, Any], at: str = "") -> list[str]:
    """Keys of `wanted` that `given` lacks or has with another value."""
    found = []
    for key, value in wanted.items():
        if isinstance(value, Mapping) and isinstance(given.get(key), Mapping):
            found += differing(value, given[key], f"{at}{key}.")
        elif given.get(key) != value:
            found.append(f"{at}{key}")
    return found


def test_the_example_names_every_setting_and_no_secret() -> None:
    example = (DEPLOY_FILES / "muse.env.example").read_text("utf-8")
    named = set(re.findall(r"^#? ?(MUSE_[A-Z_]+)=", example, re.MULTILINE))
    assert named == {f"MUSE_{name.upper()}" for name in Settings.model_fields}

    for file in (file for file in DEPLOY_FILES.rglob("*") if file.is_file()):
        words = re.findall(r"://[^:@/\s]*:([^@/\s]+)@", file.read_text("utf-8"))
        assert all(re.fullmatch(r"[A-Z]+_PASSWORD", word) for word in words), file


def test_grants_and_acl_are_the_catalog_s() -> None:
    granted = {
        table: {name.strip() for name in columns.split(",")}
        for columns, table in re.findall(
            r"GRANT SELECT \(([^)]+)\)\s+ON muse\.(\w+)", (DEPLOY_FILES / "mysql-grants.sql").read_text()
        )
    }
    assert granted == {
        spec.table: {"idx", spec.embedding_column, *spec.song_key, spec.created_at_column}
        for spec in CATALOG.indexes
    }
    songs = re.findall(r"GRANT SELECT ON muse\.(\w+)", (DEPLOY_FILES / "mysql-grants.sql").read_text())
    assert songs == [program.song_table for program in CATALOG.programs]


def test_compose_publishes_on_loopback_and_keeps_secrets_in_files() -> None:
    compose = load_yaml_from_path(str(DEPLOY_FILES / "compose.yaml"))
    assert isinstance(compose, dict)
    services: dict[str, Any] = compose["services"]

    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        named = {*service.get("environment", {})}
        assert not {key for key in named if "PASSWORD" in key} - {
            "MARIADB_PASSWORD_FILE",
            "MARIADB_RANDOM_ROOT_PASSWORD",
        }
        for needed in service.get("depends_on", {}):
            assert needed in services, name
        volumes = [volume.split(":")[0] for volume in service.get("volumes", []) if isinstance(volume, str)]
        assert set(volumes) <= set(compose["volumes"]), name
        for config in service.get("configs", []):
            assert (DEPLOY_FILES / compose["configs"][config["source"]]["file"]).is_file()
        ours = service.get("image") == "muse_assets"
        assert not ours or (
            service["user"] == "10001:10001" and service["read_only"] and service["cap_drop"] == ["ALL"]
        )
    # The stores' secrets: for the process that reads them, as with the units.
    assert [name for name, service in services.items() if "muse.env" in service.get("env_file", [])] == [
        "code"
    ]
    # The units' commands, but for the address.
    for name in UNITS:
        command = read_unit(DEPLOY_FILES / "systemd", f"muse-dagster-{name}.service").value("ExecStart")
        assert services[name]["command"].replace("-h 0.0.0.0", "-h 127.0.0.1") == command.replace(
            "/opt/muse/venv/bin/", ""
        )
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        subprocess.run(
            ["docker", "compose", "-f", DEPLOY_FILES / "compose.yaml", "config", "-q", "--no-env-resolution"],
            check=True,
        )


def test_the_image_holds_the_whole_package(tmp_path: Path) -> None:
    dockerfile = (DEPLOY_FILES / "Dockerfile").read_text("utf-8")
    allowed = (DEPLOY_FILES / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    for *sources, target in (
        line.split()[1:] for line in dockerfile.splitlines() if line.startswith("COPY ")
    ):
        for source in sources:
            assert f"!{source}" in allowed
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy2
            copy(ROOT / source, tmp_path / (target if target != "./" else source))
    assert re.search(r"^USER muse$", dockerfile, re.MULTILINE)
    assert "pip install '.[mysql,dask]'" in dockerfile

    # What pip does with the copied files, without the network.
    build = [sys.executable, "setup.py", "-q", "build", "-b", "built"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    built = tmp_path / "built/lib"
    package = ROOT / "muse_assets"
    wanted = {
        file.relative_to(ROOT) for file in package.rglob("*") if file.suffix in (".py", ".yaml", ".typed")
    }
    assert {file.relative_to(built) for file in built.rglob("*") if file.is_file()} == wanted


def test_the_readme_s_commands_are_shell_and_name_files_that_exist() -> None:
    text_ = (DEPLOY_FILES / "README.md").read_text("utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text_, re.DOTALL)
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    named = {name for name in re.findall(r"deploy/[\w./-]+", "".join(blocks)) if "$" not in name}
    made_there = {
        "deploy/instance.env",
        "deploy/muse.env",
        "deploy/secrets",
        "deploy/secrets/instance_password",
    }
    missing = [name for name in named - made_there if not (ROOT / name).exists()]
    assert missing == ["deploy/systemd/muse-dagster-"]  # "$unit" follows
    ignored = (DEPLOY_FILES / ".gitignore").read_text("utf-8").split()
    assert {"/instance.env", "/muse.env", "/secrets/"} <= set(ignored)


# --- An installation under a prefix -----------------------------------------------------------------------


@dataclass(frozen=True)
class Stores:
    """The databases and Redis as an administrator sees them. acl: Redis's file of users."""

    admin_url: str
    redis_admin_url: str

    def url(self, user: str, password: str, schema: str, driver: str = "pymysql") -> str:
        server = make_url(self.admin_url)
        secret = quote(PASSWORDS[password], safe="")
        return f"mysql+{driver}://{user}:{secret}@{server.host}:{server.port}/{schema}"

    @property
    def embedding_url(self) -> str:
        return self.url("muse_embeddings", "EMBEDDING_PASSWORD", "muse")

    @property
    def playlist_url(self) -> str:
        return self.url("muse_playlists", "PLAYLIST_PASSWORD", "muse")

    @property
    def instance_url(self) -> str:
        return self.url("muse_dagster", "INSTANCE_PASSWORD", "muse_dagster", "mysqlconnector")

    @property
    def redis_url(self) -> str:
        return self.redis_admin_url.replace(f":{CANARY}@", f"muse:{quote(REDIS_PASSWORD, safe='')}@")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """MariaDB with two days of the sample and deploy/mysql-grants.sql, Redis with deploy/redis.acl."""
    for name in ("mariadbd", "mariadb-install-db", "redis-server"):
        require_tool(name)
    folder = tmp_path_factory.mktemp("stores")
    acl = folder / "users.acl"
    line = (DEPLOY_FILES / "redis.acl").read_text("utf-8")
    line = line.replace("@SHA256_OF_THE_PASSWORD@", hashlib.sha256(REDIS_PASSWORD.encode()).hexdigest())
    acl.write_text(f"user default on >{CANARY} ~* &* +@all\n{line}", "utf-8")
    with private_mariadb(folder) as url, private_redis(folder / "redis", "--aclfile", str(acl)) as redis_url:
        engine = engine_for(url)
        write_sample(engine, engine, CATALOG, songs=200)
        write_days(engine, engine, CATALOG, days=1)
        execute(url, "CREATE TABLE tb_private (idx INT PRIMARY KEY)")
        grants = re.sub(r"^--.*$", "", (DEPLOY_FILES / "mysql-grants.sql").read_text("utf-8"), flags=re.M)
        grants = grants.replace("@MUSE_HOST@", "127.0.0.1")
        for name, password in PASSWORDS.items():
            grants = grants.replace(f"@{name}@", password)
        assert "@" not in re.sub(r"'[^']*'@'127.0.0.1'|BY '[^']*'", "", grants)
        server = create_engine(url, poolclass=NullPool)
        # By the driver's own cursor: the passwords hold colons and percent signs, which mean parameters.
        with server.connect() as connection, contextlib.closing(connection.connection.cursor()) as cursor:
            for statement in filter(str.strip, grants.split(";\n")):
                cursor.execute(statement)
        yield Stores(url, redis_url)


def test_the_database_users_can_do_what_they_need_and_no_more(stores: Stores) -> None:
    spec = CATALOG.index(INDEX)
    allowed = {
        stores.embedding_url: f"SELECT idx, {spec.embedding_column}, disccommseq FROM {spec.table} LIMIT 1",
        stores.playlist_url: "SELECT * FROM tb_song_drp_m LIMIT 1",
    }
    for url, statement in allowed.items():
        execute(url, statement)
    refused = {
        stores.embedding_url: (
            f"SELECT idx_mod_100 FROM {spec.table}",
            f"SELECT * FROM {spec.table}",
            f"DELETE FROM {spec.table}",
            f"UPDATE {spec.table} SET disccommseq = ''",
            f"INSERT INTO {spec.table} (idx) VALUES (0)",
            f"DROP TABLE {spec.table}",
            f"ALTER TABLE {spec.table} ADD COLUMN x INT",
            "CREATE TABLE tb_new (idx INT)",
            "SELECT * FROM tb_private",
            "SELECT * FROM tb_song_drp_m",
            "SELECT 1 FROM muse_dagster.runs",
            "SELECT * FROM mysql.user",
        ),
        stores.playlist_url: (
            "DELETE FROM tb_song_drp_m",
            "INSERT INTO tb_song_drp_m (disc_id, track_no) VALUES ('1', '1')",
            "SELECT * FROM tb_private",
            f"SELECT idx FROM {spec.table}",
        ),
        stores.instance_url.replace("mysqlconnector", "pymysql"): (
            f"SELECT idx FROM muse.{spec.table}",
            "SELECT * FROM muse.tb_song_drp_m",
            "CREATE DATABASE other",
        ),
    }
    for url, statements in refused.items():
        for statement in statements:
            with pytest.raises((OperationalError, ProgrammingError), match=r"denied"):
                execute(url, statement)


def test_the_redis_user_has_the_playlists_and_nothing_else(stores: Stores) -> None:
    with redis.Redis.from_url(stores.redis_admin_url) as admin:
        admin.acl_load()
        admin.set("session:1", "theirs")
    with redis.Redis.from_url(stores.redis_url) as client:
        client.set("playlist_idx:trying", "[]")
        refusals: tuple[Callable[[], Any], ...] = (
            lambda: client.get("session:1"),
            lambda: client.set("session:1", "ours"),
            lambda: client.delete("playlist_idx:trying"),
            lambda: client.expire("playlist_idx:trying", 1),
            lambda: client.keys("*"),
            client.flushall,
            lambda: client.config_get("*"),
            client.acl_whoami,
            lambda: client.publish("channel", "x"),
            lambda: client.eval("return 1", 0),
        )
        for refusal in refusals:
            with pytest.raises(redis.exceptions.NoPermissionError):
                refusal()
    with redis.Redis.from_url(stores.redis_admin_url) as admin:
        assert admin.get("session:1") == b"theirs"
        admin.delete("playlist_idx:trying", "session:1")


@dataclass
class Host:
    """A host whose /etc, /var, /srv, /run and /opt lie under `root`, set up by the README's own commands."""

    root: Path
    ports: dict[str, int]
    services: dict[str, Service] = field(default_factory=dict)

    def here(self, content: str) -> str:
        """With an installation's paths replaced by those under the prefix, and its ports by free ones."""
        content = content.replace("/opt/muse/venv/bin/", f"{Path(sys.executable).parent}/")
        content = re.sub(r"(?<![\w./-])/(etc|var|srv|run|usr/local)/", rf"{self.root}/\1/", content)
        for port, free in self.ports.items():
            content = re.sub(rf"(127\.0\.0\.1:|-p |listen ){port}\b", rf"\g<1>{free}", content)
        return content

    def commands(self, heading: str) -> str:
        """The commands of a section of the README, with the paths under the prefix."""
        sections = (DEPLOY_FILES / "README.md").read_text("utf-8").split("\n## ")
        (section,) = (found for found in sections if found.startswith(heading))
        return self.here("\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL)))

    def execute(self, commands: str) -> str:
        """Run shell commands; what they printed. `sudo` is nothing, `systemctl` is noted, not executed."""
        path = f"{self.root}/shims:{self.root}/usr/local/sbin:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=ROOT,
            env={"PATH": path, "HOME": str(self.root)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{commands}: {done.stdout}{done.stderr}"
        return done.stdout

    def perform(self, command: str) -> str:
        """Run one command of the README; `systemctl` starts and stops the units."""
        words = shlex.split(command)
        if words[:2] != ["sudo", "systemctl"]:
            return self.execute(command)
        verb, units = (
            words[2],
            [self.services[word.rpartition("-")[2]] for word in words[3:] if word[0] != "-"],
        )
        assert units and verb in ("enable", "start", "restart", "stop"), command
        for unit in units if verb in ("stop", "restart") else []:
            status = unit.stop(min(float(unit.unit.value("TimeoutStopSec")), PATIENCE_SECONDS))
            assert status == 0, f"{unit.unit.name} ended with {status}: {unit.tail()}"
        for unit in units if verb != "stop" else []:
            unit.start()
        return ""

    @property
    def noted(self) -> list[str]:
        return (self.root / "systemctl").read_text("utf-8").splitlines()

    @property
    def live(self) -> Path:
        """The file that the search server loads."""
        return self.root / "srv/muse/index" / CATALOG.index(INDEX).live_file

    @property
    def instance(self) -> contextlib.AbstractContextManager[dg.DagsterInstance]:
        return dg.DagsterInstance.from_config(str(self.root / "var/lib/muse/dagster"))


_SHIMS = {
    "sudo": 'exec "$@"',
    "systemctl": 'echo "$@" >> {root}/systemctl',
    # They make users and directories of a tree of its own when told its root.
    "systemd-sysusers": 'exec {systemd-sysusers} --root={root} "$@"',
    "systemd-tmpfiles": 'exec {systemd-tmpfiles} --root={root} "$@"',
    # The part of it that needs no systemd: umask, directory, settings.
    "systemd-run": """\
while [[ $1 == --* ]]; do
  case $1 in
    --property=UMask=*) umask "${{1#*=*=}}" ;;
    --property=WorkingDirectory=*) cd "${{1#*=*=}}" ;;
    --property=EnvironmentFile=*)
      while IFS= read -r line; do if [[ $line == [A-Z]*=* ]]; then export "$line"; fi; done < "${{1#*=*=}}" ;;
  esac
  shift
done
exec "$@\"""",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, stores: Stores) -> Iterator[Host]:
    """Sections 2, 4 and 5 of the README followed, the settings filled in, the instance's tables made."""
    root = tmp_path_factory.mktemp("h")
    found = Host(root, {port: free_port() for port in ("3000", "3001", "443", "8443")})
    (root / "shims").mkdir()
    tools = {name: require_tool(name) for name in ("systemd-sysusers", "systemd-tmpfiles")}
    for name, shim in _SHIMS.items():
        (root / "shims" / name).write_text("#!/bin/bash\n" + shim.format(root=root, **tools) + "\n", "utf-8")
        (root / "shims" / name).chmod(0o755)
    for heading in ("2. ", "4. ", "5. "):
        found.execute(found.commands(heading))
    assert found.noted == ["daemon-reload"]

    fill_in(root / "etc/muse/instance.env", MUSE_INSTANCE_DB_URL=stores.instance_url)
    fill_in(
        root / "etc/muse/muse.env",
        MUSE_EMBEDDING_DB_URL=stores.embedding_url,
        MUSE_PLAYLIST_DB_URL=stores.playlist_url,
        MUSE_REDIS_URL=stores.redis_url,
    )
    units = root / "etc/systemd/system"
    texts = [
        "etc/muse/instance.env",
        "etc/muse/muse.env",
        "etc/muse/workspace.yaml",
        "usr/local/sbin/muse-run",
    ]
    texts += [
        "var/lib/muse/dagster/dagster.yaml",
        *(str(unit.relative_to(root)) for unit in units.glob("*/*.conf")),
    ]
    for file in (*(root / name for name in texts), *units.glob("*.service")):
        file.write_text(found.here(file.read_text("utf-8")), "utf-8")
    for name in UNITS:
        unit = read_unit(units, f"muse-dagster-{name}.service")
        found.services[name] = Service(unit, root / "run", root / f"{name}.log")
    try:
        yield found
    finally:
        for service in found.services.values():
            service.kill()


def fill_in(file: Path, **values: str) -> None:
    """Replace the values of settings that the file has."""
    content = file.read_text("utf-8")
    for name, value in values.items():
        content, replaced = re.subn(rf"^{name}=.*$", lambda _: f"{name}={value}", content, flags=re.MULTILINE)  # noqa: B023
        assert replaced == 1, name
    file.write_text(content, "utf-8")


def test_the_readme_makes_the_directories_it_names(host: Host) -> None:
    made = {
        path: (host.root / path).stat().st_mode & 0o777
        for path in (
            "var/lib/muse",
            "srv/muse/index",
            "var/lib/muse/work",
            "etc/muse/muse.env",
            "etc/muse/instance.env",
        )
    }
    assert made == {
        "var/lib/muse": 0o750,
        "srv/muse/index": 0o755,
        "var/lib/muse/work": 0o750,
        "etc/muse/muse.env": 0o600,
        "etc/muse/instance.env": 0o600,
    }
    (user,) = (
        line for line in (host.root / "etc/passwd").read_text().splitlines() if line.startswith("muse:")
    )
    assert user.endswith("/nologin")
    if os.geteuid() == 0:
        assert (host.root / "srv/muse/index").stat().st_uid == int(user.split(":")[2])


def test_systemd_accepts_the_units_and_their_sandbox(host: Host) -> None:
    analyze = require_tool("systemd-analyze")
    units = host.root / "etc/systemd/system"
    for name in UNITS:
        unit = units / f"muse-dagster-{name}.service"
        verified = subprocess.run(
            [analyze, "verify", unit], capture_output=True, text=True, timeout=30, check=False
        )
        # It knows this machine's users.
        complaints = [line for line in verified.stderr.splitlines() if "muse" in line]
        assert verified.returncode == 0 and not complaints, verified.stderr
        # 0 is safe, 100 is exposed; a unit without any of it has 96.
        subprocess.run(
            [analyze, "security", "--offline=yes", "--threshold=20", unit],
            check=True,
            capture_output=True,
            timeout=30,
        )
        settings = read_unit(units, unit.name)
        assert settings.value("User") == "muse" and settings.value("ProtectSystem") == "strict"
        assert not settings.values("Environment")  # a unit file is readable for all
        assert settings.value("KillMode") == "mixed" and float(settings.value("TimeoutStopSec")) >= 30
        reads_stores = any(file.endswith("/muse.env") for file in settings.values("EnvironmentFile"))
        assert reads_stores == (name == "code")


# --- The installation at work -----------------------------------------------------------------------------


def test_nginx_accepts_the_proxy(host: Host) -> None:
    nginx = require_tool("nginx")
    configuration = proxy_configuration(host)
    done = subprocess.run([nginx, "-t", "-c", configuration], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_units_build_deploy_and_cache_and_repeat_nothing_after_a_restart(
    host: Host, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in read_environment(host.root / "etc/muse/instance.env").items():
        monkeypatch.setenv(name, value)
    migrate, start, *look = host.commands("6. ").splitlines()
    host.perform(migrate)
    host.perform(start)
    songs = create_engine(stores.admin_url, poolclass=NullPool).connect()
    with songs, host.instance as instance:
        # Both at once: the pool lets one work on the index at a time, so the second day follows the first.
        lane = [[INDEX, step] for step in ("cluster", "index", "deployed")]
        rebuild = launch(host, REBUILD, lane, DAY_ONE)
        daily = launch(host, DAILY, [[INDEX, "index"]], DAY_TWO)
        if find_binary("nginx"):  # without it the test above is loud
            check_proxy(host)
        for command in look:
            assert host.perform(command) or "info" not in command
        # The first playlist run waits for these, so one is at work when the code location is told to end.
        tables = ", ".join(f"{program.song_table} WRITE" for program in CATALOG.programs)
        songs.execute(text(f"LOCK TABLES {tables}"))
        wait_until(host, "the rebuild succeeds", lambda: succeeded(instance, rebuild))
        wait_until(host, "the second day is built", lambda: succeeded(instance, daily))
        built = built_sha(instance, DAY_TWO)
        assert built != built_sha(instance, DAY_ONE)
        wait_until(host, "it is live", lambda: host.live.exists() and file_sha256(host.live) == built)
        wait_until(host, "a playlist is being refreshed", lambda: bool(working(instance)))

        stop_daemon, stop_code, upgrade, migrate, *start_again = host.commands("Upgrading").splitlines()
        host.perform(stop_daemon)
        under_way = working(instance)
        threading.Timer(2, songs.close).start()
        host.perform(stop_code)
        # Running runs ended, and none was killed.
        assert under_way and all(succeeded(instance, run) for run in under_way), under_way
        assert "pip install --upgrade" in upgrade
        for command in start_again:
            host.perform(command)
        restarted = datetime.now(UTC).timestamp()
        programs = len(CATALOG.programs)
        wait_until(host, "the playlists are refreshed", lambda: len(refreshed(instance)) == programs)
        wait_until(host, "the sensor finds nothing new", lambda: nothing_new(instance, restarted))
        runs = instance.get_runs()
        assert {run.status for run in runs} == {DagsterRunStatus.SUCCESS}
        wanted = [REBUILD, DAILY, DEPLOY, *[PLAYLISTS] * programs]
        assert sorted(run.job_name for run in runs) == sorted(wanted)
        assert file_sha256(host.live) == built
    with redis.Redis.from_url(stores.redis_admin_url) as client:
        assert {key.decode() for key in client.keys("playlist_*")} == {
            key
            for program in CATALOG.programs
            for key in (
                program.update_key,
                program.meta_key,
                *(program.ids_key(spec.name) for spec in CATALOG.indexes),
            )
        }
    assert host.live.stat().st_mode & 0o777 == 0o644
    assert not holding_secrets(host, stores)


def launch(host: Host, job: str, assets: list[list[str]], day: str) -> str:
    """Launch a job's assets in the running webserver; the run's id."""
    wait_until(host, "the webserver answers", lambda: listening(host.ports["3000"]))
    client = DagsterGraphQLClient("127.0.0.1", port_number=host.ports["3000"])
    return client.submit_job_execution(
        job,
        repository_location_name="muse_assets",
        tags={"dagster/partition": day},
        asset_selection=[dg.AssetKey(key) for key in assets],
    )


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def succeeded(instance: dg.DagsterInstance, run_id: str) -> bool:
    run = instance.get_run_by_id(run_id)
    assert run is not None and run.status not in (DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED), run
    return run.status is DagsterRunStatus.SUCCESS


def working(instance: dg.DagsterInstance) -> list[str]:
    """Ids of the playlist runs that a process executes now."""
    statuses = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED]
    return [run.run_id for run in instance.get_runs(dg.RunsFilter(job_name=PLAYLISTS, statuses=statuses))]


def refreshed(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    wanted = dg.RunsFilter(job_name=PLAYLISTS, statuses=[DagsterRunStatus.SUCCESS])
    return list(instance.get_runs(wanted))


def built_sha(instance: dg.DagsterInstance, day: str) -> str:
    """Of the day's materialization of the index."""
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey([INDEX, "index"]), asset_partitions=[day])
    (record,) = instance.fetch_materializations(wanted, limit=1).records
    materialization = record.asset_materialization
    assert materialization is not None
    return str(materialization.metadata["sha256"].value)


def nothing_new(instance: dg.DagsterInstance, since: float) -> bool:
    """Whether the deploy sensor has looked since then and found that all is done."""
    for state in instance.all_instigator_state():
        if state.instigator_name == "deploy_new_builds":
            ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id, after=since, limit=1)
            return any(
                tick.status is TickStatus.SKIPPED and str(tick.skip_reason).startswith("nothing new")
                for tick in ticks
            )
    return False


def wait_until(host: Host, what: str, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        if time.monotonic() > deadline:
            tails = "\n".join(f"--- {name}: {service.tail()}" for name, service in host.services.items())
            pytest.fail(f"in {PATIENCE_SECONDS} s it did not come that {what}\n{tails}")
        time.sleep(0.3)


def proxy_configuration(host: Host) -> Path:
    """A whole nginx configuration around deploy/nginx.conf, with certificate and passwords in place."""
    folder = host.root / "etc/nginx/muse"
    folder.mkdir(parents=True, exist_ok=True)
    made = Authority(folder, "ca").certificate("server", "127.0.0.1")
    assert (made.certificate.name, made.key.name) == ("server.crt", "server.key")
    hashed = subprocess.run(
        ["openssl", "passwd", "-6", "-stdin"], input=HTTP_PASSWORD, capture_output=True, text=True, check=True
    ).stdout.strip()
    for name in ("operator", "viewer"):
        (folder / f"{name}s.htpasswd").write_text(f"{name}:{hashed}\n", "utf-8")
    whole = folder / "whole.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    whole.write_text(
        f"{'user root;' if os.geteuid() == 0 else ''} pid {folder}/nginx.pid; error_log stderr;"
        f" events {{}} http {{ access_log off; {temporary}\n"
        f"{host.here((DEPLOY_FILES / 'nginx.conf').read_text('utf-8'))} }}\n",
        "utf-8",
    )
    return whole


def check_proxy(host: Host) -> None:
    """People reach the UI by TLS and password alone; viewers launch nothing; live logs come through."""
    configuration = proxy_configuration(host)
    command = [require_tool("nginx"), "-c", str(configuration), "-g", "daemon off;"]
    trusting = ssl.create_default_context(cafile=configuration.parent / "ca.pem")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as nginx:
        try:
            wait_until(host, "nginx and both pages answer", lambda: answers(host, trusting))
            for port in ("443", "8443"):
                assert ask(host, trusting, port, None)[0] == 401
                assert ask(host, trusting, port, "somebody")[0] == 401
            assert ask(host, trusting, "443", "viewer")[0] == 401
            launching = 'mutation { terminateRun(runId: "none") { __typename } }'
            assert "RunNotFoundError" in ask(host, trusting, "443", "operator", launching)[1]
            assert "UnauthorizedError" in ask(host, trusting, "8443", "viewer", launching)[1]
            assert upgraded(host, trusting).startswith(b"HTTP/1.1 101 ")
        finally:
            nginx.terminate()


def answers(host: Host, trusting: ssl.SSLContext) -> bool:
    pages = (("443", "operator"), ("8443", "viewer"))
    with contextlib.suppress(OSError):
        return all(ask(host, trusting, *page)[0] == 200 for page in pages)
    return False


def ask(
    host: Host, trusting: ssl.SSLContext, port: str, user: str | None, query: str = "{ version }"
) -> tuple[int, str]:
    """Status and text of a GraphQL query through the proxy."""
    request = urllib.request.Request(
        f"https://127.0.0.1:{host.ports[port]}/graphql",
        json.dumps({"query": query}).encode(),
        {"Content-Type": "application/json"} | ({"Authorization": basic(user)} if user else {}),
    )
    try:
        with urllib.request.urlopen(request, timeout=30, context=trusting) as answer:  # noqa: S310 - https above
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def basic(user: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{HTTP_PASSWORD}".encode()).decode()


def upgraded(host: Host, trusting: ssl.SSLContext) -> bytes:
    """The answer to a browser that asks for a WebSocket."""
    key = base64.b64encode(b"0123456789abcdef").decode()
    lines = [
        *("GET /graphql HTTP/1.1", "Host: 127.0.0.1", "Upgrade: websocket", "Connection: Upgrade"),
        *("Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Protocol: graphql-ws"),
        *(f"Authorization: {basic('operator')}", "", ""),
    ]
    address = ("127.0.0.1", host.ports["443"])
    with (
        socket.create_connection(address, timeout=30) as plain,
        trusting.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall("\r\n".join(lines).encode())
        return connection.recv(4096)


def holding_secrets(host: Host, stores: Stores) -> list[str]:
    """Where a password is: files but for the two settings files, command lines, the instance's tables."""
    settings = {host.root / "etc/muse/muse.env", host.root / "etc/muse/instance.env"}
    found = [
        str(file)
        for file in host.root.rglob("*")
        if file.is_file() and file not in settings and CANARY.encode() in file.read_bytes()
    ]
    sessions = {service.pid for service in host.services.values()}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                os.getsid(int(process.name)) in sessions
                and CANARY.encode() in (process / "cmdline").read_bytes()
            ):
                found.append(str(process))
    of_instance = text(
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'muse_dagster'"
    )
    with create_engine(stores.admin_url, poolclass=NullPool).connect() as connection:
        columns = connection.execute(of_instance).all()
        assert columns
        for table, column in columns:
            query = text(f"SELECT COUNT(*) FROM muse_dagster.`{table}` WHERE `{column}` LIKE :secret")
            if connection.execute(query, {"secret": f"%{CANARY}%"}).scalar():
                found.append(f"{table}.{column}")
    return found
