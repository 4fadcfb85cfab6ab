"""Dagster as `deploy/` runs it, on an installation of a test's own: code location, daemon, webserver.

Here: starting the three processes, waiting until the page answers, stopping them. Not here: the systemd
units (`test_deployment.py`), `muse ui` (`test_cli.py`), or what the pages show.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muse_assets_tests.servers import dying_with_parent, free_port

LOCATION = "muse_assets"
_ROOT = Path(__file__).parents[2]
_START_SECONDS = 120
_STOP_SECONDS = 30


@dataclass(frozen=True)
class DagsterHost:
    """A running webserver, whose daemon and code location run as well. environment: what all three see."""

    address: str
    environment: Mapping[str, str]

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        """The `data` of an answer; RuntimeError if the server answers with errors, OSError if not at all."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(  # noqa: S310
            f"{self.address}/graphql", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310
            answer: dict[str, Any] = json.load(reply)
        if answer.get("errors"):
            raise RuntimeError(f"{query}: {answer['errors']}")
        data: dict[str, Any] = answer["data"]
        return data


@contextlib.contextmanager
def dagster_host(folder: Path, environment: Mapping[str, str]) -> Iterator[DagsterHost]:
    """The three processes, from when the page knows the assets. folder: for logs and the workspace file."""
    port, socket = free_port(), folder / "code.sock"
    workspace = folder / "workspace.yaml"
    workspace.write_text(
        f"load_from:\n  - grpc_server:\n      socket: {socket}\n      location_name: {LOCATION}\n"
    )
    # One code location for both: of its own each of them loads the code again every minute.
    commands = (
        ["python", "-m", "muse_assets.code_server", "--socket", socket, "-m", "muse_assets.definitions"],
        ["dagster-daemon", "run", "-w", workspace],
        ["dagster-webserver", "-h", "127.0.0.1", "-p", port, "-w", workspace],
    )
    host = DagsterHost(f"http://127.0.0.1:{port}", environment)
    deadline = time.monotonic() + _START_SECONDS
    with contextlib.ExitStack() as running:
        code, *others = (_Process(list(map(str, command)), folder) for command in commands)
        code.start(running, environment)
        while not socket.exists():
            code.wait_a_moment(deadline)
        for other in others:
            other.start(running, environment)
        while not _knows_assets(host):
            for process in (code, *others):
                process.wait_a_moment(deadline)
        yield host


def _knows_assets(host: DagsterHost) -> bool:
    try:
        return bool(host.graphql("{assetNodes {id}}")["assetNodes"])
    except OSError:
        return False


class _Process:
    """One of them. command: of a program beside this interpreter; folder: where its log is."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._command = command
        self._log = folder / f"{command[0]}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, running: contextlib.ExitStack, environment: Mapping[str, str]) -> None:
        program = str(Path(sys.executable).with_name(self._command[0]))
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                dying_with_parent([program, *self._command[1:]]),
                cwd=_ROOT,
                env=dict(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        running.callback(self._stop)

    def wait_a_moment(self, deadline: float) -> None:
        """RuntimeError with the end of the log if the process has ended, or the deadline passed."""
        assert self._process is not None
        if self._process.poll() is not None or time.monotonic() > deadline:
            tail = self._log.read_text("utf-8", "replace")[-2000:]
            raise RuntimeError(f"{self._command[0]} ended, or does not answer: {tail}")
        time.sleep(0.1)

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
