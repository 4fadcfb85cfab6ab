"""The verbs operators have typed for years, by name and option, on the pipeline's own functions.

They write the file they are told to and, under `.manifests` beside it, its facts. Under the name of today's
dated snapshot that is the asset's own build, and the next run builds on it. Not here: their logs
(`verb_log`), or putting files live (`muse deploy`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from datetime import date

    from sqlalchemy import Engine

    from muse_assets.catalog import IndexSpec
    from muse_assets.settings import Settings
    from muse_assets.snapshots.building import Built
    from muse_assets.snapshots.progress import Progress

_DATED = re.compile(r"muse_.+_\d{8}\.index")
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
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.verb_log import verb_log
    from muse_assets.connections.databases import engine_for
    from muse_assets.snapshots.cluster import train_cluster

    settings, output = read_settings(), output.resolve()
    with verb_log(settings) as log:
        spec = _spec(settings, model, legacy_type, dimension)
        _check_output(settings, output, spec.cluster_file)
        engine = engine_for(settings.embedding_url())
        done = train_cluster(engine, spec, output, on_progress=_progress(log))
        _say(
            log,
            f"{output}: nlist {done.nlist}, trained on {done.training_rows:,} of {done.table_rows:,} rows",
        )


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
    from muse_assets.cli.verb_log import failure_line, verb_log
    from muse_assets.connections.databases import engine_for
    from muse_assets.connections.redis_server import opened
    from muse_assets.failures import MuseError
    from muse_assets.playlists.refreshing import refresh_program

    settings = read_settings()
    failed = False
    redis_server = opened(settings.redis_address(), settings.valkey_directory())
    with verb_log(settings) as log, redis_server as client:
        catalog = settings.load_catalog()
        for program in catalog.programs:
            try:
                done = refresh_program(
                    engine_for(settings.embedding_url()),
                    engine_for(settings.playlist_url()),
                    client,
                    catalog,
                    program,
                    settings.playlist_layout,
                    server=settings.server_directory(),
                )
            except MuseError as error:
                failed = True
                log.error("%s failed: %s", program.id, failure_line(error))
                click.secho(str(error), fg="red", err=True)
                continue
            counts = ", ".join(f"{count:,} {name}" for name, count in done.counts.items())
            _say(log, f"{program.id} {program.title}: {counts}")
    if failed:
        sys.exit(1)


def _build(model: str, legacy_type: str, dimension: int, source: Path, output: Path, *, full: bool) -> None:
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.verb_log import verb_log
    from muse_assets.connections.databases import engine_for
    from muse_assets.seoul_time import seoul_today

    settings, output = read_settings(), output.resolve()
    with verb_log(settings) as log:
        spec, day = _spec(settings, model, legacy_type, dimension), seoul_today()
        _check_output(settings, output, spec.snapshot_file(day))
        output.parent.mkdir(parents=True, exist_ok=True)
        order = _Order(
            engine_for(settings.embedding_url()), spec, day, source.resolve(), full, _progress(log)
        )
        usual = output.name == spec.snapshot_file(day)
        facts = (_build_in(order, output.parent) if usual else _build_apart(order, output)).manifest
        _say(
            log,
            f"{output}: {facts.rows:,} rows ({facts.mode}: {facts.added:,} added, {facts.removed:,} removed, "
            f"{facts.reembedded:,} re-embedded), recall@10 {facts.recall_at_10:.3f} at nprobe {facts.nprobe}",
        )


@dataclass(frozen=True)
class _Order:
    """What to build from what; `full` does not build on the source's rows."""

    engine: Engine
    spec: IndexSpec
    day: date
    source: Path
    full: bool
    on_progress: Progress


def _build_in(order: _Order, folder: Path) -> Built:
    """Build the day's snapshot in `folder`, under its usual name there."""
    from muse_assets.snapshots.building import build_snapshot

    return build_snapshot(
        order.engine,
        order.spec,
        folder,
        order.day,
        cluster_path=order.source,
        full=order.full,
        on_progress=order.on_progress,
    )


def _build_apart(order: _Order, output: Path) -> Built:
    """Build in a folder of its own beside `output`, then put the file and its facts into place."""
    from muse_assets import durable_files
    from muse_assets.manifest import read_manifest, write_manifest
    from muse_assets.snapshots.store import lock_file, read_state, write_state

    work, name = output.parent, order.spec.name
    # Held to the end: facts that come before their file are not pruned, and the folder is this call's.
    with (
        durable_files.locked(lock_file(work, order.spec)),
        _emptied(work / f".muse_{name}.building") as apart,
    ):
        if not order.full:
            _offer_parent(order, apart)
        built = _build_in(order, apart)
        sha256 = built.manifest.sha256
        state = read_state(apart, name, sha256)
        if state and read_state(work, name, sha256) is None:
            write_state(work, name, sha256, state)
        # The same bytes may lie here as a day's snapshot, whose facts are its own.
        if read_manifest(work, name, sha256) is None:
            write_manifest(work, built.manifest)
        if built.path.is_symlink():
            # Nothing new. A copy, since operators write over such files by `cp`.
            durable_files.commit(durable_files.stage(output, durable_files.copy_into(built.path)))
        else:
            durable_files.link(built.path, output)
    return built


def _offer_parent(order: _Order, folder: Path) -> None:
    """Let `folder` show the source as the day's snapshot, if it has facts: the build starts from it."""
    from muse_assets.manifest import identify, write_manifest
    from muse_assets.snapshots.store import read_state, write_state

    spec, source = order.spec, order.source
    manifest = identify(source.parent, spec.name, source)
    state = read_state(source.parent, spec.name, manifest.sha256) if manifest else None
    if manifest and state:
        write_state(folder, spec.name, manifest.sha256, state)
        write_manifest(folder, manifest)
        (folder / spec.snapshot_file(order.day)).symlink_to(source)


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """An empty folder, gone at the end; a killed call's is emptied by the next one."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _check_output(settings: Settings, output: Path, usual_name: str) -> None:
    """Raise PermanentFailure for a file that is not a legacy verb's to write."""
    from muse_assets.failures import PermanentFailure

    if output.is_relative_to(settings.server_directory()):
        raise PermanentFailure(
            f"--output {output} is in the search server's directory: nothing is put live unchecked.",
            next_step="write it elsewhere; `muse deploy` puts the work directory's newest snapshot live.",
        )
    if _DATED.fullmatch(output.name) and output.name != usual_name:
        raise PermanentFailure(
            f"--output {output} is named like a dated snapshot, which this would not be.",
            next_step=f"name it {usual_name} (dates are Seoul's), or like no snapshot.",
        )


def _spec(settings: Settings, model: str, legacy_type: str, dimension: int) -> IndexSpec:
    from muse_assets.failures import PermanentFailure

    spec = settings.load_catalog().index_of_legacy(model, legacy_type)
    if spec.dimension != dimension:
        raise PermanentFailure(
            f"{spec.name} has dimension {spec.dimension}, not {dimension}.",
            next_step=f"use --dimension {spec.dimension}.",
        )
    return spec


def _say(log: logging.Logger, result: str) -> None:
    log.info(result)
    click.echo(result)


def _progress(log: logging.Logger) -> Progress:
    def report(doing: str, done: int, total: int) -> None:
        if not total or done == total:
            line = f"{doing}{f': {total:,}' if total else ''}"
            log.info(line)
            click.echo(line, err=True)

    return report
