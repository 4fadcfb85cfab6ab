"""Runs of the asset graph from the terminal, recorded in the same Dagster instance as the UI's.

Here: the instance, and launching a job in this process. Not here: which jobs (`running`).
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

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


def launch(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    job: str,
    assets: Sequence[dg.AssetKey],
    *,
    partition: str | None = None,
    run_config: dict[str, Any] | None = None,
) -> Outcome:
    """Run some assets of a job in this process; a failure is returned, not raised."""
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    result = defs.resolve_job_def(job).execute_in_process(
        instance=instance,
        asset_selection=list(assets),
        partition_key=partition,
        run_config={**(run_config or {}), **quiet},
        raise_on_error=False,
        tags={"muse/from": "command line"},
    )
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


def _failure(result: dg.ExecuteInProcessResult) -> str:
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            if data.user_failure_data and data.user_failure_data.description:
                return str(data.user_failure_data.description)
            if data.error:
                return str(data.error.message)
    return "" if result.success else "the run failed before its first step"
