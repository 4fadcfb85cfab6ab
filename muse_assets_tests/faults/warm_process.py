"""Real processes that run the graph without the seconds of a start, so that hundreds of them can be killed.

Here: one process that has imported everything, built the definitions and run none of them, and forks a
child a run (0.02 s, where a `dagster` command line takes 4 to 8 s); the child opens the instance and executes
the job as that command line does. Not here: what is killed when, or what must hold (the tests).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dagster as dg
import faiss
import pytest

from muse_assets.cli import cli
from muse_assets.definitions import build_defs
from muse_assets_tests.installations import Ran, hurry_retries
from muse_assets_tests.servers import die_with_parent

PATIENCE_SECONDS = 300
JOBS = ("daily", "rebuild", "deploy", "playlists")


@dataclass(frozen=True)
class Step:
    """One thing that a child does: assets of a job, or a `muse` command (`arguments`). run_config as Dagster
    takes it; `config` is short for it: asset -> its configuration.
    """

    job: str = ""
    assets: tuple[str, ...] = ()
    partition: str | None = None
    config: dict[str, Any] | None = None
    arguments: tuple[str, ...] = ()
    run_config: dict[str, Any] | None = None
    tags: dict[str, str] | None = None


@dataclass(frozen=True)
class Child:
    """A started child, leader of a process group of its own. result: the file of its outcomes."""

    warm: WarmProcess
    pid: int
    result: Path

    def status(self) -> int | None:
        """None while it runs, then its exit status, negative for a signal."""
        with contextlib.suppress(KeyError):
            return self.warm.ended[self.pid]
        status: int | None = self.warm.ask({"poll": self.pid})
        if status is not None:
            self.warm.ended[self.pid] = status
        return status

    def wait(self) -> int:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (status := self.status()) is None:
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGUSR1)  # where each of its threads hangs goes to its log
                    time.sleep(1)
                self.kill()
                raise TimeoutError(f"a run did not end within {PATIENCE_SECONDS} s: {self.log[-6000:]}")
            time.sleep(0.01)
        return status

    def kill(self) -> None:
        """SIGKILL to the whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def log(self) -> str:
        path = self.result.with_suffix(".log")
        return path.read_text("utf-8", "replace") if path.exists() else ""

    @cached_property
    def outcomes(self) -> list[dict[str, Any]]:
        """One a step that was reached: success, failure (what the operator reads), retries."""
        return [json.loads(line) for line in self.result.read_text("utf-8").splitlines()]


@dataclass(frozen=True)
class WarmProcess:
    """The process that forks the children."""

    process: subprocess.Popen[str]
    folder: Path
    ended: dict[int, int]

    def start(self, *steps: Step, at: float = 0.0) -> Child:
        """Fork a child that takes the steps until one fails; `at`: the monotonic time to begin at."""
        result = self.folder / f"{time.monotonic_ns()}.json"
        pid = self.ask({"steps": [vars(step) for step in steps], "result": str(result), "at": at})
        return Child(self, pid, result)

    def ask(self, what: dict[str, Any]) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextlib.contextmanager
def warm_process(folder: Path, environment: dict[str, str]) -> Iterator[WarmProcess]:
    """A warm process under these environment variables; results and logs of its children go to `folder`."""
    folder.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "muse_assets_tests.faults.warm_process"],
        env=os.environ | environment,
        cwd=Path(__file__).parent.parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == '"ready"\n'
        yield WarmProcess(process, folder, {})
    finally:
        process.kill()
        process.communicate()


def _serve() -> None:
    # Dagster's pauses between the tries of a step, 15 and 30 s, shrink to hundredths.
    hurry_retries(pytest.MonkeyPatch())
    faiss.omp_set_num_threads(1)
    defs = build_defs()
    for job in JOBS:
        defs.resolve_job_def(job)
    # What Dagster imports at its first run and its first instance on disk: 0.6 s of a child's 0.85.
    dg.materialize([dg.asset(lambda: None, name="nothing")])
    with dg.DagsterInstance.get() as instance:
        instance.get_runs(limit=1)
    assert threading.active_count() == 1, "a lock that a thread holds would stay locked in the children"
    gc.freeze()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            _child(defs, [Step(**step) for step in asked["steps"]], Path(asked["result"]), asked["at"])
        print(json.dumps(answer), flush=True)


def _child(defs: dg.Definitions, steps: list[Step], result: Path, at: float) -> None:
    failed = 1
    try:
        os.setsid()
        die_with_parent()
        log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.register(signal.SIGUSR1, file=log)
        time.sleep(max(0.0, at - time.monotonic()))
        for step in steps:
            outcome = _muse(step) if step.arguments else _run(defs, step)
            with result.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome) + "\n")
            failed = not outcome["success"]
            if failed:
                break
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(failed)


def _run(defs: dg.Definitions, step: Step) -> dict[str, Any]:
    ops = {name.replace("/", "__"): {"config": values} for name, values in (step.config or {}).items()}
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    with dg.DagsterInstance.get() as instance:
        ran = Ran(
            defs.resolve_job_def(step.job).execute_in_process(
                instance=instance,
                asset_selection=[dg.AssetKey.from_user_string(name) for name in step.assets] or None,
                partition_key=step.partition,
                run_config={"ops": ops, **(step.run_config or {}), **quiet},
                tags=step.tags,
                raise_on_error=False,
            )
        )
    return {"success": ran.success, "failure": ran.failure, "retries": ran.retries}


def _muse(step: Step) -> dict[str, Any]:
    try:
        cli(list(step.arguments), standalone_mode=False)
    except SystemExit as ended:
        return {"success": not ended.code, "failure": f"exit code {ended.code}", "retries": 0}
    return {"success": True, "failure": "", "retries": 0}


if __name__ == "__main__":
    _serve()
