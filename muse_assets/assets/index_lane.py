"""One lane of the graph: table -> cluster -> index -> deployed, made from one IndexSpec.

Here: the factory for the four assets of an index. Not here: the work (`snapshots`, `publishing`), or
when it runs (`automation`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from muse_assets.assets.failing import RETRY_PASSING, red_run
from muse_assets.assets.metadata import (
    check_result,
    cluster_metadata,
    deployment_metadata,
    index_metadata,
    table_schema,
)
from muse_assets.catalog import Catalog, IndexSpec
from muse_assets.failures import MuseError, PermanentFailure
from muse_assets.manifest import read_manifest
from muse_assets.partitions import DAYS
from muse_assets.playlists.songs import Layout, song_titles
from muse_assets.publishing.backups import backups
from muse_assets.publishing.deploying import Deployment, deploy, rollback
from muse_assets.publishing.live import live_file
from muse_assets.publishing.pinning import read_pin
from muse_assets.resources import Database, Encoding, ProgressLog, ServerDirectory, WorkDirectory
from muse_assets.seoul_time import DEADLINE, SEOUL, seoul_today
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.gate import DESCRIPTIONS, WARNING_ONLY, GateFailed
from muse_assets.snapshots.neighbor_preview import preview_neighbors
from muse_assets.snapshots.store import Snapshot, prune, snapshots

OWNERS = ["team:music-search"]
CODE_VERSION = "1"

# Late when the deadline passes without a deploy since midnight; a day with nothing new deploys too.
_FRESHNESS = dg.FreshnessPolicy.cron(
    f"{DEADLINE.minute} {DEADLINE.hour} * * *",
    lower_bound_delta=timedelta(hours=DEADLINE.hour, minutes=DEADLINE.minute),
    timezone=str(SEOUL),
)


class IndexConfig(dg.Config):  # type: ignore[misc, unused-ignore]
    """How one build of an index may depart from the daily one."""

    full: bool = False
    """Start from the empty cluster instead of the newest snapshot."""
    confirm_shrink: bool = False
    """Accept that more rows vanished, or were replaced, than the catalog allows; digests the whole table."""
    verify_all: bool = False
    """Digest the whole table today, whatever `verify_days` says."""


class DeployConfig(dg.Config):  # type: ignore[misc, unused-ignore]
    """What to put live; the default is the newest validated snapshot."""

    partition: str = ""
    """Day (YYYY-MM-DD) of the snapshot to deploy; empty: the newest."""
    rollback: bool = False
    """Put the newest backup back instead of deploying a snapshot."""
    rollback_to: str = ""
    """With rollback: start of the sha256 of the backup to put back."""
    confirm_size: bool = False
    """Accept a file more than 1.5 times as large as the live one."""
    confirm_shrink: bool = False
    """Accept that far more rows vanished since the live file than the catalog allows."""
    confirm_recall: bool = False
    """Accept that the file finds less than the live one, by more than the catalog allows."""
    replace_damaged: bool = False
    """Replace a live file whose bytes are not what was published; they are kept aside."""
    pin: bool = True
    """With rollback: keep new builds from going live until the index is released."""
    why: str = ""
    """With rollback: the reason, shown wherever the pin is."""
    release: bool = False
    """Release a pinned index and deploy."""


@dataclass(frozen=True)
class Lane:
    """The assets of one index, in the order of the pipeline."""

    table: dg.AssetSpec
    cluster: dg.AssetsDefinition
    index: dg.AssetsDefinition
    deployed: dg.AssetsDefinition


def table_key(spec: IndexSpec) -> dg.AssetKey:
    """The embedding table."""
    return dg.AssetKey([spec.name, "table"])


def cluster_key(spec: IndexSpec) -> dg.AssetKey:
    """The trained cluster."""
    return dg.AssetKey([spec.name, "cluster"])


def index_key(spec: IndexSpec) -> dg.AssetKey:
    """The daily snapshot."""
    return dg.AssetKey([spec.name, "index"])


def deployed_key(spec: IndexSpec) -> dg.AssetKey:
    """The live file."""
    return dg.AssetKey([spec.name, "deployed"])


def build_lane(spec: IndexSpec, catalog: Catalog, layout: Layout) -> Lane:
    """The four assets of one index; the catalog and the layout tell where the songs' titles are."""
    return Lane(_table(spec), _cluster(spec), _index(spec, catalog, layout), _deployed(spec))


