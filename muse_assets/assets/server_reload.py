"""The search server's restart, once after the day's deploys.

Here: the asset. Not here: hook, health check and putting files back (`publishing.reloading`).

One damaged live file holds back the restart for all seven: the server loads every file at a start, the
damaged one too, while until then it answers from the sound copies in its memory.
"""

import dagster as dg

from muse_assets.assets.failing import red_run
from muse_assets.assets.index_lane import CODE_VERSION, OWNERS, deployed_key, live_now
from muse_assets.catalog import Catalog
from muse_assets.publishing.reloading import ReloadFailed, reload_server
from muse_assets.resources import ServerDirectory

SERVER_RELOAD = dg.AssetKey("server_reload")


def build_server_reload(catalog: Catalog) -> dg.AssetsDefinition:
    """The asset below all live files that makes the server load them."""

    @dg.asset(
        key=SERVER_RELOAD,
        deps=[deployed_key(spec) for spec in catalog.indexes],
        group_name="server",
        kinds={"shell"},
        owners=OWNERS,
        code_version=CODE_VERSION,
        # No retry: a server that did not come up has its files put back, and a person looks.
        description="The server reads its files only at start: `MUSE_RELOAD` runs once after the day's last "
        "deploy. If it or `MUSE_RELOAD_HEALTH` fails, the files it covered go back and the run is red.",
    )
    def server_reload(
        context: dg.AssetExecutionContext, server_directory: ServerDirectory
    ) -> dg.MaterializeResult:
        def live() -> str:
            return "; ".join(live_now(spec, server_directory) for spec in catalog.indexes)

        with red_run("server_reload", live):
            try:
                done = reload_server(
                    server_directory.ready(),
                    catalog.indexes,
                    hook=server_directory.reload,
                    health=server_directory.reload_health,
                )
            except ReloadFailed as failed:
                # Else the UI and the sensor would take the withdrawn files for live.
                for back in failed.returned:
                    context.log_event(
                        dg.AssetMaterialization(
                            deployed_key(catalog.index(back.index)),
                            metadata={
                                "sha256": back.sha256,
                                "partition": back.partition,
                                "rollback": True,
                                "size_mb": round(back.size / 1e6, 3),
                            },
                        )
                    )
                raise
        return dg.MaterializeResult(
            metadata={
                "message": done.message,
                "reloaded": done.reloaded,
                "indexes": ", ".join(done.covered) or "none",
                "seconds": round(done.seconds, 3),
            }
        )

    return server_reload
