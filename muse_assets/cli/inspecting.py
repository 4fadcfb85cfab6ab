"""Commands that look and change nothing: info, search, verify."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from muse_assets.catalog import Catalog, IndexSpec
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
    click.echo(f"nlist: {facts.nlist}")
    click.echo(f"is_trained: {facts.is_trained}")
    click.echo(f"ntotal: {facts.ntotal}")
    click.echo(f"d: {facts.dimension}")


@click.command(short_help="What is live and built, how old and how good.")
@click.argument("names", nargs=-1, metavar="[INDEX]...")
def info(names: tuple[str, ...]) -> None:
    """Every index at a glance: what is live, how old, how good, and what is built."""
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.summary import show_rows, terminal

    settings = read_settings()
    catalog = settings.load_catalog()
    specs = [catalog.index(name) for name in names] or list(catalog.indexes)
    columns = (
        "index",
        "live day",
        "rows",
        "ntotal",
        "nlist",
        "nprobe",
        "recall@10",
        "MB",
        "sha256",
        "backups",
    )
    rows = [_info_row(settings, spec) for spec in specs]
    show_rows(terminal(), (*columns, "newest built"), rows)
    click.echo(f"server directory: {settings.server_directory()}")
    click.echo(f"work directory:   {settings.work_directory()}")
    click.echo(
        "rows: vectors in the file; ntotal: largest id + 1, which the server checks playlist ids against"
    )


def _info_row(settings: Settings, spec: IndexSpec) -> Sequence[object]:
    from muse_assets.publishing.backups import backups
    from muse_assets.publishing.live import live_file
    from muse_assets.snapshots.store import snapshots

    server = settings.server_directory()
    built = next(snapshots(settings.work_directory(), spec), None)
    newest = built.day.isoformat() if built else "none"
    live = live_file(server, spec) if server.is_dir() else None
    if live is None:
        return (spec.name, "none", *[""] * 8, newest)
    if live.manifest is None:
        return (spec.name, "DAMAGED", *[""] * 6, live.sha256[:12], len(backups(spec, server)), newest)
    facts = live.manifest
    return (
        spec.name,
        facts.partition,
        facts.rows,
        facts.ntotal_field,
        facts.nlist,
        facts.nprobe,
        f"{facts.recall_at_10:.3f}",
        f"{facts.size / 1e6:.1f}",
        live.sha256[:12],
        len(backups(spec, server)),
        newest,
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
