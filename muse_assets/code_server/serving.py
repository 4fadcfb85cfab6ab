"""Dagster's gRPC server (`dagster api grpc`) with another way to start a run's process.

Here: that difference, and the pools made known. Not here: the process itself (`forking.py`). All else is
Dagster's: one process a run, "Terminate", the report of a run that died, and the end that waits for running
runs.

Dagster spawns a fresh interpreter for each run, whose imports are nearly all of what a short run costs, and
has no setting for it; the context is an attribute of the server, and a test holds Dagster to it.
"""

from __future__ import annotations

from typing import Any

import dagster as dg
from dagster._cli.api import grpc_command
from dagster._grpc import server

from muse_assets.code_server.forking import warm_context
from muse_assets.definitions import defs


class WarmApiServer(server.DagsterApiServer):
    """The server whose runs are forks of a warm process."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._mp_ctx = warm_context(["muse_assets.code_server.warm"])  # type: ignore[assignment]
        if self._instance is not None:
            _know_pools(self._instance)


def _know_pools(instance: dg.DagsterInstance) -> None:
    """Give every pool its limit now. The run queue does so as it first meets one, and until its next look
    holds nothing back: two runs of one index that a new instance found queued together began together.
    """
    graph = defs.resolve_asset_graph()
    for pool in sorted({pool for key in graph.get_all_asset_keys() for pool in graph.get(key).pools or ()}):
        instance.event_log_storage.initialize_concurrency_limit_to_default(pool)


def main() -> None:
    """Serve until SIGTERM; the options are those of `dagster api grpc`."""
    # The command takes the class from its module when it runs.
    server.DagsterApiServer = WarmApiServer  # type: ignore[misc]
    grpc_command(prog_name="python -m muse_assets.code_server")
