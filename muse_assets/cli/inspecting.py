"""Commands that look and change nothing: info, search, verify."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from muse_assets.catalog import Catalog, IndexSpec
    from muse_assets.cli.index_status import IndexStatus
    from muse_assets.ivfpq.files import IndexFacts
    from muse_assets.publishing.verifying import Finding
    from muse_assets.settings import Settings

_PATH = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("info_faiss", short_help="Legacy: describe an index file.")
@click.option("--input", "path", type=_PATH, required=True, help="Index file.")
@click.option("--dimension", type=int, help="Fail unless the file has this dimension.")
def info_faiss(path: Path, dimension: int | None) -> None:
    """Print an index file's nlist, is_trained, ntotal and d (legacy verb)."""
    from muse_assets.failures import PermanentFailure
    from muse_assets.ivfpq.files import describe

    facts = describe(path)
    if dimension not in (None, facts.dimension):
        raise PermanentFailure(
            f"{path} has dimension {facts.dimension}, not {dimension}.", next_step="name the right file."
        )
    _show_file(facts)


def _show_file(facts: IndexFacts) -> None:
    """The legacy's four lines."""
    click.echo(f"nlist: {facts.nlist}")
    click.echo(f"is_trained: {facts.is_trained}")
    click.echo(f"ntotal: {facts.ntotal}")
    click.echo(f"d: {facts.dimension}")


@click.command(short_help="Are all indexes fresh, exact and live?")
@click.argument("names", nargs=-1, metavar="[INDEX]...")
def info(names: tuple[str, ...]) -> None:
    """Every index at a glance: is it fresh, exact and live, how good is it, and what is built.

    For one index the lines of `info_faiss` as well.
    """
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.index_status import answer
    from muse_assets.cli.summary import show_rows, terminal
    from muse_assets.seoul_time import SEOUL

    settings, now = read_settings(), datetime.now(SEOUL)
    catalog = settings.load_catalog()
    specs = [catalog.index(name) for name in names] or list(catalog.indexes)
    found = [_status(settings, spec) for spec in specs]
    show_rows(terminal(), _INFO_COLUMNS, [_info_row(settings, one, now) for one in found])
    if len(found) == 1 and (live := found[0].live) and not live.damaged:
        from muse_assets.ivfpq.files import describe

        _show_file(describe(live.path))
    click.echo(f"server directory: {settings.server_directory()}")
    click.echo(f"work directory:   {settings.work_directory()}")
    click.echo(
        "rows: vectors in the live file; ntotal: largest id + 1, which the server checks playlist ids against"
    )
    click.echo("table: rows of the table at that build; added, removed, rejected: by the newest build")
    click.echo(f"{now:%Y-%m-%d %H:%M} Seoul: {answer(found, now)}")


_INFO_COLUMNS = (
    *("index", "live day", "rows", "ntotal", "fresh", "table", "exact", "newest built"),
    *("added", "removed", "rejected", "recall@10", "nprobe", "MB", "sha256", "backups", "pinned"),
)


def _status(settings: Settings, spec: IndexSpec) -> IndexStatus:
    from muse_assets.cli.index_status import IndexStatus
    from muse_assets.publishing.live import live_file
    from muse_assets.publishing.pinning import read_pin
    from muse_assets.snapshots.store import snapshots

    server = settings.server_directory()
    built = next(snapshots(settings.work_directory(), spec), None)
    return IndexStatus(
        spec.name,
        live_file(server, spec) if server.is_dir() else None,
        replace(built.manifest, partition=built.day.isoformat()) if built else None,
        read_pin(server, spec.name),
    )


def _info_row(settings: Settings, status: IndexStatus, now: datetime) -> Sequence[object]:
    from muse_assets.publishing.backups import backups

    spec, facts, built = settings.load_catalog().index(status.index), status.facts, status.built
    return (
        status.index,
        status.live_day,
        facts.rows if facts else "",
        facts.ntotal_field if facts else "",
        status.freshness(now),
        "" if status.table_rows is None else status.table_rows,
        status.exact,
        built.partition if built else "none",
        *((built.added, built.removed, sum(built.rejected.values())) if built else [""] * 3),
        f"{facts.recall_at_10:.3f}" if facts else "",
        facts.nprobe if facts else "",
        f"{status.live.size / 1e6:.1f}" if status.live else "",
        status.live.sha256[:12] if status.live else "",
        len(backups(spec, settings.server_directory())) if status.live else "",
        status.pin.sha256[:12] or "damaged" if status.pin else "no",
    )


