"""The programs' playlists in Redis: one partition a program, below all seven live files.

Here: the assets and their metadata. Not here: songs, ids or keys (`playlists/`).

One missing embedding table holds back all seven keys of every program: they change together, or a search
across indexes would mix two days of one playlist. The old keys stay right meanwhile: an idx is never reused.
"""

import dagster as dg

from muse_assets.assets.failing import RETRY_PASSING, red_run
from muse_assets.assets.index_lane import CODE_VERSION, OWNERS, deployed_key
from muse_assets.catalog import Catalog
from muse_assets.partitions import program_partitions
from muse_assets.playlists.refreshing import refresh_program
from muse_assets.playlists.songs import Layout, unknown_programs
from muse_assets.resources import Database, RedisServer

PLAYLIST_CACHE = dg.AssetKey("playlist_cache")
PROGRAM_SONGS = dg.AssetKey("program_songs")
_GROUP = "playlists"
_PROGRAMS_KNOWN = "programs_known"


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
            )
        ],
        description=f"`playlist_idx:<program>_<index>`, {len(catalog.indexes)} keys a program with the FAISS "
        "ids of its songs, and `playlist_update:<program>`, all of a program written at once.",
    )
    def playlist_cache(
        context: dg.AssetExecutionContext,
        config: PlaylistConfig,
        embedding_database: Database,
        playlist_database: Database,
        redis: RedisServer,
    ) -> dg.MaterializeResult:
        program = catalog.program(context.partition_key)
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
                confirm_shrink=config.confirm_shrink,
            )
        return dg.MaterializeResult(
            metadata={
                "program": program.title,
                "ids": sum(refreshed.counts.values()),
                "changed": refreshed.changed,
                "seconds": round(refreshed.seconds, 3),
                **{f"ids_{index}": count for index, count in refreshed.counts.items()},
                "keys": dg.MetadataValue.table(
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
                ),
            },
            check_results=[
                dg.AssetCheckResult(
                    passed=not unknown,
                    check_name=_PROGRAMS_KNOWN,
                    asset_key=PLAYLIST_CACHE,
                    severity=dg.AssetCheckSeverity.WARN,
                    description=f"not in the catalog: {', '.join(unknown)}" if unknown else "all are known",
                )
            ],
        )

    return songs, playlist_cache
