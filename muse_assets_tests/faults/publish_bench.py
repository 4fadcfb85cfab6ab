"""A publish to be disturbed: what it starts from, a fresh server directory for each try, what it may leave.

Here: kinds of publishes and the rule that holds at every moment of them. Not here: the faults.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import faiss

from muse_assets.publishing.deploying import rollback
from muse_assets_tests.faults.system_calls import Call, calls_of
from muse_assets_tests.server_directories import (
    SPEC,
    Snapshot,
    contents,
    fallback,
    live,
    put,
    sha,
    snapshot,
    trained_index,
)

Chosen = TypeVar("Chosen")
Start = Callable[[Path, Path], None]


def empty(_work: Path, _server: Path) -> None:
    """A new server directory."""


def legacy(_work: Path, server: Path) -> None:
    faiss.write_index(trained_index(7), str(server / SPEC.live_file))


def one_deploy(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))


def with_backup(work: Path, server: Path) -> None:
    put(server, snapshot(work, 1))
    put(server, snapshot(work, 2))


def after_a_kill(work: Path, server: Path) -> None:
    """As a deploy leaves it that was killed just before its rename: backup and fallback share the live
    file's inode, and temps lie about.
    """
    put(server, snapshot(work, 1))
    put(server, snapshot(work, 2))
    fallback_file, live_file = server / SPEC.fallback_file, server / SPEC.live_file
    backup = server / ".backups" / SPEC.name / f"29990101T000000.000000Z_{live(server)[:12]}.index"
    os.link(live_file, backup)
    fallback_file.rename(server / f".{SPEC.fallback_file}.1-1.part")
    os.link(backup, fallback_file)
    shutil.copyfile(snapshot(work, 3)[0], server / f".{SPEC.live_file}.1-1.part")


@dataclass(frozen=True)
class Publish:
    """One kind of publish. taken: the snapshot to deploy; None rolls back."""

    start: Start
    taken: int | None

    @property
    def name(self) -> str:
        return f"{'rollback' if self.taken is None else 'deploy'} over {self.start.__name__}"


@dataclass(frozen=True)
class Bench:
    """A template of a server directory, copied for every injection, and the publish to be disturbed.

    old: content of the live file before, None if there is none. new: that of after the publish.
    """

    work: Path
    folder: Path
    template: Path
    publish: Publish
    taken: Snapshot
    old: str | None
    new: str

    def fresh(self, label: str) -> Path:
        server = self.folder / label
        # cp and not shutil: the fallback is a further name of a backup, and stays one.
        subprocess.run(["cp", "-a", self.template, server], check=True)
        return server

    def run(self, server: Path) -> str:
        """The publish; what it said: the content that is live, and its warning if there is one."""
        done = rollback(SPEC, server) if self.publish.taken is None else put(server, self.taken)
        return f"{done.sha256}; warning: {done.warning}" if done.warning else done.sha256

    def calls(self) -> list[Call]:
        """The system calls of the undisturbed publish."""
        self.run(self.fresh("warm"))
        server = self.fresh("undisturbed")
        return calls_of(lambda: self.run(server), self.log)

    @property
    def log(self) -> Path:
        return self.work / "strace"

    def content(self, server: Path) -> str | None:
        return live(server) if (server / SPEC.live_file).exists() else None

    @property
    def known(self) -> set[str]:
        """Contents that may stand in the server directory."""
        return {*contents(self.template).values(), self.new}


def bench_of(publish: Publish, work: Path, folder: Path) -> Bench:
    """work: where snapshots and logs lie; folder: where the server directories do."""
    snapshots, template = work / "work", folder / "template"
    snapshots.mkdir()
    template.mkdir()
    publish.start(snapshots, template)
    old = live(template) if (template / SPEC.live_file).exists() else None
    taken = snapshot(snapshots, publish.taken or 1)
    return Bench(work, folder, template, publish, taken, old, taken[1].sha256)


def spread(choices: list[Chosen], wanted: int) -> list[Chosen]:
    """So many of them, evenly spread, the first and the last among them; all if there are no more."""
    wanted = min(wanted, len(choices))
    return [choices[round(at * (len(choices) - 1) / (wanted - 1))] for at in range(wanted)]


def assert_served(bench: Bench, server: Path) -> None:
    """What the search server may load at this moment is complete, and so is every backup."""
    assert bench.content(server) in (bench.old, bench.new)
    if (server / SPEC.fallback_file).exists():
        assert fallback(server) in bench.known
        assert faiss.read_index(str(server / SPEC.fallback_file)).ntotal == 400
    else:
        assert not (bench.template / SPEC.fallback_file).exists()
    for backup in (server / ".backups" / SPEC.name).glob("[0-9]*.index"):
        assert sha(backup).startswith(backup.stem.rpartition("_")[2])
    for path in (bench.template / ".backups" / SPEC.name).glob("[0-9]*.index"):
        # A publish may give up a name that only repeats the live file, never a content.
        assert sha(path) in {sha(kept) for kept in server.rglob("*.index")}
