"""The verbs operators have typed for years, by name and option, on the pipeline's own functions.

They write the files they are told to, beside the asset graph: a file in the work directory under the
usual name is the asset's file too, and the next run builds on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from muse_assets.catalog import IndexSpec
    from muse_assets.settings import Settings

_FILE = click.Path(dir_okay=False, path_type=Path)


def _legacy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--dimension", type=int, required=True, help="512 for clap, 1024 for bgem3."),
        click.option("--output", type=_FILE, required=True, help="Index file to write."),
        click.option("--type", "legacy_type", required=True, help="song, lyrics_summary, artist, ..."),
        click.option("--model", type=click.Choice(["clap", "bgem3"]), required=True),
    ):
        command = option(command)
    return command


@click.command("train_faiss", short_help="Legacy: train a cluster.")
@_legacy_options
def train_faiss(model: str, legacy_type: str, output: Path, dimension: int) -> None:
    """Train an IVF-PQ cluster and write it (legacy verb)."""
    from muse_assets.connections.databases import engine_for
    from muse_assets.snapshots.cluster import train_cluster

    settings, spec = _spec(model, legacy_type, dimension)
    done = train_cluster(engine_for(settings.embedding_url()), spec, output.resolve(), on_progress=_say)
    click.echo(f"{output}: nlist {done.nlist}, trained on {done.training_rows:,} of {done.table_rows:,} rows")


@click.command("add_faiss", short_help="Legacy: fill a trained cluster.")
@_legacy_options
@click.option("--input", "cluster", type=_FILE, required=True, help="Trained cluster file.")
def add_faiss(model: str, legacy_type: str, output: Path, dimension: int, cluster: Path) -> None:
    """Fill a trained cluster with every vector of the table (legacy verb)."""
    _build(model, legacy_type, dimension, cluster, output, full=True)


@click.command("add_daily_faiss", short_help="Legacy: bring an index up to date.")
@_legacy_options
@click.option("--input", "previous", type=_FILE, required=True, help="Index file to bring up to date.")
def add_daily_faiss(model: str, legacy_type: str, output: Path, dimension: int, previous: Path) -> None:
    """Bring an index up to date: added, late, deleted and re-embedded rows alike (legacy verb)."""
    _build(model, legacy_type, dimension, previous, output, full=False)


@click.command("cache_playlist", short_help="Legacy: refresh all playlists.")
def cache_playlist() -> None:
    """Refresh every program's playlist keys in Redis (legacy verb)."""
    from muse_assets.cli.configuring import read_settings
    from muse_assets.connections.databases import engine_for
    from muse_assets.failures import MuseError
    from muse_assets.playlists.refreshing import refresh_program

    settings = read_settings()
    catalog = settings.load_catalog()
    from muse_assets.definitions import build_resources  # reads the settings too, but explains nothing

    failed = False
    with build_resources(settings)["redis"].client() as client:
        for program in catalog.programs:
            try:
                done = refresh_program(
                    engine_for(settings.embedding_url()),
                    engine_for(settings.playlist_url()),
                    client,
                    catalog,
                    program,
                    settings.playlist_layout,
                )
            except MuseError as error:
                failed = True
                click.secho(str(error), fg="red", err=True)
                continue
            counts = ", ".join(f"{count:,} {name}" for name, count in done.counts.items())
            click.echo(f"{program.id} {program.title}: {counts}")
    if failed:
        sys.exit(1)


def _build(model: str, legacy_type: str, dimension: int, source: Path, output: Path, *, full: bool) -> None:
    from muse_assets import durable_files
    from muse_assets.connections.databases import engine_for
    from muse_assets.partitions import seoul_today
    from muse_assets.snapshots.building import build_snapshot

    settings, spec = _spec(model, legacy_type, dimension)
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    built = build_snapshot(
        engine_for(settings.embedding_url()),
        spec,
        output.parent,
        seoul_today(),
        cluster_path=source.resolve(),
        full=full,
        on_progress=_say,
    )
    if built.path != output:
        durable_files.link(built.path, output)
    facts = built.manifest
    click.echo(
        f"{output}: {facts.rows:,} rows ({facts.mode}: {facts.added:,} added, {facts.removed:,} removed, "
        f"{facts.reembedded:,} re-embedded), recall@10 {facts.recall_at_10:.3f} at nprobe {facts.nprobe}"
    )


def _spec(model: str, legacy_type: str, dimension: int) -> tuple[Settings, IndexSpec]:
    from muse_assets.cli.configuring import read_settings
    from muse_assets.failures import PermanentFailure

    settings = read_settings()
    spec = settings.load_catalog().index_of_legacy(model, legacy_type)
    if spec.dimension != dimension:
        raise PermanentFailure(
            f"{spec.name} has dimension {spec.dimension}, not {dimension}.",
            next_step=f"use --dimension {spec.dimension}.",
        )
    return settings, spec


def _say(doing: str, done: int, total: int) -> None:
    if not total or done == total:
        click.echo(f"{doing}{f': {total:,}' if total else ''}", err=True)
