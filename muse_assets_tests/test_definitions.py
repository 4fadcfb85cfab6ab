"""What Dagster loads: that it can, what every asset says of itself, who imports whom, and no secrets."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster_shared.yaml_utils import load_yaml_from_path
from sqlalchemy.engine import make_url

import muse_assets
from muse_assets.catalog import CATALOG
from muse_assets.definitions import build_defs
from muse_assets.settings import Settings
from muse_assets.snapshots.gate import DESCRIPTIONS
from muse_assets_tests.installations import DAY_ONE, Installation, hurry_retries, install

PACKAGE = Path(muse_assets.__file__).parent
ROOT = PACKAGE.parent
CANARY = "canary-7f3a9"


@pytest.fixture(scope="module")
def defs(tmp_path_factory: pytest.TempPathFactory) -> dg.Definitions:
    return build_defs(Settings(home=tmp_path_factory.mktemp("home")))


def test_dagster_can_load_all_of_it(defs: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(defs)


def test_every_way_to_load_it_names_the_same_module_and_location() -> None:
    workspaces = load_yaml_from_path(str(ROOT / "workspace.yaml"))
    assert isinstance(workspaces, dict)
    (entry,) = workspaces["load_from"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    workspace, tool, dg_project = entry["python_module"], project["dagster"], project["dg"]["project"]

    assert workspace["module_name"] == tool["module_name"] == dg_project["code_location_target_module"]
    assert workspace["location_name"] == tool["code_location_name"] == dg_project["code_location_name"]
    assert isinstance(importlib.import_module(workspace["module_name"]).defs, dg.Definitions)


def test_the_graph_is_seven_lanes_and_what_is_below_them(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    lanes = {
        f"{spec.name}/{step}"
        for spec in CATALOG.indexes
        for step in ("table", "cluster", "index", "deployed")
    }

    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == lanes | {
        "playlist_cache",
        "program_songs",
        "server_reload",
    }
    assert {key.to_user_string() for key in graph.external_asset_keys} == {
        "program_songs",
        *(f"{spec.name}/table" for spec in CATALOG.indexes),
    }
    deployed = {dg.AssetKey([spec.name, "deployed"]) for spec in CATALOG.indexes}
    assert graph.get(dg.AssetKey("server_reload")).parent_keys == deployed
    assert graph.get(dg.AssetKey("playlist_cache")).parent_keys == {*deployed, dg.AssetKey("program_songs")}


@pytest.mark.parametrize("spec", CATALOG.indexes, ids=lambda spec: spec.name)
def test_a_lane_says_what_it_is(defs: dg.Definitions, spec: Any) -> None:
    graph = defs.resolve_asset_graph()
    table, cluster, index, deployed = (
        graph.get(dg.AssetKey([spec.name, step])) for step in ("table", "cluster", "index", "deployed")
    )

    assert {node.group_name for node in (table, cluster, index, deployed)} == {spec.name}
    assert table.kinds == {"mysql", "table"}
    assert cluster.kinds == index.kinds == {"faiss", "python"}
    assert deployed.kinds == {"faiss", "file"}
    assert cluster.parent_keys == {table.key}
    assert index.parent_keys == {table.key, cluster.key}
    assert deployed.parent_keys == {index.key}
    assert {node.pools == {f"index_{spec.name}"} for node in (cluster, index, deployed)} == {True}
    assert isinstance(index.partitions_def, dg.DailyPartitionsDefinition)
    assert (index.partitions_def.timezone, index.partitions_def.end_offset) == ("Asia/Seoul", 1)
    assert {node.partitions_def for node in (table, cluster, deployed)} == {None}
    assert {key.name for key in index.check_keys} == set(DESCRIPTIONS)
    assert spec.table in str(table.description)
    assert spec.cluster_file in str(cluster.description)
    assert f"muse_{spec.name}_<YYYYMMDD>.index" in str(index.description)
    assert spec.live_file in str(deployed.description)
    assert table.metadata["dagster/table_name"] == spec.table
    columns = [column.name for column in table.metadata["dagster/column_schema"].columns]
    assert columns == ["idx", *spec.song_key, spec.embedding_column, spec.created_at_column]


def test_every_asset_has_an_owner_a_description_and_a_code_version(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.owners == ["team:music-search"], key
        assert len(node.description or "") > 40, key
        assert node.is_external or node.code_version, key
        assert node.kinds, key


def test_the_playlists_have_one_partition_a_program(defs: dg.Definitions) -> None:
    node = defs.resolve_asset_graph().get(dg.AssetKey("playlist_cache"))
    assert node.partitions_def
    assert node.partitions_def.get_partition_keys() == [program.id for program in CATALOG.programs]


@pytest.mark.parametrize(
    ("automation", "status"), [(None, "STOPPED"), ("stopped", "STOPPED"), ("running", "RUNNING")]
)
def test_automation_runs_only_where_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, automation: str | None, status: str
) -> None:
    monkeypatch.delenv("MUSE_AUTOMATION", raising=False)
    if automation:
        monkeypatch.setenv("MUSE_AUTOMATION", automation)
    defs = build_defs(Settings(home=tmp_path))
    assert defs.resolve_schedule_def("daily_1658").default_status.value == status
    for sensor in ("deploy_new_builds", "retrain_drifted"):
        assert defs.resolve_sensor_def(sensor).default_status.value == status


# --- layers ------------------------------------------------------------------------------------------

# A module may import from lower ranks and from its own package; two packages of one rank ignore each other.
RANKS = {
    "failures": 0,
    "seoul_time": 0,
    "catalog": 1,
    "durable_files": 1,
    "connections": 2,
    "sealed_json": 2,
    "settings": 2,
    "manifest": 3,
    "embeddings": 3,
    "ivfpq": 3,
    "playlists": 5,
    "publishing": 4,
    "server_search": 4,
    "partitions": 4,
    "sample": 4,
    "snapshots": 5,
    "dated_logs": 5,
    "resources": 6,
    "assets": 7,
    "automation": 8,
    "alerts": 8,
    "definitions": 9,
    "cli": 10,
    "code_server": 10,
}
# Third party -> the only parts that may know it.
KNOWN_TO = {
    "dagster": {
        "partitions",
        "resources",
        "assets",
        "automation",
        "alerts",
        "definitions",
        "cli",
        "code_server",
    },
    "faiss": {"ivfpq", "server_search", "cli"},
    "sqlalchemy": {
        "connections",
        "embeddings",
        "playlists",
        "snapshots",
        "sample",
        "server_search",
        "resources",
        "cli",
    },
    "redis": {"connections", "playlists", "resources", "cli"},
    "click": {"cli"},
    "rich": {"cli"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """The part of the package that each module belongs to, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path


