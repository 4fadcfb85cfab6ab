"""A whole installation for tests of the Dagster layer: sample tables, directories, an instance, real runs.

Here: setting one up, running its assets in this process, and reading what a run left. Not here: servers
(`servers.py`) or what should hold (the tests).
"""

from __future__ import annotations

import importlib.resources
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import redis
from sqlalchemy import Engine, text

from muse_assets.catalog import CATALOG, Catalog, IndexSpec
from muse_assets.connections.databases import engine_for
from muse_assets.definitions import build_defs
from muse_assets.durable_files import file_sha256
from muse_assets.sample import write_sample
from muse_assets.settings import Settings

DAY_ONE, DAY_TWO, DAY_THREE = "2026-01-01", "2026-01-02", "2026-01-03"


@dataclass(frozen=True)
class Ran:
    """One run and what it recorded."""

    result: dg.ExecuteInProcessResult

    @property
    def success(self) -> bool:
        return self.result.success

    @property
    def failure(self) -> str:
        """What the operator reads of the first failed step; empty if none failed."""
        for event in self.result.all_events:
            if event.is_step_failure:
                shown = event.step_failure_data.user_failure_data
                return str(shown.description) if shown else f"NO FAILURE: {event.step_failure_data.error}"
        return "" if self.success else "no step failed, yet the run did"

    @property
    def retries(self) -> int:
        return sum(event.is_step_restarted for event in self.result.all_events)

    @property
    def materialized(self) -> list[str]:
        """Asset keys, in the order of their events."""
        events = self.result.get_asset_materialization_events()
        return [event.asset_key.to_user_string() for event in events if event.asset_key]

    @property
    def checks(self) -> dict[str, bool]:
        """Check name -> whether it passed."""
        return {check.check_name: check.passed for check in self.result.get_asset_check_evaluations()}

    def metadata(self, asset: str) -> dict[str, Any]:
        """Metadata values of the asset's materialization."""
        for event in self.result.get_asset_materialization_events():
            if event.asset_key == dg.AssetKey.from_user_string(asset):
                return {name: value.value for name, value in event.materialization.metadata.items()}
        raise KeyError(f"{asset} was not materialized: {self.failure}")


@dataclass(frozen=True)
class Installation:
    """Settings, the definitions made from them, and the instance that remembers the runs."""

    settings: Settings
    instance: dg.DagsterInstance

    @cached_property
    def defs(self) -> dg.Definitions:
        return build_defs(self.settings)

    @cached_property
    def catalog(self) -> Catalog:
        return self.settings.load_catalog()

    @property
    def embeddings(self) -> Engine:
        return engine_for(self.settings.embedding_url())

    @property
    def playlists(self) -> Engine:
        return engine_for(self.settings.playlist_url())

    @property
    def work(self) -> Path:
        return self.settings.work_directory()

    @property
    def server(self) -> Path:
        return self.settings.server_directory()

    def with_settings(self, **changed: Any) -> Installation:
        """The same instance under other settings, as after a restart of the code location."""
        given = {name: getattr(self.settings, name) for name in self.settings.model_fields_set}
        return Installation(Settings(**(given | changed)), self.instance)

    def run(
        self,
        job: str,
        *assets: str,
        partition: str | None = None,
        config: dict[str, dict[str, Any]] | None = None,
        log_level: str = "CRITICAL",
    ) -> Ran:
        """Run `assets` of a job; config: asset -> its configuration; log_level: of the console."""
        ops = {name.replace("/", "__"): {"config": values} for name, values in (config or {}).items()}
        result = self.defs.resolve_job_def(job).execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey.from_user_string(name) for name in assets] or None,
            partition_key=partition,
            run_config={"ops": ops, "loggers": {"console": {"config": {"log_level": log_level}}}},
            raise_on_error=False,
        )
        return Ran(result)

    def rebuild(self, index: str, day: str = DAY_ONE) -> Ran:
        """Train, build and deploy one index; fails the test unless all of it succeeds."""
        ran = self.run(
            "rebuild", *(f"{index}/{step}" for step in ("cluster", "index", "deployed")), partition=day
        )
        assert ran.success, ran.failure
        return ran

    def build(self, index: str, day: str, **config: Any) -> Ran:
        return self.run("daily", f"{index}/index", partition=day, config={f"{index}/index": config})

    def deploy(self, index: str, **config: Any) -> Ran:
        return self.run("deploy", f"{index}/deployed", config={f"{index}/deployed": config})

    def cache(self, program: str, **config: Any) -> Ran:
        return self.run("playlists", partition=program, config={"playlist_cache": config})

    def execute(self, *statements: str) -> None:
        """Run SQL on the embedding database."""
        with self.embeddings.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def table_ids(self, index: str) -> set[int]:
        """The FAISS ids that the index's table stands for."""
        spec = self.catalog.index(index)
        with self.embeddings.connect() as connection:
            return {row[0] - 1 for row in connection.execute(text(f"SELECT idx FROM {spec.table}"))}

    def server_files(self) -> dict[str, str]:
        """Name -> sha256 of what the search server may load."""
        return {path.name: file_sha256(path) for path in sorted(self.server.glob("*.index"))}

    def redis_values(self) -> dict[str, bytes | None]:
        """Every key of the Redis database."""
        with redis.Redis.from_url(self.settings.redis_address()) as client:
            keys = sorted(client.keys())
            return {key.decode(): client.get(key) for key in keys}

    def temp_files(self) -> list[Path]:
        """What a failed run should not leave behind."""
        return [path for folder in (self.work, self.server) for path in folder.rglob(".*.part")]


