"""The logs by job and the alerts: what an operator tails, and what a webhook is told."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster_shared.yaml_utils import load_yaml_from_path

from muse_assets.alerts import build_failure_sensor, post_alert
from muse_assets.dated_logs import KEPT_DAYS, dated_log
from muse_assets.failures import PassingFailure
from muse_assets.seoul_time import SEOUL
from muse_assets.settings import Settings
from muse_assets_tests.installations import DAY_ONE, Installation, install

INDEX = "artist"


class Webhook(http.server.ThreadingHTTPServer):
    """Answers with the next of `answers`, then with 200, and keeps what was posted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[int] = []
        self.posted: list[tuple[str, bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/services/secret-token"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.headers["Content-Type"], body))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def installed(
    tmp_path: Path, valkey_url: str, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Installation]:
    """One index on an instance with the packaged dagster.yaml's logging."""
    monkeypatch.setenv("MUSE_LOG_DIR", str(tmp_path / "logs"))
    packaged = load_yaml_from_path(str(Path(__file__).parent.parent / "muse_assets" / "dagster.yaml"))
    assert isinstance(packaged, dict)
    overrides = {"python_logs": packaged["python_logs"]}
    (tmp_path / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "instance"), overrides=overrides) as instance:
        yield install(
            tmp_path,
            instance,
            embedding_db_url=f"sqlite:///{tmp_path / 'embeddings.sqlite'}",
            playlist_db_url=f"sqlite:///{tmp_path / 'playlists.sqlite'}",
            redis_url=valkey_url,
            only=[INDEX],
            log_dir=tmp_path / "logs",
            alert_url=webhook.url,
            ui_url="https://dagster.example/",
        )


def test_each_run_writes_its_jobs_log(installed: Installation, tmp_path: Path) -> None:
    installed.rebuild(INDEX)
    installed.execute(f"DROP TABLE {installed.catalog.index(INDEX).table}")
    failed = installed.build(INDEX, DAY_ONE)
    assert not failed.success
    today = f"{datetime.now(SEOUL):%Y%m%d}"
    rebuilt = (tmp_path / "logs" / "rebuild" / f"rebuild_{today}.log").read_text("utf-8").splitlines()
    assert rebuilt[0].split()[5] == "RUN_START"
    assert rebuilt[-1].split()[5] == "RUN_SUCCESS"
    assert sum("ASSET_MATERIALIZATION" in line for line in rebuilt) == 3
    assert sum("ASSET_CHECK_EVALUATION" in line for line in rebuilt) >= 5
    daily = (tmp_path / "logs" / "daily" / f"daily_{today}.log").read_text("utf-8").splitlines()
    assert {line.split()[3] for line in daily} == {failed.result.run_id}
    [said] = [line for line in daily if "STEP_FAILURE" in line]
    assert " ERROR " in said
    assert " ".join(failed.failure.split()) in said


def test_a_log_that_cannot_be_written_fails_no_run(
    installed: Installation, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("in the way")
    installed.rebuild(INDEX)
    assert "NotADirectoryError" in capfd.readouterr().err


def test_a_days_log_ends_the_oldest(tmp_path: Path) -> None:
    now = datetime(2026, 11, 22, 16, 58, tzinfo=SEOUL)
    for days in (0, KEPT_DAYS, KEPT_DAYS + 1):
        dated_log(tmp_path, "daily", now - timedelta(days=days)).write_text("")
    (tmp_path / "daily" / "daily_notes.log").write_text("")
    dated_log(tmp_path, "daily", now + timedelta(days=1)).write_text("")
    kept = {path.name for path in (tmp_path / "daily").iterdir()}
    assert kept == {"daily_20261123.log", "daily_20261122.log", "daily_notes.log"}


def test_a_red_run_is_told_to_the_webhook_and_the_log(
    installed: Installation, webhook: Webhook, tmp_path: Path
) -> None:
    failed = installed.build(INDEX, DAY_ONE)  # no cluster
    assert not failed.success
    webhook.answers = [503]  # the second try is taken
    report(installed, failed.result)
    [first, (kind, body)] = webhook.posted
    assert first[1] == body
    assert kind.startswith("application/json")
    text = json.loads(body)["text"]
    assert text.startswith(f"{INDEX} · index {DAY_ONE}: ")
    assert text.startswith(failed.failure)
    assert text.endswith(f"Run of daily: https://dagster.example/runs/{failed.result.run_id}")
    [log] = (tmp_path / "logs" / "alerts").iterdir()
    [line] = log.read_text("utf-8").splitlines()
    assert line.endswith(" | ".join(text.splitlines()))


def test_a_webhook_that_is_down_leaves_the_log_and_keeps_its_token(
    installed: Installation, webhook: Webhook, tmp_path: Path
) -> None:
    failed = installed.build(INDEX, DAY_ONE)
    webhook.answers = [500, 500, 500]
    with pytest.raises(PassingFailure, match=r"127\.0\.0\.1 \(MUSE_ALERT_URL\): 500") as refused:
        report(installed, failed.result)
    assert "secret-token" not in str(refused.value)
    assert len(list((tmp_path / "logs" / "alerts").iterdir())) == 1


def test_an_address_nobody_answers_is_named(tmp_path: Path) -> None:
    with pytest.raises(PassingFailure, match="refused") as failed:
        post_alert("http://127.0.0.1:9/secret-token", "text", tmp_path / "log")
    assert "secret-token" not in str(failed.value)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "secret-token"])
def test_an_alert_url_is_a_web_address(url: str) -> None:
    with pytest.raises(ValueError, match="not an http or https URL") as refused:
        Settings(alert_url=url)
    assert url not in str(refused.value)


def report(installed: Installation, result: dg.ExecuteInProcessResult) -> None:
    """Evaluate the sensor as the daemon does for a run that failed."""
    sensor = build_failure_sensor(installed.settings, running=True)
    [event] = [event for event in result.all_events if event.is_failure and event.is_job_event]
    context = dg.build_run_status_sensor_context(
        sensor_name=sensor.name,
        dagster_event=event,
        dagster_instance=installed.instance,
        dagster_run=installed.instance.get_run_by_id(result.run_id) or result.dagster_run,
    ).for_run_failure()
    sensor(context)
