"""Snapshots to publish and a server directory to publish them into, small enough for hundreds of deploys.

Here: making them, looking at what a publish left, and publishing in a child process. Not here: what should
hold after which event (the tests), or snapshots built from a table (`snapshots`).
"""

from __future__ import annotations

import hashlib
import os
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from muse_assets import durable_files
from muse_assets.catalog import IndexSpec
from muse_assets.failures import MuseError
from muse_assets.ivfpq.files import describe, write_index
from muse_assets.manifest import Manifest
from muse_assets.publishing.deploying import Deployment, deploy
from muse_assets.publishing.verifying import verify

SPEC = IndexSpec("vibe", "clap", "song", 16, "tb_vibe", "embedding", m=4, nbits=4)
Snapshot = tuple[Path, Manifest]


@lru_cache
def trained_index(seed: int, *, rows: int = 400, dimension: int = 16, metric: int = faiss.METRIC_L2) -> Any:
    vectors = np.random.default_rng(seed).random((rows, dimension), dtype=np.float32)
    quantizer = faiss.IndexFlat(dimension, metric)
    index = faiss.IndexIVFPQ(quantizer, dimension, 8, 4, 4, metric)
    for clustering in (index.cp, index.pq.cp):
        clustering.min_points_per_centroid = 1
        clustering.niter = 3
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(rows, dtype=np.int64))
    return index


def snapshot_of(index: Any, path: Path, day: str = "2026-11-22", *, spec: IndexSpec = SPEC) -> Snapshot:
    """Write the index as a snapshot with the manifest that describes it."""

    def produce(write: durable_files.Write) -> None:
        if isinstance(index, faiss.IndexIVF):
            write_index(index, write)
        else:
            write(faiss.serialize_index(index).tobytes())

    path.parent.mkdir(exist_ok=True)
    staged = durable_files.stage(path, produce)
    durable_files.commit(staged)
    facts = describe(path)
    manifest = Manifest(
        index=spec.name,
        partition=day,
        sha256=staged.sha256,
        size=staged.size,
        built_at=f"{day}T08:00:00+00:00",
        rows=index.ntotal,
        ntotal_field=facts.ntotal,
        index_class=facts.index_class,
        dimension=facts.dimension,
        metric=facts.metric,
        nlist=facts.nlist,
        m=facts.m or 0,
        nbits=facts.nbits or 0,
        nprobe=facts.nprobe,
        id_offset=spec.id_offset,
        cluster="c",
        encoder="e",
        source="드라이브 뮤직",
        newest_idx=facts.ntotal,
        mode="full",
        parent=None,
        added=0,
        removed=0,
        reembedded=0,
    )
    return path, manifest


def snapshot(
    work: Path, seed: int, day: str = "2026-11-22", *, spec: IndexSpec = SPEC, rows: int = 400
) -> Snapshot:
    """The same file for the same arguments."""
    return snapshot_of(trained_index(seed, rows=rows), work / f"{spec.name}_{seed}.index", day, spec=spec)


def put(server: Path, taken: Snapshot, **options: Any) -> Deployment:
    return deploy(SPEC, *taken, server, **options)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def live(server: Path) -> str:
    return sha(server / SPEC.live_file)


def fallback(server: Path) -> str:
    return sha(server / SPEC.fallback_file)


def contents(server: Path) -> dict[str, str]:
    """Every file but the locks, with its content."""
    files = (path for path in sorted(server.rglob("*")) if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(server)): sha(path) for path in files}


def temps(server: Path) -> list[Path]:
    return list(server.rglob("*.part"))


def flip_a_byte(path: Path) -> None:
    """Damage the bytes in place, as a bad disk or an editor does."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def assert_sound(server: Path) -> None:
    """Every file has its facts, the facts have a file, both names are there, no temp is left."""
    assert temps(server) == []
    found = verify(server, SPEC)
    assert {finding.path.name for finding in found} >= {SPEC.live_file, SPEC.fallback_file}
    assert [finding for finding in found if finding.state != "ok"] == []
    manifests = {path.stem for path in (server / ".manifests" / SPEC.name).glob("*.json")}
    assert manifests == {sha(finding.path) for finding in found}
    aside = [server / SPEC.fallback_file, *(server / ".backups" / SPEC.name).iterdir()]
    assert [path for path in aside if path.samefile(server / SPEC.live_file)] == []


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; return its id. It ends with 0, or with 1 for a MuseError."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    except MuseError:
        pass
    except BaseException:
        traceback.print_exc()
        code = 2
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
