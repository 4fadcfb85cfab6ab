"""The programs' playlists in Redis: one partition a program, below all seven live files.

Here: the assets, their metadata and checks. Not here: songs, ids, keys or searches (`playlists/`).

One missing embedding table holds back all seven keys of every program: they change together, or a search
across indexes would mix two days of one playlist. The old keys stay right meanwhile: an idx is never reused.
"""

from pathlib import Path

import dagster as dg

from muse_assets.assets.failing import RETRY_PASSING, red_run
from muse_assets.assets.index_lane import CODE_VERSION, OWNERS, deployed_key
from muse_assets.catalog import Catalog, Program
from muse_assets.partitions import program_partitions
from muse_assets.playlists.cache import Refresh
from muse_assets.playlists.refreshing import refresh_program
from muse_assets.playlists.searching import Measurement, measure_searches
from muse_assets.playlists.songs import Layout, unknown_programs
from muse_assets.resources import Database, RedisServer, ServerDirectory

PLAYLIST_CACHE = dg.AssetKey("playlist_cache")
PROGRAM_SONGS = dg.AssetKey("program_songs")
_GROUP = "playlists"
_PROGRAMS_KNOWN = "programs_known"
_SEARCHES_FULL = "searches_full"
_SONGS_COVERED = "songs_covered"


class PlaylistConfig(dg.Config):  # type: ignore[misc, unused-ignore]
    """How one refresh may depart from the daily one."""

    confirm_shrink: bool = False
    """Accept a playlist that lost more than half of its ids."""


def build_playlist_assets(catalog: Catalog, layout: Layout) -> tuple[dg.AssetSpec, dg.AssetsDefinition]:
    """The program tables (external) and the cache."""
    programs = program_partitions(catalog)
    songs = dg.AssetSpec(
        PROGRAM_SONGS,
        partitions_def=programs,
        group_name=_GROUP,
        kinds={"mysql", "table"},
        owners=OWNERS,
        description="The songs of each radio program in the playlist database: "
        + ("`tb_song_<program>_m`." if layout == "song_tables" else "`tb_playlist_song_pool_m`."),
    )

    @dg.asset(
        key=PLAYLIST_CACHE,
        deps=[PROGRAM_SONGS, *(deployed_key(spec) for spec in catalog.indexes)],
        partitions_def=programs,
        group_name=_GROUP,
        kinds={"redis", "python"},
        owners=OWNERS,
        code_version=CODE_VERSION,
        retry_policy=RETRY_PASSING,
        check_specs=[
            dg.AssetCheckSpec(
                _PROGRAMS_KNOWN,
                asset=PLAYLIST_CACHE,
                description="The catalog knows every program that the playlist database lists (warns).",
            ),
            dg.AssetCheckSpec(
                _SEARCHES_FULL,
                asset=PLAYLIST_CACHE,
                description="Searches within the playlist, run as the search server runs them, find ten "
                "songs where there are ten (warns); says what would mend those that come back short.",
            ),
            dg.AssetCheckSpec(
                _SONGS_COVERED,
                asset=PLAYLIST_CACHE,
                description="Every index has at least its `min_coverage` of the program's songs (warns).",
            ),
        ],
        description=f"`playlist_idx:<program>_<index>`, {len(catalog.indexes)} keys a program with the FAISS "
        "ids of its songs, `playlist_update:<program>` and `playlist_meta:<program>`, all of a program "
        "written at once.",
    )
    def playlist_cache(
        context: dg.AssetExecutionContext,
        config: PlaylistConfig,
        embedding_database: Database,
        playlist_database: Database,
        redis: RedisServer,
        server_directory: ServerDirectory,
    ) -> dg.MaterializeResult:
        program = catalog.program(context.partition_key)
        server = Path(server_directory.path)
        still_live = (
            f"the keys of {program.id} ({program.title}) in Redis, which change together or not at all"
        )
        with red_run(f"playlist_cache · {program.id}", lambda: still_live), redis.client() as client:
            unknown = unknown_programs(playlist_database.engine, catalog) if layout == "song_pool" else []
            refreshed = refresh_program(
                embedding_database.engine,
                playlist_database.engine,
                client,
                catalog,
                program,
                layout,
                server=server,
                confirm_shrink=config.confirm_shrink,
            )
            # The keys are written: whatever comes of this is a warning.
            measured = measure_searches(embedding_database.engine, client, catalog, program, server)
        return dg.MaterializeResult(
            metadata={
                "program": program.title,
                "ids": sum(refreshed.counts.values()),
                "changed": refreshed.changed,
                "seconds": round(refreshed.seconds, 3),
                **{f"ids_{index}": count for index, count in refreshed.counts.items()},
                "keys": _keys(program, refreshed),
                "coverage": _coverage(refreshed),
                "search": _searches(measured),
                "search_seconds": round(measured.seconds, 3),
            },
            check_results=[
                _warning(
                    _PROGRAMS_KNOWN,
                    not unknown,
                    f"not in the catalog: {', '.join(unknown)}" if unknown else "all are known",
                ),
                _warning(_SEARCHES_FULL, measured.all_full, measured.summary),
                _covered(catalog, refreshed),
            ],
        )

    return songs, playlist_cache


