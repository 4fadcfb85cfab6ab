"""One index on a small table: its snapshots, built and read back.

Here: building, and what a work directory holds. Not here: the table's rows (`embedding_rows.py`), or a
whole installation (`installations.py`).
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import engine_for
from muse_assets.ivfpq.contents import list_ids
from muse_assets.ivfpq.files import read_index
from muse_assets.snapshots.building import Built, build_snapshot
from muse_assets_tests.embedding_rows import SPEC

MONTH = date(2026, 11, 1)


@dataclass(frozen=True)
class Lane:
    """One index: its table, its work directory. url: the database's."""

    engine: Engine
    url: str
    spec: IndexSpec
    work: Path

    @property
    def cluster(self) -> Path:
        return self.work / self.spec.cluster_file

    def file(self, day: int) -> Path:
        return self.work / self.spec.snapshot_file(MONTH.replace(day=day))


def lane_at(url: str, work: Path) -> Lane:
    return Lane(engine_for(url), url, replace(SPEC, recall_gate=0.3, max_rejected_share=0.05), work)


def build(lane: Lane, day: int = 1, **options: Any) -> Built:
    return build_snapshot(lane.engine, lane.spec, lane.work, MONTH.replace(day=day), **options)


def full_bytes(lane: Lane, day: int = 1) -> bytes:
    """What a full build of the day in a new directory gives, with the lane's cluster."""
    elsewhere = Path(tempfile.mkdtemp(dir=lane.work.parent))
    built = build(replace(lane, work=elsewhere), day, cluster_path=lane.cluster, full=True)
    assert built.manifest.mode == "full"
    content = built.path.read_bytes()
    shutil.rmtree(elsewhere)
    return content


def ids_in(path: Path) -> list[int]:
    return sorted(list_ids(read_index(path)).tolist())


def temps(lane: Lane) -> list[Path]:
    return [path for path in lane.work.rglob("*") if path.name.startswith(".") and path.suffix == ".part"]
