"""Readers of the server directory while files are published and rolled back under them.

Here: readers in processes of their own, plain, mapping, and FAISS. Not here: kills of the publisher
(`test_publish_system_calls.py`; `test_publishing.py` reads during kills).
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest

from muse_assets.publishing.deploying import rollback
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.server_directories import (
    SPEC,
    Snapshot,
    assert_sound,
    ended,
    in_child,
    live,
    put,
    snapshot,
)

_GENERATIONS = 3
_ROWS = 20_000
_QUERIES = np.random.default_rng(77).random((5, SPEC.dimension), dtype=np.float32)


@dataclass
class Report:
    """What one reader saw. changes: how often the live content was another than the time before."""

    reads: int = 0
    changes: int = 0
    bad: list[str] = field(default_factory=list)


def sha_by_reading(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha_by_mapping(path: Path) -> str:
    """Map the file, touch its pages slowly, so that publishes fall between, and hash it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        for at in range(0, len(pages), mmap.PAGESIZE):
            _ = pages[at]
            if at % (16 * mmap.PAGESIZE) == 0:
                time.sleep(0.0005)
        return hashlib.sha256(pages).hexdigest()


def answers_by_faiss(flags: int, path: Path) -> str:
    """Load the index as a search server may, wait for a publish, and search it."""
    index = faiss.read_index(str(path), flags)
    time.sleep(0.002)
    return answers(index)


def answers(index: object) -> str:
    distances, ids = index.search(_QUERIES, 10)  # type: ignore[attr-defined]
    return hashlib.sha256(ids.tobytes() + distances.tobytes()).hexdigest()


READERS: dict[str, Callable[[Path], str]] = {
    "read": sha_by_reading,
    "map": sha_by_mapping,
    "faiss": partial(answers_by_faiss, 0),
    "faiss map": partial(answers_by_faiss, faiss.IO_FLAG_MMAP),
}


def read_until(
    stop: mmap.mmap, server: Path, report: Path, read: Callable[[Path], str], known: set[str]
) -> None:
    faulthandler.disable()  # a SIGBUS is an outcome here, and told by the exit status
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seen, before = Report(), ""
    while not stop[0]:
        for name in (SPEC.live_file, SPEC.fallback_file):
            try:
                content = read(server / name)
            except (OSError, RuntimeError) as error:
                seen.bad.append(f"{name}: {error}")
                continue
            seen.reads += 1
            if content not in known:
                seen.bad.append(f"{name}: content {content[:12]} was never published")
            if name == SPEC.live_file:
                seen.changes += content != before
                before = content
    report.write_text(json.dumps(asdict(seen)))


@contextlib.contextmanager
def reading(server: Path, taken: list[Snapshot]) -> Iterator[dict[str, Report]]:
    """Readers at work; what they saw is there when the block has ended."""
    digests = {manifest.sha256 for _, manifest in taken}
    answered = {answers(faiss.read_index(str(path))) for path, _ in taken}
    assert len(answered) == len(digests) == _GENERATIONS
    reports: dict[str, Report] = {}
    with mmap.mmap(-1, mmap.PAGESIZE) as stop:
        pids = {
            name: in_child(
                partial(
                    read_until,
                    stop,
                    server,
                    server.parent / f"{name}.json",
                    read,
                    answered if "faiss" in name else digests,
                )
            )
            for name, read in READERS.items()
        }
        try:
            yield reports
        finally:
            stop[0] = 1
            statuses = {name: ended(pid) for name, pid in pids.items()}
    for name, status in statuses.items():
        # SIGBUS, or a crash of FAISS, ends the reader.
        reports[name] = Report(bad=[f"it ended with {status}"]) if status else report_of(server, name)


def report_of(server: Path, name: str) -> Report:
    return Report(**json.loads((server.parent / f"{name}.json").read_text()))


@pytest.fixture
def server(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    folder.mkdir()
    return folder


def test_readers_of_every_kind_during_publishes(
    injecting: Injecting, times: Times, tmp_path: Path, server: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    taken = [snapshot(work, seed, rows=_ROWS) for seed in range(_GENERATIONS)]
    for one in taken:
        put(server, one)
    with injecting("27", "publishes and rollbacks under readers: plain, mapping, FAISS") as ledger:
        with reading(server, taken) as reports:
            for number in range(times(60, 1_000)):
                with ledger.injection(f"publish {number}"):
                    if number % 4 == 3:
                        rollback(SPEC, server)
                    else:
                        others = [one for one in taken if one[1].sha256 != live(server)]
                        put(server, others[number % len(others)])
        for name, report in reports.items():
            ledger.violations += [f"reader by {name}: {bad}" for bad in report.bad]
            assert report.changes > times(3, 50), f"reader by {name} hardly met a publish: {report}"
        ledger.note = f"{sum(report.reads for report in reports.values()):,} reads"
    assert_sound(server)


def test_the_readers_would_see_a_legacy_copy(tmp_path: Path, server: Path) -> None:
    """The same readers, and the cp of the scripts before: they do see torn files."""
    work = tmp_path / "work"
    work.mkdir()
    taken = [snapshot(work, seed, rows=_ROWS) for seed in range(_GENERATIONS)]
    for one in taken:
        put(server, one)
    with reading(server, taken) as reports:
        for number in range(60):
            content = taken[number % _GENERATIONS][0].read_bytes()
            with (server / SPEC.live_file).open("wb", buffering=0) as file:
                for at in range(0, len(content), 1 << 14):
                    file.write(content[at : at + (1 << 14)])
                os.fsync(file.fileno())
    assert all(report.bad for name, report in reports.items() if name in ("read", "map")), reports