def _keys(program: Program, refreshed: Refresh) -> dg.TableMetadataValue:
    """The program's lists of ids and their lengths; before -1: there was none."""
    return dg.MetadataValue.table(
        [
            dg.TableRecord(
                {
                    "key": program.ids_key(index),
                    "ids": count,
                    "before": -1 if (before := refreshed.previous.get(index)) is None else before,
                }
            )
            for index, count in refreshed.counts.items()
        ]
    )


def _coverage(refreshed: Refresh) -> dg.TableMetadataValue:
    """Index by index, the songs that have no row there, and a few of them as disc/track."""
    return dg.MetadataValue.table(
        [
            dg.TableRecord(
                {
                    "index": index,
                    "songs": matches.songs,
                    "without a row": len(matches.missing),
                    "covered": round(matches.coverage, 4),
                    "examples": ", ".join(matches.missing[:5]),
                }
            )
            for index, matches in refreshed.matches.items()
        ]
    )


def _covered(catalog: Catalog, refreshed: Refresh) -> dg.AssetCheckResult:
    low = [
        f"{index} has {matches.coverage:.1%} of {matches.songs:,} songs (lacks "
        f"{', '.join(matches.missing[:3])}, ...)"
        for index, matches in refreshed.matches.items()
        if matches.coverage < catalog.index(index).min_coverage
    ]
    return _warning(_SONGS_COVERED, not low, "; ".join(low) or "every index has most of the songs")


def _searches(measured: Measurement) -> dg.TableMetadataValue:
    """One row an index."""
    columns = {
        "index": "string",
        "ids": "int",
        "held": "int",
        "queries": "int",
        "nprobe": "int",
        "nlist": "int",
        "short": "float",
        "recall@10": "float",
        "against": "string",
        "ms a query": "float",
    }
    records = [
        dg.TableRecord(
            {
                "index": one.index,
                "ids": one.ids,
                "held": one.held,
                "queries": one.queries,
                "nprobe": one.nprobe,
                "nlist": one.nlist,
                "short": round(one.short, 4),
                "recall@10": round(one.recall, 4),
                "against": one.reference,
                "ms a query": round(one.milliseconds, 3),
            }
        )
        for one in measured.searches
    ]
    return dg.MetadataValue.table(
        records, schema=dg.TableSchema([dg.TableColumn(name, kind) for name, kind in columns.items()])
    )


def _warning(name: str, passed: bool, description: str) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=passed,
        check_name=name,
        asset_key=PLAYLIST_CACHE,
        severity=dg.AssetCheckSeverity.WARN,
        description=description,
    )