def _table(spec: IndexSpec) -> dg.AssetSpec:
    return dg.AssetSpec(
        table_key(spec),
        group_name=spec.name,
        kinds={"mysql", "table"},
        owners=OWNERS,
        description=f"Embedding table `{spec.table}` ({spec.model}), written by the embedding batch: "
        f"{spec.dimension} floats a row in `{spec.embedding_column}`.",
        metadata={"dagster/column_schema": table_schema(spec), "dagster/table_name": spec.table},
    )


def _cluster(spec: IndexSpec) -> dg.AssetsDefinition:
    @dg.asset(
        key=cluster_key(spec),
        deps=[table_key(spec)],
        group_name=spec.name,
        kinds={"faiss", "python"},
        owners=OWNERS,
        code_version=CODE_VERSION,
        pool=f"index_{spec.name}",
        retry_policy=RETRY_PASSING,
        description=f"Trained IVF-PQ quantizers of `{spec.name}` on a random sample of its table, in "
        f"`{spec.cluster_file}`. Retraining makes the next index a full build. Never part of the daily run.",
    )
    def cluster(
        context: dg.AssetExecutionContext,
        embedding_database: Database,
        work_directory: WorkDirectory,
        server_directory: ServerDirectory,
        progress: dg.ResourceParam[ProgressLog],
    ) -> dg.MaterializeResult:
        with red_run(f"{spec.name} · cluster", partial(live_now, spec, server_directory)):
            manifest = train_cluster(
                embedding_database.engine,
                spec,
                work_directory.ready() / spec.cluster_file,
                on_progress=progress.reporter(context),
            )
        return dg.MaterializeResult(
            metadata=cluster_metadata(manifest), data_version=dg.DataVersion(manifest.sha256)
        )

    return cluster


def _index(spec: IndexSpec, catalog: Catalog, layout: Layout) -> dg.AssetsDefinition:
    key = index_key(spec)

    @dg.asset(
        key=key,
        deps=[table_key(spec), cluster_key(spec)],
        partitions_def=DAYS,
        group_name=spec.name,
        kinds={"faiss", "python"},
        owners=OWNERS,
        code_version=CODE_VERSION,
        pool=f"index_{spec.name}",
        retry_policy=RETRY_PASSING,
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, description=text, blocking=name not in WARNING_ONLY)
            for name, text in DESCRIPTIONS.items()
        ],
        description=f"`muse_{spec.name}_<YYYYMMDD>.index`: the trained cluster filled with exactly the rows "
        f"that `{spec.table}` had by the end of the day (Seoul), synced from the newest earlier snapshot. "
        "Materialized means validated: the checks run first, and a file that fails them is discarded.",
    )
    def index(
        context: dg.AssetExecutionContext,
        config: IndexConfig,
        embedding_database: Database,
        playlist_database: Database,
        work_directory: WorkDirectory,
        server_directory: ServerDirectory,
        encoding: Encoding,
        progress: dg.ResourceParam[ProgressLog],
    ) -> Iterator[Any]:
        day = context.partition_key
        with red_run(f"{spec.name} · index {day}", partial(live_now, spec, server_directory)):
            try:
                built = build_snapshot(
                    embedding_database.engine,
                    spec,
                    work_directory.ready(),
                    date.fromisoformat(day),
                    full=config.full,
                    confirm_shrink=config.confirm_shrink,
                    verify_all=config.verify_all,
                    on_progress=progress.reporter(context),
                    recruit=encoding.recruit,
                )
            except GateFailed as failed:
                for check in failed.checks:
                    yield check_result(key, check)
                raise
            preview = preview_neighbors(
                embedding_database.engine,
                spec,
                built.path,
                date.fromisoformat(day),
                lambda keys: song_titles(playlist_database.engine, catalog, layout, keys),
            )
        context.log_event(
            dg.AssetObservation(
                table_key(spec),
                metadata={
                    "dagster/row_count": built.table_rows,
                    "newest_idx": built.manifest.newest_idx,
                    "columns": ", ".join(f"{name} {type_}" for name, type_ in built.table_columns.items()),
                },
            )
        )
        yield dg.MaterializeResult(
            asset_key=key,
            metadata=index_metadata(built, preview),
            data_version=dg.DataVersion(built.manifest.sha256),
            # With the result and not before it, so that each outcome points at this materialization.
            check_results=[check_result(key, check) for check in built.checks],
        )

    return index


