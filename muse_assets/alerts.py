"""Tells people of a red run: the words of its first failure, to a webhook and to a log file.

Here: the text, where it goes, and the sensor that sends it. Not here: the words of a failure
(`assets.failing`), or what is retried (`automation`).
"""

from __future__ import annotations

import json
import urllib.request
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import dagster as dg
from tenacity import Retrying, stop_after_attempt, wait_exponential

from muse_assets.dated_logs import dated_log
from muse_assets.failures import PassingFailure
from muse_assets.seoul_time import SEOUL
from muse_assets.settings import Settings

_TIMEOUT_SECONDS = 10


def build_failure_sensor(settings: Settings, *, running: bool) -> dg.SensorDefinition:
    """Reports every failed run of this code location once: `alerts/alerts_<YYYYMMDD>.log`, MUSE_ALERT_URL."""

    @dg.run_failure_sensor(
        name="report_failures",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
        description="Posts the first lines of every failed run to MUSE_ALERT_URL (Slack-compatible JSON) "
        "and appends them to the day's alert log.",
    )
    def report_failures(context: dg.RunFailureSensorContext) -> None:
        said = [
            str(shown.description) if (shown := event.step_failure_data.user_failure_data) else ""
            for event in context.get_step_failure_events()
        ]
        text = alert_text(
            context.dagster_run.job_name,
            context.dagster_run.run_id,
            next(filter(None, said), context.failure_event.message or "it gave no reason"),
            settings.ui_url,
        )
        path = write_alert(settings.log_dir.expanduser(), text, datetime.now(SEOUL))
        if settings.alert_url is not None:
            post_alert(settings.alert_url.get_secret_value(), text, path)

    return report_failures


def alert_text(job: str, run_id: str, failure: str, ui_url: str | None = None) -> str:
    """What happened, to what, what is live and what to do, as on the run's page; then where that page is."""
    page = f"{ui_url.rstrip('/')}/runs/{run_id}" if ui_url else run_id
    return f"{failure}\nRun of {job}: {page}"


def write_alert(logs: Path, text: str, now: datetime) -> Path:
    """Append the alert to the day's file, one line."""
    path = dated_log(logs, "alerts", now)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{now:%Y-%m-%d %H:%M:%S} {' | '.join(text.splitlines())}\n")
    return path


def post_alert(url: str, text: str, log: Path) -> None:
    """POST `{"text": ...}`, thrice at most; PassingFailure names the host alone, for the path is a secret."""
    body = json.dumps({"text": text}, ensure_ascii=False).encode("utf-8")
    headers = {"Content-Type": "application/json; charset=utf-8"}
    # The setting was checked to be http or https.
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")  # noqa: S310

    def once() -> None:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):  # noqa: S310
            pass

    try:
        Retrying(stop=stop_after_attempt(3), wait=wait_exponential(0.5, max=5), reraise=True)(once)
    except (OSError, ValueError) as error:
        reason = getattr(error, "code", None) or getattr(error, "reason", None) or type(error).__name__
        raise PassingFailure(
            f"The alert could not be posted to {urlsplit(url).hostname} (MUSE_ALERT_URL): {reason}.",
            next_step=f"check the webhook; the alert is in {log}.",
        ) from None
