"""Processes started and stopped as systemd does it, from the unit files, where no systemd runs.

Here: what a unit file says, and the part of it that needs no privileges: command, environment, umask,
directories, signals. Not here: the sandbox (`systemd-analyze` checks it), or what a unit is for (the tests).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from muse_assets_tests.servers import dying_with_parent

_START_SECONDS = 90


@dataclass(frozen=True)
class Unit:
    """The settings of one unit's [Service] section, drop-ins included, every value in file order."""

    name: str
    settings: Mapping[str, list[str]]

    def values(self, key: str) -> list[str]:
        return self.settings.get(key, [])

    def value(self, key: str) -> str:
        """The last one, which counts; empty if there is none."""
        return (self.values(key) or [""])[-1]

    @property
    def environment(self) -> dict[str, str]:
        """All that the process sees: nothing of ours comes through."""
        found = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        found |= {"HOME": self.value("WorkingDirectory"), "USER": self.value("User")}
        for file in self.values("EnvironmentFile"):
            found |= read_environment(Path(file))
        return found


def read_unit(folder: Path, name: str) -> Unit:
    """A unit of the folder, with the drop-ins of its name's prefixes (`a-b-.service.d` for a-b-c.service)."""
    parts = name.removesuffix(".service").split("-")
    prefixes = ["-".join(parts[:count]) + "-" for count in range(1, len(parts))]
    drop_ins = [folder / f"{prefix}.service.d" for prefix in (*prefixes, name.removesuffix(".service"))]
    files = [folder / name, *(file for drop_in in drop_ins for file in sorted(drop_in.glob("*.conf")))]
    settings: dict[str, list[str]] = {}
    for file in files:
        section = ""
        for line in map(str.strip, file.read_text("utf-8").splitlines()):
            if line.startswith("["):
                section = line
            elif section == "[Service]" and line and not line.startswith(("#", ";")):
                key, _, value = line.partition("=")
                settings.setdefault(key, []).append(value)
    return Unit(name, settings)


def read_environment(file: Path) -> dict[str, str]:
    """An EnvironmentFile of plain NAME=value lines."""
    lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


@dataclass
class Service:
    """A unit to be started and stopped. runtime: where its RuntimeDirectory is made; log: its output."""

    unit: Unit
    runtime: Path
    log: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.unit.name} was not started"
        return self._process.pid

    def start(self) -> None:
        """ExecStart, then ExecStartPost until it succeeds; RuntimeError with the log if either fails."""
        if directory := self.unit.value("RuntimeDirectory"):
            (self.runtime / directory).mkdir(
                mode=int(self.unit.value("RuntimeDirectoryMode"), 8), parents=True
            )
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                dying_with_parent(shlex.split(self.unit.value("ExecStart"))),
                cwd=self.unit.value("WorkingDirectory"),
                env=self.unit.environment,
                umask=int(self.unit.value("UMask"), 8),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, as a unit's control group
            )
        if after := self.unit.value("ExecStartPost"):
            with subprocess.Popen(shlex.split(after), start_new_session=True) as post:
                deadline = time.monotonic() + _START_SECONDS
                while post.poll() is None:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        os.killpg(post.pid, signal.SIGKILL)
                        raise RuntimeError(f"{self.unit.name} did not start: {self.tail()}")
                    time.sleep(0.1)

    def stop(self, seconds: float) -> int:
        """SIGTERM to the main process alone (KillMode=mixed); its exit status. Then the rest is killed."""
        assert self.unit.value("KillMode") == "mixed"
        assert self._process is not None, f"{self.unit.name} was not started"
        self._process.terminate()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{self.unit.name} did not stop in {seconds} s: {self.tail()}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """All of it, at once. Does nothing to one that does not run."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        if directory := self.unit.value("RuntimeDirectory"):
            shutil.rmtree(self.runtime / directory, ignore_errors=True)

    def tail(self) -> str:
        """The end of its output."""
        return self.log.read_text("utf-8", "replace")[-3000:]
