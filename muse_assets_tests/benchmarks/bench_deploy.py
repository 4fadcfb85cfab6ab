"""A deploy of a large file against `cp` and fsync of the same file.

Here: random bytes with a manifest, since a deploy reads no vector. Not here: what it survives
(`muse_assets_tests/faults`).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from muse_assets.durable_files import discard, file_sha256, fsync_directory, stage_copy
from muse_assets.publishing.deploying import deploy
from muse_assets_tests.benchmarks.measuring import Cost, Facts, Row, begin, in_turn, measure
from muse_assets_tests.server_directories import SPEC, Snapshot, snapshot

_BYTES = 300_000_000
_REPEATS = 5
# Of a live file that was written within the last minute, its bytes alone tell that it is still the same.
_A_MINUTE = 61.0
_DAYS = ("2026-11-21", "2026-11-22")


def rows(scale: float) -> Iterator[Row]:
    """A deploy over a file that is older than a minute, as the day's is, and over one that is not."""
    size = int(_BYTES * scale)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        before, after = (_snapshot(root / "work", seed, size, day) for seed, day in enumerate(_DAYS))
        # A server directory for each deploy, since what it leaves is a new file.
        servers = [root / f"server_{number}" for number in range(_REPEATS)]
        for server in servers:
            server.mkdir()
            deploy(SPEC, *before, server)
        os.sync()
        time.sleep(_A_MINUTE)
        costs = [in_turn(1, (_deploy, (after, server)), (_copy, (after[0], root))) for server in servers]
        ours, copy = (_median(list(column)) for column in zip(*costs, strict=True))
        parts = measure(_parts, after[0], root / "parts.index").facts
        note = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
        what = f"deploy of {size / 1e6:,.0f} MB"
        yield Row(what, "cp, fsync", ours, copy, reach=2, faster=False, note=f"its parts alone: {note}")
        if {file_sha256(server / SPEC.live_file) for server in servers} != {after[1].sha256}:
            raise RuntimeError("what is live is not what was deployed")
        again = (before[0], replace(before[1], partition="2026-11-23"))
        young = _median([measure(_deploy, again, server) for server in servers])
        yield Row(f"{what}, over one of this minute", "cp, fsync", young, copy, reach=None, faster=False)


def _median(costs: list[Cost]) -> Cost:
    return sorted(costs, key=lambda cost: cost.wall)[len(costs) // 2]


def _snapshot(work: Path, seed: int, size: int, day: str) -> Snapshot:
    path, manifest = snapshot(work, seed, day)
    content = np.random.default_rng(seed).bytes(size)
    path.write_bytes(content)
    return path, replace(manifest, sha256=hashlib.sha256(content).hexdigest(), size=size)


def _deploy(taken: Snapshot, server: Path) -> Facts:
    begin()
    done = deploy(SPEC, *taken, server)
    if done.already_live or done.warning:
        raise RuntimeError(f"it was no ordinary deploy: {done}")
    return {}


def _copy(source: Path, folder: Path) -> Facts:
    target = folder / "copied.index"
    target.unlink(missing_ok=True)
    begin()
    subprocess.run(["cp", source, target], check=True)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    fsync_directory(folder)
    return {}


def _parts(source: Path, target: Path) -> dict[str, float]:
    started = time.perf_counter()
    file_sha256(source)
    hashed = time.perf_counter()
    discard(stage_copy(target, source, expected_size=source.stat().st_size))
    return {"hash of the live file": hashed - started, "copy, fsync, hash": time.perf_counter() - hashed}