def _deployed(spec: IndexSpec) -> dg.AssetsDefinition:
    @dg.asset(
        key=deployed_key(spec),
        # The newest day is what gets deployed; older missing days are none of its business.
        deps=[dg.AssetDep(index_key(spec), partition_mapping=dg.LastPartitionMapping())],
        group_name=spec.name,
        kinds={"faiss", "file"},
        owners=OWNERS,
        code_version=CODE_VERSION,
        pool=f"index_{spec.name}",
        retry_policy=RETRY_PASSING,
        description=f"`{spec.live_file}` in the search server's directory: the newest validated snapshot, "
        "published atomically with a backup. Never goes back to an older day except by `rollback`, which "
        "pins the index until it is released.",
        freshness_policy=_FRESHNESS,
    )
    def deployed(
        context: dg.AssetExecutionContext,
        config: DeployConfig,
        work_directory: WorkDirectory,
        server_directory: ServerDirectory,
    ) -> dg.MaterializeResult:
        with red_run(f"{spec.name} · deploy", partial(live_now, spec, server_directory)):
            work, server = work_directory.ready(), server_directory.ready()
            deployment = (
                _roll_back(spec, server, config, run_id=context.run.run_id)
                if config.rollback
                else _deploy_snapshot(spec, work, server, config)
            )
            pin = read_pin(server, spec.name)
            manifest = read_manifest(server, spec.name, deployment.sha256)
            if manifest is None:
                raise PermanentFailure(
                    f"{spec.name}: the facts of the file just deployed are missing in {server}.",
                    next_step="run `muse verify` and deploy again.",
                )
            before = deployment.replaced_sha256
            replaced = read_manifest(server, spec.name, before) if before else None
            removed = prune(work, spec, today=seoul_today())
        if removed:
            context.log.info(f"retention removed {len(removed)} files from {work}")
        return dg.MaterializeResult(
            metadata={
                # First, for the page's first screen: freshness passes for an index that was put back too.
                "pinned": pin is not None,
                **({"pin": pin.describe()} if pin else {}),
                "rollback": config.rollback,
                **deployment_metadata(
                    deployment, manifest, replaced, len(backups(spec, server)), str(server / spec.live_file)
                ),
            },
            data_version=dg.DataVersion(deployment.sha256),
        )

    return deployed


def _deploy_snapshot(spec: IndexSpec, work: Path, server: Path, config: DeployConfig) -> Deployment:
    snapshot = _chosen_snapshot(spec, work, config.partition)
    return deploy(
        spec,
        snapshot.path,
        snapshot.manifest,
        server,
        confirm_size=config.confirm_size,
        confirm_shrink=config.confirm_shrink,
        confirm_recall=config.confirm_recall,
        replace_damaged=config.replace_damaged,
        unpin=config.release,
    )


def _roll_back(spec: IndexSpec, server: Path, config: DeployConfig, *, run_id: str) -> Deployment:
    if config.release:
        raise PermanentFailure(
            f"{spec.name}: a rollback pins the index, so release: true contradicts it; nothing was replaced.",
            next_step="choose one of them; a rollback with pin: false leaves the index open to new builds.",
        )
    why = config.why or f"rolled back by run {run_id[:8]}"
    return rollback(spec, server, to=config.rollback_to or None, pin=why if config.pin else None)


def _chosen_snapshot(spec: IndexSpec, work: Path, partition: str) -> Snapshot:
    for snapshot in snapshots(work, spec):
        if not partition or snapshot.day.isoformat() == partition:
            return snapshot
    wanted = f"of {partition} " if partition else ""
    raise PermanentFailure(
        f"{spec.name}: no validated snapshot {wanted}in {work} (looked for muse_{spec.name}_<YYYYMMDD>.index "
        "with a manifest of its bytes).",
        next_step=f"materialize {spec.name}/index{f' for {partition}' if partition else ''} first.",
    )


def live_now(spec: IndexSpec, server_directory: ServerDirectory) -> str:
    """What the server finds at its next start, after this step failed."""
    try:
        live = live_file(Path(server_directory.path), spec)
    except MuseError as error:
        return f"{spec.live_file} could not be read ({error.what})"
    except OSError as error:
        return f"{spec.live_file} could not be read ({error.strerror})"
    if live is None:
        return f"nothing yet: {server_directory.path} has no {spec.live_file}"
    if live.manifest is None:
        return f"{spec.live_file} is not what was published (sha256 {live.sha256[:12]})"
    facts = live.manifest
    return f"{spec.live_file} of {facts.partition} ({facts.rows:,} rows, sha256 {live.sha256[:12]})"
