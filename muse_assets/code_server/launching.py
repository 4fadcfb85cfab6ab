"""Dagster's default run launcher, and whether a run that it started is still at work.

Here: the question to the code location, for the daemon's run monitoring (`dagster.yaml`). Not here: starting
a run's process (`serving.py`, `forking.py`). Webserver and daemon import this, so it imports no definitions:
they have none of the stores' secrets.

Without it a run that is killed together with its code location stays STARTED until `max_runtime_seconds`,
unless the code location comes back under the same host name (`assets/run_processes.py`): a host that is gone
does not come back, and a container does under another name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster._config.config_schema import UserConfigSchema
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._grpc.client import DagsterGrpcClient
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import ConfigurableClassData, deserialize_value

_ANSWER_SECONDS = 10


class WatchingRunLauncher(DefaultRunLauncher):
    """Starts runs as the default launcher does, and knows when one's process is gone.

    unreachable_seconds: for so long a code location may not answer before its runs are given up. One that
    stops in order answers until its last run has ended.
    """

    def __init__(self, unreachable_seconds: int, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(inst_data)
        self._unreachable_seconds = unreachable_seconds
        self._silent_since: dict[str, float] = {}

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        """The settings under `run_launcher: config:`."""
        return {"unreachable_seconds": dg.Field(dg.IntSource, default_value=120)}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> WatchingRunLauncher:
        """The launcher that dagster.yaml describes."""
        return cls(inst_data=inst_data, **config_value)

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Whether run monitoring is to ask."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """What is known of the process of a started run; anything but RUNNING has the daemon fail it."""
        client = self._get_grpc_client_for_termination(run.run_id)  # type: ignore[no-untyped-call]
        if client is None:  # it has just finished, or a `muse` command executes it in its own process
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        try:
            at_work = _executes(client, run.run_id)
        except DagsterUserCodeUnreachableError:
            return self._unreachable(client, run.run_id)
        self._silent_since.pop(run.run_id, None)
        if at_work:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(
            WorkerStatus.FAILED, "the code location restarted, and with it went the process of this run"
        )

    def _unreachable(self, client: DagsterGrpcClient, run_id: str) -> CheckRunHealthResult:
        now = time.monotonic()
        silent = now - self._silent_since.setdefault(run_id, now)
        where = f"{client.host}:{client.port}" if client.port else str(client.socket)
        message = f"the code location at {where} has not answered for {silent:.0f} s"
        if silent < self._unreachable_seconds:
            return CheckRunHealthResult(WorkerStatus.RUNNING, message)
        del self._silent_since[run_id]
        return CheckRunHealthResult(WorkerStatus.FAILED, message)


def _executes(client: DagsterGrpcClient, run_id: str) -> bool:
    request = CanCancelExecutionRequest(run_id=run_id)
    answer = client.can_cancel_execution(request, timeout=_ANSWER_SECONDS)
    return deserialize_value(answer, CanCancelExecutionResult).can_cancel