@click.command(short_help="Nearest songs, as the search server finds them.")
@click.argument("index")
@click.option("--idx", type=int, help="Search with the vector of this table row.")
@click.option("--song", metavar="DISC[/TRACK]", help="Search with this song's first row.")
@click.option("--program", "program_id", help="Only songs of this program, as cached in Redis.")
@click.option("-k", "k", type=click.IntRange(1, 1000), default=10, show_default=True)
def search(index: str, idx: int | None, song: str | None, program_id: str | None, k: int) -> None:
    """Nearest songs from the deployed file, exactly as the search server finds them."""
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.summary import show_rows, terminal
    from muse_assets.connections.databases import engine_for
    from muse_assets.server_search import search as search_live
    from muse_assets.server_search import stored_vector

    if (idx is None) == (song is None):
        raise click.UsageError("Give either --idx or --song.")
    settings = read_settings()
    catalog = settings.load_catalog()
    spec = catalog.index(index)
    engine = engine_for(settings.embedding_url())
    idx = _first_row(settings, spec, song) if idx is None and song else idx
    assert idx is not None  # noqa: S101  (one of the two was given)
    answer = search_live(
        engine,
        spec,
        settings.server_directory() / spec.live_file,
        stored_vector(engine, spec, idx),
        k=k,
        playlist_ids=_program_ids(settings, catalog, program_id, spec) if program_id else None,
    )
    titles = _titles(settings, catalog, [hit.song_key for hit in answer.hits])
    within = "" if answer.allowed is None else f" among {answer.allowed:,} ids of {program_id}"
    if answer.file != settings.server_directory() / spec.live_file:
        click.secho(f"The live file cannot be loaded; answered by {answer.file}.", fg="red", err=True)
    click.echo(f"{spec.name}, row {idx}, nprobe {answer.nprobe}{within}:")
    rows = [
        (f"{hit.distance:.4f}", str(hit.idx), "/".join(hit.song_key), *titles.get(hit.song_key, ("", "")))
        for hit in answer.hits
    ]
    show_rows(terminal(), ("distance", "idx", "song", "title", "artist"), rows)
    if len(answer.hits) < k:
        cut = f", within distance {spec.distance_cut}" if spec.distance_cut else ""
        click.echo(f"{len(answer.hits)} of {k} asked for{cut}.")


@click.command(short_help="Hash every file and name what is damaged.")
@click.argument("names", nargs=-1, metavar="[INDEX]...")
def verify(names: tuple[str, ...]) -> None:
    """Hash every live file, backup, snapshot and cluster, and name what is damaged."""
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.summary import show_rows, terminal

    settings = read_settings()
    catalog = settings.load_catalog()
    specs = [catalog.index(name) for name in names] or list(catalog.indexes)
    found = [(spec, finding) for spec in specs for finding in findings(settings, spec)]
    bad = [(spec, finding) for spec, finding in found if finding.state != "ok"]
    show_rows(terminal(), ("state", "file", "what"), [(f.state, f.path, f.what) for _, f in bad or found])
    click.echo(f"{len(found)} files, {len(bad)} of them not as published.")
    if bad:
        names = tuple(dict.fromkeys(spec.name for spec, _ in bad))
        click.echo(f"Next: `muse repair {' '.join(names)}` restores them from an intact copy or by a build.")
        sys.exit(1)


def findings(settings: Settings, spec: IndexSpec) -> list[Finding]:
    """Every file of the index in the server and in the work directory, and its state."""
    from muse_assets.publishing.verifying import verify as verify_server
    from muse_assets.snapshots.verifying import verify_work

    server, work = settings.server_directory(), settings.work_directory()
    return [*verify_server(server, spec), *verify_work(work, spec)]


def _first_row(settings: Settings, spec: IndexSpec, song: str) -> int:
    from muse_assets.connections.databases import engine_for
    from muse_assets.failures import PermanentFailure
    from muse_assets.playlists.ids import index_ids

    disc, _, track = song.partition("/")
    ids = index_ids(engine_for(settings.embedding_url()), spec, [(disc.strip(), track.strip())])
    if not len(ids):
        raise PermanentFailure(
            f"{spec.name}: {spec.table} has no row of song {song}.",
            next_step="give DISC/TRACK as in disccommseq and trackno, for example 0000012/03.",
        )
    return int(ids[0]) - spec.id_offset


def _program_ids(settings: Settings, catalog: Catalog, program_id: str, spec: IndexSpec) -> NDArray[np.int64]:
    from muse_assets.connections.redis_server import opened
    from muse_assets.playlists.cache import read_ids

    with opened(settings.redis_address(), settings.valkey_directory()) as client:
        return read_ids(client, catalog.program(program_id), spec.name)


def _titles(
    settings: Settings, catalog: Catalog, keys: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], tuple[str, str]]:
    from muse_assets.connections.databases import engine_for
    from muse_assets.playlists.songs import song_titles

    songs = [(key[0], key[1]) for key in keys if len(key) == 2]
    found = song_titles(engine_for(settings.playlist_url()), catalog, settings.playlist_layout, songs)
    return {(disc, track): title for (disc, track), title in found.items()}
