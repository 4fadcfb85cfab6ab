"""Runs of the asset graph from the terminal, recorded in the same Dagster instance as the UI's.

Here: the instance, and launching a job in this process, interrupted or not. Not here: which jobs
(`running`).
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import dagster as dg

from muse_assets.assets.run_processes import fail_dead_runs, this_process
from muse_assets.settings import Settings


@dataclass(frozen=True)
class Outcome:
    """One run: what it said when it failed, and the metadata of what it materialized, by asset key."""

    success: bool
    failure: str
    run_id: str
    metadata: dict[str, dict[str, Any]]


def dagster_home(settings: Settings) -> Path:
    """DAGSTER_HOME, or the embedded default's, with its dagster.yaml in place."""
    home = Path(os.environ.get("DAGSTER_HOME") or settings.root / "dagster").resolve()
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        default = importlib.resources.files("muse_assets") / "dagster.yaml"
        (home / "dagster.yaml").write_text(default.read_text("utf-8"), "utf-8")
    os.environ["DAGSTER_HOME"] = str(home)
    return home


@contextlib.contextmanager
def open_instance(settings: Settings) -> Iterator[dg.DagsterInstance]:
    """The instance, without runs that a killed process left unfinished: the deploy sensor would wait."""
    dagster_home(settings)
    # The job log is one such handler; a release that changed them would fail its test.
    warnings.filterwarnings("ignore", "Handling yaml-defined logging", dg.BetaWarning)
    with dg.DagsterInstance.get() as instance:
        fail_dead_runs(instance)
        yield instance


def launch(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    job: str,
    assets: Sequence[dg.AssetKey],
    *,
    partition: str | None = None,
    run_config: dict[str, Any] | None = None,
) -> Outcome:
    """Run some assets of a job in this process; a failure is returned, not raised.

    KeyboardInterrupt comes through at once, with the run recorded as cancelled; its thread goes on until
    the process ends (`cli.main`), which harms no file: every writer expects to be killed.
    """
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    run_id = str(uuid.uuid4())
    # In a thread, because in the main one Dagster takes the signals and answers an interrupted step that
    # has a retry policy by running it again: Ctrl-C and SIGTERM did not end a run (measured: 25 s more).
    threads = ThreadPoolExecutor(1)
    future = threads.submit(
        defs.resolve_job_def(job).execute_in_process,
        instance=instance,
        asset_selection=list(assets),
        partition_key=partition,
        run_config={**(run_config or {}), **quiet},
        raise_on_error=False,
        run_id=run_id,
        tags={"muse/from": "command line", **_index_tag(assets), **this_process()},
    )
    try:
        _show_retries(instance, run_id, future)
        result = future.result()
    except KeyboardInterrupt:
        run = instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            instance.report_run_canceled(run, message="Interrupted at the command line.")
        raise
    finally:
        threads.shutdown(wait=False)
    return Outcome(
        success=result.success,
        failure=_failure(result),
        run_id=result.run_id,
        metadata={
            event.asset_key.to_user_string(): {
                name: getattr(value, "value", value) for name, value in event.materialization.metadata.items()
            }
            for event in result.get_asset_materialization_events()
            if event.asset_key
        },
    )


def _index_tag(assets: Sequence[dg.AssetKey]) -> dict[str, str]:
    """As the schedule's and the sensor's runs have it, for the list of runs; none outside the lanes."""
    indexes = {key.path[0] for key in assets if len(key.path) == 2}
    return {"muse/index": indexes.pop()} if len(indexes) == 1 else {}


def _show_retries(instance: dg.DagsterInstance, run_id: str, run: Future[Any]) -> None:
    """Until the run ends, say on stderr what a step that waits to be tried again is waiting for."""
    shown = 0
    while wait([run], timeout=1).not_done:
        retries = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY)
        for entry in retries[shown:]:
            data = entry.get_dagster_event().step_retry_data
            # "<class>: <subject>: <what>", and what is live and what to do on lines of their own.
            _, _, said = str((data.error.cause or data.error).message).splitlines()[0].partition(": ")
            click.echo(f"{said} Trying again in {data.seconds_to_wait or 0:.0f} s.", err=True)
        shown = len(retries)


def _failure(result: dg.ExecuteInProcessResult) -> str:
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            if data.user_failure_data and data.user_failure_data.description:
                return str(data.user_failure_data.description)
            if data.error:
                return str(data.error.message)
    return "" if result.success else "the run failed before its first step"
