"""The one object that Dagster loads; the app, the command line and the tests build it the same way.

Here: joining catalog, settings, assets and automation. Not here: any of them.
"""

from __future__ import annotations

import os
from typing import Any

import dagster as dg

from muse_assets.alerts import build_failure_sensor
from muse_assets.assets.index_lane import build_lane
from muse_assets.assets.playlist_cache import build_playlist_assets
from muse_assets.assets.server_reload import build_server_reload
from muse_assets.automation import build_deploy_sensor, build_jobs, build_retrain_sensor, build_schedule
from muse_assets.resources import Database, Encoding, ProgressLog, RedisServer, ServerDirectory, WorkDirectory
from muse_assets.settings import Settings


def build_defs(settings: Settings | None = None, **resources: Any) -> dg.Definitions:
    """All definitions for an installation's settings; `resources` replace the ones made from them."""
    settings = settings or Settings()
    catalog = settings.load_catalog()
    lanes = [build_lane(spec, catalog, settings.playlist_layout) for spec in catalog.indexes]
    songs, playlist_cache = build_playlist_assets(catalog, settings.playlist_layout)
    running = settings.automation == "running"
    jobs = build_jobs(catalog)
    return dg.Definitions(
        assets=[
            *(asset for lane in lanes for asset in (lane.table, lane.cluster, lane.index, lane.deployed)),
            songs,
            playlist_cache,
            build_server_reload(catalog),
        ],
        jobs=jobs,
        schedules=[build_schedule(catalog, running=running)],
        sensors=[
            build_deploy_sensor(
                catalog, jobs, settings.server_directory(), running=running, reloads=bool(settings.reload)
            ),
            build_retrain_sensor(
                catalog, jobs, settings.server_directory(), hours=settings.quiet_hours(), running=running
            ),
            build_failure_sensor(settings, running=running),
        ],
        resources={**build_resources(settings), **resources},
        executor=dg.in_process_executor,
    )


def build_resources(settings: Settings) -> dict[str, Any]:
    """The resources of an installation. Secrets stay environment variables: the UI shows their names."""
    return {
        "embedding_database": Database(
            url=_from_environment("MUSE_EMBEDDING_DB_URL", settings.embedding_url())
        ),
        "playlist_database": Database(url=_from_environment("MUSE_PLAYLIST_DB_URL", settings.playlist_url())),
        "redis": RedisServer(
            url=_from_environment("MUSE_REDIS_URL", settings.redis_address()),
            embedded_directory=str(settings.valkey_directory()),
        ),
        "work_directory": WorkDirectory(path=str(settings.work_directory())),
        "server_directory": ServerDirectory(
            path=str(settings.server_directory()),
            create=settings.server_dir is None,
            # URLs of the two may carry a token.
            reload=_from_environment("MUSE_RELOAD", settings.reload),
            reload_health=_from_environment("MUSE_RELOAD_HEALTH", settings.reload_health),
        ),
        "encoding": Encoding(dask_scheduler=settings.dask_scheduler or ""),
        "progress": ProgressLog(),
    }


def _from_environment(name: str, default: str | None) -> Any:
    # Settings read the name in any case.
    variable = next((found for found in os.environ if found.upper() == name and os.environ[found]), None)
    return dg.EnvVar(variable) if variable else default


defs = build_defs()
