"""The command that takes over the index file that the search server has, without a rebuild.

Here: words for a terminal. Not here: the proof, or what is written (`snapshots.adopting`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pathlib import Path

    from muse_assets.catalog import IndexSpec
    from muse_assets.settings import Settings
    from muse_assets.snapshots.adopting import Adoption


@click.command(short_help="Take over the server's present file, no rebuild.")
@click.argument("index")
def adopt(index: str) -> None:
    """Take over the live file of an index that another program filled, without a rebuild.

    Every row of the table is encoded with the file's own quantizers: each id has to be idx - 1. The live
    file is only read; the next daily run builds on it, measures and deploys.
    """
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.running import progress
    from muse_assets.connections.databases import engine_for
    from muse_assets.seoul_time import SEOUL
    from muse_assets.snapshots.adopting import adopt as take_over

    settings = read_settings()
    spec = settings.load_catalog().index(index)
    live, work = settings.server_directory() / spec.live_file, settings.work_directory()
    with progress() as report:
        done = take_over(engine_for(settings.embedding_url()), spec, live, work, SEOUL, on_progress=report)
    if done is None:
        click.echo(f"{spec.name}: {work} builds on the cluster of {live} already; nothing was changed.")
        return
    _record_cluster(settings, spec, live, done)
    facts = done.manifest
    click.echo(
        f"{live} is adopted: {facts.rows:,} rows of {facts.partition}, nlist {facts.nlist}, m {facts.m}, "
        f"nprobe {facts.nprobe}, {done.coarse_quantizer}, recall@10 {facts.recall_at_10:.3f}."
    )
    click.echo(
        f"{done.equal:,} of {done.compared:,} rows encode to what it holds. The next build adds "
        f"{done.absent:,} rows, takes out {done.stale:,} ids, and encodes {done.pulled:,} rows in all."
    )
    click.echo(f"Next: `muse run --index {spec.name}` builds today's file on it and deploys.")


def _record_cluster(settings: Settings, spec: IndexSpec, live: Path, done: Adoption) -> None:
    """Materialize the cluster in the asset graph: no run trained it, and the index depends on it."""
    import dagster as dg

    from muse_assets.assets.index_lane import cluster_key
    from muse_assets.assets.metadata import cluster_metadata
    from muse_assets.cli.launching import open_instance

    with open_instance(settings) as instance:
        instance.report_runless_asset_event(
            dg.AssetMaterialization(
                cluster_key(spec),
                description=f"Adopted from {live}; nobody knows on how many rows it was trained.",
                metadata=cluster_metadata(done.cluster),
                tags={"dagster/data_version": done.cluster.sha256},
            )
        )
