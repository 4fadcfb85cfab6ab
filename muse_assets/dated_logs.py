"""The logs that operators tail: `<MUSE_LOG_DIR>/<name>/<name>_<YYYYMMDD>.log`, one line an event.

Here: where a day's file is, how long it stays, and the handler by which every Dagster run writes one,
whoever launched it: an instance's dagster.yaml names it. Not here: what is said (the assets, `alerts`,
`cli.verb_log`).
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from muse_assets.seoul_time import SEOUL
from muse_assets.settings import Settings

KEPT_DAYS = 90
# Dagster reports these at the level of its own chatter.
_EVENTS = {
    *("PIPELINE_START", "PIPELINE_SUCCESS", "PIPELINE_FAILURE", "PIPELINE_CANCELED"),
    *("STEP_START", "STEP_SUCCESS", "STEP_FAILURE", "STEP_UP_FOR_RETRY"),
    *("ASSET_MATERIALIZATION", "ASSET_CHECK_EVALUATION"),
}


def dated_log(logs: Path, name: str, moment: datetime) -> Path:
    """The file for `moment`'s day (as it is given, Seoul's), its folder made and files past keeping removed.

    Raises OSError when the folder cannot be made.
    """
    path = logs / name / f"{name}_{moment:%Y%m%d}.log"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        oldest = f"{name}_{moment - timedelta(days=KEPT_DAYS):%Y%m%d}.log"
        for old in path.parent.glob(f"{name}_{'[0-9]' * 8}.log"):
            if old.name < oldest:
                old.unlink(missing_ok=True)
    return path


class JobLog(logging.Handler):
    """Appends each run's events to the day's file of its job.

    A line is: time (Seoul), level, the run's id, step, event, message. A log that cannot be written is
    reported on stderr and never fails a run.
    """

    def __init__(self, directory: str | None = None) -> None:
        super().__init__(logging.DEBUG)
        self.directory = Path(directory) if directory else Settings().log_dir.expanduser()

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line, if the event is one that an operator follows."""
        meta: dict[str, Any] = getattr(record, "dagster_meta", {})
        event = meta.get("dagster_event")
        kind = event.event_type_value if event else "LOG"
        followed = kind in _EVENTS or record.levelno >= (logging.WARNING if event else logging.INFO)
        if not meta.get("run_id") or not followed:
            return
        try:
            moment = datetime.fromtimestamp(record.created, SEOUL)
            level = logging.getLevelName(max(record.levelno, logging.INFO))
            said = " ".join(f"{meta.get('orig_message', '')} {_why(event)}".split())
            with dated_log(self.directory, _job(meta), moment).open("a", encoding="utf-8") as file:
                file.write(
                    f"{moment:%Y-%m-%d %H:%M:%S} {level} {meta['run_id']} {meta.get('step_key') or '-'} "
                    f"{kind.replace('PIPELINE', 'RUN')} {said}\n"
                )
        except Exception:
            self.handleError(record)


def _job(meta: dict[str, Any]) -> str:
    """Assets that a person materializes run in a job that Dagster names with underscores."""
    name = str(meta.get("job_name") or "__")
    return "materialize" if name.startswith("__") else name


def _why(event: Any) -> str:
    """What a failed step said: Dagster keeps it beside the message."""
    shown = getattr(getattr(event, "event_specific_data", None), "user_failure_data", None)
    return str(shown.description) if shown and shown.description else ""