def install(
    home: Path,
    instance: dg.DagsterInstance,
    *,
    embedding_db_url: str,
    playlist_db_url: str,
    redis_url: str,
    songs: int = 200,
    only: Sequence[str] = (),
    **settings: Any,
) -> Installation:
    """An installation with day one of the sample in its tables: all of them, or those of `only`."""
    (home / "server").mkdir(parents=True, exist_ok=True)
    installation = Installation(
        Settings(
            home=home,
            server_dir=home / "server",
            embedding_db_url=embedding_db_url,
            playlist_db_url=playlist_db_url,
            redis_url=redis_url,
            **settings,
        ),
        instance,
    )
    catalog = installation.catalog
    wanted: tuple[IndexSpec, ...] = tuple(catalog.index(name) for name in only) or catalog.indexes
    write_sample(
        installation.embeddings, installation.playlists, replace(catalog, indexes=wanted), songs=songs
    )
    return installation


def environment_of(home: Path, **urls: str) -> dict[str, str]:
    """Environment variables by which other processes find an installation under `home` and its instance."""
    folder = home / "dagster"
    folder.mkdir(parents=True)
    settings = (importlib.resources.files("muse_assets") / "dagster.yaml").read_text("utf-8")
    (folder / "dagster.yaml").write_text(settings, "utf-8")
    return {
        "DAGSTER_HOME": str(folder),
        "MUSE_HOME": str(home),
        "MUSE_SERVER_DIR": str(home / "server"),
        **{f"MUSE_{name.upper()}": url for name, url in urls.items()},
    }


def write_small_catalog(file: Path) -> Path:
    """Catalog overrides under which a day of all indexes costs 1 s instead of 2 s, gates of quality off."""
    shape = {"nlist": 4, "m": 8, "recall_gate": 0.0, "max_imbalance": 1000.0, "max_recall_drop": 1.0}
    fields = "".join(f"{name} = {value}\n" for name, value in shape.items())
    file.write_text("\n".join(f"[index.{spec.name}]\n{fields}" for spec in CATALOG.indexes), "utf-8")
    return file


def hurry_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Dagster wait a thousandth of the seconds between a step's retries."""
    started = time.time()
    hurried = SimpleNamespace(
        time=lambda: started + (time.time() - started) * 1000,
        sleep=lambda seconds: time.sleep(seconds / 1000),
    )
    monkeypatch.setattr("dagster._core.execution.plan.active.time", hurried)