def imported(path: Path) -> set[str]:
    """Absolute names of every module imported anywhere in the file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_part_has_its_place() -> None:
    assert {part for part, _ in modules()} == set(RANKS)


def test_arrows_point_down_only() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for part, path in modules()
        for name in imported(path)
        if name.startswith("muse_assets.")
        for other in (name.split(".")[1],)
        if other != part and RANKS[other] >= RANKS[part]
    ]
    assert found == []


def test_each_part_knows_its_own_libraries_only() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for part, path in modules()
        for name in imported(path)
        if part not in KNOWN_TO.get(name.split(".")[0], {part})
    ]
    assert found == []


def test_only_the_command_line_knows_the_sample() -> None:
    users = {
        part for part, path in modules() for name in imported(path) if name.startswith("muse_assets.sample")
    }
    assert users <= {"sample", "cli"}


def test_nothing_unpickles() -> None:
    for _, path in modules():
        assert not any(
            re.match(r"(pickle|cloudpickle|dill|joblib|shelve)\b", name) for name in imported(path)
        )
        assert "allow_pickle=True" not in path.read_text("utf-8")


# --- secrets -----------------------------------------------------------------------------------------


@pytest.fixture
def secret_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Every setting that may hold a secret, set to a server that is not there."""
    urls = {
        "MUSE_EMBEDDING_DB_URL": f"mysql+pymysql://muse:{CANARY}@127.0.0.1:1/muse",
        "MUSE_PLAYLIST_DB_URL": f"mysql+pymysql://muse:{CANARY}@127.0.0.1:1/backup",
        "MUSE_REDIS_URL": f"redis://muse:{CANARY}@127.0.0.1:1/0",
        "MUSE_RELOAD": f"http://muse:{CANARY}@127.0.0.1:1/restart?token={CANARY}",
        "MUSE_RELOAD_HEALTH": f"http://127.0.0.1:1/health?token={CANARY}",
    }
    for name, url in {**urls, "MUSE_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, url)
    return urls


def test_what_dagster_serializes_holds_names_of_secrets_only(secret_urls: dict[str, str]) -> None:
    settings = Settings()
    serialized = dg.serialize_value(RepositorySnap.from_def(build_defs(settings).get_repository_def()))

    assert CANARY not in serialized
    assert CANARY not in repr(settings)
    assert [name for name in secret_urls if name not in serialized] == []


def test_a_variable_in_lower_case_is_a_secret_too(
    secret_urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, url in {**secret_urls, "MUSE_ALERT_URL": f"https://hooks.example/{CANARY}"}.items():
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name.lower(), url)
    settings = Settings()
    assert CANARY in settings.embedding_url()
    assert CANARY not in dg.serialize_value(
        RepositorySnap.from_def(build_defs(settings).get_repository_def())
    )


def test_failing_runs_leave_no_secret(
    secret_urls: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hurry_retries(monkeypatch)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        installation = Installation(Settings(), instance)
        ran = [
            installation.run("rebuild", "artist/cluster", partition=DAY_ONE, log_level="DEBUG"),
            installation.run("playlists", partition="drp", log_level="DEBUG"),
        ]
        assert [r.success for r in ran] == [False, False]
        for one in ran:
            assert "127.0.0.1:1" in one.failure
            assert "\nNext: " in one.failure
            assert one.retries == 2
        recorded = _all_that_is_recorded(instance)
    shown = "".join(capfd.readouterr())
    assert "Can't connect" in shown
    assert CANARY not in shown
    assert CANARY not in recorded
    assert not _files_with_canary(tmp_path)


def test_a_refused_password_is_not_repeated(
    mariadb_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(
        "MUSE_EMBEDDING_DB_URL",
        make_url(mariadb_url).set(username="nobody", password=CANARY).render_as_string(hide_password=False),
    )
    monkeypatch.setenv("MUSE_HOME", str(tmp_path / "home"))
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        ran = Installation(Settings(), instance).run(
            "rebuild", "artist/cluster", partition=DAY_ONE, log_level="DEBUG"
        )
        assert "Access denied for user 'nobody'" in ran.failure
        assert "\nNext: correct the user or password in the URL variable." in ran.failure
        assert ran.retries == 0
        assert CANARY not in _all_that_is_recorded(instance)
    assert CANARY not in "".join(capfd.readouterr())
    assert not _files_with_canary(tmp_path)


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (f"http://127.0.0.1:1/restart?token={CANARY}", "POST http://127.0.0.1:1/restart: "),
        (f"http://muse:{CANARY}@127.0.0.1:1/restart", "MUSE_RELOAD is neither a command nor"),
    ],
)
def test_a_failing_reload_does_not_repeat_its_token(
    monkeypatch: pytest.MonkeyPatch,
    valkey_url: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    hook: str,
    said: str,
) -> None:
    monkeypatch.setenv("MUSE_RELOAD", hook)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        installation = install(
            tmp_path / "home",
            instance,
            embedding_db_url=f"sqlite:///{tmp_path / 'embeddings.sqlite'}",
            playlist_db_url=f"sqlite:///{tmp_path / 'playlists.sqlite'}",
            redis_url=valkey_url,
            only=["artist"],
        )
        installation.rebuild("artist")
        ran = installation.run("reload", log_level="DEBUG")
        assert said in ran.failure
        assert CANARY not in _all_that_is_recorded(instance)
    assert CANARY not in "".join(capfd.readouterr())
    assert not _files_with_canary(tmp_path)


def _all_that_is_recorded(instance: dg.DagsterInstance) -> str:
    """Runs, their configuration and their events: the storage holds some of it compressed."""
    runs = instance.get_runs()
    assert runs
    parts: list[Any] = [*runs, *(event for run in runs for event in instance.all_logs(run.run_id))]
    parts += [instance.get_job_snapshot(run.job_snapshot_id) for run in runs if run.job_snapshot_id]
    return "\n".join(dg.serialize_value(part) for part in parts)


def _files_with_canary(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if CANARY.encode() in path.read_bytes()]
